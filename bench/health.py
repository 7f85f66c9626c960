"""Output health: does a model still write answers, or did it collapse? A collapsed model leaks nothing and is no use.

Entropy is ROME's "generation entropy" (Meng et al. 2022, arXiv 2202.05262, section 3.4), which RWKU calls fluency
(Jin et al. 2024, arXiv 2406.10890); repetition is seq-rep-4 (Welleck et al. 2019, arXiv 1908.04319, section 6).
Both depend on how long the answers are: hold them against another model's on the same questions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

# Of the entropies of 2-grams and 3-grams, whose weighted values are then averaged.
WEIGHTS = {2: 2 / 3, 3: 4 / 3}
REPEATED = 4
# An answer more than half of whose 4-grams were there before goes round in circles; text by people has 0.005.
LOOPING = 0.5
# A quarter of the answers: single loops happen to sound models under greedy decoding.
LOOPING_SHARE = 0.25
# Half of the answers: refusing now and then is no collapse, saying nothing to most questions is.
EMPTY_SHARE = 0.5
# Half of the different questions, of at least five: two or three may well have one answer.
SAME_SHARE = 0.5
SAME_QUESTIONS = 5
# Of log(vocabulary): trained models stay below a half; 0.98 is what random weights put out.
UNIFORM = 0.98


@dataclass(frozen=True)
class Health:
    """What the answers look like; without any answer every number is 0.

    answers      how many there are
    entropy      mean over answers of (2/3 H2 + 4/3 H3) / 2, in bits; an answer of one word has 0
    repetition   mean over answers of the share of 4-grams that were there before; 0 where there are none
    looping      share of answers whose repetition is above LOOPING
    empty        share of answers without a word
    distinct     different answers per answer (case and spaces aside)
    commonest    the largest share of the questions that one and the same answer was given to, empty ones aside
    questions    how many different questions that is a share of
    """

    answers: int
    entropy: float
    repetition: float
    looping: float
    empty: float
    distinct: float
    commonest: float
    questions: int
    entropy_items: list[float]
    repetition_items: list[float]


def health(
    answers: Sequence[str],
    questions: Sequence[str] | None = None,
    token_ids: Sequence[Sequence[int]] | None = None,
) -> Health:
    """Health of generated answers.

    questions   what was asked, so that asking twice does not count twice; None: all different
    token_ids   of the answers, whose n-grams are then counted rather than those of words and punctuation marks: for
                languages that do not part words by spaces
    Raises ValueError for lists of unlike lengths.
    """
    for name, given in (("questions", questions), ("token_ids", token_ids)):
        if given is not None and len(given) != len(answers):
            raise ValueError(f"{name}: {len(given)} for {len(answers)} answers; each answer needs one")
    units: list[Sequence[Hashable]] = [words(text) for text in answers] if token_ids is None else list(token_ids)
    texts = [" ".join(text.casefold().split()) for text in answers]
    entropies, repetitions = [ngram_entropy(unit) for unit in units], [repetition(unit) for unit in units]
    asked = dict(zip(range(len(texts)) if questions is None else questions, texts))
    common = Counter(text for text in asked.values() if text)
    return Health(
        answers=len(texts),
        entropy=_mean(entropies),
        repetition=_mean(repetitions),
        looping=_mean([value > LOOPING for value in repetitions]),
        empty=_mean([not text for text in texts]),
        distinct=len(set(texts)) / max(1, len(texts)),
        commonest=max(common.values(), default=0) / max(1, len(asked)),
        questions=len(asked),
        entropy_items=entropies,
        repetition_items=repetitions,
    )


def words(text: str) -> list[str]:
    """Words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text)


def ngram_entropy(units: Sequence[Hashable]) -> float:
    """(2/3 H2 + 4/3 H3) / 2 in bits, H_n the entropy of the n-grams' frequencies; 0 where there is at most one."""
    return sum(weight * _entropy(_ngrams(units, n)) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def repetition(units: Sequence[Hashable], n: int = REPEATED) -> float:
    """1 - different n-grams / n-grams; 0 for fewer than n units."""
    found = _ngrams(units, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def flags(
    found: Health, finite: bool = True, entropies: Sequence[float] = (), vocabulary: int | None = None
) -> tuple[str, ...]:
    """What speaks for a collapse, in words; nothing for a sound model.

    found       of answers to questions that the model should know: on a forget set, one refusal for all is no collapse
    finite      whether the model's logits were numbers
    entropies   predictive entropy in nats at each token, -`Answer.mean`; they need `vocabulary`, the number of logits
    """
    if len(entropies) and (vocabulary is None or vocabulary < 2):
        raise ValueError(f"vocabulary: {vocabulary}; entropies need the number of logits, at least 2")
    uniform = bool(len(entropies)) and _mean(entropies) >= UNIFORM * math.log(vocabulary or 2)
    one = found.questions >= SAME_QUESTIONS and found.commonest > SAME_SHARE
    raised = {
        "no answers": found.answers == 0,
        "logits are not numbers": not finite or any(math.isnan(value) for value in entropies),
        "uniform output": uniform,
        "one answer to everything": one,
        "repeats itself": found.looping > LOOPING_SHARE,
        "empty answers": found.empty > EMPTY_SHARE,
    }
    return tuple(name for name, holds in raised.items() if holds)


def _ngrams(units: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]


def _entropy(values: Sequence[Hashable]) -> float:
    shares = [count / len(values) for count in Counter(values).values()]
    # 0 rather than the -0 that a single n-gram would give.
    return abs(math.fsum(share * math.log2(share) for share in shares))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if len(values) else 0.0
