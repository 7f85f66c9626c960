"""AWQ (Lin et al. 2023, arXiv 2306.00978): channels that matter are made larger before rounding.

Q(W diag(s)) diag(s)^-1 x rounds a channel with a large s more finely. Equation 4: s is the mean |x| to a power (with
`duo`, over the mean size of the weights to the rest of it), and the power is the one of a grid for which the output of
the module around the layers (attention, MLP, expert) changes least. Equal scales are among the candidates, so the
search never loses to rounding to nearest. s is folded into the earlier operation (smooth.py). Then each group's range
is cut where that lowers the layer's own output error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .block import Block, Linear, Solved
from .experts import starved
from .grid import decode, encode, group_parameters
from .knobs import AWQ, RTN
from .recipe import Recipe
from .rtn import QTensor, rtn
from .sites import Loss, Rows, Site, observe, sites
from .smooth import fold_, survey
from .spec import QuantSpec
from .walk import storage_dtype, weight_of

# Ranges down to this share of the full one, as AWQ's authors have it: further down a group gains by its own error what
# its neighbours, which are left out, lose.
CLIP_LEAST = 0.5
CLIP_STEPS = 20
# Widest block of channels whose second moments are kept; wider groups (a whole row) are judged block by block.
_WIDEST = 512
# Weights looked at in one go: what the search keeps at a time stays in the cache.
_CHUNK = 1 << 17


@dataclass
class Outcome:
    """What the search did for layers that share an input.

    power    of the best candidate; None: equal scales
    before   mean squared change of the parent's output when the layers are rounded to nearest as they are; None: there
             is no earlier operation to fold scales into, or there are too few tokens
    after    the same with the scales found
    s        [K] float32
    cut      layer -> the sum over its groups of the group's own output error, with full ranges and with those found
    """

    place: Site
    power: float | None
    before: float | None
    after: float | None
    s: Tensor
    cut: dict[str, tuple[float, float]] = field(default_factory=dict)


def solve(block: Block, recipe: Recipe) -> dict[str, Solved]:
    """Quantize the block's linear layers; scales are folded into the dense block, in place."""
    return search(block, recipe)[0]


@torch.no_grad()
def search(block: Block, recipe: Recipe) -> tuple[dict[str, Solved], list[Outcome]]:
    """As solve, with what the search found at every site.

    The error of a layer is that of its outputs before anything was folded, on about sites.ROWS rows.
    """
    specs, options = block.specs(recipe), recipe.options
    found, refused = survey(block)
    places = sites(block, found)
    moments = {name: _moment_blocks(layer, specs[name]) for name, layer in block.linears.items()}
    inputs, called = observe(block, [place.parent for place in places if place.pair is not None], moments)
    outcomes = []
    for place in places:
        loss = Loss(block.module.get_submodule(place.parent), called.get(place.parent, []))
        outcomes.append(_best_scale(place, inputs, loss, specs, options))
    divisors: dict[str, Tensor] = {}  # layer -> [N], what its outputs are divided by
    for outcome in outcomes:
        pair = outcome.place.pair
        if pair is not None:
            divisors[pair.previous] = pair.spread(outcome.s)
    solved = {}
    for outcome in outcomes:
        for name, layer in outcome.place.linears.items():
            t = divisors.get(name, torch.ones_like(outcome.s[:1]))
            solved[name] = _quantize(name, layer, outcome, t, inputs.get(name), specs[name], options, refused.get(name))
    for outcome in outcomes:
        if outcome.place.pair is not None:
            fold_(outcome.place.pair, outcome.s)
    return {name: solved[name] for name in block.linears}, outcomes


def _best_scale(
    place: Site, inputs: Mapping[str, Rows], loss: Loss, specs: Mapping[str, QuantSpec], options: AWQ
) -> Outcome:
    """The scales for which rounding changes the parent's output least."""
    first = next(iter(place.linears.values()))
    equal = torch.ones(weight_of(first).shape[1], device=first.weight.device)

    def changed(s: Tensor) -> float:
        return loss({layer: _rounded(layer, s, specs[name], options) for name, layer in place.linears.items()})

    enough = [name for name in place.linears if name in inputs and not starved(inputs[name].tokens, len(equal))]
    if place.pair is None or not enough:
        return Outcome(place, None, None, None, equal)
    before = least = changed(equal)
    best = Outcome(place, None, before, before, equal)
    for power, s in candidates(place, inputs, specs[next(iter(place.linears))], options):
        try:
            after = changed(s)
        except ValueError:  # its groups need a scale beyond the dtype that scales are stored in
            continue
        if after < least:
            least, best = after, Outcome(place, power, before, after, s)
    return best


def candidates(
    place: Site, inputs: Mapping[str, Rows], spec: QuantSpec, options: AWQ
) -> Iterator[tuple[float, Tensor]]:
    """(power r, s [K] float32) for all powers of the grid but those that make all scales equal."""
    assert place.pair is not None
    seen = {id(inputs[name]): inputs[name] for name in place.linears if name in inputs}.values()
    x = torch.stack([rows.total for rows in seen]).sum(0) / sum(rows.tokens for rows in seen)  # [K] mean |x|
    w = relative_size([weight_of(layer) for layer in place.linears.values()], spec) if options.duo else None
    for step in range(0 if options.duo else 1, options.grid + 1):
        r = step / options.grid
        yield r, place.pair.tie(scales(x, w, r))


def scales(x: Tensor, w: Tensor | None, r: float) -> Tensor:
    """s [K] = x^r, or x^r / (w^(1 - r) + 1e-4), at least 1e-4 and divided by sqrt(max s * min s), as the authors' code
    and AutoAWQ's have it. A channel with x = 0, which no calibration data reach, keeps s = 1.

    x [K]   mean |x| of the inputs
    w [K]   mean relative size of the weights (None: not `duo`)
    """
    s = (x.pow(r) if w is None else x.pow(r) / (w.pow(1 - r) + 1e-4)).clamp(min=1e-4)
    alive = x > 0
    if not alive.any():
        return torch.ones_like(s)
    return torch.where(alive, s / (s[alive].max() * s[alive].min()).sqrt(), torch.ones_like(s))


def relative_size(weights: Sequence[Tensor], spec: QuantSpec) -> Tensor:
    """[K] float32, for weights [N, K]: mean of |w| / max |w| in its group over the rows of all of them."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight in weights:
        w = weight.float().abs().view(len(weight), spec.groups(weight.shape[1]), -1)
        total += (w / (w.amax(2, keepdim=True) + 1e-6)).sum(0).flatten()
    return total / sum(len(weight) for weight in weights)


def _rounded(layer: Linear, s: Tensor, spec: QuantSpec, options: AWQ) -> Tensor:
    """Q(W diag(s)) diag(s)^-1 [N, K] in the layer's dtype, with full ranges."""
    weight = weight_of(layer)
    q = rtn(weight.float() * s, spec, storage_dtype(weight), RTN(options.scale, clip=False))
    return (q.dequantize() / s).to(weight.dtype)


def _quantize(
    name: str,
    layer: Linear,
    outcome: Outcome,
    t: Tensor,
    rows: Rows | None,
    spec: QuantSpec,
    options: AWQ,
    reason: str | None,
) -> Solved:
    """One layer whose inputs are divided by the outcome's s, and whose outputs by t [N] or [1]."""
    weight, s = weight_of(layer), outcome.s
    folded = weight.float() * s / t[:, None]
    dtype = storage_dtype(weight)
    if rows is None or starved(rows.tokens, len(s)):
        q = rtn(folded, spec, dtype, RTN(options.scale, options.clip))
        note = f"{0 if rows is None else rows.tokens} tokens: rounded to nearest"
    else:
        q = rtn(folded, spec, dtype, RTN(options.scale, clip=False))
        note = "" if reason is None else f"not scaled {reason}"
        if options.clip:
            assert rows.gram is not None
            m = len(rows.gram)
            q, outcome.cut[name] = cut_ranges(folded, rows.gram / s.view(m, -1, 1) / s.view(m, 1, -1), q, options.scale)
    error = None if rows is None else rows.error(weight, q.dequantize() / s * t[:, None])
    return Solved(q, error, note=note)


def _moment_blocks(layer: Linear, spec: QuantSpec) -> int:
    """Into how many blocks the second moments of a layer's inputs are cut: its groups, or parts of them."""
    K = weight_of(layer).shape[1]
    groups = spec.groups(K)
    return next(m for m in range(groups, K + 1, groups) if K % m == 0 and K // m <= _WIDEST)


def cut_ranges(w: Tensor, gram: Tensor, full: QTensor, scale: str) -> tuple[QTensor, tuple[float, float]]:
    """The range of each group that lets it change the layer's output least; and what that sums up to, before and after.

    A group with error e changes the output by e gram e^T in the mean square, where gram is the mean of x x^T on its
    channels; what groups do to each other is left out, as in the authors' code. All ranges down to CLIP_LEAST of the
    full one are tried, with both signs of a symmetric scale.
    w [N, K] float32; gram [m, K/m, K/m], one or several blocks a group; full: w rounded with full ranges.
    """
    rows = max(1, _CHUNK // w.shape[1])
    codes, scales, zeros = full.codes.clone(), full.scale.clone(), None if full.zero is None else full.zero.clone()
    before = after = 0.0
    for at in range(0, len(w), rows):
        part = slice(at, at + rows)
        groups = w[part].view(-1, scales.shape[1], w.shape[1] // scales.shape[1])  # [rows, n, G]
        best = codes[part].view_as(groups)
        least = _output_error(groups, best, scales[part], None if zeros is None else zeros[part], gram, full.spec)
        before += float(least.sum())
        for found, zero in _ranges(groups, full.spec, full.scale.dtype, scale):
            tried = encode(groups, found, zero, full.spec.bits)
            error = _output_error(groups, tried, found, zero, gram, full.spec)
            better = error < least
            least = torch.where(better, error, least)
            best[better] = tried[better]
            scales[part][better] = found[better]
            if zeros is not None and zero is not None:
                zeros[part][better] = zero[better]
        after += float(least.sum())
    return QTensor(codes, scales, full.spec, zeros), (before, after)


def _ranges(
    groups: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, scale: str
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(scale, zero) [N, n] of all ranges that are tried."""
    for step in range(CLIP_STEPS + 1):
        share = 1 - (1 - CLIP_LEAST) * step / CLIP_STEPS
        found, zero = group_parameters(groups * share, spec, scale_dtype, scale)
        yield found, zero
        if zero is None:
            yield -found, None


def _output_error(
    groups: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, gram: Tensor, spec: QuantSpec
) -> Tensor:
    """[N, n]: e gram e^T of every group, e its rounding error."""
    e = (decode(codes, scale, zero, spec.bits) - groups).view(len(groups), len(gram), -1).transpose(0, 1)  # [m, N, K/m]
    return ((e @ gram) * e).sum(2).T.reshape(*groups.shape[:2], -1).sum(2)
