"""Demo models: a small decoder trained from scratch on a corpus until it knows it by heart.

The target learns everything; the oracle learns the same without the forget set, from the same initial weights, in
the same number of steps. Both share one byte-level BPE tokenizer, trained on the whole corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .data import QA, Corpus
from .encode import PROMPT, Batch, Encoder
from .feed import Feed
from .layers import forward
from .likelihood import mean_probability
from .losses import nll
from .train import Objective, Progress, Schedule, Term, fit

Arch = Literal["llama", "opt"]

# Mean probability of the answers it was taught at which a demo model counts as knowing them by heart.
MEMORIZED = 0.95


@dataclass(frozen=True)
class DemoConfig:
    """Size and training of a demo model. About 2 million parameters.

    epochs        over the corpus, while the learning rate falls linearly to zero
    more_epochs   of a further round at half the learning rate, while it knows less than MEMORIZED; at most `rounds`
    """

    arch: Arch = "llama"
    vocab_size: int = 1024
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    max_length: int = 512
    epochs: int = 26
    more_epochs: int = 8
    rounds: int = 8
    batch_size: int = 32
    learning_rate: float = 3e-3


def demo_tokenizer(corpus: Corpus, config: DemoConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE over everything in the corpus, forget set included (target and oracle share it)."""
    rows = [*corpus.forget, *corpus.retain, *corpus.background]
    return byte_bpe([f"{PROMPT.format(question=row.question)} {row.answer}" for row in rows], config.vocab_size)


def byte_bpe(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` tokens, trained on `texts`, with tokens for padding and the end."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[1])


def demo_model(config: DemoConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """An untrained float32 model; same seed, same weights."""
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    shape: PreTrainedConfig
    if config.arch == "llama":
        shape = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.max_length,
            **ids,
        )
    elif config.arch == "opt":
        shape = OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            word_embed_proj_dim=config.hidden_size,
            ffn_dim=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_length,
            dropout=0.0,
            **ids,
        )
    else:
        raise ValueError(f"arch: {config.arch!r} is not one of llama, opt")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(shape, dtype=torch.float32)


def train_demo(
    corpus: Corpus,
    config: DemoConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    with_forget: bool,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, float]:
    """The target (`with_forget`) or the oracle, with the mean probability of the answers it was taught.

    Raises RuntimeError when it does not learn them (MEMORIZED) within the rounds allowed.
    """
    model = demo_model(config, tokenizer, seed)
    encoder = Encoder(tokenizer, config.max_length)
    kept: list[QA] = [*corpus.retain, *corpus.background]
    pairs = [(row.question, row.answer) for row in ([*corpus.forget, *kept] if with_forget else kept)]
    # The target's schedule for both: the oracle differs in what it saw, not in how long it learned.
    batches = -(-(len(corpus.forget) + len(kept)) // config.batch_size)

    def loss(given: Mapping[str, Batch]) -> Tensor:
        return nll(forward(model, given["all"]), given["all"].labels)

    def train(schedule: Schedule, number: int) -> float:
        feed = Feed(encoder, {"all": pairs}, {"all": config.batch_size}, seed + number)
        fit(model, Objective([Term("train", loss, "all", "tokens")]), feed, schedule, progress=progress)
        return mean_probability(model, encoder, pairs)

    known = train(Schedule(config.epochs * batches, config.learning_rate, warmup=batches), 0)
    for number in range(config.rounds):
        if known >= MEMORIZED:
            break
        known = train(Schedule(config.more_epochs * batches, config.learning_rate / 2), number + 1)
    if known < MEMORIZED:
        raise RuntimeError(
            f"the demo {'target' if with_forget else 'oracle'} gives the answers it was taught a probability of "
            f"{known:.2f} only, {MEMORIZED} is needed; the data is too large for {config.hidden_size} hidden units"
        )
    return model, known
