"""The devices of a machine: what each is, how time and memory are measured on it, and how one is chosen.

Naming a device takes no torch; it loads when one is looked for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

# What `peaks` tells: arithmetic in operations a second (a product and its sum are two), "memory" in bytes a second.
PEAKS = ("float32", "float16", "bfloat16", "int8", "memory")


@dataclass(frozen=True)
class Peak:
    """What a device could do at most, per second, and where the number comes from."""

    value: float
    source: str


class Timer(Protocol):
    """seconds: of the block that it was entered for; waits until the device is done with that block."""

    @property
    def seconds(self) -> float: ...


class Memory(Protocol):
    """peak_bytes: most bytes of tensors that there were at once, during the block and held before it."""

    peak_bytes: int


class Device(Protocol):
    """One device. name: as torch writes it, "cpu" or "cuda:0"; kind: "cpu", "cuda" or "npu"; float64: whether it
    computes in it, as quantizers do."""

    name: str
    kind: str
    float64: bool

    @property
    def torch_device(self) -> torch.device: ...

    def info(self) -> dict[str, Any]:
        """What it is, the same at any time; JSON values, among them `name` and `memory_bytes`."""

    def free_memory(self) -> int:
        """Bytes that this process can still take."""

    def synchronize(self) -> None:
        """Wait until everything that was asked of it is done."""

    def timed(self) -> AbstractContextManager[Timer]:
        """Time a block."""

    def peak_memory(self, held: int = 0) -> AbstractContextManager[Memory]:
        """Watch the memory of a block; held: bytes of tensors made before it, where the device does not know them."""

    def peaks(self) -> dict[str, Peak | None]:
        """By name in PEAKS; None: not known."""


def parse_device(spec: str) -> tuple[str, int]:
    """(kind, index) of "auto", "cpu", "cuda" or "npu" (the first), "cuda:N" or "npu:N", without torch; ValueError for
    another."""
    if not (found := re.fullmatch(r"(auto|cpu|cuda|npu)|(cuda|npu):(\d+)", spec)):
        raise ValueError(f"device: {spec!r} is not one of auto, cpu, cuda, cuda:N, npu, npu:N")
    return found[1] or found[2], int(found[3] or 0)


def detect() -> list[Device]:
    """Every device that can be used here, the CPU first."""
    from . import ascend, cuda
    from .cpu import CpuDevice

    return [
        CpuDevice(),
        *map(cuda.CudaDevice, range(cuda.count())),
        *map(ascend.AscendDevice, range(ascend.count())),
    ]


def refusals() -> dict[str, tuple[str, str]]:
    """Kinds of devices of which there is none that works: why not, and what would help."""
    from . import ascend, cuda

    found = {"cuda": cuda.refusal(0), ascend.NAME: ascend.refusal(0)}
    return {kind: why for kind, why in found.items() if why is not None}


def device(spec: str = "auto", say: Callable[[str], None] = _log.info) -> Device:
    """The device `spec`; "auto" is the first CUDA device that works, else the first NPU, else the CPU, and tells `say`
    which and why.

    Raises ValueError where `spec` is no device's name, or that device is not there: what is, and what would help.
    """
    from . import ascend, cuda
    from .cpu import CpuDevice

    kind, index = parse_device(spec)
    if kind == "cpu":
        return CpuDevice()
    if kind == "auto":
        return _best(say)
    why = (cuda if kind == "cuda" else ascend).refusal(index)
    if why:
        there = ", ".join(each.name for each in detect())
        raise ValueError(f"device: {spec!r} cannot be had: {why[0]}. Here are: {there}. {why[1]}")
    return cuda.CudaDevice(index) if kind == "cuda" else ascend.AscendDevice(index)


def _best(say: Callable[[str], None]) -> Device:
    from . import ascend, cuda
    from .cpu import CpuDevice

    missing = refusals()
    if "cuda" not in missing:
        say(f"auto took cuda:0, the first of {cuda.count()} that torch sees")
        return cuda.CudaDevice(0)
    if ascend.NAME not in missing:
        say(f"auto took npu:0, the first of {ascend.count()} that torch-npu sees")
        return ascend.AscendDevice(0)
    # Who has the wheel wants to know about the NPU; who has not, has none.
    said = [missing["cuda"][0]] + ([missing[ascend.NAME][0]] if ascend.installed() else [])
    say("auto took cpu: " + "; ".join(said))
    return CpuDevice()
