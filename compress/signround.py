"""Learned rounding: up or down is chosen by signed gradient descent (Cheng et al. 2023, arXiv 2309.05516; AutoRound).

    w_hat = s * (clip(round(w / s + V) + z, 0, 2^bits - 1) - z)

with V in [-1/2, 1/2] for every weight, and the range of every group narrowed or widened: s = s_0 * alpha for symmetric
grids, s = (high * alpha - low * beta) / (2^bits - 1) and z = round(-low * beta / s) for asymmetric ones. V, alpha and
beta follow the sign of the gradient of one objective: the mean squared difference between the outputs of a decoder
block with w_hat and of the dense one, on the same inputs. Gradients pass through rounding unchanged (straight-through).

It starts from round to nearest with clip search, so that alpha and beta, which the paper keeps in [0, 1], may also
widen a range. Scales are rounded to the dtype they are stored in at every step: what is optimised is what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .block import Block, Linear, Solved
from .experts import starved
from .grid import encode
from .knobs import RTN, SignRound
from .recipe import Recipe
from .rtn import QTensor, rtn
from .spec import QuantSpec
from .walk import storage_dtype, weight_of

# Of a range's share that is learned. With the default rate it moves by 1/2 in all.
LEAST, MOST = 0.5, 1.5
# Times that all calibration data is looked at to see whether the weights are the best so far.
_LOOKS = 4
_SEED = 0


@dataclass(frozen=True)
class Learned:
    """q       by name: the best weights found
    before, after   mean squared difference of the block's outputs, over all calibration data: rounded to nearest, and
                    with q; after <= before
    tokens  by name: rows that the layer saw. With too few of them it stays as it was rounded to nearest
    """

    q: dict[str, QTensor]
    before: float
    after: float
    tokens: dict[str, int]


def solve(block: Block, recipe: Recipe) -> dict[str, Solved]:
    """Every linear layer of the block, its rounding learned; the block's weights are left as they were."""
    found = learn(block, block.specs(recipe), recipe.options)
    errors = output_errors(block, found.q)
    solved = {}
    for name, q in found.q.items():
        few = starved(found.tokens[name], q.codes.shape[1])
        note = f"{found.tokens[name]} tokens: rounded to nearest" if few else ""
        solved[name] = Solved(q, errors.get(name), note=note)
    return solved


def learn(block: Block, specs: Mapping[str, QuantSpec], options: SignRound) -> Learned:
    """Quantize the linear layers of `block` to their formats, all at once.

    Every step sees whole batches of the calibration data, as many as make up options.batch sequences. The same data
    gives the same result. Memory: the dense block's outputs on all batches, in the hidden states' dtype; some 20 bytes
    for each weight of the block (V, w_hat, two gradients, and the weight itself in float32); and what one batch's
    backward pass through the block keeps.
    """
    targets, tokens = _dense_outputs(block)
    start = {name: _start(module, specs[name], options) for name, module in block.linears.items()}
    learned = {
        name: Rounding(weight_of(block.linears[name]), q)
        for name, q in start.items()
        if not starved(tokens[name], q.codes.shape[1])
    }
    best, least = start, _objective(block, start, targets)
    before = least
    if not before or not learned:
        return Learned(start, before, before, tokens)
    fixed = {name: q.dequantize() for name, q in start.items() if name not in learned}
    rate = options.learning_rate or 1 / options.iterations
    looks = {round(options.iterations * (i + 1) / _LOOKS) for i in range(_LOOKS)}
    picks = _picks([target.shape[0] for target in targets], options.batch)
    for step in range(options.iterations):
        hats = {name: rounding.weight().requires_grad_() for name, rounding in learned.items()}
        gradients = _gradients(block, hats, fixed, targets, next(picks), before)
        for name, gradient in gradients.items():
            learned[name].descend_(gradient, rate * (1 - step / options.iterations))
        if step + 1 in looks:
            now = start | {name: rounding.qtensor() for name, rounding in learned.items()}
            objective = _objective(block, now, targets)
            if objective < least:
                best, least = now, objective
    return Learned(best, before, least, tokens)


class Rounding:
    """What is learned about one weight [N, K]: offset V [N, n, G], alpha [N, n], and beta [N, n] (None: symmetric)."""

    def __init__(self, weight: Tensor, start: QTensor) -> None:
        self.start = start
        self.w = weight.detach().float().reshape(*start.scale.shape, -1)  # [N, n, G]
        self.offset = torch.zeros_like(self.w)
        self.alpha = torch.ones_like(start.scale, dtype=torch.float32)
        self.beta = None if start.zero is None else torch.ones_like(self.alpha)
        most = 2**start.spec.bits - 1
        zero = 0 if start.zero is None else start.zero.float()
        self.low, self.high = -zero * start.scale.float(), (most - zero) * start.scale.float()

    @property
    def bits(self) -> int:
        return self.start.spec.bits

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale [N, n] in its storage dtype, and zero point uint8 or None."""
        start, most = self.start, 2**self.bits - 1
        if self.beta is None:
            return _usable(start.scale.float() * self.alpha, start.scale), None
        scale = _usable((self.high * self.alpha - self.low * self.beta) / most, start.scale)
        zero = (-self.low * self.beta / scale.float()).round().clamp(0, most)
        return scale, zero.to(torch.uint8)

    def qtensor(self) -> QTensor:
        """The weight as it is stored. A weight of zero stays zero: |V| <= 1/2 is rounded to 0, half to even."""
        scale, zero = self.grid()
        codes = encode(self.w + self.offset * scale.float()[:, :, None], scale, zero, self.bits)
        return QTensor(codes.flatten(1), scale, self.start.spec, zero)

    def weight(self) -> Tensor:
        """What the stored weight stands for, [N, K] float32."""
        return self.qtensor().dequantize()

    def gradients(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of V [N, n, G], alpha and beta [N, n] (None: symmetric), where g [N, n, G] is that of weight()."""
        scale, stored = self.grid()
        s = scale.float()[:, :, None]
        z = 2 ** (self.bits - 1) if stored is None else stored.float()[:, :, None]
        free = (self.w / s + self.offset).round() + z
        q = free.clamp(0, 2**self.bits - 1)
        inside = q == free
        by_offset = g * s * inside
        by_scale = (g * (q - z - inside * self.w / s)).sum(2)
        if self.beta is None:
            return by_offset, by_scale * self.start.scale.float(), None
        # z moves what is clipped alone; inside it cancels.
        by_zero = -(g * s * ~inside).sum(2)
        s, most = s[:, :, 0], 2**self.bits - 1
        by_scale = by_scale + by_zero * self.low * self.beta / s.square()
        return by_offset, by_scale * self.high / most, -by_scale * self.low / most - by_zero * self.low / s

    def descend_(self, gradient: Tensor, rate: float) -> None:
        """One step against the sign of the gradient [N, K] of weight()."""
        by_offset, by_alpha, by_beta = self.gradients(gradient.float().view_as(self.w))
        self.offset.sub_(by_offset.sign_(), alpha=rate).clamp_(-0.5, 0.5)
        self.alpha.sub_(by_alpha.sign_(), alpha=rate).clamp_(LEAST, MOST)
        if self.beta is not None and by_beta is not None:
            self.beta.sub_(by_beta.sign_(), alpha=rate).clamp_(LEAST, MOST)


def output_errors(block: Block, q: Mapping[str, QTensor]) -> dict[str, float]:
    """|x (W - Q)^T|^2 / |x W^T|^2 of each layer over all calibration data, x as the dense block has it.

    Layers that saw no data are left out.
    """
    weights = {name: weight_of(block.linears[name]).detach().float() for name in q}
    off = {name: weights[name] - found.dequantize() for name, found in q.items()}
    sums: dict[str, tuple[float, float]] = {}
    for seen in block.inputs(list(q)):
        for name, x in seen.items():
            rows = x.float()
            error, size = sums.get(name, (0.0, 0.0))
            sums[name] = (
                error + float((rows @ off[name].T).square().sum()),
                size + float((rows @ weights[name].T).square().sum()),
            )
    return {name: error / size if size else 0.0 for name, (error, size) in sums.items()}


def _usable(scale: Tensor, start: Tensor) -> Tensor:
    """`scale` in the dtype of `start`; where that has zero or infinity for it, `start`."""
    stored = scale.to(start.dtype)
    return torch.where((stored == 0) | stored.isinf(), start, stored)


def _start(module: Linear, spec: QuantSpec, options: SignRound) -> QTensor:
    weight = weight_of(module).detach()
    return rtn(weight, spec, storage_dtype(weight), RTN(scale=options.scale))


@torch.no_grad()
def _dense_outputs(block: Block) -> tuple[list[Tensor], dict[str, int]]:
    """The block's output for every batch, and the rows that each of its linear layers saw, by name."""
    tokens = dict.fromkeys(block.linears, 0)

    def counter(name: str) -> Any:
        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG001
            tokens[name] += inputs[0].numel() // inputs[0].shape[-1]

        return count

    handles = [module.register_forward_pre_hook(counter(name)) for name, module in block.linears.items()]
    try:
        return [block.forward(i) for i in range(len(block))], tokens
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _objective(block: Block, q: Mapping[str, QTensor], targets: list[Tensor]) -> float:
    """Mean squared difference from `targets` of the block's outputs with the weights q."""
    error, count = 0.0, 0
    with _in_place(block, {name: found.dequantize() for name, found in q.items()}):
        for i, target in enumerate(targets):
            error += float((block.forward(i).float() - target.float()).square().sum(dtype=torch.float64))
            count += target.numel()
    return error / count


def _gradients(
    block: Block,
    hats: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
    targets: list[Tensor],
    picked: list[int],
    unit: float,
) -> dict[str, Tensor]:
    """Of the squared difference on the batches `picked`, by the weights `hats`, each [N, K] float32.

    Only signs are used. The sum is divided by the square root of `unit` (a mean square) times the number of tokens, so
    that float16 holds what flows back whatever the width and the number of tokens.
    """
    total = {name: torch.zeros_like(hat) for name, hat in hats.items()}
    tokens = sum(targets[i].shape[0] * targets[i].shape[1] for i in picked)
    with torch.enable_grad():
        for i in picked:
            with _in_place(block, {**fixed, **hats}):
                error = (block.forward(i).float() - targets[i].float()).square().sum() / (unit * tokens) ** 0.5
            # An expert that none of these tokens went to has no gradient.
            for name, found in zip(hats, torch.autograd.grad(error, list(hats.values()), allow_unused=True)):
                if found is not None:
                    total[name] += found
    return total


@contextmanager
def _in_place(block: Block, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The block with `weights` [N, K] in place of its linear layers' own, in their dtype; gradients flow to them."""
    own = {name: block.linears[name]._parameters["weight"] for name in weights}
    try:
        for name, weight in weights.items():
            module = block.linears[name]
            cast = weight.to(module.weight.dtype)
            module._parameters["weight"] = cast.T if isinstance(module, Conv1D) else cast  # type: ignore[assignment]
        yield
    finally:
        for name, parameter in own.items():
            block.linears[name]._parameters["weight"] = parameter


def _picks(sizes: list[int], sequences: int) -> Iterator[list[int]]:
    """Batches (of `sizes` sequences) for each step, until they make up `sequences`; every epoch in a new order."""
    generator = torch.Generator().manual_seed(_SEED)
    left: list[int] = []
    while True:
        picked: list[int] = []
        while sum(sizes[i] for i in picked) < sequences and len(picked) < len(sizes):
            left = left or torch.randperm(len(sizes), generator=generator).tolist()
            picked.append(left.pop())
        yield picked
