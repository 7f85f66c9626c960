"""The native kernels (csrc/) behind the ops on a CPU. Everything was checked before (checks.py).

Each function takes the arguments of the op it is named for.
"""

import torch
import torch.nn.functional as F

from . import _C, reference, shapes
from .checks import SCALE_TYPES, check_groups, check_range


def _at(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _type(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else SCALE_TYPES[tensor.dtype]


def pack(codes, bits):
    check_range(codes, bits)
    codes, packed = codes.contiguous(), shapes.pack(codes, bits)
    n, k = codes.shape
    _C.pack(codes.data_ptr(), packed.data_ptr(), n, k, bits, torch.get_num_threads())
    return packed


def unpack(packed, bits, k):
    packed, codes = packed.contiguous(), shapes.unpack(packed, bits, k)
    _C.unpack(packed.data_ptr(), codes.data_ptr(), packed.shape[0], k, bits, torch.get_num_threads())
    return codes


def _stored(packed, scale, zero) -> tuple[tuple, tuple[int, int, int, int]]:
    """Contiguous, and their addresses: the tensors have to outlive the call."""
    tensors = packed.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous()
    return tensors, (tensors[0].data_ptr(), tensors[1].data_ptr(), SCALE_TYPES[scale.dtype], _at(tensors[2]))


def dequantize(packed, scale, zero, bits, k):
    w = shapes.dequantize(packed, scale, zero, bits, k)
    n, groups = scale.shape
    _kept, weight = _stored(packed, scale, zero)
    _C.dequantize(*weight, w.data_ptr(), n, k, groups, bits, torch.get_num_threads())
    return w


def in_large_pages(unwritten: torch.Tensor) -> torch.Tensor:
    """The same tensor; Linux is asked for pages in which memory that is often read whole is read faster."""
    _C.large_pages(unwritten.data_ptr(), unwritten.nbytes)
    return unwritten


def prepack(packed, scale, zero, bits, k):
    blocks = in_large_pages(shapes.prepack(packed, scale, zero, bits, k))
    n, groups = scale.shape
    _kept, weight = _stored(packed, scale, zero)
    _C.prepack(*weight, blocks.data_ptr(), n, k, groups, bits, torch.get_num_threads())
    return blocks


def unprepack(blocks, n, k, groups, bits, scale_type, zero):
    blocks, stored = blocks.contiguous(), shapes.unprepack(blocks, n, k, groups, bits, scale_type, zero)
    packed, scale, zeros = stored
    _C.unprepack(
        blocks.data_ptr(),
        packed.data_ptr(),
        scale.data_ptr(),
        scale_type,
        zeros.data_ptr() if zero else 0,
        n,
        k,
        groups,
        bits,
        torch.get_num_threads(),
    )
    return stored


def dequantize_prepacked(blocks, n, k, groups, bits, scale_type, zero):
    blocks, w = blocks.contiguous(), shapes.dequantize_prepacked(blocks, n, k, groups, bits, scale_type, zero)
    _C.dequantize_blocks(blocks.data_ptr(), scale_type, zero, w.data_ptr(), n, k, groups, bits, torch.get_num_threads())
    return w


def w4a16_linear(x, packed, scale, zero, bias, bits):
    y = shapes.w4a16_linear(x, packed, scale, zero, bias, bits)
    n, groups = scale.shape
    _kept, weight = _stored(packed, scale, zero)
    return _linear(x, 0, weight, bias, y, n, groups, bits)


def prepacked_linear(x, blocks, bias, n, groups, bits, scale_type, zero):
    y = shapes.prepacked_linear(x, blocks, bias, n)
    blocks = blocks.contiguous()
    return _linear(x, blocks.data_ptr(), (0, 0, scale_type, int(zero)), bias, y, n, groups, bits)


def _linear(x, blocks, weight: tuple[int, int, int, int], bias, y, n, groups, bits):
    x, k = x.contiguous(), x.shape[-1]
    bias = None if bias is None else bias.contiguous()
    _C.linear(
        x.data_ptr(),
        SCALE_TYPES[x.dtype],
        blocks,
        *weight,
        _at(bias),
        _type(bias),
        y.data_ptr(),
        x.numel() // k,
        n,
        k,
        groups,
        bits,
        torch.get_num_threads(),
    )
    return y


def integer_linear(x, x_scale, x_zero, packed, scale, zero, bias, bits, x_bits, grid, clip):
    y = shapes.integer_linear(x, x_scale, x_zero, packed)
    n, groups = scale.shape
    _kept, weight = _stored(packed, scale, zero)
    return _integer_linear(x, x_scale, x_zero, 0, weight, bias, y, n, groups, bits, x_bits, grid, clip)


def prepacked_integer_linear(x, x_scale, x_zero, blocks, bias, n, groups, bits, scale_type, zero, x_bits, grid, clip):
    y = shapes.prepacked_integer_linear(x, x_scale, x_zero, blocks, bias, n)
    blocks = blocks.contiguous()
    weight = (0, 0, scale_type, int(zero))
    address = blocks.data_ptr()
    return _integer_linear(x, x_scale, x_zero, address, weight, bias, y, n, groups, bits, x_bits, grid, clip)


def _integer_linear(
    x, x_scale, x_zero, blocks, weight: tuple[int, int, int, int], bias, y, n, groups, bits, x_bits, grid, clip
):
    x, k = x.contiguous(), x.shape[-1]
    bias = None if bias is None else bias.contiguous()
    _C.integer_linear(
        x.data_ptr(),
        SCALE_TYPES[x.dtype],
        blocks,
        *weight,
        _at(bias),
        _type(bias),
        y.data_ptr(),
        x.numel() // k,
        n,
        k,
        groups,
        bits,
        x_bits,
        grid,
        clip,
        _at(x_scale),
        _at(x_zero),
        torch.get_num_threads(),
    )
    return y


# Rows of x above which torch's product with a tile of the weight, expanded, is faster; measured on AVX2.
_ROWS24 = 16
_TILE24 = 256  # rows of the weight


def sparse24_linear(x, compressed, bitmask, bias):
    x, compressed, bitmask = x.contiguous(), compressed.contiguous(), bitmask.contiguous()
    y, k = shapes.sparse24_linear(x, compressed, bitmask, bias), x.shape[-1]
    m, n = x.numel() // k, compressed.shape[0]
    if m > _ROWS24:
        return _in_tiles(x, compressed, bitmask, bias, y)
    bias = None if bias is None else bias.contiguous()
    _C.sparse24_linear(
        x.data_ptr(),
        SCALE_TYPES[x.dtype],
        compressed.data_ptr(),
        SCALE_TYPES[compressed.dtype],
        bitmask.data_ptr(),
        _at(bias),
        _type(bias),
        y.data_ptr(),
        m,
        n,
        k,
        torch.get_num_threads(),
    )
    return y


def _in_tiles(x, compressed, bitmask, bias, y):
    """Fills y [..., N] by torch's own products, in bfloat16 where all is in it and the processor multiplies it."""
    k, n = x.shape[-1], compressed.shape[0]
    dtypes = {tensor.dtype for tensor in (x, compressed, bias) if tensor is not None}
    dtype = torch.bfloat16 if dtypes == {torch.bfloat16} and _C.isa() == "avx512_bf16" else torch.float32
    rows, out = x.reshape(-1, k).to(dtype), y.view(x.numel() // k, n)
    bias = None if bias is None else bias.to(dtype)
    w = x.new_empty(min(_TILE24, n), k, dtype=torch.float32)
    # Not in autocast's lower precision: the product has the dtypes that it was given.
    with torch.autocast("cpu", enabled=False):
        _fill(out, rows, w, compressed, bitmask, bias)
    return y


def _fill(out, rows, w, compressed, bitmask, bias):
    n, k, dtype = out.shape[1], rows.shape[1], rows.dtype
    for first in range(0, n, _TILE24):
        values, bits = compressed[first : first + _TILE24], bitmask[first : first + _TILE24]
        count = len(values)
        _C.expand24(
            values.data_ptr(),
            SCALE_TYPES[values.dtype],
            bits.data_ptr(),
            w.data_ptr(),
            count,
            k,
            torch.get_num_threads(),
        )
        part = slice(first, first + count)
        out[:, part] = F.linear(rows, w[:count].to(dtype), None if bias is None else bias[part])


def quantize_per_token(x, bits, grid, clip):
    x, (codes, scale, zero) = x.contiguous(), shapes.quantize_per_token(x, bits, grid, clip)
    k = x.shape[-1]
    _C.quantize_per_token(
        x.data_ptr(),
        SCALE_TYPES[x.dtype],
        x.numel() // k,
        k,
        bits,
        grid,
        clip,
        codes.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, scale, zero


def hadamard(x):
    if x.dtype == torch.float64:  # matrices are made in it, and are made once
        return reference.hadamard(x)
    x, y = x.contiguous(), shapes.hadamard(x)
    n = x.shape[-1]
    _C.hadamard(x.data_ptr(), SCALE_TYPES[x.dtype], y.data_ptr(), x.numel() // n, n, torch.get_num_threads())
    return y


def gptq_block(running, upper, scale, zero, group, kept, push, bits):
    check_groups(group, scale)
    codes, errors = shapes.gptq_block(running, upper, scale, zero, group, kept, push, bits)
    if running.stride(1) != 1:
        running = running.contiguous()
    upper, group, scale = upper.contiguous(), group.contiguous(), scale.to(torch.float32).contiguous()
    zero, kept, push = (None if tensor is None else tensor.contiguous() for tensor in (zero, kept, push))
    _C.gptq_block(
        running.data_ptr(),
        running.stride(0),
        upper.data_ptr(),
        scale.data_ptr(),
        _at(zero),
        group.data_ptr(),
        _at(kept),
        _at(push),
        codes.data_ptr(),
        errors.data_ptr(),
        running.shape[0],
        running.shape[1],
        scale.shape[1],
        bits,
        torch.get_num_threads(),
    )
    return codes, errors


def clip_error(w, scale, zero, bits):
    w, scale, zero = w.contiguous(), scale.contiguous(), zero if zero is None else zero.contiguous()
    error = shapes.clip_error(w, scale, zero, bits)
    _C.clip_error(
        w.data_ptr(),
        scale.data_ptr(),
        _at(zero),
        error.data_ptr(),
        w.shape[0],
        w.shape[1],
        scale.shape[1],
        bits,
        torch.get_num_threads(),
    )
    return error.masked_fill_(scale == 0, torch.inf)
