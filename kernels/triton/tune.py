"""Configurations by time, on the GPU that is here: what configs.py reads.

    from remanence.kernels.triton.tune import tune, tasks
    tune(tasks(4096, 4096))

Candidates are compiled first; those that spill registers or do not fit shared memory are not timed. A time is of a CUDA
graph that runs over copies of the weight, more than the L2 cache holds, as the layers of a model do.
"""

import itertools
import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

import triton

from . import aot, launch, products
from .configs import FOLDER, Config, Machine, Task, bucket, default, machine, store
from .products import Codes, Weight

ROTATED_BYTES = 256 << 20  # four times the L2 cache of an H200
REPEATS = 20

log = logging.getLogger(__name__)


def tune(todo: Iterable[Task], device: str = "cuda", folder: Path = FOLDER) -> Path | None:
    """The best configuration of each task goes into the table of this machine; its path, or None without a task."""
    if not torch.cuda.is_available():
        raise ValueError("tuning measures times: it needs an NVIDIA GPU")
    on, path = machine(torch.device(device)), None
    for task in todo:
        usual = default(on, task)
        times = {config: _time(task, config, device) for config in fitting(task, on)}
        best = min(times, key=lambda config: times[config])
        log.info("%s: %s, %.1f us; default %s", task.key, best, 1e6 * times[best], usual)
        path = store(on, {task.key: best}, folder)
    return path


def tasks(n: int, k: int, bits: int = 4, group: int = 128, zero: bool = False, dtype: str = "bfloat16") -> list[Task]:
    """Of a weight-only linear of one shape, every bucket of M that has a kernel of its own."""
    few = [1 << i for i in range(launch.DENSE_ROWS.bit_length() - 1)]
    return [Task("gemv" if m == 1 else "gemm", bits, group, zero, dtype, n, k, m) for m in few]


def candidates(task: Task) -> Iterator[Config]:
    if task.kernel == "gemv":
        for block_n, k_bits, warps, splits in itertools.product(
            (4, 8, 16, 32), (1024, 2048, 4096), (2, 4, 8), (1, 2, 4)
        ):
            yield Config(block_n, 1, k_bits // task.bits, warps, 1, splits)
        return
    least = 32 if task.kernel == "integer" else 16
    block_ms = sorted({min(max(bucket(task.m), 8), most) for most in (32, 64, 128)})
    block_ks = [step for step in (32, 64, 128, 256) if step >= least and task.group % step == 0] or [least]
    if task.kernel == "integer":  # of whose sums over a step all must be exact
        block_ks = [step for step in block_ks if step <= 128]
    for block_n, block_m, block_k, warps, stages, splits in itertools.product(
        (64, 128), block_ms, block_ks, (4, 8), (2, 3, 4, 5), (1, 2, 4, 8, 16)
    ):
        yield Config(block_n, block_m, block_k, warps, stages, splits)


def fitting(task: Task, on: Machine) -> list[Config]:
    """Candidates that can be started and spill nothing, by their binaries for this architecture."""
    target = next((name for name, known in aot.MACHINES.items() if known.capability == on.capability), None)
    if target is None:
        known = ", ".join(machine.capability for machine in aot.MACHINES.values())
        raise ValueError(f"capability {on.capability} is not one of {known}")
    fits: dict[Config, bool] = {}
    for config in candidates(task):
        alone = Config(config.block_n, config.block_m, config.block_k, config.warps, config.stages)
        if alone not in fits:  # a split changes where the output goes, not what the loop holds
            fits[alone] = aot.fits(aot.product(task, alone), target)
    return [c for c in candidates(task) if fits[Config(c.block_n, c.block_m, c.block_k, c.warps, c.stages)]]


def seconds_per_call(calls: Sequence[Callable[[], object]], repeats: int = REPEATS) -> list[float]:
    """One time for each replay of a CUDA graph of all calls, over their number."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # compiles, and lets cuBLAS choose, outside the graph
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / len(calls))
    return times[2:]


def _time(task: Task, config: Config, device: str) -> float:
    """Seconds, the median."""
    width = 4 * triton.cdiv(task.k * task.bits, 32)
    copies = max(1, triton.cdiv(ROTATED_BYTES, task.n * width))
    shape = (task.n, task.k // task.group)
    scale = torch.full(shape, 0.01, dtype=torch.bfloat16, device=device)
    zero = torch.ones(shape, dtype=torch.uint8, device=device) if task.zero else None
    weights = [
        Weight(torch.randint(0, 256, (task.n, width), dtype=torch.uint8, device=device), scale, zero, None, task.bits)
        for _ in range(copies)
    ]
    dtype = torch.bfloat16 if task.kernel == "integer" else getattr(torch, task.dtype)
    x = torch.randn(task.m, task.k, device=device).to(dtype)
    y = torch.empty(task.m, task.n, dtype=dtype, device=device)
    if task.kernel == "integer":
        codes = Codes(*launch.quantize_per_token(x, 8, True, 1.0), by_row=True, shifted=False)
        calls = [partial(products.integer, codes, weight, y, config) for weight in weights]
    else:
        run = products.gemv if task.kernel == "gemv" else products.gemm
        calls = [partial(run, x, weight, y, config) for weight in weights]
    return statistics.median(seconds_per_call(calls))
