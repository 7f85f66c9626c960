"""compressed-tensors `pack-quantized`: what transformers and vLLM load.

Per linear layer, beside an unchanged `bias`:
  weight_packed  int32 [N, ceil(K*bits/32)], element i of a row at bit i*bits, LSB first, stored code = q + 2^(bits-1)
  weight_scale   [N, K/G] ([N, 1] per channel)
  weight_shape   int64 [2] = (N, K)
  weight_zero_point   int32 [ceil(N*bits/32), K/G], packed along N; asymmetric formats only, as readers reject one in
                 symmetric files. (compressed-tensors 0.19 and 0.20 read it with dequantize=True alone.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.ops import pack, unpack
from ..linear import QuantLinear
from ..spec import BITS, QuantSpec, Recipe

METHOD = "compressed-tensors"
# Since 0.19 widths that do not divide 32 are a dense bit stream; before, they were padded under the same config.
LAYOUT_VERSION = "0.19.0"


def pack_state(name: str, layer: QuantLinear) -> dict[str, Tensor]:
    """The file's tensors for the layer called `name`."""
    state = {
        f"{name}.weight_packed": layer.packed.view(torch.int32),
        f"{name}.weight_scale": layer.scale,
        f"{name}.weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }
    if layer.zero is not None:
        state[f"{name}.weight_zero_point"] = pack(layer.zero.T, layer.spec.bits).view(torch.int32).T
    if layer.bias is not None:
        state[f"{name}.bias"] = layer.bias
    return state


def unpack_layer(name: str, state: dict[str, Tensor], spec: QuantSpec) -> QuantLinear:
    """The layer called `name`; takes its tensors out of `state`. Raises ValueError when one is missing or misshapen."""
    tensors = {}
    keys = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    for key in keys[:3] if spec.symmetric else keys:
        if f"{name}.{key}" not in state:
            raise ValueError(f"{name}.{key}: missing from the checkpoint")
        tensors[key] = state.pop(f"{name}.{key}")
    N, K = (int(n) for n in tensors["weight_shape"])
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    groups = spec.groups(K)
    shapes = {
        "weight_packed": (N, -(-K * spec.bits // 32)),
        "weight_scale": (N, groups),
        "weight_zero_point": (-(-N * spec.bits // 32), groups),
    }
    for key, shape in shapes.items():
        if key not in tensors:
            continue
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"{name}.{key}: shape {tuple(tensors[key].shape)}, expected {shape} for {spec}")
        if key != "weight_scale" and tensors[key].dtype != torch.int32:
            raise ValueError(f"{name}.{key}: dtype {tensors[key].dtype}, expected torch.int32")
    zero = None
    if not spec.symmetric:
        # Of a single row .contiguous() keeps the strides, which the view cannot take.
        words = tensors["weight_zero_point"].T.clone(memory_format=torch.contiguous_format)  # [K/G, ceil(N*bits/32)]
        zero = unpack(words.view(torch.uint8), spec.bits, N).T.contiguous()
    return QuantLinear(spec, K, packed.contiguous().view(torch.uint8), scale, state.pop(f"{name}.bias", None), zero)


def to_config(recipe: Recipe, dense: Sequence[str] = ()) -> dict[str, Any]:
    """The `quantization_config` entry of config.json; `dense`: names of the linear layers that are not quantized."""
    assert recipe.spec is not None
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": LAYOUT_VERSION,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": recipe.spec.bits,
                    "type": "int",
                    "symmetric": recipe.spec.symmetric,
                    "strategy": recipe.spec.granularity,
                    "group_size": recipe.spec.group_size,
                    "dynamic": False,
                    "actorder": None,
                },
            }
        },
    }


def from_config(config: dict[str, Any]) -> QuantSpec:
    """The format that a `quantization_config` describes; ValueError names the first thing we do not read."""

    def demand(field: str, value: object, *allowed: object) -> None:
        if value not in allowed:
            raise ValueError(
                f"quantization_config.{field}: {value!r} is not supported here; "
                f"expected {' or '.join(map(repr, allowed))}"
            )

    demand("quant_method", config.get("quant_method"), METHOD)
    demand("format", config.get("format"), "pack-quantized")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError("quantization_config.config_groups: expected an object of objects")
    demand("config_groups (number)", len(groups), 1)
    (group,) = groups.values()
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise ValueError("quantization_config.weights: expected an object")
    demand("input_activations", group.get("input_activations"), None)
    demand("transform_config", config.get("transform_config") or {}, {})
    demand("weights.type", weights.get("type"), "int")
    demand("weights.symmetric", weights.get("symmetric"), True, False)
    demand("weights.strategy", weights.get("strategy"), "group", "channel")
    demand("weights.actorder", weights.get("actorder"), None, "static")
    demand("weights.num_bits", weights.get("num_bits"), *BITS)
    bits = weights["num_bits"]
    version = str(config.get("version") or "0").split(".")[:2]
    if 32 % bits and [int(part) for part in version if part.isdigit()] < [0, 19]:
        raise ValueError(
            f"quantization_config.version: {config.get('version')!r} stores {bits}-bit codes in another layout; "
            f"expected {LAYOUT_VERSION} or newer"
        )
    return QuantSpec(bits, weights.get("group_size") if weights["strategy"] == "group" else None, weights["symmetric"])
