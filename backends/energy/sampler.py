"""From readings to joules: a counter that wraps around, and power that is integrated."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .probe import Method, Scope, Silent

# A counter of 65 kJ, the shortest known, passes its end once in two minutes at 500 W.
WATCH_S = 10.0


class Ticker:
    """Calls `tick` every `period_s` seconds on a thread of its own, until stopped or refused (Silent)."""

    def __init__(self, tick: Callable[[], None], period_s: float) -> None:
        self._tick, self._period_s = tick, period_s
        self._end = threading.Event()
        self._refusal: Silent | None = None
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic() + self._period_s
        while not self._end.wait(max(due - time.monotonic(), 0)):
            try:
                self._tick()
            except Silent as refusal:
                self._refusal = refusal
                return
            due = max(due + self._period_s, time.monotonic())  # after a slow reading no burst of late ones

    def stop(self) -> None:
        """Raises what a tick had raised."""
        self._end.set()
        self._thread.join()
        if self._refusal is not None:
            raise self._refusal


class Counter:
    """A probe that reads counters of energy and adds up how far they went.

    read    joules of each counter, from any start; raises Silent
    spans   of each, the joules after which it starts again from 0; None: it does not
    """

    method: Method = "measured-counter"
    factors: tuple[float, float] | None = None

    def __init__(
        self,
        name: str,
        scope: Scope,
        read: Callable[[], Sequence[float]],
        spans: Sequence[float | None],
        resolution_s: float,
        about: Callable[[], dict[str, Any]] = dict,
        watch_s: float = WATCH_S,
    ) -> None:
        self.name, self.scope, self.resolution_s, self.about = name, scope, resolution_s, about
        self._read, self._spans, self._watch_s = read, spans, watch_s

    def start(self) -> None:
        self._joules, self._last = 0.0, self._read()
        self._ticker = Ticker(self._advance, self._watch_s)

    def stop(self) -> float:
        self._ticker.stop()
        self._advance()
        if self._joules == 0:
            raise Silent(f"{self.name}: the counter stood still; the window may be shorter than its steps")
        return self._joules

    def _advance(self) -> None:
        now = self._read()
        self._joules += sum(map(self._moved, self._last, now, self._spans))
        self._last = now

    def _moved(self, before: float, now: float, span: float | None) -> float:
        if now >= before:
            return now - before
        if span is None:
            raise Silent(f"{self.name}: the counter went back from {before:.6g} J to {now:.6g} J")
        return now - before + span


class SampledPower:
    """A probe that reads watts every `resolution_s` seconds, and integrates them by the trapezoid rule."""

    method: Method = "measured-power-integrated"
    factors: tuple[float, float] | None = None

    def __init__(
        self,
        name: str,
        scope: Scope,
        read: Callable[[], float],
        resolution_s: float,
        about: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.name, self.scope, self.resolution_s, self.about = name, scope, resolution_s, about
        self._read = read

    def start(self) -> None:
        self._samples: list[tuple[float, float]] = []  # seconds, watts
        self._sample()
        self._begin = time.monotonic()
        self._ticker = Ticker(self._sample, self.resolution_s)

    def stop(self) -> float:
        end = time.monotonic()
        self._ticker.stop()
        self._sample()
        joules = trapezoid(self._samples, self._begin, end)
        if joules <= 0:
            raise Silent(f"{self.name}: it tells 0 W")
        return joules

    def _sample(self) -> None:
        # The middle of a reading that takes long, as a tool in a process of its own does.
        asked = time.monotonic()
        watts = self._read()
        self._samples.append(((asked + time.monotonic()) / 2, watts))


def trapezoid(samples: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """Joules between two times, of (seconds, watts) in order; straight lines from sample to sample."""
    times, watts = zip(*samples)
    cut = [begin, *(t for t in times if begin < t < end), end]
    at = np.interp(cut, times, watts)
    return float(sum((t1 - t0) * (w0 + w1) / 2 for t0, t1, w0, w1 in zip(cut, cut[1:], at, at[1:])))
