"""Which weights SparseGPT prunes, found out while its solver, or GPTQ's, goes through the columns (Frantar & Alistarh
2023, arXiv 2301.00774, section 3.4: adaptive mask selection).

Of every block of columns, as they are when their turn comes, those weights go whose loss w_ij^2 / U_jj^2 is least, over
all rows, H^-1 = U^T U; under a pattern of m, of every m columns when the first of them is reached.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .prune import by_loss, keep_most, wanted
from .spec import PATTERNS, PruneSpec


def adjacent(prune: PruneSpec | None) -> int:
    """Columns that are pruned at a time under a pattern; 1: there is none."""
    return 1 if prune is None or prune.pattern is None else PATTERNS[prune.pattern][1]


class Mask:
    """What stays, known as far as the solver has come.

    kept       bool [N, K], all columns in the solver's order: what may stay; it becomes what does
    diagonal   [K] float32: 1 / U_jj, in that order
    unit       columns of a pattern; 1: there is none, and whole blocks are compared
    """

    def __init__(self, kept: Tensor, diagonal: Tensor, prune: PruneSpec) -> None:
        self.kept, self.diagonal, self.prune, self.unit = kept, diagonal, prune, adjacent(prune)

    def found(self, start: int, w: Tensor) -> Tensor:
        """bool [N, B]: what stays of columns start .. start + B - 1, which are w [N, B] now."""
        N, B = w.shape
        places = slice(start, start + B)
        there = self.kept[:, places]
        salience = by_loss(w, self.diagonal[places], 0).masked_fill_(~there, -1)
        # The whole layer loses its exact share, however its blocks are cut.
        count = wanted(self.prune, N * (start + B)) - wanted(self.prune, N * start)
        return keep_most(salience, there, self.prune, count)

    def settle_(self, start: int, w: Tensor) -> None:
        self.kept[:, start : start + w.shape[1]] = self.found(start, w)

    def guess(self, W: Tensor, blocks: Iterable[tuple[int, int]]) -> Tensor:
        """bool [N, K]: what would stay of W [N, K] if nothing was made up for; blocks: start, end of their columns."""
        return torch.cat([self.found(start, W[:, start:end]) for start, end in blocks], 1)
