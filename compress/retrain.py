"""Training a pruned model again, a small part of it, with every zero kept (PERP, arXiv 2312.15230).

Either the whole model learns the next token of its data, or each decoder block in turn learns to put out what the dense
model's puts out (reconstruct.py). Dropout is off: so few steps learn nothing by heart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .block import block_names
from .descent import Descent, Progress, Sequences, wide
from .experts import unfuse_experts_
from .recipe import Recipe
from .reconstruct import reconstruct_
from .spec import ADAPTERS, Retrain
from .trainables import Before, Choice, grouped, masked
from .walk import prunable_linears, weight_of


@dataclass(frozen=True)
class Retrained:
    """trained       how many numbers were trained, `groups` of each group; an adapter's A and B, not the layer it is on
    parameters    of the model
    peak_bytes    of live tensors, the model and its data among them, in the first two steps (of each block; most of
                  them all); on an accelerator, as its allocator has it, since its statistics were last reset
    seconds       in all
    losses        of every step, before it: nats per token, or by block what is missing of what the block does (see
                  reconstruct.py), block after block
    """

    trained: int
    parameters: int
    peak_bytes: int
    seconds: float
    losses: list[float]
    groups: dict[str, int]


def masks_of(model: PreTrainedModel, recipe: Recipe) -> dict[str, Tensor]:
    """Of the layers that `recipe` prunes, by name: [N, K] bool, True where the pruned weight is not zero.

    To be taken when pruning is done, and given to whatever trains or quantizes afterwards: a weight that training moves
    to 0 is no pruned one. Fused experts are taken apart, in place.
    """
    unfuse_experts_(model)
    return {name: weight_of(layer).detach() != 0 for name, layer in prunable_linears(model, recipe)}


def retrain_(
    model: PreTrainedModel,
    retrain: Retrain,
    masks: dict[str, Tensor],
    batches: Sequence[Tensor],
    dense: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> Retrained:
    """Train `model`, in place; what is masked is exactly 0 afterwards.

    masks     of all layers that were pruned, [N, K] bool, True where a weight is kept (see masks_of)
    batches   token ids int64 [B, T] without padding. A step sees `retrain.batch` of their sequences, at once no more
              tokens than the largest batch has; every epoch in another order, the same for the same seed
    dense     the model before it was pruned, for by block or sublayer; it is only read
    Raises ValueError for data or masks that do not fit, when there is nothing to train, and for a loss that is not
    finite; the model is as it was then.
    """
    start = time.perf_counter()
    _check_batches(batches, model)
    whole = grouped(model, [group for group in retrain.parts if group not in ADAPTERS])
    choice = Choice(retrain, whole, masked(model, masks))
    if retrain.by != "loss":
        _check_dense(model, dense)
        choice = choice.inside(block_names(model))
    groups = choice.groups()
    if not sum(groups.values()):
        what = "" if retrain.by == "loss" else f"by {retrain.by}, "
        raise ValueError(f"t_groups: {retrain.groups!r}: {what}{type(model).__name__} has nothing of it to train")
    data = Sequences([ids for batch in batches for ids in batch], max(ids.numel() for ids in batches))
    models = [model] if dense is None else [model, dense]
    held = [t for part in models for t in (*part.parameters(), *part.buffers())] + list(batches)
    descent = Descent(retrain, data, held, progress or (lambda *_: None))
    with _evaluating(models), Before() as before:
        if retrain.by == "loss":
            _learn_(model, choice, descent, before)
        else:
            assert dense is not None
            reconstruct_(model, dense, choice, descent, before)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - start
    return Retrained(sum(groups.values()), parameters, descent.peak, seconds, descent.losses, groups)


def _learn_(model: PreTrainedModel, choice: Choice, descent: Descent, before: Before) -> None:
    """By the loss of the next token."""
    generator = torch.Generator().manual_seed(choice.retrain.seed)
    parts = choice.trainables(generator)
    # Adapters leave their layers as they are until all is well.
    before.keep(parts.whole)
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device

    def loss(numbers: list[int]) -> Tensor:
        ids = descent.data.ids(numbers).to(device)
        logits = wide(model(input_ids=ids, use_cache=False).logits[:, :-1])  # [B, T-1, V]
        return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="sum")

    descent.fit_(model, parts, loss, uncounted=1)
    parts.merge_()


def _check_batches(batches: Sequence[Tensor], model: PreTrainedModel) -> None:
    """ValueError for data that nothing can be learned from, or that the model has no embeddings for."""
    if not batches:
        raise ValueError("retrain: needs data, and there is none")
    for i, ids in enumerate(batches):
        if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise ValueError(
                f"retrain: batch {i} has the shape {list(ids.shape)}; expected [sequences, tokens], two tokens or more"
            )
    embeddings: Any = model.get_input_embeddings()
    known, largest = embeddings.weight.shape[0], max(int(ids.max()) for ids in batches)
    if largest >= known:
        raise ValueError(f"retrain: token {largest}, but the model embeds {known}; is the tokenizer its own?")


def _check_dense(model: PreTrainedModel, dense: PreTrainedModel | None) -> None:
    if dense is None:
        raise ValueError("retrain: block by block needs the dense model to learn from, and there is none")
    if dense is model:
        raise ValueError("retrain: the dense model is the pruned one; expected a copy from before pruning")
    if block_names(dense) != block_names(model):
        raise ValueError(f"retrain: the dense model, {type(dense).__name__}, has other blocks than the pruned one")


@contextmanager
def _evaluating(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    before = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)
