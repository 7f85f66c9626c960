"""y = x @ w.T for a packed weight and a few rows of x: the weight is read once, and centred codes are multiplied.

Shapes: x [M, K]; packed uint8 [N, row_bytes]; scale [N, G] and zero uint8 [N, G], both by strides; y [M, N].
A product over a step of k that lies in one group is of exact numbers (code - zero); its sum, in float32, is what the
scale is put on. Several programs may share a tile of y, each a range of k (`SPLITS`): they write float32 sums
[SPLITS, M, N], which `add_splits` adds in order, so that two runs give the same bits.
"""

import triton
import triton.language as tl

from .tiles import centre, load_codes, load_column


@triton.jit
def gemv_kernel(
    x_ptr,  # [K]
    q_ptr,  # int32 [N, row_words]
    scale_ptr,
    zero_ptr,
    bias_ptr,  # [N]
    out_ptr,  # [N] in x's dtype, or float32 [SPLITS, N]
    N,
    K,
    row_words,
    scale_n,
    scale_g,
    zero_n,
    zero_g,
    GROUP: tl.constexpr,  # a whole number of words, or K
    BITS: tl.constexpr,  # 2, 4 or 8
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides K
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row of x, of any dtype, on the ordinary units in float32: the weight's bytes are what takes time.

    A word holds codes of one group. They are taken out one after another, the i-th of every word in the same turn, so
    that nothing is reordered: x comes from the cache, in steps of a word.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    safe = tl.minimum(rows, N - 1).to(tl.int64)  # a row beyond the last reads the last, and is not stored
    PER_WORD: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = BLOCK_K // PER_WORD
    acc = tl.zeros((BLOCK_N, WORDS), tl.float32)
    steps = tl.cdiv(K, BLOCK_K)
    each = tl.cdiv(steps, SPLITS)
    first = tl.program_id(1) * each
    for step in tl.range(first, tl.minimum(first + each, steps)):
        word = step * WORDS + tl.arange(0, WORDS)
        k = word * PER_WORD
        at = q_ptr + safe[:, None] * row_words + word[None, :]
        if EVEN:
            q = tl.load(at, eviction_policy="evict_first")
            group = k // GROUP
        else:
            q = tl.load(at, mask=word[None, :] < row_words, other=0, eviction_policy="evict_first")
            group = tl.minimum(k, K - 1) // GROUP
        q = q.to(tl.uint32, bitcast=True)
        zero = 0
        if HAS_ZERO:
            zero = tl.load(zero_ptr + safe[:, None] * zero_n + group[None, :] * zero_g)
        part = tl.zeros((BLOCK_N, WORDS), tl.float32)
        for i in tl.static_range(PER_WORD):
            x = tl.load(x_ptr + k + i) if EVEN else tl.load(x_ptr + k + i, mask=k + i < K, other=0.0)
            code = (q >> (BITS * i)) & ((1 << BITS) - 1)
            part += centre(code, zero, BITS, HAS_ZERO, tl.float32) * x.to(tl.float32)[None, :]
        scale = tl.load(scale_ptr + safe[:, None] * scale_n + group[None, :] * scale_g)
        acc += part * scale.to(tl.float32)
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + safe).to(tl.float32)
    out = out_ptr + tl.program_id(1).to(tl.int64) * N + rows
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=rows < N)


@triton.jit
def gemm_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,  # [N]
    out_ptr,  # [M, N] in x's dtype, or float32 [SPLITS, M, N]
    M,
    N,
    K,
    stride_x,
    row_bytes,
    scale_n,
    scale_g,
    zero_n,
    zero_g,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides GROUP
    ONE_GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Some rows of x in float16 or bfloat16, on the matrix units, as y.T = w @ x.T: w, made in registers, is then the
    operand that Hopper's wgmma takes from there, and a tile may have as few columns as there are rows of x."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    safe = tl.minimum(rows, N - 1).to(tl.int64)  # what is beyond the last reads the last, and is not stored
    x_line = x_ptr + tl.minimum(cols, M - 1).to(tl.int64)[None, :] * stride_x
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    PER_GROUP: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K
    steps = (K // GROUP) * PER_GROUP
    each = tl.cdiv(steps, SPLITS)
    first = tl.program_id(2) * each
    for step in tl.range(first, tl.minimum(first + each, steps)):
        group = step // PER_GROUP
        inner = step % PER_GROUP
        if EVEN:
            start, first_byte = step * BLOCK_K, step * (BLOCK_K * BITS // 8)
        else:
            start = group * GROUP + inner * BLOCK_K
            first_byte = group * (GROUP * BITS // 8) + inner * (BLOCK_K * BITS // 8)
        codes = load_codes(q_ptr, safe, row_bytes, start, first_byte, BITS, BLOCK_K, ALIGNED, EVEN)
        k = tl.arange(0, BLOCK_K)[:, None]
        if EVEN:
            x = tl.load(x_line + (start + k), eviction_policy="evict_last")
        else:
            x = tl.load(x_line + (start + k), mask=inner * BLOCK_K + k < GROUP, other=0.0, eviction_policy="evict_last")
        zero = 0
        if HAS_ZERO:
            zero = load_column(zero_ptr, safe, group, zero_n, zero_g)[:, None]
        w = centre(codes, zero, BITS, HAS_ZERO, x_ptr.dtype.element_ty)
        if ONE_GROUP:
            acc = tl.dot(w, x, acc)
        else:
            acc += tl.dot(w, x) * load_column(scale_ptr, safe, group, scale_n, scale_g).to(tl.float32)[:, None]
    if ONE_GROUP:
        acc *= load_column(scale_ptr, safe, 0, scale_n, scale_g).to(tl.float32)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + safe).to(tl.float32)[:, None]
    out = out_ptr + (tl.program_id(2) * M + cols).to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (cols < M)[None, :])


@triton.jit
def add_splits_kernel(
    part_ptr, bias_ptr, out_ptr, SIZE, N, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """part float32 [SPLITS, M, N], bias [N] -> out [M, N]; SIZE = M * N. Always in the same order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(SPLITS):
        total += tl.load(part_ptr + at, mask=inside, other=0.0)
        part_ptr += SIZE
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)
