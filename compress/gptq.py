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

With SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, section 3.5) the mask is found on the way, in the same pass:
of each block's weights as they are when it begins (2:4: of every four columns when the first of them is reached) those
whose loss the later ones make up for best become zero, and errors of pruning and rounding are made up for together.
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
from .knobs import GPTQ, RTN
from .mask import Mask, adjacent
from .prune import Cut, by_magnitude, kept, prune, zeros_note
from .recipe import Recipe
from .rtn import QTensor, check_finite, rtn
from .spec import PruneSpec, QuantSpec
from .walk import data_free_prune, features, storage_dtype, weight_of

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
    alive   bool [K]: columns that any input reaches
    damp    the same, as a share of its mean
    push    [K, K], zero up to the diagonal: alpha * C R^-T, GPTAQ's correction; None without
    """

    order: Tensor
    upper: Tensor
    shift: Tensor
    damp: float
    alive: Tensor
    push: Tensor | None = None

    def weights(self) -> Tensor:
        """[K] float32: 1 / U_jj, with H^-1 = U^T U: what an error in a column counts when the later ones have made up
        for it; nothing in one without input, whatever was added to H there."""
        return self.upper.diagonal() * self.alive


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


def factorize(
    H: Tensor, spec: QuantSpec, options: GPTQ, cross: Tensor | None = None, prune: PruneSpec | None = None
) -> Factor:
    """The Factor of H [K, K], which stays as it is. Damping grows tenfold until H + shift is positive definite.

    prune   what is to be pruned on the way, if anything
    """
    order = column_order(H.diagonal(), spec, options.act_order, adjacent(prune))
    return factor_of(H, order, options.damp, options.alpha, cross)


def factor_of(H: Tensor, order: Tensor, damp: float, alpha: float = 0.0, cross: Tensor | None = None) -> Factor:
    """As factorize, for columns in the given order."""
    diagonal = H.diagonal()
    # What is infinite anywhere is so on the diagonal: no product of two columns is larger than both squares.
    if not torch.isfinite(diagonal).all():
        raise ValueError("inputs: contain NaN or infinity, or overflow float32 when squared")
    alive = diagonal > 0
    if not alive.any():
        raise ValueError("inputs: all zero")
    mean = float(diagonal[alive].double().mean())
    # A column without input touches no other; any diagonal leaves it to be rounded to nearest.
    lift = (~alive[order]).double() * mean
    while not upper_factor_(upper := _lifted(H, order, lift + damp * mean)):
        if 10 * damp > _MOST_DAMP:
            raise ValueError(f"inputs: Hessian not positive definite, not even with {damp:g} of its mean added")
        damp = max(10 * damp, 1e-6)
    push = None
    if alpha > 0 and cross is not None:
        push = torch.linalg.solve_triangular(upper.T, permuted(cross, order), upper=False, left=False)
        push.triu_(1).mul_(alpha)
    return Factor(order, upper, lift + damp * mean, damp, alive[order], push)


def _lifted(H: Tensor, order: Tensor, shift: Tensor) -> Tensor:
    result = permuted(H, order)
    result.diagonal().add_(shift)
    return result


def column_order(diagonal: Tensor, spec: QuantSpec, act_order: str, unit: int = 1) -> Tensor:
    """int64 [K]: the columns in the order in which they are rounded; those with much input early, while much can still
    make up for them. `gar` sorts inside groups, and groups by their largest, so that they stay together; so does any
    `unit` of adjacent columns (which divides a group), inside which nothing is sorted."""
    K = len(diagonal)
    every = torch.arange(K, device=diagonal.device)
    if act_order == "none":
        return every
    G = (K if act_order == "static" else K // spec.groups(K)) // unit
    groups = diagonal.view(-1, unit).amax(1).view(-1, G)
    inside = groups.argsort(dim=1, descending=True, stable=True)  # [n, G]
    first = groups.amax(1).argsort(descending=True, stable=True)  # [n]
    return every.view(-1, unit)[(first[:, None] * G + inside[first]).flatten()].flatten()


def quantize(
    weight: Tensor,
    factor: Factor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    options: GPTQ,
    mask: Tensor | None = None,
    measure: bool = False,
    prune: PruneSpec | None = None,
) -> tuple[QTensor, float | None]:
    """(the quantized weight [N, K], with `measure` the relative squared error of the layer's output on the data).

    prune   what SparseGPT is to prune on the way, whose factor this is, of what is in `mask` True, which becomes what
            stays; compared are all rows, which are worked on at once then
    """
    check_finite(weight)
    N, K = weight.shape
    shape = N, spec.groups(K)
    codes = torch.empty(N, K, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(shape, dtype=scale_dtype, device=weight.device)
    zero = None if spec.symmetric else torch.empty(shape, dtype=torch.uint8, device=weight.device)
    blocks = _blocks(factor.upper, spec, options, prune)
    lost = total = 0.0
    height = _ROWS if prune is None else N
    for start in range(0, N, height):
        rows = slice(start, min(start + height, N))
        W = weight[rows][:, factor.order].float()  # [n, K]
        kept = None if mask is None else mask[rows][:, factor.order]
        if measure:
            total += squared(W, factor)
        q = QTensor(codes[rows], scale[rows], spec, None if zero is None else zero[rows])
        lost += _round_(q, W, kept, factor, blocks, options, prune)
        if prune is not None and mask is not None and kept is not None:
            mask[:, factor.order] = kept
    return QTensor(codes, scale, spec, zero), ratio(lost, total) if measure else None


@dataclass(frozen=True)
class _Columns:
    """Columns start .. end - 1, in rounding order, between two updates.

    inverse   [B, B]: U, the inverse of R's own block
    steps     parts of the block: each within options.block, and in one group where that is scaled on the way, and in
              one pattern where that is found on the way
    """

    start: int
    end: int
    inverse: Tensor
    steps: list[tuple[int, int]]


def _scaled_on_the_way(spec: QuantSpec, options: GPTQ) -> bool:
    """Whether groups get their scale from the running weights: where a group's columns are rounded together."""
    return spec.group_size is not None and options.act_order != "static"


def _blocks(R: Tensor, spec: QuantSpec, options: GPTQ, prune: PruneSpec | None = None) -> list[_Columns]:
    K, of = len(R), adjacent(prune)
    unit = K // spec.groups(K) if _scaled_on_the_way(spec, options) else -(-options.block // of) * of
    return columns(R, unit, options.block, of if of > 1 else options.block)


def columns(R: Tensor, unit: int, block: int, step: int) -> list[_Columns]:
    """Blocks of about `block` columns, in whole units, which are cut into steps."""
    K = len(R)
    width = max(unit, block // unit * unit)
    blocks = []
    for start in range(0, K, width):
        end = min(start + width, K)
        own = R[start:end, start:end].double()
        inverse = torch.linalg.solve_triangular(own, torch.eye(len(own)).to(own), upper=True).float()
        steps = []
        for first in range(0, end - start, unit):
            last = min(first + unit, end - start)
            steps += [(a, min(a + step, last)) for a in range(first, last, step)]
        blocks.append(_Columns(start, end, inverse, steps))
    return blocks


def _round_(
    q: QTensor,
    W: Tensor,
    kept: Tensor | None,
    factor: Factor,
    blocks: list[_Columns],
    options: GPTQ,
    prune: PruneSpec | None = None,
) -> float:
    """Fill q from W [n, K] float32, which becomes D = W - W_hat, and kept, bool [n, K] or None, both in rounding order.

    With `prune`, `kept` becomes what stays. Returns tr(D H D^T).
    """
    R, T, bits = factor.upper, factor.push, q.spec.bits
    G = W.shape[1] // q.scale.shape[1]
    group = factor.order // G
    on_the_way = _scaled_on_the_way(q.spec, options)
    mask = None if prune is None or kept is None else Mask(kept, factor.weights(), prune)
    if not on_the_way:
        original = torch.empty_like(W)
        first = kept if mask is None else mask.guess(W, ((block.start, block.end) for block in blocks))
        original[:, factor.order] = W if first is None else W * first
        _scale_(q, slice(None), original.view(len(W), -1, G), options)
        del original, first
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
        if mask is not None and mask.unit == 1:
            mask.settle_(start, w)
        for a, b in block.steps:
            now, later, columns = slice(a, b), slice(b, None), slice(start + a, start + b)
            if on_the_way and (start + a) % G == 0:
                whole, places = w[:, a : a + G], slice(start + a, start + a + G)
                if kept is not None:
                    # What a pattern will leave of the group is not settled yet.
                    stay = kept[:, places] if mask is None or mask.unit == 1 else mask.found(start + a, whole)
                    whole = whole * stay
                _scale_(q, slice(int(group[start + a]), int(group[start + a]) + 1), whole[:, None], options)
            if mask is not None and mask.unit > 1:
                mask.settle_(start + a, w[:, now])
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
        lost += square_sum(left.addmm_(W[:, here], R[here, here]))
    return lost - shifted(W, factor)


def _scale_(q: QTensor, groups: slice, w: Tensor, options: GPTQ) -> None:
    """Set scale and zero point of `groups` from their weights w [n, groups, G]."""
    scale, zero = group_parameters(w, q.spec, q.scale.dtype, options.scale, options.clip)
    q.scale[:, groups] = scale
    if q.zero is not None and zero is not None:
        q.zero[:, groups] = zero


def squared(W: Tensor, factor: Factor) -> float:
    """tr(W H W^T) for W [n, K] in rounding order."""
    R, K = factor.upper, W.shape[1]
    total = 0.0
    for start in range(0, K, _WIDTH):
        end = min(start + _WIDTH, K)
        total += square_sum(W[:, :end] @ R[:end, start:end])
    return total - shifted(W, factor)


def shifted(W: Tensor, factor: Factor) -> float:
    """The part of it that what was added to H's diagonal makes."""
    return float(torch.linalg.vector_norm(W, dim=0, dtype=torch.float64).square() @ factor.shift)


def square_sum(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def ratio(lost: float, total: float) -> float:
    return max(lost, 0.0) / total if total > 0 else 0.0


@torch.no_grad()
def solve(block: Block, recipe: Recipe, cut: Cut | None = None) -> dict[str, Solved]:
    """Quantize, and where the recipe says so prune, the linear layers of one decoder block; ValueError names the layer.

    cut: of the whole model, where that is what the pruner compares. With options.sequential, what is quantized is put
    into block.module at once, and later layers see the inputs that it makes. Experts with too few tokens, and layers
    that no token reaches, are rounded to nearest and say so.
    """
    options: GPTQ = recipe.options
    dense = {name: module.weight for name, module in block.linears.items()} if options.alpha > 0 else {}
    solved: dict[str, Solved] = {}
    for sites in passes(block, options):
        gathered = hessians(block, [site[0] for site in sites], options, dense)
        for site in sites:
            found = _solve_site(block, site, gathered.pop(site[0]), recipe, cut)
            solved |= found
            for name, layer in found.items() if options.sequential else ():
                _put(block.linears[name], layer.q)
    for name in block.linears:
        if name not in solved:
            solved[name] = _rounded(block, name, recipe, "no token reaches it", cut=cut)
    return solved


def passes(block: Block, options: GPTQ) -> list[list[tuple[str, ...]]]:
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
            needed = 4 * features(block.linears[site[0]]) ** 2
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


def hessians(block: Block, names: Sequence[str], options: GPTQ, dense: dict[str, Tensor]) -> dict[str, Hessian]:
    """Of the inputs of the layers called `names`, in one pass over the data."""
    found = {
        name: Hessian(features(block.linears[name]), block.device, options.alpha > 0 and not _expert(name))
        for name in names
    }
    targets = block.inputs(names, dense=True) if options.alpha > 0 else None
    for seen in block.inputs(names):
        target: dict[str, Tensor] = {}
        if targets is not None:
            with _weights(block, dense):
                target = next(targets)
        for name, x in seen.items():
            found[name].add(x, target.get(name))
    return found


def _solve_site(
    block: Block, names: Sequence[str], hessian: Hessian, recipe: Recipe, cut: Cut | None = None
) -> dict[str, Solved]:
    """Layers with one input, from one factorization: the order of columns depends on groups, not on widths."""
    assert recipe.spec is not None
    options: GPTQ = recipe.options
    H, tokens = hessian.matrix(), hessian.tokens
    modules, specs = {name: block.linears[name] for name in names}, block.specs(recipe)
    few = starved(tokens, len(H))
    if few or not H.diagonal().any():
        why = f"{tokens} tokens" if few else "its inputs are all zero"
        return {name: _rounded(block, name, recipe, why, H, cut) for name in names}
    solved = {}
    name = names[0]
    on_the_way = recipe.prune if recipe.prune is not None and recipe.prune.method == "sparsegpt" else None
    try:
        factor = factorize(H, recipe.spec, options, hessian.drift(), on_the_way)
        inputs = H.diagonal().sqrt()  # the norm of each, times the same number
        hessian.clear()
        del H
        for name, module in modules.items():
            weight = weight_of(module)
            notes = ["GPTAQ left out: experts"] if options.alpha > 0 and _expert(name) else []
            mask = None
            if on_the_way is not None:
                mask = weight != 0
            elif recipe.prune is not None:
                mask = kept(f"{block.name}.{name}", weight, recipe.prune, inputs, cut)
            elif int(weight.count_nonzero()) <= (1 - _PRUNED) * weight.numel():
                mask = weight != 0
                notes.append("mask kept")
            dtype = storage_dtype(weight)
            q, error = quantize(weight, factor, specs[name], dtype, options, mask, measure=True, prune=on_the_way)
            if recipe.prune is not None and mask is not None:
                notes.append(zeros_note(mask))
            solved[name] = Solved(q, error, factor.damp, "; ".join(notes))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return solved


def _rounded(
    block: Block, name: str, recipe: Recipe, why: str, H: Tensor | None = None, cut: Cut | None = None
) -> Solved:
    """Round to nearest, what is pruned by magnitude, with the output error where there is data."""
    weight = dense = weight_of(block.linears[name])
    note = f"{why}: rounded to nearest"
    try:
        if recipe.prune is not None:
            spec = data_free_prune(recipe.prune)
            weight = prune(f"{block.name}.{name}", dense, spec, cut=cut)
            note = f"{zeros_note(weight, by_magnitude(recipe.prune))}; {note}"
        q = rtn(
            weight, block.specs(recipe)[name], storage_dtype(weight), RTN(recipe.options.scale, recipe.options.clip)
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    lost = None
    if H is not None and H.diagonal().any():
        W, D = dense.float(), dense.float() - q.dequantize()
        lost = ratio(float((D @ H).mul_(D).sum(dtype=torch.float64)), float((W @ H).mul_(W).sum(dtype=torch.float64)))
    return Solved(q, lost, note=note)


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
