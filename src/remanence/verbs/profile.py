"""`remanence profile` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .shared import Json, Seed, quiet, say, usage, writable


def profile(
    model: Annotated[str, typer.Argument(help="A model directory or hub id, compressed or not; a config is enough.")],
    recipe: Annotated[
        str | None, typer.Option(help="As if it were compressed so: a name as rtn-w4a16-g128, or a YAML file.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences side by side; several, by comma.")] = "1",
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 512,
    new: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    device: Annotated[
        str,
        typer.Option(help="auto, cpu, cuda:N, npu:N: measured; or a name, for its data sheet: H200, 910B4, ..."),
    ] = "auto",
    measure: Annotated[bool, typer.Option(help="Also run the model, on a device that is here.")] = True,
    remeasure: Annotated[bool, typer.Option(help="Measure the device's ceilings anew, not take those kept.")] = False,
    exits: Annotated[
        str | None, typer.Option(help="Leaving early: DEPTH:TOKENS,... or what `exit generate --json` wrote.")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="Self-speculation: LAYERS:LENGTH:ACCEPT, e.g. 8:4:0.8.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A directory for profile.json, profile.csv and both plots, SVG and PNG.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What a model asks of a device, how long that takes at least, and how long it took: roofline and measurement."""
    from ..bench.roofline.load import Early, Load
    from ..profiling import Order, parse_draft, parse_exits, prepare, write
    from ..profiling import profile as run

    load = usage(Load, _batches(batch), prompt, new)
    early = Early(
        {} if exits is None else usage(parse_exits, exits), None if draft is None else usage(parse_draft, draft)
    )
    order = usage(Order, model, recipe, load, device, measure, remeasure, early, seed)
    if out is not None:
        writable("out", out)
    quiet()
    document = run(usage(prepare, order, say), say)
    if out is not None:
        write(document, out, say)
    if as_json:
        print(json.dumps(document, indent=1))
        return
    from ..profile_show import show

    show(document)


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"batch: {text!r} is not a number, nor several by comma") from None
