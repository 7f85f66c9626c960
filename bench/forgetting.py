"""What a model knows of a set of questions: probability, ROUGE-L recall, truth ratio; forget quality, model utility.

Definitions are TOFU's (Maini et al. 2024, arXiv 2401.06121, section 2.2), the truth ratio in log space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import ks_2samp
from torch import Tensor
from transformers import PreTrainedModel

from ..unlearn.data import QA, EvalSet
from ..unlearn.encode import Encoder, pad_id
from ..unlearn.likelihood import answer_likelihood


@dataclass(frozen=True)
class Scores:
    """Per-item results on one set; every list has one entry per row.

    probability   exp(-NLL/token) of the answer, or its share among the options (EvalSet.choices)
    rouge         ROUGE-L recall of the greedy answer against the true one, in 0..1
    truth_ratio   exp(mean_j NLL/token of the right answer's paraphrase - NLL/token of wrong answer j): how much
                  likelier the wrong answers are; None where a row has no wrong answers
    answers       the greedy answers
    """

    probability: list[float]
    rouge: list[float]
    truth_ratio: list[float | None]
    answers: list[str]


def evaluate(model: PreTrainedModel, encoder: Encoder, items: EvalSet, batch_size: int = 64) -> Scores:
    """Score `model` on every row of `items`."""
    rows = items.rows
    right = _mean_nll(model, encoder, [(r.question, r.answer) for r in rows], batch_size)
    wrong_pairs = [(r.question, wrong) for r in rows for wrong in r.perturbed_answers]
    wrong_flat = iter(_mean_nll(model, encoder, wrong_pairs, batch_size))
    wrong = [[next(wrong_flat) for _ in r.perturbed_answers] for r in rows]
    paraphrased = _mean_nll(
        model, encoder, [(r.question, r.paraphrased_answer) for r in rows if r.paraphrased_answer], batch_size
    )
    paraphrase_nll = iter(paraphrased)
    base = [next(paraphrase_nll) if r.paraphrased_answer else nll for r, nll in zip(rows, right, strict=True)]
    answers = generate(model, encoder, rows, batch_size)
    return Scores(
        probability=[
            choice_probability(nll, others) if items.choices and others else math.exp(-nll)
            for nll, others in zip(right, wrong, strict=True)
        ],
        rouge=rouge_recall(answers, [r.answer for r in rows]),
        truth_ratio=[truth_ratio(nll, others) for nll, others in zip(base, wrong, strict=True)],
        answers=answers,
    )


def choice_probability(right: float, wrong: Sequence[float]) -> float:
    """P(right) / (P(right) + sum P(wrong)), P = exp(-NLL/token)."""
    return 1 / (1 + sum(math.exp(min(700.0, right - nll)) for nll in wrong))


def truth_ratio(right: float, wrong: Sequence[float]) -> float | None:
    """Geometric mean of P(wrong) over P(right), from NLL/token in nats; None without wrong answers.

    TOFU's code since 2024-02 (its paper has the arithmetic mean). Capped at exp(700) to stay a number.
    """
    if not wrong:
        return None
    return math.exp(min(700.0, right - sum(wrong) / len(wrong)))


def forget_truth_ratio(ratios: Sequence[float]) -> float:
    """Mean of min(R, 1/R): 1 when right and wrong answers look alike."""
    return math.fsum(min(r, 1 / r) if r > 0 else 0.0 for r in ratios) / len(ratios)


def utility_truth_ratio(ratios: Sequence[float]) -> float:
    """Mean of max(0, 1 - R): 1 when wrong answers are never likely."""
    return math.fsum(max(0.0, 1 - r) for r in ratios) / len(ratios)


@dataclass(frozen=True)
class ForgetQuality:
    """Two-sample Kolmogorov-Smirnov test, two-sided, exact, of the forget set's truth ratios against the oracle's.

    p_value close to 1: cannot be told from the oracle. shift: sign of where the model lies ("lower", "higher", "none");
    "higher" means wrong answers are likelier than under the oracle (over-forgetting also gives a tiny p).
    """

    p_value: float
    log10_p: float
    statistic: float
    shift: str


def forget_quality(ratios: Sequence[float], oracle: Sequence[float]) -> ForgetQuality:
    """TOFU's forget quality from truth ratios; raises ValueError for an empty list."""
    if not ratios or not oracle:
        raise ValueError("truth ratios: empty; forget quality needs rows with wrong answers")
    test = ks_2samp(ratios, oracle, method="auto")
    p = float(test.pvalue)
    # scipy's sign is that of F_model - F_oracle where they differ most: above means smaller values.
    shift = "none" if test.statistic == 0 else ("lower" if test.statistic_sign > 0 else "higher")
    return ForgetQuality(p, math.log10(p) if p > 0 else -math.inf, float(test.statistic), shift)


def model_utility(scores: dict[str, Scores]) -> float:
    """Harmonic mean over all sets of probability, ROUGE-L recall and truth ratio; 0 when any of them is 0.

    With three sets these are TOFU's nine numbers; a set without wrong answers has no truth ratio and counts two.
    """
    values: list[float] = []
    for score in scores.values():
        values += [mean(score.probability), mean(score.rouge)]
        ratios = [r for r in score.truth_ratio if r is not None]
        if ratios:
            values.append(utility_truth_ratio(ratios))
    return harmonic_mean(values)


def harmonic_mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("values: none; a harmonic mean needs at least one")
    if any(value <= 0 for value in values):
        return 0.0
    return len(values) / math.fsum(1 / value for value in values)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def rouge_recall(answers: Sequence[str], truths: Sequence[str]) -> list[float]:
    """ROUGE-L recall with stemming, per item, as TOFU computes it."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [scorer.score(truth, answer)["rougeL"].recall for truth, answer in zip(truths, answers, strict=True)]


def verbatim(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Share of answers that are the true one, character by character (white space at the ends aside)."""
    return sum(a.strip() == t.strip() for a, t in zip(answers, truths, strict=True)) / len(truths)


def _mean_nll(
    model: PreTrainedModel, encoder: Encoder, pairs: Sequence[tuple[str, str]], batch_size: int
) -> list[float]:
    """NLL per supervised token of each (question, answer), in nats."""
    totals, counts = answer_likelihood(model, encoder, pairs, batch_size)
    return [total / count for total, count in zip(totals, counts, strict=True)]


def generate(
    model: PreTrainedModel, encoder: Encoder, rows: Sequence[QA], batch_size: int, most: int = 200
) -> list[str]:
    """Greedy answers, at most `most` tokens, and no longer than the set's longest true answer plus a quarter."""
    tokenizer = encoder.tokenizer
    longest = max(len(tokenizer(" " + r.answer, add_special_tokens=False)["input_ids"]) for r in rows)
    prompts = [encoder.prompt_ids(r.question) for r in rows]
    room = encoder.max_length - max(len(p) for p in prompts)
    new_tokens = max(1, min(most, longest + max(4, longest // 4), room))
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    answers = [""] * len(rows)
    network: Any = model  # transformers types generate as what may be a tensor
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = _left_padded([prompts[i] for i in chosen], pad_id(tokenizer))
        with torch.no_grad():
            output = network.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=pad_id(tokenizer),
            )
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip()
    return answers


def _left_padded(prompts: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask
