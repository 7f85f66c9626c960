"""Which token of a quantized KV cache is where: the same in all layers, so it is worked out once a pass.

Tokens are numbered row by row from the first that is not padding, 0, 1, ... A row's oldest tokens lie in closed chunks,
the others in full precision; rows differ in both, so that each is shifted to the front and the rest stays empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import KVSpec

Turn = tuple[Tensor, Tensor]  # cos and sin of tokens' positions [B, T, R]


def closed_chunks(tokens: Tensor, spec: KVSpec) -> Tensor:
    """Chunks that are closed when a row has so many tokens: whole ones, all of them older than the newest `residual`.

    The definition that everything here goes by. The query with number t sees t + 1 tokens.
    """
    return (tokens - spec.residual).clamp(min=0) // spec.group_size


class Pick(NamedTuple):
    """What to take along an axis of N: order [B, W] int64, and filled [B, W], False where a row has no more."""

    order: Tensor
    filled: Tensor

    def of(self, x: Tensor) -> Tensor:
        """x [B, H, N, D] -> [B, H, W, D], zeros where a row has no more."""
        B, H, _, D = x.shape
        order, filled = self.order.to(x.device), self.filled.to(x.device)
        taken = x.gather(2, order[:, None, :, None].expand(B, H, -1, D))
        return taken.masked_fill(~filled[:, None, :, None], 0)


def pick(wanted: Tensor) -> Pick:
    """wanted [B, N] bool -> the wanted ones of each row in their order, as many as the row with most has."""
    counts = wanted.sum(1)
    width = int(counts.max()) if counts.numel() else 0
    order = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    return Pick(order, torch.arange(width, device=wanted.device) < counts[:, None])


@dataclass(frozen=True, eq=False)
class Step:
    """What one pass over Q new columns does to B rows, and what its queries see.

    real     [B, Q] bool: the columns that are tokens
    fresh    chunks that this pass closes, of the row with most
    exact    of [tokens in full precision, new columns]: all tokens that were not closed before this pass; E of them
    chunks   of [closed chunks, fresh chunks]: those that are there afterwards
    rest     of the E tokens: those that stay in full precision
    numbers  [B, fresh * g] int64, the tokens of the fresh chunks, up to a row's last token
    seen     [B, 1, Q, K] bool: what a query attends to, of [closed before, fresh, exact]; everything in a column that
             is padding, so that its softmax is a number
    """

    real: Tensor
    fresh: int
    exact: Pick
    chunks: Pick
    rest: Pick
    numbers: Tensor
    seen: Tensor


class Rows:
    """B rows of a cache, or of one pass without a cache.

    columns   how many the model has been given, padding included
    tokens    [B] int64, how many of them were none; None: nothing yet
    chunks, tail   the widths of what layers keep: chunks, and tokens in full precision, of the row with most
    turn      cos and sin [B, T, R] of all tokens by number, where keys' biases turn with the position
    """

    def __init__(self, spec: KVSpec) -> None:
        self.spec = spec
        self.clear()

    def clear(self) -> None:
        self.columns, self.chunks, self.tail = 0, 0, 0
        self.tokens: Tensor | None = None
        self.turn: Turn | None = None
        self.step: Step | None = None

    def advance(self, real: Tensor, turn: Turn | None) -> Step:
        """Takes in new columns: real [B, Q] bool, turn [B or 1, Q, R] of their positions."""
        spec, g = self.spec, self.spec.group_size
        B, Q = real.shape
        before = real.new_zeros(B, dtype=torch.int64) if self.tokens is None else self.tokens
        after = before + real.sum(1)
        held = closed_chunks(before, spec)
        closing = closed_chunks(after, spec) - held
        fresh = int(closing.max()) if B else 0
        exact = pick(torch.cat([_up_to(before - held * g, self.tail), real], 1))
        E = exact.order.shape[1]
        chunks = pick(torch.cat([_up_to(held, self.chunks), _up_to(closing, fresh)], 1))
        rest = pick(exact.filled & ~_up_to(closing * g, E))

        number = (before[:, None] + real.cumsum(1) - 1)[..., None]  # [B, Q, 1]
        closed = closed_chunks(number + 1, spec) * g
        start = (held * g)[:, None]
        numbers, exact_number = (start + torch.arange(n, device=real.device) for n in (fresh * g, E))
        seen = torch.cat(
            [
                _up_to(held * g, self.chunks * g)[:, None].expand(-1, Q, -1),
                numbers[:, None] < closed,
                (exact_number[:, None] >= closed) & (exact_number[:, None] <= number),
            ],
            dim=2,
        )
        seen = (seen | ~real[..., None])[:, None]

        if turn is not None:
            self.turn = self._turns(turn, before, real)
        self.columns += Q
        self.tokens, self.chunks, self.tail = after, chunks.order.shape[1], rest.order.shape[1]
        last = (after - 1).clamp(min=0)[:, None]
        self.step = Step(real, fresh, exact, chunks, rest, numbers.minimum(last), seen)
        return self.step

    def _turns(self, turn: Turn, before: Tensor, real: Tensor) -> Turn:
        new = [part.expand(len(real), -1, -1) for part in turn]
        if self.turn is None:
            self.turn = new[0][:, :0], new[1][:, :0]
        kept = pick(torch.cat([_up_to(before, self.turn[0].shape[1]), real], 1))
        cos, sin = (kept.of(torch.cat(pair, 1)[:, None])[:, 0] for pair in zip(self.turn, new, strict=True))
        return cos, sin

    def select(self, rows: Tensor) -> None:
        """Becomes these rows [n] int64, in this order, some perhaps more than once."""
        if self.tokens is not None:
            self.tokens = self.tokens[rows.to(self.tokens.device)]
        if self.turn is not None:
            self.turn = self.turn[0][rows.to(self.turn[0].device)], self.turn[1][rows.to(self.turn[1].device)]

    @property
    def nbytes(self) -> int:
        kept = [self.tokens, *(self.turn or ())]
        return sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor is not None)


def _up_to(counts: Tensor, width: int) -> Tensor:
    """counts [B] -> [B, width] bool, True for the first so many."""
    return torch.arange(width, device=counts.device) < counts[:, None]
