"""The CPU: what it is, and how memory is measured on it."""

from __future__ import annotations

import os
import platform
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def cpu_info() -> dict[str, Any]:
    """Processor name, usable cores, threads torch uses, memory in bytes (the cgroup's limit where there is one)."""
    return {
        "name": _name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
    }


def _name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        return min(total, int(text))
    return total


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
