"""Whether a decoder block comes out alike from whichever data it is calibrated on.

Calibration of activations in few bits was seen to be unstable from layer to layer on NPUs (arXiv 2602.17693): a block
that one half of the data leaves fit and another broken is not to be trusted with the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import comb

import torch
from torch import Tensor

from .block import Block
from .recipe import Recipe
from .spec import Gate


def one_by_one(batches: Sequence[Tensor], gate: Gate) -> list[Tensor]:
    """Batches of one sequence each, of which halves are drawn. ValueError for too few to have so many halves."""
    alone = [sequence[None] for batch in batches for sequence in batch]
    if comb(len(alone), len(alone) // 2) < gate.draws or len(alone) < 2:
        raise ValueError(f"gate: {gate.draws} draws of half the calibration data, which is {len(alone)} sequences")
    return alone


def halves(count: int, draws: int) -> list[list[int]]:
    """So many halves of `count` sequences, no two of them the same."""
    generator = torch.Generator().manual_seed(0)
    found: list[list[int]] = []
    while len(found) < draws:
        half = sorted(torch.randperm(count, generator=generator)[: count // 2].tolist())
        if half not in found:
            found.append(half)
    return found


@torch.no_grad()
def through_gate(
    block: Block, recipe: Recipe, quantize_: Callable[[Block, Recipe], object]
) -> tuple[Recipe, float | None, str]:
    """(the recipe for this block, the spread of its error, what to say of it); the block stays as it is.

    block       its batches are single sequences (one_by_one)
    quantize_   what is to be done to the block, in place
    Takes the time of `draws` times half the data, and the memory of another block. Raises ValueError where the gate
    says so.
    """
    gate = recipe.gate
    if gate is None:
        return recipe, None, ""
    errors = []
    for picks in halves(len(block), gate.draws):
        trial = block.drawn(picks)
        quantize_(trial, recipe)
        errors.append(_error(block, trial))
        del trial
    low, high = min(errors), max(errors)
    spread = high / low if low else (1.0 if not high else float("inf"))
    if spread <= gate.limit:
        return recipe, spread, "all draws give the same block" if spread == 1 else ""
    said = f"unstable: block error {low:.2g} to {high:.2g} over {gate.draws} draws of the calibration data"
    if gate.action == "abort":
        raise ValueError(f"{said}, more than {gate.limit:g} times apart")
    return _in_eight_bits(recipe), spread, f"{said}: kept at 8 bits"


def _in_eight_bits(recipe: Recipe) -> Recipe:
    assert recipe.spec is not None
    activation = None if recipe.activation is None else replace(recipe.activation, bits=8, fallback=None)
    return replace(recipe, spec=replace(recipe.spec, bits=8), widths=(), activation=activation, gate=None)


def _error(dense: Block, trial: Block) -> float:
    """|B'(h) - B(h)|^2 / |B(h) - h|^2 over all batches."""
    off = moved = 0.0
    for i in range(len(dense)):
        hidden, after = dense.hidden(i), dense.forward(i)
        off += float((dense.forward(i, module=trial.module) - after).double().square().sum())
        moved += float((after - hidden).double().square().sum())
    return off / moved if moved else 0.0
