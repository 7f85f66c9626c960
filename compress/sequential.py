"""Compressing a model that is in memory: data-free layer by layer, with calibration data block by block.

A calibrated method sees the inputs that the model compressed so far produces: what a block does with them is what it
will do once everything before it is compressed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .activations import Rounding, settle, without_data
from .block import Block, Calls, Hidden, Linear, Solved, block_names, enter
from .bnb import bnb_
from .checkpoint import adopt_
from .experts import unfuse_experts_
from .gate import through_gate
from .rtn import check_finite, finite, relative_error
from .spec import Recipe, Rotation, make_options
from .walk import check_unshared, fitting_linears, prune_, quant_linear, quantize_weight, replace, weight_of, within

if TYPE_CHECKING:
    from .rotation import Rotated

# Methods, and modules of these names, whose `solve(block, recipe)` quantizes the linear layers of one block.
SOLVERS = ("gptq", "awq", "smoothquant", "signround", "flatquant")


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    error    relative squared error: of its outputs on the calibration data, or (`of` "weights") of the weight itself;
             None for a layer that saw no data
    damp     of the Hessian, where there is one
    input_error   relative squared error of its outputs that comes from the rounding of its inputs alone; None where
             those are not rounded, or no data was there
    input_bits    that its inputs are rounded to; 16: they are not
    input_static  on one grid for all tokens
    bits    of the weight; None: it is in another format
    spread  largest error of the layer's block over draws of the calibration data, times the smallest (see Gate)
    """

    name: str
    error: float | None
    of: str
    seconds: float
    damp: float | None = None
    note: str = ""
    input_error: float | None = None
    input_bits: int = 16
    input_static: bool = False
    bits: int | None = None
    spread: float | None = None


Report = Callable[[LayerReport], None]


def compress_(
    model: PreTrainedModel, recipe: Recipe, batches: Sequence[Tensor] = (), report: Report | None = None
) -> PreTrainedModel:
    """Do to every linear layer that the recipe does not ignore what the recipe says, in place.

    batches   calibration data, for the methods that need it: token ids int64 [B, T], without padding
    report    is told of every layer that is quantized
    Raises ValueError, before anything is changed, when the model cannot take it.
    """
    if recipe.prune is not None:
        return prune_(model, recipe)
    return quantize_(model, recipe, batches, report)


def quantize_(
    model: PreTrainedModel, recipe: Recipe, batches: Sequence[Tensor] = (), report: Report | None = None
) -> PreTrainedModel:
    """As compress_, for recipes that quantize."""
    if recipe.prune is not None:
        raise ValueError(f"recipe: {recipe} prunes; a quantizer is needed, e.g. rtn-w4a16-g64")
    if not recipe.compresses:
        return model
    report = report or (lambda _: None)
    if recipe.rotation is not None:
        start = time.perf_counter()
        made = _rotate(model, recipe, recipe.rotation, batches)
        report(LayerReport("rotation", made.difference, "logits", time.perf_counter() - start, note=made.told()))
    if recipe.method == "bnb":
        return bnb_(model, recipe, lambda name, error, seconds: report(LayerReport(name, error, "weights", seconds)))
    unfuse_experts_(model)
    layers = fitting_linears(model, recipe)
    check_unshared(model, layers, recipe)
    _check_finite(recipe, layers)
    for name, parameter in model.named_parameters():
        if not finite(parameter):
            raise ValueError(f"{recipe}: {name}: contains NaN or infinity")
    blocks: list[str] = []
    if recipe.calibrated:
        check_batches(recipe, batches, model)
        blocks = block_names(model)
    # Before the blocks: some models have such layers in front of them.
    for name, module in layers:
        if not within(name, blocks):
            report(round_(model, name, module, recipe))
    if recipe.calibrated:
        _calibrate(model, recipe, batches, blocks, [name for name, _ in layers if within(name, blocks)], report)
    adopt_(model, recipe)
    return model


def _rotate(model: PreTrainedModel, recipe: Recipe, rotation: Rotation, batches: Sequence[Tensor]) -> Rotated:
    from .cayley import learn_rotation_  # which walk over models that this module compresses
    from .rotation import hang_, rotate_

    if rotation.kind == "learned":
        assert recipe.activation is not None
        check_batches(recipe, batches, model)
        # GPTQ makes up for the weights' rounding: what is left to learn is the activations'.
        spec = None if recipe.method == "gptq" else recipe.spec
        made = learn_rotation_(model, batches, spec, recipe.activation, seed=rotation.seed)
    else:
        made = rotate_(model, rotation, rotation.seed)
    if rotation.online:
        hang_(model, rotation.seed)
    return made


def _check_finite(recipe: Recipe, layers: Iterable[tuple[str, nn.Module]]) -> None:
    for name, module in layers:
        try:
            check_finite(module.get_parameter("weight"))
        except ValueError as error:
            raise ValueError(f"{recipe}: {name}: {error}") from None


def check_batches(recipe: Recipe, batches: Sequence[Tensor], model: PreTrainedModel) -> None:
    """ValueError for data that nothing can be calibrated on, or that the model has no embeddings for."""
    if not batches:
        raise ValueError(f"calibration: {recipe} needs data, and there is none; e.g. --calibration retain:64")
    for i, ids in enumerate(batches):
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"calibration: batch {i} has the shape {list(ids.shape)}; expected [sequences, tokens]")
    embeddings: Any = model.get_input_embeddings()
    known = embeddings.weight.shape[0]
    largest = max(int(ids.max()) for ids in batches)
    if largest >= known:
        raise ValueError(f"calibration: token {largest}, but the model embeds {known}; is the tokenizer its own?")


def round_(model: nn.Module, name: str, module: Linear, recipe: Recipe) -> LayerReport:
    """Quantize one layer without data, in place."""
    start = time.perf_counter()
    with torch.no_grad():
        weight = weight_of(module)
        data_free = data_free_recipe(recipe)
        q = quantize_weight(name, weight, data_free)
        error = relative_error(weight, q)
        replace(model, name, quant_linear(module, q, data_free.activation))
    note = "" if data_free is recipe else "outside the decoder blocks: round to nearest"
    bits = 16 if data_free.activation is None else data_free.activation.bits
    seconds = time.perf_counter() - start
    return LayerReport(name, error, "weights", seconds, note=note, input_bits=bits, bits=q.spec.bits)


def with_rounding(report: LayerReport, rounding: Rounding) -> LayerReport:
    """What was settled about the layer's input, too."""
    note = ", ".join(filter(None, [report.note, rounding.note]))
    a = rounding.activation
    return replace_fields(report, note=note, input_error=rounding.error, input_bits=a.bits, input_static=not a.dynamic)


def data_free_recipe(recipe: Recipe) -> Recipe:
    """Round to nearest on the same grid, for layers of which a calibrated method sees no data."""
    if not recipe.calibrated:
        return recipe
    knobs = {name: value for name, value in vars(recipe.options).items() if name in ("scale", "clip")}
    activation = None if recipe.activation is None else without_data(recipe.activation)
    return Recipe("rtn", recipe.spec, recipe.ignore, options=make_options("rtn", knobs), activation=activation)


def _calibrate(
    model: PreTrainedModel,
    recipe: Recipe,
    batches: Sequence[Tensor],
    blocks: list[str],
    chosen: Sequence[str],
    report: Report,
) -> None:
    training = model.training
    model.eval()
    try:
        hidden = Hidden(batches, model.config.get_text_config().hidden_size, model.dtype)
        calls = enter(model, batches, hidden)
        dense = hidden.copy() if needs_dense(recipe) else None
        for name, call in zip(blocks, calls, strict=True):
            block = make_block(model, name, set(chosen), call, hidden, dense)
            dense = None if dense is None else Hidden(batches, hidden.width, model.dtype)
            for layer in compress_block_(block, recipe, hidden, dense):
                report(layer)
    finally:
        model.train(training)


def needs_dense(recipe: Recipe) -> bool:
    """Whether the method compares with what the dense model's layers see (GPTAQ)."""
    return recipe.method == "gptq" and recipe.options.alpha > 0


def make_block(
    model: nn.Module,
    name: str,
    chosen: set[str],
    calls: Calls,
    hidden: Hidden,
    dense: Hidden | None,
    kind: type[Block] = Block,
) -> Block:
    """The decoder block called `name`; `chosen`: full names of the layers to be quantized."""
    module = model.get_submodule(name)
    inside = {full.removeprefix(f"{name}.") for full in chosen if full.startswith(f"{name}.")}
    found = {inner: layer for inner, layer in module.named_modules() if inner in inside}
    return kind(name, module, found, model.config, calls, hidden, dense)


@torch.no_grad()
def compress_block_(block: Block, recipe: Recipe, after: Hidden, dense_after: Hidden | None) -> list[LayerReport]:
    """Quantize the linear layers of one block, in place, and put its outputs into `after` (which may be what it reads
    from), those of the dense path into `dense_after` (which may not). `block.linears` is empty then."""
    start = time.perf_counter()
    _check_finite(recipe, ((f"{block.name}.{name}", module) for name, module in block.linears.items()))
    if dense_after is not None:
        for i in range(len(block)):
            dense_after.write(i, block.forward(i, dense=True))
    reports: list[LayerReport] = []
    if block.linears:
        try:
            passed, spread, note = through_gate(block, recipe, _quantize_block_)
            found = _quantize_block_(block, passed)
        except ValueError as error:
            raise ValueError(f"{recipe}: {block.name}: {error}") from None
        seconds = (time.perf_counter() - start) / len(found)
        for report in found:
            said = ", ".join(filter(None, [report.note, note]))
            reports.append(replace_fields(report, seconds=seconds, spread=spread, note=said))
    for i in range(len(block)):
        after.write(i, block.forward(i))
    return reports


def _quantize_block_(block: Block, recipe: Recipe) -> list[LayerReport]:
    """Put packed layers in the place of the block's linear ones; `block.linears` is empty then."""
    solved: dict[str, Solved] = import_module(f".{recipe.method}", __package__).solve(block, recipe)
    settled = {} if recipe.activation is None else settle(block, recipe.activation, solved)
    reports = []
    for name in list(block.linears):
        # Taken out, so that the dense weight is free as soon as the packed one is there.
        found, dense, rounding = solved.pop(name), block.linears.pop(name), settled.get(name)
        of = "weights" if found.error is None else "outputs"
        report = LayerReport(
            f"{block.name}.{name}", found.error, of, 0.0, found.damp, found.note, bits=found.q.spec.bits
        )
        activation, static = (None, None) if rounding is None else (rounding.activation, rounding.static)
        replace(block.module, name, quant_linear(dense, found.q, activation, static, found.transform))
        reports.append(report if rounding is None else with_rounding(report, rounding))
        del dense
    return reports
