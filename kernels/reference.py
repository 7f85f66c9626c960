"""Every op in plain torch: the definition of correct, and the implementation where no kernel exists.

Shapes: N output features, K input features, G groups a row (group size K / G), M rows of x.
A row of `packed` is one stream of bits, lowest first: code i is bits i*bits .. (i+1)*bits - 1. Rows are
padded with zeros to whole int32 words.
"""

import contextlib

import torch
import torch.nn.functional as F

BLOCK = 64  # rows of a block, kBlockRows in csrc/blocks.h
ASYMMETRIC, SYMMETRIC, NARROW = 0, 1, 2  # a row's grid in `quantize_per_token`, GridKind in csrc/isa.h


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
    return _linear(x, w, bias).to(x.dtype)


def prepacked_bytes(n: int, k: int, groups: int, bits: int, scale_type: int, zero: bool) -> int:
    """Size of a weight in the CPU's run-time layout (csrc/blocks.h)."""
    step = 32 if bits == 3 else 32 // bits  # codes that fill whole words
    rows = (n + BLOCK - 1) // BLOCK * BLOCK
    steps = (k // groups + step - 1) // step
    # int: with symbolic sizes torch 2.10 cannot add a bool.
    return rows * groups * (steps * step * bits // 8 + (2 if scale_type else 4) + int(zero))


def prepack(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, k: int) -> torch.Tensor:
    """The stored layout -> blocks uint8 [prepacked_bytes], each of 64 rows: words [G, steps, lines, 64, 4], scale
    [G, 64], zero [G, 64] where there is one."""
    n, groups = scale.shape
    step = 32 if bits == 3 else 32 // bits
    codes = unpack(packed, bits, k).reshape(n, groups, k // groups)
    codes = F.pad(codes, (0, -(k // groups) % step, 0, 0, 0, -n % BLOCK))
    quads = codes.reshape(-1, BLOCK, groups, codes.shape[2] // step, step // 4, 4)  # [N/64, 64, G, steps, quads, 4]
    if bits == 3:
        low = [_or((quads & 3)[..., 4 * i : 4 * i + 4, :], 2) for i in range(2)]
        lines = torch.stack((*low, _or(quads >> 2, 1)), -2)
    else:
        lines = _or(quads, bits)[..., None, :]
    parts = [lines.permute(0, 2, 3, 4, 1, 5)]
    for values in (scale, zero):
        if values is not None:
            rows = F.pad(values, (0, 0, 0, -n % BLOCK)).reshape(-1, BLOCK, groups).transpose(1, 2)
            parts.append(rows.reshape(len(rows), groups * BLOCK).view(torch.uint8))
    return torch.cat([part.flatten(1) for part in parts], 1).reshape(-1)


def unprepack(
    blocks: torch.Tensor, n: int, k: int, groups: int, bits: int, scale_type: int, zero: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exactly undoes `prepack` -> packed, scale, zero ([0, G] where there is none)."""
    dtype = (torch.float32, torch.float16, torch.bfloat16)[scale_type]
    step = 32 if bits == 3 else 32 // bits
    count = (n + BLOCK - 1) // BLOCK
    steps = (k // groups + step - 1) // step
    width = groups * BLOCK
    sizes = (width * steps * step * bits // 8, width * dtype.itemsize, width * zero)
    words, scales, zeros = blocks.reshape(count, sum(sizes)).split(sizes, 1)
    lines = words.reshape(count, groups, steps, 3 if bits == 3 else 1, BLOCK, 4)
    lines = lines.permute(0, 4, 1, 2, 3, 5)  # [N/64, 64, G, steps, lines, 4]
    if bits == 3:
        low = lines[..., :2, None, :] >> 2 * _range(4, blocks)[:, None] & 3
        high = lines[..., 2:, :] >> _range(8, blocks)[:, None] & 1
        quads = low.flatten(-3, -2) | high << 2
    else:
        quads = lines >> bits * _range(8 // bits, blocks)[:, None] & 2**bits - 1
    codes = quads.reshape(count * BLOCK, groups, steps * step)[:n, :, : k // groups].reshape(n, k)

    def rows(values: torch.Tensor) -> torch.Tensor:
        return values.reshape(count, groups, BLOCK).transpose(1, 2).reshape(count * BLOCK, groups)[:n].contiguous()

    return pack(codes, bits), rows(scales.clone().view(dtype)), rows(zeros) if zero else zeros.new_empty(0, groups)


def dequantize_prepacked(
    blocks: torch.Tensor, n: int, k: int, groups: int, bits: int, scale_type: int, zero: bool
) -> torch.Tensor:
    """As `dequantize`, of the run-time layout."""
    return dequantize(*_stored(blocks, n, k, groups, bits, scale_type, zero), bits, k)


def prepacked_linear(
    x: torch.Tensor,
    blocks: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    groups: int,
    bits: int,
    scale_type: int,
    zero: bool,
) -> torch.Tensor:
    """As `w4a16_linear`, of the run-time layout."""
    return w4a16_linear(x, *_stored(blocks, n, x.shape[-1], groups, bits, scale_type, zero), bias, bits)


def prepacked_integer_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    blocks: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    groups: int,
    bits: int,
    scale_type: int,
    zero: bool,
    x_bits: int,
    grid: int,
    clip: float,
) -> torch.Tensor:
    """As `integer_linear`, of the run-time layout."""
    weight = _stored(blocks, n, x.shape[-1], groups, bits, scale_type, zero)
    return integer_linear(x, x_scale, x_zero, *weight, bias, bits, x_bits, grid, clip)


def _stored(
    blocks: torch.Tensor, n: int, k: int, groups: int, bits: int, scale_type: int, zero: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    packed, scale, zeros = unprepack(blocks, n, k, groups, bits, scale_type, zero)
    return packed, scale, zeros if zero else None


def expand24(compressed: torch.Tensor, bitmask: torch.Tensor, k: int) -> torch.Tensor:
    """compressed [N, K/2], bitmask uint8 [N, ceil(K/8)] -> w [N, K] with its zeros, in the values' dtype."""
    n = compressed.shape[0]
    bits = (bitmask[..., None] >> _range(8, bitmask) & 1).reshape(n, 8 * bitmask.shape[1])
    kept = bits[:, :k].reshape(n, k // 4, 4).bool()
    place = kept.cumsum(-1) - 1  # which of the two values of its four
    values = compressed.reshape(n, k // 4, 2).gather(-1, place.clamp(0, 1))
    return values.masked_fill(~kept | (place > 1), 0).reshape(n, k)


def sparse24_linear(
    x: torch.Tensor, compressed: torch.Tensor, bitmask: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [..., K] @ w.T + bias [N] -> y [..., N] in x's dtype, computed in float32."""
    w = expand24(compressed, bitmask, x.shape[-1]).float()
    return _linear(x, w, bias).to(x.dtype)


def _linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In float32, whatever autocast would have."""
    device = x.device.type
    lowered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if lowered else contextlib.nullcontext():
        return F.linear(x.float(), w, None if bias is None else bias.float())


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2^j] times Sylvester's Hadamard matrix over the root of its size, in float32 or wider -> in x's dtype."""
    n = x.shape[-1]
    y = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, n)
    width = 1
    while width < n:
        first, second = y.reshape(-1, 2, width).unbind(1)
        y = torch.stack((first + second, first - second), 1)
        width *= 2
    return (y.reshape(x.shape) * n**-0.5).to(x.dtype)


def quantize_per_token(
    x: torch.Tensor, bits: int, grid: int, clip: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., K] -> codes int8 [..., K], scale float32 [..., 1], zero int32 [..., 1]; x ~ (codes - zero) * scale."""
    low = clip * x.float().amin(-1, keepdim=True).clamp(max=0)
    high = clip * x.float().amax(-1, keepdim=True).clamp(min=0)
    most = 2 ** (bits - 1) - 1
    least = -most if grid == NARROW else -most - 1
    steps = most - least
    scale = (high - low) / steps if grid == ASYMMETRIC else torch.maximum(-low, high) / (steps / 2)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = least - low / scale if grid == ASYMMETRIC else torch.zeros_like(scale)
    zero = zero.round().nan_to_num(0).to(torch.int32)
    codes = quantize_with(x, scale, zero, bits).clamp(min=least)
    if grid == SYMMETRIC:
        # The largest of a row lies in the middle between two codes. Where both are there, as it is negative, the last
        # bit of the scale would decide, and with it in which company the row was computed.
        largest = x.float().abs().amax(-1, keepdim=True)
        codes = codes.masked_fill((x.float() == -largest) & (largest > 0), least)
    return codes, scale, zero


def quantize_with(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """x [..., K] on a given grid -> codes int8 [..., K]."""
    codes = (x.float() / scale + zero).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.nan_to_num(0).to(torch.int8)  # what is no number is carried by the scale


def integer_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    x_bits: int,
    grid: int,
    clip: float,
) -> torch.Tensor:
    """x [..., K] rounded to integers, times the codes of w, in exact integers -> y [..., N] in x's dtype."""
    if x_scale is None:
        codes, x_scale, x_zero = quantize_per_token(x, x_bits, grid, clip)
    else:
        assert x_zero is not None
        codes = quantize_with(x, x_scale, x_zero, x_bits)
        x_scale = x_scale.masked_fill(x.isnan().any(-1, keepdim=True), torch.nan)  # of that row
    n, groups = scale.shape
    size = x.shape[-1] // groups
    middle = 2 ** (bits - 1) if zero is None else zero[..., None].double()
    w = unpack(packed, bits, x.shape[-1]).reshape(n, groups, size).double() - middle
    a = (codes.double() - x_zero).reshape(-1, groups, size)
    y = a.new_zeros(len(a), n)
    for g in range(groups):  # in float64 sums of integers are exact
        y += (a[:, g] @ w[:, g].T) * scale[:, g].double()
    y = y.reshape(*x.shape[:-1], n) * x_scale.double()
    return (y if bias is None else y + bias.double()).to(x.dtype)


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


def _or(quads: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., quads, 4] -> [..., 4]: each quad `bits` bits above the one before."""
    return (quads << bits * _range(quads.shape[-2], quads)[:, None]).sum(-2, dtype=torch.uint8)


def _range(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)
