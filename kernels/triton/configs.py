"""Which tile a kernel runs with: from a table per machine that was tuned there, else from one per architecture.

A tuned table is `tuned/<device>.json`: a header that says what it is good for, and entries by kernel, bits, group,
dtype, shape and bucket of M. A table whose header does not fit this machine, Triton or these kernels is not used, and
one line of the log says so.
"""

import functools
import hashlib
import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import triton

VERSION = 1
FOLDER = Path(__file__).parent / "tuned"  # not `configs`: beside configs.py a folder of that name is ambiguous
_KERNELS = ("tiles.py", "weight_only.py", "integer.py")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """A tile of N x M x K, and how many warps and stages of loads work on it. splits 0: as many as fill the machine."""

    block_n: int
    block_m: int
    block_k: int
    warps: int
    stages: int
    splits: int = 0


@dataclass(frozen=True)
class Machine:
    """As torch names it; capability "9.0", or "gfx942" for AMD's; `processors` run at the same time; `shared_bytes` are
    what one program may take of shared memory."""

    name: str
    capability: str
    processors: int
    shared_bytes: int

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")


@functools.lru_cache
def machine(device: torch.device) -> Machine:
    """Of a CUDA device; elsewhere (Triton's interpreter) a small one, so that a split of k is seen at small sizes."""
    if device.type != "cuda":
        return Machine("interpreter", "9.0", 4, 227 << 10)
    found = torch.cuda.get_device_properties(device)
    architecture = found.gcnArchName.split(":")[0] if torch.version.hip else f"{found.major}.{found.minor}"
    # AMD's, and older versions of torch, have no more than the other to say.
    shared = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    return Machine(found.name, architecture, found.multi_processor_count, shared)


def bucket(m: int) -> int:
    """Rows of x -> 1, 2, 4, ... 1024: the power of two that holds them."""
    return min(1 << (m - 1).bit_length(), 1024)


@dataclass(frozen=True)
class Task:
    """What is to be multiplied: x [m, k] of a dtype by w [n, k] of so many bits, in groups, with zero points or not."""

    kernel: str  # "gemv", "gemm" or "integer"
    bits: int
    group: int
    zero: bool
    dtype: str  # "bfloat16", ...
    n: int
    k: int
    m: int

    @property
    def key(self) -> str:
        zero = " zero" if self.zero else ""
        return (
            f"{self.kernel} bits={self.bits} group={self.group}{zero} {self.dtype} "
            f"N={self.n} K={self.k} M={bucket(self.m)}"
        )


def choose(on: Machine, task: Task) -> Config:
    """The tuned entry of exactly this shape and bucket of M, else the default."""
    return stored(on).get(task.key) or default(on, task)


def default(on: Machine, task: Task) -> Config:
    """Chosen by what was compiled, not by time: nothing is spilled and shared memory fits on the targets of aot.py.

    A tile has as many columns as x has rows, up to 64; its 128 rows of w are what four warps hold in registers.
    """
    if task.kernel == "gemv":
        return Config(block_n=16, block_m=1, block_k=2048 // task.bits, warps=4, stages=1)
    deep = on.shared_bytes > 128 << 10  # not so on consumer cards and AMD's
    block_k = _step(task.group, least=32 if task.kernel == "integer" else 16)
    if task.kernel == "integer" and task.m > 64 and not task.zero:
        return Config(128, 128, block_k, warps=8, stages=3 if deep else 2)
    # Of 8 columns Blackwell's compiler spills, and AMD's leaves the matrix units aside.
    least = 16 if on.capability.startswith(("10.", "gfx")) else 8
    wide = bucket(task.m) > 32
    stages = (3 if wide else 4) if deep else 2
    # What zero points add to sums of integers takes registers as well.
    block_n = 64 if wide and task.kernel == "integer" and task.zero else 128
    return Config(block_n, min(max(bucket(task.m), least), 64), block_k, warps=8 if wide else 4, stages=stages)


def _step(group: int, least: int) -> int:
    """The widest step of k of which groups leave less than an eighth empty; `least` is what the matrix units take."""
    return next(
        (step for step in (128, 64, 32, 16) if step > least and -(-group // step) * step <= group * 9 / 8), least
    )


def source_hash() -> str:
    """Of the files the kernels are written in."""
    text = b"".join((Path(__file__).parent / name).read_bytes() for name in _KERNELS)
    return hashlib.sha256(text).hexdigest()[:16]


def header(on: Machine) -> dict:
    return {
        "version": VERSION,
        "device": on.name,
        "capability": on.capability,
        "triton": triton.__version__,
        "kernels": source_hash(),
    }


@functools.lru_cache
def stored(on: Machine, folder: Path = FOLDER) -> dict[str, Config]:
    """The tuned table of this machine; empty where there is none, or one that was made for something else."""
    path = folder / f"{on.slug}.json"
    if not path.is_file():
        return {}
    table = json.loads(path.read_text())
    made, here = table["header"], header(on)
    stale = [f"{name} {made.get(name)!r}, not {here[name]!r}" for name in here if made.get(name) != here[name]]
    if stale:
        log.warning("%s is not used, it was tuned for %s", path.name, "; ".join(stale))
        return {}
    return {name: Config(**entry) for name, entry in table["entries"].items()}


def store(on: Machine, entries: dict[str, Config], folder: Path = FOLDER) -> Path:
    """Adds entries to the table of this machine; a reader finds the file before or after, never half of it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{on.slug}.json"
    kept = stored(on, folder) | entries
    table = {"header": header(on), "entries": {name: asdict(kept[name]) for name in sorted(kept)}}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(path)
    stored.cache_clear()
    return path
