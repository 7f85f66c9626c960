"""Can one tell what a model was trained on? Membership inference attacks, their AUC, and MUSE's PrivLeak.

Every score here is higher where a row is more likely a member. The papers' code often has it the other way round (a
loss, a norm); one orientation for all makes AUC = P(a member scores above a non-member): 1 for a model that gives its
training data away, 1/2 for one that never saw it, below 1/2 where "forgotten" rows stick out as unusually unlikely.
Members and non-members must be alike but for membership, or the AUC measures how the sets differ (Duan et al. 2024,
arXiv 2402.07841).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor, nn

from ..unlearn.encode import Encoder
from ..unlearn.layers import device_of, forward
from ..unlearn.losses import nll
from .statistics import TAIL, Interval
from .tokens import FLOOR, Answer

# Of the tokens, the least likely ones that Min-K% looks at: MUSE's and open-unlearning's choice.
SHARE = 0.4
# A next-token distribution this sharp has no spread to divide by (Min-K%++).
_LEAST_DEVIATION = 1e-3


def loss(answer: Answer, text: str = "") -> float:  # noqa: ARG001 (attacks share one form)
    """Minus NLL/token in nats (Yeom et al. 2018, arXiv 1709.01604)."""
    return float(_log_p(answer).mean())


def zlib_ratio(answer: Answer, text: str) -> float:
    """Minus NLL/token over the bytes of the answer's text (UTF-8) under zlib (Carlini et al. 2021, arXiv 2012.07805):
    what compresses well is likely without having been seen. NLL per token as in open-unlearning and MUSE, not summed.
    """
    return loss(answer) / len(zlib.compress(text.encode()))


def min_k(answer: Answer, text: str = "", share: float = SHARE) -> float:  # noqa: ARG001
    """Mean log-probability in nats of the `share` of tokens that are least likely, rounded down, at least one
    (Shi et al. 2024, arXiv 2310.16789). MUSE has no value for answers too short for one token; else this is its Min-K%.
    """
    return _lowest(_log_p(answer), share)


def min_k_plus_plus(answer: Answer, text: str = "", share: float = SHARE) -> float:  # noqa: ARG001
    """Min-K% of log-probabilities less their mean and over their standard deviation under the model's own next-token
    distribution (Zhang et al. 2024, arXiv 2404.02936)."""
    z = (_log_p(answer) - answer.mean.double()) / answer.deviation.double().clamp(min=_LEAST_DEVIATION)
    return _lowest(z, share)


Attack = Callable[[Answer, str], float]
# What needs one teacher-forced pass of the model alone; open-unlearning leaves out the end of sequence in Min-K% and
# Min-K%++ but not in the other two, here it counts in all.
ATTACKS: dict[str, Attack] = {
    "loss": loss,
    "zlib": zlib_ratio,
    "min_k": min_k,
    "min_k_plus_plus": min_k_plus_plus,
}


def reference(answer: Answer, expected: Answer) -> float:
    """NLL/token in nats under a reference model (`expected`) less that under the model: what is likelier than it should
    be (Carlini et al. 2021). The reference must not have seen the members."""
    return loss(answer) - loss(expected)


def gradient_norm(model: nn.Module, encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Minus the mean over parameter tensors of the 2-norm of the gradient of NLL/token, per (question, answer)
    (Wang et al. 2024, arXiv 2402.17012; open-unlearning's p = 2): little is left to learn from what was learned.

    Over all parameters, frozen ones too; a quantized layer has none. One row at a time, dropout off; gradients, their
    flags and the model's mode are left as they were. A gradient that is not finite scores FLOOR: a broken model knows
    nothing. Raises ValueError when no parameter has a gradient.
    """
    scores = []
    with _differentiable(model) as parameters:
        for question, answer in pairs:
            batch = encoder.batch([(question, answer)], device_of(model))
            value = nll(forward(model, batch), batch.labels)
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            norms = [gradient.float().norm() for gradient in found if gradient is not None]
            if not norms:
                raise ValueError("model: no parameter has a gradient; the gradient norm needs dense weights")
            score = -float(torch.stack(norms).double().mean())
            scores.append(score if math.isfinite(score) else FLOOR)
    return scores


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """All parameters that can have a gradient, all of them asking for one, in eval mode, inside the block."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    asked = [p.requires_grad for p in parameters]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield parameters
    finally:
        for parameter, flag in zip(parameters, asked, strict=True):
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training


def _log_p(answer: Answer) -> Tensor:
    """[n] float64."""
    if not len(answer.log_p):
        raise ValueError("answer: no tokens; a membership score needs at least one")
    return answer.log_p.double()


def _lowest(values: Tensor, share: float) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"share: {share} is not in (0, 1]")
    return float(values.sort().values[: max(1, int(share * len(values)))].mean())


def auc(members: Sequence[float], non_members: Sequence[float]) -> float:
    """P(member score > non-member score) + P(equal)/2 over all pairs, exact (Mann-Whitney), in O(n log n).

    Raises ValueError for an empty side, and for NaN (naming the item); infinite scores are in order.
    """
    over, _ = _half_wins(members, non_members)
    return int(over.sum()) / (2 * len(members) * len(non_members))


def auc_interval(members: Sequence[float], non_members: Sequence[float]) -> Interval:
    """The AUC with its 95% interval: Wilson's, for as many draws as DeLong's variance (1988) says it is worth, with
    Student's t for the smaller side.

    That variance is taken with half a row above and half a row below all others added to either side, so that
    separated samples do not claim certainty: 40 against 40 rows without a single pair out of order give 0.91 to 1.
    One row on a side gives 0 to 1. Chosen by coverage, 1,500 draws each, at true AUCs of .5, .75, .95 and .99, of
    normal scores (equal and unlike spread) and of members that are partly forgotten: 0.95-0.99 for 40 against 40 rows
    and 0.94-0.99 for 10 against 10 or 40 against 200, where DeLong's own interval and the stratified bootstrap's come
    down to 0.85 at .95 and to 0.6 at .99. Rows count as independent. Errors as `auc`.
    """
    over, under = _half_wins(members, non_members)
    m, n = len(over), len(under)
    value = int(over.sum()) / (2 * m * n)
    if min(m, n) < 2:
        return Interval(value, 0.0, 1.0)
    centre, variance = _smoothed(over, n)
    variance += _smoothed(2 * m - under, m)[1]
    draws, z = centre * (1 - centre) / variance, -float(student.ppf(TAIL, min(m, n) - 1))
    middle = (value + z * z / (2 * draws)) / (1 + z * z / draws)
    half = z / (1 + z * z / draws) * math.sqrt(value * (1 - value) / draws + (z / (2 * draws)) ** 2)
    return Interval(value, max(0.0, min(middle - half, value)), min(1.0, max(middle + half, value)))


def _smoothed(half_wins: NDArray[np.int64], others: int) -> tuple[float, float]:
    """Mean of one side's placements (shares of the `others` rows of the other side that lie below each) and the
    variance of that mean, when either side has half a row above and half a row below all others besides."""
    count = len(half_wins)
    edge = 0.25 / (others + 1)  # the half below all others ties with its like
    p = np.append((half_wins / 2 + 0.5) / (others + 1), [edge, 1 - edge])
    weights = np.append(np.ones(count), [0.5, 0.5])
    mean = float(weights @ p) / (count + 1)
    return mean, float(weights @ (p - mean) ** 2) / (count * (count + 1))


def _half_wins(members: Sequence[float], non_members: Sequence[float]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per score of either side, how many of the other side it exceeds and how many it exceeds or equals, added up.

    [m] and [n] int64, in O((m + n) log(m + n)).
    """
    a, b = _scores("members", members), _scores("non_members", non_members)
    sorted_a, sorted_b = np.sort(a), np.sort(b)
    over = np.searchsorted(sorted_b, a, "left") + np.searchsorted(sorted_b, a, "right")
    return over, np.searchsorted(sorted_a, b, "left") + np.searchsorted(sorted_a, b, "right")


def _scores(name: str, values: Sequence[float]) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if not scores.size:
        raise ValueError(f"{name}: none; an AUC needs at least one score on either side")
    bad = np.flatnonzero(np.isnan(scores))
    if bad.size:
        raise ValueError(f"{name}: item {bad[0]} is NaN; every score must be a number")
    return scores


def privleak(auc_unlearned: float, auc_oracle: float) -> float:
    """MUSE's PrivLeak in percent (Shi et al. 2024, arXiv 2407.06460) from AUCs of Min-40% as `auc` gives
    them, members the forget set, non-members the held-out one.

    MUSE's AUC is P(held-out loss < forget loss) = 1 - ours, as it takes held-out rows for the positive ones; with it
    PrivLeak = 100 (AUC_unlearned - AUC_oracle) / AUC_oracle. Negative, down to -100: the forget set is still known
    (under-unlearning). Positive: it has become less likely than what was never seen (over-unlearning). 0: as the
    oracle has it. Raises ValueError for an AUC outside 0..1, and for an oracle's of 1 (MUSE's is 0 then).
    """
    for name, value in (("auc_unlearned", auc_unlearned), ("auc_oracle", auc_oracle)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: {value} is not in 0..1")
    if auc_oracle == 1:
        raise ValueError("auc_oracle: 1; MUSE's AUC of the oracle is 0 then, and nothing can be set in relation to it")
    return 100 * (auc_oracle - auc_unlearned) / (1 - auc_oracle)
