"""Unified quality score: many metrics of many models in one number each (UQS, Khan et al. 2026, arXiv 2605.02206).

A metric weighs as much as it tells of the distance to the oracle: by its Spearman correlation with that distance over a
set of models. The paper's abstract leaves open how metrics are standardised and oriented; here

- a metric is standardised by its rank among the models, as rho is a rank correlation: 0 worst, 1 best, ties share;
- without given directions the sign of rho orients it and |rho| is its weight: our reading. Mind what the distance
  sees: where it is one of forgetting alone, models that lost their utility are close, and utility counts against one;
- with given directions (higher_is_better) the weight is rho of the metric so oriented with closeness, 0 where it is
  negative: a metric that points away from the oracle has no say. That is what the authors' program does, but for a
  floor of 0.01, fixed transforms instead of ranks, and rho averaged over cross-validation folds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata, spearmanr

MODELS = 3


@dataclass(frozen=True)
class Quality:
    """score        of each model, in 0..1, 1 best
    weight          of each metric; they sum to 1
    rho             Spearman correlation of each metric, as it is, with the distance to the oracle; 0 where constant
    constant        metrics that are the same for all models: they have no weight
    standardised    of each metric that is not constant: oriented ranks of the models, in 0..1
    """

    score: list[float]
    weight: dict[str, float]
    rho: dict[str, float]
    constant: tuple[str, ...]
    standardised: dict[str, list[float]]


def quality(
    metrics: Mapping[str, Sequence[float]],
    distance: Sequence[float],
    higher_is_better: Mapping[str, bool] | None = None,
) -> Quality:
    """Scores of the models that `distance` (to the oracle, each) and every one of `metrics` list in the same order.

    Raises ValueError for fewer than three models, lists of unlike lengths, a value that is not finite (naming it), a
    distance that is the same for all, and when no metric has any weight.
    """
    d = _column("distance", distance, len(distance))
    if len(d) < MODELS:
        raise ValueError(f"distance: {len(d)} models; rank correlations need at least {MODELS}")
    if np.ptp(d) == 0:
        raise ValueError("distance: the same for all models; there is nothing to weigh metrics by")
    columns = {name: _column(name, values, len(d)) for name, values in metrics.items()}
    if higher_is_better is not None and higher_is_better.keys() != columns.keys():
        odd = sorted(higher_is_better.keys() ^ columns.keys())
        raise ValueError(f"higher_is_better: {', '.join(odd)}: every metric needs a direction, and nothing else does")
    varied = {name: values for name, values in columns.items() if np.ptp(values) > 0}
    rho = {name: float(spearmanr(varied[name], d).statistic) if name in varied else 0.0 for name in columns}
    sign = {name: (-1 if rho[name] > 0 else 1) for name in varied}
    if higher_is_better is not None:
        sign = {name: (1 if higher_is_better[name] else -1) for name in varied}
    # The correlation with closeness, -d, of the oriented metric.
    pull = {name: max(0.0, -sign[name] * rho[name]) if name in varied else 0.0 for name in columns}
    total = math.fsum(pull.values())
    if total == 0:
        raise ValueError(f"metrics: none of {', '.join(columns) or 'none'} goes with closeness to the oracle")
    ranks = {name: (rankdata(sign[name] * values) - 1) / (len(d) - 1) for name, values in varied.items()}
    weight = {name: value / total for name, value in pull.items()}
    score = sum(weight[name] * values for name, values in ranks.items())
    return Quality(
        np.asarray(score).tolist(),
        weight,
        rho,
        tuple(name for name in columns if name not in varied),
        {name: values.tolist() for name, values in ranks.items()},
    )


@dataclass(frozen=True)
class Stability:
    """Kendall's tau-b of the ranking by other weights with the ranking by the score's own: mean and standard deviation
    over `draws` draws."""

    tau: float
    deviation: float
    draws: int


def stability(found: Quality, spread: float | None = None, draws: int = 1000, seed: int = 0) -> Stability:
    """How much the ranking hangs on the weights.

    spread   each weight is multiplied by exp(spread x normal); None: any weights, all equally likely (Dirichlet(1)),
             which is the perturbation behind the paper's 0.647 +- 0.262
    A draw that ranks no model before another counts as 0. Raises ValueError for a negative spread or no draws.
    """
    if draws < 1:
        raise ValueError(f"draws: {draws}; at least 1 is needed")
    if spread is not None and not (math.isfinite(spread) and spread >= 0):
        raise ValueError(f"spread: {spread}; expected a number from 0 up, or None")
    generator = np.random.default_rng(seed)
    names = list(found.standardised)
    ranks = np.array([found.standardised[name] for name in names])  # [metrics, models]
    if spread is None:
        weights = generator.dirichlet(np.ones(len(names)), draws)
    else:
        own = np.array([found.weight[name] for name in names])
        weights = own * np.exp(spread * generator.standard_normal((draws, len(names))))
        weights /= weights.sum(1, keepdims=True)
    # Rounded, so that models with equal ranks stay equal whatever the order of summation.
    taus = [_tau(np.round(found.score, 12), np.round(w @ ranks, 12)) for w in weights]
    return Stability(float(np.mean(taus)), float(np.std(taus)), draws)


def _tau(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(kendalltau(a, b).statistic)


def _column(name: str, values: Sequence[float], count: int) -> NDArray[np.float64]:
    v = np.asarray(values, dtype=np.float64)
    if len(v) != count:
        raise ValueError(f"{name}: {len(v)} values for {count} models")
    bad = np.flatnonzero(~np.isfinite(v))
    if bad.size:
        raise ValueError(f"{name}: model {bad[0]} has {v[bad[0]]}; every value must be a number")
    return v
