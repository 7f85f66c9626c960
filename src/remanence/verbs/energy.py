"""`remanence energy` on the command line."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..errors import UsageError
from .shared import Json, Seed, quiet, say, there, usage


def energy(
    model: Annotated[str, typer.Argument(help="A model directory or hub id, compressed or not.")],
    batch: Annotated[int, typer.Option(help="Sequences side by side.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt, random ones.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:N or npu:N.")] = "auto",
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Without a counter: processor time x a constant, labelled as that.")
    ] = False,
    cpu_watts: Annotated[
        float | None, typer.Option(help="With --estimate: of all processors that this process may use, at most.")
    ] = None,
    window: Annotated[float, typer.Option(help="Seconds of a window at least; below 5 counters are coarse.")] = 5.0,
    windows: Annotated[int, typer.Option(help="Of the prompt and of the request, each.")] = 3,
    idle: Annotated[float, typer.Option(help="Seconds of the machine at rest, measured before.")] = 5.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Joules and seconds for a token of the prompt, a token of the answer, and a request."""
    there(model)
    if cpu_watts is not None and not estimate:
        raise UsageError("cpu-watts: goes with --estimate")
    from ..backends.energy.meter import Lengths
    from ..backends.energy.probes import probes
    from ..bench.energy import Shape, generation_energy
    from ..compress.checkpoint import load_model
    from ..energy import show
    from ..machine import device_for_run, environment

    quiet()
    shape = usage(Shape, batch, prompt, new)
    lengths = usage(Lengths, window, windows, idle)
    taken = usage(device_for_run, device, say)
    found = usage(probes, taken, estimate, cpu_watts)
    loaded = load_model(model).to(taken.torch_device)
    result = {"model": model, **usage(generation_energy, loaded, taken, shape, found, lengths, seed)}
    if as_json:
        print(json.dumps({**result, "environment": environment()}, indent=1))
    else:
        show(result)
