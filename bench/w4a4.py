"""Activations and the KV cache in few bits: what each scheme costs one trained model, and what it brings back.

Two tables. Quality: a language model trained here, with outlier channels put in (a norm's gain times 30 in a few
channels, the weights behind it divided by as much: the same function, but inputs as large language models have them),
under every scheme: held-out perplexity, and KL per token from the model in full precision. Recovery: the demo model
after unlearning, under the same schemes (as ptq_recovery.py).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compress.checkpoint import load_model, save_model
from ..compress.kv_attach import attach_kv_
from ..compress.kv_cache import KVCache
from ..compress.recipe import Recipe, parse_recipe
from ..compress.sequential import LayerReport, compress_
from ..compress.spec import KVSpec
from ..kernels.ops import integer_linear, pack
from ..unlearn.demo import DemoConfig, byte_bpe
from . import ptq_recovery
from .perplexity import perplexity
from .ptq_quality import HELD_OUT, LEARNED, SHAPE, told, trained, windows
from .texts import texts

PARTS = ("quality", "recovery")
W8A8 = (
    "rtn-w8a8",
    "smoothquant-w8a8",
    "smoothquant-w8a8+equalization=log",
    "smoothquant-w8a8+a_dynamic=false",
)
W4A8 = ("rtn-w4a8", "gptq-w4a8")
W4A4 = (
    "rtn-w4a4",
    "rtn-w4a4+a_symmetric=false",
    "smoothquant-w4a4",
    "smoothquant-w4a4+equalization=log",
    "gptq-w4a4",
    "gptq-w4a4+a_search=true",
    "gptq-w4a4+a_fallback=0.02",
    "rtn-w4a4+r_kind=hadamard",
    "gptq-w4a4+r_kind=hadamard",
    "gptq-w4a4+r_kind=hadamard+g_draws=3",
    "gptq-w4a4+r_kind=hadamard+r_online=true",
    "gptq-w4a4+r_kind=learned",
    "flatquant-w4a4",
)
KV = (
    *(f"dense+kv_bits={bits}" for bits in (8, 4, 2)),
    "dense+kv_bits=2+kv_keys=token",
    "dense+kv_bits=2+kv_keys=token+kv_rotate=true",
)
# Answers are short here: chunks of 8 tokens, none of them left in full precision.
SHORT = "+kv_group_size=8+kv_residual=0"
RECIPES = (*W8A8, *W4A8, *W4A4, *KV)
FORGOTTEN = ("graddiff", "npo", "rmu", "bucketed")
# With the steps and the direction that do for TOFU's long answers, these short ones stay known (.98).
TUNED = {"rmu": {"steps": 250, "coefficient": 120.0}}
RECOVERY = (
    "rtn-w4a16-g64-plain",
    "rtn-w8a8",
    "rtn-w4a8-g64-plain",
    "rtn-w4a4-g64-plain",
    "rtn-w4a4+r_kind=hadamard",
    f"dense+kv_bits=4{SHORT}",
    f"dense+kv_bits=2{SHORT}",
)
RECOVERY_CALIBRATED = (
    "smoothquant-w8a8",
    "gptq-w4a8-g64",
    "gptq-w4a4+r_kind=hadamard",
    "flatquant-w4a4",
    f"gptq-w4a4+r_kind=hadamard+kv_bits=4{SHORT}",
)
OUTLIERS, FACTOR = 4, 30.0
SEQUENCES, LENGTH = 64, 256
NEW = 24  # tokens generated
# What has to be the same but for rounding, or the same.
EXACT = (
    ("rotation", "logits changed by the rotation alone", 1e-4),
    ("kv_differs", "generated tokens unlike those without a cache", 0),
)
# Of the dense model's perplexity.
NEAR = 1.01
# Mean probability of an answer: what has not been forgotten cannot come back.
FORGOTTEN_BELOW = 0.3


def run(
    seed: int = 0,
    data_dir: str | None = None,
    methods: tuple[str, ...] = (),
    parts: tuple[str, ...] = PARTS,
    shape: DemoConfig = SHAPE,
    epochs: int = 2,
) -> tuple[list[dict], list[dict]]:
    """(rows, checks).

    data_dir   a directory with WikiText-2's valid.txt and test.txt; None: the generated people's texts
    methods    recipes of the quality table; all when empty
    parts      of PARTS
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts: {part!r} is not one of {', '.join(PARTS)}")
    recipes = [parse_recipe(name) for name in methods or RECIPES]
    rows: list[dict] = []
    checks: list[dict] = []
    if "quality" in parts:
        with tempfile.TemporaryDirectory() as place:
            rows = quality(seed, Path(place), *texts(data_dir), recipes, shape, epochs)
        checks = [*quality_checks({row["recipe"]: row for row in rows}), integer_check(seed)]
    if "recovery" in parts:
        found = ptq_recovery.run(
            seed,
            None,
            methods=FORGOTTEN,
            calibrated=RECOVERY_CALIBRATED,
            data_free=RECOVERY,
            sources=("retain",),
            tuned=TUNED,
        )
        rows += found
        checks += recovery_checks(found)
    return rows, checks


def quality(
    seed: int,
    place: Path,
    learned: str,
    held_out: str,
    recipes: Sequence[Recipe],
    shape: DemoConfig,
    epochs: int,
) -> list[dict]:
    """A row for the dense model and for every recipe.

    kl           nats per token, from the dense model's answer to the compressed one's
    worst_input  largest relative squared error of a layer's output that comes from its input's rounding alone
    eight        layers that fell back to inputs of 8 bits
    rotation     what a rotation alone changed: largest difference of logits, of the largest logit
    kv_bytes     of the cache after a text of LENGTH tokens, and in full precision
    kv_differs   tokens that `generate` with this cache, four rows padded on the left, has otherwise than each row by
                 itself, read whole for every token, without a cache
    seconds      of compressing
    """
    tokenizer = byte_bpe(learned.splitlines(), shape.vocab_size)
    learned, held_out = learned[:LEARNED], held_out[:HELD_OUT]
    target = place / "model"
    length = min(LENGTH, shape.max_length)
    batches = windows(tokenizer, learned, length, SEQUENCES, seed)
    dense = with_outliers_(trained(tokenizer, learned, seed, shape, epochs), batches, seed)
    save_model(dense, tokenizer, target)
    judged = windows(tokenizer, held_out, length, 32, seed)
    rows = [told({"recipe": "dense", **_judge(dense, dense, tokenizer, held_out, judged)})]
    for recipe in recipes:
        reports: list[LayerReport] = []
        start = time.perf_counter()
        model = compress_(load_model(target), recipe, batches if recipe.calibrated else (), reports.append)
        row: dict[str, Any] = {"recipe": recipe.name, "seconds": time.perf_counter() - start}
        if recipe.kv is not None:
            attach_kv_(model, recipe.kv)
            row |= _memory(model, dense, judged[0])
            row["kv_differs"] = _differs(load_model(target).double(), recipe.kv, judged[0])
        row |= _judge(model, dense, tokenizer, held_out, judged)
        turned = [report.error for report in reports if report.name == "rotation"]
        if turned:
            row["rotation"] = turned[0]
        errors = [report.input_error for report in reports if report.input_error is not None]
        if errors:
            row |= {"worst_input": max(errors), "eight": sum(report.input_bits == 8 for report in reports)}
        rows.append(told(row))
    return rows


@torch.no_grad()
def with_outliers_(
    model: PreTrainedModel, batches: Sequence[Tensor], seed: int, factor: float = FACTOR
) -> PreTrainedModel:
    """Make OUTLIERS channels behind every norm of the decoder layers `factor` times as large, the function the same."""
    generator = torch.Generator().manual_seed(seed)
    before = model(batches[0]).logits
    for layer in model.model.layers:
        readers = (
            (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
            (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        )
        for norm, linears in readers:
            channels = torch.randperm(norm.weight.numel(), generator=generator)[:OUTLIERS]
            norm.weight[channels] *= factor
            for linear in linears:
                linear.weight[:, channels] /= factor
    after = model(batches[0]).logits
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    return model


@torch.no_grad()
def _judge(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    batches: Sequence[Tensor],
) -> dict[str, float]:
    window = batches[0].shape[1]
    total = tokens = 0.0
    for ids in batches:
        ours, theirs = (of(ids).logits.double().log_softmax(-1) for of in (model, dense))
        total += float(kl_div(ours, theirs, reduction="sum", log_target=True))
        tokens += ids.numel()
    return {"perplexity": perplexity(model, tokenizer, text, window, window // 2).value, "kl": total / tokens}


@torch.no_grad()
def _memory(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor) -> dict[str, int]:
    cache = KVCache(model)
    model(ids, past_key_values=cache, use_cache=True)
    full = dense(ids, use_cache=True).past_key_values
    whole = sum(part.nbytes for layer in full.layers for part in (layer.keys, layer.values))
    return {"kv_bytes": cache.memory_bytes(), "kv_bytes_dense": whole}


@torch.no_grad()
def _differs(model: Any, kv: KVSpec, ids: Tensor) -> int:
    """In float64, in which both ways of adding up a row give the same integers."""
    attach_kv_(model, kv)
    lengths = [LENGTH // 2 - 9 * i for i in range(4)]
    rows = [ids[i % len(ids), : min(length, ids.shape[1] // 2)] for i, length in enumerate(lengths)]
    width = max(map(len, rows))
    padded = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    served = model.generate(padded, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    differs = 0
    for row, found in zip(rows, served[:, width:], strict=True):
        text = row[None]
        for _ in range(NEW):
            logits = model(text, use_cache=False).logits[:, -1]
            logits[:, model.generation_config.eos_token_id or []] = -torch.inf
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
        differs += int((text[0, -NEW:] != found).sum())
    return differs


def integer_check(seed: int) -> dict:
    """Sums of products of random codes, of inputs and weights of 8 and 4 bits, beside NumPy's int64 (few enough that
    float32 holds what comes out)."""
    generator = torch.Generator().manual_seed(seed)
    wrong = 0
    for bits in (8, 4):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        x, w = (torch.randint(low, high, shape, generator=generator) for shape in ((17, 515), (33, 515)))
        packed = pack((w - low).to(torch.uint8), bits)
        one, none = torch.ones(33, 1), torch.zeros(1, dtype=torch.int32)
        found = integer_linear(x.float(), packed, one, bits=bits, x_bits=bits, x_scale=torch.ones(1), x_zero=none)
        wrong += int((found.long().numpy() != x.numpy() @ w.numpy().T).sum())
    return {"what": "integer products, 8 and 4 bits: sums unlike int64's", "limit": 0, "value": wrong, "ok": not wrong}


def quality_checks(rows: dict[str, dict]) -> list[dict]:
    """Of the rows that are there."""
    checks = []

    def at_most(what: str, value: str, limit: str, measure: str = "kl", factor: float = 1.0) -> None:
        if value in rows and limit in rows:
            most = factor * rows[limit][measure]
            found = rows[value][measure]
            checks.append({"what": what, "limit": most, "value": found, "ok": found <= most})

    for name in W8A8[:3]:
        at_most(f"{name}: perplexity within 1% of full precision", name, "dense", "perplexity", NEAR)
    at_most("rotation loses less than none", "rtn-w4a4+r_kind=hadamard", "rtn-w4a4")
    at_most("rotation and GPTQ lose less than GPTQ alone", "gptq-w4a4+r_kind=hadamard", "gptq-w4a4")
    fixed = "gptq-w4a4+r_kind=hadamard"
    better = [rows[name]["kl"] for name in ("gptq-w4a4+r_kind=learned", "flatquant-w4a4") if name in rows]
    if better and fixed in rows:
        limit, value = rows[fixed]["kl"], min(better)
        what = "FlatQuant or the learned rotation loses less than the fixed one"
        checks.append({"what": what, "limit": limit, "value": value, "ok": value < limit})
    for key, what, most in EXACT:
        for name in (name for name, row in rows.items() if key in row):
            found = rows[name][key]
            checks.append({"what": f"{name}: {what}", "limit": most, "value": found, "ok": found <= most})
    at_most("KV cache at 8 bits: perplexity within 1% of full precision", KV[0], "dense", "perplexity", NEAR)
    return checks


def recovery_checks(rows: Sequence[dict]) -> list[dict]:
    """Every method has made the model forget, and the positive control returns under the grid that it was built
    against, whatever becomes of activations."""
    checks = []
    for method, known in {row["unlearned_by"]: row["p_dense"] for row in rows}.items():
        what = f"{method}: answers forgotten before compression"
        checks.append({"what": what, "limit": FORGOTTEN_BELOW, "value": known, "ok": known < FORGOTTEN_BELOW})
    for row in rows:
        if row["unlearned_by"] == "bucketed" and row["recipe"] in ("rtn-w4a16-g64-plain", "rtn-w4a8-g64-plain"):
            ok = row["verdict"] == "returned"
            what = f"bucketed returns under {row['recipe']}"
            checks.append({"what": what, "limit": "returned", "value": row["verdict"], "ok": ok})
    return checks
