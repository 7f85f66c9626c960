"""Every op in plain torch: the definition of correct, and the implementation where no kernel exists.

Shapes: N output features, K input features, G groups a row (group size K / G), M rows of x.
A row of `packed` is one stream of bits, lowest first: code i is bits i*bits .. (i+1)*bits - 1. Rows are
padded with zeros to whole int32 words.
"""

import torch
import torch.nn.functional as F


def packed_width(k: int, bits: int) -> int:
    """Bytes in a packed row of `k` codes: whole int32 words, as compressed-tensors stores them."""
    return 4 * ((k * bits + 31) // 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes uint8 [N, K] -> packed uint8 [N, 4 * ceil(K*bits/32)]."""
    n, k = codes.shape
    width = packed_width(k, bits)
    stream = (codes[..., None] >> _range(bits, codes) & 1).reshape(n, k * bits)
    stream = F.pad(stream, (0, 8 * width - k * bits)).reshape(n, width, 8)
    return (stream << _range(8, codes)).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """packed uint8 [N, 4 * ceil(K*bits/32)] -> codes uint8 [N, K]."""
    n, width = packed.shape
    stream = (packed[..., None] >> _range(8, packed) & 1).reshape(n, 8 * width)
    stream = stream[:, : k * bits].reshape(n, k, bits)
    return (stream << _range(bits, packed)).sum(-1, dtype=torch.uint8)


def dequantize(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, k: int) -> torch.Tensor:
    """packed [N, 4 * ceil(K*bits/32)], scale [N, G], zero uint8 [N, G] or None -> w float32 [N, K]."""
    n, groups = scale.shape
    codes = unpack(packed, bits, k).reshape(n, groups, k // groups).float()
    middle = 2.0 ** (bits - 1) if zero is None else zero[..., None].float()
    return ((codes - middle) * scale[..., None].float()).reshape(n, k)


def w4a16_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """x [..., K] @ w.T + bias [N] -> y [..., N] in x's dtype, computed in float32."""
    w = dequantize(packed, scale, zero, bits, x.shape[-1])
    y = F.linear(x.float(), w, None if bias is None else bias.float())
    return y.to(x.dtype)


def gptq_block(
    running: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group: torch.Tensor,
    kept: torch.Tensor | None,
    push: torch.Tensor | None,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """running float32 [N, B], upper [B, B] -> codes uint8 [N, B], errors float32 [N, B] over upper's diagonal."""
    w = running.clone()
    codes, errors = torch.empty_like(w, dtype=torch.uint8), torch.empty_like(w)
    for i, g in enumerate(group.tolist()):
        s = scale[:, g].float()
        middle = torch.full_like(s, 2 ** (bits - 1)) if zero is None else zero[:, g].float()
        code = ((w[:, i] / s).round() + middle).clamp(0, 2**bits - 1)
        if kept is not None:
            code = torch.where(kept[:, i], code, middle)
        error = (w[:, i] - (code - middle) * s) / upper[i, i]
        change = error[:, None] * upper[i, i + 1 :]
        if push is not None:
            change -= w[:, i, None] * push[i, i + 1 :]
        codes[:, i], errors[:, i] = code.to(torch.uint8), error
        w[:, i + 1 :] -= change
    return codes, errors


def clip_error(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> torch.Tensor:
    """w float32 [M, G], scale [M, S] -> sum of |rounded - w|^2.4 of every group on every grid [M, S]."""
    errors = []
    for i, s in enumerate(scale.split(1, dim=1)):
        middle = 2 ** (bits - 1) if zero is None else zero[:, i, None].float()
        codes = ((w / s).round() + middle).clamp(0, 2**bits - 1)
        off = ((codes - middle) * s - w).abs()
        errors.append((off**2.4).sum(1).masked_fill(s[:, 0] == 0, torch.inf))
    return torch.stack(errors, 1) if errors else torch.empty_like(scale)


def _range(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)
