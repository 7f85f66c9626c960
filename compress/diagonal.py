"""Takes the diagonal out of FlatQuant's maps, into what feeds the layers that have it.

A layer with x' = (x / s) P (kronecker.py) reads x as it is once whatever puts x out puts out x / s. What does is a norm
(its gain and bias divided by s), or an earlier linear layer with nothing but channel-wise linear operations between:
values pass attention as they are, what `up` gives is only multiplied by a gate, and relu(z / s) = relu(z) / s where s
is above 0. A row of integers is divided by dividing its scale, so no code changes and nothing is rounded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .kronecker import Kronecker
from .linear import QuantLinear

# What feeds which layers, by their names in a decoder block. All readers of an output are there: one that were missing
# would read what is divided.
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = {
    "input_layernorm": _QKV,
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
_OPT = {
    "self_attn_layer_norm": _QKV,
    "self_attn.v_proj": ("self_attn.out_proj",),
    "final_layer_norm": ("fc1",),
    "fc1": ("fc2",),
}
FEEDERS = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "opt": _OPT}


def divisors(model: Any, layers: Mapping[str, QuantLinear]) -> dict[str, Tensor]:
    """Name of a module -> [its outputs] float32, by which they are to be divided; no diagonal is left then.

    ValueError for a diagonal that cannot be taken out exactly: nothing known feeds the layer, layers with one input
    have different ones, or heads that share their values do.
    """
    diagonals = {name: found for name, layer in layers.items() if (found := _diagonal(layer)) is not None}
    by: dict[str, Tensor] = {}
    for name, diagonal in diagonals.items():
        feeder, readers = _fed_by(model, name)
        for reader in readers:
            other = diagonals.get(reader)
            if other is None or not torch.equal(other, diagonal):
                raise ValueError(
                    f"{name}: its map has a diagonal that {reader}, with the same input, has not; expected equal ones"
                )
        by[feeder] = _per_output(model, feeder, name, diagonal)
    return by


def divided(tensor: Tensor, by: Tensor) -> Tensor:
    """The tensor [N, ...] with its rows divided by `by` [N], computed in float32 or wider, in its own dtype."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    shape = (-1, *[1] * (tensor.dim() - 1))
    return (tensor.to(wide) / by.to(tensor.device, wide).view(shape)).to(tensor.dtype)


def _diagonal(layer: QuantLinear) -> Any:
    """[K] float32; None: all ones, or there is no map."""
    transform = layer.transform
    return transform.scale if isinstance(transform, Kronecker) and bool((transform.scale != 1).any()) else None


def _fed_by(model: Any, name: str) -> tuple[str, list[str]]:
    """What feeds the layer, and all that it feeds."""
    for feeder, readers in _table(model).items():
        for reader in readers:
            if name.endswith(f".{reader}"):
                block = name.removesuffix(reader)
                return block + feeder, [block + each for each in readers]
    raise ValueError(
        f"{name}: its map has a diagonal, and nothing is known to feed this layer of {type(model).__name__} that could "
        f"take it; expected a map without one"
    )


def _table(model: Any) -> dict[str, tuple[str, ...]]:
    """As in FEEDERS, without what this model's configuration makes inexact."""
    table = dict(FEEDERS.get(model.config.model_type, {}))
    if model.config.model_type == "opt":
        if not model.config.do_layer_norm_before:  # what the norms put out is the residual stream
            del table["self_attn_layer_norm"], table["final_layer_norm"]
        if model.config.activation_function != "relu":
            del table["fc1"]
    return table


def _per_output(model: Any, feeder: str, name: str, diagonal: Tensor) -> Tensor:
    """[outputs of `feeder`]: under grouped queries several heads' inputs come from one head of values."""
    outputs = _outputs(model.get_submodule(feeder))
    if outputs == len(diagonal):
        return diagonal
    size = len(diagonal) // model.config.num_attention_heads
    groups = diagonal.view(outputs // size, -1, size)  # [heads of values, heads that share one, channels]
    if not torch.equal(groups, groups[:, :1].expand_as(groups)):
        raise ValueError(
            f"{name}: its map has a diagonal that differs between heads which share the values of {feeder}; expected "
            f"equal ones: leave the layer out of the recipe, ignore=lm_head|{name.rpartition('.')[2]}"
        )
    return groups[:, 0].flatten()


def _outputs(module: nn.Module) -> int:
    return module.out_features if isinstance(module, QuantLinear) else len(module.get_parameter("weight"))
