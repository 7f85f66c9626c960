"""Rows of x as integers of up to eight bits: the Triton form of reference.quantize_per_token and quantize_with.

To the bit: divisions are rounded as IEEE has it, nothing is contracted (launched without fused multiply-add), and ties
go to even. Shapes: x [M, K] by its row stride; codes int8 [M, K]; scale float32 [M] and zero int32 [M].
"""

import triton
import triton.language as tl

from .. import reference

ASYMMETRIC, SYMMETRIC, NARROW = map(tl.constexpr, (reference.ASYMMETRIC, reference.SYMMETRIC, reference.NARROW))


@triton.jit
def quantize_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    K,
    stride_x,
    clip,
    BITS: tl.constexpr,
    GRID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its least and largest, then its codes; the second reading comes from the cache."""
    m = tl.program_id(0).to(tl.int64)
    line = x_ptr + m * stride_x
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    nan = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(line + k, mask=k < K, other=0.0).to(tl.float32)
        low, high = tl.minimum(low, x), tl.maximum(high, x)
        nan |= (x != x).to(tl.int32)
    # minimum and maximum pass over a NaN; the reference does not.
    missing = tl.where(tl.max(nan, 0) > 0, float("nan"), 0.0)
    least, largest = tl.min(low, 0) + missing, tl.max(high, 0) + missing
    top: tl.constexpr = 2.0 ** (BITS - 1) - 1
    bottom: tl.constexpr = -top if GRID == NARROW else -top - 1
    steps: tl.constexpr = top - bottom
    if GRID != ASYMMETRIC:
        most = tl.where(missing == 0, tl.maximum(-least, largest), missing)
        scale = tl.div_rn(clip * most, tl.full((), steps / 2, tl.float32))
        lowest = tl.where(
            most > 0, -most, float("nan")
        )  # this one is rounded by rule, not by the last bit of the scale
    else:
        scale = tl.div_rn(clip * largest - clip * least, tl.full((), steps, tl.float32))
    scale = tl.where(scale == 0, 1.0, scale)
    zero = 0.0
    if GRID == ASYMMETRIC:
        zero = _round(bottom - tl.div_rn(clip * least, scale), BITS)
    tl.store(scale_ptr + m, scale)
    tl.store(zero_ptr + m, tl.cast(zero, tl.int32))
    for start in tl.range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(line + k, mask=k < K, other=0.0).to(tl.float32)
        codes = tl.maximum(_codes(x, scale, zero, BITS), bottom)
        if GRID == SYMMETRIC:
            codes = tl.where(x == lowest, bottom, codes)
        tl.store(codes_ptr + m * K + k, codes.to(tl.int8), mask=k < K)


@triton.jit
def quantize_with_kernel(x_ptr, codes_ptr, scale_ptr, zero_ptr, K, stride_x, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """A part of a row, on the grid of scale float32 [1] and zero int32 [1]."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + m * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
    codes = _codes(x, tl.load(scale_ptr), tl.load(zero_ptr).to(tl.float32), BITS)
    tl.store(codes_ptr + m * K + k, codes.to(tl.int8), mask=k < K)


@triton.jit
def _codes(x, scale, zero, BITS: tl.constexpr):
    return _round(tl.div_rn(x, tl.zeros_like(x) + scale) + zero, BITS)


@triton.jit
def _round(value, BITS: tl.constexpr):
    """To the nearest integer that int8's part of BITS bits holds, ties to even; what is no number becomes 0.

    Bounds are integers, so that clamping first gives the same; then 1.5 * 2^23 leaves no bit for a fraction.
    """
    value = tl.where(value == value, value, 0.0)
    value = tl.minimum(tl.maximum(value, -(2.0 ** (BITS - 1))), 2.0 ** (BITS - 1) - 1)
    return (value + 12582912.0) - 12582912.0
