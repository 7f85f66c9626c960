"""What a processor may have taken, where nothing measures it: E = integral of [P_idle + (P_tdp - P_idle) u] dt.

u is the share of its processors' time that this process and the children it has waited for took. It is time x a
constant and tells nothing beyond time; it is made when asked for, and stays apart from what is measured.
"""

from __future__ import annotations

import os
import time
from typing import Any

from .probe import ESTIMATE, Scope

# Of a processor at rest, as a share of what it takes at most.
IDLE = 0.1
# By thread, of a processor that is not in the table, and how far the truth may be from it: 2 to 8 W.
WATTS_PER_THREAD = 4.0
RANGE = (0.5, 2.0)
# From the makers' pages: watts of the package, its threads.
_SHEETS = {
    "AMD EPYC 7742": (225, 128),
    "AMD EPYC 7763": (280, 128),
    "AMD EPYC 9654": (360, 192),
    "AMD Ryzen 7 5800X": (105, 16),
    "AMD Ryzen 9 5950X": (105, 32),
    "AMD Ryzen 9 7950X": (170, 32),
    "Platinum 8280": (205, 56),
    "Platinum 8380": (270, 80),
    "Platinum 8480+": (350, 112),
    "Gold 6248 CPU": (150, 40),
    "Gold 6338 CPU": (205, 64),
}


class Estimate:
    """A probe that reads the clock of the processors.

    watts   of all `threads` at most; None: by the processor's name, else by thread
    """

    name = "estimate"
    scope: Scope = "cpu-package"
    method = ESTIMATE
    resolution_s = 0.01  # of os.times

    def __init__(self, cpu: str, threads: int, watts: float | None = None) -> None:
        sheet = next((sheet for name, sheet in _SHEETS.items() if name in cpu), None)
        if watts is not None:
            self.watts, source = watts, "given"
        elif sheet is not None:
            self.watts, source = sheet[0] / sheet[1] * threads, f"data sheet, {threads} of {sheet[1]} threads"
        else:
            self.watts, source = WATTS_PER_THREAD * threads, f"{WATTS_PER_THREAD:g} W for each of {threads} threads"
        # Packages run at half to double their TDP for minutes, so that a sheet is no surer than none.
        self.factors: tuple[float, float] | None = RANGE if watts is None else (1.0, 1.0)
        self.threads, self._about = threads, {"tdp_w": self.watts, "source": source, "idle_share": IDLE}

    def about(self) -> dict[str, Any]:
        return self._about

    def start(self) -> None:
        self._start = _clock()

    def stop(self) -> float:
        seconds, busy = (now - before for now, before in zip(_clock(), self._start))
        return joules(self.watts, self.threads, seconds, busy)


def joules(watts: float, threads: int, seconds: float, busy_s: float) -> float:
    """busy_s: of processor time within `seconds`."""
    share = min(busy_s / (seconds * threads), 1.0) if seconds else 0.0
    return watts * (IDLE + (1 - IDLE) * share) * seconds


def _clock() -> tuple[float, float]:
    """Seconds gone by, and seconds of processor time taken."""
    taken = os.times()
    return time.monotonic(), taken.user + taken.system + taken.children_user + taken.children_system
