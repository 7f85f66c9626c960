"""How long a call takes on a device: the median of several windows, or a refusal where they do not agree."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...backends.ceilings import Rate
from ...backends.device import Device

T = TypeVar("T")
LIMIT = 0.3  # of the interquartile range over the median: what other work on the machine leaves is below it
_ATTEMPTS, _PAUSE = 3, 0.3  # seconds between two: what is short passes
_MOST_CALLS = 100_000


@dataclass(frozen=True)
class Windows:
    """count     windows of a figure, 7 or more for quartiles that mean something
    seconds   of each, at least; a longer call is a window by itself
    limit     of a spread
    """

    device: Device
    count: int
    seconds: float
    limit: float = LIMIT

    def rate(self, name: str, work: float, call: Callable[[], object], source: str) -> Rate:
        """Of a call that does `work`, in whatever that is counted, by the second. ValueError as `steady`."""
        calls = max(1, min(_MOST_CALLS, math.ceil(self.seconds / max(self.once(call), 1e-9))))
        seconds, spread = self.steady(name, lambda: self.times(call, calls))
        return Rate(work / seconds, source, spread=spread)

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of a call that is not the first."""
        call()
        return self.times(call, 1, 1)[0]

    def times(self, call: Callable[[], object], calls: int, windows: int | None = None) -> list[float]:
        """Seconds of a call, by the window of so many calls."""
        taken = []
        for _ in range(windows or self.count):
            self.device.synchronize()
            with self.device.timed() as timer:
                for _ in range(calls):
                    call()
            taken.append(timer.seconds / calls)
        return taken

    def sampled(self, name: str, measure: Callable[[], float]) -> tuple[float, float]:
        """`steady`, of what measures itself."""
        return self.steady(name, lambda: [measure() for _ in range(self.count)])

    def steady(self, name: str, sample: Callable[[], Sequence[float]]) -> tuple[float, float]:
        """Median and spread of a sample; one over the limit is taken again, twice. ValueError where the last is,
        too."""
        spread = math.inf
        for attempt in range(_ATTEMPTS):
            time.sleep(_PAUSE if attempt else 0)
            low, median, high = statistics.quantiles(sample(), n=4)
            spread = (high - low) / median if median > 0 else math.inf
            if spread <= self.limit:
                return median, spread
        raise ValueError(
            f"{name}: the spread of {self.count} windows is {spread:.2f} of their median, above {self.limit}, "
            f"{_ATTEMPTS} times in a row: {self._remedy()}"
        )

    def undisturbed(self, work: Callable[[], T]) -> T:
        """What `work` gives. ValueError where threads of this process waited for a core for more than `limit` of the
        time: whoever shares it evenly makes every figure steady, and low. Not known of other systems than Linux."""
        before = _scheduled()
        result = work()
        ran, waited = (after - then for after, then in zip(_scheduled(), before, strict=True))
        share = waited / (ran + waited) if waited > 0 else 0.0
        if self.device.kind == "cpu" and share > self.limit:
            raise ValueError(
                f"{self.device.name}: its threads waited for a core {share:.2f} of the time, above {self.limit}: "
                f"{self._remedy()}"
            )
        return result

    def _remedy(self) -> str:
        return f"stop what else runs on {self.device.name}, or name a device for the ceilings of its maker's sheet"


def _scheduled() -> tuple[int, int]:
    """Nanoseconds that threads of this process ran, and waited to run; zeros where the system does not tell."""
    ran = waited = 0
    for place in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):  # a thread that has just ended
            running, waiting, _ = map(int, place.read_text().split())
            ran, waited = ran + running, waited + waiting
    return ran, waited
