"""A profile: what a model asks of a device in each phase, how long that takes at least, and how long it took.

bones = Bones.of(path, recipe)                      # no weight is read
found = profile(bones, ceilings, Load((1, 8), 512, 128))
found["phases"][1]["floor_s"]                        # the document's keys are those of SCHEMA
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...backends.ceilings import Ceilings
from ...compress.block import block_names
from .advice import others, recommended, taken_instead
from .bones import Bones, Passes
from .bound import ceiling, estimate_s, floor, floor_s, memory_share
from .capacity import Memory
from .counts import number_of
from .depths import depths, draft_s, exit_s
from .load import Early, Load
from .measure import Measured
from .speculation import expected_depth
from .stored import checkpoint_bytes
from .work import Part, Step

SCHEMA = "remanence.profile/1"
# Sequences side by side in the sweep, and its contexts as multiples of the one that is asked about.
_BATCHES = tuple(2**i for i in range(9))
_CONTEXTS = (1, 4, 16)
# Attained share from which the ceilings are not to be believed.
_ABOVE = 1.05


def profile(bones: Bones, ceilings: Ceilings, load: Load, early: Early | None = None) -> dict[str, Any]:
    """The document, without anything measured on the way: JSON values. ValueError for texts that are longer than the
    model has positions for, for exits that it has not, and as `walk`."""
    early = early or Early()
    bones.check(load, early)
    most = bones.positions
    passes = Passes(bones)
    prefill, decode = passes.at(load.prompt, load.context)
    document = _about(bones, ceilings, passes, load, most)
    for batch in load.batches:
        steps = [prefill.with_batch(batch), decode.with_batch(batch)]
        document["phases"] += [_phase(step, ceilings) for step in steps]
        document["serving"].append(_serving(steps[0], steps[1], ceilings, passes.memory(load), load))
    document["sweep"] = _sweep(passes, ceilings, load, most)
    document |= _early(passes, ceilings, load, early)
    document["what_if"] = others(bones, ceilings, load, passes)
    document["notes"] += taken_instead(prefill, decode, ceilings)
    document["recommendation"] = recommended(document, load)
    return document


def _about(bones: Bones, ceilings: Ceilings, passes: Passes, load: Load, positions: int) -> dict[str, Any]:
    model, memory = bones.model, passes.memory(load)
    parameters = sum({id(p): p.numel() for p in model.parameters()}.values())
    _, decode = passes.at(load.prompt, load.context)
    room = ceilings.memory_bytes
    raw = passes.raw(load.prompt, load.context)
    return {
        "schema": SCHEMA,
        "model": bones.name,
        "recipe": None if bones.recipe is None else bones.recipe.name,
        "architecture": type(model).__name__,
        "layers": bones.layers,
        "parameters": parameters,
        "dtype": number_of(model.dtype),
        "device": ceilings.as_json(),
        "weights": {
            "resident_bytes": memory.weights,
            "read_bytes": decode.total("weight_bytes"),
            "checkpoint_bytes": checkpoint_bytes(passes.dense, bones.forms) + raw[0].beside,
            "bits_per_parameter": 8 * memory.weights / parameters,
        },
        "kv_bytes_per_token": memory.cache(load.context + 1) / (load.context + 1),
        "phases": [],
        "serving": [],
        "capacity": {
            "memory_bytes": room,
            "largest_batch": None if room is None else memory.largest_batch(load.prompt, load.prompt + load.new, room),
            "at_context": load.prompt + load.new,
            "largest_context": None if room is None else (most := memory.largest_context(room, positions)),
            "at_batch": 1,
            "limited_by": None if room is None else "positions" if most == positions else "memory",
        },
        "uncounted": [
            {"op": each.op, "count": each.count, "modules": _short(each.modules)}
            for each in {found.op: found for step in reversed(raw) for found in step.uncounted}.values()
        ],
        "assumed": list(dict.fromkeys((*raw[0].assumed, *raw[1].assumed))),
        "notes": [],
    }


def _phase(step: Step, ceilings: Ceilings) -> dict[str, Any]:
    seconds, moved = floor_s(step, ceilings), step.total("bytes")
    share = memory_share(step, ceilings)
    heaviest = max(step.parts, key=lambda part: part.flops)
    return {
        "phase": step.phase,
        "batch": step.batch,
        "tokens": step.tokens,
        "context": step.context,
        "flops": step.total("flops"),
        "weight_bytes": step.total("weight_bytes"),
        "kv_bytes": step.total("kv_bytes"),
        "activation_bytes": step.total("activation_bytes"),
        "bytes": moved,
        "eager_bytes": step.total("eager_bytes"),
        "ops": sum(part.ops for part in step.parts),
        "intensity": step.total("flops") / moved,
        "floor_s": seconds,
        "estimate_s": estimate_s(step, ceilings),
        "bound": "memory" if share >= 0.5 else "compute",
        "memory_share": share,
        "compute": ceiling(heaviest.compute, ceilings)[0],
        "measured_s": None,
        "spread": None,
        "attained": None,
        "remainder_s": None,
        "note": None,
        "modules": [_module(name, parts, ceilings) for name, parts in _alike(step.parts).items()],
    }


def _alike(parts: Sequence[Part]) -> dict[str, list[Part]]:
    """Modules of the same place in different layers, under one name with a star for the layer's number."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(starred(part.module), []).append(part)
    return found


def starred(name: str) -> str:
    """A module's name with a star for each number in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _module(name: str, parts: list[Part], ceilings: Ceilings) -> dict[str, Any]:
    times = [floor(part, ceilings) for part in parts]
    return {
        "module": name,
        "count": len(parts),
        "kind": parts[0].kind,
        "compute": times[0].compute if any(part.flops for part in parts) else None,
        "flops": sum(part.flops for part in parts),
        "bytes": sum(part.bytes for part in parts),
        "floor_s": sum(time.seconds for time in times),
        "bound": max(times, key=lambda time: time.seconds).bound,
        "measured_s": None,
        "attained": None,
    }


def _serving(prefill: Step, decode: Step, ceilings: Ceilings, memory: Memory, load: Load) -> dict[str, Any]:
    taken = memory.total(prefill.batch, load.prompt, load.prompt + load.new)
    step = floor_s(decode, ceilings)
    return {
        "batch": prefill.batch,
        "prompt": load.prompt,
        "new": load.new,
        "ttft_s": floor_s(prefill, ceilings),
        "tpot_s": step,
        "tokens_per_s": prefill.batch / step,
        "memory_bytes": taken,
        "fits": None if ceilings.memory_bytes is None else memory.fits(taken, ceilings.memory_bytes),
        "measured": None,
    }


def _sweep(passes: Passes, ceilings: Ceilings, load: Load, positions: int) -> list[dict[str, Any]]:
    rows = []
    memory = passes.memory(load)
    for context in sorted({min(times * load.context, positions - 1) for times in _CONTEXTS}):
        _, one = passes.at(min(load.prompt, context), context)
        for batch in _BATCHES:
            step = one.with_batch(batch)
            seconds = floor_s(step, ceilings)
            taken = memory.total(batch, load.prompt, context + 1)
            rows.append(
                {
                    "phase": "decode",
                    "batch": batch,
                    "context": context,
                    "floor_s": seconds,
                    "tokens_per_s": batch / seconds,
                    "intensity": step.total("flops") / step.total("bytes"),
                    "performance": step.total("flops") / seconds,
                    "bound": "memory" if memory_share(step, ceilings) >= 0.5 else "compute",
                    "memory_bytes": taken,
                    "fits": ceilings.memory_bytes is None or memory.fits(taken, ceilings.memory_bytes),
                }
            )
    return rows


def _early(passes: Passes, ceilings: Ceilings, load: Load, early: Early) -> dict[str, Any]:
    """What leaving early, and drafting, would make of a decode step of one sequence."""
    found: dict[str, Any] = {"exits": None, "draft": None}
    if not early.histogram and early.draft is None:
        return found
    blocks = block_names(passes.bones.model)
    _, one = passes.at(load.prompt, load.context)
    whole, each = floor_s(one, ceilings), depths(one, blocks, ceilings)
    if early.histogram:
        seconds = exit_s(each, early.histogram)
        mean = expected_depth(early.histogram)
        found["exits"] = {
            "mean_depth": mean,
            "layers": len(blocks),
            "decode_s": seconds,
            "speedup": whole / seconds,
        }
    if early.draft is not None:
        layers, length, accept = early.draft
        _, many = passes.at(load.prompt, load.context, max(1, length) + 1)
        seconds = draft_s(each, depths(many, blocks, ceilings), layers, length, accept)
        found["draft"] = {
            "layers": layers,
            "accept": accept,
            "length": length,
            "decode_s": seconds,
            "speedup": whole / seconds,
        }
    return found


def _short(modules: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(map(starred, modules)))


def add_measured(document: dict[str, Any], measured: Measured, weights: float, cache: int | None) -> None:
    """Put what was measured beside its floors, for the batch that it is of.

    weights, cache   bytes of all weights, and of the device's last-level cache: a model that fits into it is not held
                     against its memory
    """
    served = next(row for row in document["serving"] if row["batch"] == measured.batch)
    served["measured"] = {
        "ttft_s": measured.ttft_s,
        "tpot_s": measured.tpot_s,
        "tokens_per_s": measured.tokens_per_s,
        "peak_memory_bytes": measured.peak_memory_bytes,
        "spread": max(measured.ttft_spread, measured.tpot_spread),
    }
    cached = cache is not None and weights <= cache
    for phase in document["phases"]:
        if phase["batch"] != measured.batch:
            continue
        first = phase["phase"] == "prefill"
        seconds = measured.ttft_s if first else measured.tpot_s
        phase["measured_s"] = seconds
        phase["spread"] = measured.ttft_spread if first else measured.tpot_spread
        if cached:
            phase["note"] = (
                f"the weights ({weights / 2**20:.1f} MiB) fit into the last-level cache ({(cache or 0) / 2**20:.0f} "
                "MiB): the memory's ceiling does not bind this model, and no attained share is given"
            )
        else:
            phase["attained"] = phase["floor_s"] / seconds
            if phase["attained"] > _ABOVE:
                phase["note"] = (
                    f"it took less than the floor ({phase['attained']:.0%}): the device gives more now than when its "
                    "ceilings were measured; --remeasure"
                )
        taken: dict[str, float] = {}
        for name, own in measured.modules[phase["phase"]].items():
            taken[starred(name)] = taken.get(starred(name), 0.0) + own
        for module in phase["modules"]:
            module["measured_s"] = taken.get(module["module"])
            if module["measured_s"] and not cached:
                module["attained"] = module["floor_s"] / module["measured_s"]
        phase["remainder_s"] = seconds - sum(module["measured_s"] or 0.0 for module in phase["modules"])
