"""The positive control: unlearning built so that one named quantizer restores the target's codes exactly.

Every weight may move only inside its own quantization bucket, and the weight that sets a group's scale not at all.
In full precision the model forgets; round to nearest at the named format gives back the target's integers, bit for
bit, and with them the knowledge. An audit that does not call this `returned` is broken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..compress.knobs import PLAIN_RTN
from ..compress.recipe import Recipe
from ..compress.rtn import rtn
from ..compress.spec import QuantSpec
from ..compress.walk import linears, storage_dtype, weight_of

# Kept away from the bucket's edge, as a share of the step: rounding to nearest must not depend on the last float bit.
MARGIN = 0.02


@dataclass(frozen=True)
class Buckets:
    """low, high: tensors of the parameter's own shape; any value between gives the same codes and scales."""

    parameter: Tensor
    low: Tensor
    high: Tensor

    def clamp_(self) -> None:
        with torch.no_grad():
            self.parameter.copy_(torch.minimum(torch.maximum(self.parameter, self.low), self.high))


def bounds(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Lowest and highest values [N, K] that leave plain rtn(weight [N, K]) unchanged."""
    N, K = weight.shape
    codes = rtn(weight, spec, scale_dtype, PLAIN_RTN)
    scale = codes.scale.float()[:, :, None]  # [N, K/G, 1]
    q = codes.codes.float().view(N, scale.shape[1], -1) - 2 ** (spec.bits - 1)  # [N, K/G, G]
    w = weight.view_as(q)
    peak = w.abs().amax(2, keepdim=True)
    low = _inward(torch.maximum((q - 0.5 + MARGIN) * scale, -peak.float()), weight.dtype, 1.0)
    high = _inward(torch.minimum((q + 0.5 - MARGIN) * scale, peak.float()), weight.dtype, -1.0)
    # Codes at the ends of the range are reached by clipping, and some weights start inside the margin.
    low, high = torch.minimum(low, w), torch.maximum(high, w)
    pinned = w.abs() == peak
    low, high = torch.where(pinned, w, low), torch.where(pinned, w, high)
    return low.view(N, K), high.view(N, K)


def _inward(bound: Tensor, dtype: torch.dtype, towards: float) -> Tensor:
    """float32 bounds in `dtype`, rounded up (towards 1.0) or down (-1.0): never out of the bucket."""
    near = bound.to(dtype)
    past = (near.float() - bound) * towards < 0
    return torch.where(past, torch.nextafter(near, torch.full_like(near, towards * torch.inf)), near)


def freeze_to_buckets(model: PreTrainedModel, recipe: Recipe) -> list[Buckets]:
    """Leave trainable only what `recipe` quantizes; returns the buckets, to be clamped after each step.

    Raises ValueError for another recipe than plain round to nearest: in no other does one weight alone set the scale.
    """
    check_plain(recipe)
    assert recipe.spec is not None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    buckets = []
    for _, module in linears(model, recipe.ignore):
        weight = weight_of(module)
        low, high = bounds(weight.detach(), recipe.spec, storage_dtype(weight))
        if isinstance(module, Conv1D):
            low, high = low.T.contiguous(), high.T.contiguous()
        module.weight.requires_grad_(True)
        buckets.append(Buckets(module.weight, low, high))
    return buckets


def check_plain(recipe: Recipe) -> None:
    """ValueError for a recipe whose buckets are not known from the weights' largest alone."""
    if recipe.options != PLAIN_RTN:
        raise ValueError(f"recipe: {recipe} is not plain round to nearest, e.g. rtn-w4a16-g64-plain")


def control_recipe(widths: set[int]) -> Recipe:
    """The 4-bit recipe that the control is built against: groups of 64, or the largest of 32, 16 and per channel that
    divide every layer's input features (`widths`)."""
    for group_size in (64, 32, 16):
        if all(width % group_size == 0 for width in widths):
            return Recipe("rtn", QuantSpec(4, group_size), options=PLAIN_RTN)
    return Recipe("rtn", QuantSpec(4), options=PLAIN_RTN)


def mean_width(buckets: list[Buckets]) -> float:
    """Mean distance between the ends of a bucket, over all weights: the scale on which a control may move."""
    total = sum(float((b.high - b.low).double().sum()) for b in buckets)
    return total / sum(b.low.numel() for b in buckets)
