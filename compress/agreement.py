"""How far two looks at one model agree: on which layers are sensitive, and on which widths they get for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from scipy.stats import rankdata


@dataclass(frozen=True)
class Agreement:
    """rank_correlation   over layers, of scores: Spearman's, 1: the same order; None where one has no order at all
    other_width        share of the layers whose width is another one
    """

    rank_correlation: float | None
    other_width: float


def agreements(
    scores: Mapping[str, Mapping[str, float]], widths: Mapping[str, Mapping[str, int]]
) -> dict[tuple[str, str], Agreement]:
    """Of every two looks; given are the scores and the widths of all layers, by look and by layer."""
    return {
        (a, b): Agreement(
            rank_correlation(scores[a], scores[b]),
            sum(widths[a][layer] != width for layer, width in widths[b].items()) / len(widths[b]),
        )
        for a, b in combinations(scores, 2)
    }


def rank_correlation(a: Mapping[str, float], b: Mapping[str, float]) -> float | None:
    """Spearman's, ties at their mean rank; None where one of them has no order at all."""
    x, y = (rankdata([scores[name] for name in a]) for scores in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float((x @ x) * (y @ y)) ** 0.5
    return float(x @ y) / size if size else None
