"""Six models by their published dimensions, and what a pass of each does by sums that anyone can write down.

The yardstick of the walk, which knows none of them. Dimensions: the papers and model cards of Llama 2 (arXiv
2307.09288), Llama 3 (2407.21783), Qwen3 (2505.09388), OPT (2205.01068), Mixtral (2401.04088), Gemma 3 (2503.19786).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A decoder, in plain numbers.

    inner      features between up and down
    gated      whether a gate stands beside up
    experts    how many there are, and to how many of them a token goes
    window     of tokens that `windowed` of the layers see
    beside     parameters of matrices that are no product's, and of vectors
    config     class of transformers, and its fields of other names
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    beside: int
    config: tuple[str, dict[str, Any]]
    tied: bool = False
    gated: bool = True
    experts: tuple[int, int] = (1, 1)
    window: int | None = None
    windowed: int = 0

    @property
    def attention(self) -> int:
        """Weights of q, k, v and o in a layer."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def feed_forward(self) -> int:
        """Weights of the only feed-forward part of a layer, or of one of its experts."""
        return (3 if self.gated else 2) * self.hidden * self.inner

    @property
    def router(self) -> int:
        """Weights that send tokens to experts, in all layers."""
        return self.layers * self.experts[0] * self.hidden if self.experts[0] > 1 else 0

    def flops(self, batch: int, tokens: int, context: int) -> float:
        """Of a pass over `tokens` new ones of each sequence after `context`, the head for the last: 2 for each weight
        that a token meets, 4 times the head size for each pair of query and key."""
        each = self.layers * (self.attention + self.experts[1] * self.feed_forward) + self.router
        seen = sum(context + i + 1 for i in range(tokens))
        inside = sum(min(context + i + 1, self.window or math.inf) for i in range(tokens))
        pairs = (self.layers - self.windowed) * seen + self.windowed * inside
        return batch * (2 * each * tokens + 4 * self.heads * self.head_dim * pairs + 2 * self.hidden * self.vocabulary)

    def read(self, tokens: int) -> float:
        """Parameters that a pass of so many tokens reads: all, but tables of which rows are fetched, and experts that
        no token is expected to meet."""
        count, chosen = self.experts
        met = count * (1 - (1 - chosen / count) ** tokens) if count > 1 else 1
        each = self.layers * (self.attention + met * self.feed_forward)
        return each + self.router + self.hidden * self.vocabulary + self.beside

    def kv(self, tokens: int) -> int:
        """Keys and values in reach after so many tokens, of one sequence."""
        inside = min(tokens, self.window or tokens)
        seen = (self.layers - self.windowed) * tokens + self.windowed * inside
        return 2 * self.kv_heads * self.head_dim * seen

    def made(self) -> Any:
        """The config."""
        import transformers

        kind, other = self.config
        names = {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
        }
        return getattr(transformers, kind)(**names | other)


_LLAMA: tuple[str, dict[str, Any]] = ("LlamaConfig", {})
# Biases of attention and feed-forward part, two norms with biases in each layer, and one at the end.
_OPT_BESIDE = 32 * (4 * 2560 + 10240 + 2560 + 4 * 2560) + 2 * 2560
_MIXTRAL = ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None})

MODELS = {
    "Llama-2-7B": Published(4096, 32, 32, 32, 128, 11008, 32000, 65 * 4096, _LLAMA),
    "Llama-3.1-8B": Published(4096, 32, 32, 8, 128, 14336, 128256, 65 * 4096, _LLAMA),
    "Qwen3-0.6B": Published(
        1024, 28, 16, 8, 128, 3072, 151936, 57 * 1024 + 28 * 2 * 128, ("Qwen3Config", {}), tied=True
    ),
    "OPT-2.7B": Published(
        2560, 32, 32, 32, 80, 10240, 50272, _OPT_BESIDE,
        ("OPTConfig", {"ffn_dim": 10240, "word_embed_proj_dim": 2560}), tied=True, gated=False,
    ),
    "Mixtral-8x7B": Published(4096, 32, 32, 8, 128, 14336, 32000, 65 * 4096, _MIXTRAL, experts=(8, 2)),
    "Gemma-3-1B": Published(
        1152, 26, 4, 1, 256, 6912, 262144, 26 * (4 * 1152 + 2 * 256) + 1152,
        ("Gemma3TextConfig", {"sliding_window": 512}), tied=True, window=512, windowed=22,
    ),
}  # fmt: skip
