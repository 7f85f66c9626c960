"""How much of every decoder layer's hidden states the other layers have too: CPTQuant's CMPQ (arXiv 2412.03599).

S_l = 1 - mean over other layers k of the mean canonical correlation of h_l with h_k, h the hidden states that a layer
puts out, and its samples all tokens. (Its authors average over tokens first, and take the first correlation alone.)

CCA of as many features as samples finds everything alike: of each layer's states the principal directions are compared,
at most one for every 10 tokens. Two passes over the data, the first for those, the second for what tokens are along
them. In memory: one matrix [d, d] a layer, and one over all directions of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .block import block_names, first
from .cca import Moments, Principal, correlations, principal, weighted_mean, whitening
from .probe import Progress, in_float32, logits

# Share of the variance that the directions hold; SVCCA's is its authors'.
ENERGY = {"cmpq": 1.0, "svcca": 0.99, "pwcca": 1.0}


@dataclass(frozen=True)
class LayerScores:
    """By full name of a decoder layer, within [0, 1].

    scores    1 - mean likeness of its hidden states to those of every other layer
    through   1 - likeness of what it puts out to what enters it
    """

    measure: str
    scores: dict[str, float]
    through: dict[str, float]


def layer_scores(
    model: PreTrainedModel, measure: str, batches: Sequence[Tensor], progress: Progress | None = None
) -> LayerScores:
    """Score every decoder layer on token ids [B, T]; the model stays as it is.

    measure   cmpq: mean canonical correlation of the first principal directions, one for every 10 tokens and 256 at
              most; svcca: of these, the ones that hold 99 % of the variance; pwcca: as cmpq, correlations weighted by
              how much of the layer's own states lies along them
    Raises ValueError for fewer than two layers, and for fewer than 10 tokens.
    """
    if measure not in ENERGY:
        raise ValueError(f"measure: {measure!r} is not one of {', '.join(ENERGY)}")
    names = block_names(model)
    if len(names) < 2:
        raise ValueError(f"{measure}: compares decoder layers, and {type(model).__name__} has {len(names)}")
    with in_float32(model), torch.no_grad(), _states(model, names) as states:
        views = [_principal(name, view, measure) for name, view in _first_pass(states, batches, names, progress)]
        joint = _second_pass(states, views, batches, progress)
    alike = _Likeness(measure, views, joint)
    layers = range(1, len(views))
    scores = {names[i - 1]: 1 - sum(alike(i, k) for k in layers if k != i) / (len(names) - 1) for i in layers}
    return LayerScores(measure, scores, {names[i - 1]: 1 - alike(i, i - 1) for i in layers})


@contextmanager
def _states(model: PreTrainedModel, names: Sequence[str]) -> Iterator[Any]:
    """A function: token ids [B, T] -> what enters the first layer, and what each puts out, [B * T, d] each."""
    seen: list[Tensor] = []

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
        seen.append(args[0] if args else kwargs["hidden_states"])

    def leaving(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
        seen.append(first(output))

    def of(ids: Tensor) -> list[Tensor]:
        seen.clear()
        logits(model, ids)
        return [state.flatten(0, -2) for state in seen]

    blocks = [model.get_submodule(name) for name in names]
    handles = [blocks[0].register_forward_pre_hook(entering, with_kwargs=True)]
    handles += [block.register_forward_hook(leaving) for block in blocks]
    try:
        yield of
    finally:
        for handle in handles:
            handle.remove()


def _first_pass(
    states: Any, batches: Sequence[Tensor], names: Sequence[str], progress: Progress | None
) -> list[tuple[str, Moments]]:
    found: list[Moments] = []
    for i, ids in enumerate(batches):
        seen = states(ids)
        found = found or [Moments(state.shape[-1], state.device) for state in seen]
        for moments, state in zip(found, seen, strict=True):
            moments.add(state)
        if progress is not None:
            progress(i + 1, 2 * len(batches), "hidden states")
    return list(zip((f"what enters {names[0]}", *names), found, strict=True))


def _principal(name: str, moments: Moments, measure: str) -> Principal:
    try:
        return principal(moments, ENERGY[measure])
    except ValueError as error:
        raise ValueError(f"{measure}: {name}: {error}") from None


def _second_pass(
    states: Any, views: Sequence[Principal], batches: Sequence[Tensor], progress: Progress | None
) -> Moments:
    joint = Moments(sum(view.axes.shape[1] for view in views), views[0].axes.device)
    for i, ids in enumerate(batches):
        joint.add(torch.cat([view.along(state) for view, state in zip(views, states(ids), strict=True)], 1))
        if progress is not None:
            progress(len(batches) + i + 1, 2 * len(batches), "what they share")
    return joint


class _Likeness:
    """Of view i to view k, within [0, 1]: a mean canonical correlation."""

    def __init__(self, measure: str, views: Sequence[Principal], joint: Moments) -> None:
        self.measure, self.views, self.scatter = measure, views, joint.scatter
        ends = torch.tensor([0] + [view.axes.shape[1] for view in views]).cumsum(0).tolist()
        self._parts = [slice(start, end) for start, end in pairwise(ends)]
        # White by their axes but for rounding, which this takes away.
        self._white = [whitening(self.scatter[part, part]) for part in self._parts]
        self._known: dict[tuple[int, int], float] = {}

    def __call__(self, i: int, k: int) -> float:
        if (i, k) not in self._known:
            self._known[i, k] = found = self._of(i, k)
            if self.measure != "pwcca":
                self._known[k, i] = found
        return self._known[i, k]

    def _of(self, i: int, k: int) -> float:
        x, y = self._parts[i], self._parts[k]
        values, variates = correlations(self._white[i], self.scatter[x, y], self._white[k])
        if self.measure != "pwcca":
            return float(values.mean())
        # <h, x_j> of variates h and centred features x_j, as far as the directions hold these.
        return weighted_mean(values, variates.T @ self.scatter[x, x] @ self.views[i].loads)
