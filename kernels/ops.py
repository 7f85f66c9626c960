"""The ops of this package, as torch sees them: `torch.ops.remanence.*`, with shapes, errors and gradients.

Torch's dispatcher picks the implementation: the native kernels on a CPU, the plain reference elsewhere.
Shapes: N output features, K input features, G groups a row (group size K / G), M rows of x (leading axes).
A weight is w = (codes - zero) * scale, codes in 0 .. 2^bits - 1, stored as compressed-tensors stores them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import reference
from ._C import available_isas, isa, set_isa
from ._C import clip_error as _native_clip_error
from ._C import dequantize as _native_dequantize
from ._C import gptq_block as _native_gptq_block
from ._C import linear as _native_linear
from ._C import pack as _native_pack
from ._C import unpack as _native_unpack
from .reference import packed_width

__all__ = [
    "BITS",
    "available_isas",
    "clip_error",
    "dequantize",
    "gptq_block",
    "integer_linear",
    "isa",
    "pack",
    "packed_width",
    "quantize_per_token",
    "set_isa",
    "unpack",
    "w4a16_linear",
]

BITS = (2, 3, 4, 8)
_SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # ScaleType in csrc/rows.h
_FLOATS = tuple(_SCALE_TYPES)
_UINT8 = (torch.uint8,)

# Rows of x up to which the native kernel beats dequantising once and F.linear: measured on two Zen 4 cores
# (4 bits, g64, AVX2 and AVX-512), they cross at 32 rows for 256x256, at 48 or more for 2048x2048 and above.
_NATIVE_ROWS = 32
# Products of two codes that are summed in float32: at most 255 * 255 each, so no sum passes 2^24, and all are exact.
_EXACT = 256


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes uint8 [N, K] -> packed uint8 [N, 4 * ceil(K*bits/32)]; ValueError on a code above 2^bits - 1.

    A row is one stream of bits, lowest first: at 4 bits the low nibble is the even k.
    """
    return torch.ops.remanence.pack(codes, bits)


def unpack(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """packed uint8 [N, 4 * ceil(K*bits/32)] -> codes uint8 [N, K]; exactly undoes `pack`."""
    return torch.ops.remanence.unpack(packed, bits, k)


def dequantize(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, k: int) -> torch.Tensor:
    """packed uint8, scale float [N, G], zero uint8 [N, G] or None (2^(bits-1)) -> w float32 [N, K].

    ValueError where a shape or dtype does not fit, or K does not divide into G groups.
    """
    return torch.ops.remanence.dequantize(packed, scale, zero, bits, k)


def w4a16_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bits: int = 4,
) -> torch.Tensor:
    """x [..., K] @ w.T + bias [N] -> y [..., N] in x's dtype (float32, float16 or bfloat16).

    The weight as in `dequantize`, at 2, 3, 4 or 8 bits; all arithmetic in float32. Gradients flow to x and
    bias, never to the weight. ValueError where a shape or dtype does not fit.
    """
    return torch.ops.remanence.w4a16_linear(x, packed, scale, zero, bias, bits)


def quantize_per_token(
    x: torch.Tensor, bits: int, symmetric: bool = True, clip: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every row of x [..., K] on a grid of its own: codes int8 [..., K] from -2^(bits-1) to 2^(bits-1) - 1, scale
    float32 [..., 1], zero int32 [..., 1]; x ~ (codes - zero) * scale. As compressed-tensors' dynamic per-token grid.

    symmetric   zero 0, scale = clip * max|x| / ((2^bits - 1) / 2), and -max|x| gets the lowest code; else from
                clip * min(x, 0) to clip * max(x, 0)
    A row of zeros has scale 1; one that is not finite a scale that is not. ValueError for another dtype or width.
    """
    return torch.ops.remanence.quantize_per_token(x, bits, symmetric, clip)


def integer_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    x_bits: int = 8,
    symmetric: bool = True,
    clip: float = 1.0,
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] @ w.T + bias [N] -> y [..., N] in x's dtype, x rounded to integers of `x_bits` bits first.

    Rows of x by `quantize_per_token`, or on the grid of x_scale float32 [1] and x_zero int32 [1]; the weight as in
    `dequantize`. Sums over a group are exact integers, the rest is float32. Gradients pass the rounding of x as if it
    were not there, and flow to the bias. ValueError where a shape or dtype does not fit.
    """
    return torch.ops.remanence.integer_linear(
        x, x_scale, x_zero, packed, scale, zero, bias, bits, x_bits, symmetric, clip
    )


def gptq_block(
    running: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group: torch.Tensor,
    kept: torch.Tensor | None = None,
    push: torch.Tensor | None = None,
    bits: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inner loop of GPTQ: columns i = 0 .. B-1 of `running` float32 [N, B] are rounded one after another to
    w = (code - zero) * scale; e = (running_i - w) / upper_ii, and e * upper[i, j] is taken from every later column j.

    upper  float32 [B, B], of which the upper triangle is read
    scale  [N, G], zero uint8 [N, G] or None as in `dequantize`; group int64 [B]: which of the G a column has
    kept   bool [N, B], False where the weight is to be zero; None: nowhere
    push   float32 [B, B] or None: running_i * push[i, j] is added to every later column j
    -> codes uint8 [N, B], errors e float32 [N, B]. ValueError where a shape, dtype or entry of `group` does not fit.
    """
    return torch.ops.remanence.gptq_block(running, upper, scale, zero, group, kept, push, bits)


def clip_error(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> torch.Tensor:
    """What rounding groups w float32 [M, G] costs on each of S grids: scale float32 [M, S], zero uint8 [M, S] or None
    for 2^(bits-1) -> sum of |(code - zero) * scale - w|^2.4 [M, S] float32, within 1e-5; infinite where the scale is 0.
    """
    return torch.ops.remanence.clip_error(w, scale, zero, bits)


def _check_tensor(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: {tensor.dtype} is not {expected}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: shape {list(tensor.shape)} is not {list(shape)}")


def _check_codes(codes: torch.Tensor, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits: {bits} is not one of {', '.join(map(str, BITS))}")
    if codes.dim() != 2:
        raise ValueError(f"codes: shape {list(codes.shape)} is not [N, K]")
    _check_tensor("codes", codes, _UINT8, codes.shape)


def _check_range(codes: torch.Tensor, bits: int) -> None:
    largest = int(codes.max()) if codes.numel() else 0
    if largest >= 2**bits:
        raise ValueError(f"codes: {largest} is above {2**bits - 1}, the largest of {bits} bits")


def _check_packed(packed: torch.Tensor, bits: int, k: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits: {bits} is not one of {', '.join(map(str, BITS))}")
    if k < 0:
        raise ValueError(f"k: {k} is negative")
    if packed.dim() != 2:
        raise ValueError(f"packed: shape {list(packed.shape)} is not [N, {packed_width(k, bits)}]")
    _check_tensor("packed", packed, _UINT8, (packed.shape[0], packed_width(k, bits)))


def _check_weight(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, k: int) -> None:
    _check_packed(packed, bits, k)
    if scale.dim() != 2:
        raise ValueError(f"scale: shape {list(scale.shape)} is not [{packed.shape[0]}, groups]")
    groups = scale.shape[1]
    _check_tensor("scale", scale, _FLOATS, (packed.shape[0], groups))
    if k == 0 or groups == 0 or k % groups:
        raise ValueError(f"scale: {k} input features do not divide into {groups} groups")
    if zero is not None:
        _check_tensor("zero", zero, _UINT8, scale.shape)


def _check_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> None:
    if x.dim() == 0:
        raise ValueError("x: shape [] is not [..., K]")
    _check_tensor("x", x, _FLOATS, x.shape)
    _check_weight(packed, scale, zero, bits, x.shape[-1])
    if bias is not None:
        _check_tensor("bias", bias, _FLOATS, (packed.shape[0],))


def _check_quantize_per_token(x, bits, _symmetric, clip):
    if x.dtype not in _FLOATS or not x.dim() or not x.shape[-1]:
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, expected float32, float16 or bfloat16 [..., K]")
    _check_grid(bits, clip)


def _check_grid(bits, clip):
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: {bits}, expected 2 to 8 for activations")
    if not 0 < clip <= 1:
        raise ValueError(f"clip: {clip}, expected above 0 and at most 1")


def _check_integer_linear(x, x_scale, x_zero, packed, scale, zero, bias, bits, x_bits, _symmetric, clip):
    _check_linear(x, packed, scale, zero, bias, bits)
    _check_grid(x_bits, clip)
    if (x_scale is None) != (x_zero is None):
        raise ValueError("x_scale: goes with x_zero; expected both or neither")
    if x_scale is not None:
        _check_tensor("x_scale", x_scale, (torch.float32,), (1,))
        _check_tensor("x_zero", x_zero, (torch.int32,), (1,))


def _check_gptq_block(running, upper, scale, zero, group, kept, push, bits):
    if bits not in BITS:
        raise ValueError(f"bits: {bits} is not one of {', '.join(map(str, BITS))}")
    for name, tensor in (("running", running), ("scale", scale)):
        if tensor.dim() != 2:
            raise ValueError(f"{name}: shape {list(tensor.shape)} is not [N, {'B' if name == 'running' else 'G'}]")
    n, width = running.shape
    _check_tensor("running", running, (torch.float32,), running.shape)
    _check_tensor("upper", upper, (torch.float32,), (width, width))
    _check_tensor("scale", scale, _FLOATS, (n, scale.shape[1]))
    _check_tensor("group", group, (torch.int64,), (width,))
    if zero is not None:
        _check_tensor("zero", zero, _UINT8, scale.shape)
    if kept is not None:
        _check_tensor("kept", kept, (torch.bool,), running.shape)
    if push is not None:
        _check_tensor("push", push, (torch.float32,), (width, width))


def _check_clip_error(w, scale, zero, bits):
    if bits not in BITS:
        raise ValueError(f"bits: {bits} is not one of {', '.join(map(str, BITS))}")
    for name, tensor in (("w", w), ("scale", scale)):
        if tensor.dim() != 2:
            raise ValueError(f"{name}: shape {list(tensor.shape)} is not [M, {'G' if name == 'w' else 'S'}]")
    _check_tensor("w", w, (torch.float32,), w.shape)
    _check_tensor("scale", scale, (torch.float32,), (w.shape[0], scale.shape[1]))
    if zero is not None:
        _check_tensor("zero", zero, _UINT8, scale.shape)


def _check_groups(group, scale):
    low, high = (int(group.min()), int(group.max())) if group.numel() else (0, 0)
    if group.numel() and not 0 <= low <= high < scale.shape[1]:
        raise ValueError(f"group: entries {low} to {high}, but scale has {scale.shape[1]} columns")


# The outputs, unwritten: what fake tensors answer, and what the native kernels fill.
def _pack_fake(codes, bits):
    return codes.new_empty(codes.shape[0], packed_width(codes.shape[1], bits))


def _unpack_fake(packed, _bits, k):
    return packed.new_empty(packed.shape[0], k)


def _dequantize_fake(packed, _scale, _zero, _bits, k):
    return packed.new_empty(packed.shape[0], k, dtype=torch.float32)


def _linear_fake(x, packed, _scale, _zero, _bias, _bits):
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _quantize_per_token_fake(x, _bits, _symmetric, _clip):
    row = (*x.shape[:-1], 1)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(row, dtype=torch.float32),
        x.new_empty(row, dtype=torch.int32),
    )


def _integer_linear_fake(x, _x_scale, _x_zero, packed, *_):
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _gptq_block_fake(running, _upper, _scale, _zero, _group, _kept, _push, _bits):
    return running.new_empty(running.shape, dtype=torch.uint8), running.new_empty(running.shape)


def _clip_error_fake(_w, scale, _zero, _bits):
    return scale.new_empty(scale.shape)


def _pack_default(codes, bits):
    _check_range(codes, bits)
    return reference.pack(codes, bits)


def _pack_cpu(codes, bits):
    _check_range(codes, bits)
    codes, packed = codes.contiguous(), _pack_fake(codes, bits)
    n, k = codes.shape
    _native_pack(codes.data_ptr(), packed.data_ptr(), n, k, bits, torch.get_num_threads())
    return packed


def _unpack_cpu(packed, bits, k):
    packed, codes = packed.contiguous(), _unpack_fake(packed, bits, k)
    _native_unpack(packed.data_ptr(), codes.data_ptr(), packed.shape[0], k, bits, torch.get_num_threads())
    return codes


def _dequantize_cpu(packed, scale, zero, bits, k):
    w = _dequantize_fake(packed, scale, zero, bits, k)
    n, groups = scale.shape
    packed, scale, zero = packed.contiguous(), scale.contiguous(), zero if zero is None else zero.contiguous()
    _native_dequantize(
        packed.data_ptr(),
        scale.data_ptr(),
        _SCALE_TYPES[scale.dtype],
        0 if zero is None else zero.data_ptr(),
        w.data_ptr(),
        n,
        k,
        groups,
        bits,
        torch.get_num_threads(),
    )
    return w


def _linear_cpu(x, packed, scale, zero, bias, bits):
    k = x.shape[-1]
    m = x.numel() // k
    dtype, x = x.dtype, x.to(torch.float32).contiguous()
    bias = bias if bias is None else bias.to(torch.float32).contiguous()
    if m > _NATIVE_ROWS:
        return F.linear(x, _dequantize_cpu(packed, scale, zero, bits, k), bias).to(dtype)
    y = _linear_fake(x, packed, scale, zero, bias, bits)
    packed, scale, zero = packed.contiguous(), scale.contiguous(), zero if zero is None else zero.contiguous()
    _native_linear(
        x.data_ptr(),
        packed.data_ptr(),
        scale.data_ptr(),
        _SCALE_TYPES[scale.dtype],
        0 if zero is None else zero.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        m,
        packed.shape[0],
        k,
        scale.shape[1],
        bits,
        torch.get_num_threads(),
    )
    return y.to(dtype)


def _integer_matmul(a, b):
    """a [M, K] @ b [N, K].T -> int64 [M, N], exact: float32 operands that hold integers of at most 255."""
    sums = torch.zeros(len(a), len(b), dtype=torch.int64, device=a.device)
    for part, other in zip(a.split(_EXACT, 1), b.split(_EXACT, 1), strict=True):
        sums += (part @ other.T).to(torch.int64)
    return sums


def _integer_linear(x, x_scale, x_zero, packed, scale, zero, bias, bits, x_bits, symmetric, clip):
    if x_scale is None:
        codes, x_scale, x_zero = reference.quantize_per_token(x, x_bits, symmetric, clip)
    else:
        codes = reference.quantize_with(x, x_scale, x_zero, x_bits)
    n, groups = scale.shape
    k = x.shape[-1]
    middle = 2.0 ** (bits - 1) if zero is None else zero[..., None].float()
    w = unpack(packed, bits, k).reshape(n, groups, k // groups).float() - middle
    a = (codes - x_zero).float().reshape(-1, groups, k // groups)
    y = a.new_zeros(len(a), n)
    for g in range(groups):
        y.addcmul_(_integer_matmul(a[:, g], w[:, g]).float(), scale[:, g].float())
    y = y.reshape(*x.shape[:-1], n) * x_scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _gptq_block_default(running, upper, scale, zero, group, kept, push, bits):
    _check_groups(group, scale)
    return reference.gptq_block(running, upper, scale, zero, group, kept, push, bits)


def _gptq_block_cpu(running, upper, scale, zero, group, kept, push, bits):
    _check_groups(group, scale)
    codes, errors = _gptq_block_fake(running, upper, scale, zero, group, kept, push, bits)
    if running.stride(1) != 1:
        running = running.contiguous()
    upper, group, scale = upper.contiguous(), group.contiguous(), scale.to(torch.float32).contiguous()
    zero, kept, push = (None if tensor is None else tensor.contiguous() for tensor in (zero, kept, push))
    _native_gptq_block(
        running.data_ptr(),
        running.stride(0),
        upper.data_ptr(),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        group.data_ptr(),
        0 if kept is None else kept.data_ptr(),
        0 if push is None else push.data_ptr(),
        codes.data_ptr(),
        errors.data_ptr(),
        running.shape[0],
        running.shape[1],
        scale.shape[1],
        bits,
        torch.get_num_threads(),
    )
    return codes, errors


def _clip_error_cpu(w, scale, zero, bits):
    w, scale, zero = w.contiguous(), scale.contiguous(), zero if zero is None else zero.contiguous()
    error = _clip_error_fake(w, scale, zero, bits)
    _native_clip_error(
        w.data_ptr(),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        error.data_ptr(),
        w.shape[0],
        w.shape[1],
        scale.shape[1],
        bits,
        torch.get_num_threads(),
    )
    return error.masked_fill_(scale == 0, torch.inf)


def _save_weight(ctx, inputs, output):  # noqa: ARG001, torch passes it by name
    x, packed, scale, zero, bias, ctx.bits = inputs
    ctx.save_for_backward(packed, scale, zero)
    ctx.k, ctx.x_dtype, ctx.bias_dtype = x.shape[-1], x.dtype, None if bias is None else bias.dtype


def _linear_backward(ctx, grad):
    grad_x, grad_bias = _weight_backward(ctx, grad, ctx.needs_input_grad[0], ctx.needs_input_grad[4])
    return grad_x, None, None, None, grad_bias, None


def _weight_backward(ctx, grad, to_x, to_bias):  # grad [..., N]
    grad_x = grad_bias = None
    if to_x:
        packed, scale, zero = ctx.saved_tensors
        w = dequantize(packed, scale, zero, ctx.bits, ctx.k)  # [N, K]
        grad_x = (grad.float() @ w).to(ctx.x_dtype)
    if to_bias:
        grad_bias = grad.float().reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, grad_bias


def _save_integer(ctx, inputs, output):
    x, _x_scale, _x_zero, packed, scale, zero, bias, bits, *_ = inputs
    _save_weight(ctx, (x, packed, scale, zero, bias, bits), output)


def _integer_backward(ctx, grad):
    needed = ctx.needs_input_grad
    grad_x, grad_bias = _weight_backward(ctx, grad, needed[0], needed[6])
    return grad_x, None, None, None, None, None, grad_bias, None, None, None, None


_library = torch.library.Library("remanence", "DEF")


def _define(schema: str, check: Callable, default: Callable, cpu: Callable, fake: Callable) -> None:
    """Every implementation checks first: anyone may call the op, and the kernels trust their addresses."""

    def checked(implementation: Callable) -> Callable:
        def op(*args):
            check(*args)
            return implementation(*args)

        return op

    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, checked(default), "CompositeExplicitAutograd")
    _library.impl(name, checked(cpu), "CPU")
    _library.impl(name, checked(fake), "Meta")


_define("pack(Tensor codes, int bits) -> Tensor", _check_codes, _pack_default, _pack_cpu, _pack_fake)
_define(
    "unpack(Tensor packed, int bits, SymInt k) -> Tensor",
    _check_packed,
    reference.unpack,
    _unpack_cpu,
    _unpack_fake,
)
_define(
    "dequantize(Tensor packed, Tensor scale, Tensor? zero, int bits, SymInt k) -> Tensor",
    _check_weight,
    reference.dequantize,
    _dequantize_cpu,
    _dequantize_fake,
)
_define(
    "w4a16_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, int bits) -> Tensor",
    _check_linear,
    reference.w4a16_linear,
    _linear_cpu,
    _linear_fake,
)
_define(
    "quantize_per_token(Tensor x, int bits, bool symmetric, float clip) -> (Tensor, Tensor, Tensor)",
    _check_quantize_per_token,
    reference.quantize_per_token,
    reference.quantize_per_token,
    _quantize_per_token_fake,
)
_define(
    "integer_linear(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor packed, Tensor scale, Tensor? zero, "
    "Tensor? bias, int bits, int x_bits, bool symmetric, float clip) -> Tensor",
    _check_integer_linear,
    _integer_linear,
    _integer_linear,
    _integer_linear_fake,
)
_define(
    "gptq_block(Tensor running, Tensor upper, Tensor scale, Tensor? zero, Tensor group, Tensor? kept, Tensor? push, "
    "int bits) -> (Tensor, Tensor)",
    _check_gptq_block,
    _gptq_block_default,
    _gptq_block_cpu,
    _gptq_block_fake,
)
_define(
    "clip_error(Tensor w, Tensor scale, Tensor? zero, int bits) -> Tensor",
    _check_clip_error,
    reference.clip_error,
    _clip_error_cpu,
    _clip_error_fake,
)
torch.library.register_autograd("remanence::w4a16_linear", _linear_backward, setup_context=_save_weight, lib=_library)
torch.library.register_autograd(
    "remanence::integer_linear", _integer_backward, setup_context=_save_integer, lib=_library
)
