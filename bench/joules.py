"""From windows to what one unit of work took, in seconds and in joules; and their order, where they can have one.

What was measured and what was estimated are never added or ranked together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..backends.energy.meter import Figure, Measured, Window, figure
from ..backends.energy.probe import ESTIMATE, Probe


@dataclass(frozen=True)
class Joules:
    """For one unit, over `scopes`: all that was taken, and what is above the machine at rest; low, high: of `total`,
    what the truth lies between where the probe tells (an estimate does)."""

    scopes: tuple[str, ...]
    methods: tuple[str, ...]
    total: Figure | None
    above_idle: Figure | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Cost:
    """Of one unit (a token, a request): seconds, and joules; None: nothing measured the device itself. parts: by probe,
    those of a device that nothing measured, too."""

    seconds: Figure
    joules: Joules | None
    parts: dict[str, Joules]

    @property
    def estimated(self) -> bool:
        return self.joules is not None and ESTIMATE in self.joules.methods


def cost(measured: Measured, calls: Mapping[str, float], units: Sequence[float]) -> Cost:
    """Of one unit.

    calls   how many of each work make up what is asked for; below 0: taken off
    units   that these made, by round
    """

    def over(value: Callable[[Window], float | None]) -> Figure | None:
        rounds = [[(each, measured.windows[name][i]) for name, each in calls.items()] for i in range(len(units))]
        taken = [_sum([_scaled(value(window), each / window.calls) for each, window in round_]) for round_ in rounds]
        return figure([_scaled(whole, 1 / n) for whole, n in zip(taken, units)])

    def joules(probes: Sequence[Probe]) -> Joules:
        rest = _sum([measured.idle_watts(probe.name) for probe in probes])
        total = over(lambda window: _joules(window, probes))
        above = over(lambda window: _sum([_joules(window, probes), _scaled(rest, -window.seconds)]))
        scopes, methods = ([getattr(probe, what) for probe in probes] for what in ("scope", "method"))
        mean = None if total is None else total.mean
        # An estimate stands alone; what counters may be off by, their makers do not tell.
        low, high = (_scaled(mean, factor) for factor in probes[0].factors or (None, None))
        return Joules(tuple(dict.fromkeys(scopes)), tuple(dict.fromkeys(methods)), total, above, low, high)

    seconds = over(lambda window: window.seconds)
    assert seconds is not None
    parts = {probe.name: joules([probe]) for probe in measured.found.probes}
    return Cost(seconds, joules(measured.summed) if measured.summed else None, parts)


def _joules(window: Window, probes: Sequence[Probe]) -> float | None:
    return _sum([window.joules.get(probe.name) for probe in probes])


def _sum(values: Sequence[float | None]) -> float | None:
    """None where a part is not known: the others are no total."""
    told = [value for value in values if value is not None]
    return sum(told) if len(told) == len(values) else None


def _scaled(value: float | None, by: float | None) -> float | None:
    return None if value is None or by is None else value * by


def ranked(costs: Mapping[str, Cost]) -> list[str]:
    """Names from the fewest joules for a token to the most.

    Raises ValueError for a cost without joules, and for two that are not of one kind: measured or estimated, scopes.
    """
    means = {name: _total(name, each) for name, each in costs.items()}
    kinds = {name: (each.estimated, each.joules and each.joules.scopes) for name, each in costs.items()}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{n}: {'estimated' if kind[0] else 'measured'} {kind[1]}" for n, kind in kinds.items())
        raise ValueError(f"energy: {told}: estimates and measurements, or different scopes, have no common order")
    return sorted(means, key=means.__getitem__)


def _total(name: str, each: Cost) -> float:
    if each.joules is None or each.joules.total is None:
        raise ValueError(f"energy: {name}: there are no joules to rank it by")
    return each.joules.total.mean
