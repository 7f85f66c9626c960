"""Joules of a piece of work: repeated in windows of seconds, the device waited for on both sides of each.

Each piece of work is done to warm up, then the machine at rest is measured with everything loaded, then come the
windows. Several pieces of work take turns, in an order that is reversed from round to round, so that they
meet the same temperature and can be compared pair by pair.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from scipy.special import stdtrit

from ..device import Device
from .probe import Found, Probe, Silent, disjoint
from .probes import OWN

# A piece of work; what it returns is how much of it was done, e.g. tokens.
Work = Callable[[], int]


@dataclass(frozen=True)
class Lengths:
    """window_s: of a window at least; windows: of each work; idle_s: of the machine at rest; warm_up: calls of each."""

    window_s: float = 5.0
    windows: int = 3
    idle_s: float = 5.0
    warm_up: int = 1

    def __post_init__(self) -> None:
        limits = ("window", self.window_s, 0.01), ("windows", self.windows, 1), ("idle", self.idle_s, 0)
        for name, value, least in limits:
            if not (math.isfinite(value) and value >= least):
                raise ValueError(f"{name}: {value:g} is not at least {least:g}")


LENGTHS = Lengths()


@dataclass
class Window:
    """What was done, in how long, and the joules by probe; a probe that is not among these was silent, for a reason."""

    seconds: float = 0.0
    calls: int = 0
    units: int = 0
    joules: dict[str, float] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A mean over `windows`, its 95% interval by Student's t (None on one window), and least to greatest over it."""

    mean: float
    low: float | None
    high: float | None
    spread: float
    windows: int


@dataclass(frozen=True)
class Measured:
    """windows: of each work, in the order of the rounds; idle: the machine at rest; before, after: what probes told;
    own: scopes of the device, as disjoint takes them."""

    found: Found
    lengths: Lengths
    idle: Window
    windows: dict[str, tuple[Window, ...]]
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]
    own: tuple[str, ...]

    @property
    def summed(self) -> tuple[Probe, ...]:
        """Probes that make up the device's total; none: it is not known."""
        return disjoint(self.found.probes, self.own)

    def idle_watts(self, probe: str) -> float | None:
        return self.idle.joules[probe] / self.idle.seconds if probe in self.idle.joules else None

    def silences(self) -> list[str]:
        """What probes gave as a reason for saying nothing, each once."""
        every = (self.idle, *(window for windows in self.windows.values() for window in windows))
        return list(dict.fromkeys(reason for window in every for reason in window.silent.values()))


@contextmanager
def metered(device: Device, probes: Sequence[Probe]) -> Iterator[Window]:
    """Measure a block; its Window is filled when the block is done."""
    window = Window()
    device.synchronize()
    started = [probe for probe in probes if _start(probe, window)]
    begin = time.perf_counter()
    try:
        yield window
        device.synchronize()
    finally:
        window.seconds = time.perf_counter() - begin
        for probe in started:
            try:
                window.joules[probe.name] = probe.stop()
            except Silent as silence:
                window.silent[probe.name] = str(silence)


def _start(probe: Probe, window: Window) -> bool:
    try:
        probe.start()
    except Silent as silence:
        window.silent[probe.name] = str(silence)
        return False
    return True


def measure(device: Device, works: Mapping[str, Work], found: Found, lengths: Lengths = LENGTHS) -> Measured:
    """The windows of each of `works`, with the probes of `found`; without one, the times."""
    _warm_up(works, lengths.warm_up)
    before = {probe.name: probe.about() for probe in found.probes}
    with metered(device, found.probes if lengths.idle_s else ()) as idle:
        time.sleep(lengths.idle_s if found.probes else 0)
    _warm_up(works, lengths.warm_up)  # clocks have gone down
    windows: dict[str, list[Window]] = {name: [] for name in works}
    for turn in range(lengths.windows):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            windows[name].append(_window(device, works[name], found.probes, lengths.window_s))
    after = {probe.name: probe.about() for probe in found.probes}
    rounds = {name: tuple(rows) for name, rows in windows.items()}
    return Measured(found, lengths, idle, rounds, before, after, OWN[device.kind])


def _warm_up(works: Mapping[str, Work], calls: int) -> None:
    for work in works.values():
        for _ in range(calls):
            work()


def _window(device: Device, work: Work, probes: Sequence[Probe], window_s: float) -> Window:
    with metered(device, probes) as window:
        end = time.perf_counter() + window_s
        while window.calls == 0 or time.perf_counter() < end:
            window.units += work()
            window.calls += 1
    return window


def figure(values: Sequence[float | None]) -> Figure | None:
    """None where a window has no value: a mean over the others would be of other work."""
    told = [value for value in values if value is not None]
    if not told or len(told) < len(values):
        return None
    mean, n = statistics.fmean(told), len(told)
    spread = (max(told) - min(told)) / abs(mean) if mean else 0.0
    if n == 1:
        return Figure(mean, None, None, spread, n)
    reach = float(stdtrit(n - 1, 0.975)) * statistics.stdev(told) / math.sqrt(n)
    return Figure(mean, mean - reach, mean + reach, spread, n)
