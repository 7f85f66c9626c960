"""What `remanence energy` measured, in words."""

from __future__ import annotations

from typing import Any

_UNITS = {"prompt_token": "prompt token", "output_token": "output token", "request": "request"}


def show(result: dict[str, Any]) -> None:
    """Print what `generation_energy` gave, with the model's name."""
    lengths, device = result["lengths"], result["device"]
    driver = f", driver {device['driver']}" if device.get("driver") else ""
    print(f"{result['model']} on {device['name']}{driver}: {result['dtype']}, {result['attention']}, KV cache")
    print(
        f"batch {result['batch']}, prompt {result['prompt']}, new {result['new']}; "
        f"{lengths['windows']} windows of {lengths['window_s']:g} s"
    )
    for probe in result["probes"]:
        idle = "not known" if probe["idle_watts"] is None else f"{probe['idle_watts']:.3g} W"
        told = "".join(f", {what} {value}" for what, value in probe["after"].items() if value is not None)
        print(f"{probe['name']} ({probe['scope']}, {probe['method']}): at rest {idle}{told}")
    for key, unit in _UNITS.items():
        cost = result[key]
        rate = result["tokens_per_s"].get(key.removesuffix("_token"))
        speed = _seconds(cost["seconds"]) if rate is None else f"{rate:.4g} tokens/s"
        print(f"  {unit:<13} {speed}{_joules(cost)}")
    for note in result["notes"]:
        print(note)


def _seconds(figure: dict[str, Any]) -> str:
    return f"{figure['mean']:.4g} s"


def _joules(cost: dict[str, Any]) -> str:
    """The sum first, and where it has several parts, each of them; parts of no sum as such."""
    if cost["joules"] is None:
        return "".join(f"; {name} alone: {_one(row)}" for name, row in cost["parts"].items())
    parts = cost["parts"] if len(cost["parts"]) > 1 else {}
    rows = {" + ".join(cost["joules"]["scopes"]): cost["joules"], **parts}
    return "".join(f"; {name}: {_one(row)}" for name, row in rows.items())


def _one(row: dict[str, Any]) -> str:
    if row["total"] is None:
        return "J not known"
    methods = " and ".join(row["methods"])
    bounds = "" if row["low"] is None else f", range {row['low']:.3g} to {row['high']:.3g}"
    above = "" if row["above_idle"] is None else f", {_figure(row['above_idle'])} J above idle"
    return f"{_figure(row['total'])} J{bounds}{above} ({methods})"


def _figure(figure: dict[str, Any]) -> str:
    if figure["low"] is None:
        return f"{figure['mean']:.4g}"
    return f"{figure['mean']:.4g} [{figure['low']:.4g}, {figure['high']:.4g}]"
