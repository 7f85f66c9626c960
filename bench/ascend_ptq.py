"""The PTQ baselines of the Ascend study (arXiv 2602.17693) on a model that reasons in steps, on any device.

AWQ, GPTQ, SmoothQuant and FlatQuant in W4A16, W8A8 and W4A4KV4, with the study's hyper-parameters, each calibrated on
several draws of sequences. The study reports that in 4 bits layer-wise calibration is unstable and that long reasoning
collapses: hence accuracy by length of chain, and every layer's error by draw.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import inf, isfinite
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from ..backends.device import Device
from ..backends.device import device as device_named
from ..compress.kv_attach import attach_kv_
from ..compress.recipe import parse_recipe
from ..compress.sequential import LayerReport, compress_
from ..unlearn.demo import DemoConfig
from .ascend_subject import Subject, closeness, given, own, solved
from .chains import COURSE, SHAPE, Lesson
from .ptq_quality import told

# As QuaRot's caches: keys too with a scale per token and head; ours would keep the newest 32 tokens exact, besides.
KV4 = "+kv_bits=4+kv_residual=0+kv_keys=token"


@dataclass(frozen=True)
class Baseline:
    name: str
    format: str
    recipe: str
    why: str


@dataclass(frozen=True)
class Layer:
    """errors: of the layer's output, on each draw; spread: the largest over the smallest."""

    name: str
    errors: Sequence[float]
    spread: float

    @property
    def unstable(self) -> bool:
        return self.spread > UNSTABLE


STUDY = (
    Baseline("RTN", "W4A16", "rtn-w4a16-g128-plain", "what calibration has to beat"),
    Baseline("AWQ", "W4A16", "awq-w4a16-g128-asym+duo=false", "the study's: asymmetric, activations alone decide"),
    Baseline("GPTQ", "W4A16", "gptq-w4a16-g128-asym+act_order=static", "the study's: asymmetric, act-order, clip"),
    Baseline("SmoothQuant", "W8A8", "smoothquant-w8a8", "alpha 0.5; the study also rounds its cache to 8 bits"),
    Baseline("GPTQ", "W8A8", "gptq-w8a8+act_order=static", "act-order, clip"),
    Baseline("AWQ", "W8A8", "awq-w8a8+duo=false", "scaled for its weights, inputs rounded as they come"),
    Baseline("FlatQuant", "W8A8", "flatquant-w8a8", "15 epochs at 5e-3; the study also rounds its cache to 8 bits"),
    Baseline("RTN", "W4A4KV4", f"rtn-w4a4{KV4}", "what calibration has to beat"),
    Baseline("SmoothQuant", "W4A4KV4", f"smoothquant-w4a4{KV4}", "alpha 0.5"),
    Baseline("GPTQ", "W4A4KV4", f"gptq-w4a4+act_order=static{KV4}", "without a rotation, as the study has it on NPUs"),
    Baseline("AWQ", "W4A4KV4", f"awq-w4a4+duo=false{KV4}", "scaled for its weights, inputs rounded as they come"),
    Baseline("FlatQuant", "W4A4KV4", f"flatquant-w4a4{KV4}", "the study's: 15 epochs at 5e-3"),
    Baseline(
        "GPTQ rotated", "W4A4KV4", f"gptq-w4a4+act_order=static+r_kind=hadamard{KV4}", "rotated: no NPU kernel then"
    ),
    Baseline("GPTQ gated", "W4A4KV4", f"gptq-w4a4+act_order=static+g_draws=3{KV4}", "unstable blocks stay at 8 bits"),
    Baseline(
        "GPTQ rotated and gated",
        "W4A4KV4",
        f"gptq-w4a4+act_order=static+r_kind=hadamard+g_draws=3{KV4}",
        "both remedies",
    ),
)
DRAWS = 3
# What a row measures besides shares of exact answers.
NO_GROUP = ("perplexity", "kl", "wrong", "at_step")
# A layer counts as unstable whose error is so many times larger on one draw than on another: the gate's limit.
UNSTABLE = 2.0
# Layers of each recipe that the table has, largest spread first.
TOP = 2
SOLVES = 0.9
# Of the dense model's perplexity.
NEAR = 1.01
# Formats, and which baseline should lose less there than which: calibration than none, the remedies than plain methods.
LOWER = (
    *(("W4A16", name, "RTN") for name in ("AWQ", "GPTQ")),
    *(("W4A4KV4", *pair) for pair in product(("GPTQ rotated", "FlatQuant"), ("RTN", "AWQ", "GPTQ", "SmoothQuant"))),
)
Row = dict[str, Any]


def run(
    seed: int = 0,
    device: str = "cpu",
    model: str | None = None,
    data_dir: str | None = None,
    problems: str | None = None,
    methods: tuple[str, ...] = (),
    shape: DemoConfig = SHAPE,
    course: Sequence[Lesson] = COURSE,
) -> tuple[list[Row], list[Row]]:
    """(rows, checks).

    device     where the model is compressed, read and generates; one without float64 does not compress, the CPU does
    model      a causal language model; None: one that is trained here, on the CPU
    data_dir   for `model`: a directory with WikiText-2's valid.txt and test.txt; None: the generated people's texts
    problems   for `model`: a file of questions and answers (JSON lines), answered exactly or not
    methods    names in STUDY; all when empty
    """
    if model is None and (data_dir or problems):
        raise ValueError(f"{'data_dir' if data_dir else 'problems'}: goes with a model; expected --model")
    where = device_named(device)
    chosen = baselines(methods)
    subject = own(seed, shape, course) if model is None else given(model, data_dir, problems)
    subject.model.to(where.torch_device)  # type: ignore[arg-type]
    dense = told({"draw": None, "baseline": "dense", "format": "", **judged(subject.model, subject), "seconds": None})
    every, summary = [dense], [summed("dense", "", [dense], [])]
    layers: list[Row] = []
    for each in chosen:
        found = draws(each, subject, where)
        table = spreads([errors for _, errors in found])
        every += [row for row, _ in found]
        summary.append(summed(each.name, each.format, every[-len(found) :], table))
        layers += [layer_row(each, layer) for layer in table[:TOP]]
    rows = [vars(each) for each in chosen] + summary + every + layers
    return [row | {"device": where.name} for row in rows], checks(summary, every, model is None)


def baselines(methods: Sequence[str]) -> list[Baseline]:
    """Those of these names; ValueError for a name that is not in STUDY."""
    known = dict.fromkeys(each.name for each in STUDY)
    for name in methods:
        if name not in known:
            raise ValueError(f"methods: {name!r} is not one of {', '.join(known)}")
    return [each for each in STUDY if not methods or each.name in methods]


def draws(each: Baseline, subject: Subject, where: Device) -> list[tuple[Row, dict[str, float]]]:
    """A row for every draw of calibration data, with the error of every layer."""
    recipe = parse_recipe(each.recipe)
    there = where.torch_device if where.float64 else torch.device("cpu")
    found = []
    for number in range(DRAWS if recipe.calibrated else 1):
        reports: list[LayerReport] = []
        batches = subject.calibration(number) if recipe.calibrated else ()
        start = time.perf_counter()
        model = compress_(copy.deepcopy(subject.model).to(there), recipe, batches, reports.append)  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
        model.to(where.torch_device)  # type: ignore[arg-type]
        if recipe.kv is not None:
            attach_kv_(model, recipe.kv)
        row = {"draw": number, "baseline": each.name, "format": each.format, **judged(model, subject)}
        known = [(report.name, error(report)) for report in reports if report.of != "logits"]
        errors = {name: value for name, value in known if value is not None}
        found.append((told(row | {"seconds": seconds}), errors))
    return found


def judged(model: PreTrainedModel, subject: Subject) -> Row:
    return {**closeness(model, subject.model, subject), **solved(model, subject)}


def error(report: LayerReport) -> float | None:
    """Of a layer's output: what its weight's rounding and its input's add to it, independently; None: without data."""
    return None if report.error is None else report.error + (report.input_error or 0.0)


def spreads(found: Sequence[dict[str, float]]) -> list[Layer]:
    """Every layer's error on each draw, and the largest over the smallest; the largest spread first."""
    layers = []
    for name in (name for name in found[0] if all(name in errors for errors in found)):
        errors = [errors[name] for errors in found]
        low, high = min(errors), max(errors)
        layers.append(Layer(name, errors, high / low if low else 1.0 if not high else inf))
    return sorted(layers, key=lambda layer: -layer.spread)


def layer_row(each: Baseline, layer: Layer) -> Row:
    errors = ", ".join(f"{error:.3g}" for error in layer.errors)
    row = {"layer": layer.name, "baseline": each.name, "format": each.format, "errors": errors, "spread": layer.spread}
    return row | {"unstable": layer.unstable}


def summed(name: str, format: str, rows: Sequence[Row], layers: Sequence[Layer]) -> Row:
    """Means over draws of what was measured, and how far draws lie apart.

    kl_spread      largest KL over the smallest
    exact_spread   largest difference of a group's share of exact answers
    layer_spread, unstable   largest spread of a layer, and how many of all `layers` are above UNSTABLE
    """
    measures = [key for key in rows[0] if key not in ("draw", "baseline", "format", "seconds")]
    known = {key: [row[key] for row in rows if row[key] is not None] for key in measures}
    low, high = min(known["kl"]), max(known["kl"])
    return {
        "baseline": name,
        "format": format,
        **{key: fmean(values) if values else None for key, values in known.items()},
        "kl_spread": high / low if low else None,
        "exact_spread": max(
            (max(known[key]) - min(known[key]) for key in measures if key not in NO_GROUP), default=None
        ),
        "layer_spread": layers[0].spread if layers else None,
        "unstable": sum(layer.unstable for layer in layers),
        "layers": len(layers),
    }


def checks(summary: Sequence[Row], every: Sequence[Row], reasons: bool) -> list[Row]:
    """Of the rows that are there; `reasons`: the dense model was trained to solve its problems."""
    rows = {(row["baseline"], row["format"]): row for row in summary}
    found = []
    if reasons:
        least = min(value for key, value in every[0].items() if key.endswith(" steps"))
        what = "dense: exact answers, of the worst length"
        found.append({"what": what, "limit": SOLVES, "value": least, "ok": least > SOLVES})
    limit = NEAR * every[0]["perplexity"]
    for name in (name for name, format in rows if format == "W8A8"):
        value = max(row["perplexity"] for row in every if (row["baseline"], row["format"]) == (name, "W8A8"))
        what = f"{name} W8A8: perplexity within 1% of full precision on every draw"
        found.append({"what": what, "limit": limit, "value": value, "ok": value <= limit})
    for format, better, worse in LOWER:
        if {(better, format), (worse, format)} <= rows.keys():
            limit, value = rows[worse, format]["kl"], rows[better, format]["kl"]
            what = f"{format}: KL of {better} below {worse}'s"
            found.append({"what": what, "limit": limit, "value": value, "ok": value < limit})
    counts = [row["layers"] for key, row in rows.items() if key != ("dense", "")]
    ok = min(counts) == max(counts) > 0 and all(isfinite(row["layer_spread"] or 0) for row in summary)
    what = "layers with a spread, of every recipe"
    return [*found, {"what": what, "limit": max(counts), "value": min(counts), "ok": ok}]
