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
from .experts import routers, unfuse_experts_
from .hqq import hqq
from .linear import QuantLinear
from .prune import magnitude
from .rtn import QTensor, finite, rtn
from .spec import HEAD, ActivationSpec, PruneSpec, QuantSpec, Recipe

# Quantizers that need the weight alone; the calibrated ones are in sequential.py.
DATA_FREE: dict[str, Callable[[Tensor, QuantSpec, torch.dtype, Any], QTensor]] = {"rtn": rtn, "hqq": hqq}
Pruner = Callable[[Tensor, PruneSpec], Tensor]
PRUNERS: dict[str, Pruner] = {"magnitude": magnitude}


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
    names = [name for name, _ in model.named_modules() if name]
    left: set[str] = set()
    for pattern in ignore:
        if pattern.startswith("re:"):
            try:
                found = [name for name in names if re.fullmatch(pattern[3:], name)]
            except re.error as error:
                raise ValueError(f"ignore: {pattern!r} is no regular expression: {error}") from None
        else:
            found = [name for name in names if within(name, [pattern]) or name.rpartition(".")[2] == pattern]
        if not found and pattern not in HEAD:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"ignore: {pattern!r} names no module of {type(model).__name__}{hint}")
        left |= {name for name in names if within(name, found)}
        if pattern in HEAD and isinstance(model, PreTrainedModel):
            head = model.get_output_embeddings()
            left |= {name for name, module in model.named_modules() if module is head}
    return left


def within(name: str, places: Iterable[str]) -> bool:
    """Whether a module or tensor of this full name is one of `places`, or inside one."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def weight_of(module: Linear) -> Tensor:
    """[out features, in features], whichever way the module keeps it."""
    return module.weight.T.contiguous() if isinstance(module, Conv1D) else module.weight


def storage_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a scale: the model's own if it has 16 bits, float16 for float32 models (8 bytes per group saved
    are worth more than bits that the codes cannot use)."""
    return weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float16


def prune_(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Set to zero, in place, what `recipe` takes from every linear layer that it does not ignore.

    Raises ValueError, before anything is changed, for weights that are not finite or also the input embedding.
    """
    unfuse_experts_(model)
    layers = prunable_linears(model, recipe)
    embeddings = model.get_input_embeddings().weight
    for name, module in layers:
        if module.weight is embeddings:
            raise ValueError(f"{recipe}: {name}: its weight is also the input embedding, not to be pruned")
        if not finite(module.weight):
            raise ValueError(f"{recipe}: {name}: weight: contains NaN or infinity and cannot be pruned")
    for name, module in layers:
        prune_layer_(name, module, recipe)
    return model


def prunable_linears(model: nn.Module, recipe: Recipe) -> list[tuple[str, Linear]]:
    """The layers that `recipe` prunes; those that send tokens to experts stay whole. ValueError when it prunes none."""
    left = routers(model)
    layers = [(name, module) for name, module in linears(model, recipe.ignore) if name not in left]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no linear layer to prune")
    return layers


@torch.no_grad()
def prune_layer_(name: str, module: Linear, recipe: Recipe) -> None:
    """Set to zero, in place, what `recipe` takes from one layer."""
    new = compressed_weight(name, weight_of(module), recipe)
    module.weight.copy_(new.T if isinstance(module, Conv1D) else new)


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
    for name, module in layers:
        try:
            recipe.spec.groups(module.weight.shape[0 if isinstance(module, Conv1D) else 1])
        except ValueError as error:
            raise ValueError(f"{recipe}: {name}: {error}") from None
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
    assert recipe.spec is not None
    try:
        return DATA_FREE[recipe.method](weight, recipe.spec, storage_dtype(weight), recipe.options)
    except ValueError as error:
        raise ValueError(f"{recipe}: {name}: {error}") from None


def compressed_weight(name: str, weight: Tensor, recipe: Recipe) -> Tensor:
    """The weight [N, K] of the layer called `name` as the compressed layer multiplies with it: dequantized in float32,
    pruned in its own dtype, or as it is under the dense recipe. ValueError names recipe and layer."""
    if recipe.method == "bnb":
        from .bnb import dequantized_weight, quantized_layer  # which walks

        return dequantized_weight(quantized_layer(weight, None, recipe.options))
    if recipe.prune is None:
        return weight if recipe.spec is None else quantize_weight(name, weight, recipe).dequantize()
    try:
        return PRUNERS[recipe.method](weight, recipe.prune)
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
