"""The one training loop: demo models learn with it, unlearning methods forget with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

Progress = Callable[[int, int], None]  # (steps done, steps in all)


# 0.95 rather than 0.999: runs here last hundreds of updates, too few for a memory of a thousand.
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Schedule:
    """AdamW without decay of weights. Warm-up over the first `warmup` steps, then "linear" to zero or "constant"."""

    steps: int
    learning_rate: float
    warmup: int = 0
    decay: str = "linear"

    def factor(self, step: int) -> float:
        """Share of the learning rate in force at `step` (from 0)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        return (self.steps - step) / max(1, self.steps - self.warmup)


def fit(
    model: PreTrainedModel,
    loss: Callable[[], Tensor],
    schedule: Schedule,
    after_step: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Train the parameters that require gradients, in place; returns the loss of every step.

    loss()        a scalar of the current model
    after_step    called after each update (projections)
    Raises FloatingPointError when the loss or its gradient stops being finite: a diverged model is not handed on.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, betas=BETAS, weight_decay=0.0)
    history = []
    model.train()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * schedule.factor(step)
        value = loss()
        history.append(value.item())
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss is {history[-1]} at step {step + 1} of {schedule.steps}")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm.item()} at step {step + 1} of {schedule.steps}")
        optimizer.step()
        if after_step is not None:
            after_step()
        if progress is not None:
            progress(step + 1, schedule.steps)
    model.eval()
    return history
