"""What a layer's error would do to the loss, to first and second order: by derivatives, without trying it.

TDMPQ is what the abstract of CPTQuant (arXiv 2412.03599) calls a Taylor decomposition (its authors' code adds noise to
one weight and looks at the loss): of the change that rounding makes in the weights, or of a small perturbation of the
model's input as it reaches a layer. Beside them the mean trace of the Hessian, HAWQ-V2 (arXiv 1911.03852).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .block import block_names, first
from .probe import Parts, Probe, loss, predicted
from .response import ByWidth, Scores
from .rtn import QTensor, row_slices
from .walk import weight_of

# Standard deviation of the noise on embeddings, times their root mean square.
EPSILON = 0.01
# Random vectors in all, one a batch at least; each costs two passes backward. With fewer, chance says more than data.
VECTORS = 64
# Attention with a second derivative: torch's own, in its plain form, and transformers'.
_TWICE = ("sdpa", "eager")


def tdmpq(probe: Probe) -> ByWidth:
    """sum |g (W - Q_b)| + 1/2 sum g^2 (W - Q_b)^2, nats per token, mean over batches; g is the gradient of the batch's
    loss, and g^2 stands for the Hessian (empirical Fisher). One pass backward a batch, one layer's gradient at a time.
    """
    found: ByWidth = {name: {bits: [] for bits in widths} for name, widths in probe.rounded.items()}
    tokens = 0

    def hook(name: str) -> Any:
        layer = probe.layers[name]

        def look(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient, W = parameter.grad.T if isinstance(layer, Conv1D) else parameter.grad, weight_of(layer)
            for bits, q in probe.rounded[name].items():
                found[name][bits][-1] = tokens * expansion(gradient, W, q), tokens
            parameter.grad = None

        return look

    handles = []
    try:
        for name, layer in probe.layers.items():
            layer.weight.requires_grad_(True)
            handles.append(layer.weight.register_post_accumulate_grad_hook(hook(name)))
        for i, ids in enumerate(probe.batches):
            probe.tell(i, len(probe.batches), "gradients")
            tokens = predicted(ids)
            for widths in found.values():
                for parts in widths.values():
                    parts.append((0.0, tokens))  # stays so where no token comes by
            loss(probe.model, ids).backward()
    finally:
        for handle in handles:
            handle.remove()
        for layer in probe.layers.values():
            layer.weight.requires_grad_(False)
    probe.tell(len(probe.batches), len(probe.batches), "")
    return found


@torch.no_grad()
def expansion(gradient: Tensor, W: Tensor, q: QTensor) -> float:
    """sum |g (W - Q)| + 1/2 sum g^2 (W - Q)^2 for gradient and W [N, K]."""
    total = 0.0
    for rows in row_slices(W):
        moved = (W[rows] - q.rows(rows)) * gradient[rows]
        total += float(moved.abs().sum(dtype=torch.float64) + moved.square().sum(dtype=torch.float64) / 2)
    return total


def tdmpq_input(probe: Probe) -> dict[str, Parts]:
    """By decoder layer: sum over tokens of |g| |d| + 1/2 |H d| |d|, nats per token, mean over batches.

    g is the gradient of the loss by what the layer puts out, d what noise of EPSILON on the embeddings changes there,
    H d the change of g that comes with it. The most that d could do: with signs, all layers would have the same sum.
    """
    names = block_names(probe.model)
    found: dict[str, Parts] = {name: [] for name in names}
    generator = probe.generator()
    for i, ids in enumerate(probe.batches):
        probe.tell(i, len(probe.batches), "perturbed input")
        before, after = (states_and_gradients(probe.model, names, ids, noise) for noise in (None, generator))
        for name, (h, g), (h_after, g_after) in zip(names, before, after, strict=True):
            moved = (h_after - h).norm(dim=-1)
            turned = g.norm(dim=-1) + (g_after - g).norm(dim=-1) / 2
            found[name].append((predicted(ids) * float((turned * moved).sum(dtype=torch.float64)), predicted(ids)))
    probe.tell(len(probe.batches), len(probe.batches), "")
    return found


def states_and_gradients(
    model: PreTrainedModel, names: Sequence[str], ids: Tensor, noise: torch.Generator | None
) -> list[tuple[Tensor, Tensor]]:
    """(h, dL/dh), both [B, T, d], of what each of these decoder layers puts out; `noise` draws what is added to the
    embeddings, None: nothing is."""
    seen: list[Tensor] = []

    def embedded(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        output = output.detach()
        if noise is not None:
            drawn = torch.randn(output.shape, generator=noise, dtype=output.dtype).to(output.device)
            output = output + EPSILON * output.square().mean().sqrt() * drawn
        return output.requires_grad_(True)

    def leaving(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
        seen.append(first(output))

    embeddings: Any = model.get_input_embeddings()
    handles = [embeddings.register_forward_hook(embedded)]
    handles += [model.get_submodule(name).register_forward_hook(leaving) for name in names]
    try:
        gradients = torch.autograd.grad(loss(model, ids), seen)
    finally:
        for handle in handles:
            handle.remove()
    return [(h.detach(), g) for h, g in zip(seen, gradients, strict=True)]


def hessian(probe: Probe) -> Scores:
    """Mean of the Hessian's diagonal over a layer's weights, tr(H) / (N K), of the loss in nats per token.

    Hutchinson: v^T H v for v of +-1, VECTORS of them over all batches, all layers at once. Two passes backward each,
    with the graph of the first in memory. Raises ValueError for attention that has no second derivative.
    """
    found: Scores = {name: [] for name in probe.layers}
    each = -(-VECTORS // len(probe.batches))
    generator = probe.generator()
    with _twice_differentiable(probe.model):
        for i, ids in enumerate(probe.batches):
            probe.tell(i, len(probe.batches), "Hessian traces")
            traces = hessian_traces(probe.model, list(probe.layers.values()), ids, each, generator)
            for (name, layer), drawn in zip(probe.layers.items(), traces, strict=True):
                mean = sum(drawn) / len(drawn) / layer.weight.numel()
                found[name].append((predicted(ids) * mean, predicted(ids)))
    probe.tell(len(probe.batches), len(probe.batches), "")
    return found


def hessian_traces(
    model: PreTrainedModel, layers: Sequence[Any], ids: Tensor, probes: int, generator: torch.Generator
) -> list[list[float]]:
    """`probes` independent unbiased estimates of each layer's tr(H) on token ids [B, T]; 0 where no token comes by."""
    weights = [layer.weight for layer in layers]
    traces: list[list[float]] = [[0.0] * probes for _ in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        gradients = torch.autograd.grad(loss(model, ids), weights, create_graph=True, allow_unused=True)
        used = [i for i, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]
        outputs, inputs = [gradients[i] for i in used], [weights[i] for i in used]
        for probe in range(probes):
            v = [(torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).to(w.device, w.dtype) for w in inputs]
            products = torch.autograd.grad(outputs, inputs, v, retain_graph=probe + 1 < probes, allow_unused=True)
            for i, signs, product in zip(used, v, products, strict=True):
                if product is not None:
                    traces[i][probe] = float((signs * product).sum(dtype=torch.float64))
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return traces


@contextmanager
def _twice_differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Attention in its plain form inside: torch's fast ones have no second derivative."""
    kind = model.config._attn_implementation
    if kind not in _TWICE:
        raise ValueError(f"hessian: attention {kind!r} has no second derivative; load the model with {_TWICE[0]!r}")
    with sdpa_kernel(SDPBackend.MATH):
        yield
