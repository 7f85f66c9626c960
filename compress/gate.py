"""Whether a decoder block comes out alike from whichever data it is calibrated on.

Calibration of activations in few bits was seen to be unstable from layer to layer on NPUs (arXiv 2602.17693): a block
that one half of the data leaves fit and another broken is not to be trusted with the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .block import Block
from .spec import Recipe


@torch.no_grad()
def through_gate(
    block: Block, recipe: Recipe, quantize_: Callable[[Block, Recipe], object]
) -> tuple[Recipe, float | None, str]:
    """(the recipe for this block, the spread of its error, what to say of it); the block stays as it is.

    quantize_   what is to be done to the block, in place
    Takes the time of `draws` times half the data, and the memory of another block. Raises ValueError where the gate
    says so, and for one batch alone, of which there is no half.
    """
    gate = recipe.gate
    if gate is None:
        return recipe, None, ""
    if len(block) < 2:
        raise ValueError("gate: a single batch of calibration data; expected 2 or more, to draw from")
    errors = []
    for draw in range(gate.draws):
        generator = torch.Generator().manual_seed(draw)
        picks = torch.randperm(len(block), generator=generator)[: len(block) // 2].tolist()
        trial = block.drawn(picks)
        quantize_(trial, recipe)
        errors.append(_error(block, trial))
        del trial
    low, high = min(errors), max(errors)
    spread = high / low if low else (1.0 if not high else float("inf"))
    if spread <= gate.limit:
        return recipe, spread, ""
    said = f"unstable: block error {low:.2g} to {high:.2g} over {gate.draws} draws of the calibration data"
    if gate.action == "abort":
        raise ValueError(f"{said}, more than {gate.limit:g} times apart")
    return _in_eight_bits(recipe), spread, f"{said}: kept at 8 bits"


def _in_eight_bits(recipe: Recipe) -> Recipe:
    assert recipe.spec is not None
    activation = None if recipe.activation is None else replace(recipe.activation, bits=8)
    return replace(recipe, spec=replace(recipe.spec, bits=8), activation=activation)


def _error(dense: Block, trial: Block) -> float:
    """|B'(h) - B(h)|^2 / |B(h) - h|^2 over all batches."""
    off = moved = 0.0
    for i in range(len(dense)):
        hidden, after = dense.hidden(i), dense.forward(i)
        off += float((dense.forward(i, module=trial.module) - after).double().square().sum())
        moved += float((after - hidden).double().square().sum())
    return off / moved if moved else 0.0
