"""Tiny models of every family, prompts with padding, and a policy that leaves at random."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from remanence.compress.early_exit.policy import Policy, Step
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_LAYERS, _HIDDEN, _VOCABULARY = 6, 64, 199
_PADDING = (0, 3, 5, 1, 7)
_LENGTH = 9


def _tiny(kind: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **more: object) -> PreTrainedModel:
    """Six layers, random weights large enough that every layer matters."""
    common = {
        "vocab_size": _VOCABULARY,
        "hidden_size": _HIDDEN,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    if kind == "opt":
        common |= {"ffn_dim": 96, "word_embed_proj_dim": _HIDDEN}
    else:
        common |= {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(common | more))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or parameter.abs().max() == 0:
                parameter.normal_(0, 0.1)
    return model


def _prompts(rows: int = 5, length: int = _LENGTH) -> tuple[Tensor, Tensor]:
    """Token ids and mask [rows, length], padded on the left by unlike lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, _VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, : _PADDING[row]] = mask[row, : _PADDING[row]] = 0
    return ids, mask


@dataclass(frozen=True, kw_only=True)
class _AtRandom(Policy):
    """Leaves with probability 1 - threshold at each exit."""

    name: ClassVar[str] = "random"
    generator: torch.Generator = field(default_factory=torch.Generator)

    def score(self, step: Step) -> Tensor:
        return torch.rand(len(step.state), generator=self.generator)


def _at_random(seed: int = 7, threshold: float = 0.6) -> _AtRandom:
    return _AtRandom(exits=(1, 2, 3, 4, 5), threshold=threshold, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def tiny():
    """kind, dtype, attention, settings -> model of 6 layers, 64 wide, 199 tokens."""
    return _tiny


@pytest.fixture(scope="session")
def prompts():
    """rows, length -> ids, mask"""
    return _prompts


@pytest.fixture(scope="session")
def at_random():
    """seed, threshold -> policy"""
    return _at_random
