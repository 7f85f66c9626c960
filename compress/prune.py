"""Pruning: the weights that count least become zero; a pruner says what counts, a pattern or a scope what is compared.

    magnitude   |W_ij| (Han et al. 2015, arXiv 1506.02626)
    random      drawn from (0, 1]
    wanda       |W_ij| * |X_j|, the 2-norm of input j over all tokens (Sun et al. 2023, arXiv 2306.11695, equation 1)
    sparsegpt   W_ij^2 / U_jj^2, H^-1 = U^T U, in the midst of its solver (Frantar & Alistarh 2023, arXiv 2301.00774)

Compared are the weights of one row (output), of a layer, or of the whole model; each loses the same share. Under an n:m
pattern, of every m adjacent inputs of an output the n that count most stay. The result is a dense weight with zeros in
it, which any engine runs. Zeros that were there go first, and stay.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .rtn import finite
from .spec import PATTERNS, PruneSpec

# Numbers looked at in one go where rows know nothing of each other.
_SLICE = 1 << 18
# The digits, in base 2^16, in which the threshold of a whole model is found.
_DIGIT = 16
_BASE = 1 << _DIGIT
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}

# What a weight [N, K] counts, [N, K]: from itself; what is known of its inputs, [K]; and, by the layer's name, a seed.
Salience = Callable[[Tensor, Tensor | None, int], Tensor]


def by_size(weight: Tensor, inputs: Tensor | None, seed: int) -> Tensor:  # noqa: ARG001
    return weight.detach().abs()


def by_chance(weight: Tensor, inputs: Tensor | None, seed: int) -> Tensor:  # noqa: ARG001
    """From (0, 1]; the same on every device and whatever the dtype."""
    drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
    return (1 - drawn).to(weight.device)


def by_input(weight: Tensor, inputs: Tensor | None, seed: int) -> Tensor:  # noqa: ARG001
    """inputs [K]: the 2-norm of each over all tokens, or any multiple of it."""
    assert inputs is not None, "wanda compares weights by their inputs"
    return weight.detach().abs().float() * inputs


def by_loss(weight: Tensor, inputs: Tensor | None, seed: int) -> Tensor:  # noqa: ARG001
    """inputs [K]: 1 / U_jj. What the layer's output loses, when all inputs that come later make up for it."""
    assert inputs is not None, "sparsegpt compares weights by the Hessian's factor"
    return (weight.detach().float() * inputs).square()


PRUNERS: dict[str, Salience] = {"magnitude": by_size, "random": by_chance, "wanda": by_input, "sparsegpt": by_loss}


@dataclass(frozen=True)
class Cut:
    """Where a whole model is cut: what counts less than `value`, a number without dimensions, goes, and in each layer,
    by name, the first `ties` of those that count as much."""

    value: Tensor
    ties: dict[str, int]


@dataclass(frozen=True)
class Pruned:
    """What became of a layer; error, damp and note as in block.Solved, but that its weight is in its place already."""

    error: float | None
    note: str
    damp: float | None = None


def zeros_note(weight: Tensor, *more: str) -> str:
    """What a report says of a pruned weight."""
    zeros = weight.numel() - int(weight.count_nonzero())
    return ", ".join([*filter(None, more), f"{100 * zeros / max(1, weight.numel()):.4g}% zero"])


def by_magnitude(spec: PruneSpec) -> str:
    """What a report says of a layer that a calibrated pruner had no data for; nothing for other pruners."""
    return "by magnitude" if spec.calibrated else ""


def prune(name: str, weight: Tensor, spec: PruneSpec, inputs: Tensor | None = None, cut: Cut | None = None) -> Tensor:
    """The weight [N, K] of the layer called `name`, with zeros where `kept` says so; same shape and dtype."""
    return weight.masked_fill(~kept(name, weight, spec, inputs, cut), 0)


@torch.no_grad()
def kept(name: str, weight: Tensor, spec: PruneSpec, inputs: Tensor | None = None, cut: Cut | None = None) -> Tensor:
    """bool [N, K], True where a weight of the layer called `name` stays.

    inputs   [K], what PRUNERS[spec.method] has to know of them
    cut      of the whole model, where that is what spec compares
    Of n weights that are compared, round(sparsity * n) are False, half to even, among equal ones the first in row-major
    order; more only where more are zero already. Raises ValueError for NaN or infinity and for a K that a pattern does
    not divide.
    """
    check_features(weight.shape[1], spec)
    if not finite(weight):
        raise ValueError("weight: contains NaN or infinity and cannot be pruned")
    if inputs is not None and not finite(inputs):
        raise ValueError("inputs: contain NaN or infinity, or overflow float32 when squared")
    if spec.pattern is None and spec.compared == "global" and cut is None:
        raise ValueError("scope: global compares all layers of a model; one alone has row or layer")
    salience = salience_of(name, weight, spec, inputs)
    there = weight.detach() != 0
    if cut is not None:
        salience = salience.to(cut.value.dtype)
        gone = salience < cut.value.to(salience.device)
        ties = (salience == cut.value.to(salience.device)).flatten().nonzero()[:, 0]
        gone.view(-1)[ties[: cut.ties[name]]] = True
        return there.logical_and_(~gone)
    return keep_most(salience, there, spec)


def salience_of(name: str, weight: Tensor, spec: PruneSpec, inputs: Tensor | None = None) -> Tensor:
    """[N, K]: what each weight counts, from 0; below that of any other for one that is zero already."""
    # Layers differ, and none depends on which others there are. Of a seed torch takes 32 bits.
    seed = zlib.crc32(f"{spec.seed} {name}".encode())
    return PRUNERS[spec.method](weight, inputs, seed).masked_fill_(weight.detach() == 0, -1).contiguous()


def keep_most(salience: Tensor, there: Tensor, spec: PruneSpec, count: int | None = None) -> Tensor:
    """bool [N, B]: those of `there` [N, B] that stay, by salience [N, B].

    count   how many go in all, where it is not for spec to say
    """
    N, B = salience.shape
    if spec.pattern is not None:
        stay, of = PATTERNS[spec.pattern]
        return there & ~least(salience.view(-1, of), of - stay).view(N, B)
    if spec.compared == "row" and count is None:
        return there & ~least(salience, wanted(spec, B))
    return there & ~least(salience.view(1, -1), wanted(spec, N * B) if count is None else count).view(N, B)


def wanted(spec: PruneSpec, numbers: int) -> int:
    """How many of so many are to go."""
    return round(spec.percent * numbers / 100)


def least(values: Tensor, count: int) -> Tensor:
    """bool [R, L]: the `count` smallest in each row of values [R, L], among equal ones the first."""
    found = torch.zeros_like(values, dtype=torch.bool)
    if not count:
        return found
    rows = max(1, _SLICE // max(1, values.shape[1]))
    for start in range(0, len(values), rows):
        part, gone = values[start : start + rows], found[start : start + rows]
        threshold = part.kthvalue(count, dim=1, keepdim=True).values
        torch.lt(part, threshold, out=gone)
        equal = part == threshold
        more = count - gone.sum(1, keepdim=True)
        gone |= equal.logical_and_(equal.cumsum(1, dtype=torch.int32) <= more)
    return found


def check_features(features: int, spec: PruneSpec) -> None:
    """ValueError when a pattern does not divide so many inputs."""
    if spec.pattern is not None and features % PATTERNS[spec.pattern][1]:
        of = PATTERNS[spec.pattern][1]
        raise ValueError(f"{features} input features do not divide into groups of {of}, for the pattern {spec.pattern}")


# The whole model.


Weights = Callable[[], Iterator[tuple[str, Tensor]]]


@torch.no_grad()
def cut_of(weights: Weights, numbers: int, dtype: torch.dtype, spec: PruneSpec) -> Cut | None:
    """Where a model is cut whose weights are compared with each other; None where they are not.

    weights   called for each of three passes: (name, weight [N, K]) of every layer; none has to stay in memory
    numbers   in all of them
    dtype     of the widest
    The number of zeros in the whole model is exact: with the bits of a float32 read as an integer, which for positive
    numbers has their order, a histogram finds the upper half of the threshold's, a second one the lower (two more in
    float64). The last pass counts what is equal to it, of which that of the first layers goes. Raises ValueError for
    NaN or infinity.
    """
    if spec.compared != "global" or spec.pattern is not None:
        return None
    dtype = torch.promote_types(dtype, torch.float32)
    left, prefix = wanted(spec, numbers), 0
    for digit in reversed(range(_digits(dtype))):
        counts = torch.zeros(_BASE, dtype=torch.int64)
        for name, weight in weights():
            if not finite(weight):
                raise ValueError(f"{name}: weight: contains NaN or infinity and cannot be pruned")
            counts += histogram(_bits(name, weight, spec, dtype), digit, prefix)
        upto = counts.cumsum(0)
        found = int((upto < left).sum())
        left -= int(upto[found - 1]) if found else 0
        prefix = prefix << _DIGIT | found
    ties: dict[str, int] = {}
    for name, weight in weights():
        equal = sum(int((part == prefix).sum()) for part in _bits(name, weight, spec, dtype))
        ties[name] = min(equal, left)
        left -= ties[name]
    return Cut(torch.tensor(prefix, dtype=_INTEGERS[dtype]).view(dtype), ties)


def histogram(bits: Iterable[Tensor], digit: int, prefix: int) -> Tensor:
    """int64 [2^16]: how often each digit comes among numbers whose higher digits are `prefix`."""
    counts = torch.zeros(_BASE, dtype=torch.int64)
    for part in bits:
        # Beyond the highest digit nothing is left.
        inside = part[(part >> _DIGIT * digit) >> _DIGIT == prefix]
        counts += torch.bincount((inside >> _DIGIT * digit & (_BASE - 1)).cpu(), minlength=_BASE)
    return counts


def _bits(name: str, weight: Tensor, spec: PruneSpec, dtype: torch.dtype) -> Iterator[Tensor]:
    """int64 [n] of what each weight counts, some at a time; 0 for one that is zero already, which goes first."""
    salience = salience_of(name, weight, spec).view(-1)
    for part in salience.split(_SLICE):
        yield part.to(dtype).clamp_(min=0).view(_INTEGERS[dtype]).long()


def _digits(dtype: torch.dtype) -> int:
    return 8 * dtype.itemsize // _DIGIT
