"""The supervised probe, CALM's classifier (arXiv 2207.07061, section 3.5): will this exit's token be the last layer's?

One logistic regression for each exit, of the standardised state. It needs a linear layer and a minute, and learns from
the same rollouts, to the same end, as the agent that is trained by reinforcement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata

from .policy import Probe
from .states import States

Array = NDArray[np.float64]

# Of a half of the squared norm of the weights, beside the mean loss of a token; strong to weak.
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
# Of the episodes: to choose the penalty by, and to judge the result on.
CHOOSE, JUDGE = 0.15, 0.15


@dataclass(frozen=True)
class ExitFit:
    """One exit's classifier, on episodes that it neither learned from nor was chosen by.

    agreement   share of tokens at which the exit agrees with the last layer
    accuracy    of "the score is at least one half"
    auc         that an agreeing token's score is above another's; None where all agree, or none
    loss        nats per token
    penalty     chosen; None where the exit had one kind of token to learn from, and its score is constant
    """

    depth: int
    tokens: int
    agreement: float
    accuracy: float
    auc: float | None
    loss: float
    penalty: float | None


def fit_probe(
    states: States, seed: int = 0, penalties: Sequence[float] = PENALTIES, threshold: float = 0.5
) -> tuple[Probe, tuple[ExitFit, ...]]:
    """A probe for the exits of `states`, and how good each of its classifiers is on episodes kept aside.

    The same for the same states and seed. Raises ValueError for fewer than three episodes, or no penalty.
    """
    if not penalties or not all(penalty > 0 for penalty in penalties):
        raise ValueError(f"penalties: {list(penalties)}: expected numbers above 0")
    choose, judge, learn = states.split((CHOOSE, JUDGE), seed)
    found = [_Exit(e, learn, choose, sorted(penalties, reverse=True)) for e in range(len(states.exits))]
    mean, deviation, weight, bias = (
        torch.tensor(np.stack([getattr(one, name) for one in found]), dtype=torch.float32) for name in Probe.weights
    )
    probe = Probe(exits=states.exits, threshold=threshold, mean=mean, deviation=deviation, weight=weight, bias=bias)
    return probe, tuple(one.report(states.exits[e], judge) for e, one in enumerate(found))


class _Exit:
    """One exit's classifier: mean, deviation, weight [d], bias [], float64."""

    def __init__(self, number: int, learn: States, choose: States, penalties: Sequence[float]) -> None:
        self.number = number
        x, y = self._data(learn)
        self.mean, deviation = x.mean(0), x.std(0)
        self.deviation = np.where(deviation > 0, deviation, 1.0)
        self.penalty: float | None = None
        self.weight, self.bias = np.zeros(x.shape[1]), np.float64(0)
        if y.min() == y.max():  # nothing to tell apart: the share itself, half a token away from certain
            share = (y.sum() + 0.5) / (len(y) + 1)
            self.bias = np.log(share / (1 - share))
            return
        z, other = (x - self.mean) / self.deviation, self._data(choose)
        start, best = np.zeros(x.shape[1] + 1), np.inf
        for penalty in penalties:
            start = logistic(z, y, penalty, start)
            loss = _loss(self._scores(other[0], start[:-1], start[-1]), other[1])
            if loss < best:
                best, self.penalty, self.weight, self.bias = loss, penalty, start[:-1], start[-1]

    def _data(self, states: States) -> tuple[Array, Array]:
        return (
            states.state[:, self.number].numpy().astype(np.float64),
            states.agrees[:, self.number].numpy().astype(np.float64),
        )

    def _scores(self, x: Array, weight: Array, bias: np.float64) -> Array:
        """Log odds."""
        return (x - self.mean) / self.deviation @ weight + bias

    def report(self, depth: int, judge: States) -> ExitFit:
        x, y = self._data(judge)
        s = self._scores(x, self.weight, self.bias)
        accuracy = float(((s >= 0) == (y > 0)).mean())
        return ExitFit(depth, len(y), float(y.mean()), accuracy, auc(s, y), _loss(s, y), self.penalty)


def logistic(z: Array, y: Array, penalty: float, start: Array | None = None) -> Array:
    """Minimum over (w, b) of mean log(1 + exp(-(2y - 1)(z w + b))) + penalty |w|^2 / 2, by L-BFGS in float64.

    z [n, d], y [n] of 0 and 1 -> [d + 1], the bias last.
    """

    def value(parameters: Array) -> tuple[float, Array]:
        w, b = parameters[:-1], parameters[-1]
        s = z @ w + b
        off = (expit(s) - y) / len(y)
        return _loss(s, y) + penalty * float(w @ w) / 2, np.append(z.T @ off + penalty * w, off.sum())

    start = np.zeros(z.shape[1] + 1) if start is None else start
    found = minimize(value, start, jac=True, method="L-BFGS-B", options={"maxiter": 500, "gtol": 1e-7, "ftol": 1e-12})
    return found.x


def _loss(s: Array, y: Array) -> float:
    """Nats per token of log odds."""
    return float(np.logaddexp(0, np.where(y > 0, -s, s)).mean())


def auc(scores: Array, y: Array) -> float | None:
    """P(a positive's score > a negative's) + P(equal) / 2; None where one of them is missing."""
    positive = int((y > 0).sum())
    negative = len(y) - positive
    if not positive or not negative:
        return None
    ranks = rankdata(scores)[y > 0].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * negative))
