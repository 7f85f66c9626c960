"""SparseGPT: weights are pruned column by column, and what is not reached yet makes up for it (Frantar & Alistarh 2023,
arXiv 2301.00774, algorithm 1).

GPTQ's solver (gptq.py), with nothing rounded but what becomes zero: a column's error is e = w / U_jj where a weight
goes and 0 where it stays. The mask is found on the way (mask.py), in blocks of 128 columns, the columns in their own
order. As in gptq.py, a block collects what the columns before it have left, and H is never inverted. In a 16-bit model
what stays is rounded to its dtype at once, and the later columns make up for that too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block import Block
from .experts import starved
from .gptq import Factor, columns, factor_of, hessians, passes, ratio, shifted, square_sum, squared
from .knobs import GPTQ
from .mask import Mask
from .prune import Pruned, check_features, prune, zeros_note
from .rtn import finite
from .spec import PruneSpec
from .walk import data_free_prune, put_weight_, weight_of

# The paper's: share of the Hessian's mean diagonal that is added to it, and columns that are compared at a time. Both
# blocks divide by all patterns.
DAMP = 0.01
BLOCK = 128


def sparsegpt(weight: Tensor, H: Tensor, spec: PruneSpec, damp: float = DAMP) -> tuple[Tensor, float, float]:
    """(the pruned weight [N, K] in its dtype, relative squared error of the layer's output, share of H's mean diagonal
    that was added to it) for H [K, K] float32, as Hessian.matrix() gives it.

    Raises ValueError for NaN or infinity, an H of zeros or not positive definite, a K that a pattern does not divide.
    """
    factor = factor_of(H, torch.arange(len(H), device=H.device), damp)
    return *solve(weight, factor, spec), factor.damp


@torch.no_grad()
def solve(weight: Tensor, factor: Factor, spec: PruneSpec) -> tuple[Tensor, float]:
    """As sparsegpt, for a factor whose columns are in their own order."""
    if not finite(weight):
        raise ValueError("weight: contains NaN or infinity and cannot be pruned")
    check_features(weight.shape[1], spec)
    R = factor.upper
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    W = weight.to(torch.float32, copy=True)  # [N, K], becomes D = W - W_hat
    mask = Mask(weight != 0, factor.weights(), spec)
    total, lost = squared(W, factor), 0.0
    for block in columns(R, BLOCK, BLOCK, mask.unit if mask.unit > 1 else BLOCK):
        start, here, U = block.start, slice(block.start, block.end), block.inverse
        left = W[:, :start] @ R[:start, here]  # [N, B]
        w = torch.addmm(W[:, here], left, U)  # [N, B], running
        for a, b in block.steps:
            mask.settle_(start + a, w[:, a:b])
            result[:, start + a : start + b] = _prune_(w, U, a, b, mask.kept[:, start + a : start + b], result.dtype)
        W[:, here] -= result[:, here]
        lost += square_sum(left.addmm_(W[:, here], R[here, here]))
    return result, ratio(lost - shifted(W, factor), total)


def _prune_(w: Tensor, U: Tensor, a: int, b: int, stay: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns a .. b - 1 of the running w [N, B], pruned to `stay`: [N, b - a]. What is right of them changes."""
    kept = torch.zeros_like(stay, dtype=dtype)
    errors = torch.empty_like(w[:, a:b])
    for i in range(a, b):
        running = w[:, i]
        kept[:, i - a] = (running * stay[:, i - a]).to(dtype)
        errors[:, i - a] = (running - kept[:, i - a]) / U[i, i]
        w[:, i + 1 : b].addr_(errors[:, i - a], U[i, i + 1 : b], alpha=-1)
    w[:, b:].addmm_(errors, U[a:b, b:], alpha=-1)
    return kept


@torch.no_grad()
def prune_block_(block: Block, spec: PruneSpec) -> dict[str, Pruned]:
    """Prune the block's linear layers in place, those that are run first before the others look at their inputs; errors
    are of their outputs. Layers that saw too few tokens are pruned by magnitude, and say so. ValueError names the
    layer.
    """
    settings = GPTQ(damp=DAMP)
    found: dict[str, Pruned] = {}
    for sites in passes(block, settings):
        gathered = hessians(block, [site[0] for site in sites], settings, {})
        for site in sites:
            hessian = gathered.pop(site[0])
            H, tokens = hessian.matrix(), hessian.tokens
            if starved(tokens, len(H)) or not H.diagonal().any():
                why = f"{tokens} tokens" if starved(tokens, len(H)) else "its inputs are all zero"
                found |= {name: _by_magnitude_(block, name, spec, why, H) for name in site}
                continue
            name = site[0]
            try:
                factor = factor_of(H, torch.arange(len(H), device=H.device), DAMP)
                hessian.clear()
                del H
                for name in site:
                    new, error = solve(weight_of(block.linears[name]), factor, spec)
                    put_weight_(block.linears[name], new)
                    found[name] = Pruned(error, zeros_note(new), factor.damp)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    for name in block.linears:
        if name not in found:
            found[name] = _by_magnitude_(block, name, spec, "no token reaches it")
    return found


def _by_magnitude_(block: Block, name: str, spec: PruneSpec, why: str, H: Tensor | None = None) -> Pruned:
    weight = weight_of(block.linears[name])
    try:
        new = prune(f"{block.name}.{name}", weight, data_free_prune(spec))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    lost = None
    if H is not None and H.diagonal().any():
        W, D = weight.float(), (weight - new).float()
        lost = ratio(float((D @ H).mul_(D).sum(dtype=torch.float64)), float((W @ H).mul_(W).sum(dtype=torch.float64)))
    put_weight_(block.linears[name], new)
    return Pruned(lost, zeros_note(new, f"{why}: by magnitude"))
