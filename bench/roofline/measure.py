"""What a model takes on a device, in the phases that a roofline is about: the pass over a prompt, and one more token.

Greedy, with the model's own KV cache, for random prompts without padding, and nothing around the forwards: no
`generate`, no end of an answer.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...backends.device import Device
from ...compress.checkpoint import max_length
from ..speed import held_bytes
from .counts import number_of
from .module_times import module_seconds

REPEATS = 3
# Decode steps of a request that are looked at module by module, in its middle.
STEPS = 16
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Measured:
    """Of requests of one shape. Medians over `repeats` requests after one to warm up; a spread is the interquartile
    range over the median.

    ttft_s        seconds from the prompt being on the device to the first token chosen: the phase "prefill"
    tpot_s        seconds of a decode step, for the whole batch: the phase "decode". In a request on the CPU the median
                  over its `steps` steps; on accelerators all of them over their number, as launches overlap
    tokens_per_s  batch / tpot_s
    context       tokens in the cache before a step, the median: steps meet prompt .. prompt + new - 2
    peak_memory_bytes   of tensors during a request, the model's own included
    modules       by phase, seconds that each module that was called takes by itself (module_times.py), in the model's
                  order; in "decode" the mean of a step, over up to STEPS steps around the median context
    remainder_s   by phase, the whole without hooks less all modules that do work: what launching, Python and functions
                  outside of modules take. Below 0 it is less than the noise
    """

    device: str
    dtype: str
    attention: str | None
    batch: int
    prompt: int
    new: int
    repeats: int
    seed: int
    threads: int
    ttft_s: float
    ttft_spread: float
    tpot_s: float
    tpot_spread: float
    tokens_per_s: float
    steps: int
    context: float
    peak_memory_bytes: int
    modules: Mapping[str, Mapping[str, float]]
    remainder_s: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Request:
    """ids [batch, prompt], on the device; options: of every forward."""

    model: Any  # transformers types what a forward gives as a tuple
    machine: Device
    ids: Tensor
    new: int
    options: Mapping[str, Any]

    def forward(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """The tokens chosen [batch, 1] after ids, and the cache with these."""
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self.options)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise ValueError(f"model: {type(self.model).__name__} gives no past_key_values to decode with")
        return out.logits[:, -1].argmax(-1, keepdim=True), cache

    def run(self) -> tuple[float, float]:
        """Seconds to the first token, and of a decode step."""
        self.machine.synchronize()
        with self.machine.timed() as first:
            token, cache = self.forward(self.ids)
        ttft = first.seconds
        if self.machine.kind != "cpu":
            with self.machine.timed() as all_:
                self._decode(token, cache, self.new - 1)
            return ttft, all_.seconds / (self.new - 1)
        steps = []
        for _ in range(self.new - 1):
            with self.machine.timed() as one:
                token, cache = self.forward(token, cache)
            steps.append(one.seconds)
        return ttft, statistics.median(steps)

    def modules(self) -> dict[str, dict[str, float]]:
        """By phase, own seconds of each module, of a step in "decode"."""
        held: list[tuple[Tensor, Any]] = []  # the last token and the cache
        prefill = module_seconds(self.model, self.machine, lambda: held.append(self.forward(self.ids)))
        watched = min(self.new - 1, STEPS)
        state = self._decode(*held.pop(), (self.new - 1 - watched) // 2)
        decode = module_seconds(self.model, self.machine, lambda: self._decode(*state, watched))
        return {"prefill": prefill, "decode": {name: seconds / watched for name, seconds in decode.items()}}

    def _decode(self, token: Tensor, cache: Any, steps: int) -> tuple[Tensor, Any]:
        for _ in range(steps):
            token, cache = self.forward(token, cache)
        return token, cache


def measure(
    model: nn.Module,
    device: Device,
    batch: int,
    prompt: int,
    new: int,
    repeats: int = REPEATS,
    seed: int = 0,
    working: Collection[str] | None = None,
) -> Measured:
    """`batch` random prompts of `prompt` tokens, `new` tokens after each, by a causal LM of transformers that is on
    `device`: dense, packed, behind an adapter. The model is left as it was.

    working   full names of the modules that do work of their own, which is not part of the remainder; None: those that
              call no other, hold weights themselves, or whose class is called ...Attention, as products of queries,
              keys and values are in no module below it. What else a layer does between its modules (residual sums,
              gates times values) is then remainder, as is the time of calling them

    Raises ValueError for a shape that cannot be measured, a model elsewhere or without a cache, an unknown name in
    `working`.
    """
    network: Any = model
    _check(network, device, {"batch": batch, "prompt": prompt, "new": new, "repeats": repeats})
    works = _working(model) if working is None else _known(model, working)
    request = _Request(network, device, _prompts(network, device, batch, prompt, seed), new, _options(network))
    with _serving(model):
        request.run()
        runs = [request.run() for _ in range(repeats)]
        watched = [request.modules() for _ in range(repeats)]
        # On the CPU every op is looked at: never while the clock runs.
        with device.peak_memory(held_bytes(network)) as memory:
            request.run()
    (ttft, ttft_spread), (tpot, tpot_spread) = (_middle(times) for times in zip(*runs))
    modules = {phase: _medians([each[phase] for each in watched]) for phase in PHASES}
    worked = {phase: sum(s for name, s in modules[phase].items() if name in works) for phase in PHASES}
    return Measured(
        device=device.name,
        dtype=number_of(network.dtype),
        attention=getattr(network.config, "_attn_implementation", None),
        batch=batch,
        prompt=prompt,
        new=new,
        repeats=repeats,
        seed=seed,
        threads=torch.get_num_threads(),
        ttft_s=ttft,
        ttft_spread=ttft_spread,
        tpot_s=tpot,
        tpot_spread=tpot_spread,
        tokens_per_s=batch / tpot,
        steps=new - 1,
        context=prompt + (new - 2) / 2,
        peak_memory_bytes=memory.peak_bytes,
        modules=modules,
        remainder_s={phase: whole - worked[phase] for phase, whole in zip(PHASES, (ttft, tpot))},
    )


def _check(model: Any, machine: Device, shape: Mapping[str, int]) -> None:
    for name, least in {"batch": 1, "prompt": 1, "new": 2, "repeats": 3}.items():
        if shape[name] < least:
            raise ValueError(f"{name}: {shape[name]} is below {least}")
    if shape["prompt"] + shape["new"] > (places := max_length(model)):
        asked = f"{shape['prompt']} + {shape['new']}"
        raise ValueError(f"prompt + new: {asked} tokens, the model has positions for {places}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != machine.torch_device:
            raise ValueError(f"model: {name} is on {tensor.device}, what is measured is {machine.name}")


def _known(model: nn.Module, working: Collection[str]) -> set[str]:
    """First names of these modules."""
    first = {module: name for name, module in model.named_modules()}
    every = {name: first[module] for name, module in model.named_modules(remove_duplicate=False)}
    if unknown := [name for name in working if name not in every]:
        raise ValueError(f"working: {unknown[0]!r} is no module of this model")
    return {every[name] for name in working}


def _working(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if next(module.children(), None) is None
        or any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        or type(module).__name__.endswith("Attention")
    }


def _prompts(model: Any, machine: Device, batch: int, prompt: int, seed: int) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(seed))
    return ids.to(machine.torch_device)


def _options(model: Any) -> dict[str, Any]:
    """The last position's logits alone, where the model's own forward can leave out the others."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's takes anything
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}


@contextmanager
def _serving(model: nn.Module) -> Iterator[None]:
    """Inside the block without gradients, and every module in eval mode; then each as it was."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, was in training:
            module.training = was


def _middle(values: Collection[float]) -> tuple[float, float]:
    """Median, and interquartile range over it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, (high - low) / middle


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """By module; one that a round did not call took 0 there."""
    names = dict.fromkeys(name for each in rounds for name in each)
    return {name: statistics.median(each.get(name, 0.0) for each in rounds) for name in names}
