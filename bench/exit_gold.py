"""Whether leaving early does what it says: cached generation beside a pass over the whole text with frozen states,
plain `generate` beside a threshold that nobody reaches, drafts beside greedy decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..compress.early_exit.anatomy import FAMILIES
from ..compress.early_exit.draft import draft_and_verify
from ..compress.early_exit.generation import Sync, early_exit
from ..compress.early_exit.parallel import frozen_at
from ..compress.early_exit.policy import NEVER, Confidence, Policy, Step

LAYERS, WIDTH, VOCABULARY = 6, 64, 199
PADDING, LENGTH, NEW = (0, 3, 5, 1, 7), 9, 12
LIMIT = 1e-5  # float32: sums of a few dozen terms, added up in another order


@dataclass(frozen=True, kw_only=True)
class Drawn(Policy):
    """Leaves at random: with probability 1 - threshold at each exit."""

    name: ClassVar[str] = "drawn"
    generator: torch.Generator = field(default_factory=torch.Generator)

    def score(self, step: Step) -> Tensor:
        return torch.rand(len(step.state), generator=self.generator)

    def check_operations(self, hidden: int, vocabulary: int) -> int:  # noqa: ARG002
        return 0


def run_gold(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row for each architecture and way of leaving together; a check for each figure that must hold."""
    rows: list[dict[str, Any]] = []
    for family in FAMILIES:
        model = _random(family, seed)
        ids, mask = _prompts(seed)
        plain = _generate(model, ids, mask)
        with early_exit(model, Confidence(exits=tuple(range(1, LAYERS)), threshold=NEVER)):
            never = _generate(model, ids, mask)
        drafted = draft_and_verify(model, ids, mask, LAYERS // 2, max_new_tokens=NEW)
        for sync in ("row", "batch"):
            rows.append(
                {
                    "architecture": family,
                    "exit_sync": sync,
                    "batch": len(ids),
                    "max_abs_difference": (found := _difference(model, ids, mask, sync, seed))[0],
                    "without_exits": found[1],
                    "mean_depth": found[2],
                    "never_is_generate": torch.equal(never.sequences, plain.sequences),
                    "drafts_are_greedy": torch.equal(drafted.sequences, plain.sequences),
                }
            )
    worst = max(row["max_abs_difference"] for row in rows)
    return rows, [
        {"what": "cached beside frozen, all architectures", "limit": LIMIT, "value": worst, "ok": worst <= LIMIT},
        {
            "what": "the exits make a difference to the logits, everywhere",
            "limit": 0.1,
            "value": (least := min(row["without_exits"] for row in rows)),
            "ok": least > 0.1,
        },
        *(
            {"what": what, "limit": "all", "value": (equal := sum(row[key] for row in rows)), "ok": equal == len(rows)}
            for what, key in (
                ("a threshold above 1 gives generate's tokens", "never_is_generate"),
                ("drafts that are verified give greedy decoding's tokens", "drafts_are_greedy"),
            )
        ),
    ]


def _random(family: str, seed: int) -> PreTrainedModel:
    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": False}
    shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    opt = {"ffn_dim": 96, "word_embed_proj_dim": WIDTH}
    shape |= opt if family == "opt" else {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.1)  # large enough that every layer changes what is said
    return model


def _prompts(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(PADDING), LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) >= torch.tensor(PADDING)[:, None]).long()
    return ids * mask, mask


def _generate(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Any:
    network: Any = model
    return network.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )


def _difference(model: PreTrainedModel, ids: Tensor, mask: Tensor, sync: Sync, seed: int) -> tuple[float, float, float]:
    """(largest difference of a logit, the same to the whole model's, mean depth)"""
    policy = Drawn(exits=tuple(range(1, LAYERS)), threshold=0.6, generator=torch.Generator().manual_seed(seed))
    with early_exit(model, policy, sync) as run:
        found = _generate(model, ids, mask)
    read = found.sequences[:, :-1]
    depths = torch.full(read.shape, LAYERS)
    depths[:, LENGTH - 1 :] = run.depths(NEW)
    whole = torch.ones_like(read)
    whole[:, :LENGTH] = mask
    asked = {"input_ids": read, "attention_mask": whole, "position_ids": (whole.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        with frozen_at(model, depths):
            frozen = model(**asked, use_cache=False).logits[:, LENGTH - 1 :]
        full = model(**asked, use_cache=False).logits[:, LENGTH - 1 :]
    cached = torch.stack(found.logits, 1)
    return float((cached - frozen).abs().max()), float((full - frozen).abs().max()), run.mean_depth
