"""A model while its layers' sensitivity is measured: in float32, its experts one by one, and afterwards as it was.

Half precision would drown what one layer in a few bits changes. What the measures share is here too: the loss, and
sums over batches with their standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .block import Linear
from .experts import has_fused_experts, unfuse_experts_
from .rtn import QTensor

Progress = Callable[[int, int, str], None]
# (numerator, denominator) of each batch: a score is the sum of the first over that of the second.
Parts = list[tuple[float, float]]


@dataclass(frozen=True, eq=False)
class Probe:
    """What a measure works on.

    layers    by full name: those that are scored
    rounded   their weights, rounded to nearest, by width; empty where the measure does not look at them
    batches   token ids int64 [B, T], without padding
    seed      of what a measure draws
    """

    model: PreTrainedModel
    layers: Mapping[str, Linear]
    rounded: Mapping[str, Mapping[int, QTensor]]
    batches: Sequence[Tensor]
    seed: int = 0
    progress: Progress | None = None

    def tell(self, done: int, total: int, text: str) -> None:
        if self.progress is not None:
            self.progress(done, total, text)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@contextmanager
def experts_apart(model: PreTrainedModel) -> Iterator[None]:
    """Inside, fused experts are linear layers of their own; afterwards they are the tensors that they were.

    Takes the memory of the experts a second time.
    """
    if not has_fused_experts(model):
        yield
        return
    places = dict(model.named_modules(remove_duplicate=False))
    tensors = [(module, dict(module._parameters)) for module in places.values()]
    try:
        unfuse_experts_(model)
        yield
    finally:
        for module, parameters in tensors:
            module._parameters.update(parameters)
        for name, module in places.items():  # from the outside in
            parent, _, leaf = name.rpartition(".")
            if name and getattr(model.get_submodule(parent), leaf) is not module:
                setattr(model.get_submodule(parent), leaf, module)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation, float32 (float64 stays), no parameter with a gradient. Afterwards: the same tensors as
    before, with their gradients, and every module's mode."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    before = [(tensor, tensor.data, tensor.requires_grad, tensor.grad) for tensor in tensors]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for tensor, data, _, _ in before:
            tensor.requires_grad_(False)
            tensor.grad = None
            if data.is_floating_point():
                tensor.data = data.to(torch.promote_types(data.dtype, torch.float32))
        yield
    finally:
        for tensor, data, needed, gradient in before:
            tensor.grad = None
            tensor.data = data
            tensor.requires_grad_(needed)
            tensor.grad = gradient
        for module, training in modes:
            module.training = training


def check_predictable(batches: Sequence[Tensor]) -> None:
    """ValueError for a batch whose sequences have no next token."""
    for i, ids in enumerate(batches):
        if ids.shape[1] < 2:
            raise ValueError(f"calibration: batch {i} has {ids.shape[1]} token a sequence; 2 are needed to predict one")


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[B, T, vocabulary] for token ids [B, T]."""
    return model(input_ids=ids.to(model.device), use_cache=False).logits


def loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean next-token loss over token ids [B, T], in nats. Raises ValueError where that is no number."""
    found = logits(model, ids)[:, :-1]
    value = F.cross_entropy(found.flatten(0, 1), ids[:, 1:].flatten().to(found.device))
    if not math.isfinite(value.item()):
        raise ValueError(f"model: a batch of {list(ids.shape)} tokens has the loss {value.item()}")
    return value


def predicted(ids: Tensor) -> int:
    """Tokens [B, T] that have one before them."""
    return ids.shape[0] * (ids.shape[1] - 1)


def ratio(parts: Parts) -> tuple[float, float | None]:
    """(sum of numerators / sum of denominators, its standard error over batches: None for one batch, by linearization:
    of a mean over tokens when denominators are tokens). 0 where the denominators are."""
    above, below = sum(a for a, _ in parts), sum(b for _, b in parts)
    if not below:
        return 0.0, 0.0 if len(parts) > 1 else None
    value, n = above / below, len(parts)
    if n < 2:
        return value, None
    off = sum((a - value * b) ** 2 for a, b in parts)
    return value, math.sqrt(off * n / (n - 1)) / below
