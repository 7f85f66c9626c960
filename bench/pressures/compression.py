"""Recovery by compression: how likely the true answers are once the model is quantized or pruned.

That quantization brings unlearned knowledge back is Zhang et al. 2024, arXiv 2410.16454. What compression does to any
model has to be told from it: the target and the oracle go through the same recipes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from transformers import PreTrainedModel

from ...compress.recipe import Recipe
from ...compress.sequential import compress_
from ...unlearn.data import QA
from ...unlearn.encode import Encoder
from ..tokens import answers
from .pressed import Pressed


def compression(
    model: PreTrainedModel, encoder: Encoder, rows: Sequence[QA], recipes: Sequence[Recipe], batch_size: int = 64
) -> Pressed:
    """Probability of each row's answer as the model is, and under every recipe (on a copy, in memory, one at a time).

    A recipe that the model cannot take is skipped, with the reason. What an inference-time method put around the model
    stays in place, its second model compressed alike. Raises ValueError for a recipe that is named twice.
    """
    names = [recipe.name for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"recipes: {twice[0]} is there twice; each has one place in the result")
    pairs = [(row.question, row.answer) for row in rows]

    def known(network: PreTrainedModel) -> list[float]:
        return [answer.probability for answer in answers(network, encoder, pairs, batch_size)]

    before = known(model)
    after: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    for recipe in recipes:
        try:
            compressed = compress_(copy.deepcopy(model), recipe)
        except ValueError as error:
            skipped[recipe.name] = str(error)
            continue
        after[recipe.name] = known(compressed)
    plain = tuple(recipe.name for recipe in recipes if not recipe.compresses)
    return Pressed("compression", "probability", before, after, skipped, references=plain)
