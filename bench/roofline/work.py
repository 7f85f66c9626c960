"""What a pass of a model asks of a device: operations and bytes, module by module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["linear", "attention", "experts", "embedding", "other"]
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Part:
    """What one module does by itself in one pass, its children apart.

    module        full name; "": the model itself
    kind          what it is
    flops         floating-point operations of its products (a product and its sum are two)
    compute       kind of numbers that these are computed in, as in backends/ceilings.py
    kept          how its weights are kept, as ceilings name it: "bfloat16", "w4a16"
    sparse        whether its weights are 2:4 and multiplied as such
    weight_bytes  of weights, each once, as they are kept; of experts those that the tokens are expected to meet
    kv_read, kv_written   bytes of keys and values: of every position in reach once; of the new ones
    activation_bytes      what goes into its products and comes out, weights, keys and values apart; the rows of an
                  embedding
    rows          of inputs that its products were given
    touched       numbers that ops other than products go over
    eager_bytes   what all its ops read and write one by one, views apart
    ops           how many of them there are
    experts, chosen   of experts, how many there are and how many each token goes to; 0: none
    """

    module: str
    kind: Kind
    compute: str
    kept: str
    flops: float = 0.0
    sparse: bool = False
    weight_bytes: float = 0.0
    kv_read: float = 0.0
    kv_written: float = 0.0
    activation_bytes: float = 0.0
    rows: int = 0
    touched: float = 0.0
    eager_bytes: float = 0.0
    ops: int = 0
    experts: int = 0
    chosen: int = 0

    @property
    def kv_bytes(self) -> float:
        return self.kv_read + self.kv_written

    @property
    def bytes(self) -> float:
        """What must be moved at least: weights, keys and values once, and what products take and give."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


def met(experts: int, chosen: int, tokens: float) -> float:
    """Share of the experts that `tokens` meet at least once, each choosing `chosen` of them, all of them alike."""
    return 1 - (1 - min(1.0, chosen / experts)) ** tokens


@dataclass(frozen=True)
class Uncounted:
    """An op whose work is not known: how often it ran, and in which modules."""

    op: str
    count: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Attention:
    """What the attention of one module keeps of every token.

    queries, keys, values   numbers, of all heads together; queries are not kept
    width         of a head's value
    itemsize      bytes of a number
    window        of tokens beyond which keys are not seen; None: none
    """

    module: str
    queries: int
    keys: int
    values: int
    width: int
    itemsize: int
    window: int | None

    def bytes(self, tokens: int) -> int:
        """Of keys and values of the last `tokens` of one sequence, as far as they are in reach."""
        seen = tokens if self.window is None else min(tokens, self.window)
        return seen * (self.keys + self.values) * self.itemsize


@dataclass(frozen=True)
class Step:
    """One pass: `tokens` new ones of each of `batch` sequences, after `context` that are in the cache.

    parts       in the order in which they first ran
    cached      bytes of all that is in the cache after it: keys and values, or the state of a recurrent layer
    workspace   most bytes of activations at once, with attention that keeps no scores, cached keys and values apart
    beside      bytes of weights that are no parameters: of adapters that are kept apart
    uncounted, assumed   ops whose work is not known, and values that only a real run would know, in words
    """

    phase: Phase
    batch: int
    tokens: int
    context: int
    parts: tuple[Part, ...]
    attention: tuple[Attention, ...] = ()
    cached: int = 0
    workspace: int = 0
    beside: int = 0
    uncounted: tuple[Uncounted, ...] = ()
    assumed: tuple[str, ...] = ()

    def total(self, name: str) -> float:
        """The sum of one number of the parts: "flops", "bytes", "weight_bytes", ..."""
        return sum(getattr(part, name) for part in self.parts)

    def with_batch(self, batch: int) -> Step:
        """The same pass of another number of sequences: all of it in proportion, but for weights, which are read once,
        and experts, of which more sequences meet more."""
        times = batch / self.batch
        parts = tuple(self._scaled(part, times) for part in self.parts)
        cached, workspace = round(times * self.cached), round(times * self.workspace)
        return replace(self, batch=batch, parts=parts, cached=cached, workspace=workspace)

    def _scaled(self, part: Part, times: float) -> Part:
        tokens = self.batch * self.tokens
        weights = part.weight_bytes
        if part.experts:
            weights *= met(part.experts, part.chosen, times * tokens) / met(part.experts, part.chosen, tokens)
        return replace(
            part,
            flops=times * part.flops,
            weight_bytes=weights,
            kv_read=times * part.kv_read,
            kv_written=times * part.kv_written,
            activation_bytes=times * part.activation_bytes,
            rows=round(times * part.rows),
            touched=times * part.touched,
            eager_bytes=times * (part.eager_bytes - part.weight_bytes) + weights,
        )

    def by_module(self) -> Mapping[str, Part]:
        return {part.module: part for part in self.parts}

    def cache_bytes(self, tokens: int) -> int:
        """Of keys and values of `tokens` tokens of every sequence."""
        return self.batch * sum(each.bytes(tokens) for each in self.attention)
