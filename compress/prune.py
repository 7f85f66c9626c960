"""Unstructured magnitude pruning: in every layer the smallest weights become zero (Han et al. 2015, arXiv 1506.02626).

Each layer loses the same share of its own weights, the uniform sparsity of Zhu & Gupta 2017, arXiv 1710.01878 (all at
once here, without training in between). The result is a dense weight with zeros in it, which any engine runs.
"""

from __future__ import annotations

from torch import Tensor

from .rtn import finite
from .spec import PruneSpec


def magnitude(weight: Tensor, spec: PruneSpec) -> Tensor:
    """`weight` [N, K] with its smallest |w| set to zero: round(sparsity * N * K) of them, half to even.

    Among equal ones the first in row-major order go, so that the count is exact; zeros that were there already count,
    and all of them stay. Same shape and dtype. Raises ValueError for NaN or infinity.
    """
    if not finite(weight):
        raise ValueError("weight: contains NaN or infinity and cannot be pruned")
    sizes = weight.detach().abs().flatten()
    count = round(spec.percent * sizes.numel() / 100)
    if count == 0:
        return weight.clone()
    threshold = sizes.kthvalue(count).values
    gone = sizes < threshold
    ties = (sizes == threshold).nonzero()[:, 0]
    gone[ties[: count - int(gone.sum())]] = True
    return weight.masked_fill(gone.view_as(weight), 0)
