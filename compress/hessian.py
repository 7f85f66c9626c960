"""What calibration data says about a linear layer: the Hessian of its output error, and its triangular factor.

H = 2/n * sum of x x^T over the n rows x of a layer's input, which all layers with this input share (GPTQ, Frantar et
al. 2022, arXiv 2210.17323). GPTAQ (Li et al. 2025, arXiv 2504.02692) also needs how the input has drifted away from the
dense model's: C = 2/n * sum of (x_dense - x) x^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns worked on in one go. Narrow enough that little beyond the triangle is computed, wide enough for full speed.
_BLOCK = 512


class Hessian:
    """A running mean over the rows seen so far, in float32 whatever the model's dtype.

    tokens   rows seen
    Torch has no product that computes one triangle alone; blocks of rows from the diagonal on save nearly half of it.
    """

    def __init__(self, features: int, device: torch.device | None = None, drift: bool = False) -> None:
        self.tokens = 0
        self._mean = torch.zeros(features, features, device=device)
        self._drift = torch.zeros_like(self._mean) if drift else None

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Rows x [n, K]; `dense` [n, K]: the same rows in the dense model, where the drift is wanted."""
        if not len(x):
            return
        self.tokens += len(x)
        keep, share = 1 - len(x) / self.tokens, 2 / self.tokens
        x = x.float()
        K = x.shape[1]
        for start in range(0, K, _BLOCK):
            part = slice(start, min(start + _BLOCK, K))
            self._mean[part, start:].addmm_(x[:, part].T, x[:, start:], beta=keep, alpha=share)
        if self._drift is not None:
            assert dense is not None, "the drift is measured against the dense model's rows"
            self._drift.addmm_((dense.float() - x).T, x, beta=keep, alpha=share)

    def matrix(self) -> Tensor:
        """H [K, K]; the memory stays the accumulator's, and more rows may follow."""
        mirror_(self._mean)
        return self._mean

    def drift(self) -> Tensor | None:
        """C [K, K]: row i, column j is 2/n * sum of (x_dense - x)_i x_j; None unless it was asked for."""
        return self._drift

    def clear(self) -> None:
        """Give the memory back to whoever holds the matrices."""
        self._mean, self._drift = torch.empty(0, 0), None


def mirror_(H: Tensor) -> None:
    """The part of H [K, K] above the diagonal, written below it."""
    K = len(H)
    for start in range(0, K, _BLOCK):
        end = min(start + _BLOCK, K)
        corner = H[start:end, start:end].triu()
        H[start:end, start:end] = corner + corner.triu(1).T
        H[end:, start:end] = H[start:end, end:].T


def permuted(H: Tensor, order: Tensor) -> Tensor:
    """H[order][:, order], a copy [K, K], without a second one in between."""
    result = torch.empty_like(H)
    for start in range(0, len(H), _BLOCK):
        part = slice(start, start + _BLOCK)
        result[part] = H[order[part]][:, order]
    return result


def upper_factor_(A: Tensor) -> bool:
    """R upper triangular with A = R R^T, written over A [K, K], of which the upper triangle is read; False, and A lost,
    unless A is positive definite.

    R is the inverse of the factor U that GPTQ's paper takes of A^-1 = U^T U: the same numbers for a quarter of the
    work, and A is never inverted. Blocks from the last columns to the first.
    """
    K = len(A)
    for end in range(K, 0, -_BLOCK):
        start = max(0, end - _BLOCK)
        here, above = slice(start, end), slice(0, start)
        # Flipped in both directions, an upper factor is a lower one, which torch can compute.
        lower, failed = torch.linalg.cholesky_ex(A[here, here].flip(0, 1))
        if failed.item():
            return False
        A[here, here] = lower.flip(0, 1)
        A[above, here] = torch.linalg.solve_triangular(A[here, here].T, A[above, here], upper=False, left=False)
        for left in range(0, start, _BLOCK):
            part = slice(left, min(left + _BLOCK, start))
            A[part, left:start].addmm_(A[part, here], A[left:start, here].T, alpha=-1)
    A.triu_()
    return True
