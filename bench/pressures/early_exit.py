"""Recovery by early exit: what the layers before the last already say, the leak curve of an unlearned model.

The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens"): the hidden state after each decoder layer goes
through the model's own final norm and head. Here the model itself does it, with its last layers taken out, so that
whatever else stands behind them (a projection, a cap on logits) is as the architecture has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ...unlearn.data import QA
from ...unlearn.encode import Encoder
from ...unlearn.inference.guarded import Guarded
from ...unlearn.layers import decoder_layers, first_layers
from ..statistics import Interval, bootstrap_mean
from ..tokens import answers
from .pressed import Pressed


def early_exit(model: PreTrainedModel, encoder: Encoder, rows: Sequence[QA], batch_size: int = 64) -> Pressed:
    """Probability of each row's answer by the whole model, and decoded after each of its L layers: "layer 1" to
    "layer L", the last being the whole again (no pressure, but the curve's end).

    Costs as much as (L+1)/2 passes of the whole model. Raises ValueError for a guarded model: what guards it sees
    answers, not layers; those are of the model inside.
    """
    if isinstance(model, Guarded):
        raise ValueError("model: guarded at inference time; its layers are the base's, so measure model.base")
    pairs = [(row.question, row.answer) for row in rows]

    def known() -> list[float]:
        return [answer.probability for answer in answers(model, encoder, pairs, batch_size)]

    before = known()
    after: dict[str, list[float]] = {}
    layers = len(decoder_layers(model))
    for count in range(1, layers + 1):
        with first_layers(model, count):
            after[f"layer {count}"] = known()
    return Pressed("early exit", "probability", before, after, references=(f"layer {layers}",))


@dataclass(frozen=True)
class Leak:
    """layer: from 1, the one that knows most; mean: of the probability there; above: how much more than the last layer
    gives, over the items. The layer was chosen by the same items, which the interval does not take into account."""

    layer: int
    mean: float
    above: Interval


def leak(pressed: Pressed, seed: int = 0) -> Leak:
    """The peak of the curve that early_exit found; among equal ones the latest layer, so that no leak is the last."""
    curve = list(pressed.after.values())
    means = [sum(values) / len(values) for values in curve]
    best = max(range(len(curve)), key=lambda layer: (means[layer], layer))
    above = [there - end for there, end in zip(curve[best], curve[-1], strict=True)]
    return Leak(best + 1, means[best], bootstrap_mean(above, seed))
