"""Greedy decoding, batched with left padding: the same text whatever the batch, but where two tokens tie in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compress.decoding import left_padded, plain_settings
from ..unlearn.data import QA
from ..unlearn.encode import Encoder, pad_id
from ..unlearn.inference.guarded import Guarded
from .tokens import Answer, by_length

# TOFU's and open-unlearning's limit on an answer.
ANSWER_TOKENS = 200


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
    with plain_settings(model):
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
    most: int = ANSWER_TOKENS,
    known: Sequence[Answer] | None = None,
) -> list[str]:
    """Greedy answers of at most `most` tokens, fewer where the longest question leaves no room for them.

    known   the true answers' scores: one whose every token, the end included, is the greedy one is known by heart, and
            is the model's answer without decoding it again
    """
    if not rows:
        return []
    prompts = [encoder.prompt_ids(row.question) for row in rows]
    limit = room(encoder, prompts, most)
    # What guards a model may answer otherwise than it scores.
    heart = [False] * len(rows) if known is None or isinstance(model, Guarded) else [by_heart(a, limit) for a in known]
    left = [i for i, skip in enumerate(heart) if not skip]
    said = iter(continuations(model, encoder, [prompts[i] for i in left], limit, batch_size) if left else [])
    return [_said(encoder, row.answer) if skip else next(said) for row, skip in zip(rows, heart, strict=True)]


def by_heart(answer: Answer, limit: int) -> bool:
    """Whether greedy decoding of at most `limit` tokens gives exactly this answer; its last token is the end."""
    return bool(answer.greedy.all()) and len(answer.greedy) - 1 <= limit


def _said(encoder: Encoder, answer: str) -> str:
    """The answer as it comes out of the tokenizer."""
    ids = encoder.tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    return encoder.tokenizer.batch_decode([ids], skip_special_tokens=True)[0].strip()


def room(encoder: Encoder, prompts: Sequence[list[int]], most: int) -> int:
    """New tokens that the model has positions for after the longest prompt, `most` at most, 1 at least."""
    return max(1, min(most, encoder.max_length - max(len(prompt) for prompt in prompts)))
