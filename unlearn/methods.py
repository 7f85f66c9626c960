"""Unlearning methods, by name. Each takes the target and returns it unlearned, in place; `unlearn` is the way in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compress.spec import Recipe, parse_recipe
from .bucketed import freeze_to_buckets, mean_width
from .data import QA
from .encode import Batch, Encoder, epochs
from .likelihood import answer_likelihood
from .losses import answer_nll, grad_diff, nll, npo
from .train import Progress, Schedule, fit


@dataclass(frozen=True)
class MethodConfig:
    """Knobs of a method. steps counts updates; each sees forget_batch forget rows and retain_batch retain rows.

    gamma, alpha   weights of the forget and the retain term
    beta           NPO's temperature
    against        the recipe whose buckets `bucketed` stays in; its learning rate is in bucket widths a step
    """

    steps: int
    learning_rate: float
    warmup: int = 5
    forget_batch: int = 32
    retain_batch: int = 32
    gamma: float = 1.0
    alpha: float = 1.0
    beta: float = 0.1
    against: str = "rtn-w4a16-g64"

    def __post_init__(self) -> None:
        if not self.learning_rate >= 0:
            raise ValueError(f"learning_rate: {self.learning_rate} is below 0")
        for name in ("steps", "forget_batch", "retain_batch", "beta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0")


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
    for name, rows in (("forget", forget), ("retain", retain)):
        if not rows:
            raise ValueError(f"{name}: no rows; {method} needs at least one")
    torch.manual_seed(seed)
    data = _Data(encoder, forget, retain, config or FIELD[method], seed, str(model.device))
    run(model, data, progress)
    return model


def adjusted(config: MethodConfig, learning_rate: float | None, steps: int | None) -> MethodConfig:
    """`config` with what a user set; None leaves a value as it is."""
    asked = config if learning_rate is None else replace(config, learning_rate=learning_rate)
    return asked if steps is None else replace(asked, steps=steps)


# A control that works on any model: buckets set its scale.
_CONTROL = MethodConfig(steps=60, learning_rate=0.04, forget_batch=40, retain_batch=64, alpha=2.0)

# For pretrained models: the field's settings (learning rate 1e-5, ten epochs over TOFU's forget10 in batches of 32).
FIELD = {
    "graddiff": MethodConfig(steps=125, learning_rate=1e-5),
    "npo": MethodConfig(steps=125, learning_rate=1e-5),
    "bucketed": _CONTROL,
}

# For demo models, which are a thousand times smaller: chosen so that the forget set falls to about the oracle's level
# and the retain set stays.
DEMO = {
    "graddiff": MethodConfig(steps=40, learning_rate=2e-4, forget_batch=40, retain_batch=64, gamma=0.1),
    "npo": MethodConfig(steps=40, learning_rate=2e-4, forget_batch=40, retain_batch=64, gamma=0.15),
    "bucketed": _CONTROL,
}


class _Data:
    """Batches of both sets for one run."""

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

    def schedule(self, unit: float = 1.0) -> Schedule:
        """As configured, with the learning rate in multiples of `unit`."""
        return Schedule(self.config.steps, self.config.learning_rate * unit, self.config.warmup, decay="constant")


def _graddiff(model: PreTrainedModel, data: _Data, progress: Progress | None) -> None:
    c = data.config

    def loss() -> Tensor:
        forget, _ = data.forget()
        retain = data.retain()
        return grad_diff(
            nll(_logits(model, forget), forget.labels),
            nll(_logits(model, retain), retain.labels),
            c.gamma,
            c.alpha,
        )

    fit(model, loss, data.schedule(), progress=progress)


def _npo(
    model: PreTrainedModel,
    data: _Data,
    progress: Progress | None,
    after_step: Callable[[], None] | None = None,
    unit: float = 1.0,
) -> None:
    c = data.config
    reference = reference_nll(model, data)

    def loss() -> Tensor:
        forget, rows = data.forget()
        retain = data.retain()
        total, _ = answer_nll(_logits(model, forget), forget.labels)
        kept = nll(_logits(model, retain), retain.labels)
        return c.gamma * npo(total, reference[rows], c.beta) + c.alpha * kept

    fit(model, loss, data.schedule(unit), after_step=after_step, progress=progress)


def _bucketed(model: PreTrainedModel, data: _Data, progress: Progress | None) -> None:
    """NPO inside the buckets of `against`."""
    recipe: Recipe = parse_recipe(data.config.against)
    if recipe.spec is None:
        raise ValueError(f"against: {recipe} quantizes nothing; bucketed needs a quantizer, e.g. rtn-w4a16-g64")
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    buckets = freeze_to_buckets(model, recipe)

    def after_step() -> None:
        for bucket in buckets:
            bucket.clamp_()

    try:
        _npo(model, data, progress, after_step, mean_width(buckets))
    finally:
        for parameter, before in zip(model.parameters(), trainable, strict=True):
            parameter.requires_grad_(before)


def reference_nll(model: PreTrainedModel, data: _Data) -> Tensor:
    """Summed NLL of every forget row under the model as it is now, [rows]: computed once, no second model is held."""
    pairs = [(row.question, row.answer) for row in data.forget_rows]
    totals, _ = answer_likelihood(model, data.encoder, pairs, data.config.forget_batch)
    return torch.tensor(totals, device=data.device)


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


METHODS = {"graddiff": _graddiff, "npo": _npo, "bucketed": _bucketed}
