"""The one walk over a model's linear layers: find them, compress them, put the packed ones in their place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .block import Linear
from .experts import routers
from .hqq import hqq
from .linear import QuantLinear
from .prune import PRUNERS as PRUNERS
from .prune import Cut, check_features, cut_of, prune
from .recipe import HEAD, Recipe
from .rtn import QTensor, rtn
from .spec import ActivationSpec, PruneSpec, QuantSpec, names

# Quantizers that need the weight alone; the calibrated ones are in sequential.py.
DATA_FREE: dict[str, Callable[[Tensor, QuantSpec, torch.dtype, Any], QTensor]] = {"rtn": rtn, "hqq": hqq}


def linears(model: nn.Module, ignore: tuple[str, ...]) -> Iterator[tuple[str, Linear]]:
    """Every linear layer by name (GPT-2 keeps its own as Conv1D), but those that `ignore` names.

    An entry of `ignore` is a full module name (with all that is inside), its last part, or `re:` and a regular
    expression for full names; "lm_head" is also the output head under another name. Raises ValueError for an entry that
    names nothing.
    """
    left = _ignored(model, ignore)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name not in left:
            yield name, module


def _ignored(model: nn.Module, ignore: tuple[str, ...]) -> set[str]:
    modules = [name for name, _ in model.named_modules() if name]
    left: set[str] = set()
    for pattern in ignore:
        # A model without a module of that name may have its head under another one.
        if pattern not in HEAD or any(names(pattern, name) for name in modules):
            chosen = meant("ignore", pattern, modules, type(model).__name__)
            left |= {name for name in modules if within(name, chosen)}
        if pattern in HEAD and isinstance(model, PreTrainedModel):
            head = model.get_output_embeddings()
            left |= {name for name, module in model.named_modules() if module is head}
    return left


def meant(field: str, pattern: str, among: Sequence[str], model: str) -> list[str]:
    """Those of the names that a pattern of the recipe's `field` means; ValueError when it is none of the `model`'s."""
    try:
        found = [name for name in among if names(pattern, name)]
    except re.error as error:
        raise ValueError(f"{field}: {pattern!r} is no regular expression: {error}") from None
    if not found:
        known = dict.fromkeys([*among, *(name.rpartition(".")[2] for name in among)])
        near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{field}: {pattern!r} names no module of {model}{hint}")
    return found


def within(name: str, places: Iterable[str]) -> bool:
    """Whether a module or tensor of this full name is one of `places`, or inside one."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def weight_of(module: Linear) -> Tensor:
    """[out features, in features], whichever way the module keeps it."""
    return module.weight.T.contiguous() if isinstance(module, Conv1D) else module.weight


def features(module: Linear) -> int:
    """K, of a weight [N, K]."""
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]


def storage_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a scale: the model's own if it has 16 bits, float16 for float32 models (8 bytes per group saved
    are worth more than bits that the codes cannot use)."""
    return weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float16


def prunable_linears(model: nn.Module, recipe: Recipe) -> list[tuple[str, Linear]]:
    """The layers that `recipe` prunes; those that send tokens to experts stay whole. ValueError when it prunes none."""
    left = routers(model)
    layers = [(name, module) for name, module in linears(model, recipe.ignore) if name not in left]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no linear layer to prune")
    _check_pattern(layers, recipe)
    return layers


def _check_pattern(layers: Sequence[tuple[str, Linear]], recipe: Recipe) -> None:
    if recipe.prune is None:
        return
    for name, module in layers:
        try:
            check_features(features(module), recipe.prune)
        except ValueError as error:
            raise ValueError(f"{recipe}: {name}: {error}") from None


def global_cut(layers: Iterable[tuple[str, Linear]], weights: Callable[[str], Tensor], recipe: Recipe) -> Cut | None:
    """Where `layers` are cut, for a recipe that compares the weights of all of them; else None.

    weights   the weight [N, K] of the layer of a name; asked for in three passes, and not kept
    """
    if recipe.prune is None:
        return None
    layers = list(layers)
    numbers = sum(module.weight.numel() for _, module in layers)
    wide = any(module.weight.dtype == torch.float64 for _, module in layers)
    dtype = torch.float64 if wide else torch.float32
    try:
        return cut_of(lambda: ((name, weights(name)) for name, _ in layers), numbers, dtype, recipe.prune)
    except ValueError as error:
        raise ValueError(f"{recipe}: {error}") from None


def data_free_prune(spec: PruneSpec) -> PruneSpec:
    """By magnitude, for layers of which a calibrated pruner sees no data: as many, compared as its own are."""
    if not spec.calibrated:
        return spec
    return PruneSpec(spec.sparsity, "magnitude", spec.pattern, None if spec.pattern else spec.compared)


@torch.no_grad()
def put_weight_(module: Linear, weight: Tensor) -> None:
    """`weight` [N, K] in the place of a layer's own, in its dtype, whichever way the module keeps it."""
    module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)


def fitting_linears(model: nn.Module, recipe: Recipe) -> list[tuple[str, Linear]]:
    """The layers that `recipe` quantizes (on the meta device too); those that send tokens to experts stay dense.

    Raises ValueError when it quantizes nothing, or a layer cannot take its groups.
    """
    if recipe.spec is None:
        raise ValueError(f"recipe: {recipe} quantizes nothing; a quantizer is needed, e.g. rtn-w4a16-g64")
    left = routers(model)
    layers = [(name, module) for name, module in linears(model, recipe.ignore) if name not in left]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no linear layer to quantize")
    for bits, patterns in recipe.widths:
        for pattern in patterns:
            meant(f"w{bits}", pattern, [name for name, _ in layers], f"{type(model).__name__}'s quantized layers")
    for name, module in layers:
        try:
            recipe.spec.groups(features(module))
        except ValueError as error:
            raise ValueError(f"{recipe}: {name}: {error}") from None
    _check_pattern(layers, recipe)
    return layers


def check_unshared(model: nn.Module, layers: Sequence[tuple[str, nn.Module]], recipe: Recipe) -> None:
    """ValueError when the weight of one of `layers` has a second place in the model (the input embedding, another
    layer): there it would stay as it was."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for name, module in layers:
        others = [place for place in places[id(module.weight)] if place != f"{name}.weight"]
        if others:
            raise ValueError(
                f"{recipe}: {name}: its weight is also {others[0]}, which would stay as it is; ignore the layer, or "
                "give the model weights of its own there"
            )


def quantize_weight(name: str, weight: Tensor, recipe: Recipe) -> QTensor:
    """Weight [N, K] of the layer called `name`, as `recipe` has it without data; ValueError names recipe and layer."""
    try:
        return DATA_FREE[recipe.method](weight, recipe.spec_of(name), storage_dtype(weight), recipe.options)
    except ValueError as error:
        raise ValueError(f"{recipe}: {name}: {error}") from None


def compressed_weight(name: str, weight: Tensor, recipe: Recipe, cut: Cut | None = None) -> Tensor:
    """The weight [N, K] of the layer called `name` as the compressed layer multiplies with it: pruned, then dequantized
    in float32, where the recipe has that; else in its own dtype. cut: see prune.Cut.

    ValueError names recipe and layer; also for a pruner that needs data, or, without `cut`, the whole model.
    """
    if recipe.method == "bnb":
        from .bnb import dequantized_weight, quantized_layer  # which walks

        return dequantized_weight(quantized_layer(weight, None, recipe.options))
    if recipe.prune is not None:
        weight = pruned_weight(name, weight, recipe, recipe.prune, cut)
    return weight if recipe.spec is None else quantize_weight(name, weight, recipe).dequantize()


def pruned_weight(name: str, weight: Tensor, recipe: Recipe, spec: PruneSpec, cut: Cut | None = None) -> Tensor:
    """The weight [N, K] of the layer called `name`, pruned without data; ValueError names recipe and layer."""
    try:
        if spec.calibrated:
            raise ValueError(f"{spec.method} needs data")
        return prune(name, weight, spec, cut=cut)
    except ValueError as error:
        raise ValueError(f"{recipe}: {name}: {error}") from None


def quant_linear(
    module: Linear,
    q: QTensor,
    activation: ActivationSpec | None = None,
    static: tuple[Tensor, Tensor] | None = None,
    transform: nn.Module | None = None,
) -> QuantLinear:
    """The packed layer that stands for `module`; `activation`, `static`, `transform`: what becomes of its input (see
    QuantLinear). A transform that hangs on `module` itself (see rotation.py) goes with it."""
    layer = QuantLinear.from_qtensor(q, module.bias, activation, static)
    layer.transform = getattr(module, "transform", None) if transform is None else transform
    layer.replaces = type(module).__name__
    return layer


def dequantize_(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every QuantLinear by an nn.Linear with the weights that it stood for, in place: they can be trained.

    In the model's own dtype: exact in float32; code times scale takes more digits than 16 bits have.
    """
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    for name, layer in packed:
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.dequantized().to(model.dtype))
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach().to(model.dtype, copy=True))
        replace(model, name, linear)
    quantizer = getattr(model, "hf_quantizer", None)
    if packed and quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module called `name` is, with the hooks that hang on it (an adapter kept apart is one)."""
    parent, _, leaf = name.rpartition(".")
    holder = model.get_submodule(parent)
    for hook in getattr(holder, leaf)._forward_hooks.values():
        new.register_forward_hook(hook)
    setattr(holder, leaf, new)
