"""What a streamed run will take, before it starts: memory, disk and seconds.

Sizes follow from shapes. What cannot be read off them is tried: a data-free method on a few rows of the first block's
layers, a calibrated one on the whole first block with the first batches of its data, in this process, by the very code
that will do the work. A run needs no more memory for many blocks and batches than for one; its time is a sum over both.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..backends.memory import peak_rss, reset_peak, rss
from .block import Block, Hidden, enter
from .footprint import Machine, Prediction, steady_heap, trim_heap
from .prune import cut_of
from .recipe import Recipe
from .sequential import compress_block_, make_block, needs_dense, round_
from .shards import fill_, hollow_
from .spec import QuantSpec
from .stream import Job, Unit
from .walk import compressed_weight, features, weight_of, within

# Tokens that a trial sees, where there are so many; methods that look at a sample of the data look at that many.
_TOKENS = 2048
# Weights that a data-free trial looks at, and the seconds it may take per width.
_WEIGHTS, _BUDGET = 1 << 17, 1.0
# Iterations of learned rounding that are tried.
_FEW, _MORE = 2, 6
# Beside the tensors: a buffer of 16 MiB in which files are compared, and what slices of rows take.
_BUFFER, _SLICES = 16 << 20, 6 << 20
# A part of the output: its header and journal, files made, renamed and synced. Seconds on any disk that syncs.
_PART_SECONDS = 0.06
# Bytes of code that writing and checking a part runs for the first time, where no trial has.
_CODE = 8 << 20
# Bytes of a header's entry for one tensor.
_ENTRY = 120
# Tokens with which a small model is compared with what was written; seconds to make a model of its files, and bytes of
# code that is run for the first time then.
_PROBE, _LOAD_SECONDS, _LOAD_BYTES = 64, 0.5, 12 << 20


def plan(job: Job, machine: Machine) -> Prediction:
    """Predict the peak of resident memory of this process, the most bytes under the output's parent at any time, and
    the seconds of `compress_streamed(job, ...)`, on a machine as busy as it is now.

    Takes the time of a block for calibrated methods (of 200 iterations of learned rounding, that of 8), a few seconds
    for the others, and less memory than the run. Raises ValueError where the trial does.
    """
    steady_heap()
    trial = _tried(job) if job.recipe.calibrated else _rounded(job)
    trim_heap()
    sizes = [_Size.of(job, unit) for unit in job.units]
    peaks = [rss() + max(size.peak for size in sizes) + (0 if job.recipe.calibrated else _CODE), trial.peak]
    final = sum(size.packed for size in sizes)
    entered = _outside_bytes(job) if job.recipe.calibrated or job.small else 0
    if entered:
        peaks.append(rss() + entered + _SLICES)
    seconds = trial.seconds + sum(size.dense for size in sizes) / trial.read + entered / trial.read
    seconds += _cut_seconds(job, trial.read)
    seconds += final / machine.write + _PART_SECONDS * len(job.units)
    if job.recipe.calibrated:  # the others are in the trial
        beside = [name for name in job.layers if not within(name, job.blocks)]
        rate = machine.clip if getattr(job.recipe.options, "clip", False) else machine.quantize
        seconds += sum(_numel(job, name) for name in beside) / rate
    if job.small:
        # Loaded whole, and run twice; before that block by block. Layers are dequantized one at a time.
        largest = max((4 * _numel(job, name) for name in job.layers), default=0)
        logits = 4 * _PROBE * job.model.config.get_text_config().vocab_size
        peaks.append(rss() + final + largest + 2 * logits + _LOAD_BYTES)
        run = 2 * _PROBE * job.parameters / machine.gemm_float32 + 2 * 4 * job.parameters / machine.copy
        seconds += _LOAD_SECONDS + final / machine.copy + 3 * run
    return Prediction(max(peaks), final + 2 * _hidden_bytes(job), seconds)


@dataclass(frozen=True)
class _Trial:
    """seconds   of the methods on all blocks and all data, reading and writing apart
    peak      bytes that this process had at most
    read      bytes a second from the checkpoint
    """

    seconds: float
    peak: int
    read: float


# Data-free methods: seconds per weight, by width.


def _rounded(job: Job) -> _Trial:
    """By rounding a few rows of one layer of every width."""
    widths: dict[int, str] = {}
    weights: dict[int, int] = {}
    for name in job.layers:
        layer: Any = job.model.get_submodule(name)
        K = features(layer)
        widths.setdefault(K, name)
        weights[K] = weights.get(K, 0) + _numel(job, name)
    seconds = 0.0
    read, taken = 0, 0.0
    for K, name in widths.items():
        module: Any = job.model.get_submodule(name)
        start = time.perf_counter()
        fill_(module, name, job.mapping, job.reader)
        taken += time.perf_counter() - start
        read += sum(tensor.nbytes for tensor in module.state_dict().values())
        weight = weight_of(module.to(job.device))[: max(1, _WEIGHTS // K)].clone()
        hollow_(module)
        recipe = _by_layer(job.recipe)
        compressed_weight(name, weight, recipe)  # what cannot be is said by the layer's name
        seconds += weights[K] * _mean_seconds(weight, recipe) / weight.numel()
    return _Trial(seconds, rss(), read / taken)


def _mean_seconds(weight: Tensor, recipe: Recipe) -> float:
    """Of the method on `weight`. A mean over a second and more: what else runs on this machine takes its share, which a
    median of calls of milliseconds would not show."""
    _round(weight, recipe)
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < _BUDGET:
        _round(weight, recipe)
        count += 1
    return spent / count


def _round(weight: Tensor, recipe: Recipe) -> None:
    N, K = weight.shape
    layer = nn.Linear(K, N, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    round_(nn.ModuleDict({"layer": layer}), "layer", layer, recipe)


def _by_layer(recipe: Recipe) -> Recipe:
    """The same, with every layer by itself where the recipe compares all of them: what is done to one takes as long."""
    if recipe.prune is None or recipe.prune.compared != "global":
        return recipe
    return replace(recipe, prune=replace(recipe.prune, scope="layer"))


def _cut_seconds(job: Job, read: float) -> float:
    """Of finding where the whole model is cut, by the pace of a few rows of one layer."""
    prune = job.recipe.prune
    if prune is None or prune.pattern is not None or prune.compared != "global":
        return 0.0
    name = job.layers[0]
    module: Any = job.model.get_submodule(name)
    fill_(module, name, job.mapping, job.reader)
    weight = weight_of(module.to(job.device))[: max(1, _WEIGHTS // features(module))].clone()
    hollow_(module)
    cut_of(lambda: iter([(name, weight)]), weight.numel(), weight.dtype, prune)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _BUDGET / 4:
        cut_of(lambda: iter([(name, weight)]), weight.numel(), weight.dtype, prune)
        count += 1
    each = (time.perf_counter() - start) / (count * weight.numel())
    numbers = sum(_numel(job, name) for name in job.layers)
    return numbers * (each + 3 * job.model.dtype.itemsize / read)


# Calibrated methods: a block with a few batches, and what every further batch takes.


def _tried(job: Job) -> _Trial:
    """By compressing the first block of each kind."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for name in job.blocks:
        state = job.model.get_submodule(name).state_dict()
        kinds.setdefault(tuple((key, *tensor.shape) for key, tensor in state.items()), []).append(name)
    batches = _chosen(job.batches)
    calls = _calls(job, batches)
    seconds, peak, read = 0.0, 0, float("inf")
    for names in kinds.values():
        number = job.blocks.index(names[0])
        found = _try(job, number, batches, calls[number])
        seconds += len(names) * found.seconds
        peak, read = max(peak, found.peak), min(read, found.read)
    if job.recipe.method == "signround":  # keeps the block's outputs on all batches
        peak += (sum(map(Tensor.numel, job.batches)) - sum(map(Tensor.numel, batches))) * _token_bytes(job)
    return _Trial(seconds, peak, read)


def _chosen(batches: Sequence[Tensor]) -> list[Tensor]:
    """The largest batches that have _TOKENS tokens together, one more, and the smallest."""
    order = sorted(batches, key=Tensor.numel, reverse=True)
    count = 1
    while count < len(order) and sum(map(Tensor.numel, order[:count])) < _TOKENS:
        count += 1
    return [*order[: count + 1], *order[max(count + 1, len(order) - 1) :]]


def _calls(job: Job, batches: list[Tensor]) -> list[Any]:
    outside = _outside(job)
    for name in outside:
        module = job.model.get_submodule(name)
        fill_(module, name, job.mapping, job.reader)
        module.to(job.device)
    try:
        return enter(job.model, batches, None)
    finally:
        for name in outside:
            hollow_(job.model.get_submodule(name))
        trim_heap()


def _try(job: Job, number: int, batches: list[Tensor], calls: Any) -> _Trial:
    """Compress block `number` with random hidden states, and leave it hollow."""
    if job.recipe.method == "signround":
        few, more = (_try_once(job, number, batches, calls, iterations) for iterations in (_FEW, _MORE))
        each = max(0.0, (more.seconds - few.seconds) / (_MORE - _FEW))
        return replace(more, seconds=few.seconds + (job.recipe.options.iterations - _FEW) * each)
    return _try_once(job, number, batches, calls)


def _try_once(job: Job, number: int, batches: list[Tensor], calls: Any, iterations: int | None = None) -> _Trial:
    name, recipe = job.blocks[number], _by_layer(job.recipe)
    if iterations is not None:
        recipe = replace(recipe, options=replace(recipe.options, iterations=iterations))
    trim_heap()
    reset_peak()
    original = dict(job.model.get_submodule(name).named_modules())
    with tempfile.TemporaryDirectory(prefix="remanence-plan-") as scratch:
        kinds = ("before", "after", "dense", "dense-after") if needs_dense(recipe) else ("before", "after")
        states = [Hidden(batches, _width(job), job.model.dtype, Path(scratch) / kind) for kind in kinds]
        generator = torch.Generator().manual_seed(0)
        for i, ids in enumerate(batches):
            hidden = torch.randn(*ids.shape, _width(job), generator=generator, dtype=torch.float32)
            for before in states[::2]:
                before.write(i, hidden)
        del hidden
        start = time.perf_counter()
        module = job.model.get_submodule(name)
        fill_(module, name, job.mapping, job.reader)
        module.to(job.device)
        size = sum(tensor.nbytes for tensor in module.state_dict().values())
        read = size / (time.perf_counter() - start)
        dense: Sequence[Hidden | None] = states[2:] or (None, None)
        block = make_block(job.model, name, set(job.layers), calls, states[0], dense[0], _Timed)
        assert isinstance(block, _Timed)
        start = time.perf_counter()
        compress_block_(block, recipe, states[1], dense[1])
        seconds = time.perf_counter() - start
        for state in states:
            state.close()
    _restore(job.model, name, original)
    peak = peak_rss()
    seconds += _further(block.seconds, batches, job.batches)
    return _Trial(seconds, peak, read)


def _restore(model: nn.Module, name: str, original: dict[str, nn.Module]) -> None:
    """Put the modules back that were replaced by packed ones, without their weights."""
    block = model.get_submodule(name)
    for inner, module in original.items():
        if inner:
            parent, _, leaf = inner.rpartition(".")
            setattr(block.get_submodule(parent), leaf, module)
    hollow_(block)
    trim_heap()


class _Timed(Block):
    """Counts the seconds that go into each batch: running it, and what is done with what layers see of it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seconds = [0.0] * len(self)
        self._counting = False

    def forward(self, i: int, dense: bool = False, module: nn.Module | None = None) -> Tensor:
        if self._counting:
            return super().forward(i, dense, module)
        start = time.perf_counter()
        output = super().forward(i, dense, module)
        self.seconds[i] += time.perf_counter() - start
        return output

    def inputs(self, names: Sequence[str], dense: bool = False) -> Iterator[dict[str, Tensor]]:
        if self._counting:
            yield from super().inputs(names, dense)
            return
        try:
            for i in range(len(self)):
                start, self._counting = time.perf_counter(), True
                with torch.no_grad():
                    seen = self._seen(i, names, dense)
                yield seen
                del seen
                self._counting = False
                self.seconds[i] += time.perf_counter() - start
        finally:
            self._counting = False


def _further(seconds: list[float], tried: list[Tensor], batches: Sequence[Tensor]) -> float:
    """Of the batches that were not tried: a share each, and a share per token, as the tried ones but the first took
    (some methods look at the first one more often)."""
    if len(batches) == len(tried):
        return 0.0
    points = [(ids.numel(), taken) for ids, taken in zip(tried, seconds, strict=True)][1:]
    (most, slow), (least, fast) = points[0], points[-1]
    each_token = max(0.0, (slow - fast) / (most - least)) if most > 2 * least else slow / most
    each = max(0.0, slow - each_token * most)
    left = sum(map(Tensor.numel, batches)) - sum(map(Tensor.numel, tried))
    return each * (len(batches) - len(tried)) + each_token * left


# Sizes.


@dataclass(frozen=True)
class _Size:
    """Bytes of a unit as it is read, as it is written, and the most that are there on the way, without data."""

    dense: int
    packed: int
    peak: int

    @classmethod
    def of(cls, job: Job, unit: Unit) -> _Size:
        tensors = {
            f"{name}.{key}": tensor
            for name in unit.modules
            for key, tensor in job.model.get_submodule(name).state_dict().items()
        }
        stored = [tensor.nbytes + _ENTRY for name, tensor in tensors.items() if name not in job.repeated]
        live = dense = sum(tensor.nbytes for tensor in tensors.values())
        cast = any(job.reader.dtype(job.mapping[name]) != tensor.dtype for name, tensor in tensors.items())
        packed, peak = sum(stored), live + _BUFFER * cast
        for layer in job.layers if not (job.recipe.calibrated and unit.block is not None) else ():
            weight = tensors.get(f"{layer}.weight")
            if weight is None:
                continue
            work, kept = _layer(job.recipe, layer, weight, isinstance(job.model.get_submodule(layer), Conv1D))
            peak = max(peak, live + work + _SLICES)
            live += kept - weight.nbytes
            packed += kept - weight.nbytes + 2 * _ENTRY
        if job.recipe.calibrated and unit.block is not None:
            for layer in job.layers:
                if f"{layer}.weight" in tensors:
                    weight = tensors[f"{layer}.weight"]
                    packed += _layer(job.recipe, layer, weight, False)[1] - weight.nbytes + 2 * _ENTRY
        return cls(dense, packed, max(peak, live + _BUFFER + _SLICES))


def _layer(recipe: Recipe, name: str, weight: Tensor, transposed: bool) -> tuple[int, int]:
    """Bytes beside weight [N, K] (Conv1D: [K, N]) while it is compressed, and of what stays."""
    N, K = weight.shape[::-1] if transposed else weight.shape
    pruning = 0
    if recipe.prune is not None:
        # A copy, what its weights count, what the search for the threshold takes (values and their places), and masks.
        counted = max(weight.itemsize, 4 if recipe.prune.method == "random" else 0)
        pruning = weight.numel() * (weight.itemsize + 2 * counted + 8 + 3)
    if recipe.spec is None:
        return pruning, weight.nbytes
    kept = _packed(recipe.spec_of(name), N, K)
    return max(pruning, N * K + kept + (weight.nbytes if transposed or pruning else 0)), kept


def _packed(spec: QuantSpec, N: int, K: int) -> int:
    groups = spec.groups(K)
    zeros = 0 if spec.symmetric else groups * 4 * -(-N * spec.bits // 32)
    return N * 4 * -(-K * spec.bits // 32) + 2 * N * groups + zeros + 16


def _outside(job: Job) -> list[str]:
    """Modules that are needed to enter the first block."""
    head = job.model.get_output_embeddings()
    names = [name for unit in job.units if unit.block is None for name in unit.modules]
    return [name for name in names if job.model.get_submodule(name) is not head]


def _outside_bytes(job: Job) -> int:
    modules = [job.model.get_submodule(name) for name in _outside(job)]
    return sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())


def _hidden_bytes(job: Job) -> int:
    """Of one file of hidden states, or two where the dense model's are kept beside."""
    return sum(map(Tensor.numel, job.batches)) * _token_bytes(job) * (2 if needs_dense(job.recipe) else 1)


def _token_bytes(job: Job) -> int:
    return _width(job) * job.model.dtype.itemsize


def _width(job: Job) -> int:
    return job.model.config.get_text_config().hidden_size


def _numel(job: Job, name: str) -> int:
    weight: Any = job.model.get_submodule(name).weight
    return weight.numel()
