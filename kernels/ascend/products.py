"""The products of packed layers on an Ascend NPU, along the route that routes.py gives, and those of this package's ops
that torch's dispatcher finds there."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backends.ascend_products import PRODUCTS, Product, product_named
from ..checks import check_range
from ..reference import ASYMMETRIC, packed_width
from .routes import EXPANDED, FUSED, KRONECKER_TOKENS, Inputs, Layer, route
from .schemas import drift
from .weights import AscendWeight

Static = tuple[Tensor, Tensor]  # scale float32 [1] and zero int32 [1] of an input


@cache
def product_of(device: torch.device) -> Product:
    """ValueError for a chip that we do not know. What a person should know of it is said once."""
    told = getattr(torch.npu, "get_device_name", None)  # type: ignore[attr-defined]
    if told is None:  # no torch-npu, but something that stands for an NPU
        logging.getLogger(__name__).warning("%s: does not tell its chip, and is taken for a 910B1", device)
    product = PRODUCTS["910B1"] if told is None else product_named(told(device.index or 0))
    for operator, change in drift().items():
        logging.getLogger(__name__).warning("torch-npu's %s %s", operator, change)
    return product


def lay(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    layer: Layer,
    device: torch.device,
    product: Product | None = None,
    layout: str = "auto",
) -> AscendWeight:
    """A weight in the stored layout, laid out for its route on `device`; ValueError where there is no route.

    product   None: what the device is
    """
    way = route(layer, product or product_of(device), layout)
    _say(way.notes)
    return AscendWeight(packed, scale, zero, layer, way, device)


@cache
def _say(notes: tuple[str, ...]) -> None:
    """Once for all layers of which it is true."""
    for note in notes:
        logging.getLogger(__name__).warning("npu: %s", note)


def linear(
    x: Tensor,
    weight: AscendWeight,
    bias: Tensor | None = None,
    static: Static | None = None,
    transform: nn.Module | None = None,
) -> Tensor:
    """x [..., K] -> [..., N] in the dtype of x, which is the layer's.

    static      of inputs that are not rounded token by token
    transform   of x, before anything else
    Gradients flow to x, as if it were not rounded, and to the bias.
    """
    needed = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if needed:
        x = x if transform is None else transform(x)
        return _Differentiable.apply(x, bias, weight, static)
    return _forward(x, weight, bias, static, transform)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: AscendWeight, static: Static | None) -> Tensor:
        ctx.weight, ctx.x_dtype, ctx.bias_dtype = weight, x.dtype, None if bias is None else bias.dtype
        return _forward(x, weight, bias, static, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        to_x = (grad.float() @ ctx.weight.dense()).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        to_bias = None
        if ctx.needs_input_grad[1]:
            to_bias = grad.float().reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return to_x, to_bias, None, None


def _forward(
    x: Tensor, weight: AscendWeight, bias: Tensor | None, static: Static | None, transform: nn.Module | None
) -> Tensor:
    layer = weight.layer
    rows = x.reshape(-1, layer.k)
    if not len(rows):  # which no operator takes
        return x.new_empty(*x.shape[:-1], layer.n)
    if layer.inputs is None:
        rows = rows if transform is None else transform(rows)
        y = _weight_only(rows, weight, bias)
    else:
        y = _integer(rows, weight, bias, layer.inputs, static, transform)
    return y.reshape(*x.shape[:-1], layer.n)


def _weight_only(x: Tensor, weight: AscendWeight, bias: Tensor | None) -> Tensor:
    way = weight.route
    if way.operator == EXPANDED:
        return _expanded(x, weight, bias)
    outputs = []
    for part, (scale, offset), own in zip(weight.parts, weight.grids(x.dtype), _split(bias, weight)):
        n = scale.shape[1]
        if own is not None:
            # Of bfloat16 products the operator wants it in float32.
            own = own.to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype)
            own = F.pad(own, (0, n - len(own))) if len(own) < n else own
        outputs.append(
            torch.ops.npu.npu_weight_quant_batchmatmul(
                x,
                part,
                scale if way.group else scale[0],
                antiquant_offset=offset if offset is None or way.group else offset[0],
                bias=own,
                antiquant_group_size=way.group,
            )
        )
    return _joined(outputs, way.parts)


def _expanded(x: Tensor, weight: AscendWeight, bias: Tensor | None) -> Tensor:
    outputs = []
    for part, (scale, offset) in zip(weight.parts, weight.grids(torch.float32)):
        groups = part.float().unflatten(0, (len(scale), -1))  # [G, K/G, N]
        groups = groups if offset is None else groups + offset[:, None]
        outputs.append(x.float() @ (groups * scale[:, None]).flatten(0, 1))
    y = _joined(outputs, weight.route.parts)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _integer(
    x: Tensor,
    weight: AscendWeight,
    bias: Tensor | None,
    inputs: Inputs,
    static: Static | None,
    transform: nn.Module | None,
) -> Tensor:
    codes, scale, zero = _rounded(x, weight, inputs, static, transform)
    if weight.route.sums:
        y = _by_sums(codes, scale, zero, weight)
        return (y if bias is None else y + bias.float()).to(x.dtype)
    return _scaled(codes, scale, zero, weight, bias, x.dtype)


def _rounded(
    x: Tensor, weight: AscendWeight, inputs: Inputs, static: Static | None, transform: nn.Module | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """codes of x [M, K] (int8, or int32 of eight), scale float32 [M] or [1], zero int32 [M] or [1], or None."""
    way, int4 = weight.route.rounding, weight.route.held == "int4"
    if transform is None and way in FUSED:  # it was applied before, for the sake of gradients
        way = "npu_dynamic_quant" if inputs.clip == 1 else "torch"
    if way == "npu_kronecker_quant":
        return *_kronecker(x, inputs, weight.maps(transform, x.dtype)), None
    if way == "npu_rotate_quant":
        (rotation,) = weight.maps(transform, x.dtype)
        kind = torch.quint4x2 if int4 else torch.int8
        return *torch.ops.npu.npu_rotate_quant(x, rotation, dst_dtype=kind), None
    x = x if transform is None else transform(x)
    if way == "npu_dynamic_quant":
        return *torch.ops.npu.npu_dynamic_quant(x, dst_type=torch.quint4x2 if int4 else torch.int8), None
    if way == "npu_quantize":
        assert static is not None
        scale, zero = static
        codes = torch.ops.npu.npu_quantize(x, scale, zero, torch.qint8, axis=1, div_mode=True)
        return codes, scale, zero
    rounded, scales, zeros = _by_torch(x, inputs, static)
    return (_packed(rounded) if int4 else rounded), scales, zeros


def _kronecker(x: Tensor, inputs: Inputs, maps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    left, right, scale = maps
    rows = (x.float() / scale).to(x.dtype).unflatten(1, inputs.factors)  # [M, n1, n2]
    made = [
        torch.ops.npu.npu_kronecker_quant(some, left, right, clip_ratio=inputs.clip, dst_dtype=torch.int32)
        for some in rows.split(KRONECKER_TOKENS)
    ]
    return torch.cat([codes.flatten(1) for codes, _ in made]), torch.cat([scale for _, scale in made])


def _by_torch(x: Tensor, inputs: Inputs, static: Static | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if static is None:
        codes, scale, zero = torch.ops.remanence.quantize_per_token(x, inputs.bits, inputs.grid, inputs.clip)
        return codes, scale[:, 0], zero[:, 0] if inputs.grid == ASYMMETRIC else None
    scale, zero = static
    top = 2 ** (inputs.bits - 1)
    return (x.float() / scale + zero).round().clamp(-top, top - 1).to(torch.int8), scale, zero


def _packed(codes: Tensor) -> Tensor:
    """int8 [M, K], -8 .. 7 -> int32 [M, K/8]."""
    exact = codes.to(torch.float16)
    return torch.ops.npu.npu_quantize(exact, exact.new_ones(1), None, torch.quint4x2, axis=-1, div_mode=False)


def _scaled(
    codes: Tensor, scale: Tensor, zero: Tensor | None, weight: AscendWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The operator scales: symmetric weights, one scale per output channel; x by token, or on a given grid."""
    inputs, way = weight.layer.inputs, weight.route
    assert inputs is not None
    fixed: list[tuple[Tensor, Tensor | None]]
    if inputs.dynamic:
        fixed = [(w_scale[0], None) for w_scale, _ in weight.grids(torch.float32)]
    else:
        fixed = weight.fixed(scale, zero if inputs.grid == ASYMMETRIC else None)
    # Beside a scale per token the operator adds a bias itself; with int4, or a shift in its place, it cannot.
    inside = inputs.dynamic and way.held == "int8"
    outputs = []
    for part, (w_scale, shift), own in zip(weight.parts, fixed, _split(bias, weight), strict=True):
        y = torch.ops.npu.npu_quant_matmul(
            codes,
            part,
            w_scale,
            pertoken_scale=scale if inputs.dynamic else None,
            bias=own.float() if inside and own is not None else shift,
            output_dtype=dtype,
        )
        if own is not None and not inside:
            y = (y[:, : len(own)].float() + own.float()).to(dtype)
        outputs.append(y)
    return _joined(outputs, way.parts)


def _by_sums(codes: Tensor, scale: Tensor, zero: Tensor | None, weight: AscendWeight) -> Tensor:
    """float32 [M, N] of exact sums, group by group: of (a - za) (w - zw), the operator gives those of a w."""
    layer, outputs = weight.layer, []
    one = torch.ones(1, device=codes.device)
    sums, all_zeros = None if zero is None else weight.sums(), weight.zeros()
    for i, (part, (w_scale, _)) in enumerate(zip(weight.parts, weight.grids(torch.float32))):
        y, zeros = None, None if all_zeros is None else all_zeros[i]
        for g in range(layer.k // layer.group):
            inputs = slice(g * layer.group, (g + 1) * layer.group)
            a = codes[:, inputs].contiguous()
            whole = torch.ops.npu.npu_quant_matmul(a, part[inputs], one, output_dtype=torch.int32)
            if zeros is not None:
                whole = whole - a.sum(-1, keepdim=True, dtype=torch.int32) * zeros[g]
            if zero is not None and sums is not None:
                shift = sums[i][g] if zeros is None else sums[i][g] - layer.group * zeros[g]
                whole = whole - zero[:, None] * shift
            scaled = whole.float() * w_scale[g]
            y = scaled if y is None else y + scaled
        assert y is not None
        outputs.append(y)
    return _joined(outputs, weight.route.parts) * scale[:, None]


def _split(bias: Tensor | None, weight: AscendWeight) -> list[Tensor | None]:
    return [None] * len(weight.parts) if bias is None else [*bias.split(weight.route.parts)]


def _joined(outputs: list[Tensor], parts: tuple[int, ...]) -> Tensor:
    """Without what was padded."""
    outputs = [y[:, :n] for y, n in zip(outputs, parts, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


# What torch's dispatcher has on an NPU for the ops of this package (ops.py); each takes the arguments of the op


def w4a16_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    layer = Layer(len(packed), x.shape[-1], bits, x.shape[-1] // scale.shape[1], zero is None, x.dtype)
    return linear(x, lay(packed, scale, zero, layer, x.device), bias)


def integer_linear(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    x_bits: int,
    grid: int,
    clip: float,
) -> Tensor:
    inputs = Inputs(x_bits, x_scale is None, grid, clip)
    layer = Layer(len(packed), x.shape[-1], bits, x.shape[-1] // scale.shape[1], zero is None, x.dtype, inputs)
    static = None if x_scale is None or x_zero is None else (x_scale, x_zero)
    return linear(x, lay(packed, scale, zero, layer, x.device), bias, static)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Of whole bytes by arithmetic, which every NPU has for int32; shifts of bytes are missing on some."""
    if 8 % bits:
        return torch.ops.remanence.pack(codes.cpu(), bits).to(codes.device)
    check_range(codes, bits)
    k, each = codes.shape[1], 8 // bits
    whole = F.pad(codes.to(torch.int32), (0, packed_width(k, bits) * each - k)).unflatten(1, (-1, each))
    places = torch.tensor([2 ** (i * bits) for i in range(each)], dtype=torch.int32, device=codes.device)
    return (whole * places).sum(-1, dtype=torch.int32).to(torch.uint8)


def unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    if 8 % bits:
        return torch.ops.remanence.unpack(packed.cpu(), bits, k).to(packed.device)
    wide = packed.to(torch.int32)
    codes = [torch.remainder(wide.div(2 ** (i * bits), rounding_mode="floor"), 2**bits) for i in range(8 // bits)]
    return torch.stack(codes, -1).flatten(1)[:, :k].to(torch.uint8)


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, k: int) -> Tensor:
    on_host = (None if part is None else part.cpu() for part in (packed, scale, zero))
    return torch.ops.remanence.dequantize(*on_host, bits, k).to(packed.device)


def hadamard(x: Tensor) -> Tensor:
    """As two products with smaller matrices, H = H1 (x) H2: the matrix unit is what an NPU is fastest at."""
    n = x.shape[-1]
    first = 2 ** ((n.bit_length() - 1) // 2)
    wide = torch.promote_types(x.dtype, torch.float32)
    left, right = (_sylvester(size, x.device, wide) for size in (first, n // first))
    y = left @ x.to(wide).reshape(-1, first, n // first) @ right
    return (y.reshape(x.shape) * n**-0.5).to(x.dtype)


@cache
def _sylvester(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    H = torch.ones(1, 1)
    while len(H) < n:
        H = torch.kron(H, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return H.to(device, dtype)
