"""The steps of retraining: the order of the data, the learning rate, what memory they take (PERP, arXiv 2312.15230).

AdamW without weight decay; the rate is warmed up, then falls. The loss of a step is a mean over the tokens of all its
sequences, however many passes they are taken in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.cpu import PeakMemory
from .spec import Retrain
from .trainables import Trainables

Progress = Callable[[int, int, str], None]  # (steps done, steps in all, what a person wants to know)

# Steps in which memory is watched: from the second on the optimizer's states are there. Watching all of them would
# slow small models down.
_WATCHED = 2


@dataclass(frozen=True)
class Sequences:
    """Token ids int64 [T] each, of which one pass takes at most `most` tokens (one sequence at least)."""

    rows: Sequence[Tensor]
    most: int

    def steps(self, batch: int, seed: int) -> Iterator[list[list[int]]]:
        """Numbers of the sequences of each step, by pass; every epoch in another order, drawn from `seed`."""
        generator = torch.Generator().manual_seed(seed)
        left: list[int] = []
        while True:
            while len(left) < batch:
                left += torch.randperm(len(self.rows), generator=generator).tolist()
            yield self.passes(left[:batch])
            del left[:batch]

    def passes(self, numbers: Iterable[int]) -> list[list[int]]:
        """Sequences of equal length together, as many as a pass takes."""
        lengths: dict[int, list[int]] = {}
        for number in numbers:
            lengths.setdefault(len(self.rows[number]), []).append(number)
        made = []
        for length, alike in sorted(lengths.items()):
            size = max(1, self.most // length)
            made += [alike[start : start + size] for start in range(0, len(alike), size)]
        return made

    def ids(self, numbers: Sequence[int]) -> Tensor:
        """[B, T]"""
        return torch.stack([self.rows[number] for number in numbers])


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: what losses are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rate(retrain: Retrain, step: int) -> float:
    """The learning rate of step `step` (from 0)."""
    warm = round(retrain.warmup * retrain.steps)
    if step < warm:
        return retrain.learning_rate * (step + 1) / warm
    left = (retrain.steps - step) / (retrain.steps - warm)
    share = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[retrain.decay]
    return retrain.learning_rate * share


@dataclass
class Descent:
    """Runs of `retrain.steps` steps over one set of data, and what they have seen.

    held     tensors that are there all the time: models, data
    runs     how many there will be
    beside   bytes that are held beside these tensors
    losses   of every step so far
    peak     most bytes of memory, see retrain.py
    """

    retrain: Retrain
    data: Sequences
    held: Sequence[Tensor]
    progress: Progress
    runs: int = 1
    beside: int = 0
    losses: list[float] = field(default_factory=list)
    peak: int = 0

    def fit_(
        self, module: nn.Module, parts: Trainables, loss: Callable[[list[int]], Tensor], uncounted: int = 0
    ) -> None:
        """Train `parts` of `module`, and leave adapters unmerged.

        loss        of one pass: the sum over the tokens that count; `uncounted`: how many of a sequence do not
        Raises ValueError naming the step whose loss is not finite.
        """
        order = self.data.steps(self.retrain.batch, self.retrain.seed)
        with parts.training(module):
            optimizer = torch.optim.AdamW(parts.masters, betas=(0.9, 0.999), weight_decay=0.0, foreach=False)
            for step in range(self.retrain.steps):
                optimizer.param_groups[0]["lr"] = rate(self.retrain, step)
                with self._watched(step, parts):
                    self.losses.append(self._gradient(next(order), loss, uncounted, step))
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    parts.settle()
                self.progress(len(self.losses), self.runs * self.retrain.steps, f"loss {self.losses[-1]:.4g}")
        if not parts.finite():
            raise ValueError(f"retrain: weights are not finite after step {self.retrain.steps}; {self._advice}")

    @property
    def _advice(self) -> str:
        return f"the learning rate, {self.retrain.learning_rate:g}, may be too high"

    def _gradient(
        self, passes: list[list[int]], loss: Callable[[list[int]], Tensor], uncounted: int, step: int
    ) -> float:
        """Leave the gradient of the step's mean loss in the masters; returns that loss."""
        tokens = sum(len(numbers) * (len(self.data.rows[numbers[0]]) - uncounted) for numbers in passes)
        total = 0.0
        for numbers in passes:
            mean = loss(numbers) / tokens
            total += mean.item()
            if not math.isfinite(total):
                raise ValueError(
                    f"retrain: the loss is {total} at step {step + 1} of {self.retrain.steps}; {self._advice}"
                )
            mean.backward()
        return total

    @contextmanager
    def _watched(self, step: int, parts: Trainables) -> Iterator[None]:
        device = parts.masters[0].device
        allocator: Any = getattr(torch, device.type, None)
        if device.type != "cpu" and hasattr(allocator, "max_memory_allocated"):
            yield
            self.peak = max(self.peak, allocator.max_memory_allocated(device))
        elif step < _WATCHED:
            states = 0
            if step:  # AdamW's two, made in the first step
                states = sum(2 * master.numel() * master.element_size() for master in parts.masters)
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*self.held, *parts.tensors())}
            with PeakMemory(self.beside + states + sum(storage.nbytes() for storage in storages.values())) as memory:
                yield
            self.peak = max(self.peak, memory.peak_bytes)
        else:
            yield
