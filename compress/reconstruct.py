"""Reconstruction of a pruned model: each block learns to put out what the dense model's does (PERP, arXiv 2312.15230).

    min  |B'(h') - t|^2 / |t - h|^2

h' comes from the blocks before it, pruned and retrained; h and t are what enters and leaves the dense model's block at
the same tokens. So a block also learns to make up for what those before it could not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .block import Calls, Hidden, block_names, enter, first
from .descent import Descent, wide
from .trainables import Before, Choice

Forward = Callable[[nn.Module, Hidden, list[int]], Tensor]


def reconstruct_(
    model: PreTrainedModel, dense: PreTrainedModel, choice: Choice, descent: Descent, before: Before
) -> None:
    """Train every block of `model` that `choice` has something of, from the first to the last, in place."""
    rows = [ids[None] for ids in descent.data.rows]
    width = model.config.get_text_config().hidden_size
    hidden, target = (Hidden(rows, width, of.dtype) for of in (model, dense))
    enter(model, rows, hidden)
    enter(dense, rows, target)
    names = block_names(model)
    choices = [choice.inside([name]) for name in names]
    descent.runs = sum(any(part.groups().values()) for part in choices)
    descent.beside = hidden.nbytes + target.nbytes
    calls: list[Calls] = [{} for _ in names]
    generator = torch.Generator().manual_seed(choice.retrain.seed)
    for name, part, known in zip(names, choices, calls, strict=True):
        forward = _forward(model, descent, calls, known)
        moved = _to_targets(dense.get_submodule(name), target, descent, forward)
        block = model.get_submodule(name)
        if any(part.groups().values()):
            _learn_(block, part, (hidden, target, moved), descent, forward, generator, before)
        with torch.no_grad():
            for numbers in descent.data.passes(range(len(rows))):
                _write(hidden, numbers, forward(block, hidden, numbers))


def _forward(model: PreTrainedModel, descent: Descent, calls: Sequence[Calls], known: Calls) -> Forward:
    """Runs a block on what is kept of some sequences; `known`: of `calls` those of the block."""

    def forward(block: nn.Module, source: Hidden, numbers: list[int]) -> Tensor:
        device = next(block.parameters()).device
        h = torch.cat([source.read(number) for number in numbers]).to(device)  # [B, T, d]
        shape = h.shape[0], h.shape[1]
        if shape not in known:
            for found, new in zip(calls, enter(model, [descent.data.ids(numbers)], None), strict=True):
                found.update(new)
        return first(block(h, *known[shape].args, **known[shape].kwargs))

    return forward


@torch.no_grad()
def _to_targets(block: nn.Module, target: Hidden, descent: Descent, forward: Forward) -> float:
    """Turn what enters the dense block into what leaves it; returns |t - h|^2 for each token."""
    moved, tokens = 0.0, 0
    for numbers in descent.data.passes(range(len(target))):
        t = forward(block, target, numbers)
        h = torch.cat([target.read(number) for number in numbers]).to(t.device)
        moved += float((wide(t) - wide(h)).square().sum(dtype=torch.float64))
        tokens += h.shape[0] * h.shape[1]
        _write(target, numbers, t)
    if not moved > 0:
        raise ValueError(
            f"retrain: {type(block).__name__}: the dense block does nothing to its inputs, or is not finite"
        )
    return moved / tokens


def _learn_(
    block: nn.Module,
    choice: Choice,
    kept: tuple[Hidden, Hidden, float],
    descent: Descent,
    forward: Forward,
    generator: torch.Generator,
    before: Before,
) -> None:
    """Train one block; kept: h', t, and |t - h|^2 for each token."""
    hidden, target, moved = kept
    parts = choice.trainables(generator)
    # A later block may fail when this one's adapters are merged.
    before.keep([*parts.whole, *(adapter.layer.weight for adapter in parts.adapters)])

    def loss(numbers: list[int]) -> Tensor:
        y = forward(block, hidden, numbers)
        t = torch.cat([target.read(number) for number in numbers]).to(y.device)
        return (wide(y) - wide(t)).square().sum() / moved

    descent.fit_(block, parts, loss)
    parts.merge_()


def _write(hidden: Hidden, numbers: Sequence[int], found: Tensor) -> None:
    for number, row in zip(numbers, found, strict=True):
        hidden.write(number, row[None])
