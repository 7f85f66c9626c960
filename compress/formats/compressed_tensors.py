"""compressed-tensors `pack-quantized` and `int-quantized`: what transformers and vLLM load.

Per linear layer, beside an unchanged `bias`:
  weight_packed  int32 [N, ceil(K*bits/32)], element i of a row at bit i*bits, LSB first, stored code = q + 2^(bits-1)
  weight_scale   [N, K/G] ([N, 1] per channel)
  weight_shape   int64 [2] = (N, K)
  weight_zero_point   int32 [ceil(N*bits/32), K/G], packed along N; asymmetric formats only, as readers reject one in
                 symmetric files. (compressed-tensors 0.19 and 0.20 read it with dequantize=True alone.)
With 8-bit weights and rounded activations (int-quantized) instead:
  weight         int8 [N, K], q = code - 128;  weight_scale as above;  weight_zero_point int8 [N, K/G]
With static activations:
  input_scale [1] float32, input_zero_point [1] int8 (asymmetric only)
And, ours alone, so that it goes with files that stock readers do not find:
  input_clip  [1] float32, the share of a token's range that its grid covers, where that is not all
  in the config, "symmetric": "narrow" of input_activations, where a token's grid is (spec.ActivationSpec)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.ops import pack, unpack
from ..linear import QuantLinear
from ..spec import ACTIVATION_BITS, BITS, ActivationSpec, QuantSpec

METHOD = "compressed-tensors"
# Since 0.19 widths that do not divide 32 are a dense bit stream; before, they were padded under the same config.
LAYOUT_VERSION = "0.19.0"
PACKED, INTEGER = "pack-quantized", "int-quantized"
# A name in the file that ends in one of these is of a packed layer.
_OF_LAYERS = (".weight_packed", ".weight_scale")


@dataclass(frozen=True)
class Scheme:
    """How one layer is stored."""

    spec: QuantSpec
    activation: ActivationSpec | None = None

    @property
    def format(self) -> str:
        return INTEGER if self.spec.bits == 8 and self.activation is not None else PACKED

    def parts(self, clipped: bool) -> list[str]:
        """Names of the file's tensors for a layer, its bias apart."""
        names = (
            ["weight", "weight_scale"] if self.format == INTEGER else ["weight_packed", "weight_scale", "weight_shape"]
        )
        if not self.spec.symmetric:
            names.append("weight_zero_point")
        if self.activation is not None and not self.activation.dynamic:
            names.append("input_scale")
            if not self.activation.symmetric:
                names.append("input_zero_point")
        return [*names, "input_clip"] if clipped else names


def layers_in(names: Iterable[str]) -> list[str]:
    """Names of the packed layers that tensors of these names belong to, in their order."""
    found = (name.removesuffix(end) for name in names for end in _OF_LAYERS if name.endswith(end))
    return list(dict.fromkeys(found))


def scheme_of(layer: QuantLinear) -> Scheme:
    """Of a packed layer; the clip of its activations is a tensor of its own."""
    a = layer.activation
    return Scheme(layer.spec, None if a is None else replace(a, clip=1.0, search=False, fallback=None))


def pack_state(name: str, layer: QuantLinear) -> dict[str, Tensor]:
    """The file's tensors for the layer called `name`."""
    scheme = scheme_of(layer)
    state = {f"{name}.weight_scale": layer.scale}
    if scheme.format == INTEGER:
        state[f"{name}.weight"] = _signed(layer.codes())
        if layer.zero is not None:
            state[f"{name}.weight_zero_point"] = _signed(layer.zero)
    else:
        state[f"{name}.weight_packed"] = layer.packed.view(torch.int32)
        state[f"{name}.weight_shape"] = torch.tensor([layer.out_features, layer.in_features])
        if layer.zero is not None:
            state[f"{name}.weight_zero_point"] = pack(layer.zero.T, layer.spec.bits).view(torch.int32).T
    if layer.x_scale is not None and layer.x_zero is not None:
        state[f"{name}.input_scale"] = layer.x_scale
        if scheme.activation is not None and not scheme.activation.symmetric:
            state[f"{name}.input_zero_point"] = layer.x_zero.to(torch.int8)
    if layer.activation is not None and layer.activation.clip != 1:
        state[f"{name}.input_clip"] = torch.tensor([layer.activation.clip], dtype=torch.float32)
    if layer.bias is not None:
        state[f"{name}.bias"] = layer.bias
    return state


def _signed(codes: Tensor) -> Tensor:
    """Codes 0 .. 255 uint8 as -128 .. 127 int8."""
    return (codes.to(torch.int16) - 128).to(torch.int8)


def unpack_layer(name: str, state: dict[str, Tensor], scheme: Scheme) -> QuantLinear:
    """The layer called `name`; takes its tensors out of `state`. Raises ValueError when one is missing or misshapen."""
    spec, activation = scheme.spec, scheme.activation
    found: dict[str, Tensor] = {}
    for key in scheme.parts(f"{name}.input_clip" in state):
        if f"{name}.{key}" not in state:
            raise ValueError(f"{name}.{key}: missing from the checkpoint")
        found[key] = state.pop(f"{name}.{key}")

    def demand(key: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        if key in found and tuple(found[key].shape) != shape:
            raise ValueError(f"{name}.{key}: shape {tuple(found[key].shape)}, expected {shape} for {spec}")
        if key in found and dtype is not None and found[key].dtype != dtype:
            raise ValueError(f"{name}.{key}: dtype {found[key].dtype}, expected {dtype}")

    zero = None
    if scheme.format == INTEGER:
        weight = found["weight"]
        N, K = weight.shape if weight.dim() == 2 else (0, 0)
        demand("weight", (N, K), torch.int8)
        demand("weight_zero_point", (N, spec.groups(K)), torch.int8)
        packed = pack((weight.to(torch.int16) + 128).to(torch.uint8), spec.bits)
        if not spec.symmetric:
            zero = (found["weight_zero_point"].to(torch.int16) + 128).to(torch.uint8)
    else:
        N, K = (int(n) for n in found["weight_shape"])
        demand("weight_packed", (N, -(-K * spec.bits // 32)), torch.int32)
        demand("weight_zero_point", (-(-N * spec.bits // 32), spec.groups(K)), torch.int32)
        packed = found["weight_packed"].contiguous().view(torch.uint8)
        if not spec.symmetric:
            # Of a single row .contiguous() keeps the strides, which the view cannot take.
            words = found["weight_zero_point"].T.clone(memory_format=torch.contiguous_format)  # [K/G, ceil(N*bits/32)]
            zero = unpack(words.view(torch.uint8), spec.bits, N).T.contiguous()
    demand("weight_scale", (N, spec.groups(K)))
    for key, dtype in (("input_scale", None), ("input_zero_point", torch.int8), ("input_clip", torch.float32)):
        demand(key, (1,), dtype)
    static = None
    if activation is not None:
        if "input_clip" in found:
            activation = replace(activation, clip=float(found["input_clip"]))
        if not activation.dynamic:
            shift = found.get("input_zero_point", torch.zeros(1, device=packed.device))
            static = (found["input_scale"].float(), shift.to(torch.int32))
    bias = state.pop(f"{name}.bias", None)
    return QuantLinear(spec, K, packed, found["weight_scale"], bias, zero, activation, static)


def to_config(schemes: Mapping[str, Scheme], dense: Sequence[str] = ()) -> dict[str, Any]:
    """The `quantization_config` entry of config.json.

    schemes   of every quantized layer, by name;  dense: names of the linear layers that are not quantized
    """
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    formats = {scheme.format for scheme in groups}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": list(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": LAYOUT_VERSION,
        "config_groups": {
            f"group_{i}": _group(scheme, ["Linear"] if len(groups) == 1 else names)
            for i, (scheme, names) in enumerate(groups.items())
        },
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    spec, a = scheme.spec, scheme.activation
    return {
        "targets": targets,
        "format": scheme.format,
        "input_activations": None
        if a is None
        else {
            "num_bits": a.bits,
            "type": "int",
            # A value of this field, not a field of its own, which readers who do not know it would pass over.
            "symmetric": "narrow" if a.narrow else a.symmetric,
            "strategy": "token" if a.dynamic else "tensor",
            "dynamic": a.dynamic,
        },
        "output_activations": None,
        "weights": {
            "num_bits": spec.bits,
            "type": "int",
            "symmetric": spec.symmetric,
            "strategy": spec.granularity,
            "group_size": spec.group_size,
            "dynamic": False,
            "actorder": None,
        },
    }


class Schemes:
    """What a `quantization_config` says of every layer; ValueError names the first thing we do not read."""

    def __init__(self, config: dict[str, Any]) -> None:
        _demand("quant_method", config.get("quant_method"), METHOD)
        _demand("format", config.get("format"), PACKED, INTEGER, "mixed-precision")
        _demand("transform_config", config.get("transform_config") or {}, {})
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
            raise ValueError("quantization_config.config_groups: expected an object of objects, at least one")
        self.groups = [(_targets(group), _scheme(group, config)) for group in groups.values()]
        if config["format"] != "mixed-precision":
            _demand("format", config["format"], *{scheme.format for _, scheme in self.groups}, "mixed-precision")

    def of(self, name: str) -> Scheme:
        """Of the linear layer called `name`: that of the first group that names it, else of the one for all."""
        for targets, scheme in self.groups:
            if any(_names(target, name) for target in targets):
                return scheme
        for targets, scheme in self.groups:
            if "Linear" in targets:
                return scheme
        raise ValueError(f"{name}: no group of quantization_config.config_groups has it among its targets")


def _demand(field: str, value: object, *allowed: object) -> None:
    if value not in allowed:
        raise ValueError(
            f"quantization_config.{field}: {value!r} is not supported here; expected {' or '.join(map(repr, allowed))}"
        )


def _targets(group: dict[str, Any]) -> Iterable[str]:
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"quantization_config.targets: {targets!r} is not a list of names")
    return targets


def _names(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _scheme(group: dict[str, Any], config: dict[str, Any]) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise ValueError("quantization_config.weights: expected an object")
    _demand("weights.type", weights.get("type"), "int")
    _demand("weights.symmetric", weights.get("symmetric"), True, False)
    _demand("weights.strategy", weights.get("strategy"), "group", "channel")
    _demand("weights.actorder", weights.get("actorder"), None, "static")
    _demand("weights.num_bits", weights.get("num_bits"), *BITS)
    bits = weights["num_bits"]
    version = str(config.get("version") or "0").split(".")[:2]
    if 32 % bits and [int(part) for part in version if part.isdigit()] < [0, 19]:
        raise ValueError(
            f"quantization_config.version: {config.get('version')!r} stores {bits}-bit codes in another layout; "
            f"expected {LAYOUT_VERSION} or newer"
        )
    spec = QuantSpec(bits, weights.get("group_size") if weights["strategy"] == "group" else None, weights["symmetric"])
    scheme = Scheme(spec, _activation(group.get("input_activations")))
    _demand("format", group.get("format") or config["format"], scheme.format)
    return scheme


def _activation(given: object) -> ActivationSpec | None:
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError("quantization_config.input_activations: expected an object")
    _demand("input_activations.type", given.get("type"), "int")
    _demand("input_activations.num_bits", given.get("num_bits"), *ACTIVATION_BITS)
    _demand("input_activations.symmetric", given.get("symmetric"), True, False, "narrow")
    _demand("input_activations.dynamic", given.get("dynamic"), True, False)
    _demand("input_activations.strategy", given.get("strategy"), "token" if given["dynamic"] else "tensor")
    narrow = given["symmetric"] == "narrow"
    return ActivationSpec(given["num_bits"], bool(given["symmetric"]), given["dynamic"], narrow=narrow)
