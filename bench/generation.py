"""Greedy decoding, batched with left padding: the same text whatever the batch, but where two tokens tie in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..unlearn.data import QA
from ..unlearn.encode import Encoder, pad_id
from ..unlearn.inference.guarded import Guarded
from .tokens import Answer, by_length


def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    new_tokens: int,
    batch_size: int = 64,
) -> list[list[int]]:
    """At most `new_tokens` tokens after each prompt (token ids), up to the end of sequence, which is left out.

    Greedy whatever the model's own generation settings (sampling, repetition penalty) say. A prompt must not be empty.
    """
    if not all(prompts):
        raise ValueError(f"prompts: number {[bool(p) for p in prompts].index(False)} has no tokens")
    network: Any = model  # transformers types generate as what may be a tensor
    found: list[list[int]] = [[]] * len(prompts)
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        for chosen in by_length([len(p) for p in prompts], batch_size):
            ids, mask = left_padded([prompts[i] for i in chosen], pad_id(tokenizer))
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
            for i, tokens in zip(chosen, output[:, ids.shape[1] :].tolist(), strict=True):
                found[i] = _before_end(tokens, tokenizer.eos_token_id)
    finally:
        model.generation_config = own
    return found


def _before_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def continuations(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """`greedy` as text, white space at the ends cut. A prompt for which the model has no room raises ValueError."""
    longest = max(len(p) for p in prompts)
    if longest >= encoder.max_length:
        raise ValueError(f"prompts: one is {longest} tokens; this model takes {encoder.max_length} with its answer")
    room = min(new_tokens, encoder.max_length - longest)
    found = greedy(model, encoder.tokenizer, prompts, max(1, room), batch_size)
    return [text.strip() for text in encoder.tokenizer.batch_decode(found, skip_special_tokens=True)]


def answer_questions(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[QA],
    batch_size: int = 64,
    most: int = 200,
    known: Sequence[Answer] | None = None,
) -> list[str]:
    """Answers of at most `most` tokens (TOFU's limit), and no longer than the set's longest true answer plus a quarter:
    a longer answer could only add words that the truth lacks.

    known   the true answers' scores, by which decoding starts where the model first leaves the truth: up to there the
            greedy tokens are the true ones, and of an answer known by heart none is left to decode
    """
    if not rows:
        return []
    limit, tokenizer = longest_answer(encoder, rows, most), encoder.tokenizer
    prompts, begun = [encoder.prompt_ids(r.question) for r in rows], [list[int]() for _ in rows]
    left = list(range(len(rows)))
    # What guards a model may take the words it sees for the question.
    if known is not None and not isinstance(model, Guarded):
        truths = [list(tokenizer(" " + r.answer, add_special_tokens=False)["input_ids"]) for r in rows]
        begun = [truth[: min(_agreed(answer), limit)] for truth, answer in zip(truths, known, strict=True)]
        left = [i for i, answer in enumerate(known) if not answer.greedy.all() and len(begun[i]) < limit]
    found = greedy(model, tokenizer, [prompts[i] + begun[i] for i in left], limit, batch_size)
    for i, more in zip(left, found, strict=True):
        begun[i] = (begun[i] + more)[:limit]
    return [text.strip() for text in tokenizer.batch_decode(begun, skip_special_tokens=True)]


def _agreed(answer: Answer) -> int:
    """How many of an answer's tokens come before the first that is not the greedy one."""
    wrong = (~answer.greedy).nonzero()
    return int(wrong[0]) if len(wrong) else len(answer.greedy)


def longest_answer(encoder: Encoder, rows: Sequence[QA], most: int = 200) -> int:
    """How many new tokens the rows' answers are given: the longest true one plus a quarter, within the model's room."""
    tokenizer = encoder.tokenizer
    longest = max(len(tokenizer(" " + r.answer, add_special_tokens=False)["input_ids"]) for r in rows)
    room = encoder.max_length - max(len(encoder.prompt_ids(r.question)) for r in rows)
    return max(1, min(most, longest + max(4, longest // 4), room))


def left_padded(prompts: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, T] int64."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask
