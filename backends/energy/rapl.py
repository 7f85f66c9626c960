"""Processors of Intel and AMD, by RAPL: counters of energy that Linux shows under powercap.

A package includes its "core" and "uncore"; "dram" is beside it; "psys" is the whole board, and includes both.
"""

from __future__ import annotations

import re
from pathlib import Path

from .probe import Found, Missing, Scope, Silent
from .sampler import Counter

ROOT = Path("/sys/class/powercap")
_STEP_S = 1e-3
_GROUPS: dict[str, tuple[Scope, str]] = {
    "rapl-package": ("cpu-package", r"package-\d+(-die-\d+)?"),
    "rapl-dram": ("dram", "dram"),
    "rapl-psys": ("system", "psys"),
}


def find(root: Path = ROOT) -> Found:
    """A probe for all packages, one for their memory, one for the board: those that there are."""
    # The same counters are there a second time as intel-rapl-mmio, and zones within zones both nested and beside them.
    places = (*root.glob("intel-rapl:*/intel-rapl:*"), *root.glob("intel-rapl:*"))
    zones = {zone.name: zone for zone in places}
    named = [(zone, name) for _, zone in sorted(zones.items()) if (name := _name(zone))]
    found = Found()
    for probe, (scope, pattern) in _GROUPS.items():
        found += _group(probe, scope, [zone for zone, name in named if re.fullmatch(pattern, name)])
    if found.probes or found.missing:
        return found
    reason = f"{root} has no counters of a processor's energy: in a virtual machine the host keeps them"
    remedy = "On a machine of your own: modprobe intel_rapl_msr; in a container: mount /sys/devices/virtual/powercap"
    return Found(missing=(Missing("rapl", reason, remedy),))


def _group(probe: str, scope: Scope, zones: list[Path]) -> Found:
    """All of `zones` as one probe; none of it where one of them cannot be read, as a part is no total."""
    if not zones:
        return Found()
    counters = [zone / "energy_uj" for zone in zones]
    try:
        for counter in counters:
            _micro(counter)
        spans = [_micro(zone / "max_energy_range_uj") for zone in zones]
    except PermissionError as error:
        remedy = "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj (until the next start), or run as root"
        return Found(missing=(Missing(probe, f"{error.filename}: no permission to read it", remedy),))
    except (OSError, ValueError) as error:
        return Found(missing=(Missing(probe, f"cannot be read: {error}", "See dmesg for what RAPL says"),))

    def read() -> list[float]:
        try:
            return [_micro(counter) for counter in counters]
        except (OSError, ValueError) as error:
            raise Silent(f"{probe}: {error}") from None

    def about() -> dict[str, object]:
        return {"zones": [zone.name for zone in zones], "power_limit_w": [_limit(zone) for zone in zones]}

    return Found((Counter(probe, scope, read, spans, _STEP_S, about),))


def _name(zone: Path) -> str | None:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return None


def _micro(file: Path) -> float:
    """Joules of a file that holds microjoules, watts of one that holds microwatts."""
    return int(file.read_text()) / 1e6


def _limit(zone: Path) -> float | None:
    """Watts over the longest window that is limited."""
    try:
        return _micro(zone / "constraint_0_power_limit_uw")
    except (OSError, ValueError):
        return None
