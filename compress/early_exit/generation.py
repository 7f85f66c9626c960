"""Leaving early inside transformers' own `generate`, with a KV cache, at any batch size.

The prompt is read at full depth. While decoding, a row that has left keeps its state: later layers take it as it is,
and only make keys and values of it, so that every layer's cache has one entry per token and later tokens see a whole
past (CALM, arXiv 2207.07061, section 3.3, "state propagation"). Other rows of the batch go on alone. When all have
left, what is left of the step are these projections.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..block import first
from .anatomy import Anatomy, anatomy, wrapped
from .policy import Policy, Step

Sync = Literal["row", "batch"]
# So many rows have to have left before the others run by themselves: a layer's weights are read for any of them, which
# is what few rows wait for, and choosing rows takes a dozen small ops and a copy of their keys.
SPLIT_ROWS = 8


@dataclass
class Run:
    """What happened inside `early_exit`.

    calls   for each prompt batch that was read, the depth of every decode step [B] int64: layers that the row ran, 0
            once it has ended; the first token of a row comes from the prompt, at full depth, and is not in it
    """

    anatomy: Anatomy
    policy: Policy
    sync: Sync
    calls: list[list[Tensor]] = field(default_factory=list)
    # Of the call of `generate` under way: tokens of its prompt (None: no call is), and those behind which a row has
    # ended.
    _prompt: int | None = None
    _ends: tuple[int, ...] = ()
    # Of the step under way; None: at full depth.
    _gone: Tensor | None = None
    _left: int = 0  # how many have gone: asked at every layer, which would wait for a GPU
    _agreed: Tensor | None = None
    _depth: Tensor | None = None
    _ended: Tensor | None = None
    _fresh: Tensor | None = None

    def depths(self, new_tokens: int, call: int = -1) -> Tensor:
        """[B, new_tokens] of one call of `generate` that gave so many tokens: the depth behind each, 0 once a row had
        ended. Steps that `generate` took beyond what it returned are left out."""
        steps = self.calls[call][: max(0, new_tokens - 1)]
        if not steps:
            raise ValueError(f"depths: no token was decoded in call {call}")
        prompt = torch.full_like(steps[0], self.anatomy.depth)
        return torch.stack([prompt, *steps], 1)

    @property
    def mean_depth(self) -> float:
        """Over all decoded tokens, those of the prompts' passes left out; ValueError where there are none."""
        steps = [step for call in self.calls for step in call]
        depths = torch.cat(steps) if steps else torch.zeros(0)
        if not bool((depths > 0).any()):
            raise ValueError("mean_depth: no token was decoded")
        return float(depths[depths > 0].double().mean())

    def histogram(self) -> dict[int, int]:
        """Tokens decoded at each depth."""
        steps = [step for call in self.calls for step in call]
        counts = torch.cat(steps).bincount(minlength=self.anatomy.depth + 1).tolist() if steps else []
        return {depth: count for depth, count in enumerate(counts) if depth and count}

    def watch(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        """Before the model runs: which rows end with the token that they are given now."""
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions: rows that have left attend to nothing; there is no whole to show")
        ids = args[0] if args else kwargs.get("input_ids")
        self._fresh = None if ids is None else torch.isin(ids[:, -1], torch.tensor(self._ends, device=ids.device))

    def generating(self, prompt: int | None) -> None:
        """A call of `generate` begins with a prompt of so many tokens, or ends (None)."""
        self._prompt, self._ends, self._ended = prompt, (), None
        if prompt is not None:
            self.calls.append([])

    def ending_with(self, tokens: int | Sequence[int] | Tensor | None) -> None:
        """As `generate` has it: a row has ended behind one of these."""
        self._ends = () if tokens is None else tuple(torch.as_tensor(tokens).flatten().tolist())

    def begin(self, h: Tensor, kwargs: Mapping[str, Any]) -> None:
        """At the first layer, h [B, Q, d]: one token more, for a cache that has the prompt, is a step of decoding."""
        cache = kwargs.get("past_key_values")
        self._gone, self._left = None, 0
        if cache is None and self._prompt is not None:
            raise ValueError("use_cache: False; leaving early works with a KV cache alone")
        if cache is None or h.shape[1] != 1 or cache.get_seq_length() < (self._prompt or 1):
            if cache is not None and self._prompt is None:  # called by itself, without `generate`
                self._ended = None
                self.calls.append([])
            return
        _check_cache(cache)
        none = torch.zeros(len(h), dtype=torch.bool, device=h.device)
        if not self.calls:  # goes on from another's cache
            self.calls.append([])
        ended = none if self._ended is None or len(self._ended) != len(h) else self._ended
        self._ended = ended if self._fresh is None else ended | self._fresh
        # Where nobody may leave, those that have ended do not either.
        self._gone, self._agreed = none, none if self.policy.threshold > 1 else self._ended
        self._depth = torch.where(self._ended, 0, self.anatomy.depth)

    def end(self) -> None:
        """Behind the last layer."""
        if self._gone is not None:
            assert self._depth is not None
            self.calls[-1].append(self._depth.cpu())
            self._gone = None

    def layer(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in for `forward` of layer `number` (from 0)."""
        layer, last = self.anatomy.layers[number], number == self.anatomy.depth - 1

        def instead(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            h = hidden_states
            if number == 0:
                self.begin(h, kwargs)
            gone = self._gone
            if gone is None or not self._left:
                output = forward(h, *args, **kwargs)
            elif self._left == len(h):
                keys, values = self.anatomy.keys_values(layer, h, kwargs)
                kwargs["past_key_values"].update(keys, values, number)
                output = h
            elif self._left < SPLIT_ROWS:
                # Of their states a layer makes the keys and values that are wanted; the rest of it is thrown away.
                output = torch.where(gone[:, None, None], h, first(forward(h, *args, **kwargs)))
            else:
                output = self._split(number, forward, h, gone, args, kwargs)
            if gone is not None and number + 1 in self.policy.exits and not last:
                self._decide(number + 1, h, first(output))
            if last:
                self.end()
            return output

        return instead

    def _split(
        self,
        number: int,
        forward: Callable[..., Any],
        h: Tensor,
        gone: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """The layer for the rows that are there; keys and values alone for the many that have left."""
        here, left = (~gone).nonzero()[:, 0], gone.nonzero()[:, 0]
        part = _rows({**kwargs, "past_key_values": None}, left, len(h))
        rest = self.anatomy.keys_values(self.anatomy.layers[number], h[left], part)
        cache = _Part(kwargs["past_key_values"], here, left, rest)
        mine = _rows({**kwargs, "past_key_values": None}, here, len(h)) | {"past_key_values": cache}
        output = forward(h[here], *_rows(args, here, len(h)), **mine)
        return h.index_copy(0, here, first(output).to(h.dtype))

    def _decide(self, depth: int, before: Tensor, after: Tensor) -> None:
        assert self._gone is not None
        assert self._agreed is not None
        assert self._depth is not None
        asked = (~(self._gone | self._agreed)).nonzero()[:, 0]
        if len(asked):
            # Every row has generated as many tokens as there were steps, and one with the prompt.
            position = torch.full((len(asked),), len(self.calls[-1]) + 1, device=after.device)
            step = Step(depth, after[asked, -1], before[asked, -1], position, self.anatomy.logits)
            leaving = asked[self.policy.leaves(step)]
            self._agreed = self._agreed.index_fill(0, leaving, True)
        if self.sync == "batch" and not bool(self._agreed.all()):
            return
        now = self._agreed & ~self._gone
        self._depth[now & (self._depth > 0)] = depth
        self._gone = self._gone | now
        self._left = int(self._gone.sum())


@contextmanager
def early_exit(model: PreTrainedModel, policy: Policy, sync: Sync = "row") -> Iterator[Run]:
    """Inside the block `model.generate` leaves early as `policy` says; afterwards, also after an error, it does not.

    sync   "row": every row leaves by itself; "batch": all at once, when the last of them wants to (a row that wanted to
           at an earlier exit still does), which copies no keys
    Works with greedy search, sampling and beams, with a DynamicCache (generate's default). Rows that have ended no
    longer count, and leave at the first exit. Raises ValueError for a model, cache or policy that does not
    fit, and for a model that leaves early already.
    """
    if sync not in get_args(Sync):
        raise ValueError(f"exit-sync: {sync!r} is not one of {', '.join(get_args(Sync))}")
    body = anatomy(model)
    policy.check_fits(body.depth, model.config.hidden_size)
    run = Run(body, policy, sync)
    handle = model.register_forward_pre_hook(run.watch, with_kwargs=True)
    try:
        with wrapped(body.layers, run.layer), _noting(model, run), torch.no_grad():
            yield run
    finally:
        handle.remove()


@contextmanager
def _noting(model: Any, run: Run) -> Iterator[None]:
    """Inside the block each call of `model.generate` tells `run` how long its prompt is, and what it takes for an end,
    once it has put its settings together."""
    generate, prepare = model.generate, model._prepare_generation_config
    before = {name: model.__dict__.get(name) for name in ("generate", "_prepare_generation_config")}

    @functools.wraps(generate)
    def noting(*args: Any, **kwargs: Any) -> Any:
        given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
        run.generating(max((part.shape[1] for part in given if isinstance(part, Tensor)), default=1))
        try:
            return generate(*args, **kwargs)
        finally:
            run.generating(None)

    @functools.wraps(prepare)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        found = prepare(*args, **kwargs)
        run.ending_with(found[0].eos_token_id)
        return found

    model.generate, model._prepare_generation_config = noting, prepared
    try:
        yield
    finally:
        for name, own in before.items():
            del model.__dict__[name]
            if own is not None:
                model.__dict__[name] = own


def _check_cache(cache: object) -> None:
    if type(cache) is not DynamicCache:
        raise ValueError(f"past_key_values: {type(cache).__name__}; leaving early works with a DynamicCache alone")


def _rows(value: Any, rows: Tensor, batch: int) -> Any:
    """The rows [n] of everything that has one for each of the batch."""

    def chosen(part: Any) -> Any:
        return part[rows] if isinstance(part, Tensor) and part.dim() > 0 and len(part) == batch else part

    return tree_map(chosen, value)


class _Part:
    """A cache as one layer sees it that runs some rows alone: their keys and values are stored with those of the
    others, and theirs come back.

    rest   keys and values [n, H, 1, D] of the rows that have left
    """

    def __init__(self, cache: DynamicCache, here: Tensor, left: Tensor, rest: tuple[Tensor, Tensor]) -> None:
        self._cache, self._here, self._left, self._rest = cache, here, left, rest

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As a cache's; keys and values of the rows that are there -> theirs so far."""
        whole = [self._together(mine, theirs) for mine, theirs in zip((keys, values), self._rest, strict=True)]
        keys, values = self._cache.update(whole[0], whole[1], layer_idx, *args, **kwargs)
        return keys[self._here], values[self._here]

    def _together(self, mine: Tensor, theirs: Tensor) -> Tensor:
        both = mine.new_empty(len(self._here) + len(self._left), *mine.shape[1:])
        both[self._here], both[self._left] = mine, theirs.to(mine.dtype)
        return both

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
