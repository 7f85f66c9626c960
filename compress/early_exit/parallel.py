"""A whole text in one pass, as a model that leaves early would have read it token by token, without a cache.

A position that has left keeps its state through the later layers, which make keys and values of it. What a position
does depends on earlier ones alone, so that one pass is enough, whatever the policy decides on the way. That is how an
answer is scored under a policy, and what cached generation is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..block import first
from .anatomy import Anatomy, anatomy, wrapped
from .policy import Policy, Step


class Depths:
    """depths   [B, T] int64: layers that each position ran, once the pass is over"""

    def __init__(self, decide: Callable[[int, Tensor, Tensor], Tensor], layers: int) -> None:
        self._decide, self._layers = decide, layers
        self.depths = torch.zeros(0, 0, dtype=torch.int64)

    def layer(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def instead(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            h = hidden_states
            if number == 0:
                self.depths = torch.full(h.shape[:2], self._layers, device=h.device)
            gone = (self.depths <= number)[..., None]
            out = torch.where(gone, h, first(forward(h, *args, **kwargs)))
            if number + 1 < self._layers:
                leaving = self._decide(number + 1, h, out) & ~gone[..., 0]
                self.depths = self.depths.masked_fill(leaving, number + 1)
            return out

        return instead


@contextmanager
def frozen_at(model: PreTrainedModel, depths: Tensor) -> Iterator[None]:
    """Inside the block position p of row b runs the first depths [B, T] layers, and keeps its state from there on."""
    body = anatomy(model)
    pass_ = Depths(lambda depth, before, after: depths == depth, body.depth)  # noqa: ARG005
    with wrapped(body.layers, pass_.layer):
        yield


@contextmanager
def scored(model: PreTrainedModel, policy: Policy, decoding: Tensor) -> Iterator[Depths]:
    """Inside the block a text is read as it would be generated under `policy`, row by row: where `decoding` [B, T] bool
    is set a position leaves when the policy says so, elsewhere (prompt, padding) it runs all layers."""
    body = anatomy(model)
    policy.check_fits(body.depth, model.config.hidden_size)
    pass_ = Depths(_by(policy, body, decoding), body.depth)
    with wrapped(body.layers, pass_.layer):
        yield pass_


def _by(policy: Policy, body: Anatomy, decoding: Tensor) -> Callable[[int, Tensor, Tensor], Tensor]:
    # Tokens generated before each: the first one that is decoded follows the one that came from the prompt.
    position = decoding.cumsum(1)

    def decide(depth: int, before: Tensor, after: Tensor) -> Tensor:
        if depth not in policy.exits:
            return torch.zeros_like(decoding)
        step = Step(depth, after[decoding], before[decoding], position[decoding], body.logits)
        return decoding.masked_scatter(decoding, policy.leaves(step))

    return decide
