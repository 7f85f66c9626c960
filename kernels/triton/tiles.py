"""Packed codes as tiles in registers: what every kernel here begins with.

A row of `packed` is one little-endian stream of bits (reference.py). Where a tile begins on a whole unit of it, the
bytes are loaded as they lie and split in registers; elsewhere each code is fetched by its own address.
"""

import triton
import triton.language as tl


@triton.jit
def load_codes(
    q_ptr,
    rows,
    row_bytes,
    start,
    first_byte,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """rows int64 [R] -> codes uint8 [R, BLOCK] of k = start .. start + BLOCK - 1.

    ALIGNED  start is a multiple of 8 codes, and first_byte = start * BITS / 8
    EVEN     the tile ends within the row; else what lies beyond it reads as 0
    """
    line = q_ptr + rows[:, None] * row_bytes
    if not ALIGNED:
        codes = _by_address(line, row_bytes, start, BITS, BLOCK)
    elif BITS == 3:
        codes = _by_threes(line, row_bytes, first_byte, BLOCK)
    else:
        codes = _by_bytes(line, row_bytes, first_byte, BITS, BLOCK, EVEN)
    return codes


@triton.jit
def _by_bytes(line, row_bytes, first_byte, BITS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    byte = first_byte + tl.arange(0, BLOCK * BITS // 8)[None, :]
    if EVEN:
        q = tl.load(line + byte, eviction_policy="evict_first")
    else:
        q = tl.load(line + byte, mask=byte < row_bytes, other=0, eviction_policy="evict_first")
    if BITS == 4:
        q = tl.join(q & 15, q >> 4).reshape(q.shape[0], BLOCK)
    elif BITS == 2:
        even, odd = tl.join(q & 3, (q >> 4) & 3), tl.join((q >> 2) & 3, q >> 6)
        q = tl.join(even, odd).reshape(q.shape[0], BLOCK)
    return q


@triton.jit
def _by_threes(line, row_bytes, first_byte, BLOCK: tl.constexpr):
    """Eight codes of 3 bits lie in three bytes."""
    byte = first_byte + 3 * tl.arange(0, BLOCK // 8)[None, :]
    word = tl.load(line + byte, mask=byte < row_bytes, other=0).to(tl.int32)
    word |= tl.load(line + byte + 1, mask=byte + 1 < row_bytes, other=0).to(tl.int32) << 8
    word |= tl.load(line + byte + 2, mask=byte + 2 < row_bytes, other=0).to(tl.int32) << 16
    # join puts its two arguments at the last place: the last join is the lowest bit of a code's number.
    q04, q15 = tl.join(word, word >> 12), tl.join(word >> 3, word >> 15)
    q26, q37 = tl.join(word >> 6, word >> 18), tl.join(word >> 9, word >> 21)
    codes = tl.join(tl.join(q04, q26), tl.join(q15, q37))
    return (codes & 7).to(tl.uint8).reshape(word.shape[0], BLOCK)


@triton.jit
def _by_address(line, row_bytes, start, BITS: tl.constexpr, BLOCK: tl.constexpr):
    bit = (start + tl.arange(0, BLOCK)[None, :]) * BITS
    byte = bit >> 3
    word = tl.load(line + byte, mask=byte < row_bytes, other=0).to(tl.int32)
    if BITS == 3:
        word |= tl.load(line + byte + 1, mask=byte + 1 < row_bytes, other=0).to(tl.int32) << 8
    return ((word >> (bit & 7)) & ((1 << BITS) - 1)).to(tl.uint8)


@triton.jit
def centre(codes, zero, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """codes uint8 minus zero uint8 (or the middle, 2^(BITS-1)) in DTYPE, exact and without a conversion.

    An integer written into the low bits of 2^m, m the bits of the mantissa, is 2^m + integer: converting takes four
    times as long as the `or` and the subtraction, in which 2^m cancels.
    """
    if tl.float16 == DTYPE:
        return _shifted(codes, tl.int16, 0x6400, tl.float16) - _middle(
            zero, BITS, HAS_ZERO, 1024.0, tl.int16, 0x6400, DTYPE
        )
    # bfloat16 has seven bits: codes of eight take the way of float32, and are exact again when rounded.
    elif tl.bfloat16 == DTYPE and BITS < 8:
        return _shifted(codes, tl.int16, 0x4300, tl.bfloat16) - _middle(
            zero, BITS, HAS_ZERO, 128.0, tl.int16, 0x4300, DTYPE
        )
    else:
        number = _shifted(codes, tl.int32, 0x4B000000, tl.float32)
        return (number - _middle(zero, BITS, HAS_ZERO, 8388608.0, tl.int32, 0x4B000000, tl.float32)).to(DTYPE)


@triton.jit
def _shifted(codes, INTEGER: tl.constexpr, ONE: tl.constexpr, DTYPE: tl.constexpr):
    return (codes.to(INTEGER) | ONE).to(DTYPE, bitcast=True)


@triton.jit
def _middle(
    zero,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BASE: tl.constexpr,
    INTEGER: tl.constexpr,
    ONE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    if HAS_ZERO:
        return _shifted(zero, INTEGER, ONE, DTYPE)
    else:
        return tl.full((), BASE + (1 << (BITS - 1)), DTYPE)


@triton.jit
def load_column(ptr, rows, group, stride_n, stride_g):
    """Scales or zero points of one group: rows int64 [R] -> [R]."""
    return tl.load(ptr + rows * stride_n + group * stride_g)
