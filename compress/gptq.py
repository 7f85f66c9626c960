"""GPTQ: columns are rounded one after another, and what is not rounded yet makes up for the error (Frantar et al. 2022,
arXiv 2210.17323, algorithm 1). With alpha > 0 also for what earlier layers changed in the input (GPTAQ, Li et al. 2025,
arXiv 2504.02692).

The paper updates all columns to the right after every block; here a block, when its turn comes, collects what the
columns that are done have left to it. With H = R R^T, R upper triangular, and D = W - W_hat of those columns, that is
(D R[done, block]) U with U the inverse of R's own block: the paper's numbers, but H is never inverted, a layer is
worked on in slices of rows, and D needs no memory beside W's.

Three choices that the paper leaves open or makes otherwise. A group's scale is taken from the weights as they are when
its first column is reached, after every update (in the authors' program those of the same block are missing). A column
that no input reaches is rounded to nearest: data that says nothing about a weight is no reason to drop it. Of a pruned
layer, a weight that is to stay zero counts as rounded to zero, so that the others make up for it; `weight` may then be
the dense one, and the layer comes as near to the dense output as its mask lets it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.ops import gptq_block
from .block import Block, Linear, Solved
from .experts import starved
from .grid import decode, group_parameters
from .hessian import Hessian, permuted, upper_factor_
from .rtn import QTensor, check_finite, rtn
from .spec import GPTQ, RTN, QuantSpec, Recipe
from .walk import storage_dtype, weight_of

# Rows of a weight worked on in one go: enough for matrix products at full speed, little beside a Hessian.
_ROWS = 1024
# Columns of a product that is only summed up.
_WIDTH = 512
# Damping stops here: what is not positive definite with ten times its mean diagonal added is no Hessian.
_MOST_DAMP = 10.0
# Share of exact zeros from which on a weight counts as pruned; a pruner of 10% may have taken one or two less.
_PRUNED = 0.05
# Hessians gathered in one pass over the data, beyond the first: more passes where they would take more bytes.
_PASS_BYTES = 1 << 30


@dataclass(frozen=True)
class Factor:
    """What the solver needs of H; one for all layers that share their input.

    order   int64 [K]: columns of the weight in the order in which they are rounded
    upper   [K, K]: R with R R^T = H + diag(shift), all in that order
    shift   [K] float64: what was added to H's diagonal
    damp    the same, as a share of its mean
    push    [K, K], zero up to the diagonal: alpha * C R^-T, GPTAQ's correction; None without
    """

    order: Tensor
    upper: Tensor
    shift: Tensor
    damp: float
    push: Tensor | None = None


@torch.no_grad()
def gptq(
    weight: Tensor,
    H: Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    options: GPTQ | None = None,
    mask: Tensor | None = None,
    cross: Tensor | None = None,
) -> tuple[QTensor, float]:
    """(the quantized weight [N, K], share of H's mean diagonal that was added to it).

    weight  [N, K] any float dtype, where the search starts: for a pruned layer best the dense weight
    H       [K, K] float32, as Hessian.matrix() gives it
    mask    bool [N, K], False where a weight has to be zero
    cross   [K, K] float32, as Hessian.drift() gives it; goes with options.alpha above 0
    Raises ValueError for NaN or infinity, an H of zeros or not positive definite, a K that does not divide into groups.
    """
    options = options or GPTQ(scale="signed-max" if spec.symmetric else "minmax")
    factor = factorize(H, spec, options, cross)
    return quantize(weight, factor, spec, scale_dtype, options, mask)[0], factor.damp


def factorize(H: Tensor, spec: QuantSpec, options: GPTQ, cross: Tensor | None = None) -> Factor:
    """The Factor of H [K, K], which stays as it is. Damping grows tenfold until H + shift is positive definite."""
    diagonal = H.diagonal()
    # What is infinite anywhere is so on the diagonal: no product of two columns is larger than both squares.
    if not torch.isfinite(diagonal).all():
        raise ValueError("inputs: contain NaN or infinity, or overflow float32 when squared")
    alive = diagonal > 0
    if not alive.any():
        raise ValueError("inputs: all zero")
    mean = float(diagonal[alive].double().mean())
    order = column_order(diagonal, spec, options.act_order)
    # A column without input touches no other; any diagonal leaves it to be rounded to nearest.
    lift = (~alive[order]).double() * mean
    damp = options.damp
    while not upper_factor_(upper := _lifted(H, order, lift + damp * mean)):
        if 10 * damp > _MOST_DAMP:
            raise ValueError(f"inputs: Hessian not positive definite, not even with {damp:g} of its mean added")
        damp = max(10 * damp, 1e-6)
    push = None
    if options.alpha > 0 and cross is not None:
        push = torch.linalg.solve_triangular(upper.T, permuted(cross, order), upper=False, left=False)
        push.triu_(1).mul_(options.alpha)
    return Factor(order, upper, lift + damp * mean, damp, push)


def _lifted(H: Tensor, order: Tensor, shift: Tensor) -> Tensor:
    result = permuted(H, order)
    result.diagonal().add_(shift)
    return result


def column_order(diagonal: Tensor, spec: QuantSpec, act_order: str) -> Tensor:
    """int64 [K]: the columns in the order in which they are rounded; those with much input early, while much can still
    make up for them. `gar` sorts inside groups, and groups by their largest, so that they stay together."""
    K = len(diagonal)
    if act_order == "none":
        return torch.arange(K, device=diagonal.device)
    G = K if act_order == "static" else K // spec.groups(K)
    groups = diagonal.view(-1, G)
    inside = groups.argsort(dim=1, descending=True, stable=True)  # [K/G, G]
    first = groups.amax(1).argsort(descending=True, stable=True)  # [K/G]
    return (first[:, None] * G + inside[first]).flatten()


def quantize(
    weight: Tensor,
    factor: Factor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    options: GPTQ,
    mask: Tensor | None = None,
    measure: bool = False,
) -> tuple[QTensor, float | None]:
    """(the quantized weight [N, K], with `measure` the relative squared error of the layer's output on the data)."""
    check_finite(weight)
    N, K = weight.shape
    shape = N, spec.groups(K)
    codes = torch.empty(N, K, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(shape, dtype=scale_dtype, device=weight.device)
    zero = None if spec.symmetric else torch.empty(shape, dtype=torch.uint8, device=weight.device)
    blocks = _blocks(factor.upper, spec, options)
    lost = total = 0.0
    for start in range(0, N, _ROWS):
        rows = slice(start, min(start + _ROWS, N))
        W = weight[rows][:, factor.order].float()  # [n, K]
        kept = None if mask is None else mask[rows][:, factor.order]
        if measure:
            total += _squared(W, factor)
        q = QTensor(codes[rows], scale[rows], spec, None if zero is None else zero[rows])
        lost += _round_(q, W, kept, factor, blocks, options)
    return QTensor(codes, scale, spec, zero), _ratio(lost, total) if measure else None


@dataclass(frozen=True)
class _Columns:
    """Columns start .. end - 1, in rounding order, between two updates.

    inverse   [B, B]: U, the inverse of R's own block
    steps     parts of the block: each within options.block, and in one group where that is scaled on the way
    """

    start: int
    end: int
    inverse: Tensor
    steps: list[tuple[int, int]]


def _scaled_on_the_way(spec: QuantSpec, options: GPTQ) -> bool:
    """Whether groups get their scale from the running weights: where a group's columns are rounded together."""
    return spec.group_size is not None and options.act_order != "static"


def _blocks(R: Tensor, spec: QuantSpec, options: GPTQ) -> list[_Columns]:
    K = len(R)
    unit = K // spec.groups(K) if _scaled_on_the_way(spec, options) else options.block
    width = max(unit, options.block // unit * unit)
    blocks = []
    for start in range(0, K, width):
        end = min(start + width, K)
        own = R[start:end, start:end].double()
        inverse = torch.linalg.solve_triangular(own, torch.eye(len(own)).to(own), upper=True).float()
        steps = []
        for first in range(0, end - start, unit):
            last = min(first + unit, end - start)
            steps += [(a, min(a + options.block, last)) for a in range(first, last, options.block)]
        blocks.append(_Columns(start, end, inverse, steps))
    return blocks


def _round_(q: QTensor, W: Tensor, kept: Tensor | None, factor: Factor, blocks: list[_Columns], options: GPTQ) -> float:
    """Fill q from W [n, K] float32, which becomes D = W - W_hat, and kept, bool [n, K] or None, both in rounding order.

    Returns tr(D H D^T).
    """
    R, T, bits = factor.upper, factor.push, q.spec.bits
    G = W.shape[1] // q.scale.shape[1]
    group = factor.order // G
    on_the_way = _scaled_on_the_way(q.spec, options)
    if not on_the_way:
        original = torch.empty_like(W)
        original[:, factor.order] = W if kept is None else W * kept
        _scale_(q, slice(None), original.view(len(W), -1, G), options)
        del original
    lost = 0.0
    past = None if T is None else torch.empty_like(W)  # every weight as it was when its turn came
    for block in blocks:
        start, here, U = block.start, slice(block.start, block.end), block.inverse
        left = W[:, :start] @ R[:start, here]  # [n, B]
        w = torch.addmm(W[:, here], left, U)  # [n, B], running
        push = None
        if T is not None and past is not None:
            w.addmm_(past[:, :start] @ T[:start, here], U)
            push = T[here, here] @ U
        for a, b in block.steps:
            now, later, columns = slice(a, b), slice(b, None), slice(start + a, start + b)
            if on_the_way and (start + a) % G == 0:
                whole = w[:, a : a + G] if kept is None else w[:, a : a + G] * kept[:, start + a : start + a + G]
                _scale_(q, slice(int(group[start + a]), int(group[start + a]) + 1), whole[:, None], options)
            used, of = group[columns].unique(return_inverse=True)
            scale, zero = q.scale[:, used], None if q.zero is None else q.zero[:, used]
            keep = None if kept is None else kept[:, columns]
            own_push = None if push is None else push[now, now]
            codes, errors = gptq_block(w[:, now], U[now, now], scale, zero, of, keep, own_push, bits)
            q.codes[:, factor.order[columns]] = codes
            rounded = decode(codes[:, :, None], scale[:, of], None if zero is None else zero[:, of], bits)[:, :, 0]
            W[:, columns] -= rounded
            w[:, later].addmm_(errors, U[now, later], alpha=-1)
            if push is not None and past is not None:
                past[:, columns] = errors * U.diagonal()[now] + rounded
                w[:, later].addmm_(past[:, columns], push[now, later])
        lost += _square_sum(left.addmm_(W[:, here], R[here, here]))
    return lost - _shifted(W, factor)


def _scale_(q: QTensor, groups: slice, w: Tensor, options: GPTQ) -> None:
    """Set scale and zero point of `groups` from their weights w [n, groups, G]."""
    scale, zero = group_parameters(w, q.spec, q.scale.dtype, options.scale, options.clip)
    q.scale[:, groups] = scale
    if q.zero is not None and zero is not None:
        q.zero[:, groups] = zero


def _squared(W: Tensor, factor: Factor) -> float:
    """tr(W H W^T) for W [n, K] in rounding order."""
    R, K = factor.upper, W.shape[1]
    total = 0.0
    for start in range(0, K, _WIDTH):
        end = min(start + _WIDTH, K)
        total += _square_sum(W[:, :end] @ R[:end, start:end])
    return total - _shifted(W, factor)


def _shifted(W: Tensor, factor: Factor) -> float:
    """The part of it that what was added to H's diagonal makes."""
    return float(torch.linalg.vector_norm(W, dim=0, dtype=torch.float64).square() @ factor.shift)


def _square_sum(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _ratio(lost: float, total: float) -> float:
    return max(lost, 0.0) / total if total > 0 else 0.0


@torch.no_grad()
def solve(block: Block, recipe: Recipe) -> dict[str, Solved]:
    """Quantize the linear layers of one decoder block; ValueError names the layer.

    With options.sequential, what is quantized is put into block.module at once, and later layers see the inputs that it
    makes. Experts with too few tokens, and layers that no token reaches, are rounded to nearest and say so.
    """
    options: GPTQ = recipe.options
    dense = {name: module.weight for name, module in block.linears.items()} if options.alpha > 0 else {}
    solved: dict[str, Solved] = {}
    for sites in _passes(block, options):
        hessians = _hessians(block, [site[0] for site in sites], options, dense)
        for site in sites:
            found = _solve_site(block, site, hessians.pop(site[0]), recipe)
            solved |= found
            for name, layer in found.items() if options.sequential else ():
                _put(block.linears[name], layer.q)
    for name, module in block.linears.items():
        if name not in solved:
            solved[name] = _rounded(name, module, recipe, "no token reaches it")
    return solved


def _passes(block: Block, options: GPTQ) -> list[list[tuple[str, ...]]]:
    """Which inputs are gathered in one pass over the data. An input is a tuple of layers that share it; what comes
    first is run first. Experts do not see each other: those of a layer go together."""
    stages: dict[str, list[tuple[str, ...]]] = {}
    for site in _sites(block):
        stage = ".".join("*" if part.isdigit() else part for part in site[0].split("."))
        stages.setdefault(stage if options.sequential else "", []).append(site)
    passes = []
    for stage_sites in stages.values():
        taken = _PASS_BYTES
        for site in stage_sites:
            needed = 4 * _features(block.linears[site[0]]) ** 2
            taken += needed
            if taken > _PASS_BYTES:
                passes.append([site])
                taken = needed
            else:
                passes[-1].append(site)
    return passes


def _sites(block: Block) -> list[tuple[str, ...]]:
    """Layers that share their input, in the order in which they are run."""
    sites: list[tuple[str, ...]] = []
    left = set(block.linears)
    for seen in block.inputs(list(block.linears)):
        shared: dict[tuple[int, ...], list[str]] = {}
        for name, x in seen.items():
            if name in left and len(x):
                shared.setdefault((x.data_ptr(), *x.shape), []).append(name)
                left.remove(name)
        sites += [tuple(names) for names in shared.values()]
        if not left:
            break
    return sites


def _hessians(block: Block, names: Sequence[str], options: GPTQ, dense: dict[str, Tensor]) -> dict[str, Hessian]:
    """Of the inputs of the layers called `names`, in one pass over the data."""
    hessians = {
        name: Hessian(_features(block.linears[name]), block.device, options.alpha > 0 and not _expert(name))
        for name in names
    }
    targets = block.inputs(names, dense=True) if options.alpha > 0 else None
    for seen in block.inputs(names):
        target: dict[str, Tensor] = {}
        if targets is not None:
            with _weights(block, dense):
                target = next(targets)
        for name, x in seen.items():
            hessians[name].add(x, target.get(name))
    return hessians


def _solve_site(block: Block, names: Sequence[str], hessian: Hessian, recipe: Recipe) -> dict[str, Solved]:
    """Layers with one input, from one factorization."""
    assert recipe.spec is not None
    options: GPTQ = recipe.options
    H, tokens = hessian.matrix(), hessian.tokens
    modules = {name: block.linears[name] for name in names}
    few = starved(tokens, len(H))
    if few or not H.diagonal().any():
        why = f"{tokens} tokens" if few else "its inputs are all zero"
        return {name: _rounded(name, module, recipe, why, H) for name, module in modules.items()}
    solved = {}
    name = names[0]
    try:
        factor = factorize(H, recipe.spec, options, hessian.drift())
        hessian.clear()
        del H
        for name, module in modules.items():
            weight = weight_of(module)
            notes = ["GPTAQ left out: experts"] if options.alpha > 0 and _expert(name) else []
            mask = None
            if int(weight.count_nonzero()) <= (1 - _PRUNED) * weight.numel():
                mask = weight != 0
                notes.append("mask kept")
            q, error = quantize(weight, factor, recipe.spec, storage_dtype(weight), options, mask, measure=True)
            solved[name] = Solved(q, error, factor.damp, "; ".join(notes))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return solved


def _rounded(name: str, module: Linear, recipe: Recipe, why: str, H: Tensor | None = None) -> Solved:
    """Round to nearest, with the output error where there is data."""
    assert recipe.spec is not None
    weight = weight_of(module)
    try:
        q = rtn(weight, recipe.spec, storage_dtype(weight), RTN(recipe.options.scale, recipe.options.clip))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    lost = None
    if H is not None and H.diagonal().any():
        W, D = weight.float(), weight.float() - q.dequantize()
        lost = _ratio(float((D @ H).mul_(D).sum(dtype=torch.float64)), float((W @ H).mul_(W).sum(dtype=torch.float64)))
    return Solved(q, lost, note=f"{why}: rounded to nearest")


def _features(module: Linear) -> int:
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]


def _expert(name: str) -> bool:
    return "experts" in name.split(".")


def _put(module: Linear, q: QTensor) -> None:
    new = q.dequantize(module.weight.dtype)
    module.weight = nn.Parameter(new.T.contiguous() if isinstance(module, Conv1D) else new, requires_grad=False)


@contextmanager
def _weights(block: Block, weights: dict[str, Tensor]) -> Iterator[None]:
    """The block with these weights in its linear layers, for a while."""
    before = {name: block.linears[name].weight for name in weights}
    try:
        for name, weight in weights.items():
            block.linears[name].weight = weight
        yield
    finally:
        for name, weight in before.items():
            block.linears[name].weight = weight
