"""How much each layer's precision matters, by any of several measures: what mixed precision is allocated by.

One score a layer, or one at each width, always on data that the caller chooses: calibration text, rows to be retained,
rows to be forgotten. CPTQuant's three (arXiv 2412.03599) beside what the field takes, and chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .block import Linear
from .knobs import make_options
from .probe import Parts, Probe, Progress, check_predictable, experts_apart, in_float32, ratio
from .recipe import Recipe
from .representation import ENERGY, layer_scores
from .response import ByWidth, Scores, error, error_absolute, kl, pmpq
from .rtn import QTensor, relative_error, row_slices
from .sequential import check_batches
from .spec import BITS
from .taylor import hessian, tdmpq, tdmpq_input
from .walk import check_unshared, fitting_linears, quantize_weight, weight_of, within

DENSE_BITS = 16


@dataclass(frozen=True)
class Sensitivity:
    """What one measure says.

    scores   by full name of a linear layer; larger: more sensitive
    noise    standard error of each score over batches; empty where there is none (one batch, or none that counts)
    costs    what each width costs this layer, in the measure's own unit, never below 0; 16 bits cost 0. An allocation
             minimises their sum
    unseen   layers that no token came by (experts): their scores say nothing
    """

    measure: str
    scores: dict[str, float]
    noise: dict[str, float]
    costs: dict[str, dict[int, float]]
    unseen: tuple[str, ...] = ()


def chance(probe: Probe) -> Scores:
    """Uniform from 0 to 1."""
    drawn = torch.rand(len(probe.layers), generator=probe.generator(), dtype=torch.float64).tolist()
    return {name: [(score, 1.0)] for name, score in zip(probe.layers, drawn, strict=True)}


def _of_layers(measure: str) -> Callable[[Probe], Scores]:
    """A measure of hidden states: every linear layer has the score of the decoder layer that it is in."""

    def scores(probe: Probe) -> Scores:
        found = layer_scores(probe.model, measure, probe.batches, probe.progress).scores
        return _inside(probe, measure, {name: [(score, 1.0)] for name, score in found.items()})

    return scores


def _perturbed_input(probe: Probe) -> Scores:
    return _inside(probe, "tdmpq_input", tdmpq_input(probe))


def _inside(probe: Probe, measure: str, layers: dict[str, Parts]) -> Scores:
    found: Scores = {}
    for name in probe.layers:
        holder = next((layer for layer in layers if within(name, [layer])), None)
        if holder is None:
            raise ValueError(f"{measure}: scores decoder layers, and {name} is in none; add it to the recipe's ignore")
        found[name] = layers[holder]
    return found


# One score a layer, which a width costs in proportion to its error.
SCORED: dict[str, Callable[[Probe], Scores]] = {
    **{measure: _of_layers(measure) for measure in ENERGY},  # cmpq, svcca, pwcca
    "pmpq": pmpq,
    "tdmpq_input": _perturbed_input,
    "hessian": hessian,
    "random": chance,
}
# A cost for every width at once.
BY_WIDTH: dict[str, Callable[[Probe], ByWidth]] = {
    "tdmpq": tdmpq,
    "error": error,
    "error_absolute": error_absolute,
    "kl": kl,
}
MEASURES = (*ENERGY, "pmpq", "tdmpq", "tdmpq_input", "hessian", "error", "error_absolute", "kl", "random")
# Their scores are per squared error of a weight, not per relative one.
_SQUARED = ("hessian",)
# They look at no data.
_BLIND = ("random",)


def sensitivities(
    model: PreTrainedModel,
    measure: str,
    batches: Sequence[Tensor],
    recipe: Recipe,
    widths: Sequence[int] = BITS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sensitivity:
    """Score every layer that `recipe` quantizes. The model is left exactly as it was.

    batches   token ids int64 [B, T], without padding: what it is measured on; more than one, for standard errors
    recipe    its format at each width, filled by rounding to nearest, is the error that counts; its scores are those of
              the recipe's own width where they differ by width
    widths    that get a cost, beside 16
    seed      of hessian, tdmpq_input and random
    progress  is told (done, of, what)

    By name, Q_b being the weight W at b bits:
      cmpq, svcca, pwcca   1 - likeness of the decoder layer's hidden states to other layers' (representation.py)
      pmpq            rise of the loss when the layer is pruned (response.py)
      tdmpq           sum |g (W - Q_b)| + 1/2 sum g^2 (W - Q_b)^2, g the gradient (taylor.py)
      tdmpq_input     |dL/dh| |dh| + 1/2 |d(dL/dh)| |dh|, dh from noise on the embeddings (taylor.py)
      hessian         mean of the loss's second derivatives, tr(H) / number of weights (taylor.py)
      error, error_absolute   |x (W - Q_b)^T|^2, relative to |x W^T|^2 or per token (response.py)
      kl              KL(model || with this layer at b bits) per token (response.py)
      random          uniform
    tdmpq, error and kl are their own costs. A score S costs max(S, 0) |W - Q_b|^2 / |W|^2, that of hessian
    max(S, 0) |W - Q_b|^2: a layer that does better when it is disturbed counts as one that does not care.

    With fused experts names are those of the experts apart (unfuse_experts_). Raises ValueError for an unknown measure
    or width, data that nothing can be measured on, and where the recipe could not quantize the model.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure: {measure!r} is not one of {', '.join(MEASURES)}")
    wanted = sorted(set(widths) - {DENSE_BITS})
    if not set(wanted) <= set(BITS):
        raise ValueError(f"widths: {list(widths)}; expected some of {', '.join(map(str, BITS))}, {DENSE_BITS}")
    if measure not in _BLIND:
        check_batches(recipe, batches, model)
        check_predictable(batches)
    with experts_apart(model):
        layers = dict(fitting_linears(model, recipe))
        check_unshared(model, list(layers.items()), recipe)
        assert recipe.spec is not None
        own = recipe.spec.bits
        rounded: dict[str, dict[int, QTensor]] = {}
        errors: dict[str, dict[int, float]] = {}
        for name, layer in layers.items():
            # Before the model is in float32: a scale has the dtype of the weight.
            weight = weight_of(layer).detach()
            found = _rounded(name, weight, recipe, {*wanted, own} if measure in BY_WIDTH else wanted)
            if measure in BY_WIDTH:
                rounded[name] = found
            else:
                errors[name] = {bits: _error(weight, q, measure) for bits, q in found.items()}
        probe = Probe(model, layers, rounded, batches, seed, progress)
        with in_float32(model), _seen(layers) as seen:
            scores, costs = _by_width(probe, measure, wanted, own) if rounded else _scored(probe, measure, errors)
    for name, (score, _) in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"{measure}: {name}: its score is {score}; are the model's outputs numbers?")
    return Sensitivity(
        measure,
        {name: score for name, (score, _) in scores.items()},
        {name: noise for name, (_, noise) in scores.items() if noise is not None},
        {name: {**of, DENSE_BITS: 0.0} for name, of in costs.items()},
        () if measure in _BLIND else tuple(name for name in layers if name not in seen),
    )


_Scores = dict[str, tuple[float, float | None]]
_Costs = dict[str, dict[int, float]]


def _by_width(probe: Probe, measure: str, widths: Collection[int], own: int) -> tuple[_Scores, _Costs]:
    found = {name: {bits: ratio(parts) for bits, parts in of.items()} for name, of in BY_WIDTH[measure](probe).items()}
    costs = {name: {bits: max(of[bits][0], 0.0) for bits in widths} for name, of in found.items()}
    return {name: of[own] for name, of in found.items()}, costs


def _scored(probe: Probe, measure: str, errors: _Costs) -> tuple[_Scores, _Costs]:
    scores = {name: ratio(parts) for name, parts in SCORED[measure](probe).items()}
    costs = {name: {b: max(scores[name][0], 0.0) * error for b, error in of.items()} for name, of in errors.items()}
    return scores, costs


def significant(sensitivity: Sensitivity) -> list[str]:
    """Layers whose score is at least two standard errors from 0; of the others, the measure says nothing at all.

    Raises ValueError where there are no standard errors.
    """
    if not sensitivity.noise:
        raise ValueError(f"noise: {sensitivity.measure} has no standard errors here; some measures do, of two batches")
    return [name for name, score in sensitivity.scores.items() if score and abs(score) >= 2 * sensitivity.noise[name]]


def _rounded(name: str, weight: Tensor, recipe: Recipe, widths: Collection[int]) -> dict[int, QTensor]:
    """Weight [N, K] rounded to nearest, with the recipe's groups and its way to find scales."""
    knobs = {knob: value for knob, value in vars(recipe.options).items() if knob in ("scale", "clip")}
    assert recipe.spec is not None
    return {
        bits: quantize_weight(
            name, weight, Recipe("rtn", replace(recipe.spec, bits=bits), options=make_options("rtn", knobs))
        )
        for bits in widths
    }


def _error(weight: Tensor, q: QTensor, measure: str) -> float:
    """|W - Q|^2 / |W|^2, or |W - Q|^2, of weight [N, K]."""
    relative = relative_error(weight, q)
    if measure not in _SQUARED:
        return relative
    return relative * sum(float(weight[rows].float().square().sum(dtype=torch.float64)) for rows in row_slices(weight))


@contextmanager
def _seen(layers: Mapping[str, Linear]) -> Iterator[set[str]]:
    """Names of the layers that any token comes by inside."""
    names: set[str] = set()

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001
            if args[0].numel():
                names.add(name)

        return look

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
