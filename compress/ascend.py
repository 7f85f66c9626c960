"""What every packed layer of a model becomes on an Ascend product, before anything is moved there (kernels/ascend)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..backends.ascend_products import product_named
from ..kernels.ascend.routes import LAYOUTS, Inputs, Layer, Route, route
from .kronecker import factors
from .linear import QuantLinear
from .recipe import Recipe
from .walk import features, fitting_linears


@dataclass(frozen=True)
class Finding:
    """One layer: its route, or why there is none and what would do instead."""

    name: str
    layer: Layer
    route: Route | None
    refusal: str = ""


def preflight(layers: Mapping[str, Layer], product: str, layout: str = "auto") -> list[Finding]:
    """Of every layer by name (see `packed_layers`, `planned_layers`). ValueError for a product or layout unknown."""
    chip = product_named(product)
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout!r} is not one of {', '.join(LAYOUTS)}")
    found = []
    for name, layer in layers.items():
        try:
            found.append(Finding(name, layer, route(layer, chip, layout)))
        except ValueError as error:
            found.append(Finding(name, layer, None, str(error)))
    return found


def packed_layers(model: nn.Module, dtype: torch.dtype) -> dict[str, Layer]:
    """Of a compressed model that runs in `dtype`; ValueError: it has none."""
    found = {name: layer.on_ascend(dtype) for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no packed layer; compress it, or say the recipe")
    return found


def planned_layers(model: PreTrainedModel, recipe: Recipe, dtype: torch.dtype) -> dict[str, Layer]:
    """Of a dense model (the meta device will do), as `recipe` would have them: but for what only its data decides
    (fallbacks, gates) and online rotations. ValueError where the recipe does not fit it."""
    found = {}
    for name, module in fitting_linears(model, recipe):
        spec, k, a = recipe.spec_of(name), features(module), recipe.activation
        inputs: Any = None
        if a is not None:
            learned = recipe.method == "flatquant"
            transform = ("kronecker", factors(k)) if learned else ("", ())
            inputs = Inputs(a.bits, a.dynamic, a.grid, a.clip, *transform)
        n = module.weight.numel() // k
        found[name] = Layer(n, k, spec.bits, spec.group_size or k, spec.symmetric, dtype, inputs)
    return found
