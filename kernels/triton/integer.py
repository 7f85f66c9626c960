"""y = x @ w.T where both are integers: int8 codes of x times packed codes of w, summed exactly.

Shapes: a int8 [M, K], the codes of x, with scale float32 and zero int32 [M] (or [1], for all rows); packed uint8
[N, row_bytes] with scale [N, G] and zero uint8 [N, G] by strides; y [M, N]. Codes of w are moved to the middle of their
range (w' = code - 2^(bits-1), z' = zero - 2^(bits-1)), so that eight bits fit int8, and four run on the same units:

    sum (a - az)(w' - z') = sum a w'  -  az sum w'  -  z' sum (a - az)

A step of k lies in one group and has at most 128 codes: each of these terms, and what they add up to, is below 2^24 and
exact in float32. With one scale for a whole row all stays in int32 to the end of a program's range, which is at most
MAX_RANGE codes, so that 255 * 255 times it is below 2^31.
"""

import triton
import triton.language as tl

from .tiles import load_codes, load_column

MAX_RANGE = 32768


@triton.jit
def integer_kernel(
    a_ptr,
    a_scale_ptr,
    a_zero_ptr,
    a_sums_ptr,  # int32 [M, steps]: sum (a - az) over a step; read where w has zero points
    q_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,  # [N]
    out_ptr,  # [M, N], or float32 [SPLITS, M, N]
    M,
    N,
    K,
    row_bytes,
    scale_n,
    scale_g,
    zero_n,
    zero_g,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,  # w has zero points
    SHIFTED: tl.constexpr,  # x has
    ROW_STEP: tl.constexpr,  # 1: a_scale and a_zero are of rows; 0: one for all
    HAS_BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides GROUP
    ONE_GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y.T = w @ a.T, as in weight_only.gemm_kernel: Hopper's units take w from the registers it is made in."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    safe = tl.minimum(rows, N - 1).to(tl.int64)  # what is beyond the last reads the last, and is not stored
    safe_m = tl.minimum(cols, M - 1).to(tl.int64)
    a_line = a_ptr + safe_m[None, :] * K
    PER_GROUP: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K
    steps = (K // GROUP) * PER_GROUP
    each = tl.cdiv(steps, SPLITS)
    first = tl.program_id(2) * each
    a_zero = tl.zeros((BLOCK_M,), tl.int32)
    if SHIFTED:
        a_zero = tl.load(a_zero_ptr + safe_m * ROW_STEP)
    exact = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    w_sum = tl.zeros((BLOCK_N,), tl.int32)
    a_sum = tl.zeros((BLOCK_M,), tl.int32)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(first, tl.minimum(first + each, steps)):
        group = step // PER_GROUP
        inner = step % PER_GROUP
        if EVEN:
            start, first_byte = step * BLOCK_K, step * (BLOCK_K * BITS // 8)
        else:
            start = group * GROUP + inner * BLOCK_K
            first_byte = group * (GROUP * BITS // 8) + inner * (BLOCK_K * BITS // 8)
        w = _to_int8(load_codes(q_ptr, safe, row_bytes, start, first_byte, BITS, BLOCK_K, ALIGNED, EVEN), BITS)
        k = tl.arange(0, BLOCK_K)
        if EVEN:
            a = tl.load(a_line + (start + k)[:, None])
        else:
            left = GROUP - inner * BLOCK_K
            a = tl.load(a_line + (start + k)[:, None], mask=k[:, None] < left, other=0)
            if SHIFTED:
                w = tl.where(k[None, :] < left, w, 0).to(tl.int8)
        a_step = tl.zeros((BLOCK_M,), tl.int32)
        if HAS_ZERO:
            a_step = tl.load(a_sums_ptr + safe_m * steps + step)
        if ONE_GROUP:
            exact = tl.dot(w, a, exact)
            a_sum += a_step
            if SHIFTED:
                w_sum += tl.sum(w.to(tl.int32), 1)
        else:
            part = _to_float(tl.dot(w, a))
            if SHIFTED:
                part -= tl.sum(w.to(tl.int32), 1).to(tl.float32)[:, None] * a_zero.to(tl.float32)[None, :]
            if HAS_ZERO:
                zero = _centred(load_column(zero_ptr, safe, group, zero_n, zero_g), BITS)
                part -= zero.to(tl.float32)[:, None] * a_step.to(tl.float32)[None, :]
            acc += part * load_column(scale_ptr, safe, group, scale_n, scale_g).to(tl.float32)[:, None]
    if ONE_GROUP:
        if SHIFTED:
            exact -= w_sum[:, None] * a_zero[None, :]
        if HAS_ZERO:
            exact -= _centred(load_column(zero_ptr, safe, 0, zero_n, zero_g), BITS)[:, None] * a_sum[None, :]
        acc = exact.to(tl.float32) * load_column(scale_ptr, safe, 0, scale_n, scale_g).to(tl.float32)[:, None]
    # A row that is not finite has codes of 0 and a scale that says so.
    acc *= tl.load(a_scale_ptr + safe_m * ROW_STEP)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + safe).to(tl.float32)[:, None]
    out = out_ptr + (tl.program_id(2) * M + cols).to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (cols < M)[None, :])


@triton.jit
def step_sums_kernel(
    a_ptr,
    a_zero_ptr,
    sums_ptr,
    K,
    GROUP: tl.constexpr,
    ROW_STEP: tl.constexpr,
    STEPS: tl.constexpr,  # steps a program adds up, a power of two
    BLOCK_K: tl.constexpr,
):
    """a int8 [M, K], its zero int32 [M] or [1] -> int32 [M, steps]: sum (a - zero) over each step of integer_kernel."""
    m = tl.program_id(0).to(tl.int64)
    PER_GROUP: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K
    steps = (K // GROUP) * PER_GROUP
    step = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    inner = (step % PER_GROUP * BLOCK_K)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    inside = (inner < GROUP) & (step < steps)[:, None]
    at = (step // PER_GROUP * GROUP)[:, None] + inner
    a = tl.load(a_ptr + m * K + at, mask=inside, other=0).to(tl.int32)
    a = tl.where(inside, a - tl.load(a_zero_ptr + m * ROW_STEP), 0)
    tl.store(sums_ptr + m * steps + step, tl.sum(a, 1), mask=step < steps)


@triton.jit
def _centred(zero, BITS: tl.constexpr):
    return zero.to(tl.int32) - (1 << (BITS - 1))


@triton.jit
def _to_int8(codes, BITS: tl.constexpr):
    """uint8 0 .. 2^BITS - 1 -> int8, around 0."""
    if BITS == 8:
        return (codes ^ 128).to(tl.int8, bitcast=True)
    else:
        return codes.to(tl.int8, bitcast=True) - (1 << (BITS - 1))


@triton.jit
def _to_float(sums):
    """int32 below 2^22 in size -> float32, exact; as tiles.centre, and for its reason."""
    return (sums + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
