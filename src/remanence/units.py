"""Figures as people read them: three digits and a prefix, decimal (1 GB is 10^9 bytes). Nothing for what is unknown."""

from __future__ import annotations

import math

_PREFIXES = {-12: "p", -9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}


def si(value: float | None, unit: str = "") -> str:
    """13_476_000_000 with "B" is "13.5 GB"; 0.00085 with "s" is "850 µs"."""
    if value is None:
        return ""
    digits, _, power = f"{value:.2e}".partition("e") if math.isfinite(value) else ("", "", "99")
    step, over = divmod(int(power), 3)
    if value == 0 or 3 * step not in _PREFIXES:
        return f"{value:.3g} {unit}".rstrip()
    return f"{float(digits) * 10**over:.{2 - over}f} {_PREFIXES[3 * step]}{unit}".rstrip()


def figure(value: float | None) -> str:
    """Three digits without a prefix, for what has no unit: "0.5", "62.1", "1250"."""
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def printable(name: object) -> str:
    """Names from files, without what would steer a terminal, turn the text around, or be no XML."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(name))
