"""`remanence compress` and `remanence allocate` on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .shared import Json, Seed, done, names, new, quiet, say, usage, writable


def compress(
    model: Annotated[str, typer.Argument(help="A model directory or hub id.")],
    recipe: Annotated[str, typer.Option(help="e.g. gptq-w4a16-g128, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="The new checkpoint directory.")],
    calibration: Annotated[
        str | None, typer.Option(help="e.g. retain:64,forget:32,text:128,length:512 (sequences, tokens).")
    ] = None,
    retain: Annotated[str | None, typer.Option(help="A file of rows to keep, for calibration.")] = None,
    forget: Annotated[str | None, typer.Option(help="A file of rows; forgetNN with --data.")] = None,
    data: Annotated[str | None, typer.Option(help="tofu or people: retain and forget rows of that data.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="TOFU's files (default: from the hub).")] = None,
    text: Annotated[str | None, typer.Option(help="A file of running text, for calibration.")] = None,
    device: Annotated[str, typer.Option(help="auto (a CUDA GPU where one works), cpu, cuda or cuda:N.")] = "auto",
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Store 2:4 layers without their zeros, for load_model alone.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would take, and do no more.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last block done for this --out.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compress a model, block by block, and write a checkpoint that transformers loads."""
    from ..compressing import Order, show_layers
    from ..compressing import compress as run

    order = usage(
        Order,
        model=model,
        recipe=recipe,
        calibration=calibration,
        retain=retain,
        forget=forget,
        data=data,
        data_dir=data_dir,
        text=text,
        seed=seed,
        device=device,
        sparse=sparse,
    )
    new(out)
    from ..progress import run_with_bar

    quiet()
    made = run_with_bar(f"compress {recipe}", lambda progress: run(order, out, resume, plan, progress, say), as_json)
    if not as_json:
        if "layers" in made:
            show_layers(made["layers"], sys.stdout)
        # Said already, in words.
        made = {key: value for key, value in made.items() if key not in ("layers", "plan", "actual")}
    done(made, as_json)


def allocate(
    model: Annotated[str, typer.Option(help="A model directory or hub id.")],
    recipe: Annotated[str, typer.Option(help="A quantizer, e.g. gptq-w4a16-g64, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="The new recipe file, .yaml.")],
    budget: Annotated[float | None, typer.Option(help="For all layers that the recipe quantizes, e.g. 4.0.")] = None,
    unit: Annotated[
        str, typer.Option(help="Of the budget: bits (average of codes), stored-bits (with scales), bytes, seconds.")
    ] = "bits",
    measure: Annotated[str, typer.Option(help="Of sensitivity: tdmpq, cmpq, pmpq, hessian, error, kl, ...")] = "tdmpq",
    rule: Annotated[str, typer.Option(help="milp (the best choice within the budget) or threshold.")] = "milp",
    widths: Annotated[str | None, typer.Option(help="To choose from, comma-separated, e.g. 2,3,4,8,16.")] = None,
    target: Annotated[str, typer.Option(help="What will run it: remanence, transformers or vllm.")] = "remanence",
    fuse: Annotated[bool, typer.Option(help="One width for q, k, v and for gate, up, which engines join.")] = True,
    calibration: Annotated[
        str | None, typer.Option(help="What is measured on: retain:64,forget:32,text:128,length:512.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Other such data: how much hangs on the choice; repeatable.")
    ] = None,
    retain: Annotated[str | None, typer.Option(help="A file of rows to keep.")] = None,
    forget: Annotated[str | None, typer.Option(help="A file of rows; forgetNN with --data.")] = None,
    data: Annotated[str | None, typer.Option(help="tofu or people: retain and forget rows of that data.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="TOFU's files (default: from the hub).")] = None,
    text: Annotated[str | None, typer.Option(help="A file of running text.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose a width for every layer, by how sensitive it is and within a budget, and write the recipe."""
    from ..allocating import Order, show_allocation
    from ..allocating import allocate as run

    chosen = names("widths", widths)
    if chosen is not None and not all(width.isdecimal() for width in chosen):
        raise UsageError(f"widths: {widths!r} is not a list of numbers, e.g. 2,3,4,8,16")
    order = usage(
        Order,
        model=model,
        recipe=recipe,
        measure=measure,
        budget=budget,
        unit=unit,
        rule=rule,
        widths=None if chosen is None else tuple(map(int, chosen)),
        target=target,
        fuse=fuse,
        calibration=calibration,
        compare=tuple(compare or ()),
        retain=retain,
        forget=forget,
        data=data,
        data_dir=data_dir,
        text=text,
        seed=seed,
    )
    writable("out", out.parent)
    from ..progress import run_with_bar

    quiet()
    made = run_with_bar(f"allocate {recipe}", lambda progress: run(order, out, progress, say), as_json)
    if as_json:
        print(json.dumps(made, indent=1))
    else:
        show_allocation(made, sys.stdout)
        say(f"recipe: {made['out']}")
