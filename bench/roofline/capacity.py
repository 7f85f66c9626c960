"""What fits: the memory that a model takes with its cache and its activations, and the most of either that there is
room for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...compress.spec import KVSpec
from .stored import kv_bytes
from .work import Step

# Of a device's memory, what the runtime itself keeps and what allocators lose between tensors.
USABLE = 0.95


@dataclass(frozen=True)
class Memory:
    """Bytes that a model takes while it serves.

    weights     of all weights, as they are kept
    prefill, decode   passes of the dense model, of which caches and activations are known
    kv          how keys and values are kept; None: as they come
    """

    weights: float
    prefill: Step
    decode: Step
    kv: KVSpec | None = None

    def cache(self, tokens: int) -> float:
        """Of one sequence of so many tokens: keys and values, and the state of layers that have one instead."""
        ends = [(step.context + step.tokens, step.cached / step.batch) for step in (self.prefill, self.decode)]
        if not self.decode.attention:  # only known as a whole, at two lengths
            (first, less), (last, more) = ends
            return less + (more - less) / (last - first) * (tokens - first)
        last, whole = ends[1]
        state = whole - sum(each.bytes(last) for each in self.decode.attention)
        return sum(kv_bytes(self.kv, each, tokens) for each in self.decode.attention) + max(0.0, state)

    def workspace(self, tokens: int) -> float:
        """Of one sequence whose prompt of so many tokens passes at once."""
        return self.prefill.workspace / (self.prefill.batch * self.prefill.tokens) * tokens

    def total(self, batch: int, prompt: int, tokens: int) -> float:
        """With `batch` sequences that have `prompt` tokens at first and `tokens` in the end."""
        return self.weights + batch * (self.cache(tokens) + self.workspace(prompt))

    def fits(self, taken: float, room: float) -> bool:
        """Whether `taken` bytes do not fill `room` beyond what can be used of it."""
        return taken <= USABLE * room

    def largest_batch(self, prompt: int, tokens: int, room: float) -> int:
        """Sequences that fit into `room` bytes; 0: not one."""
        each = self.total(1, prompt, tokens) - self.weights
        return max(0, int((USABLE * room - self.weights) // each))

    def largest_context(self, room: float, positions: int) -> int:
        """Tokens of one sequence, all of them its prompt, that fit into `room` bytes; at most `positions`."""
        return _largest(lambda tokens: self.fits(self.total(1, tokens, tokens), room), positions)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where smaller ones do; 0: none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
