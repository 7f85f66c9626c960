"""What a run will need and what it took: memory, disk and time, measured on this machine.

The building blocks of a prediction that is printed before a long run starts; what a method needs of them is its own
affair.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_M_MMAP_THRESHOLD = -3  # mallopt's own number
_UNLIMITED = 1 << 60  # bytes; cgroup v1 writes "no limit" as the largest multiple of a page
_GIB = 2**30


def rss() -> int:
    """Bytes of memory that this process has now; elsewhere than on Linux, as `peak_rss`."""
    return _status("VmRSS") or _max_rss()


def peak_rss() -> int:
    """Most bytes of memory that this process ever had, or had since `reset_peak`."""
    return _status("VmHWM") or _max_rss()


def reset_peak() -> bool:
    """Let `peak_rss` start again from now; False where the system does not allow it (the old peak remains)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    # Some sandboxes take the order and do nothing.
    return peak_rss() - rss() < 2**24


def available_memory() -> int:
    """Bytes that this process can still take: the least of free memory, cgroup limits and limits of the process.

    File pages that a cgroup would give back when pressed count as free, as the system counts them in MemAvailable.
    """
    free = _fields(Path("/proc/meminfo")).get("MemAvailable")
    if free is None:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - rss()
    return max(0, min([free, *_cgroup_rooms(), *_limit_rooms()]))


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


def _status(field: str) -> int | None:
    return _fields(Path("/proc/self/status")).get(field)


def _fields(path: Path) -> dict[str, int]:
    """Sizes in bytes from a file of lines like `VmRSS:  1712 kB`; empty where there is no such file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def _max_rss() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _limit_rooms() -> list[int]:
    """What the limits of the process leave: of its address space, and of its data."""
    try:
        import resource
    except ImportError:
        return []
    rooms = []
    for limit, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, used = resource.getrlimit(limit)[0], _status(field)
        if soft != resource.RLIM_INFINITY and used is not None:
            rooms.append(soft - used)
    return rooms


# Version: controller in /proc/self/cgroup, file of the limit, of the use, and fields of memory.stat with file pages.
_CGROUPS: dict[str, tuple[str, str, str, tuple[str, str]]] = {
    "cgroup2": ("", "memory.max", "memory.current", ("inactive_file", "active_file")),
    "cgroup": (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def _cgroup_rooms(root: Path = Path("/")) -> list[int]:
    """What every limited cgroup that this process is in leaves, from its own one up to the top that can be seen."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (root / "proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return []
    rooms = []
    for mount in mounts:
        kind = mount[mount.index("-") + 1]
        if kind not in _CGROUPS:
            continue
        controller, limit, use, cached = _CGROUPS[kind]
        own = [path for _, controllers, path in groups if controller in controllers.split(",")]
        if not own:
            continue
        # In a container the mount may show the process's own group as its top.
        base, top = mount[3], root / mount[4].lstrip("/")
        inside = own[0].removeprefix(base) if own[0].startswith(base.rstrip("/") + "/") else ""
        folder = top / inside.strip("/")
        for group in [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]:
            if (room := _group_room(group, limit, use, cached)) is not None:
                rooms.append(room)
    return rooms


def _group_room(group: Path, limit_file: str, use_file: str, cached: tuple[str, str]) -> int | None:
    """limit - use + file pages, or None without a limit."""
    try:
        limit = (group / limit_file).read_text().strip()
        if limit == "max" or int(limit) >= _UNLIMITED:
            return None
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - int((group / use_file).read_text()) + sum(int(stat.get(name, 0)) for name in cached)
    except (OSError, ValueError):  # the top of cgroup 2 has no such files
        return None


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
