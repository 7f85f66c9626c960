"""What is left of an unlearning update after rounding, seen at the weights: the why beside the behaviour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..compress.spec import Recipe
from ..compress.walk import linears, quantize_weight, weight_of


@dataclass(frozen=True)
class UpdateSurvival:
    """changed: share of quantized weights whose value differs from the target's, quantized alike.
    norm: L2 norm of that difference over the norm of the update; 0 when rounding undid it all, above 1 when rounding
    added more than it took. None when there was no update."""

    changed: float
    norm: float | None


def update_survival(unlearned: PreTrainedModel, target: PreTrainedModel, recipe: Recipe) -> UpdateSurvival:
    """Over all linear layers that `recipe` quantizes (all of them for the dense recipe, which rounds nothing)."""
    changed = total = 0
    after = before = 0.0
    with torch.no_grad():
        for (name, new), (_, old) in zip(
            linears(unlearned, recipe.ignore), linears(target, recipe.ignore), strict=True
        ):
            w_new, w_old = weight_of(new), weight_of(old)
            update = w_new.float() - w_old.float()
            left = update if recipe.spec is None else _rounded(name, w_new, recipe) - _rounded(name, w_old, recipe)
            changed += int((left != 0).sum())
            total += left.numel()
            after += float(left.double().square().sum())
            before += float(update.double().square().sum())
    return UpdateSurvival(changed / total, (after / before) ** 0.5 if before else None)


def _rounded(name: str, weight: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    return quantize_weight(name, weight, recipe).dequantize()
