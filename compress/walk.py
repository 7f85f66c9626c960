"""The one walk over a model's linear layers: find them, compress them, put the packed ones in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .linear import QuantLinear
from .prune import magnitude
from .rtn import QTensor, rtn
from .spec import PruneSpec, QuantSpec, Recipe

Quantizer = Callable[[Tensor, QuantSpec, torch.dtype], QTensor]
METHODS: dict[str, Quantizer] = {"rtn": rtn}
Pruner = Callable[[Tensor, PruneSpec], Tensor]
PRUNERS: dict[str, Pruner] = {"magnitude": magnitude}


def linears(model: nn.Module, ignore: tuple[str, ...]) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Every linear layer by name (GPT-2 keeps its own as Conv1D), but those named in `ignore`.

    An entry of `ignore` is a full module name or its last part ("lm_head").
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name not in ignore and name.split(".")[-1] not in ignore:
            yield name, module


def weight_of(module: nn.Linear | Conv1D) -> Tensor:
    """[out features, in features], whichever way the module keeps it."""
    return module.weight.T.contiguous() if isinstance(module, Conv1D) else module.weight


def storage_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a scale: the model's own if it has 16 bits, float16 for float32 models (8 bytes per group saved
    are worth more than bits that the codes cannot use)."""
    return weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float16


def compress_(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Do to every linear layer that the recipe does not ignore what the recipe says, in place: prune or quantize.

    Raises ValueError, before anything is changed, when the model cannot take it.
    """
    return prune_(model, recipe) if recipe.prune is not None else quantize_(model, recipe)


def prune_(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Set to zero, in place, what `recipe` takes from every linear layer that it does not ignore.

    Raises ValueError, before anything is changed, for weights that are not finite or also the input embedding.
    """
    layers = list(linears(model, recipe.ignore))
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no linear layer to prune")
    embeddings = model.get_input_embeddings().weight
    for name, module in layers:
        if module.weight is embeddings:
            raise ValueError(f"{recipe}: {name}: its weight is also the input embedding, not to be pruned")
        if not torch.isfinite(module.weight).all():
            raise ValueError(f"{recipe}: {name}: weight: contains NaN or infinity and cannot be pruned")
    with torch.no_grad():
        for name, module in layers:
            new = compressed_weight(name, weight_of(module), recipe)
            module.weight.copy_(new.T if isinstance(module, Conv1D) else new)
    return model


def quantize_(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Replace every linear layer that the recipe does not ignore by a QuantLinear, in place.

    Raises ValueError, before anything is replaced, when a layer cannot take the format.
    """
    if recipe.prune is not None:
        raise ValueError(f"recipe: {recipe} prunes; a quantizer is needed, e.g. rtn-w4a16-g64")
    if recipe.spec is None:
        return model
    for name, module in fitting_linears(model, recipe):
        with torch.no_grad():
            layer = QuantLinear.from_qtensor(quantize_weight(name, weight_of(module), recipe), module.bias)
            layer.replaces = type(module).__name__
            replace(model, name, layer)
    return model


def fitting_linears(model: nn.Module, recipe: Recipe) -> list[tuple[str, nn.Linear | Conv1D]]:
    """The layers that `recipe` quantizes; ValueError when it quantizes nothing, or a layer cannot take its groups."""
    if recipe.spec is None:
        raise ValueError(f"recipe: {recipe} quantizes nothing; a quantizer is needed, e.g. rtn-w4a16-g64")
    layers = list(linears(model, recipe.ignore))
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no linear layer to quantize")
    for name, module in layers:
        try:
            recipe.spec.groups(weight_of(module).shape[1])
        except ValueError as error:
            raise ValueError(f"{recipe}: {name}: {error}") from None
    return layers


def quantize_weight(name: str, weight: Tensor, recipe: Recipe) -> QTensor:
    """The weight [N, K] of the layer called `name`, as `recipe` has it; ValueError names recipe and layer."""
    assert recipe.spec is not None
    try:
        return METHODS[recipe.method](weight, recipe.spec, storage_dtype(weight))
    except ValueError as error:
        raise ValueError(f"{recipe}: {name}: {error}") from None


def compressed_weight(name: str, weight: Tensor, recipe: Recipe) -> Tensor:
    """The weight [N, K] of the layer called `name` as the compressed layer multiplies with it: dequantized in float32,
    pruned in its own dtype, or as it is under the dense recipe. ValueError names recipe and layer."""
    if recipe.prune is None:
        return weight if recipe.spec is None else quantize_weight(name, weight, recipe).dequantize()
    try:
        return PRUNERS[recipe.method](weight, recipe.prune)
    except ValueError as error:
        raise ValueError(f"{recipe}: {name}: {error}") from None


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
    return model


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module called `name` is, with the hooks that hang on it (an adapter kept apart is one)."""
    parent, _, leaf = name.rpartition(".")
    holder = model.get_submodule(parent)
    for hook in getattr(holder, leaf)._forward_hooks.values():
        new.register_forward_hook(hook)
    setattr(holder, leaf, new)
