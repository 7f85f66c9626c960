"""What each module of a model takes by itself: by hooks around its calls, without the time of the modules it calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from ...backends.accelerator import module_of
from ...backends.device import Device

# Calls of an empty module that tell what hooks cost: medians over rounds, as others use the machine too.
ROUNDS, CALLS = 15, 100

# What happened, in order: a module's first name as it is entered, None as one is left, and a mark of the time.
Tape = list[tuple[str | None, Any]]


class Marks(NamedTuple):
    """make: marks now, on the device's own clock, without waiting for it; seconds: between two marks, once the device
    is done."""

    make: Callable[[], Any]
    seconds: Callable[[Any, Any], float]


class HookCost(NamedTuple):
    """Seconds that a pair of hooks adds to one call: between its marks, and around them, in the caller's time."""

    inside: float
    outside: float


HOST = Marks(time.perf_counter, lambda start, end: end - start)


def module_seconds(model: nn.Module, machine: Device, work: Callable[[], object]) -> dict[str, float]:
    """Seconds that every module called by `work` took by itself there, its calls summed: by full name, in the order of
    `model.named_modules()`, where one with two names has the first. What other hooks of a module do is its own time.

    On the CPU hooks take longer than many a norm of a small model. What a pair of them costs around a module that does
    nothing is measured first and taken off for every call, from the module and from its caller, never to below 0. The
    call itself stays with the caller: an empty module takes 0. In a model caches are colder than there, and about as
    much again stays: a tenth of a step of 2 ms, little of one of 30 ms.

    On accelerators a mark is an event in the stream, read at the end, and nothing is taken off: where the device is
    behind the host, hooks delay nothing. Where it waits for launches, a module's time contains its own, and that of the
    events.
    """
    marks = _marks(machine)
    cost = hook_cost() if machine.kind == "cpu" else HookCost(0.0, 0.0)
    names = {module: name for name, module in model.named_modules()}
    tape: Tape = []
    with _hooked(names, marks, tape):
        work()
    machine.synchronize()
    own = _own(tape, marks, cost)
    return {name: own[name] for name in names.values() if name in own}


def _marks(machine: Device) -> Marks:
    if machine.kind == "cpu":
        return HOST
    module = module_of(machine.torch_device)
    stream = module.current_stream(machine.torch_device)

    def make() -> Any:
        event = module.Event(enable_timing=True)
        event.record(stream)
        return event

    return Marks(make, lambda start, end: start.elapsed_time(end) / 1e3)


@contextmanager
def _hooked(names: Mapping[nn.Module, str], marks: Marks, tape: Tape) -> Iterator[None]:
    """Inside the block every call of these modules is on the tape."""
    make, append = marks.make, tape.append

    def entering(name: str) -> Callable[..., None]:
        return lambda *_: append((name, make()))

    def leaving(*_: object) -> None:
        append((None, make()))

    handles = []
    try:
        for module, name in names.items():
            # Around the hooks that are there already: some of them transform the input, which is the module's work.
            handles.append(module.register_forward_pre_hook(entering(name), prepend=True))
            handles.append(module.register_forward_hook(leaving))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own(tape: Tape, marks: Marks, cost: HookCost) -> dict[str, float]:
    own: dict[str, float] = {}
    calls: list[tuple[str, Any]] = []  # those not left yet: name, mark at the start
    inner = [0.0]  # seconds of what each of these has called, hooks included; the first: of what nobody called
    for entered, mark in tape:
        if entered is not None:
            calls.append((entered, mark))
            inner.append(0.0)
            continue
        name, start = calls.pop()
        taken = marks.seconds(start, mark)
        own[name] = own.get(name, 0.0) + taken - inner.pop() - cost.inside
        inner[-1] += taken + cost.outside
    assert not calls, "a module was entered and never left"
    return {name: max(seconds, 0.0) for name, seconds in own.items()}


def hook_cost() -> HookCost:
    """On the CPU, measured now."""
    empty, value = nn.Identity(), 0.0

    def call() -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            empty(value)
        return (time.perf_counter() - start) / CALLS

    bare, hooked, inside = [], [], []
    for _ in range(ROUNDS):
        bare.append(call())
        tape: Tape = []
        with _hooked({empty: ""}, HOST, tape):
            hooked.append(call())
        inside.append(statistics.median(end - start for (_, start), (_, end) in zip(tape[::2], tape[1::2])))
    within = statistics.median(inside)
    return HookCost(within, max(statistics.median(hooked) - statistics.median(bare) - within, 0.0))
