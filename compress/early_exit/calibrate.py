"""A threshold with a guarantee: what leaving early changes is at most delta, on average over texts, but for a risk of
epsilon.

CALM's calibration (arXiv 2207.07061, section 4): Learn then Test (Angelopoulos et al., arXiv 2110.01052) with fixed
sequence testing. Thresholds are tried from the most careful on. Each stands for the hypothesis that its mean loss is
above delta; the first one that Hoeffding and Bentkus do not reject ends the search, and the one before it is taken.

The guarantee is for texts of the kind that were calibrated on, drawn as they were: P(E[loss] <= delta) >= 1 - epsilon,
over the draw of the calibration set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import binom
from transformers import PreTrainedModel

from ..decoding import left_padded, plain_settings
from .generation import Sync, early_exit
from .policy import NEVER, Full, Policy

# From the most careful on; of scores between 0 and 1.
THRESHOLDS = tuple(round(1 - i / 20, 2) for i in range(21))


@dataclass(frozen=True)
class Tested:
    """One threshold: mean loss of the calibration texts, and the p-value of "its true mean is above delta"."""

    threshold: float
    loss: float
    p_value: float


@dataclass(frozen=True)
class Calibration:
    """threshold   the smallest one that is safe; NEVER: none is, and nobody leaves
    tested       in the order of testing; all but the last were rejected, or all where the candidates ran out
    texts        that were calibrated on
    """

    threshold: float
    delta: float
    epsilon: float
    texts: int
    tested: tuple[Tested, ...]


def p_value(mean: float, count: int, delta: float) -> float:
    """Hoeffding-Bentkus: of seeing a mean of `count` losses in [0, 1] as small as this when the truth is above delta.

        min(exp(-n h(min(m, delta), delta)), e P(Binomial(n, delta) <= ceil(n m)))

    with h the relative entropy of two coins (arXiv 2110.01052, proposition 1; Bates et al., arXiv 2101.02703).
    """
    smaller = min(mean, delta)
    hoeffding = math.exp(-count * _entropy(smaller, delta))
    # A mean that is a whole number of losses must not become one more by its rounding.
    bentkus = math.e * float(binom.cdf(math.ceil(count * mean - 1e-9), count, delta))
    return min(1.0, hoeffding, bentkus)


def _entropy(a: float, b: float) -> float:
    """a log(a/b) + (1 - a) log((1 - a)/(1 - b)), b between 0 and 1."""
    return sum(x * math.log(x / y) for x, y in ((a, b), (1 - a, 1 - b)) if x > 0)


def calibrated(
    policy: Policy,
    losses: Callable[[Policy], Sequence[float]],
    delta: float,
    epsilon: float = 0.05,
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[Policy, Calibration]:
    """The policy at the smallest safe threshold; it never leaves where none is.

    losses       of a policy, the loss in [0, 1] of every calibration text: e.g. `textual_losses`. It is asked
                 for the thresholds that are tested alone, the last of which is the first that is not safe
    thresholds   in any order
    Raises ValueError for a delta or epsilon that is not between 0 and 1, no threshold, or a loss that is not in [0, 1].
    """
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: {value}: expected a number between 0 and 1")
    if not thresholds:
        raise ValueError("thresholds: none; at least one is needed")
    tested: list[Tested] = []
    safe, count = NEVER, 0
    for threshold in sorted(set(thresholds), reverse=True):
        found = [float(loss) for loss in losses(policy.at(threshold))]
        _check(found, count)
        count = len(found)
        mean = math.fsum(found) / count
        tested.append(Tested(threshold, mean, p_value(mean, count, delta)))
        if tested[-1].p_value > epsilon:
            break
        safe = threshold
    return policy.at(safe), Calibration(safe, delta, epsilon, count, tuple(tested))


def _check(losses: Sequence[float], before: int) -> None:
    if not losses or (before and len(losses) != before):
        raise ValueError(f"losses: {len(losses)}; expected one of each calibration text")
    for i, loss in enumerate(losses):
        if not 0 <= loss <= 1:  # not a number is neither
            raise ValueError(f"losses: item {i} is {loss}; expected a number within 0 and 1")


def textual_loss(early: Sequence[int], full: Sequence[int]) -> float:
    """How much of the whole model's text (token ids) is another: 1 - ROUGE-L's F, by the longest common subsequence. 0:
    the same text, as two empty ones are."""
    if not early and not full:
        return 0.0
    return 1 - 2 * _common(early, full) / (len(early) + len(full))


def textual_losses(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad: int,
    end: int | None,
    new_tokens: int,
    batch_size: int = 32,
    sync: Sync = "row",
) -> Callable[[Policy], list[float]]:
    """For `calibrated`: of a policy, the textual loss of the greedy text after each prompt (token ids), `end` left out.

    With sync "batch" a text depends on those beside it, and so does what is promised.
    """
    full = _texts(model, Full(), prompts, pad, end, new_tokens, batch_size, sync)

    def losses(policy: Policy) -> list[float]:
        early = _texts(model, policy, prompts, pad, end, new_tokens, batch_size, sync)
        return [textual_loss(a, b) for a, b in zip(early, full, strict=True)]

    return losses


@torch.no_grad()
def _texts(
    model: PreTrainedModel,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    pad: int,
    end: int | None,
    new_tokens: int,
    batch_size: int,
    sync: Sync,
) -> list[list[int]]:
    network: Any = model
    found: list[list[int]] = []
    with plain_settings(model, eos_token_id=end, pad_token_id=pad):
        for start in range(0, len(prompts), batch_size):
            ids, mask = (t.to(model.device) for t in left_padded(prompts[start : start + batch_size], pad))
            with early_exit(model, policy, sync):
                text = network.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, num_beams=1
                )
            found += text[:, ids.shape[1] :].tolist()
    return [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in found]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
