"""A profile as `remanence profile` gives it, of Llama-2-7B in 4 bits on an H200: two batches, measured or not."""

from collections.abc import Callable
from typing import Any

import pytest

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 32, 4096, 11008, 32000
MEMORY, PEAK, LAUNCH = 4.37e12, 712e12, 2.1e-6


def rate(value: float, spread: float | None = None, quoted: bool = False) -> dict[str, Any]:
    source = "NVIDIA H200 data sheet" if spread is None else "64 MiB copied, median of 20"
    return {"value": value, "source": source, "measured": spread is not None, "quoted": quoted, "spread": spread}


def device(measured: bool) -> dict[str, Any]:
    spread = 0.012 if measured else None
    kinds = {"float32": 48e12, "bfloat16": PEAK, "float16": PEAK, "float8": 2 * PEAK, "int8": 2 * PEAK}
    return {
        "device": "NVIDIA H200", "name": "H200", "kind": "cuda" if measured else "sheet", "dense": True,
        "memory": rate(MEMORY, spread),
        "compute": {kind: rate(value, spread) for kind, value in kinds.items()},
        "gemv": {"w4a16": rate(2.9e12, 0.02)} if measured else {},
        "products": {"w4a16": rate(310e12, 0.03)} if measured else {},
        "launch": rate(LAUNCH, 0.05) if measured else None,
        "memory_bytes": 141_000_000_000, "cache_bytes": 52_428_800, "sparse24": 2.0, "watts": 700,
    }  # fmt: skip


def module(place: str, count: int, kind: str, flops: float, moved: float, took: float | None) -> dict[str, Any]:
    floor = max(moved / MEMORY, flops / PEAK)
    return {
        "module": place, "count": count, "kind": kind, "compute": "bfloat16" if flops else None, "flops": flops,
        "bytes": moved, "floor_s": floor, "bound": "memory" if moved / MEMORY >= flops / PEAK else "compute",
        "measured_s": took and floor * took, "attained": took and 1 / took,
    }  # fmt: skip


def phase(name: str, batch: int, tokens: int, context: int, measured: bool) -> dict[str, Any]:
    rows, slowness = batch * tokens, 1.8 if measured else None
    sizes = {
        **{f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"},
        "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
        "mlp.up_proj": (HIDDEN, INTERMEDIATE),
        "mlp.down_proj": (INTERMEDIATE, HIDDEN),
    }
    modules = [
        module(
            f"model.layers.*.{place}", LAYERS, "linear", 2 * rows * a * b * LAYERS,
            LAYERS * (a * b * 0.53 + 2 * rows * (a + b)), slowness,
        )
        for place, (a, b) in sizes.items()
    ]  # fmt: skip
    kv = 2 * 2 * LAYERS * HIDDEN * batch * (context + tokens)
    pairs = batch * (tokens * context + tokens * (tokens + 1) / 2)
    modules += [
        module("model.layers.*.self_attn", LAYERS, "attention", 4 * pairs * HIDDEN * LAYERS, kv, slowness),
        module("model.layers.*.input_layernorm", LAYERS, "other", 0, 4 * rows * HIDDEN * LAYERS, slowness),
        module("model.embed_tokens", 1, "embedding", 0, 4 * rows * HIDDEN, slowness),
        module("lm_head", 1, "linear", 2 * batch * HIDDEN * VOCABULARY, 2 * HIDDEN * VOCABULARY, slowness),
    ]
    flops, moved, floor = (sum(each[key] for each in modules) for key in ("flops", "bytes", "floor_s"))
    weights = LAYERS * 0.53 * sum(a * b for a, b in sizes.values()) + 2 * HIDDEN * VOCABULARY
    memory = sum(each["floor_s"] for each in modules if each["bound"] == "memory") / floor
    took = floor * 2.1 if measured else None
    return {
        "phase": name, "batch": batch, "tokens": tokens, "context": context, "flops": flops, "weight_bytes": weights,
        "kv_bytes": kv, "activation_bytes": moved - weights - kv, "bytes": moved, "eager_bytes": moved * 1.7,
        "ops": 1200, "intensity": flops / moved, "floor_s": floor, "estimate_s": floor * 1.6 if measured else None,
        "bound": "memory" if memory > 0.5 else "compute", "memory_share": memory, "compute": "bfloat16",
        "measured_s": took, "spread": 0.02 if measured else None, "attained": floor / took if took else None,
        "remainder_s": floor * 0.3 if measured else None, "note": None, "modules": modules,
    }  # fmt: skip


def made(measured: bool = True, **changed: Any) -> dict[str, Any]:
    phases = [phase(*which, measured) for b in (1, 8) for which in (("prefill", b, 512, 0), ("decode", b, 1, 576))]
    sweep = []
    for context in (512, 2048, 8192):
        for power in range(11):
            batch = 2**power
            each = phase("decode", batch, 1, context, False)
            memory = 3.6e9 + batch * context * 524_288
            sweep.append(
                {
                    "phase": "decode", "batch": batch, "context": context, "floor_s": each["floor_s"],
                    "tokens_per_s": batch / each["floor_s"], "intensity": each["intensity"],
                    "performance": each["flops"] / each["floor_s"], "memory_bytes": memory, "fits": memory < 141e9,
                    "bound": "compute" if context == 512 and batch > 256 else "memory",
                }
            )  # fmt: skip
    seen = {"ttft_s": 0.021, "tpot_s": 0.0025, "tokens_per_s": 381.0, "peak_memory_bytes": 4.4e9, "spread": 0.02}
    serving = [
        {
            "batch": batch, "prompt": 512, "new": 128, "ttft_s": 0.0098 * batch, "tpot_s": 0.00081,
            "tokens_per_s": batch / 0.00088, "memory_bytes": 4.1e9 * batch**0.1, "fits": True,
            "measured": seen if measured else None,
        }
        for batch in (1, 8)
    ]  # fmt: skip
    return {
        "schema": "remanence.profile/1", "model": "models/llama-2-7b", "recipe": "rtn-w4a16-g128",
        "architecture": "LlamaForCausalLM", "layers": LAYERS, "parameters": 6_738_415_616, "dtype": "bfloat16",
        "device": device(measured),
        "weights": {
            "resident_bytes": 3_893_000_000, "read_bytes": 3_631_000_000, "checkpoint_bytes": 3_900_000_000,
            "bits_per_parameter": 4.62,
        },
        "kv_bytes_per_token": 524_288, "phases": phases, "serving": serving,
        "capacity": {
            "memory_bytes": 141_000_000_000, "largest_batch": 408, "at_context": 640, "largest_context": 4096,
            "at_batch": 1, "limited_by": "positions",
        },
        "sweep": sweep, "exits": {"mean_depth": 21.4, "layers": 32, "decode_s": 0.00057, "speedup": 1.42},
        "draft": {"layers": 8, "accept": 0.71, "length": 4, "decode_s": 0.0006, "speedup": 1.35},
        "uncounted": [], "assumed": ["weights of 4 bits are multiplied in bfloat16"],
        "notes": ["the floor counts every weight once"],
        "recommendation": "Decoding waits for memory: fewer bits per weight help, more operations a second do not.",
        "what_if": [
            {"recipe": "dense", "prefill_s": 0.0071, "decode_s": 0.00281, "resident_bytes": 13_476_831_232},
            {"recipe": "rtn-w4a16-g128", "prefill_s": 0.0069, "decode_s": 0.00081, "resident_bytes": 3_893_000_000},
        ],
        "environment": {"torch": "2.10"},
        **changed,
    }  # fmt: skip


@pytest.fixture
def profile() -> Callable[..., dict[str, Any]]:
    """profile(measured=True, **changed)"""
    return made
