"""Recovery by relearning: some steps of fine-tuning on a little of what was forgotten, or on something else altogether.

Targeted and benign relearning of Hu et al. 2024, arXiv 2406.13356: if a few forgotten rows bring back others that were
never shown again, the knowledge was hidden and not gone. A model that never knew learns from such rows too (their form,
the people in them), so that the attack means something only beside the same attack on the oracle: `relearn_advantage`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...compress.walk import dequantize_
from ...unlearn.data import QA
from ...unlearn.encode import Batch, Encoder
from ...unlearn.feed import Feed
from ...unlearn.inference.guarded import Guarded
from ...unlearn.layers import forward
from ...unlearn.losses import nll
from ...unlearn.train import Diverged, Objective, Progress, Schedule, Term, fit
from ..statistics import Interval, bootstrap_mean
from ..tokens import answers
from .pressed import Pressed


@dataclass(frozen=True)
class Relearning:
    """AdamW (betas 0.9 and 0.95, no weight decay), gradients clipped to norm 1, at a constant learning rate, so that 10
    steps are the first of 50.

    share    of the forget set that is shown again
    steps    numbers of updates after which the model is looked at
    """

    share: float = 0.25
    steps: tuple[int, ...] = (10, 50)
    learning_rate: float = 1e-5
    batch_size: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share: {self.share} is not between 0 and 1")
        if not self.steps or min(self.steps) < 1 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps: {self.steps} are not whole numbers above 0, each larger than the one before")
        for name in ("learning_rate", "batch_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)} is not a number above 0")


# For demo models, which are a thousand times smaller. At 1e-3 the same steps on unrelated text destroy what they know.
DEMO = Relearning(learning_rate=3e-4)


@dataclass(frozen=True)
class Relearned(Pressed):
    """Over the forget rows that were not shown again, whatever the model learned from; `shown`: the same over those
    that were, the attack's own positive control (None when the forget set has one row)."""

    shown: Pressed | None = None


def relearn(
    model: PreTrainedModel,
    encoder: Encoder,
    forget: Sequence[QA],
    others: Mapping[str, Sequence[QA]],
    settings: Relearning | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Relearned:
    """Fine-tune copies of the model, one on a part of `forget` that the seed decides, one on each set of `others` (the
    retain set, unrelated text: nothing of the forget set), and look after each number of steps on the way.

    Copies train in float32: at such learning rates most updates are smaller than a 16-bit weight can take. Quantized
    layers are dequantized, as integers take no gradient. `before` is such a copy without a step.
    What cannot be learned from is skipped, with the reason: no rows, a run that diverges. Raises ValueError for a
    guarded model, no forget row, and a set of `others` that holds forget rows.
    """
    settings = settings or Relearning()
    if isinstance(model, Guarded):
        raise ValueError("model: guarded at inference time, its weights unchanged; there is nothing to relearn")
    held_out, shown = split(forget, settings.share, seed)
    part = f"forget {settings.share:.0%}"
    if part in others:
        raise ValueError(f"others: {part!r} is the name of the part of the forget set; choose another")
    for name, rows in others.items():
        both = {(row.question, row.answer) for row in rows} & {(row.question, row.answer) for row in forget}
        if both:
            raise ValueError(f"others: {name} shares {len(both)} row(s) with the forget set, first {min(both)[0]!r}")
    pairs = [(row.question, row.answer) for row in (*held_out, *shown)]
    attack = _Attack(encoder, pairs, settings, seed, batch_size, progress)
    before = attack.known(_trainable(model))
    after: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    for name, rows in {part: shown, **others}.items():
        found, reason = attack.run(_trainable(model), rows)
        for step in settings.steps:
            variant = f"{name}: {step} steps"
            if step in found:
                after[variant] = found[step]
            else:
                skipped[variant] = reason
    return _parted(before, after, skipped, len(held_out))


def split(forget: Sequence[QA], share: float, seed: int) -> tuple[tuple[QA, ...], tuple[QA, ...]]:
    """(rows held out, rows to be shown): of n rows round(share * n) are shown, at least one and at most n - 1, chosen
    by the seed, in order. A lone row is held out."""
    if not forget:
        raise ValueError("forget: no rows; at least one is needed")
    count = min(max(1, round(share * len(forget))), len(forget) - 1)
    chosen = set(torch.randperm(len(forget), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    parts = [tuple(row for i, row in enumerate(forget) if (i in chosen) == among) for among in (False, True)]
    return parts[0], parts[1]


def relearn_advantage(unlearned: Pressed, oracle: Pressed, seed: int = 0) -> dict[str, Interval]:
    """By variant that both have: how much more the unlearned model gains than the oracle, paired over the items. Above
    0 it remembers; at 0 it learns anew, as one that never knew. Raises ValueError for different items."""
    if len(unlearned.before) != len(oracle.before):
        counts = f"{len(unlearned.before)} and {len(oracle.before)} items"
        raise ValueError(f"oracle: {counts}; both models must be relearned with the same rows, share and seed")

    def gains(pressed: Pressed, variant: str) -> list[float]:
        return [after - before for after, before in zip(pressed.after[variant], pressed.before, strict=True)]

    found = {}
    for variant in [name for name in unlearned.after if name in oracle.after]:
        pairs = zip(gains(unlearned, variant), gains(oracle, variant), strict=True)
        found[variant] = bootstrap_mean([ours - theirs for ours, theirs in pairs], seed)
    return found


def _trainable(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float32 whose every weight takes a gradient."""
    return dequantize_(copy.deepcopy(model)).float().eval().requires_grad_(True)


@dataclass(frozen=True)
class _Attack:
    """One relearning after the other, always looked at on the same `pairs`."""

    encoder: Encoder
    pairs: Sequence[tuple[str, str]]
    settings: Relearning
    seed: int
    batch_size: int
    progress: Progress | None

    def known(self, network: PreTrainedModel) -> list[float]:
        return [answer.probability for answer in answers(network, self.encoder, self.pairs, self.batch_size)]

    def run(self, network: PreTrainedModel, rows: Sequence[QA]) -> tuple[dict[int, list[float]], str]:
        """Train `network` on `rows`; returns what is known by number of steps, and why it ended early if it did."""
        if not rows:
            return {}, "no rows to learn from"
        found: dict[int, list[float]] = {}
        done = itertools.count(1)

        def loss(given: Mapping[str, Batch]) -> Tensor:
            return nll(forward(network, given["rows"]), given["rows"].labels)

        def look(_: dict[str, float]) -> None:
            step = next(done)
            if step in self.settings.steps:
                network.eval()
                found[step] = self.known(network)
                network.train()

        taught = [(row.question, row.answer) for row in self.encoder.windows(rows)]
        feed = Feed(self.encoder, {"rows": taught}, {"rows": self.settings.batch_size}, self.seed)
        objective = Objective([Term("relearn", loss, "rows", "tokens")], after_update=[look])
        schedule = Schedule(self.settings.steps[-1], self.settings.learning_rate, decay="constant")
        try:
            fit(network, objective, feed, schedule, seed=self.seed, progress=self.progress)
        except Diverged as error:
            return found, str(error)
        return found, ""


def _parted(before: list[float], after: dict[str, list[float]], skipped: dict[str, str], held_out: int) -> Relearned:
    """The first `held_out` items apart from those that were shown."""
    names = ("relearning", "probability")
    rest = {name: values[held_out:] for name, values in after.items()}
    shown = Pressed(*names, before[held_out:], rest, skipped) if before[held_out:] else None
    held = {name: values[:held_out] for name, values in after.items()}
    return Relearned(*names, before[:held_out], held, skipped, shown=shown)
