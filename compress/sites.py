"""Layers that share an input, what that input looks like, and what the module around them makes of an error in them.

AWQ and SmoothQuant choose one scale per input channel for all layers that read it, from statistics of that input; AWQ
also runs the module around them again and again, on as many rows as tell candidates apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .block import Block, Linear, first
from .smooth import Smooth

# Rows kept of every input, spread over all batches. AWQ's authors compare on 128 sequences and cut ranges on 512 rows.
ROWS = 2048


@dataclass(frozen=True, eq=False)
class Site:
    """Linear layers to be quantized that share an input.

    pair     by what their input can be smoothed; None: by nothing
    parent   name inside the block of the module whose output is compared; a layer by itself, or "", the whole block
    """

    linears: dict[str, Linear]
    pair: Smooth | None
    parent: str

    @property
    def name(self) -> str:
        return next(iter(self.linears)) if self.pair is None else self.pair.name


def sites(block: Block, found: Sequence[Smooth]) -> list[Site]:
    """All of the block's linear layers, those that can be smoothed first; a pair without any of them is left out."""
    made = []
    for pair in found:
        linears = {name: block.linears[name] for name in pair.fed if name in block.linears}
        if linears:
            made.append(Site(linears, pair, pair.parent))
    smoothed = {name for site in made for name in site.linears}
    return made + [Site({name: layer}, None, name) for name, layer in block.linears.items() if name not in smoothed]


@dataclass
class Rows:
    """What is known of one input [n, K] over all calibration data.

    tokens   n
    total    [K] float32, sum of |x|
    peak     [K] float32, largest |x|
    gram     [m, K/m, K/m] float32, mean of x x^T inside each of m blocks of channels; None: not asked for
    sample   rows in the model's dtype, about ROWS of them
    """

    tokens: int
    total: Tensor
    peak: Tensor
    gram: Tensor | None
    sample: list[Tensor] = field(default_factory=list)

    @property
    def mean(self) -> Tensor:
        """[K] mean |x|."""
        return self.total / max(1, self.tokens)

    def add(self, x: Tensor, keep: int) -> None:
        """Rows x [n, K], of which `keep` go into the sample."""
        if not len(x):
            return
        self.sample.append(spread(x, keep).clone())
        x = x.float()
        self.tokens += len(x)
        self.total += x.abs().sum(0)
        self.peak = torch.maximum(self.peak, x.abs().amax(0))
        if self.gram is not None:
            blocks = x.view(len(x), *self.gram.shape[:2]).transpose(0, 1)  # [m, n, K/m]
            share = 1 / self.tokens
            self.gram.baddbmm_(blocks.mT, blocks, beta=1 - len(x) * share, alpha=share)

    def error(self, weight: Tensor, rounded: Tensor) -> float:
        """|x (W - Q)^T|^2 / |x W^T|^2 on the sample, for W and Q [N, K] that stand for the same layer."""
        x = torch.cat(self.sample).float()
        size = float((x @ weight.float().T).square().sum())
        return float((x @ (weight.float() - rounded).T).square().sum()) / size if size else 0.0


def spread(x: Tensor, count: int) -> Tensor:
    """`count` of the rows of x, evenly spaced; all where there are no more."""
    if len(x) <= count:
        return x
    return x[torch.arange(count, device=x.device) * len(x) // count]


Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def observe(
    block: Block, parents: Sequence[str] = (), moments: Mapping[str, int] | None = None
) -> tuple[dict[str, Rows], dict[str, list[Call]]]:
    """What the linear layers are given, and how the modules called `parents` are called, in one pass over all data.

    Layers that share an input share their Rows; one that is never run (an expert without tokens) is left out. Second
    moments are kept in `moments[name]` blocks. Calls are on about ROWS rows from all batches where tokens do not see
    each other in the module, else on whole sequences, about as many tokens, from batches evenly spaced.
    """
    known: dict[str, Rows] = {}
    taken: dict[str, _Calls] = {name: _Calls() for name in parents}
    called: dict[str, Call] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
            called[name] = args, kwargs

        return hook

    modules = {name: block.module.get_submodule(name) for name in parents}
    handles = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    try:
        for i, seen in enumerate(block.inputs(list(block.linears))):
            _note_rows(known, seen, moments, -(-ROWS // len(block)))
            batch = dict(called)
            called.clear()
            for name, call in batch.items():
                taken[name].take(modules[name], call, ROWS * (i + 1) // len(block))
            called.clear()
    finally:
        for handle in handles:
            handle.remove()
    return known, {name: calls.kept for name, calls in taken.items()}


def _note_rows(known: dict[str, Rows], seen: dict[str, Tensor], moments: Mapping[str, int] | None, keep: int) -> None:
    first_with: dict[tuple[int, torch.Size], str] = {}
    for name, x in seen.items():
        other = first_with.setdefault((x.data_ptr(), x.shape), name)
        if other != name:
            known[name] = known[other]
            continue
        if name not in known:
            known[name] = _nothing_yet(x, None if moments is None else moments[name])
        known[name].add(x, keep)


def _nothing_yet(x: Tensor, blocks: int | None) -> Rows:
    K = x.shape[1]
    zeros = torch.zeros(K, device=x.device)
    gram = None if blocks is None else torch.zeros(blocks, K // blocks, K // blocks, device=x.device)
    return Rows(0, zeros, zeros.clone(), gram)


@dataclass
class _Calls:
    """Calls of one module so far, with `tokens` tokens; alone: no token sees another one in it."""

    kept: list[Call] = field(default_factory=list)
    tokens: int = 0
    alone: bool | None = None

    def take(self, module: nn.Module, call: Call, due: int) -> None:
        """As much of one batch as makes it `due` tokens."""
        if self.tokens >= due:
            return
        args, kwargs = call
        if self.alone is None:
            self.alone = _tokens_alone(module, args, kwargs)
        x = next(_tensors(args, kwargs))
        if self.alone:
            rows = spread(x.reshape(-1, x.shape[-1]), due - self.tokens)
            self.kept.append(((rows[None].clone(),), {}))
            self.tokens += len(rows)
        else:
            count = min(len(x), -(-(due - self.tokens) // x.shape[1]))
            self.kept.append((_cut(args, len(x), count), _cut(kwargs, len(x), count)))
            self.tokens += count * x.shape[1]


def _tensors(*values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(*value)
        elif isinstance(value, dict):
            yield from _tensors(*value.values())


def _tokens_alone(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module takes one tensor [..., K] and does the same to each row whatever stands beside it."""
    tensors = list(_tensors(args, kwargs))
    if len(tensors) != 1 or kwargs or len(args) != 1 or tensors[0].dim() < 2:
        return False
    x = tensors[0].reshape(1, -1, tensors[0].shape[-1])[:, :64]
    there, back = first(module(x)), first(module(x.flip(1))).flip(1)
    return there.shape == back.shape and bool((there - back).norm() <= 1e-2 * there.norm())


def _cut(value: Any, batch: int, count: int) -> Any:
    """The first `count` sequences of all that has a batch dimension."""
    if isinstance(value, Tensor):
        return value[:count] if value.dim() > 1 and len(value) == batch else value
    if isinstance(value, tuple | list):
        return type(value)(_cut(part, batch, count) for part in value)
    if isinstance(value, dict):
        return {key: _cut(part, batch, count) for key, part in value.items()}
    return value


class Loss:
    """Mean squared change of a module's output when weights in it are replaced (AWQ, equation 4)."""

    def __init__(self, parent: nn.Module, called: Sequence[Call]) -> None:
        self.parent, self.called = parent, called
        self.targets = [first(parent(*args, **kwargs)) for args, kwargs in called]

    def __call__(self, weights: Mapping[Linear, Tensor]) -> float:
        """weights: linear layer -> [N, K] float32, whichever way the layer keeps it."""
        total, count = 0.0, 0
        with swapped(weights):
            for (args, kwargs), target in zip(self.called, self.targets, strict=True):
                off = first(self.parent(*args, **kwargs)).float() - target.float()
                total += float(off.square().sum())
                count += off.numel()
        return total / max(1, count)


@contextmanager
def swapped(weights: Mapping[Linear, Tensor]) -> Iterator[None]:
    """Inside the block these layers multiply with other weights [N, K], rounded to their dtype."""
    before = {layer: layer.weight.data for layer in weights}
    try:
        for layer, weight in weights.items():
            kept = weight.T if isinstance(layer, Conv1D) else weight
            layer.weight.data = kept.to(before[layer].dtype)
        yield
    finally:
        for layer, data in before.items():
            layer.weight.data = data
