"""Knowledge-intensive probes beside perplexity: a compressed model may keep its perplexity and lose what it knows
(LLM-KICK, Jaiswal et al. 2024, arXiv 2310.01382).

A probe is a multiple-choice question put by likelihood: the true answer among wrong ones in its own form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest
from torch import nn

from ..unlearn.data import QA
from ..unlearn.encode import Encoder
from .statistics import Interval, bootstrap_mean
from .tokens import Answer, answers


@dataclass(frozen=True)
class ChoiceAccuracy:
    """One entry per probe in every list.

    normalised   whether the true answer has the smallest NLL/token of all
    raw          whether it has the smallest NLL of all, which favours short answers
    chance       of guessing right: 1 / number of options
    rows         number of the row that each probe comes from
    finite       whether all logits were numbers; a probe where they are not counts as answered wrongly
    """

    normalised: list[bool]
    raw: list[bool]
    chance: list[float]
    rows: list[int]
    finite: bool

    def interval(self, normalised: bool = True) -> Interval:
        """Accuracy with its 95% interval (Clopper & Pearson 1934): a bootstrap has none when all or none are right."""
        right = self.normalised if normalised else self.raw
        found = binomtest(sum(right), len(right)).proportion_ci(0.95)
        return Interval(sum(right) / len(right), float(found.low), float(found.high))


def choice_accuracy(network: nn.Module, encoder: Encoder, rows: Sequence[QA], batch_size: int = 64) -> ChoiceAccuracy:
    """Multiple-choice accuracy on the rows that have wrong answers; the true one is the paraphrase where there is one,
    as the wrong ones have its form. As likely as a wrong answer is wrong: a uniform model knows nothing.

    Raises ValueError when no row has wrong answers.
    """
    numbers = [i for i, row in enumerate(rows) if row.perturbed_answers]
    if not numbers:
        raise ValueError(f"rows: none of {len(rows)} has wrong answers (perturbed_answers); a probe needs them")
    options = [(rows[i].paraphrased_answer or rows[i].answer, *rows[i].perturbed_answers) for i in numbers]
    pairs = [(rows[i].question, text) for i, texts in zip(numbers, options, strict=True) for text in texts]
    scored = iter(answers(network, encoder, pairs, batch_size))
    found = [[next(scored) for _ in texts] for texts in options]
    return ChoiceAccuracy(
        normalised=[_first([answer.nll for answer in probe], probe) for probe in found],
        raw=[_first([-float(answer.log_p.double().sum()) for answer in probe], probe) for probe in found],
        chance=[1 / len(texts) for texts in options],
        rows=numbers,
        finite=all(answer.finite for probe in found for answer in probe),
    )


def _first(nll: list[float], probe: list[Answer]) -> bool:
    """Whether the first answer is likelier than all others."""
    return all(answer.finite for answer in probe) and nll[0] < min(nll[1:])


@dataclass(frozen=True)
class KnowledgeLoss:
    """What a model lost against the target, on both scales.

    perplexity_change   perplexity / the target's - 1; above 0 it grew
    knowledge_loss      share of the target's accuracy that is gone, 1 - accuracy / the target's, with its paired
                        interval (the target's accuracy taken as given); None where the target knows nothing
    accuracy, target_accuracy, chance   length-normalised, means over probes
    """

    perplexity_change: float
    knowledge_loss: Interval | None
    accuracy: float
    target_accuracy: float
    chance: float


def knowledge_beside_perplexity(
    perplexity: float, target_perplexity: float, probes: ChoiceAccuracy, target_probes: ChoiceAccuracy, seed: int = 0
) -> KnowledgeLoss:
    """ValueError when model and target were not asked the same probes, or a perplexity is not a positive number."""
    for name, value in (("perplexity", perplexity), ("target_perplexity", target_perplexity)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: {value}; expected a positive number")
    if probes.rows != target_probes.rows or probes.chance != target_probes.chance:
        raise ValueError(
            f"probes: {len(probes.rows)} of the model, {len(target_probes.rows)} of the target; they must be the same"
        )
    count = len(probes.rows)
    known = sum(target_probes.normalised) / count
    lost = [float(t) - float(m) for t, m in zip(target_probes.normalised, probes.normalised, strict=True)]
    return KnowledgeLoss(
        perplexity / target_perplexity - 1,
        bootstrap_mean([gone / known for gone in lost], seed) if known else None,
        sum(probes.normalised) / count,
        known,
        math.fsum(probes.chance) / count,
    )
