"""How sure we are: paired bootstrap over items (Efron & Tibshirani 1993), and Holm's correction over several questions.

Intervals are percentile intervals whose tails are widened from the normal's to Student's t (Hesterberg 2015, "What
Teachers Should Know About the Bootstrap", section 4.3): plain percentiles are too narrow on few items. The p-values are
the same thing read the other way: below 0.025 exactly when a 95% interval lies wholly beyond the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

RESAMPLES = 2000
LEVEL = 0.95
# One side of a two-sided interval.
TAIL = (1 - LEVEL) / 2


@dataclass(frozen=True)
class Interval:
    """A value with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Draws:
    """A value with what it became in each resample of its `items` items."""

    value: float
    draws: NDArray[np.float64]
    items: int

    def interval(self) -> Interval:
        """95%; on one item the value alone, as nothing is known of its spread."""
        tail = _share_of_draws(TAIL, self.items)
        # Draws themselves, as half-way between a number and infinity there is nothing.
        low, high = np.quantile(self.draws, [tail, 1 - tail], method="inverted_cdf")
        return Interval(self.value, min(float(low), self.value), max(float(high), self.value))

    def p_below(self, limit: float) -> float:
        """One-sided p-value against "the truth is at most `limit`": small when it lies above."""
        return self._p(int((self.draws <= limit).sum()), self.value - limit)

    def p_above(self, limit: float) -> float:
        """One-sided p-value against "the truth is at least `limit`": small when it lies below."""
        return self._p(int((self.draws >= limit).sum()), limit - self.value)

    def _p(self, count: int, distance: float) -> float:
        """From the share of draws on the wrong side, the inverse of `_share_of_draws`; where there is none, no smaller
        than Student's t has it for the distance in standard errors."""
        if self.items < 2:
            return 1.0
        scale, free = ((self.items - 1) / self.items) ** 0.5, self.items - 1
        p = float(t.cdf(norm.ppf((count + 1) / (len(self.draws) + 1)) * scale, free))
        if count or not np.isfinite(self.draws).all():
            return p
        error = float(self.draws.std())
        return min(p, float(t.cdf(-distance / error * scale, free))) if error else 0.0


def _share_of_draws(tail: float, items: int) -> float:
    if items < 2:
        return 0.0
    return float(norm.cdf((items / (items - 1)) ** 0.5 * t.ppf(tail, items - 1)))


def resamples(items: int, seed: int) -> NDArray[np.int64]:
    """[RESAMPLES, items] item numbers drawn with replacement; the same for every quantity, so that they are paired."""
    return np.random.default_rng(seed).integers(0, items, (RESAMPLES, items))


def mean_draws(values: Sequence[float], seed: int) -> Draws:
    """The mean of `values`; ValueError without any, or for one that is not finite (naming the item)."""
    v = _finite("values", values)
    return Draws(float(v.mean()), v[resamples(len(v), seed)].mean(1), len(v))


def share_draws(part: Sequence[float], floor: Sequence[float], whole: Sequence[float], seed: int) -> Draws:
    """(mean part - mean floor) / (mean whole - mean floor), items resampled jointly. 0: at the floor; 1: all of it.

    A resample without a gap, or with one of the other sign, says nothing of the share and counts as infinitely far
    from it, by turns on either side. Raises ValueError for lists of unlike lengths, or when the gap itself is 0.
    """
    if not len(part) == len(floor) == len(whole) > 0:
        raise ValueError(f"share: lists of {len(part)}, {len(floor)} and {len(whole)} items; equal ones are needed")
    p, f, w = _finite("part", part), _finite("floor", floor), _finite("whole", whole)
    gap = float(w.mean() - f.mean())
    if gap == 0:
        raise ValueError("share: whole and floor have the same mean; there is no gap to take a share of")
    index = resamples(len(p), seed)
    gaps = (w[index].mean(1) - f[index].mean(1)) * np.sign(gap)
    tops = (p[index].mean(1) - f[index].mean(1)) * np.sign(gap)
    usable = gaps > 0
    far = np.where(np.arange(RESAMPLES) % 2 == 0, np.inf, -np.inf)
    draws = np.where(usable, tops / np.where(usable, gaps, 1.0), far)
    return Draws(float(p.mean() - f.mean()) / gap, draws, len(p))


def bootstrap_mean(values: Sequence[float], seed: int) -> Interval:
    """Mean of `values` with its interval."""
    return mean_draws(values, seed).interval()


def bootstrap_share(part: Sequence[float], floor: Sequence[float], whole: Sequence[float], seed: int) -> Interval:
    """The share of `share_draws` with its interval."""
    return share_draws(part, floor, whole, seed).interval()


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given (Holm 1979): each may be held against the level of the whole family."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def _finite(name: str, values: Sequence[float]) -> NDArray[np.float64]:
    v = np.asarray(values, dtype=np.float64)
    if not v.size:
        raise ValueError(f"{name}: none; at least one is needed")
    bad = np.flatnonzero(~np.isfinite(v))
    if bad.size:
        raise ValueError(f"{name}: item {bad[0]} is {v[bad[0]]}; every score must be a number")
    return v
