"""Draft with the first layers, verify with the rest: leaving early without changing a token (self-speculation).

The first E layers and the model's own head draft a few tokens; the other layers then take the states that the draft
left at E, all at once, and tell what the whole model would have said. What agrees is kept, and the first token that
does not is the whole model's (as in LayerSkip, arXiv 2404.16710, section 4.3; the first layers run once for every
token, and there is one cache). The output is that of greedy decoding at full depth, so that nothing can leak that the
whole model does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .anatomy import Anatomy, anatomy, wrapped


@dataclass(frozen=True)
class Drafted:
    """sequences   [B, P + n] int64, prompts and what follows, padded behind the end
    drafted     tokens that rows drafted before they ended; accepted: those that the whole model would have said
    passes      of the layers that verify
    """

    sequences: Tensor
    drafted: int
    accepted: int
    passes: int

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens; NaN where none was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")


@torch.no_grad()
def draft_and_verify(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    depth: int,
    *,
    max_new_tokens: int,
    drafts: int = 4,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
) -> Drafted:
    """Greedy continuations of prompts [B, P], padded on the left: those of `generate` without sampling or penalties,
    but where two tokens tie within rounding.

    depth    layers that draft; drafts: tokens at a time. A batch goes on by what all of its rows accept.
    Raises ValueError for a model that cannot leave early, a depth that leaves nothing to verify, padding on the right,
    or a text as long as a sliding window.
    """
    body = anatomy(model)
    if not 1 <= depth < body.depth:
        raise ValueError(f"depth: {depth} is not between 1 and {body.depth - 1}, the layers below the last")
    if drafts < 1 or max_new_tokens < 1:
        raise ValueError(f"drafts, max_new_tokens: {drafts}, {max_new_tokens}: expected at least 1")
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("attention_mask: a prompt ends in padding; expected it on the left")
    ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    return _Decoding(model, body, depth, attention_mask).run(
        input_ids, max_new_tokens, drafts, torch.tensor(ends, device=input_ids.device), pad_token_id
    )


class _Decoding:
    """One batch under way.

    cache   as long for the layers that draft as for those that verify, between two rounds
    mask    [B, S] of the tokens in it, and of those to come
    """

    def __init__(self, model: PreTrainedModel, body: Anatomy, depth: int, mask: Tensor) -> None:
        self.model: Any = model
        self.body, self.depth, self.mask = body, depth, mask
        self.cache = DynamicCache(config=model.config)
        # A model makes its masks by the length of the first layer's cache: here that of the first one that verifies.
        self.deep = DynamicCache(config=model.config)
        self.deep.layers = [self.cache.layers[depth]] * depth + self.cache.layers[depth:]
        self.states: list[Tensor] = []  # [B, 1, d] each, behind layer `depth`

    def run(self, ids: Tensor, new_tokens: int, drafts: int, ends: Tensor, pad: int) -> Drafted:
        _check_windows(self.cache, ids.shape[1] + new_tokens)
        found = self._greedy(ids, self.cache)[:, -1:]  # [B, n] so far
        ended = torch.isin(found[:, 0], ends)
        drafted = accepted = passes = 0
        while found.shape[1] < new_tokens and not bool(ended.all()):
            count = min(drafts, new_tokens - found.shape[1])
            given, guessed = self._draft(found[:, -1:], count)
            said = self._verify(given)
            right = (guessed == said).cumprod(1).sum(1)  # [B], drafts before the first wrong one
            passes += 1
            drafted += count * int((~ended).sum())
            accepted += int(right[~ended].sum())
            # Behind the last right one comes what the whole model says instead; ended rows wait for nobody.
            keep = int(torch.where(ended, count, (right + 1).clamp(max=count)).min())
            self._forget(count - keep)
            for token in said[:, :keep].unbind(1):
                found = torch.cat([found, torch.where(ended, pad, token)[:, None]], 1)
                ended = ended | torch.isin(token, ends)
        open_ = torch.ones_like(found, dtype=torch.bool)
        open_[:, 1:] = ~torch.isin(found[:, :-1], ends).cummax(1).values
        # As `generate`, up to the last row's end.
        return Drafted(torch.cat([ids, found[:, : int(open_.sum(1).max())]], 1), drafted, accepted, passes)

    def _draft(self, token: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(tokens that went in, tokens that came out) [B, count] of the first layers, from the last true one on."""
        self.states = []
        given = [token]
        with wrapped(self.body.layers, self._first):
            for _ in range(count):
                given.append(self._greedy(given[-1], self.cache))
        return torch.cat(given[:-1], 1), torch.cat(given[1:], 1)

    def _verify(self, given: Tensor) -> Tensor:
        """What the whole model says after each of them, [B, count]."""
        start = self.mask.shape[1] - given.shape[1]
        self.mask = self.mask[:, :start]
        with wrapped(self.body.layers, self._rest):
            return self._greedy(given, self.deep)

    def _greedy(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """The likeliest token after each of ids [B, Q], which go behind what `cache` has."""
        behind = cache.get_seq_length()
        if behind:
            self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        position = (self.mask.cumsum(1) - 1).clamp(min=0)[:, behind:]
        found = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            **({} if behind else {"logits_to_keep": 1}),
        )
        return found.logits.float().argmax(-1)

    def _forget(self, count: int) -> None:
        """The last `count` tokens, in every layer."""
        if count:
            self.cache.crop(-count)
            self.mask = self.mask[:, :-count]

    def _first(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Layers that draft; the others hand on what they get, and the state that they get is kept."""

        def instead(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if number < self.depth:
                return forward(hidden_states, *args, **kwargs)
            if number == self.depth:
                self.states.append(hidden_states)
            return hidden_states

        return instead

    def _rest(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Layers that verify, on the states that were kept."""

        def instead(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if number < self.depth:
                return hidden_states
            h = torch.cat(self.states, 1) if number == self.depth else hidden_states
            return forward(h, *args, **kwargs)

        return instead


def _check_windows(cache: DynamicCache, tokens: int) -> None:
    """A sliding window that has slid cannot go back."""
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)
        if window is not None and tokens >= window:
            raise ValueError(f"max_new_tokens: {tokens} tokens in all; drafts work within the sliding window, {window}")
