"""Decode speed and peak memory of one model, as it is served: batch 1, greedy, with a KV cache."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..backends.device import device


@dataclass(frozen=True)
class DecodeSpeed:
    """tokens_per_s: median over `repeats` runs; spread: (slowest - fastest) / median; peak_memory_bytes: of one run."""

    tokens_per_s: float
    spread: float
    repeats: int
    new_tokens: int
    peak_memory_bytes: int


def decode_speed(
    model: PreTrainedModel, prompt: list[int], pad: int, new_tokens: int = 32, repeats: int = 3
) -> DecodeSpeed:
    """Time `new_tokens` decode steps after `prompt` (token ids; `pad`: the padding token).

    The pass over the prompt is timed apart and taken off.
    """

    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        _generate(model, ids, pad, 2)
        rates = [decode_rate(model, ids, pad, new_tokens) for _ in range(repeats)]
        with device(str(model.device)).peak_memory(held_bytes(model)) as memory:
            _generate(model, ids, pad, new_tokens + 1)
    middle = statistics.median(rates)
    return DecodeSpeed(middle, (max(rates) - min(rates)) / middle, repeats, new_tokens, memory.peak_bytes)


def decode_rate(model: PreTrainedModel, ids: torch.Tensor, pad: int, new_tokens: int) -> float:
    """Tokens a second of `new_tokens` decode steps after ids [1, length]; the pass over these is taken off."""
    prefill = _generate(model, ids, pad, 1)
    return new_tokens / max(_generate(model, ids, pad, new_tokens + 1) - prefill, 1e-9)


def _generate(model: PreTrainedModel, ids: torch.Tensor, pad: int, count: int) -> float:
    """Seconds for `count` tokens."""
    network: Any = model  # transformers types generate as what may be a tensor
    with device(str(model.device)).timed() as timer:
        network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )
    return timer.seconds


def held_bytes(model: PreTrainedModel) -> int:
    """Of all parameters and buffers, each memory once."""
    storages = {s.data_ptr(): s for t in (*model.parameters(), *model.buffers()) if (s := t.untyped_storage())}
    return sum(storage.nbytes() for storage in storages.values())
