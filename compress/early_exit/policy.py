"""When to leave: a score after some of the layers, and a threshold that it has to reach.

Depths count layers that were run, from 1; L is the whole model. A policy is asked at its `exits` alone, all below L.
One interface for all, so that each can be served, calibrated and audited as the others:

full          never
fixed         always at one depth
schedule      by position: SkipDecode's, linearly from the deepest exit to the shallowest (arXiv 2307.02628, section 3)
saturation    cosine between the states behind this layer and before it (CALM, arXiv 2207.07061, section 3.5)
confidence    gap between the two likeliest tokens, by the model's own norm and head (CALM, section 3.5)
probe         a linear classifier of the state: will this exit's token be the last layer's? (CALM, section 3.5)
agent         GREEN-CODE's network, trained by PPO: the probability of its action "exit" (arXiv 2501.11006, section IV)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

# More than any score: who asks for this never leaves.
NEVER = 1.01
# The default, which policies without a threshold keep (or are put out of use by one above 1).
_UNUSED = 0.5


@dataclass(frozen=True)
class Step:
    """What may be known of n rows at one exit.

    state      [n, d] hidden states there, the final norm not applied
    before     [n, d] what the last layer that ran was given
    position   [n] int64: tokens generated before this one, at least 1 (the first comes from the prompt, at full depth)
    logits     states [n, d] -> [n, V], by the model's final norm and head
    """

    depth: int
    state: Tensor
    before: Tensor
    position: Tensor
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Leave at the first of `exits` where the score is at least the threshold.

    exits       depths at which it is asked, ascending
    threshold   above 1 nobody leaves
    decay       CALM's falling threshold (equation 5): at position t the score is held against
                .9 threshold + .1 exp(-decay t / horizon), within 0 and 1, which falls from .1 above .9 threshold to
                .9 threshold; None: against the threshold at every position
    """

    name: ClassVar[str]
    # Whether the score is one of many values, so that a threshold chooses between them.
    graded: ClassVar[bool] = True
    # Names of fields that are tensors; the others are JSON.
    weights: ClassVar[tuple[str, ...]] = ()

    exits: tuple[int, ...]
    threshold: float = _UNUSED
    decay: float | None = None
    horizon: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.exits, list | tuple):
            raise ValueError(f"exits: {self.exits!r}: expected depths from 1, ascending")
        exits = tuple(self.exits)
        if not all(type(depth) is int and depth > 0 for depth in exits) or list(exits) != sorted(set(exits)):
            raise ValueError(f"exits: {list(exits)}: expected depths from 1, ascending")
        if not exits and self.name != "full":
            raise ValueError(f"exits: none; the policy {self.name} needs at least one")
        if not _is_number(self.threshold) or self.threshold < 0:
            raise ValueError(f"threshold: {self.threshold!r}: expected a number of at least 0")
        if self.decay is not None and not (_is_number(self.decay) and self.decay > 0):
            raise ValueError(f"decay: {self.decay!r}: expected a number above 0")
        if type(self.horizon) is not int or self.horizon < 1:
            raise ValueError(f"horizon: {self.horizon!r}: expected a whole number of tokens, at least 1")
        if not self.graded and self.threshold <= 1 and self.threshold != _UNUSED:
            raise ValueError(f"threshold: {self.threshold}: the policy {self.name} has none")
        if self.name == "fixed" and len(exits) != 1:
            raise ValueError(f"exits: {list(exits)}: the policy fixed leaves at one depth")
        object.__setattr__(self, "exits", exits)

    def score(self, step: Step) -> Tensor:
        """[n] float32, NaN where the state is not a number: such a row stays."""
        raise NotImplementedError

    def leaves(self, step: Step) -> Tensor:
        """[n] bool"""
        if self.threshold > 1:
            return torch.zeros(len(step.state), dtype=torch.bool, device=step.state.device)
        return self.score(step) >= self.limit(step.position)

    def limit(self, position: Tensor) -> Tensor | float:
        """The threshold at each position."""
        if self.decay is None:
            return self.threshold
        return (0.9 * self.threshold + 0.1 * torch.exp(-self.decay * position / self.horizon)).clamp(0, 1)

    def at(self, threshold: float) -> Policy:
        """The same with another threshold."""
        return replace(self, threshold=threshold)

    def check_fits(self, layers: int, hidden: int) -> None:
        """ValueError for a model of another depth or width than the policy is about."""
        if self.exits and self.exits[-1] >= layers:
            raise ValueError(f"exits: {self.exits[-1]} is not below {layers}, the model's layers")
        self.check_width(hidden)

    def check_width(self, hidden: int) -> None:
        """As check_fits, of the weights."""

    def check_operations(self, hidden: int, vocabulary: int) -> int:
        """Multiplications and additions of one check of one row, besides the model's own layers."""
        raise NotImplementedError

    def check_bytes(self) -> int:
        """Of the policy's own weights, read by one check of one row."""
        return 0

    def settings(self) -> dict[str, Any]:
        """What is no tensor, as JSON."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.weights}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Its weights by name, flat."""
        return {name: getattr(self, name) for name in self.weights}


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    name: ClassVar[str] = "full"
    graded: ClassVar[bool] = False
    exits: tuple[int, ...] = ()

    def leaves(self, step: Step) -> Tensor:
        return torch.zeros(len(step.state), dtype=torch.bool, device=step.state.device)

    def check_operations(self, hidden: int, vocabulary: int) -> int:  # noqa: ARG002
        return 0


@dataclass(frozen=True, kw_only=True)
class Fixed(Policy):
    name: ClassVar[str] = "fixed"
    graded: ClassVar[bool] = False

    def score(self, step: Step) -> Tensor:
        return torch.ones(len(step.state), device=step.state.device)

    def check_operations(self, hidden: int, vocabulary: int) -> int:  # noqa: ARG002
        return 0


@dataclass(frozen=True, kw_only=True)
class Schedule(Policy):
    """Position t leaves at the depth that falls linearly from the last of `exits` at t = 0 to the first at `horizon`,
    rounded up to an exit, and stays there. Depths never rise with the position, as in SkipDecode, so that keys of the
    layers in question come from real states; unlike there, the lower layers run and the upper ones are left out."""

    name: ClassVar[str] = "schedule"
    graded: ClassVar[bool] = False

    def score(self, step: Step) -> Tensor:
        first, last = self.exits[0], self.exits[-1]
        share = (step.position.double() / self.horizon).clamp(max=1)
        return (step.depth >= last - (last - first) * share).float()

    def check_operations(self, hidden: int, vocabulary: int) -> int:  # noqa: ARG002
        return 0


@dataclass(frozen=True, kw_only=True)
class Saturation(Policy):
    name: ClassVar[str] = "saturation"

    def score(self, step: Step) -> Tensor:
        return cosine_similarity(step.state.float(), step.before.float(), dim=-1)

    def check_operations(self, hidden: int, vocabulary: int) -> int:  # noqa: ARG002
        return 6 * hidden


@dataclass(frozen=True, kw_only=True)
class Confidence(Policy):
    name: ClassVar[str] = "confidence"

    def score(self, step: Step) -> Tensor:
        top = step.logits(step.state).float().softmax(-1).topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]

    def check_operations(self, hidden: int, vocabulary: int) -> int:
        return 2 * hidden * vocabulary


def _is_number(value: object) -> bool:
    """One that a float can hold; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _on(tensor: Tensor, state: Tensor) -> Tensor:
    """Float32 beside the state."""
    return tensor.to(state.device, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Probe(Policy):
    """A classifier for each exit: sigmoid(weight . (state - mean) / deviation + bias).

    mean, deviation, weight   [E, d] float32; bias [E] float32
    """

    name: ClassVar[str] = "probe"
    weights: ClassVar[tuple[str, ...]] = ("mean", "deviation", "weight", "bias")
    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor

    def score(self, step: Step) -> Tensor:
        e = self.exits.index(step.depth)
        x = step.state.float()
        z = (x - _on(self.mean[e], x)) / _on(self.deviation[e], x)
        return torch.sigmoid(z @ _on(self.weight[e], x) + _on(self.bias[e], x))

    def check_width(self, hidden: int) -> None:
        wanted = {name: (len(self.exits), hidden) for name in ("mean", "deviation", "weight")} | {
            "bias": (len(self.exits),)
        }
        _check_shapes(self, wanted)

    def check_operations(self, hidden: int, vocabulary: int) -> int:  # noqa: ARG002
        return 4 * hidden

    def check_bytes(self) -> int:
        # One exit's of each.
        return sum(tensor.nbytes for tensor in self.tensors().values()) // len(self.exits)


@dataclass(frozen=True, kw_only=True)
class Agent(Policy):
    """tanh layers from the state to two actions, 0 continue and 1 exit; the score is exit's probability, 0 where
    continue is the likelier (the paper's rule asks for both).

    layers        (weight [out, in], bias [out]) float32, the last with two rows
    temperature   of the softmax over the two
    """

    name: ClassVar[str] = "agent"
    weights: ClassVar[tuple[str, ...]] = ("layers",)
    layers: tuple[tuple[Tensor, Tensor], ...] = field(default=())
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_number(self.temperature) or not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature!r}: expected a number above 0")

    def score(self, step: Step) -> Tensor:
        x = step.state.float()
        for weight, bias in self.layers[:-1]:
            x = torch.tanh(x @ _on(weight, x).T + _on(bias, x))
        weight, bias = self.layers[-1]
        p = ((x @ _on(weight, x).T + _on(bias, x)) / self.temperature).softmax(-1)[:, 1]
        return torch.where(p < 0.5, torch.zeros_like(p), p)

    def check_width(self, hidden: int) -> None:
        width = hidden
        for number, (weight, bias) in enumerate(self.layers):
            last = number == len(self.layers) - 1
            if weight.dim() != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
                raise ValueError(f"layers.{number}: weight {list(weight.shape)} does not take {width} values")
            if last and len(weight) != 2:
                raise ValueError(f"layers.{number}: {len(weight)} actions; expected 2, continue and exit")
            width = len(weight)
        if not self.layers:
            raise ValueError("layers: none; an agent needs at least one")

    def check_operations(self, hidden: int, vocabulary: int) -> int:  # noqa: ARG002
        return sum(2 * weight.numel() for weight, _ in self.layers)

    def check_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        pairs = enumerate(self.layers)
        return {f"layers.{i}.{kind}": t for i, pair in pairs for kind, t in zip(("weight", "bias"), pair, strict=True)}


def _check_shapes(policy: Policy, wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        found = tuple(getattr(policy, name).shape)
        if found != shape:
            raise ValueError(f"{name}: {list(found)}; expected {list(shape)} for this model and these exits")


POLICIES: dict[str, type[Policy]] = {
    kind.name: kind for kind in (Full, Fixed, Schedule, Saturation, Confidence, Probe, Agent)
}


def evenly(layers: int, count: int) -> tuple[int, ...]:
    """`count` exits of a model of `layers` layers, evenly spaced below the last; fewer where there are no more."""
    if count < 1:
        raise ValueError(f"count: {count}: expected at least 1 exit")
    return tuple(sorted({max(1, round(layers * (i + 1) / (count + 1))) for i in range(count)} - {layers}))
