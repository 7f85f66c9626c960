"""What a run will need and what it took: memory, disk and time, measured on this machine.

The building blocks of a prediction that is printed before a long run starts; what a method needs of them is its own
affair.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_M_MMAP_THRESHOLD = -3  # mallopt's own number
_GIB = 2**30


def steady_heap(threshold: int = 2**20) -> bool:
    """Have glibc take every allocation from `threshold` bytes on from the system, and give it back when it is freed.

    By default the first freed tensor of up to 32 MiB raises that threshold to its own size; from then on such tensors
    lie on the heap between small ones that live on, and freeing them frees nothing: twelve blocks of 14 tensors of
    1-28 MiB, each freed before the next, left 423 MiB resident and 315 MiB of addresses taken, with this 12 and 6 MiB.
    The price is that fresh pages are cleared: sums of 8 MiB tensors take 4.1 instead of 0.6 ms, products of matrices no
    longer. Where only resident memory is limited, `trim_heap` after every block does the same without that price (but
    the addresses stay taken: 368 MiB).

    Call it before anything large is loaded: what the heap has by then goes on being used.
    False where the C library is another one.
    """
    return _libc("mallopt", _M_MMAP_THRESHOLD, threshold)


def trim_heap() -> bool:
    """Give the heap's free pages back to the system; False where the C library is not glibc."""
    return _libc("malloc_trim", 0, fails=-1)


@dataclass(frozen=True)
class Machine:
    """What this machine does per second, at the number of threads it was measured with.

    gemm_float32, gemm   floating-point operations of a matrix product, in float32 and in the model's dtype
    copy                 bytes copied in memory
    read                 bytes from the disk into a fresh tensor
    write                bytes to the disk, synced, read back and compared, as `shards.ShardWriter` does
    quantize, clip       weights rounded to nearest, 4 bit in groups of 128: without and with the search of a range
    """

    gemm_float32: float
    gemm: float
    copy: float
    read: float
    write: float
    quantize: float
    clip: float
    threads: int


def measure_machine(directory: Path | str, dtype: torch.dtype = torch.float32) -> Machine:
    """Measure it, in at most two seconds on an idle machine and with 150 MB of memory; `directory` is where the output
    will be written.

    The median of repeats: enough to foretell a time within a factor of 1.5, no benchmark.
    """
    from .knobs import RTN
    from .rtn import rtn
    from .spec import QuantSpec

    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))

    def rounding(rows: int, clip: bool) -> float:
        options, w = RTN(clip=clip), weight[:rows]
        return w.numel() / _seconds(lambda: rtn(w, QuantSpec(4, 128), torch.float16, options), 0.2)

    gemm_float32 = _gemm(weight)
    return Machine(
        gemm_float32=gemm_float32,
        gemm=gemm_float32 if dtype == torch.float32 else _gemm(weight.to(dtype)),
        copy=_copy(),
        **_disk(Path(directory)),
        quantize=rounding(1024, clip=False),
        clip=rounding(64, clip=True),
        threads=torch.get_num_threads(),
    )


@dataclass(frozen=True)
class Prediction:
    """What a run will take, or took: peak of resident memory and size on disk in bytes, time in seconds."""

    peak_memory: int
    disk: int
    seconds: float

    def text(self) -> str:
        """One line for people."""
        return f"{_size(self.peak_memory)} of memory at most, {_size(self.disk)} on disk, {_duration(self.seconds)}"

    def compared(self, actual: Prediction) -> str:
        """One line: what `actual` was beside this prediction."""
        pairs: list[tuple[str, Callable[[Any], str], float, float]] = [
            ("memory", _size, self.peak_memory, actual.peak_memory),
            ("disk", _size, self.disk, actual.disk),
            ("time", _duration, self.seconds, actual.seconds),
        ]
        return ", ".join(
            f"{what} {show(is_)} ({show(said)} predicted{_deviation(said, is_)})" for what, show, said, is_ in pairs
        )


def _libc(function: str, *arguments: int, fails: int = 0) -> bool:
    try:
        called = getattr(ctypes.CDLL(None), function)
    except (OSError, TypeError, AttributeError):
        return False
    return called(*map(ctypes.c_size_t if function == "malloc_trim" else ctypes.c_int, arguments)) != fails


def _seconds(function: Callable[[], object], budget: float) -> float:
    """The median time of a call after a first one, over as many as fit into `budget` seconds, at least one."""
    function()
    times: list[float] = []
    while not times or sum(times) + times[-1] < budget:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _gemm(weight: torch.Tensor) -> float:
    x = weight[:256]
    return 2 * x.numel() * weight.shape[0] / _seconds(lambda: x @ weight.T, 0.2)


def _copy() -> float:
    source = torch.ones(2**25, dtype=torch.uint8)
    target = torch.empty_like(source)
    return source.numel() / _seconds(lambda: target.copy_(source), 0.1)


def _disk(directory: Path) -> dict[str, float]:
    """Rates of one part of a checkpoint, 36 MiB (more than glibc ever keeps), written and read as a run does it."""
    from .shards import ShardReader, ShardWriter

    times: dict[str, list[float]] = {"write": [], "read": []}
    state = {"weight": torch.randn(9 * 2**20, generator=torch.Generator().manual_seed(0))}
    for _ in range(3):
        with tempfile.TemporaryDirectory(dir=directory, prefix=".speed-") as work:
            start = time.perf_counter()
            writer = ShardWriter(Path(work))
            writer.write(0, state)
            times["write"].append(time.perf_counter() - start)
            [path] = writer.finish()
            with path.open("rb") as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            ShardReader(work).read("weight")
            times["read"].append(time.perf_counter() - start)
    return {what: state["weight"].nbytes / statistics.median(taken) for what, taken in times.items()}


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _deviation(predicted: float, actual: float) -> str:
    return f", {actual / predicted - 1:+.0%}" if predicted else ""
