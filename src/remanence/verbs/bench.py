"""`remanence bench` and `remanence doctor` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ERROR, UsageError
from .shared import Json, Seed, names, quiet, say, usage, writable


def bench(
    name: Annotated[str, typer.Argument(help="A benchmark; without one, their names.")] = "",
    methods: Annotated[
        str | None,
        typer.Option(help="unlearning, ptq, w4a4, ascend-ptq: these methods only, by comma; mixed: measures."),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(help="unlearning, evaluation: TOFU's files (default: the hub's); others: WikiText-2's."),
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(
            help="ptq: of quality, layers, recovery; w4a4: of quality, recovery; perp: of quality, cost, recovery; "
            "mixed: of quality, sources; kernels: of linear, model, gpu; "
            "ascend: of operators, device, schemas, wheel; early-exit: of gold, quality, speed, energy, leak; "
            "roofline: of walk, stored, measured, viewer."
        ),
    ] = None,
    peers: Annotated[bool, typer.Option(help="ptq: beside others' tools, in environments of their own.")] = True,
    gib: Annotated[float | None, typer.Option(help="streaming: size of the model's weights.")] = None,
    limit_gib: Annotated[float | None, typer.Option(help="streaming: of the memory it may take.")] = None,
    marlin: Annotated[
        str | None, typer.Option(help="kernels: a checkout of Marlin's repository, as a peer on the GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="ascend-ptq: cpu, or an accelerator such as cuda:0.")] = None,
    model: Annotated[
        str | None, typer.Option(help="ascend-ptq: a causal language model, in place of the one trained here.")
    ] = None,
    problems: Annotated[
        str | None, typer.Option(help="ascend-ptq: with --model, JSON lines of question and answer.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="early-exit: draw quality against depth into this file, .svg.")
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run a benchmark: rows with their peers measured side by side, and checks that must hold."""
    from ..bench.frame import BENCHES, markdown, run, show

    if not name and as_json:
        print(json.dumps({key: text for key, (_, text) in BENCHES.items()}, indent=1))
        return
    if not name:
        print("\n".join(f"{key}: {text}" for key, (_, text) in BENCHES.items()))
        return
    if name not in BENCHES:
        raise UsageError(f"bench: {name!r} is not one of {', '.join(BENCHES)}")
    from ..unlearn.catalog import method_named

    chosen = names("methods", methods)
    for method in (chosen or ()) if name == "unlearning" else ():
        usage(method_named, method)
    asked: dict[str, object] = {
        "data_dir": data_dir,
        "methods": chosen,
        "parts": names("parts", parts),
        "gib": gib,
        "limit_gib": limit_gib,
        "marlin": marlin,
        "device": device,
        "model": model,
        "problems": problems,
    }
    if not peers:
        asked["peers"] = False
    if plot is not None and name != "early-exit":
        raise UsageError(f"plot: the benchmark {name} has none")
    if plot is not None:
        writable("plot", plot.parent)
    options = {key: value for key, value in asked.items() if value is not None}
    from ..machine import device_for_run, environment

    quiet()
    usage(device_for_run, device or "cpu", say)
    result = {"name": name, "environment": environment(), **usage(run, name, seed, **options)}
    if plot is not None:
        _draw(plot, result["rows"])
    if as_json:
        print(json.dumps(result, indent=1))
    elif as_markdown:
        print(markdown(result["rows"]) + "\n\n" + markdown(result["checks"]))
    else:
        show(result)
    if not all(check["ok"] for check in result["checks"]):
        raise typer.Exit(ERROR)


def _draw(place: Path, rows: list[dict[str, Any]]) -> None:
    from ..bench.exit_quality import series
    from ..compress.files import write_text
    from ..exit_plots import depth_plot
    from ..picture_files import standalone

    found = series(rows)
    if not found:
        say("plot: nothing to draw; it is about --parts quality")
        return
    layers = round(max(depth for points in found.values() for depth, *_ in points))
    write_text(place, standalone(depth_plot(found, layers), "exits.css"))
    say(f"plot: {place}")


def doctor(as_json: Json = False) -> None:
    """What this machine and installation can do."""
    from ..doctor import diagnose, show

    found = diagnose()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
