"""What a policy can learn from: states of the whole model's own greedy texts, and whether leaving would have changed
a token.

GREEN-CODE trains its agent on such rollouts (arXiv 2501.11006, section IV): a share of each text as context, then some
tokens of the whole model. All that a reward or a label needs is known then, for every exit at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..block import first
from ..decoding import left_padded, plain_settings
from .anatomy import Anatomy, anatomy
from .policy import Policy, Step

# Of each text that is context: the paper's bounds.
CONTEXT = (0.2, 0.5)
# Tokens after each context, the paper's; the first comes from the prompt's pass, where nobody leaves.
NEW_TOKENS = 15


@dataclass(frozen=True)
class States:
    """n decoded tokens of the whole model, E exits of width d; all on the CPU, a token's neighbours beside it.

    exits, layers   depths, and the whole model's
    state     [n, E, d] float32, behind each exit, the final norm not applied
    before    [n, E, d] float32, one layer earlier
    guess     [n, E] int64: the likeliest token there, by the model's own norm and head
    final     [n] int64: the whole model's
    episode   [n] int64: the number of the prompt
    position  [n] int64: tokens generated before this one, from 1
    """

    exits: tuple[int, ...]
    layers: int
    state: Tensor
    before: Tensor
    guess: Tensor
    final: Tensor
    episode: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.final)

    @property
    def agrees(self) -> Tensor:
        """[n, E] bool: leaving there gives the whole model's token."""
        return self.guess == self.final[:, None]

    @property
    def first_agreement(self) -> Tensor:
        """[n] int64: the number of the first exit that agrees, E where none does."""
        found = torch.cat([self.agrees, torch.ones(len(self), 1, dtype=torch.bool)], 1)
        return found.int().argmax(1)

    def rows(self, chosen: Tensor) -> States:
        """Some of the tokens: [m] numbers or [n] bool."""
        tensors = {f.name: getattr(self, f.name)[chosen] for f in fields(self) if f.name not in ("exits", "layers")}
        return replace(self, **tensors)

    def split(self, shares: Sequence[float], seed: int = 0) -> list[States]:
        """Parts by these shares of the episodes, as tokens of one text are alike; the last has what is left, and each
        has one at least. ValueError where there are fewer episodes than parts."""
        episodes = self.episode.unique()
        if len(episodes) < len(shares) + 1:
            raise ValueError(f"states: {len(episodes)} episodes do not make {len(shares) + 1} parts")
        drawn = episodes[torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed))]
        parts, start = [], 0
        for number, share in enumerate((*shares, 1.0)):
            later = len(shares) - number
            end = min(start + max(1, round(share * len(drawn))), len(drawn) - later)
            parts.append(self.rows(torch.isin(self.episode, drawn[start : end if later else len(drawn)])))
            start = end
        return parts

    def step(self, exit_: int, logits: Callable[[Tensor], Tensor]) -> Step:
        """What a policy is asked at exit number `exit_`."""
        return Step(self.exits[exit_], self.state[:, exit_], self.before[:, exit_], self.position, logits)

    @torch.no_grad()
    def leaving(self, policy: Policy, logits: Callable[[Tensor], Tensor]) -> Tensor:
        """[n] int64: the number of the exit at which the policy leaves on the whole model's states, E: nowhere."""
        asked = [e for e, depth in enumerate(self.exits) if depth in policy.exits]
        found = torch.zeros(len(self), len(self.exits) + 1, dtype=torch.bool)
        found[:, -1] = True
        for e in asked:
            found[:, e] = policy.leaves(self.step(e, logits))
        return found.int().argmax(1)


def contexts(
    texts: Sequence[Sequence[int]], seed: int, low: float = CONTEXT[0], high: float = CONTEXT[1]
) -> list[list[int]]:
    """The first part of each text (token ids), its share drawn evenly between `low` and `high`; one token at least.

    Raises ValueError for shares that are not 0 <= low <= high <= 1, or a text without tokens.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"context: {low} to {high}: expected shares between 0 and 1, the lower one first")
    shares = torch.empty(len(texts)).uniform_(low, high, generator=torch.Generator().manual_seed(seed)).tolist()
    if not all(len(text) for text in texts):
        raise ValueError(f"texts: number {[bool(len(text)) for text in texts].index(False)} has no tokens")
    return [list(text[: max(1, round(share * len(text)))]) for text, share in zip(texts, shares)]


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    exits: Sequence[int],
    pad: int,
    end: int | None = None,
    new_tokens: int = NEW_TOKENS,
    batch_size: int = 32,
) -> States:
    """Greedy rollouts of the whole model on `prompts` (token ids), batched with padding on the left.

    new_tokens   at most, after each prompt; the first of them, and what follows an `end`, is not in the states
    Raises ValueError for a model that cannot leave early, exits that it does not have, or a prompt without tokens.
    """
    body = anatomy(model)
    exits = tuple(exits)
    if not exits or list(exits) != sorted(set(exits)) or not 1 <= exits[0] <= exits[-1] < body.depth:
        raise ValueError(f"exits: {list(exits)}: expected depths from 1 to {body.depth - 1}, ascending")
    if new_tokens < 2:
        raise ValueError(f"new_tokens: {new_tokens}: the first comes from the prompt; at least 2 are needed")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts: none, or one has no tokens")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = left_padded([prompts[i] for i in chosen], pad)
        parts.append(_rollout(model, body, exits, ids, mask, torch.tensor(chosen), pad, end, new_tokens))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not len(tensors["final"]):
        raise ValueError("prompts: nothing was decoded after any of them; every text ended with its first token")
    # By episode, and within it by position, whatever batch it came from.
    by = torch.argsort(tensors["episode"] * (new_tokens + 1) + tensors["position"])
    return States(exits, body.depth, **{name: tensor[by] for name, tensor in tensors.items()})


def _rollout(
    model: PreTrainedModel,
    body: Anatomy,
    exits: tuple[int, ...],
    ids: Tensor,
    mask: Tensor,
    episode: Tensor,
    pad: int,
    end: int | None,
    new_tokens: int,
) -> dict[str, Tensor]:
    """The fields of States for one batch [B, T]."""
    network: Any = model
    with plain_settings(model), _watched(body, exits) as seen:
        text = network.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=end,
            pad_token_id=pad,
        )
    said = text[:, ids.shape[1] :].cpu()  # [B, S]
    ended = (said == (-1 if end is None else end)).cumsum(1) > 0
    state, before, guess = ([torch.stack([c[i] for c in at], 1) for at in _calls(seen, exits)] for i in range(3))
    rows: dict[str, list[Tensor]] = {f.name: [] for f in fields(States) if f.name not in ("exits", "layers")}
    for t in range(1, said.shape[1]):
        there = ~ended[:, t - 1]
        found = (state[t][there], before[t][there], guess[t][there], said[there, t], episode[there])
        for name, value in zip(rows, found):
            rows[name].append(value)
        rows["position"].append(torch.full((int(there.sum()),), t))
    if said.shape[1] == 1:
        d = state[0].shape[-1]
        none = torch.zeros(0, dtype=torch.int64)
        wide = torch.zeros(0, len(exits), d)
        return dict(zip(rows, (wide, wide, torch.zeros(0, len(exits), dtype=torch.int64), none, none, none)))
    return {name: torch.cat(values) for name, values in rows.items()}


Seen = dict[int, list[tuple[Tensor, Tensor, Tensor]]]  # by exit, of every pass: state, before [B, d], guess [B]


def _calls(seen: Seen, exits: tuple[int, ...]) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Pass by pass, what was seen at every exit."""
    yield from (list(at) for at in zip(*(seen[depth] for depth in exits), strict=True))


@contextmanager
def _watched(body: Anatomy, exits: tuple[int, ...]) -> Iterator[Seen]:
    """Inside the block every pass adds the last position's states and guesses."""
    seen: Seen = {depth: [] for depth in exits}

    def watch(depth: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
            before, state = (args[0] if args else kwargs["hidden_states"])[:, -1], first(output)[:, -1]
            seen[depth].append((state.float().cpu(), before.float().cpu(), body.logits(state).argmax(-1).cpu()))

        return hook

    handles = [body.layers[depth - 1].register_forward_hook(watch(depth), with_kwargs=True) for depth in exits]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
