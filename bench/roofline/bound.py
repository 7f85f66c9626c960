"""How long a pass takes at least, and about how long it will take: work held against what a device gives.

The *floor* of a part is the longer of two times: its products at the ceiling of the numbers they are computed in, and
its ideal bytes at the ceiling of the memory (Williams et al. 2009, doi 10.1145/1498765.1498785). Parts follow one
another, so a pass takes their sum. An op that is no product has no floor: a kernel could do it on the way.

The *estimate* is about this package's and torch's own kernels as they run op by op: products at the paces that were
measured, with as many rows and between other ops (paces.py), all other ops at what they read and write, and for every
op what a small one takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...backends.ceilings import ATTENTION, Ceilings, Pace, Rate
from .work import Part, Step

# Numbers that hold those of a kind: what is faster with them is a ceiling of the kind too (a CPU without instructions
# for bfloat16 multiplies in float32).
_HOLD = {
    "int4": ("int8", "float16", "bfloat16", "float32"),
    "int8": ("float16", "bfloat16", "float32"),
    "float8": ("float16", "bfloat16", "float32"),
    "bfloat16": ("float32",),
    "float16": ("float32",),
}
# For a device of which none of these is known: numbers of fewer bits, which are multiplied at least as fast, so that a
# floor stays one.
_NEAREST = {"bfloat16": ("float16",), "float32": ("float16", "bfloat16"), "float64": ("float32", "float16")}


@dataclass(frozen=True)
class Time:
    """Seconds of one part: at the ceiling of arithmetic, and of memory. compute: the numbers whose ceiling it is."""

    compute_s: float
    memory_s: float
    compute: str

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.memory_s)

    @property
    def bound(self) -> str:
        return "compute" if self.compute_s > self.memory_s else "memory"


def ceiling(compute: str, ceilings: Ceilings) -> tuple[str, Rate]:
    """(kind, rate) of the numbers in which products of kind `compute` are computed fastest. ValueError where the device
    has none that would do."""
    kinds = [kind for kind in (compute, *_HOLD.get(compute, ())) if kind in ceilings.compute]
    kinds = kinds or [kind for kind in _NEAREST.get(compute, ()) if kind in ceilings.compute][:1]
    if not kinds:
        raise ValueError(f"device: {ceilings.device} has no known ceiling for {compute}")
    best = max(kinds, key=lambda kind: ceilings.compute[kind].value)
    return best, ceilings.compute[best]


def replaced(steps: Sequence[Step], ceilings: Ceilings) -> dict[str, str]:
    """Kinds of numbers whose products are reckoned in others: those are faster there, or the only ones."""
    kinds = {part.compute for step in steps for part in step.parts if part.flops}
    return {kind: taken for kind in sorted(kinds) if (taken := ceiling(kind, ceilings)[0]) != kind}


def floor(part: Part, ceilings: Ceilings) -> Time:
    """Of one part."""
    kind, rate = ceiling(part.compute, ceilings)
    faster = ceilings.sparse24 if part.sparse else 1.0
    return Time(part.flops / (rate.value * faster), part.bytes / ceilings.memory.value, kind)


def floor_s(step: Step, ceilings: Ceilings) -> float:
    """Seconds that the pass takes at least."""
    return sum(floor(part, ceilings).seconds for part in step.parts)


def memory_share(step: Step, ceilings: Ceilings) -> float:
    """Of the floor, in parts that memory bounds."""
    times = [floor(part, ceilings) for part in step.parts]
    whole = sum(time.seconds for time in times)
    return sum(time.seconds for time in times if time.bound == "memory") / whole if whole else 1.0


def estimate_s(step: Step, ceilings: Ceilings) -> float | None:
    """Seconds that the pass will take about; None: nothing was measured that would tell."""
    if ceilings.launch is None:
        return None
    return sum(_estimated(part, ceilings, ceilings.launch.value) for part in step.parts)


def _estimated(part: Part, ceilings: Ceilings, launch: float) -> float:
    moved = (part.eager_bytes - part.weight_bytes) / ceilings.memory.value
    pace = ceilings.paces.get(part.kept)
    if part.kind == "linear" and pace is not None and part.rows:
        return pace.start.value + part.flops / _at(pace, part.rows) + moved
    work = floor(part, ceilings)
    kernel = ceilings.paces.get(ATTENTION) if part.kind == "attention" else None
    start = 0.0 if kernel is None else kernel.start.value
    return max(work.compute_s, part.weight_bytes / ceilings.memory.value) + moved + part.ops * launch + start


def _at(pace: Pace, rows: float) -> float:
    """Operations a second with so many rows: between those that were measured seconds of a weight follow a power of the
    rows, beyond them operations a second stay."""
    known = sorted(pace.rows)
    for low, high in pairwise(known):
        if low <= rows <= high:
            share = math.log(rows / low) / math.log(high / low)
            return pace.rows[low].value ** (1 - share) * pace.rows[high].value ** share
    return pace.rows[known[-1]].value
