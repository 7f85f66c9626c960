"""One layer in ModelSlim's layout: which type it is of, if any, and the tensors of that.

Per linear layer with N outputs and K inputs, beside an unchanged `bias`:
  weight         int8 [N, K], q = code - 2^(bits-1), one number a byte at 4 bits too
  weight_scale   float32 [N, 1]
  weight_offset  float32 [N, 1], W = (q + offset) * scale; zeros but for asymmetric W8A16
With FlatQuant's map x' = x (left (x) right) in front:
  left_trans [a, a], right_trans [b, b]  float32, with the one a * b = K that the engine computes from K
  clip_ratio     float32 [1], the share of a token's range that its grid covers
The map has no diagonal there; diagonal.py puts it elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..diagonal import divided
from ..kronecker import Kronecker
from ..linear import QuantLinear

FLOAT, FLATQUANT = "FLOAT", "W4A4_FLATQUANT_DYNAMIC"
# (bits of weights, of inputs, with a map in front) -> type. The engine has no other for dense integer layers, but for
# static scales.
TYPES = {
    (8, 16, False): "W8A16",
    (8, 8, False): "W8A8_DYNAMIC",
    (4, 4, False): "W4A4_DYNAMIC",
    (4, 4, True): FLATQUANT,
}


def type_of(name: str, layer: QuantLinear) -> str:
    """Of the layer called `name`; ValueError that says what it has, and what the format takes."""
    for refused, found, expected in _rules(layer):
        if refused:
            raise ValueError(f"{name}: has {found}; expected {expected}")
    return TYPES[_key(layer)]


def _key(layer: QuantLinear) -> tuple[int, int, bool]:
    inputs = 16 if layer.activation is None else layer.activation.bits
    return layer.spec.bits, inputs, layer.transform is not None


def _rules(layer: QuantLinear) -> Iterator[tuple[bool, str, str]]:
    """(broken, what the layer has, what the format takes), the most telling first."""
    spec, a, transform = layer.spec, layer.activation, layer.transform
    inputs = 16 if a is None else a.bits
    yield layer.replaces != "Linear", f"a packed {layer.replaces}", "a packed nn.Linear"
    kind = type(transform).__name__
    yield not isinstance(transform, Kronecker | None), f"an online {kind} in front", "none, or FlatQuant's map"
    kind = f"w{spec.bits}a{inputs}" + (" with a map in front" if transform is not None else "")
    yield _key(layer) not in TYPES, kind, "w8a8, w8a16, w4a4, or w4a4 with FlatQuant's map"
    groups = layer.scale.shape[1]
    yield groups != 1, f"{groups} groups of inputs, each with its scale", "one scale per output channel"
    asymmetric = not spec.symmetric and a is not None
    yield asymmetric, f"asymmetric weights at w{spec.bits}a{inputs}", "symmetric ones; asymmetric at w8a16 alone"
    features = layer.in_features
    yield spec.bits == 4 and features % 8 != 0, f"{features} inputs at 4 bits", "a multiple of 8"
    if a is not None:
        yield not a.symmetric, "inputs on an asymmetric grid", "a symmetric one"
        yield not a.dynamic, "a static scale for its inputs", "one per token (a_dynamic)"
        yield a.clip != 1 and transform is None, f"inputs clipped to {a.clip:g}", "a clip with FlatQuant's map alone"
    if isinstance(transform, Kronecker):
        sizes = len(transform.left), len(transform.right)
        fixed = decomposition(features)
        packing = f"{features} inputs, of which the engine makes {fixed[0]} x {fixed[1]}"
        yield fixed[1] % 8 != 0, packing, "a multiple of 8 as the second, along which its kernel packs codes"
        yield sizes != fixed, f"a map of {sizes[0]} x {sizes[1]}", f"{fixed[0]} x {fixed[1]}, as the engine has it"


def layer_tensors(layer: QuantLinear, kind: str, by: Tensor | None = None) -> dict[str, Tensor]:
    """The file's tensors for a layer of the type `kind`, its outputs divided by `by` [N]."""
    middle = 2 ** (layer.spec.bits - 1)
    scale = layer.scale.float().view(-1, 1)
    offset = torch.zeros_like(scale) if layer.zero is None else middle - layer.zero.float().view(-1, 1)
    bias = layer.bias
    if by is not None:
        scale, bias = divided(scale, by), None if bias is None else divided(bias, by)
    found = {"weight": (layer.codes().to(torch.int16) - middle).to(torch.int8)}
    found |= {"weight_scale": scale, "weight_offset": offset}
    if kind == FLATQUANT and isinstance(layer.transform, Kronecker) and layer.activation is not None:
        found |= {"left_trans": layer.transform.left, "right_trans": layer.transform.right}
        found["clip_ratio"] = torch.tensor([layer.activation.clip], dtype=torch.float32)
    return found if bias is None else {**found, "bias": bias}


def decomposition(features: int) -> tuple[int, int]:
    """(a, b) with a * b = features, both even or both odd and as near to each other as can be: what the engine makes of
    K, and no other. ValueError for twice an odd number, which has none."""
    if features % 4 == 2:
        raise ValueError(f"features: {features} is twice an odd number; expected a product of two even or two odd ones")
    for a in range(math.isqrt(features), 0, -1):
        if features % a == 0 and (features // a - a) % 2 == 0:
            break
    return a, features // a
