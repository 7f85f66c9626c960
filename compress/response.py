"""What a layer's error does to the model, tried: prune it (PMPQ), round it (KL, error of its output), and look.

PMPQ is CPTQuant's (arXiv 2412.03599): the loss with a layer's smallest weights gone, minus the loss before, here on the
same batches and with a standard error (its authors take an accuracy, which moves in steps). The other two are what the
field compares with: KL of the output's distribution with one layer rounded, and the squared error of a layer's outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .probe import Parts, Probe, logits, loss, predicted
from .prune import prune
from .sites import swapped
from .spec import PruneSpec
from .walk import weight_of

# Shares of a layer's weights that PMPQ sets to zero, one after the other.
LEVELS = (0.1, 0.3, 0.5)
# Logits whose KL is computed at a time, in float64.
_LOGITS = 1 << 20

Scores = dict[str, Parts]
ByWidth = dict[str, dict[int, Parts]]


@torch.no_grad()
def pmpq(probe: Probe) -> Scores:
    """Rise of the loss, nats per token, mean over LEVELS, when the layer alone loses this share of its smallest |w|."""
    before = [float(loss(probe.model, ids)) for ids in probe.batches]
    found: Scores = {}
    for i, (name, layer) in enumerate(probe.layers.items()):
        probe.tell(i, len(probe.layers), name)
        rise = [0.0] * len(before)
        weight = weight_of(layer)
        for level in LEVELS:
            with swapped({layer: prune(name, weight, PruneSpec(level))}):
                for at, ids in enumerate(probe.batches):
                    rise[at] += (float(loss(probe.model, ids)) - before[at]) / len(LEVELS)
        found[name] = [(predicted(ids) * rise[at], predicted(ids)) for at, ids in enumerate(probe.batches)]
    probe.tell(len(probe.layers), len(probe.layers), "")
    return found


@torch.no_grad()
def kl(probe: Probe) -> ByWidth:
    """KL(p || p_b) per token, nats: p the model's distribution, p_b with this layer alone rounded to b bits."""
    found = _nothing(probe)
    total = len(probe.batches) * len(probe.layers)
    for i, ids in enumerate(probe.batches):
        dense = logits(probe.model, ids)
        for j, (name, layer) in enumerate(probe.layers.items()):
            probe.tell(i * len(probe.layers) + j, total, name)
            for bits, q in probe.rounded[name].items():
                with swapped({layer: q.dequantize()}):
                    found[name][bits].append((divergence(dense, logits(probe.model, ids)), ids.numel()))
    probe.tell(total, total, "")
    return found


def divergence(dense: Tensor, other: Tensor) -> float:
    """Sum over tokens of KL(softmax(dense) || softmax(other)), logits [..., V], in float64."""
    dense, other = dense.flatten(0, -2), other.flatten(0, -2)
    total = 0.0
    for p, q in zip(*(part.split(max(1, _LOGITS // part.shape[1])) for part in (dense, other)), strict=True):
        log_p, log_q = p.double().log_softmax(1), q.double().log_softmax(1)
        total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return total


def error(probe: Probe) -> ByWidth:
    """|x (W - Q_b)^T|^2 / |x W^T|^2 over all tokens x that the layer sees."""
    return _errors(probe, relative=True)


def error_absolute(probe: Probe) -> ByWidth:
    """|x (W - Q_b)^T|^2 per token x that the layer sees: layers with large outputs count for more."""
    return _errors(probe, relative=False)


@torch.no_grad()
def _errors(probe: Probe, relative: bool) -> ByWidth:
    found = _nothing(probe)

    def hook(name: str) -> Any:
        def look(module: Any, args: tuple[Tensor, ...]) -> None:
            x, W = args[0].flatten(0, -2), weight_of(module)  # [n, K], [N, K]
            denominator = float(F.linear(x, W).square().sum(dtype=torch.float64)) if relative else float(len(x))
            for bits, q in probe.rounded[name].items():
                off = float(F.linear(x, W - q.dequantize()).square().sum(dtype=torch.float64))
                above, below = found[name][bits][-1]
                found[name][bits][-1] = above + off, below + denominator

        return look

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in probe.layers.items()]
    try:
        for i, ids in enumerate(probe.batches):
            probe.tell(i, len(probe.batches), "errors of outputs")
            for widths in found.values():
                for parts in widths.values():
                    parts.append((0.0, 0.0))
            logits(probe.model, ids)
    finally:
        for handle in handles:
            handle.remove()
    probe.tell(len(probe.batches), len(probe.batches), "")
    return found


def _nothing(probe: Probe) -> ByWidth:
    return {name: {bits: [] for bits in widths} for name, widths in probe.rounded.items()}
