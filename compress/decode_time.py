"""What a token takes in every linear layer, at each width: measured on this machine with this package's kernels.

Decoding multiplies one row of x, so that a layer takes as long as its weights take to come from memory. Layers of one
shape are measured once, all widths in turns, and the cache is swept before each call: in a model, the weights of every
other layer pass through it between two calls of the same one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels.reference import packed_width
from .linear import QuantLinear
from .recipe import Recipe
from .walk import features, fitting_linears, storage_dtype
from .widths import DENSE_WIDTH

REPEATS, WARM = 15, 2
_SWEEP_BYTES = 64 << 20  # as the benchmark of the kernels: twice the last-level cache of the machine it was written on


@dataclass(frozen=True)
class Timing:
    """Of one call with one row: the median, and the interquartile range over it."""

    seconds: float
    spread: float


@torch.no_grad()
def decode_seconds(
    model: PreTrainedModel, recipe: Recipe, widths: Collection[int], repeats: int = REPEATS
) -> dict[str, dict[int, Timing]]:
    """What every layer that `recipe` quantizes takes for one token, at each width; the model may be on meta.

    On the CPU, in the model's dtype, with as many threads as torch has. The sum over layers is what linear layers add
    to a token's time: attention, norms and the head are not in it.
    """
    measured: dict[tuple[int, int, bool, torch.dtype], dict[int, Timing]] = {}
    found = {}
    for name, module in fitting_linears(model, recipe):
        K = features(module)
        N = module.weight.numel() // K
        kind = (N, K, module.bias is not None, module.weight.dtype)
        if kind not in measured:
            measured[kind] = _measure({width: _layer(*kind, width, recipe) for width in widths}, K, kind[3], repeats)
        found[name] = measured[kind]
    return found


def _layer(N: int, K: int, biased: bool, dtype: torch.dtype, width: int, recipe: Recipe) -> nn.Module:
    """A layer of this shape and width with random weights: how long it takes does not depend on them."""
    assert recipe.spec is not None
    generator = torch.Generator().manual_seed(0)
    if width == DENSE_WIDTH:
        layer = nn.Linear(K, N, biased, dtype=dtype)
        return layer.requires_grad_(False)
    spec, a = replace(recipe.spec, bits=width), recipe.activation
    packed = torch.randint(0, 256, (N, packed_width(K, width)), dtype=torch.uint8, generator=generator)
    scale = torch.full((N, spec.groups(K)), 0.01).to(storage_dtype(torch.empty(0, dtype=dtype)))
    zero = None if spec.symmetric else torch.full(scale.shape, 1, dtype=torch.uint8)
    bias = torch.zeros(N, dtype=dtype) if biased else None
    static = None if a is None or a.dynamic else (torch.full((1,), 0.1), torch.zeros(1, dtype=torch.int32))
    return QuantLinear(spec, K, packed, scale, bias, zero, a, static)


def _measure(layers: dict[int, nn.Module], K: int, dtype: torch.dtype, repeats: int) -> dict[int, Timing]:
    x = torch.randn(1, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    seconds = _in_turns({width: _call(layer, x) for width, layer in layers.items()}, repeats)
    timings = {}
    for width, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        timings[width] = Timing(median, (high - low) / median)
    return timings


def _call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def _in_turns(calls: dict[int, Callable[[], object]], repeats: int) -> dict[int, list[float]]:
    sweep = torch.zeros(_SWEEP_BYTES // 4)
    seconds: dict[int, list[float]] = {width: [] for width in calls}
    for repeat in range(WARM + repeats):
        for width, call in calls.items():
            sweep.add_(1)
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
            if repeat >= WARM:
                seconds[width].append(taken)
    return seconds


def nanoseconds(timings: dict[str, dict[int, Timing]]) -> dict[str, dict[int, int]]:
    """The medians in whole nanoseconds, as sizes for `allocate`."""
    return {name: {width: round(1e9 * of.seconds) for width, of in row.items()} for name, row in timings.items()}
