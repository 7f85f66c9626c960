"""Compressing a model that is in memory: data-free layer by layer, with calibration data block by block.

A calibrated method sees the inputs that the model compressed so far produces: what a block does with them is what it
will do once everything before it is compressed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from functools import partial
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
from .gate import one_by_one, through_gate
from .knobs import CALIBRATED, make_options
from .linear import prepack_
from .prune import Cut, Pruned, by_magnitude, zeros_note
from .recipe import Recipe
from .retrain import masks_of, retrain_
from .rtn import check_finite, finite, relative_error
from .signround import output_errors
from .spec import Retrain, Rotation
from .walk import (
    DATA_FREE,
    check_unshared,
    data_free_prune,
    fitting_linears,
    global_cut,
    prunable_linears,
    pruned_weight,
    put_weight_,
    quant_linear,
    quantize_weight,
    replace,
    weight_of,
    within,
)

if TYPE_CHECKING:
    from .rotation import Rotated

# Methods, and modules of these names, whose `solve(block, recipe)` quantizes the linear layers of one block.
SOLVERS = ("gptq", "awq", "smoothquant", "signround", "flatquant")
# Pruners, and modules of these names, whose `prune_block_(block, spec)` prunes the linear layers of one block.
BLOCK_PRUNERS = ("wanda", "sparsegpt")
# By how much of all weights rounding, row by row, may prune less than was asked for.
_ROUNDED = 0.01


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    error    relative squared error: of its outputs on the calibration data, or (`of` "weights") of the weight itself;
             None for a layer that saw no data. Of one that was pruned before it was rounded, that of rounding, unless
             GPTQ did both; the note has the other
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
    model: PreTrainedModel,
    recipe: Recipe,
    batches: Sequence[Tensor] = (),
    report: Report | None = None,
    retraining: Sequence[Tensor] = (),
) -> PreTrainedModel:
    """Do to every linear layer that the recipe does not ignore what the recipe says, in place.

    batches      calibration data, for the methods that need it: token ids int64 [B, T], without padding
    report       is told of every layer that is quantized
    retraining   what a pruned model is trained on again, where the recipe says so; as batches
    With order=prune-unlearn the model is one that was pruned before it was unlearned, and the rest is done to it.
    Raises ValueError, before anything is changed, when the model cannot take it.
    """
    if recipe.before.compresses:
        _check_pruned(model, recipe)
    if recipe.retrain is not None:
        return _retrained_(model, recipe, recipe.retrain, batches, report or (lambda _: None), retraining)
    if recipe.prune is not None and recipe.spec is None:
        return model if recipe.before.compresses else prune_(model, recipe, batches, report)
    return quantize_(model, quantizing_alone(recipe) if recipe.before.compresses else recipe, batches, report)


def _check_pruned(model: PreTrainedModel, recipe: Recipe) -> None:
    """ValueError for a model that is not pruned as the recipe has it; its experts are taken apart."""
    assert recipe.prune is not None
    unfuse_experts_(model)
    weights = [layer.weight for _, layer in prunable_linears(model, recipe)]
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
    share = zeros / sum(weight.numel() for weight in weights)
    if share < recipe.prune.sparsity - _ROUNDED:
        raise ValueError(
            f"order: {recipe.prune.order} is for a model that was pruned before it was unlearned; {share:.1%} of its "
            f"weights are zero, expected {recipe.prune.percent}%"
        )


def _retrained_(
    model: PreTrainedModel,
    recipe: Recipe,
    retrain: Retrain,
    batches: Sequence[Tensor],
    report: Report,
    retraining: Sequence[Tensor],
) -> PreTrainedModel:
    """Prune, train again, and quantize what is left, if the recipe says so."""
    if not retraining:
        raise ValueError(f"retrain: {recipe} needs data, and there is none; e.g. --text FILE")
    unfuse_experts_(model)
    if recipe.spec is not None:
        fitting_linears(model, recipe)
    dense = copy.deepcopy(model) if retrain.by != "loss" else None
    if not recipe.before.compresses:
        prune_(model, recipe.pruning, batches, report)
    made = retrain_(model, retrain, masks_of(model, recipe), retraining, dense)
    note = f"{retrain.groups}: {made.trained:,} of {made.parameters:,} parameters"
    if retrain.by == "loss":
        note += f", loss {made.losses[0]:.4g} to {made.losses[-1]:.4g}"
    report(LayerReport("retraining", None, "loss", made.seconds, note=note))
    return model if recipe.spec is None else quantize_(model, quantizing_alone(recipe), batches, report)


def quantizing_alone(recipe: Recipe) -> Recipe:
    """The second half of a recipe that prunes and quantizes: for a model whose zeros are there already, and stay."""
    calibration = recipe.calibration if recipe.method in CALIBRATED else None
    return replace_fields(recipe, prune=None, retrain=None, calibration=calibration)


def prune_(
    model: PreTrainedModel, recipe: Recipe, batches: Sequence[Tensor] = (), report: Report | None = None
) -> PreTrainedModel:
    """As compress_, for recipes that prune and do no more."""
    report = report or (lambda _: None)
    unfuse_experts_(model)
    layers = prunable_linears(model, recipe)
    embeddings: Any = model.get_input_embeddings()
    for name, module in layers:
        if module.weight is embeddings.weight:
            raise ValueError(f"{recipe}: {name}: its weight is also the input embedding, not to be pruned")
        if not finite(module.weight):
            raise ValueError(f"{recipe}: {name}: weight: contains NaN or infinity and cannot be pruned")
    if recipe.calibrated:
        check_unshared(model, layers, recipe)
        check_batches(recipe, batches, model)
    return _walk(model, recipe, layers, batches, report)


def quantize_(
    model: PreTrainedModel, recipe: Recipe, batches: Sequence[Tensor] = (), report: Report | None = None
) -> PreTrainedModel:
    """As compress_, for recipes that quantize."""
    if recipe.prune is not None and recipe.spec is None:
        raise ValueError(f"recipe: {recipe} prunes; a quantizer is needed, e.g. rtn-w4a16-g64")
    if not recipe.compresses:
        return model
    report = report or (lambda _: None)
    if recipe.method == "bnb":
        return bnb_(model, recipe, lambda name, error, seconds: report(LayerReport(name, error, "weights", seconds)))
    unfuse_experts_(model)
    layers = fitting_linears(model, recipe)
    if recipe.calibrated:
        check_batches(recipe, batches, model)
        if recipe.gate is not None:
            batches = one_by_one(batches, recipe.gate)
    if recipe.rotation is not None:
        start = time.perf_counter()
        made = _rotate(model, recipe, recipe.rotation, batches, [name for name, _ in layers])
        report(LayerReport("rotation", made.difference, "logits", time.perf_counter() - start, note=made.told()))
        layers = fitting_linears(model, recipe)
    check_unshared(model, layers, recipe)
    _check_finite(recipe, layers)
    for name, parameter in model.named_parameters():
        if not finite(parameter):
            raise ValueError(f"{recipe}: {name}: contains NaN or infinity")
    _walk(model, recipe, layers, batches, report)
    adopt_(prepack_(model), recipe)
    return model


def _walk(
    model: PreTrainedModel,
    recipe: Recipe,
    layers: Sequence[tuple[str, Linear]],
    batches: Sequence[Tensor],
    report: Report,
) -> PreTrainedModel:
    """Compress all these layers, in place."""
    blocks = block_names(model) if recipe.calibrated else []
    modules = dict(layers)
    cut = global_cut(layers, lambda name: weight_of(modules[name]), recipe)
    modules.clear()
    # Before the blocks: some models have such layers in front of them.
    for name, module in layers:
        if not within(name, blocks):
            report(round_(model, name, module, recipe, cut))
    if recipe.calibrated:
        _calibrate(model, recipe, batches, blocks, [name for name, _ in layers if within(name, blocks)], report, cut)
    return model


def _rotate(
    model: PreTrainedModel, recipe: Recipe, rotation: Rotation, batches: Sequence[Tensor], chosen: Sequence[str]
) -> Rotated:
    """chosen: the layers that will be quantized; only these can hold a rotation applied while the model runs."""
    from .cayley import learn_rotation_  # which walk over models that this module compresses
    from .rotation import hang_, online_layers, rotate_

    turned = [name for name in online_layers(model) if name in chosen] if rotation.online else []
    if rotation.online and not turned:
        raise ValueError("r_online: none of the layers it is for (down_proj, fc2) is quantized; leave it out")
    if rotation.kind == "learned":
        assert recipe.activation is not None
        # GPTQ makes up for the weights' rounding: what is left to learn is the activations'.
        spec = None if recipe.method == "gptq" else recipe.spec
        made = learn_rotation_(model, batches, spec, recipe.activation, seed=rotation.seed)
    else:
        made = rotate_(model, rotation, rotation.seed)
    hang_(model, turned, rotation.seed)
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


def round_(model: nn.Module, name: str, module: Linear, recipe: Recipe, cut: Cut | None = None) -> LayerReport:
    """Prune, quantize, or both, one layer without data, in place. cut: see prune.Cut."""
    start = time.perf_counter()
    if recipe.spec is None:
        pruned = prune_layer_(name, module, recipe, cut)
        notes = [_outside(recipe), pruned.note]
        seconds = time.perf_counter() - start
        return LayerReport(name, pruned.error, "weights", seconds, note=", ".join(filter(None, notes)))
    with torch.no_grad():
        weight = dense = weight_of(module)
        data_free = data_free_recipe(recipe)
        notes = [_outside(recipe)]
        if data_free.prune is not None:
            weight = pruned_weight(name, dense, data_free, data_free.prune, cut)
            notes.append(zeros_note(weight))
        q = quantize_weight(name, weight, data_free)
        error = relative_error(dense, q)
        replace(model, name, quant_linear(module, q, data_free.activation))
    note = ", ".join(filter(None, notes))
    bits = 16 if data_free.activation is None else data_free.activation.bits
    seconds = time.perf_counter() - start
    return LayerReport(name, error, "weights", seconds, note=note, input_bits=bits, bits=q.spec.bits)


@torch.no_grad()
def prune_layer_(name: str, module: Linear, recipe: Recipe, cut: Cut | None = None) -> Pruned:
    """Prune the layer called `name` without data, in place; the error is that of its weights."""
    assert recipe.prune is not None
    weight = weight_of(module)
    new = pruned_weight(name, weight, recipe, data_free_prune(recipe.prune), cut)
    size = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    off = float(torch.linalg.vector_norm(weight - new, dtype=torch.float64))
    put_weight_(module, new)
    return Pruned((off / size) ** 2 if size else 0.0, zeros_note(new))


def _outside(recipe: Recipe) -> str:
    """What a report says of a layer that a calibrated recipe has no data for."""
    quantizer = recipe.spec is not None and recipe.method not in DATA_FREE
    how = ["round to nearest"] if quantizer else []
    how += filter(None, ["" if recipe.prune is None else by_magnitude(recipe.prune)])
    return f"outside the decoder blocks: {', '.join(how)}" if how else ""


def with_rounding(report: LayerReport, rounding: Rounding) -> LayerReport:
    """What was settled about the layer's input, too."""
    note = ", ".join(filter(None, [report.note, rounding.note]))
    a = rounding.activation
    return replace_fields(report, note=note, input_error=rounding.error, input_bits=a.bits, input_static=not a.dynamic)


def data_free_recipe(recipe: Recipe) -> Recipe:
    """Round to nearest on the same grid, for layers of which a calibrated method sees no data."""
    if not recipe.calibrated:
        return recipe
    activation = None if recipe.activation is None else without_data(recipe.activation)
    prune = None if recipe.prune is None else data_free_prune(recipe.prune)
    method, options = recipe.method, recipe.options
    if method not in DATA_FREE:
        knobs = {name: value for name, value in vars(options).items() if name in ("scale", "clip")}
        method, options = "rtn", make_options("rtn", knobs)
    return Recipe(method, recipe.spec, recipe.ignore, prune, options, activation=activation, widths=recipe.widths)


def _calibrate(
    model: PreTrainedModel,
    recipe: Recipe,
    batches: Sequence[Tensor],
    blocks: list[str],
    chosen: Sequence[str],
    report: Report,
    cut: Cut | None = None,
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
            for layer in compress_block_(block, recipe, hidden, dense, cut):
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
def compress_block_(
    block: Block, recipe: Recipe, after: Hidden, dense_after: Hidden | None, cut: Cut | None = None
) -> list[LayerReport]:
    """Compress the linear layers of one block, in place, and put its outputs into `after` (which may be what it reads
    from), those of the dense path into `dense_after` (which may not). `block.linears` is empty then.

    cut: see prune.Cut.
    """
    start = time.perf_counter()
    _check_finite(recipe, ((f"{block.name}.{name}", module) for name, module in block.linears.items()))
    if dense_after is not None:
        for i in range(len(block)):
            dense_after.write(i, block.forward(i, dense=True))
    reports: list[LayerReport] = []
    if block.linears:
        try:
            passed, spread, note = through_gate(block, recipe, partial(_work_on_, cut=cut))
            found = _work_on_(block, passed, cut)
        except ValueError as error:
            raise ValueError(f"{recipe}: {block.name}: {error}") from None
        seconds = (time.perf_counter() - start) / len(found)
        for report in found:
            said = ", ".join(filter(None, [report.note, note]))
            reports.append(replace_fields(report, seconds=seconds, spread=spread, note=said))
    for i in range(len(block)):
        after.write(i, block.forward(i))
    return reports


def _work_on_(block: Block, recipe: Recipe, cut: Cut | None = None) -> list[LayerReport]:
    """Prune the block's linear layers, quantize them, or first the one and then the other; `block.linears` is empty
    then."""
    if recipe.prune is None:
        return _quantize_block_(block, recipe, solver(recipe.method)(block, recipe))
    if recipe.method == "gptq":
        # Both at once: it makes up for what is pruned too.
        return _quantize_block_(block, recipe, solver(recipe.method)(block, recipe, cut))
    pruned = prune_block_(block, recipe, cut)
    if recipe.spec is not None:
        made = _quantize_block_(block, recipe, solver(recipe.method)(block, recipe))
        last = len(block.name) + 1
        return [_after_pruning(report, pruned[report.name[last:]]) for report in made]
    block.linears.clear()
    return [
        LayerReport(
            f"{block.name}.{name}", p.error, "weights" if p.error is None else "outputs", 0.0, p.damp, note=p.note
        )
        for name, p in pruned.items()
    ]


def solver(method: str) -> Callable[..., dict[str, Solved]]:
    """What quantizes a block."""
    return _solve_data_free if method in DATA_FREE else import_module(f".{method}", __package__).solve


def _solve_data_free(block: Block, recipe: Recipe) -> dict[str, Solved]:
    """By a quantizer that needs no data, in a block that others have needed it for."""
    full = {name: f"{block.name}.{name}" for name in block.linears}
    q = {name: quantize_weight(full[name], weight_of(layer), recipe) for name, layer in block.linears.items()}
    errors = output_errors(block, q)
    return {name: Solved(q[name], errors.get(name)) for name in q}


def prune_block_(block: Block, recipe: Recipe, cut: Cut | None = None) -> dict[str, Pruned]:
    """Prune the linear layers of one block, in place."""
    assert recipe.prune is not None
    if recipe.prune.method in BLOCK_PRUNERS:
        found: dict[str, Pruned] = import_module(f".{recipe.prune.method}", __package__).prune_block_(
            block, recipe.prune
        )
        return found
    return {name: prune_layer_(f"{block.name}.{name}", layer, recipe, cut) for name, layer in block.linears.items()}


def _after_pruning(report: LayerReport, pruned: Pruned) -> LayerReport:
    """A report of rounding, with what pruning had done before it; its error is that of rounding alone."""
    lost = "" if pruned.error is None else f"error {pruned.error:.2g} by that alone"
    return replace_fields(report, note=", ".join(filter(None, [pruned.note, lost, report.note])))


def _quantize_block_(block: Block, recipe: Recipe, solved: dict[str, Solved]) -> list[LayerReport]:
    """Put packed layers in the place of the block's linear ones; `block.linears` is empty then."""
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
