"""Half-quadratic quantization, without data (HQQ; Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/).

In every group the sum of |w - w_hat|^p with p < 1, which minds a few large errors less than many small ones, is lowered
by turns: the part of the error that counts as outlier is split off by shrinkage, then zero point and scale are fitted
in closed form, by least squares, to what is left. Three things differ from the authors' program:

Zero points are integers in the files that are written here, and symmetric formats have none. Inside, the zero point is
real-valued as theirs; after every step the scale is fitted once more to each of the two integers beside it and rounded
to the dtype it is stored in, and of all that was found, round to nearest included, each group keeps the best.

They fit the zero point alone. Rounded, that gains nothing while the scale stays, so that the scale is fitted too, as it
is where there is no zero point. What integers lose, as the sum of |error|^0.7 on a trained demo model of 2 M weights
(mean of its layers, groups of 64, asymmetric; round to nearest over the full range = 1):

              theirs    theirs, rounded    clip search    this file    this file, were zero points real
    4 bits    0.961     1.000              0.964          0.946        0.907
    3 bits    0.962     1.000              0.920          0.893        0.856
    2 bits    0.961     1.000              0.812          0.766        0.736

(Symmetric, against the signed-max grid: 0.950, 0.918, 0.867.) A lower sum is not always a better model: what this model
answers, it predicts worse than after clip search alone, by a few percent at 3 bits and by far at 2 bits.

Errors are shrunk in steps of the grid. In units of the weights, as theirs, beta = 10 touches no error below 0.17, and
weights of language models are about 0.02: what remains is least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import decode, encode, group_parameters
from .knobs import HQQ
from .rtn import QTensor, check_finite
from .spec import QuantSpec

# Weights worked on in one go: what a step keeps at a time stays in the cache, and no layer is copied whole.
_CHUNK = 1 << 16


def hqq(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, options: HQQ) -> QTensor:
    """Quantize weight [N, K]; the sum of |w - w_hat|^p is in no group above that of round to nearest, whether or not
    with clip search. Weights that are zero stay zero: every grid has them.

    Raises ValueError for NaN or infinity, a K that does not divide into groups, and p or beta that are not above 0.
    """
    check_finite(weight)
    for name in ("p", "beta"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name}: {getattr(options, name)} is not above 0")
    N, K = weight.shape
    groups, rows = spec.groups(K), max(1, _CHUNK // K)
    parts = [
        _solved(weight[at : at + rows].float().reshape(-1, groups, K // groups), spec, scale_dtype, options)
        for at in range(0, N, rows)
    ]
    zeros = [q.zero for q in parts if q.zero is not None]
    return QTensor(
        torch.cat([q.codes for q in parts]),
        torch.cat([q.scale for q in parts]),
        spec,
        torch.cat(zeros) if zeros else None,
    )


def _solved(w: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, options: HQQ) -> QTensor:
    """Some rows of a layer, w [n, K/G, G]."""
    starts = [group_parameters(w, spec, scale_dtype, options.scale, clip) for clip in (False, True)]
    scale, zero = _solve(w, starts, spec.bits, options)
    return QTensor(encode(w, scale, zero, spec.bits).flatten(1), scale, spec, zero)


def shrink(x: Tensor, p: float, beta: float) -> Tensor:
    """sign(x) * max(0, |x| - |x|^(p-1) / beta): what minimises |e|^p / p + beta / 2 * (e - x)^2, to first order."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-12) ** (p - 1) / beta).clamp(min=0)


def step(
    w: Tensor, scale: Tensor, zero: Tensor, unit: Tensor, bits: int, options: HQQ, fit_zero: bool
) -> tuple[Tensor, Tensor]:
    """One half-quadratic step: (scale, zero) fitted to what is left of w when the outliers of the error are taken off.

    w [M, G], scale, zero (both real-valued) and unit, in which errors are measured, [M, 1]. A scale that would come out
    as zero, or has no code off the zero point to be fitted to, stays.
    """
    q = (w / scale + zero).round().clamp(0, 2**bits - 1)
    outlier = shrink((w - (q - zero) * scale) / unit, options.p, options.beta) * unit
    kept = w - outlier
    if fit_zero:
        zero = (q - kept / scale).mean(1, keepdim=True)
    d = q - zero
    fitted = (d * kept).sum(1, keepdim=True) / (d * d).sum(1, keepdim=True)
    return torch.where(fitted.isfinite() & (fitted != 0), fitted, scale), zero


def objective(w: Tensor, scale: Tensor, zero: Tensor | None, bits: int, p: float) -> Tensor:
    """Sum of |w - w_hat|^p of each group [N, n]; w [N, n, G], scale and zero as `encode` takes them.

    Infinite where the scale is none: zero or infinite in the dtype it is stored in.
    """
    bad = (scale == 0) | scale.isinf()
    safe = torch.where(bad, torch.ones_like(scale), scale)
    error = (decode(encode(w, safe, zero, bits), safe, zero, bits) - w).abs_().pow_(p).sum(2)
    return error.masked_fill(bad, torch.inf)


def _solve(
    w: Tensor, starts: list[tuple[Tensor, Tensor | None]], bits: int, options: HQQ
) -> tuple[Tensor, Tensor | None]:
    """The best (scale, zero) of each group of w [N, n, G], from the best of `starts` on.

    As in the authors' program, a group is done after the first step that found nothing better.
    """
    shape = w.shape[:2]
    rows = w.reshape(-1, 1, w.shape[2])  # [M, 1, G]: groups know nothing of each other
    best = _Best(rows, bits, options.p, *_column(*starts[0]))
    every = torch.arange(len(rows), device=w.device)
    for start in starts[1:]:
        best.offer(every, *_column(*start))
    half = torch.full_like(best.scale, 2 ** (bits - 1), dtype=torch.float32)
    scale, zero = best.scale.float(), half if best.zero is None else best.zero.float()
    unit, active = scale.abs(), every
    for _ in range(options.iterations):
        scale, zero = step(rows[active, 0], scale, zero, unit[active], bits, options, best.zero is not None)
        better = torch.zeros(len(active), dtype=torch.bool, device=w.device)
        for near in (zero.floor(), zero.floor() + 1) if best.zero is not None else (zero,):
            whole = near.clamp(0, 2**bits - 1)
            better |= best.offer(active, scale, whole)
            again, _ = step(rows[active, 0], scale, whole, unit[active], bits, options, False)
            better |= best.offer(active, again, whole)
        if not better.any():
            break
        active, scale, zero = active[better], scale[better], zero[better]
    return best.scale.view(shape), None if best.zero is None else best.zero.view(shape)


class _Best:
    """The best scale [M, 1] (storage dtype) and zero (uint8, None: symmetric) found so far of each group [M, 1, G]."""

    def __init__(self, w: Tensor, bits: int, p: float, scale: Tensor, zero: Tensor | None) -> None:
        self.w, self.bits, self.p = w, bits, p
        self.scale, self.zero = scale.clone(), None if zero is None else zero.clone()
        self.least = objective(w, scale, zero, bits, p)

    def offer(self, index: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Take what is better for the groups `index`; a zero point is integral, and ignored where there is none.

        Returns which it was better for, bool [len(index)].
        """
        stored = scale.to(self.scale.dtype)
        codes_zero = None if self.zero is None or zero is None else zero.to(torch.uint8)
        found = objective(self.w[index], stored, codes_zero, self.bits, self.p)
        better = (found < self.least[index])[:, 0]
        taken = index[better]
        self.least[taken], self.scale[taken] = found[better], stored[better]
        if self.zero is not None and codes_zero is not None:
            self.zero[taken] = codes_zero[better]
        return better


def _column(scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return scale.reshape(-1, 1), None if zero is None else zero.reshape(-1, 1)
