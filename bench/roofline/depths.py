"""Passes that not every layer takes part in: leaving early, and drafting with the first layers what all verify."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...backends.ceilings import Ceilings
from .bound import floor
from .load import Early
from .speculation import expected_tokens
from .work import Step

# What a layer that is left out computes all the same, so that later tokens find its keys and values.
_KEYS = ("k_proj", "v_proj", "key", "value")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")


@dataclass(frozen=True)
class Depths:
    """Seconds at least, by decoder layer: of a whole one, and of its keys and values alone; and of all beside them."""

    layers: tuple[float, ...]
    keys: tuple[float, ...]
    beside: float

    def left_at(self, depth: int) -> float:
        """Of a pass that leaves after so many layers, with the head and the others' keys and values."""
        return self.beside + sum(self.layers[:depth]) + sum(self.keys[depth:])


def depths(step: Step, blocks: Sequence[str], ceilings: Ceilings) -> Depths:
    """blocks: full names of the decoder layers."""
    times = {part.module: floor(part, ceilings).seconds for part in step.parts}
    layers, keys = [0.0] * len(blocks), [0.0] * len(blocks)
    beside = 0.0
    for name, seconds in times.items():
        number = next((i for i, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        if number is None:
            beside += seconds
        else:
            layers[number] += seconds
            keys[number] += _share(name, step) * seconds
    return Depths(tuple(layers), tuple(keys), beside)


def _share(name: str, step: Step) -> float:
    """Of a module's work that goes into keys and values."""
    owner, _, leaf = name.rpartition(".")
    if leaf in _KEYS:
        return 1.0
    if leaf not in _FUSED:
        return 0.0
    kept = next((each for each in step.attention if each.module in (owner, name)), None)
    return 1.0 if kept is None else (kept.keys + kept.values) / (kept.queries + kept.keys + kept.values)


def exit_s(found: Depths, histogram: Mapping[int, int]) -> float:
    """Mean seconds of a token, at least; histogram: tokens by the layers that they went through. What deciding takes is
    not in it. ValueError as Early.check."""
    Early(histogram).check(len(found.layers))
    return sum(count * found.left_at(depth) for depth, count in histogram.items()) / sum(histogram.values())


def draft_s(one: Depths, many: Depths, layers: int, length: int, accept: float) -> float:
    """Mean seconds of a token, at least, where the first `layers` draft `length` tokens and all others verify them in
    one pass (LayerSkip, arXiv 2404.16710), with one cache: no layer sees a token twice.

    one, many   depths of a pass of one token, and of length + 1
    accept      probability that a drafted token is the whole model's
    ValueError as Early.check.
    """
    Early(draft=(layers, length, accept)).check(len(one.layers))
    drafted = length * (one.beside + sum(one.layers[:layers]))
    verified = sum(one.layers[:layers]) + sum(many.layers[layers:]) + many.beside
    return (drafted + verified) / expected_tokens(accept, length)
