"""What a decoded token costs when it leaves early: layers, checks, keys and values of the layers left out.

Operations (a product and its sum are two) and bytes read, counted from the model's own layers, packed or dense: for one
row, which reads every weight by itself. Rows of a batch share weights, so that bytes there are fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..block import decoder_list
from ..linear import QuantLinear
from .policy import Policy


@dataclass(frozen=True)
class Work:
    operations: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes)

    def __rmul__(self, times: float) -> Work:
        return Work(times * self.operations, times * self.bytes)


@dataclass(frozen=True)
class Costs:
    """Of one token after `context` others: a layer, its keys and values alone, final norm and head.

    layers   how many there are, of the mean cost `layer`
    """

    layers: int
    layer: Work
    keys_values: Work
    head: Work
    hidden: int
    vocabulary: int

    def token(self, depth: float, policy: Policy) -> Work:
        """Of one that leaves at `depth`: its layers, keys and values of the others, checks on the way, the head."""
        checks = self.checks(depth, policy)
        return depth * self.layer + (self.layers - depth) * self.keys_values + checks + self.head

    def checks(self, depth: float, policy: Policy) -> Work:
        """All that `policy` asks of a token that leaves at `depth`."""
        if policy.threshold > 1:
            return Work(0, 0)
        asked = sum(exit <= depth for exit in policy.exits)
        operations = policy.check_operations(self.hidden, self.vocabulary)
        # Confidence has no weights of its own: it reads the model's head.
        read = self.head.bytes if policy.name == "confidence" else policy.check_bytes()
        return asked * Work(operations, read)

    def mean(self, histogram: Mapping[int, int], policy: Policy) -> Work:
        """Per token, over tokens by depth (Run.histogram). ValueError where there are none."""
        total = sum(histogram.values())
        if not total:
            raise ValueError("histogram: no token was decoded")
        work = Work(0, 0)
        for depth, count in histogram.items():
            work = work + (count / total) * self.token(depth, policy)
        return work

    def effective_depth(self, histogram: Mapping[int, int], policy: Policy) -> float:
        """Layers whose operations come to what a token took, checks and keys included, the head at the end not: L where
        nobody leaves and nothing is asked."""
        return (self.mean(histogram, policy).operations - self.head.operations) / self.layer.operations


def costs(model: PreTrainedModel, context: int = 0) -> Costs:
    """Of a model that can leave early (anatomy.FAMILIES); may be on meta. context: tokens in the cache."""
    _, _, layers = decoder_list(model)
    config: Any = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    itemsize = model.dtype.itemsize
    seen = Work(4 * context * heads * head_dim, 2 * context * kv_heads * head_dim * itemsize)
    whole, keys = Work(0, 0), Work(0, 0)
    for layer in layers:
        whole = whole + _of(layer) + seen
        keys = keys + _keys(layer, 2 * kv_heads * head_dim)
    head = model.get_output_embeddings()
    assert head is not None
    share = 1 / len(layers)
    return Costs(
        len(layers),
        share * whole,
        share * keys,
        _of(head),
        config.hidden_size,
        config.vocab_size,
    )


def _of(module: nn.Module) -> Work:
    """Products of linear layers; bytes of every parameter and buffer."""
    operations = sum(2 * _size(part) for part in module.modules())
    return Work(operations, sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())))


def _size(module: nn.Module) -> int:
    if isinstance(module, QuantLinear):
        return module.in_features * module.out_features
    return module.weight.numel() if isinstance(module, nn.Linear | Conv1D) else 0


def _keys(layer: Any, width: int) -> Work:
    """width: of keys and values together."""
    attention = layer.self_attn
    fused = getattr(attention, "qkv_proj", None)
    if fused is None:
        return _of(attention.k_proj) + _of(attention.v_proj)
    share = width / fused.out_features if type(fused) is nn.Linear else 1.0
    return share * _of(fused)
