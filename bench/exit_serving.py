"""A model that leaves early, as all measures see it: given answers read as it would have decoded them, its own answers
written with exits. The prompt runs all layers, and so the first token of an answer comes from all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compress.block import decoder_list
from ..compress.early_exit.generation import early_exit
from ..compress.early_exit.parallel import scored
from ..compress.early_exit.policy import Policy
from ..unlearn.encode import IGNORE, Batch


@dataclass
class Exits:
    """`model` under `policy`: what bench/forgetting.py's `evaluate` takes as its `serving`.

    read, written   layers that each decoded token ran, of given answers and of its own; a list of [n] int64
    """

    model: PreTrainedModel
    policy: Policy
    read: list[Tensor] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)

    @contextmanager
    def reading(self, batch: Batch) -> Iterator[None]:
        """Around one pass over a batch."""
        decoding = decoded(batch.labels)
        with scored(self.model, self.policy, decoding) as found:
            yield
        self.read.append(found.depths[decoding].cpu())

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around `generate`."""
        with early_exit(self.model, self.policy) as run:
            yield
        steps = [step for call in run.calls for step in call]
        self.written.append(torch.cat([step[step > 0] for step in steps]) if steps else torch.zeros(0).long())

    def mean_depth(self, kind: str = "read") -> float | None:
        """Over the tokens "read" or "written"; None where no token was decoded."""
        depths = torch.cat([torch.zeros(0).long(), *getattr(self, kind)])
        return float(depths.double().mean()) if len(depths) else None

    def histogram(self) -> list[int]:
        """[L] tokens of given answers read at each depth, from 1."""
        depths = torch.cat([torch.zeros(0).long(), *self.read])
        return depths.bincount(minlength=len(decoder_list(self.model)[2]) + 1)[1:].tolist()


def decoded(labels: Tensor) -> Tensor:
    """Which positions [B, T] bool of texts with `labels` [B, T] would be decoded: those that hold a token of the answer
    and predict the next. The first token of a text without a question is its prompt."""
    given = labels != IGNORE
    given[:, 0] = False
    following = torch.zeros_like(given)
    following[:, :-1] = given[:, 1:]
    return given & following
