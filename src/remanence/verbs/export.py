"""`remanence export` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import Json, done, new, quiet, say, usage


def export(
    model: Annotated[str, typer.Argument(help="A checkpoint directory made by `remanence compress`.")],
    format: Annotated[str, typer.Option(help="modelslim: Huawei Ascend, for vllm-ascend's --quantization ascend.")],
    out: Annotated[Path, typer.Option(help="The new directory.")],
    verify: Annotated[bool, typer.Option(help="Read it back with another reader and compare every weight.")] = True,
    as_json: Json = False,
) -> None:
    """Write a compressed checkpoint in the layout of another engine."""
    from ..exporting import check_order
    from ..exporting import export as run

    usage(check_order, model, format)
    new(out)
    quiet()
    made = run(model, format, out, verify)
    if not as_json:
        for note in made.pop("notes"):
            say(f"note: {note}")
        made["types"] = ", ".join(f"{count} {kind}" for kind, count in made["types"].items())
    done(made, as_json)
