"""An invertible map of a layer's input that is cheap to run: x' = (x / scale) P with P = left (x) right.

FlatQuant (Sun et al. 2024, arXiv 2410.09426, section 3): the Kronecker product of two small matrices keeps n1^2 + n2^2
numbers instead of n^2, and takes n (n1 + n2) multiplications a row instead of n^2. The layer behind it multiplies with
W' = W diag(scale) P^-T, so that x' W'^T = x W^T; whatever makes both x' and W' flatter makes both easier to round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def factors(n: int) -> tuple[int, int]:
    """(n1, n2) with n1 * n2 = n and n1 <= n2 as near to each other as n allows; (1, n) for a prime."""
    if n < 1:
        raise ValueError(f"features: {n} has no factors; expected 1 or more")
    n1 = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return n1, n // n1


def multiply(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (left (x) right) for x [..., n1 * n2], left [n1, n1], right [n2, n2], all of one dtype."""
    X = x.reshape(-1, len(left), len(right))  # [rows, n1, n2]
    return torch.matmul(left.T, X @ right).reshape(x.shape)


def transform(x: Tensor, left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """x' [..., n] in the dtype of x, computed in float32 or wider; left [n1, n1], right [n2, n2], scale [n]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return multiply(x.to(wide) / scale.to(wide), left.to(wide), right.to(wide)).to(x.dtype)


def fold(weight: Tensor, left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """W' [N, n] for weight [N, n], computed in the dtype that all arguments share.

    Not finite where `left` or `right` has no inverse.
    """
    back_left, back_right = torch.linalg.inv_ex(left).inverse, torch.linalg.inv_ex(right).inverse
    return multiply(weight * scale, back_left.T, back_right.T)


class Kronecker(nn.Module):
    """The map as a layer applies it to its input.

    left   [n1, n1] float32, P = left (x) right
    right  [n2, n2] float32
    scale  [n] float32, above zero; n = n1 * n2
    The three stay as wide as they are when the model is cast to 16 bits: the weights behind are made for their inverse.
    Raises ValueError for tensors of other shapes, and for values that are not finite or not above zero.
    """

    left: Tensor
    right: Tensor
    scale: Tensor

    def __init__(self, left: Tensor, right: Tensor, scale: Tensor) -> None:
        super().__init__()
        for name, factor in (("left", left), ("right", right)):
            if factor.dim() != 2 or factor.shape[0] != factor.shape[1]:
                raise ValueError(f"{name}: has the shape {list(factor.shape)}; expected a square matrix")
        if scale.shape != (len(left) * len(right),):
            raise ValueError(f"scale: has the shape {list(scale.shape)}; expected [{len(left) * len(right)}]")
        for name, tensor in (("left", left), ("right", right), ("scale", scale)):
            if not tensor.is_meta and not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: contains NaN or infinity")
            self.register_buffer(name, tensor)
        if not scale.is_meta and not (scale > 0).all():
            raise ValueError(f"scale: its least value is {float(scale.min()):g}; expected all above 0")

    @property
    def features(self) -> int:
        """n."""
        return len(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> x' [..., n] in the dtype of x, computed in float32."""
        return transform(x, self.left, self.right, self.scale)

    def fold(self, weight: Tensor) -> Tensor:
        """W' [N, n] float64 for the weight [N, n] of a layer that reads x' in place of x; ValueError: no inverse."""
        folded = fold(weight.double(), self.left.double(), self.right.double(), self.scale.double())
        if weight.isfinite().all() and not folded.isfinite().all():
            raise ValueError(f"transform: left {list(self.left.shape)} or right {list(self.right.shape)} is singular")
        return folded

    def dense(self) -> Tensor:
        """[n, n] float64: x' = x @ dense()."""
        return torch.kron(self.left.double(), self.right.double()) / self.scale.double()[:, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Kronecker:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, *args, **kwargs)
        for name, tensor in before.items():
            after = self.get_buffer(name)
            if after.dtype.itemsize < 4:
                setattr(self, name, tensor.to(after.device))
        return self

    def extra_repr(self) -> str:
        return f"{len(self.left)} x {len(self.right)}"
