"""The roofline against what it must agree with: closed forms of published models, bytes of saved files, the clock of
this machine, and LLM-Viewer with every difference explained."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ..backends.ceilings import Ceilings
from ..backends.device import device
from ..compress.checkpoint import save_model
from ..compress.recipe import DENSE, parse_recipe
from ..compress.sequential import compress_
from ..unlearn.demo import DemoConfig, demo_tokenizer
from ..unlearn.people import people_corpus
from . import llm_viewer
from .roofline.bound import estimate_s, floor_s
from .roofline.measure import measure
from .roofline.measured import measure_ceilings
from .roofline.published import MODELS
from .roofline.stored import (
    Forms,
    apply,
    checkpoint_bytes,
    forms_of_model,
    forms_of_recipe,
    meta_copy,
    module_bytes,
    resident_bytes,
)
from .roofline.walk import walk

Rows = list[dict[str, Any]]

# What must hold: shares of a closed form and of a file's size, seconds of a walk, a factor between estimate and clock.
FLOPS, FILES, SECONDS, FACTOR = 1e-3, 1e-3, 5.0, 2.0
_PROMPT, _CONTEXT = 2048, 2047
# Recipes whose files are weighed.
_RECIPES = ("rtn-w4a16-g128", "rtn-w4a16-g128-asym", "rtn-w8a16", "rtn-w3a16-g128", "rtn-w8a8", "rtn-w4a8-g128")
# Models that LLM-Viewer is held beside, by their names among the published ones.
_VIEWED = ("Llama-2-7B", "Llama-3.1-8B", "Qwen3-0.6B")
# What is measured: a prompt, tokens of the answer, sequences.
_LOAD = (96, 17, (1, 4))


def run(seed: int = 0, parts: Sequence[str] | None = None) -> tuple[Rows, Rows]:
    """parts: of walk, stored, measured, viewer; None: all."""
    known: dict[str, Callable[[int], tuple[Rows, Rows]]] = {
        "walk": walked,
        "stored": stored,
        "measured": measured,
        "viewer": viewed,
    }
    for part in parts or ():
        if part not in known:
            raise ValueError(f"parts: {part!r} is not one of {', '.join(known)}")
    rows, checks = [], []
    for part in parts or known:
        more, held = known[part](seed)
        rows += more
        checks += held
    return rows, checks


def _check(what: str, limit: float, value: float, ok: bool | None = None) -> dict[str, Any]:
    return {"what": what, "limit": limit, "value": value, "ok": value <= limit if ok is None else ok}


def walked(seed: int = 0) -> tuple[Rows, Rows]:  # noqa: ARG001 (nothing is random here)
    """Six models by their published dimensions, in bfloat16: a prompt of 2048 tokens, and one more token after 2047."""
    rows: Rows = []
    for name, of in MODELS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(of.made(), dtype=torch.bfloat16)
        for batch in (1, 8):
            start = time.perf_counter()
            steps = walk(model, batch, _PROMPT - 1, _CONTEXT)
            seconds = time.perf_counter() - start
            for step in steps:
                form = of.flops(batch, step.tokens, step.context)
                read = 2 * of.read(batch * step.tokens)
                rows.append(
                    {
                        "model": name,
                        "phase": step.phase,
                        "batch": batch,
                        "GFLOP": step.total("flops") / 1e9,
                        "closed form": form / 1e9,
                        "off by": step.total("flops") / form - 1,
                        "weights read, bytes": round(step.total("weight_bytes")),
                        "parameters, bytes": round(read),
                        "uncounted ops": sum(each.count for each in step.uncounted),
                        "walk s": seconds,
                    }
                )
    decode = [row for row in rows if row["phase"] == "decode"]
    off = max(abs(row["weights read, bytes"] - row["parameters, bytes"]) for row in decode)
    return rows, [
        _check("products against closed forms, largest deviation", FLOPS, max(abs(row["off by"]) for row in rows)),
        _check("weights read in a decode step against parameters, bytes", 0, off),
        _check("ops that were not counted", 0, sum(row["uncounted ops"] for row in rows)),
        _check("slowest walk, seconds", SECONDS, max(row["walk s"] for row in rows)),
    ]


def stored(seed: int = 0) -> tuple[Rows, Rows]:
    """Saved checkpoints, weighed: the whole files, their tensors, and both as reckoned without values."""
    rows: Rows = []
    tokenizer = demo_tokenizer(people_corpus(4, "forget25", seed=seed), DemoConfig())
    for name in _RECIPES:
        recipe = parse_recipe(name)
        model = _model(seed, torch.bfloat16, layers=4, vocabulary=4096)
        bones, _ = meta_copy(model)
        forms, dense = forms_of_recipe(bones, recipe), module_bytes(bones)
        compress_(model, recipe)
        with tempfile.TemporaryDirectory() as scratch:
            save_model(model, tokenizer, Path(scratch) / "saved", recipe)
            files = list((Path(scratch) / "saved").glob("*.safetensors"))
            size, tensors = sum(file.stat().st_size for file in files), sum(map(_tensor_bytes, files))
        reckoned = checkpoint_bytes(dense, forms)
        rows.append(
            {
                "recipe": name,
                "files, bytes": size,
                "tensors in them": tensors,
                "reckoned": round(reckoned),
                "off by": reckoned / size - 1,
                "in memory": round(resident_bytes(dense, forms)),
                "bits per quantized weight": _bits(bones, forms),
            }
        )
    return rows, [
        _check("reckoned bytes against saved files, largest deviation", FILES, max(abs(row["off by"]) for row in rows)),
        _check(
            "reckoned bytes against the tensors in them, bytes",
            0,
            max(abs(row["reckoned"] - row["tensors in them"]) for row in rows),
        ),
    ]


def _bits(bones: PreTrainedModel, forms: Forms) -> float:
    held = dict(bones.named_parameters())
    weights = sum(held[f"{name}.weight"].numel() for name in forms)
    return 8 * sum(form.bytes for form in forms.values()) / weights


def _tensor_bytes(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        return sum(tensors.get_tensor(key).nbytes for key in tensors.keys())  # noqa: SIM118 (no mapping)


def _model(
    seed: int, dtype: torch.dtype, layers: int, hidden: int = 1024, inner: int = 2816, vocabulary: int = 8192
) -> PreTrainedModel:
    """Shaped like Llama, with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def measured(seed: int = 0) -> tuple[Rows, Rows]:
    """A model of 200 million parameters on this CPU, dense in float32 and bfloat16, and W4A16 by our kernels: floors by
    ceilings that are measured first, the estimate, and the clock."""
    machine = device("cpu")
    ceilings = measure_ceilings(machine)
    rows = _ceiling_rows(ceilings)
    prompt, new, batches = _LOAD
    results: Rows = []
    for name, dtype, recipe in (
        ("float32", torch.float32, DENSE),
        ("bfloat16", torch.bfloat16, DENSE),
        ("float32, W4A16 group 128", torch.float32, parse_recipe("rtn-w4a16-g128-plain")),
        ("bfloat16, W4A16 group 128", torch.bfloat16, parse_recipe("rtn-w4a16-g128-plain")),
    ):
        model = _model(seed, dtype, layers=16)
        bones, _ = meta_copy(model)
        dense = module_bytes(bones)
        if recipe.compresses:
            compress_(model, recipe)
        forms = forms_of_model(model)
        size = resident_bytes(dense, forms)
        for batch in batches:
            found = measure(model, machine, batch, prompt, new, seed=seed)
            steps = walk(bones, batch, prompt, round(found.context))
            clocks = ((found.ttft_s, found.ttft_spread), (found.tpot_s, found.tpot_spread))
            for step, (seconds, spread) in zip(steps, clocks, strict=True):
                step = apply(step, forms, dense)
                least, about = floor_s(step, ceilings), estimate_s(step, ceilings)
                assert about is not None
                results.append(
                    {
                        "kept": name,
                        "weights, MB": size / 1e6,
                        "cache, MB": (ceilings.cache_bytes or 0) / 1e6,
                        "phase": step.phase,
                        "batch": batch,
                        "measured ms": 1e3 * seconds,
                        "spread": spread,
                        "floor ms": 1e3 * least,
                        "attained": least / seconds,
                        "estimate ms": 1e3 * about,
                        "estimate / measured": about / seconds,
                        "remainder ms": 1e3 * found.remainder_s[step.phase],
                    }
                )
        del model
    ratios = [row["estimate / measured"] for row in results]
    smallest = min(row["weights, MB"] / max(row["cache, MB"], 1e-9) for row in results)
    return rows + results, [
        _check("estimate against the clock, largest factor", FACTOR, max(max(r, 1 / r) for r in ratios)),
        _check("weights over the last-level cache, the smallest", 1, smallest, smallest > 1),
        _check("floor over the clock, the largest", 1, max(row["attained"] for row in results)),
    ]


def _ceiling_rows(ceilings: Ceilings) -> Rows:
    rates = {
        "memory": (ceilings.memory, "GB/s"),
        **{f"arithmetic, {kind}": (rate, "G operations/s") for kind, rate in ceilings.compute.items()},
        **{f"weights read by one row, {kind}": (rate, "GB/s") for kind, rate in ceilings.gemv.items()},
        **{f"many rows, {kind}": (rate, "G operations/s") for kind, rate in ceilings.products.items()},
    }
    rows = [
        {"ceiling": name, "value": rate.value / 1e9, "unit": unit, "spread": rate.spread, "source": rate.source}
        for name, (rate, unit) in rates.items()
    ]
    if ceilings.launch is not None:
        rate = ceilings.launch
        rows.append(
            {"ceiling": "an op", "value": 1e6 * rate.value, "unit": "us", "spread": rate.spread, "source": rate.source}
        )
    return rows


def viewed(seed: int = 0, context: int = 2048) -> tuple[Rows, Rows]:  # noqa: ARG001 (nothing is random here)
    """LLM-Viewer's counts of three models, one sequence of 2048 tokens, beside the walk's."""
    rows: Rows = []
    causes: Rows = []
    worst = 0.0
    for name in _VIEWED:
        of = MODELS[name]
        sizes = (of.hidden, of.layers, of.heads, of.kv_heads, of.head_dim, of.inner, of.vocabulary)
        shape = llm_viewer.Shape(*sizes, of.tied, qk_norm=of.config[0].startswith("Qwen3"))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(of.made(), dtype=torch.bfloat16)
        _, decode = walk(model, 1, 1, context - 1)
        prefill, _ = walk(model, 1, context)
        own = llm_viewer.Counts(
            decode.total("flops"),
            prefill.total("flops"),
            float(sum(module_bytes(model).values())),
            decode.total("weight_bytes"),
            float(decode.cache_bytes(context)),
        )
        theirs = llm_viewer.viewer(shape, 1, context)
        for count, difference in llm_viewer.explained(shape, 1, context, own, theirs).items():
            worst = max(worst, difference.residual)
            rows.append(
                {
                    "model": name,
                    "count": count,
                    "LLM-Viewer": difference.theirs,
                    "walk": difference.ours,
                    "off by": difference.theirs / difference.ours - 1,
                    "unexplained": difference.residual,
                }
            )
            causes += [
                {
                    "why": f"{name}, {count}",
                    "cause": cause,
                    "ours less theirs": amount,
                    "of ours": amount / difference.ours,
                }
                for cause, amount in difference.causes.items()
            ]
    return rows + causes, [_check("differences to LLM-Viewer that no cause explains, largest share", FLOPS, worst)]
