"""`remanence unlearn` on the command line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from .shared import Json, Seed, done, new, quiet, say, usage


def unlearn(
    model: Annotated[str | None, typer.Option(help="The target: a model directory or hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="See --list.")] = None,
    forget: Annotated[str | None, typer.Option(help="A file of rows to forget; forgetNN with --data tofu.")] = None,
    out: Annotated[Path | None, typer.Option(help="The new model directory.")] = None,
    retain: Annotated[str | None, typer.Option(help="A file of rows to keep.")] = None,
    data: Annotated[str | None, typer.Option(help="tofu, muse-news, muse-books, or a file with all rows.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="TOFU's or MUSE's files (default: from the hub).")] = None,
    idk: Annotated[Path | None, typer.Option(help="A file of refusals, one a line (default: our own).")] = None,
    subject: Annotated[list[str] | None, typer.Option(help="icu: a name to know nothing about; repeatable.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: the paper's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of updates.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE, any setting of --list --json.")] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU or NPU where there is one) or cpu.")] = "auto",
    parallel: Annotated[
        str, typer.Option(help="Under torchrun: ddp, or fsdp for models larger than a device.")
    ] = "ddp",
    processes: Annotated[
        int | None, typer.Option(help="How many you started; a run with another number stops.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Updates between checkpoints (default: a quarter).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this --out.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Show every method: paper, needs, settings.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make a model forget a set of questions or texts, and write it."""
    from ..forget import Order, forget_to, listing

    if show:
        print(json.dumps(listing(), indent=1) if as_json else _methods_table(listing()))
        return
    needed = {"model": model, "method": method, "forget": forget, "out": out}
    for name, value in needed.items():
        if value is None:
            raise UsageError(f"{name}: missing; give --{name}")
    options = {"learning_rate": learning_rate, "steps": steps}
    asked = {**_settings(set_ or []), **{key: value for key, value in options.items() if value is not None}}
    order = usage(
        Order,
        model=model,
        method=method,
        forget=forget,
        retain=retain,
        data=data,
        data_dir=data_dir,
        idk=idk,
        subjects=tuple(subject or ()),
        asked=asked,
        seed=seed,
        device=device,
        parallel=parallel,
        processes=processes,
        save_every=save_every,
        resume=resume,
    )
    assert out is not None
    new(out)
    quiet()
    record = forget_to(order, out, say)
    if record is not None:  # the first process speaks for all
        done({**record, "out": str(out)}, as_json)


def _settings(texts: list[str]) -> dict[str, object]:
    """NAME=VALUE options as a mapping; values read as JSON where they are JSON, as text elsewhere."""
    values: dict[str, object] = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not name or not given:
            raise UsageError(f"set: {text!r} is not of the form NAME=VALUE")
        try:
            values[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            values[name.replace("-", "_")] = value
    return values


def _methods_table(methods: dict[str, dict[str, Any]]) -> str:
    """--list for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "what it is", "paper", "needs", "defaults", show_lines=False)
    for name, entry in methods.items():
        defaults = ", ".join(f"{key} {value}" for key, value in entry["settings"].items())
        table.add_row(name, f"{entry['title']} ({entry['kind']})", entry["paper"], ", ".join(entry["needs"]), defaults)
    text = io.StringIO()
    Console(file=text, width=160 if not sys.stdout.isatty() else None).print(table)
    return text.getvalue().rstrip()
