"""Which weights may move: WAGLE's and SURE's masks, and how a mask is really kept during training.

WAGLE (Jia et al. 2024, arXiv 2410.17509) chooses single weights by their influence on forgetting, corrected for the
retain set. SURE (Zhang et al. 2024, arXiv 2410.16454, equations 4 to 6) chooses modules, or rows (neurons), by the
norm of the forget gradient. Both are computed once, on the model that unlearning starts from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# True where a weight may move. Broadcasts to the parameter of that name; a parameter that is not named is frozen.
Mask = dict[str, Tensor]
Gradients = Mapping[str, Tensor]


def wagle(model: nn.Module, forget: Gradients, retain: Gradients, share: float, mu: float = 1e-6) -> Mask:
    """Keep the `share` of weights with the largest |(theta - g_r / mu) g_f|, ranked over all parameters together.

    forget, retain   gradients of the mean forget and retain loss, by parameter name, each of the parameter's shape.
                     Every parameter named is ranked: embeddings, norms and biases too, as in the paper
    mu               the paper's diagonal estimate of the retain loss's curvature. It meets a gradient, so a sum over
                     batches where a mean is meant changes which weights are chosen
    Exactly round(share * weights) are kept. Raises ValueError for names or shapes that do not fit the model, and
    for scores that are not finite.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: {share} is not above 0 and at most 1")
    if not mu > 0:
        raise ValueError(f"mu: {mu} is not above 0")
    if forget.keys() != retain.keys():
        odd = min(forget.keys() ^ retain.keys())
        raise ValueError(f"gradients: {odd} is in one of forget and retain; both must have the same names")
    parameters = _named(model, forget, "forget")
    _named(model, retain, "retain")

    def score(name: str) -> Tensor:
        weight = parameters[name].detach().float()
        return ((weight - retain[name].float() / mu) * forget[name].float()).abs()

    total = sum(parameters[name].numel() for name in forget)
    mask = largest(score, forget, round(share * total))
    return {name: kept for name, kept in mask.items() if kept.any()}


def sure(model: nn.Module, forget: Gradients, percentile: float, level: Literal["rows", "modules"] = "rows") -> Mask:
    """Keep the rows (or whole modules) whose forget gradient has a norm at or above `percentile` of all of them.

    forget   gradient of the mean forget loss, by parameter name; must have every linear layer's weight
    Rows are those of the linear layers (columns where GPT-2 stores a weight transposed), fused experts included; a
    bias moves with its row. Embeddings, the output head and norms are frozen. A gradient of zero is never kept.
    Raises ValueError when nothing is.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile: {percentile} is not between 0 and 100")
    if level not in ("rows", "modules"):
        raise ValueError(f"level: {level!r} is not one of rows, modules")
    _named(model, forget, "forget")
    matrices = list(_matrices(model))
    lacking = [matrix.name for matrix in matrices if matrix.name not in forget]
    if lacking:
        raise ValueError(
            f"forget: no gradient of {lacking[0]} and {len(lacking) - 1} more; every linear layer needs one"
        )
    norms = {}
    for matrix in matrices:
        over = matrix.inputs if level == "rows" else (-2, -1)
        norms[matrix.name] = torch.linalg.vector_norm(forget[matrix.name].float(), dim=over, keepdim=True)
        if not torch.isfinite(norms[matrix.name]).all():
            raise ValueError(f"forget: the gradient of {matrix.name} is not finite")
    # NumPy: torch.quantile refuses more than 16 million values.
    gamma = float(np.percentile(np.concatenate([norm.cpu().numpy().ravel() for norm in norms.values()]), percentile))
    mask: Mask = {}
    for matrix in matrices:
        kept = (norms[matrix.name] >= gamma) & (norms[matrix.name] > 0)
        if kept.any():
            mask[matrix.name] = kept
            if matrix.bias is not None:
                mask[matrix.bias] = kept.flatten() if kept.dim() == 2 else kept.squeeze(matrix.inputs)
    if not mask:
        raise ValueError("forget: every gradient is zero; no row is salient")
    return mask


@dataclass(frozen=True)
class _Matrix:
    """A linear map's weight [N, K], or [E, N, K] for fused experts. inputs: the dimension of the K input features."""

    name: str
    inputs: int
    bias: str | None


def _matrices(model: nn.Module) -> Iterator[_Matrix]:
    """Every linear layer but the output head, each once, and every fused stack of experts."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            if module is not head and id(module.weight) in names and id(module.weight) not in seen:
                seen.add(id(module.weight))
                bias = None if module.bias is None else names[id(module.bias)]
                yield _Matrix(names[id(module.weight)], -2 if isinstance(module, Conv1D) else -1, bias)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and name.endswith("_proj"):
                # Transformers marks experts that keep [E, K, N].
                inputs = -2 if getattr(module, "is_transposed", False) else -1
                offset = getattr(module, f"{name}_bias", None)
                yield _Matrix(names[id(parameter)], inputs, None if offset is None else names[id(offset)])


def _named(model: nn.Module, gradients: Gradients, what: str) -> dict[str, nn.Parameter]:
    """The model's parameters by name, once `gradients` is known to fit them."""
    parameters = dict(model.named_parameters())
    if not gradients:
        raise ValueError(f"{what}: no gradients; at least one parameter's is needed")
    for name, gradient in gradients.items():
        if name not in parameters:
            raise ValueError(f"{what}: {name} is no parameter of {type(model).__name__}")
        if gradient.shape != parameters[name].shape:
            raise ValueError(
                f"{what}: the gradient of {name} is {list(gradient.shape)}, its parameter "
                f"{list(parameters[name].shape)}"
            )
    return parameters


def largest(score: Callable[[str], Tensor], names: Iterable[str], count: int) -> Mask:
    """Mask of exactly the `count` largest of all scores together.

    score(name) -> float32, not negative; it is called three times a name, so that no two tensors of scores need be in
    memory at once. Of equal scores at the threshold the first are kept, in the order of `names`, then row by row.
    Raises ValueError for a score that is NaN or infinite, and for a count that is not between 1 and all of them.
    """
    names = list(names)

    def bits(name: str) -> Tensor:
        values = score(name)
        assert values.dtype == torch.float32
        if not torch.isfinite(values).all():
            raise ValueError(f"scores: {name} has one that is NaN or infinite")
        assert (values >= 0).all()
        # Adding zero makes -0.0 zero. From there up floats sort as their bit patterns do.
        return (values + 0.0).contiguous().view(torch.int32)

    def digits(name: str, upper: int | None) -> Tensor:
        pattern = bits(name).flatten()
        if upper is None:
            return pattern >> 16
        return pattern[pattern >> 16 == upper] & 0xFFFF

    # The threshold's bit pattern, sixteen bits at a time: a histogram finds each half exactly.
    upper, left = _digit((digits(name, None) for name in names), count)
    lower, left = _digit((digits(name, upper) for name in names), left)
    threshold = (upper << 16) | lower
    mask: Mask = {}
    for name in names:
        pattern = bits(name)
        mask[name] = pattern > threshold
        if left:
            ties = (pattern.flatten() == threshold).nonzero().flatten()[:left]
            mask[name].view(-1)[ties] = True
            left -= ties.numel()
    return mask


def _digit(parts: Iterable[Tensor], count: int) -> tuple[int, int]:
    """The sixteen-bit digit of the count-th largest value, and how many of that digit's values are needed."""
    histogram = torch.zeros(2**16, dtype=torch.int64)
    for part in parts:
        histogram += torch.bincount(part, minlength=2**16).cpu()
    at_least = histogram.flip(0).cumsum(0).flip(0)
    if not 1 <= count <= at_least[0]:
        raise ValueError(f"count: {count} is not between 1 and {at_least[0]}, the number of scores")
    digit = int((at_least >= count).nonzero().max())
    return digit, count - int(at_least[digit] - histogram[digit])


class Zeros:
    """The zeros of a model's matrices, as pruning leaves them: those that there are when this is made.

    Fused experts and embeddings count as matrices; biases and norms do not. ValueError when there are none, but for
    the embedding of padding, of which every model has some.
    """

    def __init__(self, model: nn.Module) -> None:
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        self._zeros = [(matrix, zeros) for matrix in matrices if (zeros := matrix.detach() == 0).any()]
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        if all(id(matrix) in embeddings for matrix, _ in self._zeros):
            raise ValueError("keep_zeros: no weight is zero; prune the model first, e.g. by wanda-s50")

    def hold_gradients_(self) -> None:
        """Zero the gradients there. Belongs before clipping, from the first step, as `apply_to_gradients_` does."""
        for matrix, zeros in self._zeros:
            if matrix.grad is not None:
                matrix.grad.masked_fill_(zeros.to(matrix.device), 0.0)

    @torch.no_grad()
    def restore_(self) -> None:
        """Put them back, whatever moved them: an adapter that was merged, a step that follows training."""
        for matrix, zeros in self._zeros:
            matrix.masked_fill_(zeros.to(matrix.device), 0.0)


def apply_to_gradients_(model: nn.Module, mask: Mask) -> None:
    """Zero every gradient outside the mask, or drop it where a whole parameter is outside.

    Belongs before clipping: the norm is then of what moves. Applied from the first step, moments of Adam outside the
    mask stay zero; with no weight decay AdamW then moves nothing outside, to the bit, and `restore_` is not needed.
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        if name in mask:
            # Not a product: zero times infinity is NaN.
            parameter.grad.masked_fill_(~mask[name].to(parameter.device), 0.0)
        else:
            parameter.grad = None


def outside(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """Values that must not move, for `restore_`: per parameter named, a flat copy of those outside its mask."""
    start = {}
    for name, parameter in model.named_parameters():
        if name in mask and not mask[name].all():
            held = ~mask[name].to(parameter.device)
            start[name] = parameter.detach()[held.expand_as(parameter)].clone()
    return start


def restore_(model: nn.Module, start: Mapping[str, Tensor], mask: Mask) -> None:
    """Put back, to the bit, what `outside` copied. Belongs after the optimizer's step: weight decay and old momentum
    move weights whose gradient is zero."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in start.items():
            parameter = parameters[name]
            parameter.masked_scatter_(~mask[name].to(parameter.device), values)


def kept_share(model: nn.Module, mask: Mask) -> float:
    """Share of the model's parameters that the mask lets move."""
    total = sum(parameter.numel() for parameter in model.parameters())
    kept = 0
    for name, parameter in model.named_parameters():
        if name in mask:
            kept += int(mask[name].sum()) * (parameter.numel() // math.prod(mask[name].shape))
    return kept / total
