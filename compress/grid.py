"""The integer grid that every quantizer rounds to: scales, zero points, codes.

A group of weights w becomes codes 0 .. 2^bits - 1, and stands for (code - zero) * scale. A scale is rounded to the
dtype it is stored in before any code is computed: what is read back is what was computed with, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.ops import clip_error
from .spec import QuantSpec

# Clip search: ranges from this share of a group's full one up to all of it (Frantar's GPTQ code searches as far); the
# sum of |error|^2.4 decides there too (kernels.ops.clip_error).
CLIP_LEAST = 0.3
CLIP_STEPS = 36
# Errors of that many candidates are held at a time.
_CANDIDATES = 1 << 20


def group_parameters(
    w: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, scale: str = "signed-max", clip: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(scale [N, n] in `scale_dtype`, zero uint8 [N, n] or None) for the groups w [N, n, G] float32.

    signed-max   the largest |w| gets the code 0: scale = w[argmax|w|] / -2^(bits-1), which may be negative
    absmax       scale = max|w| / (2^(bits-1) - 0.5)
    minmax       asymmetric: scale = (max - min) / (2^bits - 1) with min <= 0 <= max, zero = round(-min / scale)
    clip         of all ranges down to CLIP_LEAST of that one, the one with the least sum of |error|^2.4 in each group

    A group of zeros, or so small that its scale is rounded to zero, has scale 1 and stands for zeros.
    Raises ValueError for a scale beyond `scale_dtype`.
    """
    full: tuple[Tensor, Tensor | None]
    if not spec.symmetric:
        full = _minmax(w, spec, scale_dtype)
    elif scale == "signed-max":
        full = _signed_max(w, spec, scale_dtype)
    else:
        full = (w.abs().amax(2) / (2 ** (spec.bits - 1) - 0.5)).to(scale_dtype), None
    if torch.isinf(full[0]).any():
        raise ValueError(f"weight: its largest value {w.abs().max():g} needs a scale beyond {scale_dtype}")
    if clip:
        rows = max(1, _CANDIDATES // (2 * (CLIP_STEPS + 1) * max(1, w.shape[1])))
        parts = [
            _clipped(w[at : at + rows], spec, scale_dtype, *_rows(full, at, rows)) for at in range(0, w.shape[0], rows)
        ]
        zeros = [zero for _, zero in parts if zero is not None]
        full = torch.cat([found for found, _ in parts]), torch.cat(zeros) if zeros else None
    return torch.where(full[0] == 0, torch.ones_like(full[0]), full[0]), full[1]


def encode(w: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Codes uint8 [N, n, G] of w [N, n, G] float32; scale [N, n], zero uint8 [N, n] or None for 2^(bits-1)."""
    middle = 2 ** (bits - 1) if zero is None else zero.float()[:, :, None]
    return ((w / scale.float()[:, :, None]).round() + middle).clamp(0, 2**bits - 1).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """What codes uint8 [N, n, G] stand for, float32."""
    middle = 2 ** (bits - 1) if zero is None else zero.float()[:, :, None]
    return (codes.float() - middle) * scale.float()[:, :, None]


def _signed_max(w: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, None]:
    low, high = w.amin(2), w.amax(2)
    peak = torch.where(high > -low, high, low)
    return (peak / -(2 ** (spec.bits - 1))).to(scale_dtype), None


def _minmax(w: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _asymmetric(w.amin(2).clamp(max=0), w.amax(2).clamp(min=0), spec, scale_dtype)


def _asymmetric(low: Tensor, high: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    most = 2**spec.bits - 1
    scale = ((high - low) / most).to(scale_dtype)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    return scale, (-low / safe).round().clamp(0, most).to(torch.uint8)


def _rows(full: tuple[Tensor, Tensor | None], at: int, rows: int) -> tuple[Tensor, Tensor | None]:
    scale, zero = full
    return scale[at : at + rows], None if zero is None else zero[at : at + rows]


def _clipped(
    w: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The best of the full range and CLIP_STEPS shorter ones, per group; both signs of a symmetric scale are tried."""
    shares = 1 - (1 - CLIP_LEAST) * torch.arange(CLIP_STEPS + 1, device=w.device) / CLIP_STEPS  # [S]
    scales, zeros = (scale.float()[:, :, None] * shares).to(scale_dtype), None  # [N, n, S]
    if zero is None:
        scales = torch.cat([scales, -scales], 2)
    else:
        low, high = w.amin(2).clamp(max=0)[:, :, None] * shares, w.amax(2).clamp(min=0)[:, :, None] * shares
        scales, zeros = _asymmetric(low, high, spec, scale_dtype)
    error = clip_error(
        w.reshape(-1, w.shape[2]),
        scales.float().flatten(0, 1),
        None if zeros is None else zeros.flatten(0, 1),
        spec.bits,
    )
    best = error.argmin(1).view(*scale.shape, 1)  # of equal ones the first, with the longest range
    return scales.gather(2, best)[:, :, 0], None if zeros is None else zeros.gather(2, best)[:, :, 0]
