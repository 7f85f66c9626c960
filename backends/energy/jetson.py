"""Jetson boards, by the INA3221 monitors of their rails: the one that the whole module draws from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .probe import Found, Missing, Silent
from .sampler import SampledPower

NAME = "jetson"
ROOT = Path("/sys/bus/i2c/drivers")
# The whole module's, by board: Orin Nano and NX, Xavier NX; TX2; Nano.
_TOTALS = ("VDD_IN", "POM_5V_IN", "VDD_5V_IN")
# Monitors are read over I2C and average by themselves.
_STEP_S = 0.1

# A file, or two that are multiplied, and the factor that makes watts of them.
Rail = tuple[tuple[Path, ...], float]


def find(root: Path = ROOT) -> Found:
    rails = dict(_rails(root))
    if not rails:
        return _missing("no INA3221 monitor: not a Jetson board", "None, on another machine")
    total = next((name for name in _TOTALS if name in rails), None)
    if total is None:
        named = ", ".join(sorted(rails))
        return _missing(f"none of the rails ({named}) is the whole module's", "Measure at the plug of this board")
    files, factor = rails[total]

    def watts() -> float:
        try:
            product = factor
            for file in files:
                product *= int(file.read_text())
        except (OSError, ValueError) as error:
            raise Silent(f"{NAME}: {error}") from None
        return product

    try:
        watts()
    except Silent as refusal:
        return _missing(str(refusal), "sudo, or a udev rule that lets this user read the monitor")
    return Found((SampledPower(NAME, "system", watts, _STEP_S, lambda: {"rail": total}),))


def _missing(reason: str, remedy: str) -> Found:
    return Found(missing=(Missing(NAME, reason, remedy),))


def _rails(root: Path) -> Iterator[tuple[str, Rail]]:
    """By name, from hwmon (kernel 5 and later: microwatts, or millivolts and milliamperes) and iio (milliwatts)."""
    for label in sorted(root.glob("ina3221/*/hwmon/hwmon*/in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        power = label.with_name(f"power{number}_input")
        pair = label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
        if power.exists():
            yield _text(label), ((power,), 1e-6)
        elif all(file.exists() for file in pair):  # the sums of channels have no voltage
            yield _text(label), (pair, 1e-6)
    for label in sorted(root.glob("ina3221x/*/iio*/rail_name_*")):
        power = label.with_name(f"in_power{label.name.removeprefix('rail_name_')}_input")
        if power.exists():
            yield _text(label), ((power,), 1e-3)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
