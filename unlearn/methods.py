"""Unlearning methods, by name. Each takes the target and returns it unlearned, in place; `unlearn` is the way in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compress.spec import Recipe, parse_recipe
from .bucketed import freeze_to_buckets
from .data import QA
from .encode import Batch, Encoder, epochs
from .losses import answer_nll, grad_diff, nll, npo
from .train import Progress, Schedule, fit


@dataclass(frozen=True)
class MethodConfig:
    """Knobs of a method. steps counts updates; each sees forget_batch forget rows and retain_batch retain rows.

    gamma, alpha   weights of the forget and the retain term
    beta           NPO's temperature
    against        the recipe whose buckets `bucketed` stays in
    """

    steps: int = 60
    learning_rate: float = 2e-4
    warmup: int = 6
    forget_batch: int = 40
    retain_batch: int = 64
    gamma: float = 1.0
    alpha: float = 1.0
    beta: float = 0.1
    against: str = "rtn-w4a16-g64"


def unlearn(
    model: PreTrainedModel,
    encoder: Encoder,
    forget: tuple[QA, ...],
    retain: tuple[QA, ...],
    method: str,
    config: MethodConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Unlearn `forget` from `model`, in place, keeping `retain`. Same seed, same result.

    Raises ValueError for an unknown method, FloatingPointError when training diverges.
    """
    run = METHODS.get(method)
    if run is None:
        raise ValueError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    torch.manual_seed(seed)
    data = _Data(encoder, forget, retain, config or DEFAULTS[method], seed, str(model.device))
    run(model, data, progress)
    return model


DEFAULTS = {
    "graddiff": MethodConfig(),
    "npo": MethodConfig(),
    "bucketed": MethodConfig(steps=80, learning_rate=1e-3),
}


class _Data:
    """Batches of both sets for one run, and the start model's NLL of every forget row."""

    def __init__(
        self,
        encoder: Encoder,
        forget: tuple[QA, ...],
        retain: tuple[QA, ...],
        config: MethodConfig,
        seed: int,
        device: str,
    ) -> None:
        self.encoder, self.config, self.device = encoder, config, device
        self.forget_rows, self.retain_rows = forget, retain
        generator = torch.Generator().manual_seed(seed)
        self._forget = epochs(len(forget), config.forget_batch, generator)
        self._retain = epochs(len(retain), config.retain_batch, generator)

    def forget(self) -> tuple[Batch, list[int]]:
        """A forget batch and its row numbers."""
        rows = next(self._forget)
        return self.batch(self.forget_rows, rows), rows

    def retain(self) -> Batch:
        return self.batch(self.retain_rows, next(self._retain))

    def batch(self, rows: tuple[QA, ...], chosen: list[int]) -> Batch:
        return self.encoder.batch([(rows[i].question, rows[i].answer) for i in chosen], self.device)

    def schedule(self) -> Schedule:
        return Schedule(self.config.steps, self.config.learning_rate, self.config.warmup, decay="constant")


def _graddiff(model: PreTrainedModel, data: _Data, progress: Progress | None) -> None:
    c = data.config

    def loss(step: int) -> Tensor:
        forget, _ = data.forget()
        retain = data.retain()
        return grad_diff(
            nll(_logits(model, forget), forget.labels), nll(_logits(model, retain), retain.labels), c.gamma, c.alpha
        )

    fit(model, loss, data.schedule(), progress=progress)


def _npo(
    model: PreTrainedModel,
    data: _Data,
    progress: Progress | None,
    after_step: Callable[[], None] | None = None,
) -> None:
    c = data.config
    reference = reference_nll(model, data)

    def loss(step: int) -> Tensor:
        forget, rows = data.forget()
        retain = data.retain()
        total, _ = answer_nll(_logits(model, forget), forget.labels)
        kept = nll(_logits(model, retain), retain.labels)
        return c.gamma * npo(total, reference[rows], c.beta) + c.alpha * kept

    fit(model, loss, data.schedule(), after_step=after_step, progress=progress)


def _bucketed(model: PreTrainedModel, data: _Data, progress: Progress | None) -> None:
    """NPO inside the buckets of `against`."""
    recipe: Recipe = parse_recipe(data.config.against)
    if recipe.spec is None:
        raise ValueError(f"against: {recipe} quantizes nothing; bucketed needs a quantizer, e.g. rtn-w4a16-g64")
    buckets = freeze_to_buckets(model, recipe)

    def after_step() -> None:
        for bucket in buckets:
            bucket.clamp_()

    try:
        _npo(model, data, progress, after_step)
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)


def reference_nll(model: PreTrainedModel, data: _Data) -> Tensor:
    """Summed NLL of every forget row under the model as it is now, [rows]: computed once, no second model is held."""
    values = []
    with torch.no_grad():
        for start in range(0, len(data.forget_rows), data.config.forget_batch):
            chosen = list(range(start, min(start + data.config.forget_batch, len(data.forget_rows))))
            batch = data.batch(data.forget_rows, chosen)
            values.append(answer_nll(_logits(model, batch), batch.labels)[0])
    return torch.cat(values)


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


METHODS = {"graddiff": _graddiff, "npo": _npo, "bucketed": _bucketed}
