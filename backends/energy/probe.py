"""What reads energy is a Probe; one that is not to be had is Missing, with its reason and a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

Scope = Literal["gpu", "npu", "cpu-package", "dram", "system"]
# The first two are measured; the third is time x a constant, and is kept apart from them.
Method = Literal["measured-counter", "measured-power-integrated", "estimated-tdp"]
ESTIMATE: Method = "estimated-tdp"


class Silent(RuntimeError):
    """A probe that said nothing of a window, which is not 0 J: the counter stood still, or a reading failed."""


class Probe(Protocol):
    """Joules between `start` and `stop`; once stopped it can be started again.

    scope          what the joules are of; "system" includes the others
    resolution_s   how often what it reads changes, or is read: both ends of a window are off by as much
    factors        the truth lies between these multiples of what it says; None: its maker does not tell
    """

    name: str
    scope: Scope
    method: Method
    resolution_s: float
    factors: tuple[float, float] | None

    def about(self) -> dict[str, Any]:
        """What decides its figures, as it is now: driver, power limit, temperature; JSON values, None: not told."""

    def start(self) -> None:
        """Raises Silent where it cannot be read."""

    def stop(self) -> float:
        """Joules since `start`; raises Silent."""


@dataclass(frozen=True)
class Missing:
    """A probe that was looked for; why it is not to be had, and what would help."""

    probe: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class Found:
    """The probes that there are, and those that there are not."""

    probes: tuple[Probe, ...] = ()
    missing: tuple[Missing, ...] = ()

    def __add__(self, other: Found) -> Found:
        return Found(self.probes + other.probes, self.missing + other.missing)


def disjoint(probes: tuple[Probe, ...], own: tuple[str, ...]) -> tuple[Probe, ...]:
    """Those whose joules make up a device's total: the parts where its own scope is one of them, else the system, which
    includes them; none where nothing has its own scope: what is left is a part, and no total.

    own   scopes, or names of probes, that are the device's own
    Raises ValueError for an estimate of what is measured, too.
    """
    ours = tuple(probe for probe in probes if probe.scope in own or probe.name in own)
    if len({probe.method == ESTIMATE for probe in ours}) > 1:
        named = ", ".join(f"{probe.name} ({probe.method})" for probe in ours)
        raise ValueError(f"energy: {named}: an estimate and a measured value have no common total")
    if all(probe.scope == "system" or probe.method == ESTIMATE for probe in ours):
        return ours[:1]
    return tuple(probe for probe in probes if probe.scope != "system" and probe.method != ESTIMATE)
