"""The ways to keep weights whose products are measured: torch's own in each dtype, and this package's packed layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import ascend
from ...backends.device import Device
from ...compress.linear import QuantLinear
from ...compress.spec import ActivationSpec, QuantSpec
from ...compress.walk import storage_dtype
from ...kernels import ops
from ...kernels.registry import Case, explain

_FLOAT8 = (8, 9)  # least compute capability whose tensor cores multiply it
DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MATRIX = {"_int_mm": torch.int8, "_scaled_mm": torch.float8_e4m3fn}
KINDS = {dtype: kind for kind, dtype in DENSE.items()} | {torch.int8: "int8", torch.float8_e4m3fn: "float8"}
# Bits of the weight, features that share a scale (None: a row's), bits of x (None: it is not rounded).
PACKED: dict[str, tuple[int, int | None, int | None]] = {
    "w4a16": (4, 128, None),
    "w8a16": (8, 128, None),
    "w8a8": (8, None, 8),
    "w4a8": (4, None, 8),
    "w4a4": (4, None, 4),
}


class Weight(NamedTuple):
    """bytes: as it is stored on the device; multiply: x [M, features] -> [M, features]."""

    bytes: int
    multiply: Callable[[Tensor], object]


class Form(NamedTuple):
    """A way to keep weights. make: from features, in and out, and how many of them; dtype: of x; told: in a source."""

    make: Callable[[int, int], Iterator[Weight]]
    dtype: torch.dtype
    told: str


def forms_of(device: Device, features: int, say: Callable[[str], None]) -> dict[str, Form]:
    """By name, those that have a product on the device; `say` is told why the others have none."""
    forms = {name: Form(_dense(device.torch_device, dtype), dtype, "torch's product") for name, dtype in DENSE.items()}
    for name, (bits, group, act) in PACKED.items():
        refusals = []
        for dtype in (torch.bfloat16, torch.float16):
            try:
                kernel = explain(Case(device.kind, dtype, bits, group or features, act, features, features)).kernel
            except ValueError as refusal:
                refusals.append(str(refusal))
                continue
            if kernel == "reference":
                refusals.append("plain torch would compute it")
                continue
            forms[name] = Form(_packed(device.torch_device, dtype, bits, group, act), dtype, f"this package's {kernel}")
            break
        else:
            say(f"{name}: not measured: {refusals[0]}")
    return forms


def _dense(at: torch.device, dtype: torch.dtype) -> Callable[[int, int], Iterator[Weight]]:
    def make(features: int, count: int) -> Iterator[Weight]:
        first = torch.randn(features, features, device=at, dtype=dtype)
        for index in range(count):
            w = first.clone() if index else first
            yield Weight(w.nbytes, lambda x, w=w: F.linear(x, w))  # type: ignore[misc]

    return make


def _packed(
    at: torch.device, dtype: torch.dtype, bits: int, group: int | None, act: int | None
) -> Callable[[int, int], Iterator[Weight]]:
    # On an NPU the grid that its operators round on.
    activation = None if act is None else ActivationSpec(act, narrow=at.type == ascend.NAME)
    spec = QuantSpec(bits, group)

    def make(features: int, count: int) -> Iterator[Weight]:
        codes = torch.randint(0, 256, (features, ops.packed_width(features, bits)), dtype=torch.uint8, device=at)
        kept = storage_dtype(torch.empty(0, dtype=dtype))
        scale = torch.full((features, spec.groups(features)), 0.01, dtype=kept, device=at)
        for _ in range(count):
            layer = QuantLinear(spec, features, codes.clone(), scale.clone(), None, None, activation)
            layer.prepack_()
            layer(torch.zeros(1, features, dtype=dtype, device=at))  # some are laid out at their first call
            yield Weight(_stored(layer), layer)

    return make


def _stored(layer: QuantLinear) -> int:
    """Bytes of the weight as its kernel reads it."""
    if layer.laid is not None:
        return sum(part.nbytes for part in layer.laid.parts) + layer.laid.scale.nbytes
    return sum(buffer.nbytes for buffer in layer.buffers())


def matrix_forms(device: Device) -> dict[str, Form]:
    """Products in 8 bits, for which torch has functions of their own, by these functions' names."""
    forms = {"_int_mm": Form(_bytes(device.torch_device, torch._int_mm, torch.int8), torch.int8, "torch._int_mm")}
    capability = device.info().get("capability")
    if capability is not None and tuple(map(int, capability.split("."))) >= _FLOAT8:
        one = torch.ones((), device=device.torch_device)

        def scaled(x: Tensor, w: Tensor) -> Tensor:
            return torch._scaled_mm(x, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        float8 = MATRIX["_scaled_mm"]
        forms["_scaled_mm"] = Form(_bytes(device.torch_device, scaled, float8), float8, "torch._scaled_mm")
    return forms


def _bytes(
    at: torch.device, product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> Callable[[int, int], Iterator[Weight]]:
    def make(features: int, count: int) -> Iterator[Weight]:
        for _ in range(count):
            w = torch.randn(features, features, device=at).to(dtype)
            yield Weight(w.nbytes, lambda x, w=w: product(x, w.t()))  # type: ignore[misc]

    return make
