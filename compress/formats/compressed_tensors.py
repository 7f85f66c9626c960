"""compressed-tensors `pack-quantized`: what transformers and vLLM load.

Per linear layer, beside an unchanged `bias`:
  weight_packed  int32 [N, ceil(K*bits/32)], element i of a row at bit i*bits, LSB first, stored code = q + 2^(bits-1)
  weight_scale   [N, K/G] ([N, 1] per channel)
  weight_shape   int64 [2] = (N, K)
No zero point is written: the format is symmetric, and readers reject a zero point there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    if layer.bias is not None:
        state[f"{name}.bias"] = layer.bias
    return state


def unpack_layer(name: str, state: dict[str, Tensor], spec: QuantSpec) -> QuantLinear:
    """The layer called `name`; takes its tensors out of `state`. Raises ValueError when one is missing or misshapen."""
    tensors = {}
    for key in ("weight_packed", "weight_scale", "weight_shape"):
        if f"{name}.{key}" not in state:
            raise ValueError(f"{name}.{key}: missing from the checkpoint")
        tensors[key] = state.pop(f"{name}.{key}")
    N, K = (int(n) for n in tensors["weight_shape"])
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    words = -(-K * spec.bits // 32)
    for key, tensor, shape in (
        ("weight_packed", packed, (N, words)),
        ("weight_scale", scale, (N, spec.groups(K))),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}.{key}: shape {tuple(tensor.shape)}, expected {shape} for {spec}")
    if packed.dtype != torch.int32:
        raise ValueError(f"{name}.weight_packed: dtype {packed.dtype}, expected torch.int32")
    return QuantLinear(spec, K, packed.contiguous().view(torch.uint8), scale, state.pop(f"{name}.bias", None))


def to_config(recipe: Recipe) -> dict[str, Any]:
    """The `quantization_config` entry of config.json."""
    assert recipe.spec is not None
    per_channel = recipe.spec.group_size is None
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(recipe.ignore),
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
                    "symmetric": True,
                    "strategy": "channel" if per_channel else "group",
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
    demand("weights.symmetric", weights.get("symmetric"), True)
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
    return QuantSpec(bits, weights.get("group_size") if weights["strategy"] == "group" else None)
