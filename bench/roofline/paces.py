"""How fast products go where a model makes them: between other small ops, each weight fresh from memory.

Called over and over, a product finds threads awake and its code at hand. In a decoder layer norms and sums of one row
stand between two products: threads have gone to sleep, and the weights of the last product have driven everything else
out of the caches. So each product is measured after a norm, and the norm between products, too: its ops say what any
small op of a model costs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...backends.ceilings import Pace, Rate
from ...backends.device import Device
from .weights import Form, Weight
from .windows import Windows

_OPS = 6  # of the norm below


@dataclass(frozen=True)
class PaceSizes:
    """rows   of x, the first 1
    small, large   features, in and out, of weights that meet one row: two sizes tell what a product takes beyond them
    middle    of those that meet more
    """

    rows: tuple[int, ...] = (1, 4, 16, 64, 256)
    small: int = 1024
    large: int = 4096
    middle: int = 2048


class Norm(nn.Module):
    """As most models have it: root mean square, in float32, op by op."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def pace(device: Device, windows: Windows, name: str, form: Form, spilling: int, sizes: PaceSizes) -> tuple[Pace, Rate]:
    """(pace, seconds of a small op) of weights kept as `form`; spilling: bytes that no cache holds. ValueError where a
    figure stays unsteady."""
    small, launch = _turns(device, windows, name, form, sizes.small, 1, spilling)
    large, _ = _turns(device, windows, name, form, sizes.large, 1, spilling)
    slope = (large.value - small.value) / (sizes.large**2 - sizes.small**2)
    start = max(small.value - slope * sizes.small**2, 1e-9)
    if slope <= 0:  # nothing but the start is seen
        start, slope = 1e-9, large.value / sizes.large**2
    rows = {1: _rate(1, 1 / slope, large)}
    for count in sizes.rows[1:]:
        taken, _ = _turns(device, windows, name, form, sizes.middle, count, spilling)
        rows[count] = _rate(count, sizes.middle**2 / max(taken.value - start, 0.05 * taken.value), taken)
    return Pace(Rate(start, f"{small.source}, less what its weights take", spread=small.spread), rows), launch


def attention_pace(device: Device, windows: Windows, spilling: int) -> Pace:
    """Of attention of one row to a short cache, which takes little but its start."""
    form = Form(_caches(device), torch.float32, "torch's attention")
    taken, _ = _turns(device, windows, "attention", form, _HEADS * _HEAD, 1, spilling)
    return Pace(taken, {1: _rate(1, 2 * _HEADS * _KEYS * _HEAD / taken.value, taken)})


_HEADS, _KEYS, _HEAD = 16, 128, 64


def _caches(device: Device) -> Callable[[int, int], Iterator[Weight]]:
    query = torch.randn(1, _HEADS, 1, _HEAD, device=device.torch_device)

    def make(features: int, count: int) -> Iterator[Weight]:  # noqa: ARG001, as other forms are asked
        for _ in range(count):
            k, v = torch.randn(2, 1, _HEADS, _KEYS, _HEAD, device=device.torch_device)
            # The row that is handed over is another layer's input: queries have a shape of their own.
            yield Weight(2 * k.nbytes, lambda _, k=k, v=v: F.scaled_dot_product_attention(query, k, v))  # type: ignore[misc]

    return make


def _rate(rows: int, weights: float, told: Rate) -> Rate:
    """Operations a second; weights: numbers of a weight that are gone through in a second."""
    return Rate(2 * rows * weights, told.source, spread=told.spread)


def _turns(
    device: Device, windows: Windows, name: str, form: Form, features: int, rows: int, spilling: int
) -> tuple[Rate, Rate]:
    """Seconds of a product, and of an op of the norm in front of it."""
    first = next(form.make(features, 1))
    weights = list(form.make(features, max(2, math.ceil(spilling / first.bytes) if rows == 1 else 2)))
    x = torch.randn(rows, features, device=device.torch_device)
    y, norm = x.to(form.dtype), Norm(features, device.torch_device)
    taken: list[tuple[float, float]] = []

    def sample(which: int) -> Callable[[], Sequence[float]]:
        def take() -> list[float]:
            taken[:] = [_turn(device, weights, x, y, norm) for _ in range(windows.count)]
            return [each[which] for each in taken]

        return take

    _turn(device, weights, x, y, norm)
    told = f"measured: {form.told} after a norm, {rows} x {features} x {features}"
    seconds, spread = windows.steady(f"{name}, {rows} rows between other ops", sample(0))
    low, middle, high = statistics.quantiles([each[1] for each in taken], n=4)
    launch = Rate(middle / _OPS, f"measured: a norm of {_OPS} ops between products", spread=(high - low) / middle)
    return Rate(seconds, told, spread=spread), launch


def _turn(device: Device, weights: Sequence[Weight], x: Tensor, y: Tensor, norm: Norm) -> tuple[float, float]:
    """Mean seconds of a product and of the norm before it, over all weights."""
    if device.kind == "cpu":
        products = norms = 0.0
        for weight in weights:
            with device.timed() as timer:
                norm(x)
            norms += timer.seconds
            with device.timed() as timer:
                weight.multiply(y)
            products += timer.seconds
        return products / len(weights), norms / len(weights)
    device.synchronize()
    with device.timed() as alone:
        for _ in weights:
            norm(x)
    norms = alone.seconds
    with device.timed() as both:
        for weight in weights:
            norm(x)
            weight.multiply(y)
    return max(both.seconds - norms, 1e-9) / len(weights), norms / len(weights)
