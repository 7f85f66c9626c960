"""What a profile advises: what binds each phase, and what another recipe would change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...backends.ceilings import Ceilings
from ...compress.recipe import DENSE, parse_recipe
from .bones import Bones, Passes
from .bound import floor_s, replaced
from .load import Load
from .work import Phase, Step

# Recipes that a profile of a dense model is held beside: widths of weights, of both sides, sparsity, and the cache.
_CANDIDATES = (
    "rtn-w8a16",
    "rtn-w4a16-g128",
    "rtn-w4a16-g64",
    "rtn-w8a8",
    "rtn-w4a4",
    "magnitude-2:4",
    "dense+kv_bits=4",
)


def others(bones: Bones, ceilings: Ceilings, load: Load, passes: Passes) -> list[dict[str, Any]]:
    """Floors by other recipes; nothing for a checkpoint that is compressed already, whose dense weights are gone."""
    if bones.forms and bones.recipe is None:
        return []
    rows = []
    for name in ("dense", *_CANDIDATES):
        recipe = DENSE if name == "dense" else parse_recipe(name)
        if recipe == (bones.recipe or DENSE):
            continue
        try:
            other = Passes(bones.as_if(recipe))
            other.walked = passes.walked
            prefill, decode = other.at(load.prompt, load.context)
        except ValueError:  # its groups do not divide this model's layers, or it has nothing for them
            continue
        rows.append(
            {
                "recipe": name,
                "batch": load.batches[0],
                "prefill_s": floor_s(prefill.with_batch(load.batches[0]), ceilings),
                "decode_s": floor_s(decode.with_batch(load.batches[0]), ceilings),
                "resident_bytes": other.memory(load).weights,
            }
        )
    return rows


def taken_instead(prefill: Step, decode: Step, ceilings: Ceilings) -> list[str]:
    notes = []
    for kind, taken in replaced([prefill, decode], ceilings).items():
        faster = "is faster with it" if kind in ceilings.compute else f"has no known ceiling for {kind}"
        notes.append(f"products of {kind} are reckoned in {taken}: {ceilings.device} {faster}")
    return notes


def recommended(document: Mapping[str, Any], load: Load) -> str:
    """What bounds each phase, and what would change it most."""
    batch = load.batches[0]
    said = []
    for phase in [each for each in document["phases"] if each["batch"] == batch]:
        bound = "memory" if phase["bound"] == "memory" else f"arithmetic in {phase['compute']}"
        share = phase["memory_share"] if phase["bound"] == "memory" else 1 - phase["memory_share"]
        largest = max(("weight", "kv", "activation"), key=lambda name: phase[f"{name}_bytes"])
        what = {"weight": "weights", "kv": "keys and values", "activation": "activations"}[largest]
        moved = f", {phase[f'{largest}_bytes'] / phase['bytes']:.0%} of its bytes are {what}"
        text = f"{phase['phase']} at batch {batch} is bound by {bound} ({share:.0%} of its floor"
        text += (moved if phase["bound"] == "memory" else "") + ")"
        said.append(text + _change(document, phase))
    return ". ".join(text[0].upper() + text[1:] for text in said) + "."


def _change(document: Mapping[str, Any], phase: Mapping[str, Any]) -> str:
    name: Phase = phase["phase"]
    here, recipe = phase["floor_s"], document["recipe"]
    others = {row["recipe"]: row[f"{name}_s"] for row in document["what_if"]}
    if recipe is not None and "dense" in others:
        return f": {recipe} takes it from {_ms(others['dense'])} to {_ms(here)} ms at least"
    if not others or min(others.values()) > 0.95 * here:
        return ": no recipe that was tried would change that much" if others else ""
    best = min(others, key=lambda key: others[key])
    return f": {best} would take it from {_ms(here)} to {_ms(others[best])} ms at least"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"
