"""One decoder block under calibration: its weights, what flows into it, what its linear layers see.

A model is calibrated block by block: hidden states that enter block 0 are captured once, every block turns them into
the next one's, and only one block's weights are needed at a time. Batches hold sequences of one length each, so that
there is no padding anywhere and every row counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .recipe import Recipe
from .rtn import QTensor
from .spec import QuantSpec

Linear = nn.Linear | Conv1D


@dataclass(frozen=True)
class Solved:
    """q       the quantized weight
    error   of the outputs on calibration data, relative: |x (W - Q)^T|^2 / |x W^T|^2; None without data
    damp    what was added to the Hessian's diagonal, times its mean
    note    what a reader has to know about this layer
    transform   of the layer's input, before it is rounded: q stands for the weight behind it
    clip    share of a token's range that its rounding keeps; None: as the recipe has it
    """

    q: QTensor
    error: float | None = None
    damp: float | None = None
    note: str = ""
    transform: nn.Module | None = None
    clip: float | None = None


@dataclass(frozen=True)
class Call:
    """How the model calls a block besides the hidden states, for batches of one shape."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Calls = dict[tuple[int, int], Call]  # by (B, T)


class Hidden:
    """Hidden states [B, T, d] of every batch of token ids [B, T], in memory or, with `path`, in one file."""

    def __init__(self, batches: Sequence[Tensor], width: int, dtype: torch.dtype, path: Path | None = None) -> None:
        self.shapes = [(ids.shape[0], ids.shape[1]) for ids in batches]
        self.width, self.dtype, self.path = width, dtype, path
        sizes = [rows * tokens * width * dtype.itemsize for rows, tokens in self.shapes]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self._kept: list[Tensor | None] = [None] * len(sizes)
        self._file = None if path is None else path.open("r+b" if path.exists() else "w+b", buffering=0)

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def nbytes(self) -> int:
        return self._starts[-1]

    def copy(self) -> Hidden:
        """A second one in memory."""
        other = copy.copy(self)
        other.path = other._file = None
        other._kept = [self.read(i) for i in range(len(self))]
        return other

    def read(self, i: int) -> Tensor:
        if self._file is None:
            kept = self._kept[i]
            assert kept is not None
            return kept
        found = torch.empty(*self.shapes[i], self.width, dtype=self.dtype)
        data = memoryview(found.view(torch.uint8).numpy().data).cast("B")
        self._file.seek(self._starts[i])
        while len(data):
            count = self._file.readinto(data)
            if not count:
                raise ValueError(f"{self.path}: ends before batch {i}; left by an interrupted run?")
            data = data[count:]
        return found

    def write(self, i: int, hidden: Tensor) -> None:
        hidden = hidden.detach().to("cpu", self.dtype).contiguous()
        if self._file is None:
            self._kept[i] = hidden
            return
        data = memoryview(hidden.view(torch.uint8).numpy().data).cast("B")
        self._file.seek(self._starts[i])
        while len(data):
            data = data[self._file.write(data) :]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Block:
    """What a calibrated method works on. Solvers may change `module` in place.

    name      of the block in the model, "model.layers.3"
    module    its dense weights
    linears   by name inside the block: those to be quantized
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        linears: dict[str, Linear],
        config: Any,
        calls: Calls,
        hidden: Hidden | _Some,
        dense: Hidden | _Some | None = None,
    ) -> None:
        self.name, self.module, self.linears, self.config = name, module, linears, config
        self._calls, self._hidden, self._dense = calls, hidden, dense

    def __len__(self) -> int:
        """Number of calibration batches."""
        return len(self._hidden)

    def drawn(self, picks: Sequence[int]) -> Block:
        """The same with weights of its own, and the batches of these numbers alone."""
        assert isinstance(self._hidden, Hidden)
        module = copy.deepcopy(self.module)
        linears: dict[str, Linear] = {name: module.get_submodule(name) for name in self.linears}  # type: ignore[misc]
        dense = _Some(self._dense, picks) if isinstance(self._dense, Hidden) else None
        return Block(self.name, module, linears, self.config, self._calls, _Some(self._hidden, picks), dense)

    def specs(self, recipe: Recipe) -> dict[str, QuantSpec]:
        """The format that `recipe` has for each linear layer, by name inside the block."""
        return {name: recipe.spec_of(f"{self.name}.{name}") for name in self.linears}

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def hidden(self, i: int, dense: bool = False) -> Tensor:
        """Input [B, T, d] of batch i: of the model compressed so far, or of the dense one (kept for GPTAQ only)."""
        source = self._dense if dense else self._hidden
        assert source is not None, "the dense path's hidden states are kept where options.alpha is above 0"
        return source.read(i).to(self.device)

    def forward(self, i: int, dense: bool = False, module: nn.Module | None = None) -> Tensor:
        """Output [B, T, d] of batch i; `module`: of another one in the block's place."""
        hidden = self.hidden(i, dense)
        call = self._calls[hidden.shape[0], hidden.shape[1]]
        return first((module or self.module)(hidden, *call.args, **call.kwargs))

    def inputs(self, names: Sequence[str], dense: bool = False) -> Iterator[dict[str, Tensor]]:
        """For every batch, rows [n, K] that the linear layers called `names` see; layers that share their input get the
        same storage. A layer that is not run (an expert without tokens) is left out. Later layers are not run."""
        for i in range(len(self)):
            with torch.no_grad():
                yield self._seen(i, names, dense)

    def _seen(self, i: int, names: Sequence[str], dense: bool) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG001
                x = inputs[0]
                seen[name] = x.reshape(-1, x.shape[-1])
                if len(seen) == len(names):
                    raise _Enough

            return hook

        handles = [self.linears[name].register_forward_pre_hook(keep(name)) for name in names]
        try:
            self.forward(i, dense)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen


class _Some:
    """Some of the batches of hidden states, for reading."""

    def __init__(self, hidden: Hidden, picks: Sequence[int]) -> None:
        self._hidden, self._picks = hidden, picks

    def __len__(self) -> int:
        return len(self._picks)

    def read(self, i: int) -> Tensor:
        return self._hidden.read(self._picks[i])


class _Enough(Exception):
    """What was wanted has been seen."""


def first(output: Any) -> Tensor:
    """The hidden states of what a block returns."""
    return output[0] if isinstance(output, tuple) else output


def decoder_list(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """(module that holds the decoder layers, its attribute's name, the layers); ValueError unless there is one such."""
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    # A mixture of experts may have lists inside its layers that are as long.
    inner = {id(module) for entry in found for layer in entry[2] for module in layer.modules()}
    outer = [entry for entry in found if id(entry[2]) not in inner]
    if len(outer) != 1:
        name = type(model).__name__
        raise ValueError(f"model: {len(outer)} lists of {count} decoder layers in {name}; exactly 1 is needed")
    return outer[0]


def block_names(model: nn.Module) -> list[str]:
    """Full names of the decoder layers, in order."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in decoder_list(model)[2]]


def enter(model: PreTrainedModel, batches: Sequence[Tensor], hidden: Hidden | None) -> list[Calls]:
    """Run what comes before the decoder layers on token batches int64 [B, T].

    Fills `hidden` with what enters the first layer (None: one batch of each shape is enough to learn the calls), and
    returns how the model calls each layer. The layers themselves are not run: they may be without weights.
    Raises ValueError for a model that hands data of the batch to later layers by another way than the hidden states.
    """
    layers = decoder_list(model)[2]
    calls: list[Calls] = [{} for _ in layers]
    device = next(model.get_input_embeddings().parameters()).device
    as_tuple = False
    shapes: set[tuple[int, ...]] = set()
    for i, ids in enumerate(batches):
        if hidden is None and tuple(ids.shape) in shapes:
            continue
        shapes.add(tuple(ids.shape))
        try:
            entered = _hollow(model, ids.to(device), list(layers), calls, as_tuple)
        except _Unpacked:
            as_tuple = True
            calls = [{} for _ in layers]
            entered = _hollow(model, ids.to(device), list(layers), calls, as_tuple)
        if hidden is not None:
            hidden.write(i, entered)
    return calls


class _Unpacked(Exception):
    """The model takes the first element of what a layer returns."""


def _hollow(model: PreTrainedModel, ids: Tensor, layers: list[nn.Module], calls: list[Calls], as_tuple: bool) -> Tensor:
    """Hidden states that enter the first layer; fills in `calls` for this shape."""
    entered: list[Tensor] = []

    def stand_in(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            hidden = kwargs.pop("hidden_states") if not args else args[0]
            if not entered:
                entered.append(hidden)
            elif hidden.shape != entered[0].shape:
                raise _Unpacked
            call = Call(args[1:], kwargs)
            known = calls[index].setdefault((ids.shape[0], ids.shape[1]), call)
            if not _same(known.args, call.args) or not _same(known.kwargs, call.kwargs):
                raise ValueError(
                    f"model: {type(model).__name__} hands its layers more of a batch than hidden states; "
                    "it cannot be calibrated block by block"
                )
            if index == len(layers) - 1:
                raise _Enough
            return (hidden,) if as_tuple else hidden

        return forward

    with _replaced(layers, [stand_in(index) for index in range(len(layers))]), torch.no_grad(), suppress(_Enough):
        model(input_ids=ids, use_cache=False)
    return entered[0]


@contextmanager
def _replaced(modules: Sequence[nn.Module], forwards: Sequence[Any]) -> Iterator[None]:
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return True
