"""Seconds with exits beside seconds at full depth, the KV cache on for both, in turns in one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ..backends.device import device
from ..compress.decoding import plain_settings
from ..compress.early_exit.cost import costs
from ..compress.early_exit.draft import Drafted, draft_and_verify
from ..compress.early_exit.generation import Run, Sync, early_exit
from ..compress.early_exit.policy import Fixed, Full, Policy
from .exit_gold import Drawn

REPEATS, WARM = 5, 1
# Random weights, so many that memory is waited for: 600 MB in float32.
LARGE = LlamaConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=12,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)


@dataclass(frozen=True)
class Served:
    """One way to answer: under a policy, or by drafts of the first `drafting` layers."""

    policy: Policy
    sync: Sync = "row"
    drafting: int | None = None
    drafts: int = 4

    @property
    def name(self) -> str:
        if self.drafting is not None:
            return f"draft {self.drafting}, verify"
        if not self.policy.exits:
            return "full depth"
        return f"{self.policy.name} {_short(self.policy)}"


def _short(policy: Policy) -> str:
    if policy.name == "fixed":
        return f"at {policy.exits[0]}"
    return f">= {policy.threshold:g}" if policy.graded else f"{policy.exits[-1]} to {policy.exits[0]}"


def speed_rows(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, ways: Sequence[Served], new: int, repeats: int = REPEATS
) -> list[dict[str, Any]]:
    """One row for each way, `ways[0]` at full depth: `new` tokens after each prompt, greedy and without an end.

    seconds    of the whole request, the prompt included; median over `repeats` rounds, in each of which every way has
               its turn; spread: interquartile range over it
    speedup    over full depth, by round: the median of the ratios
    mflop_token, mb_token   of a decoded token, counted (early_exit/cost.py): operations, and bytes read by a row alone
    histogram  decoded tokens by depth; not of drafts
    agreement  share of tokens that stand where they stand at full depth: a row's first other one moves those behind it
    """
    whole = costs(model, ids.shape[1] + new // 2)
    seconds: list[list[float]] = [[] for _ in ways]
    found: list[tuple[Tensor, Run | Drafted]] = []
    for repeat in range(WARM + repeats):
        for number, way in enumerate(ways):
            taken, tokens, said = _timed(model, ids, mask, way, new)
            if repeat >= WARM:
                seconds[number].append(taken)
            if repeat == 0:
                found.append((tokens, said))
    rows = []
    for way, times, (tokens, said) in zip(ways, seconds, found, strict=True):
        low, middle, high = statistics.quantiles(times, n=4)
        row = {
            "batch": len(ids),
            "way": way.name,
            "exit_sync": way.sync if way.policy.exits else "",
            "mean_depth": None,
            "effective_depth": None,
            "mflop_token": None,
            "mb_token": None,
            "acceptance": said.acceptance if isinstance(said, Drafted) else None,
            "agreement": float((tokens == found[0][0]).double().mean()),
            "tokens_per_s": len(ids) * new / middle,
            "spread": (high - low) / middle,
            "speedup": statistics.median(a / b for a, b in zip(seconds[0], times, strict=True)),
        }
        if isinstance(said, Run):
            depths = said.histogram()
            work = whole.mean(depths, way.policy)
            row |= {"mean_depth": said.mean_depth, "effective_depth": whole.effective_depth(depths, way.policy)}
            row |= {"mflop_token": work.operations / 1e6, "mb_token": work.bytes / 1e6}
            row["histogram"] = {str(depth): count for depth, count in depths.items()}
        rows.append(row)
    return rows


def _timed(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, way: Served, new: int
) -> tuple[float, Tensor, Run | Drafted]:
    machine = device(str(model.device))
    with serving(model, ids, mask, way, new) as answer, machine.timed() as timer:
        sequences, said = answer()
    return timer.seconds, sequences[:, ids.shape[1] :], said


@contextmanager
def serving(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, way: Served, new: int
) -> Iterator[Callable[[], tuple[Tensor, Run | Drafted]]]:
    """Inside the block: a call that answers the prompts by `new` tokens each, greedily and without an end, whatever the
    model's own settings say; sequences [B, P + new], and what happened. The look at the model is done before."""
    network: Any = model

    def drafted() -> tuple[Tensor, Drafted]:
        assert way.drafting is not None
        found = draft_and_verify(model, ids, mask, way.drafting, max_new_tokens=new, drafts=way.drafts)
        return found.sequences, found

    with plain_settings(model):
        if way.drafting is not None:
            yield drafted
            return
        with early_exit(model, way.policy, way.sync) as run:
            asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": new}
            yield lambda: (network.generate(**asked, do_sample=False, pad_token_id=0), run)


def run_large(seed: int, batches: Sequence[int] = (1, 8), new: int = 24) -> Iterator[dict[str, Any]]:
    """What layers left out save where weights come from memory: random weights, so that no quality is told. In a batch
    rows leave at depths drawn at random, too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LARGE, dtype=torch.float32).eval()
    layers = LARGE.num_hidden_layers
    for batch in batches:
        ids = torch.randint(1, LARGE.vocab_size, (batch, 32), generator=torch.Generator().manual_seed(seed))
        ways = [Served(Full()), *(Served(Fixed(exits=(layers * part // 4,))) for part in (1, 2, 3))]
        drawn = Drawn(exits=tuple(range(1, layers)), threshold=0.85, generator=torch.Generator().manual_seed(seed))
        ways += [Served(drawn), Served(drawn, "batch")] if batch > 1 else []
        for row in speed_rows(model, ids, torch.ones_like(ids), ways, new, 3):
            del row["agreement"], row["acceptance"], row["histogram"]
            yield {"model": f"Llama, {layers} layers, {LARGE.hidden_size} wide, random", **row}


Prompts = Callable[[int], tuple[Tensor, Tensor]]


def run_speed(
    model: PreTrainedModel, prompts: Prompts, policies: Mapping[str, Policy], drafting: int, new: int
) -> list[dict[str, Any]]:
    """Of a model tuned for exits, batch 1 and 8. prompts: batch -> ids, mask."""
    rows = []
    for batch in (1, 8):
        ids, mask = prompts(batch)
        ways = [Served(Full()), *(Served(policy) for policy in policies.values())]
        ways += [Served(policy, "batch") for policy in policies.values() if batch > 1 and policy.graded]
        ways.append(Served(Full(), drafting=drafting))
        rows += speed_rows(model, ids, mask, ways, new)
    for row in rows:
        row.pop("histogram", None)
    return rows
