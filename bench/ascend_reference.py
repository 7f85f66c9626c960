"""torch-npu's operators in plain torch, behind their own schemas, as strict as their documentation.

What an NPU computes is taken from the formulas of op-plugin (docs/zh/custom_APIs/torch_npu) and CANN's aclnnFlatQuant,
what it refuses from the same pages and from the checks of the C++ in front. Products are in float64 and int64; what is
rounded is in float32, as on the device. A call that the device would refuse raises here too, so that code which passes
has kept to the contract. Nothing here knows how remanence lays a weight out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..backends.ascend_products import Product, product_named
from ..kernels.ascend.schemas import schemas

# torch.dtype as the schemas' `int` sees it: the index of its ScalarType.
_KINDS = {1: torch.int8, 3: torch.int32, 5: torch.float16, 15: torch.bfloat16, 12: torch.qint8, 16: torch.quint4x2}
_HALVES = (torch.float16, torch.bfloat16)
_libraries: list[torch.library.Library] = []
_product = [product_named("910B4")]
calls: list[str] = []  # of operators, in their order


def install() -> None:
    """Define the operators where torch-npu is not loaded, and implement them for tensors on the CPU. Twice is once."""
    if _libraries:
        return
    library = torch.library.Library("npu", "FRAGMENT")
    for name, schema in schemas().items():
        if not hasattr(torch.ops.npu, name):
            library.define(schema)
        library.impl(name, _counted(name, _OPERATORS[name]), "CPU")
    _libraries.append(library)


def _counted(name: str, operator: Callable) -> Callable:
    def call(*args, **kwargs):
        calls.append(name)
        return operator(*args, **kwargs)

    return call


@contextmanager
def on(product: str) -> Iterator[Product]:
    """The operators are those of that product, e.g. "310P"."""
    before = _product[0]
    _product[0] = product_named(product)
    try:
        yield _product[0]
    finally:
        _product[0] = before


def _demand(truth: object, what: str) -> None:
    if not truth:
        raise RuntimeError(f"{_product[0].name}: {what}")


def nibbles(words: Tensor) -> Tensor:
    """int32 [..., n] -> int64 [..., 8 n], -8 .. 7: the first in the lowest bits, two's complement."""
    wide = words.to(torch.int64) % 2**32
    each = torch.stack([wide // 16**i % 16 for i in range(8)], -1).flatten(-2)
    return each - 16 * (each >= 8)


def words(values: Tensor) -> Tensor:
    """Undoes `nibbles`."""
    each = values.to(torch.int64).unflatten(-1, (-1, 8)) % 16
    wide = (each * 16 ** torch.arange(8)).sum(-1)
    return (wide - 2**32 * (wide >= 2**31)).to(torch.int32)


def _matrix(weight: Tensor) -> Tensor:
    """A weight as [K, N] int64. Eight codes in an int32 lie along the axis that is contiguous; where strides leave both
    open, torch-npu takes it for a transpose."""
    if weight.dtype != torch.int32:
        return weight.to(torch.int64)
    _demand(_product[0].int4, "int32 weights, of eight int4, are not supported")
    if weight.stride(0) == 1 and weight.stride(1) == weight.shape[0]:
        return nibbles(weight.t()).t()
    _demand(weight.is_contiguous(), "an int4 weight is contiguous, or the transpose of one that is")
    return nibbles(weight)


def _weight_quant_batchmatmul(
    x,
    weight,
    antiquant_scale,
    antiquant_offset=None,
    quant_scale=None,
    quant_offset=None,
    bias=None,
    antiquant_group_size=0,
    inner_precise=0,
    weight_dtype=None,
):
    product, scale, offset, g = _product[0], antiquant_scale, antiquant_offset, antiquant_group_size
    _demand(quant_scale is None and quant_offset is None and weight_dtype is None, "not made here")
    _demand(x.dtype in (_HALVES if product.bfloat16 else _HALVES[:1]), f"x: {x.dtype}")
    _demand(x.dim() == 2 and weight.dim() == 2 and x.numel() and weight.numel(), "x and weight: two axes, not empty")
    _demand(weight.dtype in (torch.int8, torch.int32), f"weight: {weight.dtype}")
    w = _matrix(weight)
    K, N = w.shape
    _demand(x.shape[1] == K, f"K of x is {x.shape[1]}, of the weight {K}")
    _demand(max(K, N) <= 65535, f"K and N are at most 65535, not {K} and {N}")
    _demand(g == 0 or (g % 32 == 0 and 32 <= g <= K - 1), f"antiquant_group_size: {g}")
    shapes = [(-(-K // g), N)] if g else [(N,), (1, N), (1,), (1, 1)]
    _demand(tuple(scale.shape) in shapes, f"antiquant_scale: {tuple(scale.shape)} is not one of {shapes}")
    _demand(scale.dtype == x.dtype, f"antiquant_scale: {scale.dtype} beside {x.dtype}")
    _demand(
        offset is None or (offset.shape, offset.dtype) == (scale.shape, scale.dtype), "antiquant_offset is as the scale"
    )
    _demand(inner_precise == 0, "inner_precise")
    if bias is not None:
        wanted = torch.float32 if x.dtype == torch.bfloat16 else torch.float16
        _demand(bias.dtype == wanted, f"bias: {bias.dtype} beside {x.dtype}")
        _demand(tuple(bias.shape) in ((N,), (1, N)) and bias.is_contiguous(), f"bias: {tuple(bias.shape)}")
    shift = 0 if offset is None else _spread(offset.double(), g, K)
    y = x.double() @ ((w.double() + shift) * _spread(scale.double(), g, K))
    return (y if bias is None else y + bias.double()).to(x.dtype)


def _spread(grid: Tensor, group: int, K: int) -> Tensor:
    return grid.repeat_interleave(group, 0)[:K] if group else grid.reshape(1, -1)


def _quant_matmul(
    x1,
    x2,
    scale,
    *,
    offset=None,
    pertoken_scale=None,
    bias=None,
    output_dtype=None,
    x1_dtype=None,
    x2_dtype=None,
    pertoken_scale_dtype=None,
    scale_dtype=None,
    group_sizes=None,
    y_scale=None,
):
    others = (offset, x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype, group_sizes, y_scale)
    _demand(all(other is None for other in others), "not made here")
    out = torch.int8 if output_dtype is None else _KINDS[output_dtype]
    kinds = [None if part is None else part.dtype for part in (scale, bias, pertoken_scale)]
    _demand(x1.dtype == x2.dtype and (x1.dtype, *kinds, out) in _table(), f"{x1.dtype}, {kinds} -> {out}")
    _demand(x1.dim() == 2 and x2.dim() == 2 and x1.numel() and x2.numel(), "x1 and x2: two axes, not empty")
    a, w = nibbles(x1) if x1.dtype == torch.int32 else x1.to(torch.int64), _matrix(x2)
    _demand(x1.is_contiguous() or x1.dtype == torch.int8, "int4 x1 is contiguous")
    (M, K), N = a.shape, w.shape[1]
    _demand(w.shape[0] == K, f"K of x1 is {K}, of x2 {w.shape[0]}")
    _demand(x1.dtype == torch.int8 or (K % 8 == 0 and N % 8 == 0), f"int4: K and N are multiples of 8, not {K}, {N}")
    _demand(max(x1.shape[1], x2.shape[1]) <= 65535, "the last axis is at most 65535")
    _demand(scale.shape in ((1,), (N,)), f"scale: {tuple(scale.shape)}")
    _demand(pertoken_scale is None or pertoken_scale.shape == (M,), "pertoken_scale: (m,)")
    _demand(bias is None or bias.shape == (N,), "bias: (n,)")
    sums = a.double() @ w.double()  # below 2^53: exact
    if bias is not None and bias.dtype == torch.int32:
        sums = sums + bias
    if out == torch.int32:
        return sums.to(torch.int64).to(torch.int32)
    if pertoken_scale is None and out == torch.float16:  # it goes through npu_trans_quant_param, which keeps 19 bits
        scale = (scale.contiguous().view(torch.int32) & ~(2**13 - 1)).view(torch.float32)
    y = sums * scale.double() * (1 if pertoken_scale is None else pertoken_scale.double()[:, None])
    y = y + bias.double() if bias is not None and bias.dtype != torch.int32 else y
    return y.round().clamp(-128, 127).to(torch.int8) if out == torch.int8 else y.to(out)


def _table() -> set[tuple[torch.dtype | None, ...]]:
    """(x1 and x2, scale, bias, pertoken_scale, output) that go together on the product, int64 scales left out."""
    i8, i32, f32, f16, b16 = torch.int8, torch.int32, torch.float32, torch.float16, torch.bfloat16
    rows: set[tuple[torch.dtype | None, ...]] = {
        (i8, f32, bias, None, out) for bias in (i32, None) for out in (f16, i8)
    }
    if _product[0].sums:
        rows |= {(i8, s, b, p, b16) for s in (f32, b16) for b in (i32, b16, f32, None) for p in (f32, None)}
        rows |= {(i8, f32, bias, f32, f16) for bias in (i32, b16, f32, None)}
        rows |= {(i8, scale, bias, None, i32) for scale in (f32, b16) for bias in (i32, None)}
        rows |= {(i32, f32, bias, None, f16) for bias in (i32, None)}
        rows |= {(i32, f32, None, f32, out) for out in (b16, f16)}
    return rows


def _by_rows(x: Tensor, top: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows [..., K], scale = clip * max|x| / top, in float32 as on the device, for the sake of
    ties; what is cut off goes to the ends of int4 and int8."""
    x = x.float()
    scale = clip * x.abs().amax(-1) / top
    codes = (x / scale[..., None]).round().nan_to_num(0)
    return codes.clamp(-top - 1, top).to(torch.int8), scale


def _dynamic_quant(
    input, *, smooth_scales=None, group_index=None, dst_type=None, quant_mode="pertoken", dst_type_max=0.0
):
    _demand(_product[0].per_token, "npu_dynamic_quant is not supported")
    others = smooth_scales is None and group_index is None and quant_mode == "pertoken" and dst_type_max == 0
    _demand(others, "not made here")
    _demand(input.dtype in _HALVES and input.dim() >= 2, f"input: {input.dtype}, {input.dim()} axes")
    int4 = dst_type is not None and _KINDS[dst_type] == torch.quint4x2
    _demand(not int4 or input.shape[-1] % 8 == 0, "int4: the last axis is a multiple of 8")
    codes, scale = _by_rows(input.double(), 7 if int4 else 127)
    return words(codes) if int4 else codes, scale


def _quantize(input, scales, zero_points, dtype, axis=1, div_mode=True):
    _demand(axis in (-1, input.dim() - 1), f"axis: {axis}")
    product, kind = _product[0], _KINDS[dtype]
    _demand(input.dtype in (torch.float32, *(_HALVES if product.bfloat16 else _HALVES[:1])), f"input: {input.dtype}")
    _demand(scales.numel() == 1, "not made here")
    zero = 0 if zero_points is None else zero_points.float()
    if div_mode:
        _demand(kind == torch.qint8 and scales.dtype in (torch.float32, torch.bfloat16), f"{kind}, {scales.dtype}")
        _demand(zero_points is None or zero_points.dtype in (torch.int32, torch.int8, torch.uint8), "zero_points")
        return (input.float() / scales.float() + zero).round().clamp(-128, 127).to(torch.int8)
    _demand(product.int4 and kind == torch.quint4x2, f"{kind} with div_mode=False")
    _demand(scales.dtype == input.dtype and input.shape[-1] % 8 == 0, "scales are as the input; multiples of 8")
    return words((input.float() * scales.float() + zero).round().clamp(-8, 7))


def _kronecker_quant(x, kronecker_p1, kronecker_p2, clip_ratio=None, dst_dtype=None, dst_type_max=None):
    _demand(_product[0].fused, "npu_kronecker_quant is not supported")
    _demand(dst_dtype is None or _KINDS[dst_dtype] == torch.int32, "dst_dtype: int32, of eight int4")
    _demand(x.dim() == 3 and x.numel() and len(x) <= 32768, "x: 1 to 32768 matrices")
    _demand(x.dtype in _HALVES and {kronecker_p1.dtype, kronecker_p2.dtype} == {x.dtype}, "all of one 16-bit dtype")
    a, b = x.shape[1:]
    _demand(max(a, b) <= 256 and b % 8 == 0, f"matrices {a} x {b}")
    _demand(kronecker_p1.shape == (a, a) and kronecker_p2.shape == (b, b), "square matrices of the sides of x")
    clip = 1.0 if clip_ratio is None else clip_ratio
    _demand(0 < clip <= 1 and not dst_type_max, f"clip_ratio: {clip}")
    turned = kronecker_p1.double() @ (x.double() @ kronecker_p2.double())
    codes, scale = _by_rows(turned.flatten(1), 7, clip)
    return words(codes).reshape(len(x), a, b // 8), scale


def _rotate_quant(
    x,
    rotation,
    *,
    alpha=None,
    dst_dtype=None,
    axis=-1,
    round_mode="rint",
    scale_alg=0,
    dst_type_max=0.0,
    transpose_y=False,
):
    _demand(_product[0].fused, "npu_rotate_quant is not supported")
    plain = (
        alpha is None and axis in (-1, 1) and round_mode == "rint" and not (scale_alg or dst_type_max or transpose_y)
    )
    _demand(plain, "not made here")
    K, N = len(rotation), x.shape[-1]
    _demand(x.dim() == 2 and x.dtype in _HALVES and rotation.dtype == x.dtype, f"x: {x.dtype}, {x.dim()} axes")
    _demand(rotation.shape == (K, K) and 16 <= K <= 1024 and N % K == 0, f"rotation: {tuple(rotation.shape)}")
    _demand(128 <= N <= 16000 and N % 8 == 0, f"the last axis: {N}")
    int4 = dst_dtype is not None and _KINDS[dst_dtype] == torch.quint4x2
    turned = (x.double().unflatten(1, (-1, K)) @ rotation.double()).flatten(1)
    codes, scale = _by_rows(turned, 7 if int4 else 127)
    return words(codes) if int4 else codes, scale


def _convert_weight_to_int4pack(weight, inner_k_tiles=0):
    _demand(weight.dtype == torch.int32 and weight.dim() == 2 and weight.is_contiguous(), f"weight: {weight.dtype}")
    _demand(weight.shape[1] % 8 == 0 and inner_k_tiles in (0, 1), f"weight: {tuple(weight.shape)}")
    _demand(bool(((weight >= -8) & (weight <= 7)).all()), "weight: -8 to 7")
    return words(weight)


def _format_cast(input, acl_format, *, customize_dtype=None, input_dtype=None):
    _demand(acl_format in (2, 29) and customize_dtype is None and input_dtype is None, f"acl_format: {acl_format}")
    _demand(acl_format == 2 or input.dtype in (torch.int8, torch.int32), f"input: {input.dtype}")
    return input.clone()


_OPERATORS: dict[str, Callable] = {
    "npu_weight_quant_batchmatmul": _weight_quant_batchmatmul,
    "npu_quant_matmul": _quant_matmul,
    "npu_dynamic_quant": _dynamic_quant,
    "npu_quantize": _quantize,
    "npu_kronecker_quant": _kronecker_quant,
    "npu_rotate_quant": _rotate_quant,
    "npu_format_cast": _format_cast,
    "npu_convert_weight_to_int4pack": _convert_weight_to_int4pack,
}
