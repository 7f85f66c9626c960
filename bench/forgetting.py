"""What a model knows of a set of questions: likelihoods, greedy answers, memorisation; the formulas are in tofu.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedModel

from ..unlearn.data import EvalSet
from ..unlearn.encode import Batch, Encoder
from .generation import answer_questions
from .memorisation import exact_memorisation, extraction_strength
from .privacy import ATTACKS
from .tofu import Items
from .tokens import answers as score_answers


@dataclass(frozen=True)
class Scores:
    """Per-item results on one set; every list has one entry per row.

    items       likelihoods and ROUGE-L recall, with the probabilities and truth ratios made of them (bench/tofu.py)
    answers     the greedy answers
    extraction_strength, exact_memorisation    of the true answers' words, as open-unlearning (bench/memorisation.py)
    attacks     membership scores by attack, higher for what was seen in training (bench/privacy.py)
    entropy     of the model's predictions along the true answers, nats, mean over all tokens
    vocabulary  how many tokens that is over
    finite      whether all logits were numbers
    """

    items: Items
    answers: list[str]
    extraction_strength: list[float]
    exact_memorisation: list[float]
    attacks: dict[str, list[float]]
    entropy: float
    vocabulary: int
    finite: bool

    def as_json(self) -> dict[str, Any]:
        """Every field, with probability and truth ratios of each item for those who read the file."""
        flat = asdict(self)
        items = flat.pop("items")
        ratios = [self.items.ratio(i) for i in range(len(self.answers))]
        return {"probability": self.items.probability, "truth_ratio": ratios, **items, **flat}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Scores:
        fields = {key: value[key] for key in cls.__dataclass_fields__ if key != "items"}
        return cls(Items(**{key: value[key] for key in Items.__dataclass_fields__}), **fields)


class Serving(Protocol):
    """How a model is served, where that is not as a whole."""

    def reading(self, batch: Batch) -> AbstractContextManager[object]:
        """Around a pass over given answers."""

    def writing(self) -> AbstractContextManager[object]:
        """Around `generate`."""


def evaluate(
    model: PreTrainedModel,
    encoder: Encoder,
    items: EvalSet,
    batch_size: int = 64,
    generate: bool = True,
    serving: Serving | None = None,
) -> Scores:
    """Score `model` on every row of `items`. Without `generate`, answers are empty and ROUGE is 0.

    serving   as it is served (bench/exit_serving.py); None: as a whole

    Neither order nor batches decide a result, but for float32 rounding. Raises ValueError for an empty set.
    """
    rows = items.rows
    if not rows:
        raise ValueError("rows: none; an evaluation needs at least one")
    # One pass over everything: right, paraphrased and wrong answers fill the batches together.
    pairs = [(r.question, r.answer) for r in rows]
    paraphrased = [(r.question, r.paraphrased_answer) for r in rows if r.paraphrased_answer]
    wrong = [(r.question, answer) for r in rows for answer in r.perturbed_answers]
    reading = None if serving is None else serving.reading
    scored = score_answers(model, encoder, [*pairs, *paraphrased, *wrong], batch_size, reading)
    right = scored[: len(rows)]
    others = iter([answer.nll for answer in scored[len(rows) :]])
    base = [next(others) if r.paraphrased_answer else answer.nll for r, answer in zip(rows, right, strict=True)]
    said = [""] * len(rows)
    if generate:
        with nullcontext() if serving is None else serving.writing():
            said = answer_questions(model, encoder, rows, batch_size, known=right)
    truths = [r.answer for r in rows]
    return Scores(
        Items(
            nll=[answer.nll for answer in right],
            base_nll=base,
            wrong_nll=[[next(others) for _ in r.perturbed_answers] for r in rows],
            rouge=rouge_recall(said, truths),
            choices=items.choices,
        ),
        answers=said,
        # The end of an answer is the question's form; a text has none.
        extraction_strength=[
            extraction_strength(answer, with_end=not row.question) for answer, row in zip(right, rows, strict=True)
        ],
        exact_memorisation=[
            exact_memorisation(answer, with_end=not row.question) for answer, row in zip(right, rows, strict=True)
        ],
        attacks={
            name: [attack(answer, truth) for answer, truth in zip(right, truths, strict=True)]
            for name, attack in ATTACKS.items()
        },
        entropy=-math.fsum(float(a.mean.double().sum()) for a in right) / sum(len(a.mean) for a in right),
        vocabulary=model.config.get_text_config().vocab_size,
        finite=all(answer.finite for answer in scored),
    )


def rouge_recall(answers: Sequence[str], truths: Sequence[str]) -> list[float]:
    """ROUGE-L recall with stemming, per item, as TOFU computes it; 0 for an empty answer."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [scorer.score(truth, answer)["rougeL"].recall for truth, answer in zip(truths, answers, strict=True)]


def verbatim(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Share of answers that are the true one, character by character (white space at the ends aside)."""
    return sum(a.strip() == t.strip() for a, t in zip(answers, truths, strict=True)) / len(truths)
