"""How sure we are: paired bootstrap over items, and Holm's correction over several questions.

Intervals are BCa (Efron 1987): percentiles moved for the bias and the skewness of the draws, as probabilities after
unlearning are mostly near 0; and widened from the normal's quantiles to Student's t (Hesterberg 2015, "What Teachers
Should Know About the Bootstrap", section 4.3), as plain percentiles are too narrow on few items. Below FEW items the
draws are too coarse for that, and Student's t with their spread takes their place. The p-values are the same read the
other way: below 0.025 where a 95% interval lies wholly beyond the limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

RESAMPLES = 2000
LEVEL = 0.95
# One side of a two-sided interval.
TAIL = (1 - LEVEL) / 2
# Of fewer items a tail of 2,000 resamples says little.
FEW = 8


@dataclass(frozen=True)
class Interval:
    """A value with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Draws:
    """A value with what it became in each resample of its `items` items.

    acceleration   BCa's: how skewed the items' influence on the value is
    """

    value: float
    draws: NDArray[np.float64]
    items: int
    acceleration: float = 0.0

    def interval(self) -> Interval:
        """95%; on one item the value alone, as nothing is known of its spread."""
        if self.items < 2:
            return Interval(self.value, self.value, self.value)
        reach = float(t.ppf(TAIL, self.items - 1))
        if self.items < FEW:
            if not np.isfinite(self.draws).all():
                return Interval(self.value, -math.inf, math.inf)
            return Interval(self.value, self.value + reach * self._error(), self.value - reach * self._error())
        z = reach * self._scale()
        # Draws themselves, as half-way between a number and infinity there is nothing.
        low, high = np.quantile(self.draws, [self._share(z), self._share(-z)], method="inverted_cdf")
        return Interval(self.value, min(float(low), self.value), max(float(high), self.value))

    def p_below(self, limit: float) -> float:
        """One-sided p-value against "the truth is at most `limit`": small when it lies above."""
        return self._p(int((self.draws <= limit).sum()), self.value - limit, 1)

    def p_above(self, limit: float) -> float:
        """One-sided p-value against "the truth is at least `limit`": small when it lies below."""
        return self._p(int((self.draws >= limit).sum()), limit - self.value, -1)

    def _p(self, count: int, distance: float, side: int) -> float:
        """From the number of draws on the wrong side; by Student's t where that is smaller and no draw is there."""
        if self.items < 2:
            return 1.0
        error = self._error() if np.isfinite(self.draws).all() else math.inf
        by_t = float(t.cdf(-distance / error, self.items - 1)) if error else (0.0 if distance > 0 else 1.0)
        if self.items < FEW:
            return by_t if math.isfinite(error) else 1.0
        share = (count + 1) / (len(self.draws) + 2)
        w = side * float(norm.ppf(share)) - self._bias()
        z = side * (w / (1 + self.acceleration * w) - self._bias())
        p = float(t.cdf(z / self._scale(), self.items - 1))
        return p if count or not math.isfinite(error) else min(p, by_t)

    def _share(self, z: float) -> float:
        """The share of draws below which BCa has what the normal has below z."""
        moved = self._bias() + z
        return float(norm.cdf(self._bias() + moved / max(1e-9, 1 - self.acceleration * moved)))

    def _bias(self) -> float:
        below = (self.draws < self.value).mean() + (self.draws == self.value).mean() / 2
        return float(norm.ppf(min(max(below, 1e-3), 1 - 1e-3)))

    def _scale(self) -> float:
        return (self.items / (self.items - 1)) ** 0.5

    def _error(self) -> float:
        """The standard error, as an unbiased variance has it."""
        return float(self.draws.std()) * self._scale()


def _acceleration(influence: NDArray[np.float64]) -> float:
    centred = influence - influence.mean()
    squares = float((centred**2).sum())
    return float((centred**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0


def resamples(items: int, seed: int) -> NDArray[np.int64]:
    """[RESAMPLES, items] item numbers drawn with replacement; the same for every quantity, so that they are paired."""
    return np.random.default_rng(seed).integers(0, items, (RESAMPLES, items))


def mean_draws(values: Sequence[float], seed: int) -> Draws:
    """The mean of `values`; ValueError without any, or for one that is not finite (naming the item)."""
    v = _finite("values", values)
    return Draws(float(v.mean()), v[resamples(len(v), seed)].mean(1), len(v), _acceleration(v))


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
    shares, influence = _shares(p, f, w, seed)
    far = np.where(np.arange(RESAMPLES) % 2 == 0, np.inf, -np.inf)
    share = float(p.mean() - f.mean()) / gap
    return Draws(share, np.where(np.isnan(shares), far, shares), len(p), _acceleration(influence * abs(gap)))


Shares = tuple[Sequence[float], Sequence[float], Sequence[float]]


def share_difference_draws(first: Shares, second: Shares, seed: int) -> Draws:
    """How much larger the first share is than the second, each (part, floor, whole) as share_draws takes them, of the
    same items, which are resampled jointly. A resample in which either has no gap counts as there."""
    if len({len(values) for values in (*first, *second)}) != 1:
        raise ValueError(
            f"share: lists of {[len(values) for values in (*first, *second)]} items; equal ones are needed"
        )
    ours, theirs = share_draws(*first, seed), share_draws(*second, seed)
    (a, by_ours), (b, by_theirs) = (
        _shares(_finite("part", part), _finite("floor", floor), _finite("whole", whole), seed)
        for part, floor, whole in (first, second)
    )
    far = np.where(np.arange(RESAMPLES) % 2 == 0, np.inf, -np.inf)
    draws = np.where(np.isnan(a - b), far, a - b)
    return Draws(ours.value - theirs.value, draws, ours.items, _acceleration(by_ours - by_theirs))


def _shares(
    p: NDArray[np.float64], f: NDArray[np.float64], w: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The share in each resample, NaN where it has no gap or one of the other sign; each item's influence on it."""
    gap = float(w.mean() - f.mean())
    index = resamples(len(p), seed)
    gaps = (w[index].mean(1) - f[index].mean(1)) * np.sign(gap)
    tops = (p[index].mean(1) - f[index].mean(1)) * np.sign(gap)
    shares = np.where(gaps > 0, tops / np.where(gaps > 0, gaps, 1.0), np.nan)
    share = float(p.mean() - f.mean()) / gap
    return shares, ((p - f) - share * (w - f)) / gap


def bootstrap_mean(values: Sequence[float], seed: int) -> Interval:
    """Mean of `values` with its interval."""
    return mean_draws(values, seed).interval()


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
