"""Unlearning that is to survive quantization: rounding in the loop, updates of at least one bin, a margin in logits.

- Rounding in the loop, as in DurableUn-SAF (Khan and Sohel 2026, arXiv 2605.02196): forward with quantized weights,
  gradients straight through to the full-precision ones.
- The update floor of MANSU (Sadhu et al. 2026, arXiv 2605.15138): few weights move, each by at least one bin.
- The margin of QUAIL (Mishra and Mehreen 2026, arXiv 2601.15538): half a quantization step, in logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..compress.knobs import PLAIN_RTN
from ..compress.recipe import Recipe
from ..compress.rtn import rtn
from ..compress.walk import fitting_linears, quantize_weight, storage_dtype
from .bucketed import check_plain
from .encode import IGNORE, Batch
from .masks import largest

# How far inside its new bucket a raised weight ends at least, as a share of the step: see `bucketed`.
MARGIN = 0.02


class _Rounded(torch.autograd.Function):
    """Forward: the quantized weight, exactly. Backward: the gradient as it comes (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, name: str, recipe: Recipe) -> Tensor:  # noqa: ARG004
        return quantize_weight(name, weight, recipe).dequantize().to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ARG004
        return gradient, None, None


@contextmanager
def fake_quantized(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Inside the block, every linear layer that `recipe` quantizes computes with the weight that it would get.

    The weights themselves stay in full precision and take the gradient; they are rounded anew in every forward pass,
    and no rounded copy outlives its graph. A weight that is also an embedding is rounded only where it multiplies.
    With gradient checkpointing the backward pass runs the forward again: it belongs inside the block too.
    Raises ValueError for a recipe that quantizes nothing, or whose groups do not fit a layer.
    """
    layers = fitting_linears(model, recipe)
    before = [module.__dict__.get("forward") for _, module in layers]
    for name, module in layers:
        module.forward = _rounded_forward(name, module, recipe)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for (_, module), forward in zip(layers, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward  # type: ignore[method-assign]


def _rounded_forward(name: str, module: nn.Linear | Conv1D, recipe: Recipe) -> Any:
    def forward(x: Tensor) -> Tensor:
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        return F.linear(x, _Rounded.apply(weight, name, recipe), module.bias)

    return forward


def apply_floor_(model: nn.Module, start: Mapping[str, Tensor], recipe: Recipe, share: float) -> int:
    """Keep the largest `share` of the changes to quantized weights, raised to one bin at least; undo the others.

    start    parameters that unlearning began from, by name
    recipe   round to nearest: after it, the codes that differ from the start's are those of the kept weights, all of
             them and no others, and every scale is the start's
    share    of the changes that can be kept, ranked by size over all layers together
    A change cannot be kept at the weight that sets its group's scale, which has to stay, and where there is no whole
    bin or no further code between the weight and its group's maximum. No weight is left beyond that maximum. What the
    recipe does not quantize (embeddings, norms, biases, the head) keeps its changes. Returns how many were kept.
    """
    check_plain(recipe)
    if not 0 < share <= 1:
        raise ValueError(f"share: {share} is not above 0 and at most 1")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = {names[id(module.weight)]: module for _, module in fitting_linears(model, recipe)}
    for name, module in modules.items():
        if name not in start or start[name].shape != module.weight.shape:
            raise ValueError(f"start: {name} is missing or not of the shape {list(module.weight.shape)}")
        if not torch.isfinite(module.weight).all():
            raise ValueError(f"model: {name} is not finite")

    def raised(name: str) -> tuple[Tensor, Tensor]:
        module = modules[name]
        new, old = module.weight.detach(), start[name].to(module.weight)
        transposed = isinstance(module, Conv1D)
        value, movable = _raised(old.T if transposed else old, new.T if transposed else new, recipe)
        return (value.T, movable.T) if transposed else (value, movable)

    def size(name: str) -> Tensor:
        new = modules[name].weight.detach()
        change = (new.float() - start[name].to(new).float()).abs()
        return torch.where(raised(name)[1], change, 0)

    movable = sum(int(raised(name)[1].sum()) for name in modules)
    if not movable:
        raise ValueError("model: no quantized weight has a change that could survive; was it trained?")
    kept = largest(size, modules, math.ceil(share * movable))
    with torch.no_grad():
        for name, module in modules.items():
            module.weight.copy_(torch.where(kept[name], raised(name)[0], start[name].to(module.weight)))
    return math.ceil(share * movable)


def _raised(old: Tensor, new: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """For old and new weight [N, K]: the value of each change raised to the floor, and whether it can be kept."""
    assert recipe.spec is not None
    N, K = old.shape
    codes = rtn(old, recipe.spec, storage_dtype(old), PLAIN_RTN)
    scale = codes.scale.float()[:, :, None]  # [N, K/G, 1]
    half = 2 ** (recipe.spec.bits - 1)
    q = codes.codes.float().view(N, scale.shape[1], -1) - half  # [N, K/G, G]
    w, change = old.float().reshape_as(q), (new.float() - old.float()).reshape_as(q)
    peak = w.abs().amax(2, keepdim=True)
    sign = change.sign()
    # The near edge of the next bucket in the change's direction. One bin beyond w is inside that bucket or on its
    # edge, and rounding a tie to even could bring it back.
    edge = (q + sign * (0.5 + MARGIN)) * scale * sign
    target = torch.maximum((w + change) * sign, torch.maximum(w * sign + scale, edge))
    room = torch.maximum(w * sign + scale, edge) <= peak
    movable = (sign != 0) & (w.abs() < peak) & room & (q + sign >= -half) & (q + sign < half)
    # The peak is a number of the weights' type: rounding up does not go beyond it.
    value = _away(torch.minimum(target, peak), old.dtype) * sign.to(old.dtype)
    return value.reshape(N, K), movable.reshape(N, K)


def _away(along: Tensor, dtype: torch.dtype) -> Tensor:
    """float32, measured along the change, in `dtype`: rounded up, never back over the edge."""
    near = along.to(dtype)
    return torch.where(near.float() < along, torch.nextafter(near, torch.full_like(near, torch.inf)), near)


def logit_margin(model: PreTrainedModel, batches: Iterable[Batch], recipe: Recipe) -> float:
    """QUAIL's margin for these answers: half the step of a quantizer that disturbs logits as much as `recipe` does.

    Rounding with step D errs by D / sqrt(12) in root mean square, so that half a step is sqrt(3) times the root mean
    square change of the logits between the model and itself quantized, over the positions that predict an answer's
    token and the whole vocabulary. (The paper's abstract names half a quantization step; how it gets from weights to
    logits could not be found, so this is our reading.)
    """
    total, count = 0.0, 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                predicting = batch.labels[:, 1:] != IGNORE
                plain = _logits(model, batch)[predicting].float()
                with fake_quantized(model, recipe):
                    rounded = _logits(model, batch)[predicting].float()
                total += float((rounded - plain).double().square().sum())
                count += plain.numel()
    finally:
        model.train(training)
    if not count:
        raise ValueError("batches: no supervised token; the margin is measured where answers are predicted")
    return math.sqrt(3 * total / count)


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[:, :-1]
