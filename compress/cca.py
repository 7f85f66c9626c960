"""Canonical correlations: how alike two views of the same samples are, whatever invertible linear map lies between.

For centred X [n, p] and Y [n, q], the correlations are the cosines between the spaces that their columns span: singular
values of Qx^T Qy, with Q an orthonormal basis of each (Björck & Golub 1973). No covariance is formed or inverted, which
keeps it stable where features outnumber samples; but all is then alike, and every correlation 1, unless fewer
directions are compared. SVCCA (arXiv 1706.05806) takes the principal ones; PWCCA (arXiv 1806.05759, equation 3) weights
correlations by how much of X lies along them. Where n is too large to keep, the same comes from sums over the samples:
`Moments` of each view, `principal` directions, and `correlations` along those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
# Principal directions that a streamed view keeps at most: one for so many samples, and so many at all.
SAMPLES_PER_DIRECTION, DIRECTIONS = 10, 256
# Of sums of squares: directions with a smaller share than this of the largest are rounding, in float32 and in sums.
RESOLVED = 1e-12
# By so much a correlation may pass 1 through rounding: of bases, and of sums of squares.
_ABOVE, _ABOVE_IN_SUMS = 1e-10, 1e-6


def cca(X: Tensor, Y: Tensor) -> Tensor:
    """Canonical correlations of X [n, p] and Y [n, q]: float64 [min of their ranks], descending, within [0, 1].

    Columns are centred and brought to one scale; a constant one says nothing and is left out, and so are singular
    values up to max(n, p) * eps of the largest. Raises ValueError for views of other shapes, NaN or infinity, fewer
    than two samples, and a view that is constant.
    """
    x, y = _views(X, Y)
    return _cosines(_basis(x / x.abs().amax(0)), _basis(y / y.abs().amax(0)))[0]


def svcca(X: Tensor, Y: Tensor, energy: float = 0.99) -> float:
    """Mean canonical correlation of the fewest principal directions of X and of Y with `energy` of the variance."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy: {energy} is not above 0 and at most 1")
    x, y = _views(X, Y)
    return float(_cosines(_basis(x, energy), _basis(y, energy))[0].mean())


def pwcca(X: Tensor, Y: Tensor) -> float:
    """Mean canonical correlation, each weighted by sum_j |<h_i, x_j>|: h_i the variate of X, x_j its centred features.

    Not symmetric: it asks how much of X is in Y.
    """
    x, y = _views(X, Y)
    basis = _basis(x / x.abs().amax(0))
    values, turn = _cosines(basis, _basis(y / y.abs().amax(0)))
    return weighted_mean(values, (basis @ turn).T @ x)


def weighted_mean(values: Tensor, projections: Tensor) -> float:
    """Mean of correlations [r], each weighted by the sizes of its projections [r, features] (PWCCA)."""
    weights = projections.abs().sum(1)
    # A mean of ones may be the next number after 1.
    return min(1.0, float(values @ weights / weights.sum()))


def _views(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    for name, view in (("X", X), ("Y", Y)):
        if view.dim() != 2 or not view.shape[1] or len(view) < 2:
            raise ValueError(
                f"{name}: has the shape {list(view.shape)}; expected [samples, features], 2 samples or more"
            )
        if not torch.isfinite(view).all():
            raise ValueError(f"{name}: contains NaN or infinity")
    if len(X) != len(Y):
        raise ValueError(f"X, Y: {len(X)} and {len(Y)} samples; expected the same ones")
    return _centred("X", X), _centred("Y", Y)


def _centred(name: str, view: Tensor) -> Tensor:
    """[n, p] float64 with columns of mean 0, without those that are constant; the largest number there was is 1."""
    view = view.detach().double()
    view = view / view.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    centred = view - view.mean(0)
    varies = centred.abs().amax(0) > len(view) * EPS * view.abs().amax(0)
    if not varies.any():
        raise ValueError(f"{name}: every feature is constant; there is nothing that could correlate")
    centred = centred[:, varies]
    # Once more: what rounding left of a large mean is a direction that all such features would share.
    return centred - centred.mean(0)


def _basis(centred: Tensor, energy: float = 1.0) -> Tensor:
    """Orthonormal columns [n, r] that span those of `centred` [n, p], or its principal part with so much variance."""
    U, s, _ = torch.linalg.svd(centred, full_matrices=False)
    rank = int((s > max(centred.shape) * EPS * s[0]).sum())
    return U[:, : min(rank, len(centred) - 1, _enough(s.square(), energy))]


def _enough(variances: Tensor, energy: float) -> int:
    """How many of these, the largest first, hold `energy` of their sum; all for 1, however little the last hold."""
    if energy == 1:
        return len(variances)
    return int((variances.cumsum(0) < energy * variances.sum()).sum()) + 1


def _cosines(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(correlations [r], what turns the basis of X into its variates [rx, r])."""
    turn, values, _ = torch.linalg.svd(x.T @ y, full_matrices=False)
    return _within(values, _ABOVE), turn


def _within(values: Tensor, above: float) -> Tensor:
    """Singular values as correlations; a larger excess over 1 than rounding makes is a mistake that must not pass."""
    if values[0] > 1 + above:
        raise ValueError(f"correlation: {float(values[0])} is above 1: these products are not of the same samples")
    return values.clamp(0, 1)


class Moments:
    """Of samples that come in parts, in float64 whatever their dtype: O(d^2) memory.

    count     n
    mean      [d]
    scatter   [d, d], sum of (x - mean)(x - mean)^T. Of two views side by side, its blocks are all that CCA needs
    """

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(features, features, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Samples x [n, d]. Centred before they are multiplied: nothing of a large mean is lost (Chan et al. 1983)."""
        if not len(x):
            return
        x = x.double()
        mean = x.mean(0)
        away, share = mean - self.mean, len(x) / (self.count + len(x))
        self.scatter.addr_(away, away, alpha=self.count * share)
        self.mean.add_(away, alpha=share)
        self.count += len(x)
        x = x - mean
        self.scatter.addmm_(x.T, x)


@dataclass(frozen=True, eq=False)
class Principal:
    """The principal directions of a view.

    mean    [d]
    axes    [d, m]: along (x - mean) @ axes, samples are uncorrelated, and have a sum of squares of 1
    loads   [m, d]: what those stand for, so that (x - mean) is about (x - mean) @ axes @ loads
    """

    mean: Tensor
    axes: Tensor
    loads: Tensor

    def along(self, x: Tensor) -> Tensor:
        """Samples x [n, d] -> [n, m] float64."""
        return (x.double() - self.mean) @ self.axes


def principal(moments: Moments, energy: float = 1.0) -> Principal:
    """The first principal directions: the fewest that hold `energy` of the variance, but at most one for every 10
    samples, at most 256, and none with less than 1e-12 of the variance of the first.

    Raises ValueError for fewer than 10 samples, and when all samples are the same.
    """
    most = min(moments.count // SAMPLES_PER_DIRECTION, DIRECTIONS)
    if not most:
        raise ValueError(f"{moments.count} samples; {SAMPLES_PER_DIRECTION} are needed for one direction")
    if not torch.isfinite(moments.scatter).all():
        raise ValueError("samples: contain NaN or infinity")
    spread = float(moments.scatter.trace())
    if spread <= moments.count * (moments.count * EPS) ** 2 * float(moments.mean.square().sum()):
        raise ValueError("samples: are all the same; there is nothing that could correlate")
    values, vectors = torch.linalg.eigh(moments.scatter)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    count = min(most, _enough(values, energy), int((values > RESOLVED * values[0]).sum()))
    sizes, vectors = values[:count].sqrt(), vectors[:, :count]
    return Principal(moments.mean, vectors / sizes, sizes[:, None] * vectors.T)


def correlations(x: Tensor, xy: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(correlations [r], descending, within [0, 1]; variates [p, r]: centred X @ variates are those of X, of length 1).

    From sums of centred products xy [p, q] and the whitening of each view, [p, rx] and [q, ry], all float64. Raises
    ValueError for sums that are not of the same samples.
    """
    turn, values, _ = torch.linalg.svd(x.T @ xy @ y, full_matrices=False)
    return _within(values, _ABOVE_IN_SUMS), x @ turn


def whitening(scatter: Tensor) -> Tensor:
    """[p, r] float64 such that centred features times this have the scatter I, from theirs, [p, p].

    Features are brought to one scale; directions with up to 1e-12 of the largest's sum of squares are left out. Raises
    ValueError when there is no other.
    """
    size = scatter.diagonal().clamp(min=0).sqrt()
    if not (size > 0).any():
        raise ValueError("every feature is constant; there is nothing that could correlate")
    scale = torch.where(size > 0, 1 / size, torch.zeros_like(size))
    values, vectors = torch.linalg.eigh(scatter * scale * scale[:, None])
    keep = values > RESOLVED * values[-1]
    return scale[:, None] * vectors[:, keep] / values[keep].sqrt()
