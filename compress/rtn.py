"""Round to nearest: the quantizer without data, and the one that undoes small unlearning updates most readily."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import decode, encode, group_parameters
from .knobs import RTN
from .spec import QuantSpec

# Weights looked at in one go: what is computed on the way stays in the cache, and no layer is copied whole.
_SLICE = 1 << 17

# Numbers that are looked at in one go.
_FINITE = 1 << 18


@dataclass(frozen=True)
class QTensor:
    """codes [N, K] uint8 in 0..2^bits-1, scale [N, K/G] in the storage dtype, zero [N, K/G] uint8 (None: symmetric)."""

    codes: Tensor
    scale: Tensor
    spec: QuantSpec
    zero: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], computed in float32, in `dtype`; takes its own memory and little more."""
        weight = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for rows in row_slices(weight):
            weight[rows] = self.rows(rows)
        return weight

    def rows(self, rows: slice) -> Tensor:
        """Some rows of it, float32."""
        codes = self.codes[rows]
        groups = codes.view(len(codes), self.scale.shape[1], -1)
        zero = None if self.zero is None else self.zero[rows]
        return decode(groups, self.scale[rows], zero, self.spec.bits).view(codes.shape)


def rtn(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, options: RTN) -> QTensor:
    """Quantize weight [N, K].

    The scale is rounded to `scale_dtype`, the dtype in which it is stored, *before* codes are computed: a reloaded
    model is then the same, bit for bit. Raises ValueError for NaN or infinity, and when K does not divide into groups.
    """
    check_finite(weight)
    N, K = weight.shape
    groups = spec.groups(K)
    codes = torch.empty(N, K, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(N, groups, dtype=scale_dtype, device=weight.device)
    zero = None if spec.symmetric else torch.empty(N, groups, dtype=torch.uint8, device=weight.device)
    for rows in row_slices(weight):
        w = weight[rows].float().reshape(-1, groups, K // groups)  # [n, K/G, G]
        scale[rows], found = group_parameters(w, spec, scale_dtype, options.scale, options.clip)
        if zero is not None and found is not None:
            zero[rows] = found
        codes[rows] = encode(w, scale[rows], found, spec.bits).view(-1, K)
    return QTensor(codes, scale, spec, zero)


def row_slices(weight: Tensor) -> Iterator[slice]:
    """All rows of weight [N, K], some at a time."""
    rows = max(1, _SLICE // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        yield slice(start, min(start + rows, len(weight)))


def relative_error(weight: Tensor, q: QTensor) -> float:
    """|W - Q|^2 / |W|^2 of weight [N, K] and what stands for it."""
    off = size = 0.0
    for rows in row_slices(weight):
        w = weight[rows].float()
        off += float((q.rows(rows) - w).square().sum(dtype=torch.float64))
        size += float(w.square().sum(dtype=torch.float64))
    return off / size if size else 0.0


def check_finite(weight: Tensor) -> None:
    """ValueError for NaN or infinity."""
    if not finite(weight):
        raise ValueError("weight: contains NaN or infinity and cannot be quantized")


def finite(tensor: Tensor) -> bool:
    """Whether all its numbers are, in little memory."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.detach().reshape(-1).split(_FINITE))
