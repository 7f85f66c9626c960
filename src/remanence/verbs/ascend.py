"""`remanence preflight` on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ERROR, UsageError
from .shared import Json, quiet, usage

if TYPE_CHECKING:
    from ..compress.ascend import Finding

_DTYPES = ("float16", "bfloat16", "float32")


def preflight(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint; or a dense one, with --recipe.")],
    product: Annotated[str, typer.Option(help="910B1 to 910B4, 910C or 310P; a chip's name will do.")],
    recipe: Annotated[str | None, typer.Option(help="What a dense model is to be compressed by.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32 (default: the model's own).")] = None,
    layout: Annotated[str, typer.Option(help="Of the weights: auto, nd, or nz where an engine needs it.")] = "auto",
    as_json: Json = False,
) -> None:
    """What each layer of a model becomes on an Ascend NPU, or why it cannot run there; no NPU is needed."""
    import torch

    from ..compress.ascend import packed_layers, planned_layers
    from ..compress.ascend import preflight as check
    from ..compress.checkpoint import load_model, skeleton
    from ..compress.recipe_file import read_recipe

    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"dtype: {dtype!r} is not one of {', '.join(_DTYPES)}")
    quiet()
    loaded = load_model(model) if recipe is None else usage(skeleton, model)
    taken = loaded.dtype if dtype is None else getattr(torch, dtype)
    if recipe is None:
        layers = usage(packed_layers, loaded, taken)
    else:
        layers = usage(planned_layers, loaded, usage(read_recipe, recipe), taken)
    found = usage(check, layers, product, layout)
    if as_json:
        print(json.dumps([_told(finding) for finding in found], indent=1))
    else:
        _show(found, product, str(taken).removeprefix("torch."))
    if any(finding.route is None for finding in found):
        raise typer.Exit(ERROR)


def _told(finding: Finding) -> dict[str, Any]:
    layer = asdict(finding.layer) | {"dtype": str(finding.layer.dtype).removeprefix("torch.")}
    way = None if finding.route is None else asdict(finding.route)
    return {"name": finding.name, "layer": layer, "route": way, "refusal": finding.refusal or None}


def _show(found: Sequence[Finding], product: str, dtype: str) -> None:
    """Layers that are alike but for the block they stand in are one line."""
    print(f"{len(found)} packed layers in {dtype} on {product}")
    alike: dict[tuple[str, str], list[str]] = {}
    for finding in found:
        name = re.sub(r"\.\d+\.", ".*.", finding.name)
        alike.setdefault((name, _words(finding)), []).append(finding.name)
    for (name, words), members in alike.items():
        print(f"  {name} ({len(members)}): {words}")
    refused = sum(finding.route is None for finding in found)
    print(f"refused: {refused} of {len(found)}" if refused else "all of them run")


def _words(finding: Finding) -> str:
    way, layer = finding.route, finding.layer
    if way is None:
        return f"refused: {finding.refusal}"
    form = "nz" if way.nz else "nd"
    along = f" along {way.along}" if way.held == "int4" else ""
    rounded = f", inputs by {way.rounding}" if way.rounding else ""
    notes = "".join(f"; {note}" for note in way.notes)
    return f"{layer.n} x {layer.k}, {way.operator}, {way.held}{along} {form}{rounded}{notes}"
