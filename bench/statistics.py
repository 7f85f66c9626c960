"""How sure we are: paired bootstrap intervals over items (Efron & Tibshirani 1993, percentile method)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with its 95% percentile bootstrap interval."""

    value: float
    low: float
    high: float


def resamples(items: int, seed: int) -> NDArray[np.int64]:
    """[RESAMPLES, items] item numbers drawn with replacement; the same for every quantity, so that they are paired."""
    return np.random.default_rng(seed).integers(0, items, (RESAMPLES, items))


def bootstrap_mean(values: Sequence[float], seed: int) -> Interval:
    """Mean of `values` with its interval."""
    if not len(values):
        raise ValueError("values: none; a mean needs at least one")
    v = np.asarray(values, dtype=np.float64)
    return _interval(float(v.mean()), v[resamples(len(v), seed)].mean(1))


def bootstrap_share(part: Sequence[float], floor: Sequence[float], whole: Sequence[float], seed: int) -> Interval:
    """(mean part - mean floor) / (mean whole - mean floor), items resampled jointly.

    0: at the floor; 1: all of the whole. Resamples without a gap are left out; ValueError when the gap itself is 0.
    """
    if not len(part) == len(floor) == len(whole) > 0:
        raise ValueError(f"share: lists of {len(part)}, {len(floor)} and {len(whole)} items; equal ones are needed")
    p, f, w = (np.asarray(v, dtype=np.float64) for v in (part, floor, whole))
    gap = float(w.mean() - f.mean())
    if gap == 0:
        raise ValueError("share: whole and floor have the same mean; there is no gap to take a share of")
    index = resamples(len(p), seed)
    gaps = w[index].mean(1) - f[index].mean(1)
    tops = p[index].mean(1) - f[index].mean(1)
    usable = gaps * np.sign(gap) > 0
    return _interval(float(p.mean() - f.mean()) / gap, tops[usable] / gaps[usable])


def _interval(value: float, draws: NDArray[np.float64]) -> Interval:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(value, min(float(low), value), max(float(high), value))
