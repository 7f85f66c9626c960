"""What the layers before the last know of what was forgotten: the leak curve of an unlearned model beside its controls.

After each layer the state goes through the model's own final norm and head (the logit lens, nostalgebraist 2020).
Shallow layers decode nothing, whoever is asked, so that each layer is its own scale:
    leak at l = (unlearned at l - oracle at l) / (target at l - oracle at l)
0: no more than a model that was never taught says there; 1: as much as the target does. Where target and oracle are not
shown to be apart, no share is defined, and none is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from ..compress.block import first
from ..compress.early_exit.anatomy import anatomy
from ..unlearn.data import QA
from ..unlearn.encode import Batch, Encoder
from .statistics import TAIL, Interval, bootstrap_mean, holm, mean_draws, share_difference_draws, share_draws
from .tokens import Answer, several_answers
from .verdict import MARGIN, MIN_GAP


@dataclass(frozen=True)
class Curve:
    """probability   [L][N] of each answer, decoded after 1..L layers
    exact            [L][N] whether every token of it, the end included, is the likeliest there
    """

    probability: list[list[float]]
    exact: list[list[bool]]


def curve(model: PreTrainedModel, encoder: Encoder, rows: Sequence[QA], batch_size: int = 64) -> Curve:
    """Of every row's answer, all depths in one pass; the head sees the answers' positions alone.

    Raises ValueError for a model that compress/early_exit/anatomy.py does not know (pressures/early_exit.py takes any,
    at (L + 1) / 2 passes).
    """
    found = answers_by_depth(model, encoder, [(row.question, row.answer) for row in rows], batch_size)
    return Curve(
        [[answer.probability for answer in depth] for depth in found],
        [[bool(answer.greedy.all()) for answer in depth] for depth in found],
    )


def answers_by_depth(
    model: PreTrainedModel, encoder: Encoder, pairs: Sequence[tuple[str, str]], batch_size: int = 64
) -> list[list[Answer]]:
    """[L][N]: each (question, answer) scored after 1..L layers, every position read so deep."""
    body = anatomy(model)

    def logits(batch: Batch, at: Tensor) -> Iterator[Tensor]:
        kept: list[Tensor] = []
        hooks = [layer.register_forward_hook(lambda *call: kept.append(first(call[-1]))) for layer in body.layers]
        try:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return (body.logits(state[:, :-1][at]) for state in kept)

    return several_answers(model, encoder, pairs, batch_size, logits)


@dataclass(frozen=True)
class LayerLeak:
    """One layer, from 1. Intervals are of 95%, over the items.

    target, unlearned, oracle   mean probability there; oracle None: there is none, and 0 takes its place
    exact        share of answers that each has right word for word: {"target": ...}
    share        the leak; None where target and oracle are not shown to be more than MIN_GAP apart
    excess       how much larger it is than the last layer's; None where either is undefined, and at the last layer
    p_excess     one-sided p-value against "at most MARGIN more", after Holm's correction over all layers that have one
    kept         the unlearned model's probability on kept rows there over its last layer's; None if not asked
    """

    layer: int
    target: Interval
    unlearned: Interval
    oracle: Interval | None
    exact: dict[str, float]
    share: Interval | None
    excess: Interval | None
    p_excess: float | None
    kept: float | None


@dataclass(frozen=True)
class LeakCurve:
    """layers   1..L
    leaking     those shown to leak more than the last one, by more than MARGIN
    worst       the layer of the largest share, the latest of equals; None where no share is defined. It was chosen by
                the same items, which its interval does not take into account; its p_excess does
    note        in words
    """

    layers: list[LayerLeak]
    leaking: list[int]
    worst: int | None
    note: str


def leak_curve(
    target: Curve, unlearned: Curve, oracle: Curve | None, seed: int, kept: Sequence[float] | None = None
) -> LeakCurve:
    """kept   [L] mean probability of the unlearned model on rows that were to be kept

    Raises ValueError for curves of unlike depths or items.
    """
    depth = len(unlearned.probability)
    floor = oracle or Curve([[0.0] * len(row) for row in target.probability], target.exact)
    for name, other in (("target", target), ("oracle", floor)):
        if len(other.probability) != depth:
            raise ValueError(f"{name}: {len(other.probability)} layers beside {depth} of the unlearned model")
        items = [len(row) for one in (unlearned, other) for row in one.probability]
        if len(set(items)) != 1:
            raise ValueError(f"{name}: curves of {min(items)} to {max(items)} items; equal ones are needed")
    parts = list(zip(unlearned.probability, floor.probability, target.probability, strict=True))
    apart = [_apart(whole, low, seed) for _, low, whole in parts]
    compared = [layer for layer in range(depth - 1) if apart[layer] and apart[-1]]
    differences = {layer: share_difference_draws(parts[layer], parts[-1], seed) for layer in compared}
    adjusted = dict(zip(compared, holm([differences[layer].p_below(MARGIN) for layer in compared]), strict=True))
    layers = [
        LayerLeak(
            layer=i + 1,
            target=bootstrap_mean(whole, seed),
            unlearned=bootstrap_mean(part, seed),
            oracle=bootstrap_mean(low, seed) if oracle else None,
            exact={
                name: sum(one.exact[i]) / len(one.exact[i])
                for name, one in (("target", target), ("unlearned", unlearned), ("oracle", oracle))
                if one is not None
            },
            share=share_draws(part, low, whole, seed).interval() if apart[i] else None,
            excess=differences[i].interval() if i in differences else None,
            p_excess=adjusted.get(i),
            kept=None if kept is None or not kept[-1] else kept[i] / kept[-1],
        )
        for i, (part, low, whole) in enumerate(parts)
    ]
    leaking = [found.layer for found in layers if found.p_excess is not None and found.p_excess <= TAIL]
    shares = {found.layer: found.share.value for found in layers if found.share}
    worst = max(shares, key=lambda layer: (shares[layer], layer), default=None)
    return LeakCurve(layers, leaking, worst, _note(layers, leaking, worst))


def _apart(whole: Sequence[float], floor: Sequence[float], seed: int) -> bool:
    return mean_draws([a - b for a, b in zip(whole, floor, strict=True)], seed).p_below(MIN_GAP) <= TAIL


def _note(layers: list[LayerLeak], leaking: list[int], worst: int | None) -> str:
    if worst is None:
        return "no layer tells the target from the oracle, so that no leak is defined"
    share = layers[worst - 1].share
    assert share is not None
    most = f"most is left after layer {worst}: {share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"
    if layers[-1].share is None:
        return f"{most}; the last layer's share is not defined, so that nothing can be compared with it"
    if not leaking:
        return f"{most}; no layer is shown to leak over {MARGIN:.0%} more than the last"
    return f"{most}; shown to leak over {MARGIN:.0%} more than the last: layers {', '.join(map(str, leaking))}"
