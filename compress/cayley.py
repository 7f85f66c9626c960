"""Learned rotations (SpinQuant, Liu et al. 2024, arXiv 2405.16406): the fixed ones of rotation.py, trained.

Rotations are free parameters of a model that stays the same until it is quantized: so what quantization does to it
chooses among them. Weights are frozen; every step rotates and rounds them anew, and rounds what the layers are given.
Rotations stay orthogonal by Cayley SGD (Li, Fuxin and Todorovic 2020, arXiv 2002.01113): with the gradient G and
W = (G R^T - R G^T) / 2, which is skew-symmetric,

    R <- (I + a/2 W)^-1 (I - a/2 W) R

is orthogonal for every step a, and goes downhill for a small one. It is solved exactly, in float64.

Two departures. SpinQuant minimises the cross entropy of the text; here it is the KL divergence from the model before
rounding, of which the logarithm is followed, so that the step needs no tuning to its size. With as little data as there
is, cross entropy was seen to fall below that of the model in full precision while answers to other text became worse.
And rounding is not just skipped by gradients: a range's ends move its scale, which is what a rotation has to learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .activations import quantize_rows
from .block import Linear, block_names
from .experts import routers
from .knobs import RTN
from .rotation import Plan, Rotated, evaluated, install_, logits, plan_rotation
from .rtn import rtn
from .spec import ActivationSpec, QuantSpec, Rotation
from .walk import storage_dtype, weight_of, within

# Times that all batches are looked at to see whether the rotations are the best so far.
_LOOKS = 5
# A step turns by less than this angle or so, in radians, however large the gradient is.
_LONGEST = 1.0


def learn_rotation_(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    weight_spec: QuantSpec | None,
    activation: ActivationSpec,
    steps: int = 100,
    learning_rate: float = 1.5,
    seed: int = 0,
) -> Rotated:
    """Rotate a model, in place, by rotations that its quantized form does best with; see rotate_.

    batches       token ids int64 [B, T], without padding; a step sees one
    weight_spec   how weights are rounded on the way (to nearest); None: not at all, as is best before GPTQ
    learning_rate   of the first step, falling to zero
    The loss in the answer is in nats per token: with the random rotations it starts from, and with the best found;
    after <= before. It takes the whole model in float32, with norms folded in, rotated and rounded, and what a backward
    pass keeps. Raises ValueError as rotate_, with all weights as they were, and for data that nothing can be learned
    from.
    """
    _check(batches, activation, steps, learning_rate)
    plan = plan_rotation(model)
    trial = _Trial(plan, weight_spec, activation)
    free = {key: R.to(plan.ids.device) for key, R in plan.start("hadamard", seed).items()}
    with evaluated(plan.reference), trial.quantizing():
        best = free
        before = least = trial.mean_loss(free, batches)
        picks, looks = _picks(len(batches), seed), {round(steps * (i + 1) / _LOOKS) for i in range(_LOOKS)}
        for step in range(steps):
            rate = learning_rate * (1 - step / steps)
            gradients = trial.gradients(free, batches[next(picks)])
            free = {key: cayley_step(R, gradients[key], rate) for key, R in free.items()}
            if step + 1 in looks:
                loss = trial.mean_loss(free, batches)
                if loss < least:
                    best, least = free, loss
    with torch.no_grad():
        rotations = plan.complete(best)
    difference = install_(model, plan, rotations)
    return Rotated(Rotation("learned", seed=seed), rotations, plan.keeps_mean, difference, plan.notes, before, least)


def cayley_step(R: Tensor, G: Tensor, rate: float) -> Tensor:
    """The orthogonal matrix R [n, n] float64 after one step against the gradient G [n, n].

    The step is shorter than `rate` where a/2 W would be too large for the direction to mean anything.
    """
    W = (G @ R.T - R @ G.T) / 2
    largest = float(W.abs().sum(0).max())
    if not largest > 0:
        return R
    half = min(rate, _LONGEST / largest) / 2 * W
    identity = torch.eye(len(R), dtype=R.dtype, device=R.device)
    return torch.linalg.solve(identity + half, (identity - half) @ R)


class _Trial:
    """The quantized form of a model, for any rotations."""

    def __init__(self, plan: Plan, weight_spec: QuantSpec | None, activation: ActivationSpec) -> None:
        self.plan, self.weight_spec, self.activation = plan, weight_spec, activation
        self.rounding = True
        self.layers = _quantized(plan.reference)
        dtype = plan.reference.dtype
        # Norms are folded into weights once; what no rotation reaches (inside attention) is rounded once.
        self.base = {name: turn.read().to(dtype) for name, turn in plan.turns.items()}
        self.fixed = {}
        for name, layer in self.layers.items():
            if f"{name}.weight" not in self.base and weight_spec is not None:
                rounded = _rounded(weight_of(layer).detach(), weight_spec)
                self.fixed[f"{name}.weight"] = rounded.T if isinstance(layer, Conv1D) else rounded

    def weights(self, free: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By name of the parameter; `free` as in Plan.complete."""
        rotations = self.plan.complete(free)
        found = dict(self.fixed)
        for name, turn in self.plan.turns.items():
            turned = turn.apply(self.base[name], rotations)
            if self.weight_spec is not None and name.removesuffix(".weight") in self.layers:
                turned = _rounded(turned, self.weight_spec)
            found[name] = turn.stored(turned)
        return found

    def loss(self, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """KL divergence from the dense model's answers, mean over the tokens of ids [B, T]."""
        ids = ids.to(self.plan.ids.device)
        self.rounding = False
        with torch.no_grad():
            dense = logits(self.plan.reference, ids).float().log_softmax(-1)
        self.rounding = True
        made = logits(self.plan.reference, ids, weights).float().log_softmax(-1)
        return F.kl_div(made, dense, reduction="none", log_target=True).sum(-1).mean()

    @torch.no_grad()
    def mean_loss(self, free: Mapping[str, Tensor], batches: Sequence[Tensor]) -> float:
        """Over all tokens of all batches."""
        weights = self.weights(free)
        losses = [float(self.loss(weights, ids)) * ids.numel() for ids in batches]
        return sum(losses) / sum(ids.numel() for ids in batches)

    def gradients(self, free: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        """Of the loss's logarithm by every rotation, float64."""
        with torch.enable_grad():
            leaves = {key: R.detach().requires_grad_() for key, R in free.items()}
            loss = self.loss(self.weights(leaves), ids).log()
            return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))

    @contextmanager
    def quantizing(self) -> Iterator[None]:
        """What the layers are given is quantized."""

        def quantize(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
            x = args[0]
            if not self.rounding:
                return args
            codes, scale, zero = quantize_rows(x.detach(), self.activation)
            codes = codes.to(x) if zero is None else codes.to(x) - zero
            return (_differentiable(x, codes, scale.to(x), self.activation.symmetric), *args[1:])

        handles = [layer.register_forward_pre_hook(quantize) for layer in self.layers.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _quantized(model: PreTrainedModel) -> dict[str, Linear]:
    """The decoder layers' linear layers by name; those that send tokens to experts stay dense, as everywhere."""
    blocks, left = block_names(model), routers(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and within(name, blocks) and name not in left
    }


def _rounded(weight: Tensor, spec: QuantSpec) -> Tensor:
    """[N, K] rounded to nearest."""
    q = rtn(weight.detach(), spec, storage_dtype(weight), RTN(clip=False))
    scale = q.scale.to(weight.dtype)[:, :, None]
    groups = weight.unflatten(1, (scale.shape[1], -1))  # [N, n, G]
    codes = (q.dequantize(weight.dtype).view_as(groups) / scale).round()
    return _differentiable(groups, codes, scale, spec.symmetric).flatten(1)


def _differentiable(x: Tensor, codes: Tensor, scale: Tensor, symmetric: bool) -> Tensor:
    """codes * scale [..., G], with gradients as if codes were x / scale + a constant and scale [..., 1] a share of the
    range of x; what is beyond the codes has no gradient of its own (LSQ, arXiv 1902.08153, but for who owns the scale).
    codes: without the zero point."""
    share = x.detach() / scale
    inside = (codes - share).abs() <= 0.51  # of rounding in float32, too
    by_scale = codes - torch.where(inside, share, 0.0)
    high, low = x.amax(-1, keepdim=True).clamp(min=0), x.amin(-1, keepdim=True).clamp(max=0)
    span = torch.maximum(high, -low) if symmetric else high - low
    moved = scale * (span - span.detach()) / span.detach().clamp(min=torch.finfo(x.dtype).tiny)
    return codes * scale + inside * (x - x.detach()) + by_scale * moved


def _check(batches: Sequence[Tensor], activation: ActivationSpec, steps: int, learning_rate: float) -> None:
    if not batches:
        raise ValueError("batches: there are none; a rotation is learned from calibration data")
    for i, ids in enumerate(batches):
        if ids.dim() != 2 or ids.shape[1] < 2 or not len(ids):
            raise ValueError(
                f"batches: batch {i} has the shape {list(ids.shape)}; expected [sequences, 2 tokens or more]"
            )
    if not activation.dynamic:
        raise ValueError("activation: static scales are calibrated for a rotated model; to learn one, dynamic=True")
    if steps < 1:
        raise ValueError(f"steps: {steps} is below 1")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: {learning_rate} is not above 0")


def _picks(count: int, seed: int) -> Iterator[int]:
    """Batches for each step, every epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
