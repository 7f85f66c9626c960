"""w = (code - zero) * scale, written out: for products in which the weight is used often enough to be worth it.

Shapes: packed uint8 [N, row_bytes]; scale [N, G] and zero uint8 [N, G] by strides; w [N, K], computed in
float32 and rounded once to the output's dtype.
"""

import triton
import triton.language as tl

from .tiles import centre, load_codes


@triton.jit
def dequantize_kernel(
    q_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    N,
    K,
    row_bytes,
    scale_n,
    scale_g,
    zero_n,
    zero_g,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_K
    k = start + tl.arange(0, BLOCK_K)
    safe = tl.minimum(rows, N - 1).to(tl.int64)
    group = tl.minimum(k, K - 1) // GROUP
    first_byte = tl.program_id(1) * (BLOCK_K * BITS // 8)
    codes = load_codes(q_ptr, safe, row_bytes, start, first_byte, BITS, BLOCK_K, True, EVEN)
    zero = 0
    if HAS_ZERO:
        zero = tl.load(zero_ptr + safe[:, None] * zero_n + group[None, :] * zero_g)
    scale = tl.load(scale_ptr + safe[:, None] * scale_n + group[None, :] * scale_g).to(tl.float32)
    w = centre(codes, zero, BITS, HAS_ZERO, tl.float32) * scale
    inside = (rows < N)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + safe[:, None] * K + k[None, :], w.to(out_ptr.dtype.element_ty), mask=inside)
