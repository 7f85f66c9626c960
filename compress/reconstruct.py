"""Reconstruction of a pruned model: each block learns to put out what the dense model's does (PERP, arXiv 2312.15230).

    min  |B'(h') - t|^2 / |t - h|^2

h' comes from the blocks before it, pruned and retrained; h and t are what enters and leaves the dense model's block at
the same tokens. So a block also learns to make up for what those before it could not.

By sublayer, attention and MLP apart (as in arXiv 2510.14444): first the attention A and what comes before it in the
block learn

    min  |A'(h') - a|^2 / |a|^2

where a is what the dense model's attention puts out; then the rest of the block learns as above. Gradients flow through
half a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .block import Calls, Hidden, block_names, enter, first
from .descent import Descent, wide
from .trainables import Before, Choice

Forward = Callable[[nn.Module, Hidden, list[int]], Tensor]


@dataclass(frozen=True)
class _Lesson:
    """What of a block learns to put out `target` as `forward` runs it; size: of the squares of what is to be learned,
    for each token."""

    choice: Choice
    target: Hidden
    size: float
    forward: Forward


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
    early = _until_attention(dense, rows[0]) if choice.retrain.by == "sublayer" else {name: [] for name in names}
    parts = {name: (choice.inside(early[name]), choice.inside([name]).outside(early[name])) for name in names}
    descent.runs = sum(any(part.groups().values()) for pair in parts.values() for part in pair)
    descent.beside = hidden.nbytes + target.nbytes
    calls: list[Calls] = [{} for _ in names]
    generator = torch.Generator().manual_seed(choice.retrain.seed)
    for name, known in zip(names, calls, strict=True):
        forward = _forward(model, descent, calls, known)
        block, whole = model.get_submodule(name), dense.get_submodule(name)
        first_part, rest = parts[name]
        lessons = []
        if any(first_part.groups().values()):
            attention = _stopped(forward, early[name][-1].removeprefix(f"{name}."))
            middle = Hidden(rows, width, dense.dtype)
            descent.beside = hidden.nbytes + target.nbytes + middle.nbytes
            size = _outputs(whole, target, middle, descent, attention, moved=False)
            lessons.append(_Lesson(first_part, middle, size, attention))
        moved = _outputs(whole, target, target, descent, forward, moved=True)
        lessons.append(_Lesson(rest, target, moved, forward))
        for lesson in lessons:
            if any(lesson.choice.groups().values()):
                _learn_(block, lesson, hidden, descent, generator, before)
        with torch.no_grad():
            for numbers in descent.data.passes(range(len(rows))):
                _write(hidden, numbers, forward(block, hidden, numbers))


def _until_attention(model: PreTrainedModel, ids: Tensor) -> dict[str, list[str]]:
    """By block: full names of its children that are run until its attention has put out something, that last."""
    attention = {name: _attention_of(model.get_submodule(name), name) for name in block_names(model)}
    ran: dict[str, list[str]] = {name: [] for name in attention}
    handles = []
    for block in attention:
        for child, module in model.get_submodule(block).named_children():

            def hook(*_: object, block: str = block, name: str = f"{block}.{child}") -> None:
                if attention[block] not in ran[block]:
                    ran[block].append(name)

            handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return ran


def _attention_of(block: nn.Module, name: str) -> str:
    """The full name of the block's one child that attends; ValueError where there is none, or more than one."""
    attends = [pair for pair in block.named_children() if "attn" in pair[0] or "attention" in pair[0]]
    # Its norm may have such a name too.
    found = [child for child, module in attends if any(isinstance(m, nn.Linear | Conv1D) for m in module.modules())]
    if len(found) != 1:
        raise ValueError(f"t_by: sublayer: {name} has {len(found)} attentions; expected one beside its MLP; try block")
    return f"{name}.{found[0]}"


class _Reached(Exception):
    """What was to be run has been run."""


def _stopped(forward: Forward, child: str) -> Forward:
    """Runs a block until its child puts out something, which it returns."""

    def run(block: nn.Module, source: Hidden, numbers: list[int]) -> Tensor:
        found: list[Tensor] = []

        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            found.append(first(output))
            raise _Reached

        handle = block.get_submodule(child).register_forward_hook(hook)
        try:
            with suppress(_Reached):
                forward(block, source, numbers)
        finally:
            handle.remove()
        return found[0]

    return run


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
def _outputs(block: nn.Module, source: Hidden, into: Hidden, descent: Descent, forward: Forward, moved: bool) -> float:
    """Write what the dense block makes of `source`; returns its squares for each token, or, `moved`, those of what it
    adds to its inputs."""
    squares, tokens = 0.0, 0
    for numbers in descent.data.passes(range(len(source))):
        t = forward(block, source, numbers)
        off = wide(t)
        if moved:
            off = off - wide(torch.cat([source.read(number) for number in numbers]).to(t.device))
        squares += float(off.square().sum(dtype=torch.float64))
        tokens += t.shape[0] * t.shape[1]
        _write(into, numbers, t)
    if not squares > 0:
        raise ValueError(
            f"retrain: {type(block).__name__}: the dense block does nothing to its inputs, or is not finite"
        )
    return squares / tokens


def _learn_(
    block: nn.Module, lesson: _Lesson, hidden: Hidden, descent: Descent, generator: torch.Generator, before: Before
) -> None:
    parts = lesson.choice.trainables(generator)
    # A later block may fail when this one's adapters are merged.
    before.keep([*parts.whole, *(adapter.layer.weight for adapter in parts.adapters)])

    def loss(numbers: list[int]) -> Tensor:
        y = lesson.forward(block, hidden, numbers)
        t = torch.cat([lesson.target.read(number) for number in numbers]).to(y.device)
        return (wide(y) - wide(t)).square().sum() / lesson.size

    descent.fit_(block, parts, loss)
    parts.merge_()


def _write(hidden: Hidden, numbers: Sequence[int], found: Tensor) -> None:
    for number, row in zip(numbers, found, strict=True):
        hidden.write(number, row[None])
