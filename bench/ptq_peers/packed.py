"""From the packed checkpoints of GPTQ and AWQ back to dense weights: (code - zero) * scale, in float32.

Words are int32. A row of b-bit codes is one stream of bits, the lowest first; a 3-bit code may lie across two words.
torch only: the scripts beside this file run where remanence is not installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of 8 4-bit columns lies; other widths are in order


def codes(words: Tensor, bits: int) -> Tensor:
    """[n, m] int32 words to [n, 32 m / bits] int64 codes."""
    words = words.long() & 0xFFFFFFFF
    start = torch.arange(words.shape[1] * 32 // bits) * bits
    word, shift = start // 32, start % 32
    low = words[:, word] >> shift
    following = (word + 1).clamp(max=words.shape[1] - 1)  # the last code ends with its word
    high = words[:, following] << (32 - shift)
    return (low | torch.where(shift + bits > 32, high, 0)) & (2**bits - 1)


def decode_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_of: Tensor, bits: int) -> Tensor:
    """[N, K] float32 from the first GPTQ format, which stores each zero less one.

    qweight [K bits/32, N], qzeros [G, N bits/32] int32; scales [G, N] float16; group_of [K]: g_idx
    """
    q = codes(qweight.T, bits)  # [N, K]
    zero = (codes(qzeros, bits) + 1) & (2**bits - 1)  # [G, N]
    group = group_of.long()
    return (q - zero.T[:, group]).float() * scales.float().T[:, group]


def decode_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int) -> Tensor:
    """[N, K] float32 from AWQ's "gemm" format: qweight [K, N bits/32], qzeros [G, N bits/32] int32, scales [G, N]."""
    q, zero = codes(qweight, bits), codes(qzeros, bits)  # [K, N], [G, N]
    if bits == 4:
        columns = torch.arange(q.shape[1]).view(-1, 8)[:, list(_AWQ_ORDER)].flatten()
        q, zero = q[:, columns], zero[:, columns]
    group = torch.arange(len(q)) // (len(q) // len(zero))  # [K]
    return ((q - zero[group]).float() * scales.float()[group]).T
