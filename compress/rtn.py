"""Round to nearest: the quantizer without data, and the one that undoes small unlearning updates most readily.

scale = max|w| / (2^(bits-1) - 0.5) per group, q = clip(round(w / scale)), the convention of compressed-tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import QuantSpec


@dataclass(frozen=True)
class QTensor:
    """codes [N, K] uint8 in 0..2^bits-1 (q + 2^(bits-1)), scale [N, K/G] in the storage dtype."""

    codes: Tensor
    scale: Tensor
    spec: QuantSpec

    def dequantize(self) -> Tensor:
        """[N, K] float32."""
        N, K = self.codes.shape
        q = self.codes.float() - 2 ** (self.spec.bits - 1)
        return (q.view(N, self.scale.shape[1], -1) * self.scale.float()[:, :, None]).view(N, K)


def rtn(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> QTensor:
    """Quantize weight [N, K].

    The scale is rounded to `scale_dtype`, the dtype in which it is stored, *before* codes are computed: a reloaded
    model is then the same, bit for bit. Raises ValueError for NaN or infinity, and when K does not divide into groups.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("weight: contains NaN or infinity and cannot be quantized")
    N, K = weight.shape
    half = 2 ** (spec.bits - 1)
    w = weight.float().view(N, spec.groups(K), -1)  # [N, K/G, G]
    scale = (w.abs().amax(2) / (half - 0.5)).to(scale_dtype)  # [N, K/G]
    if torch.isinf(scale).any():
        raise ValueError(f"weight: its largest value {weight.abs().max():g} needs a scale beyond {scale_dtype}")
    # A group of zeros, or so small that its scale is rounded to zero, is stored as zeros with scale 1.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (w / scale.float()[:, :, None]).round().clamp(-half, half - 1)
    return QTensor((q + half).to(torch.uint8).view(N, K), scale, spec)
