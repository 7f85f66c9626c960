"""The CPU: what it is, and how time and memory are measured on it."""

from __future__ import annotations

import os
import platform
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cpu_peaks import cpu_peaks
from .device import PEAKS, Peak
from .memory import available_memory, total_memory


class CpuDevice:
    """The processor, and as many of its cores as this process may use."""

    name = kind = "cpu"
    float64 = True
    torch_device = torch.device("cpu")

    def info(self) -> dict[str, Any]:
        return {
            "name": _name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": total_memory(),
        }

    def free_memory(self) -> int:
        return available_memory()

    def synchronize(self) -> None:
        """Nothing to wait for: an op on a CPU returns when it is done."""

    def timed(self) -> Stopwatch:
        return Stopwatch()

    def peak_memory(self, held: int = 0) -> PeakMemory:
        return PeakMemory(held)

    def peaks(self) -> dict[str, Peak | None]:
        """Derived from its instructions, its cores that this process may use and its clock (cpu_peaks.py); what its
        memory gives it does not tell."""
        return dict.fromkeys(PEAKS) | cpu_peaks()


def cpu_flags() -> frozenset[str]:
    """Instruction set extensions as /proc/cpuinfo names them; empty where there is no such file."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features") or "").split())


def _name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str | None:
    """Of the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    values = (value for name, _, value in (line.partition(":") for line in lines) if name.strip() == field)
    return next(values, "").strip() or None


class Stopwatch:
    """seconds: of a block, on the clock that only goes forward."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start


class PeakMemory(TorchDispatchMode):
    """Peak bytes of live tensors made inside the block, plus those held before it (`held`, e.g. a model's weights).

    The same figure that an accelerator's allocator reports, without the memory of the libraries themselves; scratch
    space inside an op is not seen. Deterministic, unlike the resident set of a process.
    """

    def __init__(self, held: int) -> None:
        super().__init__()
        self._live = held
        self._seen: set[int] = set()
        self.peak_bytes = held

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor, inputs)
        return result

    def _count(self, tensor: torch.Tensor, inputs: set[int]) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in inputs or address in self._seen:  # a view, or written in place
            return
        self._seen.add(address)
        self._live += size
        self.peak_bytes = max(self.peak_bytes, self._live)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self._live -= size
