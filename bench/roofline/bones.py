"""A model without its values, dense or compressed, and the passes over it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from ...compress.checkpoint import positions, skeleton
from ...compress.places import base_directory, local_model
from ...compress.recipe import Recipe
from ...compress.spec import KVSpec
from ...unlearn.adapters import with_adapter
from .capacity import Memory
from .load import Early, Load
from .stored import Forms, apply, forms_of_checkpoint, forms_of_recipe, module_bytes, resident_bytes
from .walk import walk
from .work import Step

UNLIMITED = 2**40


@dataclass(frozen=True)
class Bones:
    """A model without its values.

    model   dense, on the meta device
    forms   how its layers are kept
    kv      how its keys and values are; None: as they come
    """

    name: str
    model: PreTrainedModel
    forms: Forms
    kv: KVSpec | None = None
    recipe: Recipe | None = None

    @classmethod
    def of(cls, path: Path | str, recipe: Recipe | None = None) -> Bones:
        """Of the model at `path` (a directory, in which a config is enough for a dense model, or a hub id), as it is
        there, or as `recipe` would make it. ValueError or FileNotFoundError for what cannot be read, and for a recipe
        on a model that is compressed already."""
        base = base_directory(path)
        directory = local_model(base)
        model = skeleton(base, compressed=directory is not None)  # of one on the hub the files' headers are not here
        kept = forms_of_checkpoint(directory, model) if directory is not None else {}
        with_adapter(model, path)
        if recipe is None:
            return cls(str(path), model.eval(), kept)
        if kept:
            raise ValueError(f"recipe: {recipe} beside {path}, which is compressed already; expected a dense model")
        return cls(str(path), model.eval(), forms_of_recipe(model, recipe), recipe.kv, recipe)

    @property
    def positions(self) -> int:
        """Longest text in tokens; where the config names no limit, more than fits anywhere."""
        return positions(self.model.config) or UNLIMITED

    @property
    def layers(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    def check(self, load: Load, early: Early) -> None:
        """ValueError for texts that are longer than the model has positions for, and depths that it has not."""
        if load.prompt + load.new > self.positions:
            raise ValueError(
                f"prompt, new: {load.prompt} + {load.new} tokens, and {self.name} has positions for {self.positions}"
            )
        early.check(self.layers)

    def as_if(self, recipe: Recipe) -> Bones:
        """The same model by another recipe; ValueError where it does not fit."""
        return Bones(self.name, self.model, forms_of_recipe(self.model, recipe), recipe.kv, recipe)


class Passes:
    """Passes of one sequence, each context walked once."""

    def __init__(self, bones: Bones) -> None:
        self.bones, self.dense = bones, module_bytes(bones.model)
        self.walked: dict[tuple[int, int, int], tuple[Step, Step]] = {}

    def raw(self, prompt: int, context: int, tokens: int = 1) -> tuple[Step, Step]:
        """Of the dense model."""
        key = (prompt, context, tokens)
        if key not in self.walked:
            self.walked[key] = walk(self.bones.model, 1, prompt, context, tokens)
        return self.walked[key]

    def at(self, prompt: int, context: int, tokens: int = 1) -> tuple[Step, Step]:
        prefill, decode = (self.formed(step) for step in self.raw(prompt, context, tokens))
        return prefill, decode

    def formed(self, step: Step) -> Step:
        return apply(step, self.bones.forms, self.dense, self.bones.kv)

    def memory(self, load: Load) -> Memory:
        prefill, decode = self.raw(load.prompt, load.context)
        weights = resident_bytes(self.dense, self.bones.forms) + prefill.beside
        return Memory(weights, prefill, decode, self.bones.kv)
