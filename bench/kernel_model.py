"""A whole model on this machine: W4A16 and W4A8 against bfloat16, in turns in one process.

Random weights, a Llama of 433 million parameters: what is timed does not hang on their values.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..compress.recipe import parse_recipe
from ..compress.sequential import compress_
from ..kernels.limits import read_bandwidth
from .speed import decode_rate, held_bytes

RECIPES = ("rtn-w4a16-g128", "rtn-w4a8-g128")
PROMPT, PREFILL, NEW, ROUNDS = 32, 512, 24, 5
CONFIG: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}


def measure(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, checks). Decode: tokens a second of `generate` with a KV cache, the pass over the prompt taken off;
    prefill: seconds for one pass over 512 tokens; memory: of the weights, every buffer counted."""
    torch.manual_seed(seed)
    dense: Any = LlamaForCausalLM(LlamaConfig(**CONFIG))
    dense = dense.to(torch.bfloat16).eval()
    dense.generation_config.eos_token_id = None
    models = {"bf16": dense} | {name: compress_(copy.deepcopy(dense), parse_recipe(name)) for name in RECIPES}
    generator = torch.Generator().manual_seed(seed)
    prompt, long = (
        torch.randint(0, CONFIG["vocab_size"], (1, length), generator=generator) for length in (PROMPT, PREFILL)
    )
    decode: dict[str, list[float]] = {name: [] for name in models}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    bandwidth: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(ROUNDS + 1):  # the first is a warm-up
            for name, model in models.items():
                measured = (decode_rate(model, prompt, 0, NEW), _seconds(model, long))
                if turn:
                    decode[name].append(measured[0])
                    prefill[name].append(measured[1])
                    bandwidth[name].append(read_bandwidth() / 1e9)
    parameters = sum(p.numel() for p in dense.parameters())
    rows = [
        {
            "model": name,
            "parameters": parameters,
            "threads": torch.get_num_threads(),
            "rounds": ROUNDS,
            "decode_tokens_per_s": statistics.median(decode[name]),
            "decode_spread": _spread(decode[name]),
            "times_bf16": _ratio(decode[name], decode["bf16"]),
            "prefill_s": statistics.median(prefill[name]),
            "prefill_over_bf16": _ratio(prefill[name], prefill["bf16"]),
            "weight_bytes": held_bytes(model),
            "memory_over_bf16": held_bytes(model) / held_bytes(dense),
            "bandwidth_gb_s": statistics.median(bandwidth[name]),
        }
        for name, model in models.items()
    ]
    return rows, checks(rows[1])


def checks(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold of W4A16 against bfloat16."""
    return [
        {"what": f"{row['model']}: {what}", "limit": f"{sign} {limit}", "value": row[key],
         "ok": row[key] >= limit if sign == ">=" else row[key] <= limit}
        for what, key, sign, limit in (
            ("decode, times bf16", "times_bf16", ">=", 2.5),
            ("memory over bf16's", "memory_over_bf16", "<=", 0.32),
            ("prefill of 512 over bf16's", "prefill_over_bf16", "<=", 1.1),
        )
    ]  # fmt: skip


def _seconds(model: Any, tokens: torch.Tensor) -> float:
    begin = time.perf_counter()
    model(tokens, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - begin


def _ratio(mine: list[float], other: list[float]) -> float:
    """The median over rounds: in a round they ran side by side."""
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)
