"""Ask a model with whole prompts of any make, and see what it knows: the part that all pressures of asking share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedModel

from ...unlearn.data import QA
from ...unlearn.encode import Encoder
from ..generation import continuations
from ..tokens import answers

# The whole text before the answer (which follows after one space), and the true answer.
Asked = tuple[str, str]
# Longest generated answer in tokens: TOFU's limit.
MOST = 200


@dataclass(frozen=True)
class Recall:
    """probability: exp(-NLL/token) of each true answer; rouge: ROUGE-L recall of each greedy answer, with stemming."""

    probability: list[float]
    rouge: list[float]


def plainly(encoder: Encoder, rows: Sequence[QA]) -> list[Asked]:
    """As in training. Raises ValueError without rows, and for rows of running text."""
    if not rows:
        raise ValueError("rows: none; a pressure needs at least one")
    texts = sum(not row.question for row in rows)
    if texts:
        raise ValueError(f"rows: {texts} of {len(rows)} are running text; a pressure of asking needs questions")
    return [(encoder.prompt.format(question=row.question), row.answer) for row in rows]


def whole(encoder: Encoder) -> Encoder:
    """Takes texts that are prompts already."""
    return replace(encoder, prompt="{question}")


def answer_tokens(encoder: Encoder, asked: Sequence[Asked]) -> int:
    """How long greedy answers may become: a quarter longer than the longest true one, 200 tokens at most."""
    longest = max(len(encoder.tokenizer(" " + truth, add_special_tokens=False)["input_ids"]) for _, truth in asked)
    return min(MOST, longest + max(4, longest // 4))


def too_long(encoder: Encoder, asked: Sequence[Asked], new_tokens: int) -> str:
    """Why the model cannot take a prompt with `new_tokens` after it, or with its true answer; "" if it can."""
    prompts = [whole(encoder).prompt_ids(text) for text, _ in asked]
    truths = encoder.tokenizer([" " + truth for _, truth in asked], add_special_tokens=False)["input_ids"]
    for prompt, truth in zip(prompts, truths, strict=True):
        needed = len(prompt) + max(new_tokens, len(truth) + 1)
        if needed > encoder.max_length:
            return (
                f"a prompt of {len(prompt)} tokens with {needed - len(prompt)} for the answer is too long; "
                f"this model takes {encoder.max_length}"
            )
    return ""


def ask(
    model: PreTrainedModel,
    encoder: Encoder,
    groups: Mapping[str, Sequence[Asked]],
    new_tokens: int,
    batch_size: int = 64,
) -> dict[str, Recall]:
    """What the model knows under each group of prompts; all groups fill the batches together.

    Raises ValueError for a prompt that is too long with its true answer (see `too_long`).
    """
    flat = [pair for group in groups.values() for pair in group]
    bare = whole(encoder)
    known = [answer.probability for answer in answers(model, bare, flat, batch_size)]
    said = continuations(model, bare, [bare.prompt_ids(text) for text, _ in flat], new_tokens, batch_size)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [scorer.score(truth, text)["rougeL"].recall for (_, truth), text in zip(flat, said, strict=True)]
    found, at = {}, 0
    for name, group in groups.items():
        end = at + len(group)
        found[name] = Recall(known[at:end], rouge[at:end])
        at = end
    return found
