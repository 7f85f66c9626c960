"""The Walsh-Hadamard transform of the last dimension, orthonormal: y = x @ H / sqrt(n), n a power of two.

H is that of Sylvester, in natural order: H[i, j] = (-1)^popcount(i & j). log2(n) times the sum and the difference of
elements that lie 1, 2, 4, ... apart, in float32 (Fino and Algazi, 1976), in the registers of one program.
"""

import triton
import triton.language as tl


@triton.jit
def hadamard_kernel(x_ptr, out_ptr, M, stride_x, factor, N: tl.constexpr, LOG_N: tl.constexpr, ROWS: tl.constexpr):
    """x [M, N] by its row stride -> out [M, N] in the same dtype; factor float32, 1 / sqrt(N)."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, N)
    inside = (m < M)[:, None]
    line = m.to(tl.int64)[:, None]
    x = tl.load(x_ptr + line * stride_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
    for _ in tl.static_range(LOG_N):
        # The lowest bit of the index is taken, and comes back as the highest: after all turns each is in its place.
        first, second = tl.split(x.reshape(ROWS, N // 2, 2))
        x = tl.permute(tl.join(first + second, first - second), (0, 2, 1)).reshape(ROWS, N)
    tl.store(out_ptr + line * N + column[None, :], (x * factor).to(out_ptr.dtype.element_ty), mask=inside)
