"""Low-rank updates of pruned weights, merged without filling a zero in (PERP, arXiv 2312.15230, section 3).

    mask_lora    W + s * M . (B A)     s = alpha / rank, M the mask
    scale_lora   W . (B A)             BA = 1 at the start; zeros stay zeros by construction
    lora         W + s * B A           dense while it trains; the mask is laid over it when it is merged

W [N, K], M [N, K] bool, True where a weight is kept, B [N, r], A [r, K]. The first two multiply with the very weight
that merging leaves behind, made again in the backward pass, a few rows at a time: no second W is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from .block import Linear
from .rtn import finite

# Weights that are made at once: few beside a layer, enough for a matrix product to be efficient.
_SLICE = 1 << 20


@dataclass(eq=False)
class Adapter:
    """What trains in the place of one layer's weight.

    mask     [N, K] bool
    A, B     [r, K], [N, r], in float32 at least
    scale    alpha / rank; scale_lora has none
    """

    kind: str
    layer: Linear
    mask: Tensor
    A: nn.Parameter
    B: nn.Parameter
    scale: float

    @property
    def kept(self) -> Tensor:
        """The layer's own weight, a view [N, K]."""
        weight = self.layer.weight.detach()
        return weight.T if isinstance(self.layer, Conv1D) else weight

    def weight(self, rows: slice) -> Tensor:
        """Some rows of what is merged, in the layer's dtype; but for lora it is what the layer multiplies with, too."""
        W, low = self.kept[rows], self.B.detach()[rows] @ self.A.detach()
        if self.kind == "scale_lora":
            return (W.to(low.dtype) * low).to(W.dtype)
        low.mul_(self.scale).masked_fill_(~self.mask[rows], 0)
        return (W.to(low.dtype) + low).to(W.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in place of the layer's own."""
        if self.kind == "lora":
            dense: Any = type(self.layer).forward
            return dense(self.layer, x) + self.scale * ((x @ self.A.T.to(x.dtype)) @ self.B.T.to(x.dtype))
        y = _Masked.apply(x, self.A, self.B, self)
        return y if self.layer.bias is None else y + self.layer.bias

    def attach(self) -> None:
        self.layer.__dict__["forward"] = self.forward

    def detach(self) -> None:
        self.layer.__dict__.pop("forward", None)

    def finite(self) -> bool:
        """Whether merging gives numbers alone."""
        return all(finite(self.weight(rows)) for rows in _slices(self.kept))

    @torch.no_grad()
    def merge_(self) -> None:
        """Into the layer's weight. What the mask takes away is 0, without a sign, which W . (B A) may give it."""
        kept = self.kept
        for rows in _slices(kept):
            kept[rows] = self.weight(rows).masked_fill(~self.mask[rows], 0)


def new_adapter(layer: Linear, mask: Tensor, kind: str, rank: int, alpha: float, generator: torch.Generator) -> Adapter:
    """One that changes nothing yet; mask [N, K] bool.

    A is drawn as LoRA's authors do, B is 0. For scale_lora all of A and B is 1 / sqrt(rank) in the paper; then every
    rank has the same gradient as every other, at every step, and they stay one. So A is moved by as much as LoRA would
    draw, less its mean over ranks: BA is still 1.
    """
    N, K = mask.shape
    weight = layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A = (2 * torch.rand(rank, K, generator=generator, dtype=dtype) - 1) / math.sqrt(K)
    B = torch.zeros(N, rank, dtype=dtype)
    if kind == "scale_lora":
        A = A - A.mean(0) + 1 / math.sqrt(rank)
        B = torch.full_like(B, 1 / math.sqrt(rank))
    A, B = (nn.Parameter(part.to(weight.device)) for part in (A, B))
    return Adapter(kind, layer, mask.to(weight.device), A, B, alpha / rank)


class _Masked(torch.autograd.Function):
    """y = x V^T for V = W + s * M . (B A) or W . (B A); x [..., K], y [..., N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, adapter: Adapter) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.adapter = adapter
        y = x.new_empty(*x.shape[:-1], len(B))
        for rows in _slices(adapter.kept):
            y[..., rows] = x @ adapter.weight(rows).T
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        adapter: Adapter = ctx.adapter
        x, A, B = ctx.saved_tensors
        G, X = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])  # [n, N], [n, K]
        # Added up over slices of rows: in 16 bits that would lose what each of them has right.
        dX = torch.zeros(X.shape, dtype=A.dtype, device=X.device) if ctx.needs_input_grad[0] else None
        dA, dB = torch.zeros_like(A), torch.empty_like(B)
        for rows in _slices(adapter.kept):
            if dX is not None:
                dX += G[:, rows] @ adapter.weight(rows)
            D = (G[:, rows].T @ X).to(A.dtype)  # [rows, K], dL/dV, and then dL/d(BA)
            if adapter.kind == "scale_lora":
                D *= adapter.kept[rows]
            else:
                D.masked_fill_(~adapter.mask[rows], 0).mul_(adapter.scale)
            dB[rows] = D @ A.T
            dA.addmm_(B[rows].T, D)
        return None if dX is None else dX.to(x.dtype).view_as(x), dA, dB, None


def _slices(weight: Tensor) -> Iterator[slice]:
    """All rows of weight [N, K], some at a time."""
    rows = max(1, _SLICE // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        yield slice(start, min(start + rows, len(weight)))
