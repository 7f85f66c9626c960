"""What compression leaves of an unlearning update, seen at the weights: the why beside the behaviour, without any data.

Written for a weight t of the target, u of the unlearned model, and Q, what a recipe makes of a weight. Unlearning
returns under compression where updates stay inside their rounding buckets (Zhang et al. 2024, arXiv 2410.16454): Q(u)
is then Q(t), although u is not t. How much of u - t is left along its own direction says in which order recipes bring
knowledge back; what is left beside that direction is noise, which the target compressed alike has too.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import permutations
from typing import Any, NamedTuple, TypeGuard, TypeVar

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr
from torch import Tensor, nn

from ..compress.linear import QuantLinear
from ..compress.recipe import Recipe
from ..compress.walk import compressed_weight, linears, quantize_weight, weight_of

# Sizes are counted in bins of float32's exponent and its first 10 mantissa bits: quantiles of any number of weights,
# to 0.1%, without keeping or sorting them.
_DROPPED_BITS = 13
_BINS = 0x7F800000 >> _DROPPED_BITS  # infinity's own
# Weights compared at once, in float64: few enough to stay in the processor's cache.
_BLOCK = 1 << 18
# 40,320 orders of eight recipes are tried in 0.1 s; from nine on Student's t is close.
_EXACT = 8

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class WeightSurvival:
    """Of one layer, of all of one kind, or of all that a recipe compresses. Shares are of `weights`.

    moved            share of weights with u != t: in pure bfloat16 most are not
    changed_codes    share whose stored code differs (of what has no codes, dense or pruned: whose value differs)
    predicted_codes  the same if every t lay anywhere in its bucket with equal chance: mean of min(1, |u - t| / step).
                     Far above changed_codes: the update keeps clear of the edges
    changed          share with Q(u) != Q(t): moved scales count too
    half_steps, half_steps_p90   median and 90th percentile of |u - t| over half the step of t's group, to 0.1%;
                     a weight in the middle of its bucket leaves it at 1. None without steps
    norm             |Q(u) - Q(t)| / |u - t|: 0 when all is undone, above 1 when rounding added more than it took
    cosine           of Q(u) - Q(t) and u - t; None when either is zero
    survival         the part of the update that is left along its own direction, norm x cosine: 1 all, 0 none.
                     Rounding at independent positions leaves 1 on average, however coarse
    zero_codes       share of weights that are zero in Q(t): in the bucket that contains zero, or pruned
    zero_bucket      share of the squared update that falls on those
    norm, survival and zero_bucket are None when there was no update.
    """

    weights: int
    moved: float
    changed_codes: float
    predicted_codes: float
    changed: float
    half_steps: float | None
    half_steps_p90: float | None
    norm: float | None
    cosine: float | None
    survival: float | None
    zero_codes: float
    zero_bucket: float | None

    @property
    def predicted_recovery(self) -> float | None:
        """1 - survival, to order recipes by how much knowledge they bring back; of how much it says nothing exact.

        Negative: the update came out larger than it was.
        """
        return None if self.survival is None else 1 - self.survival


@dataclass(frozen=True)
class Survival:
    """total; by_module: over all layers whose name ends alike ("q_proj"); layers: by full name, in model order."""

    total: WeightSurvival
    by_module: dict[str, WeightSurvival]
    layers: dict[str, WeightSurvival]


@dataclass(frozen=True)
class Agreement:
    """Spearman's rho over n recipes, and its two-sided p-value; None where `reason` says why there is none."""

    rho: float | None
    p: float | None
    n: int
    reason: str | None = None


def survival(
    unlearned: nn.Module, target: nn.Module, recipe: Recipe, packed: tuple[nn.Module, nn.Module] | None = None
) -> Survival:
    """Over all linear layers that `recipe` does not ignore, one after the other; the models stay as they are.

    packed   both models as the recipe left them, where that cannot be had from a weight alone: by a calibrated one, or
             where more than one thing is done
    Raises ValueError for models of unlike layers, weights that are not finite, and layers that cannot take the recipe.
    """
    total, by_module, layers = _Sums(), dict[str, _Sums](), dict[str, WeightSurvival]()
    with torch.no_grad():
        for name, new, old in _pairs(unlearned, target, recipe):
            u, t = (
                _compressed(name, weight, recipe) if made is None else _unpacked(weight, made.get_submodule(name))
                for weight, made in zip((new, old), packed or (None, None))
            )
            sums = _layer(u, t)
            kind = name.split(".")[-1]
            layers[name] = sums.shares()
            by_module[kind] = by_module.get(kind, _Sums()) + sums
            total = total + sums
    return Survival(total.shares(), {kind: sums.shares() for kind, sums in by_module.items()}, layers)


def predicted_order(predicted: Mapping[Name, float | None], measured: Mapping[Name, float | None]) -> Agreement:
    """Whether `predicted_recovery` orders recipes as the measured recovered share R does, over those that have both.

    Leave the dense recipe out: nothing is predicted where nothing is compressed. Up to eight recipes the p-value is
    exact (all orders are tried); beyond, Student's t, but never below that of a perfect order.
    """
    both = [(p, measured.get(name)) for name, p in predicted.items()]
    known = [(p, m) for p, m in both if _is_number(p) and _is_number(m)]
    n = len(known)
    if n < 3:
        return Agreement(None, None, n, f"recipes with both a prediction and a measurement: {n}; an order needs 3")
    x, y = (rankdata(column) for column in zip(*known, strict=True))
    for what, ranks in (("predicted", x), ("measured", y)):
        if np.ptp(ranks) == 0:
            return Agreement(None, None, n, f"{what}: all {n} recipes have the same recovery")
    found = spearmanr(x, y)
    rho, p_value = float(found.statistic), float(found.pvalue)
    if n > _EXACT:
        return Agreement(rho, max(p_value, 2 / math.factorial(n)), n)
    x, y = x - x.mean(), y - y.mean()
    orders = x[np.array(list(permutations(range(n))))] @ y / math.sqrt((x @ x) * (y @ y))  # [n!]
    return Agreement(rho, float((np.abs(orders) >= abs(rho) - 1e-9).mean()), n)


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _pairs(unlearned: nn.Module, target: nn.Module, recipe: Recipe) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name and the two weights [N, K] of each layer."""
    new, old = dict(linears(unlearned, recipe.ignore)), dict(linears(target, recipe.ignore))
    if not old:
        raise ValueError(f"target: {type(target).__name__} has no linear layer to compress")
    if alone := sorted(new.keys() ^ old.keys()):
        raise ValueError(f"unlearned: its layers are not the target's; only one of the two has {alone[0]}")
    for name, module in old.items():
        weights = weight_of(new[name]), weight_of(module)
        if weights[0].shape != weights[1].shape:
            raise ValueError(f"{name}: {list(weights[0].shape)} in unlearned, {list(weights[1].shape)} in target")
        for which, weight in zip(("unlearned", "target"), weights, strict=True):
            if not torch.isfinite(weight).all():
                raise ValueError(f"{which}: {name}: weight: contains NaN or infinity")
        yield name, *weights


@dataclass(frozen=True)
class _Sums:
    """What WeightSurvival is made of, in a form that adds up over layers; half_steps [_BINS] int64 counts."""

    weights: int = 0
    moved: int = 0
    codes: int = 0
    predicted: float = 0.0
    values: int = 0
    zeros: int = 0
    before: float = 0.0
    after: float = 0.0
    along: float = 0.0
    on_zeros: float = 0.0
    half_steps: Tensor | int = 0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(_Sums)))

    def shares(self) -> WeightSurvival:
        return WeightSurvival(
            weights=self.weights,
            moved=self.moved / self.weights,
            changed_codes=self.codes / self.weights,
            predicted_codes=self.predicted / self.weights,
            changed=self.values / self.weights,
            half_steps=_quantile(self.half_steps, 0.5),
            half_steps_p90=_quantile(self.half_steps, 0.9),
            norm=math.sqrt(self.after / self.before) if self.before else None,
            cosine=self.along / math.sqrt(self.before * self.after) if self.before and self.after else None,
            survival=self.along / self.before if self.before else None,
            zero_codes=self.zeros / self.weights,
            zero_bucket=self.on_zeros / self.before if self.before else None,
        )


class _Compressed(NamedTuple):
    """weight [N, K], what the recipe makes of it (value [N, K]), codes [N, K], step [N, K/G].

    Without a format the values are the codes, and there are no steps.
    """

    weight: Tensor
    value: Tensor
    codes: Tensor
    step: Tensor | None

    def rows(self, at: slice) -> _Compressed:
        step = None if self.step is None else self.step[at]
        return _Compressed(self.weight[at], self.value[at], self.codes[at], step)


def _compressed(name: str, weight: Tensor, recipe: Recipe) -> _Compressed:
    if recipe.spec is None:
        value = compressed_weight(name, weight, recipe)
        return _Compressed(weight, value, value, None)
    q = quantize_weight(name, weight, recipe)
    return _stepped(weight, q.dequantize(), q.codes, q.scale)


def _stepped(weight: Tensor, value: Tensor, codes: Tensor, scale: Tensor) -> _Compressed:
    # A group of zeros has a scale that stands for nothing; a step has no sign.
    empty = (value.view(*scale.shape, -1) == 0).all(2)
    return _Compressed(weight, value, codes, scale.abs().masked_fill(empty, 0))


def _unpacked(weight: Tensor, layer: Any) -> _Compressed:
    if not isinstance(layer, QuantLinear):  # pruned
        return _Compressed(weight, weight_of(layer), weight_of(layer), None)
    return _stepped(weight, layer.dequantized(), layer.codes(), layer.scale)


def _layer(u: _Compressed, t: _Compressed) -> _Sums:
    """Of one layer of the unlearned model and the target."""
    total, rows = _Sums(), max(1, _BLOCK // u.weight.shape[1])
    for start in range(0, u.weight.shape[0], rows):
        at = slice(start, start + rows)
        total = total + _block(u.rows(at), t.rows(at))
    return total


def _block(u: _Compressed, t: _Compressed) -> _Sums:
    update = u.weight.double() - t.weight.double()
    left = u.value.double() - t.value.double()
    zeros = t.value == 0
    moved = update != 0
    counts: Tensor | int = 0
    if t.step is None:
        # What the recipe leaves as it is takes the update whole, what it prunes takes none.
        expected = moved & (t.value == t.weight)
    else:
        steps = (update.float().abs().view(*t.step.shape, -1) / t.step.float()[:, :, None]).view_as(update)
        # In a group of zeros any update changes the codes (x / 0), and none does not (0 / 0).
        steps = steps.nan_to_num(nan=math.inf, posinf=math.inf)
        expected = steps.clamp(max=1) * moved
        counts = _histogram(2 * steps)
    squares = update.square()
    return _Sums(
        weights=update.numel(),
        moved=int(moved.sum()),
        codes=int((u.codes != t.codes).sum()),
        predicted=float(expected.double().sum()),
        values=int((left != 0).sum()),
        zeros=int(zeros.sum()),
        before=float(squares.sum()),
        after=float(left.square().sum()),
        along=float((left * update).sum()),
        on_zeros=float((squares * zeros).sum()),
        half_steps=counts,
    )


def _histogram(sizes: Tensor) -> Tensor:
    """Counts [_BINS] int64 of float32 sizes >= 0; what is infinite is left out."""
    return torch.bincount((sizes.view(torch.int32) >> _DROPPED_BITS).flatten(), minlength=_BINS + 1)[:_BINS]


def _quantile(counts: Tensor | int, share: float) -> float | None:
    """The smallest size that at least `share` of all reach no further than, without the bits that its bin drops."""
    if isinstance(counts, int) or not int(counts.sum()):
        return None
    below = counts.cumsum(0)
    index = int((below < share * int(below[-1])).sum())
    return float(torch.tensor([index << _DROPPED_BITS], dtype=torch.int32).view(torch.float32))
