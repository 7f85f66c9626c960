"""From a weight, rows of x and a configuration to a started kernel: constants, grid, split of k, room for its sums."""

from typing import Any, NamedTuple

import torch

import triton

from .configs import Config, Task, choose, machine
from .integer import MAX_RANGE, integer_kernel, step_sums_kernel
from .weight_only import add_splits_kernel, gemm_kernel, gemv_kernel

_MOST_SPLITS = 16
_FEWEST_STEPS = 4  # of k for a program: fewer, and filling the pipeline takes longer than what is saved
# Programs for each processor, so that enough loads are under way: one of gemm_kernel keeps several steps of them.
_GEMV_PROGRAMS, _GEMM_PROGRAMS = 8, 2


class Weight(NamedTuple):
    """packed uint8 [N, row_bytes], rows whole; scale [N, G]; zero uint8 [N, G] or None; bias [N] or None."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int

    def strides(self) -> tuple[int, ...]:
        return (*self.scale.stride(), *((0, 0) if self.zero is None else self.zero.stride()))

    def task(self, kernel: str, x: torch.Tensor) -> Task:
        """x [M, K], in the dtype in which the kernel reads it."""
        (m, k), n = x.shape, len(self.packed)
        dtype = str(x.dtype).removeprefix("torch.")
        return Task(kernel, self.bits, k // self.scale.shape[1], self.zero is not None, dtype, n, k, m)


class Codes(NamedTuple):
    """x as integers: int8 [M, K], scale float32 and zero int32 [M] or, for all rows, [1]; shifted: zero is not 0."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    by_row: bool
    shifted: bool


def gemv(x: torch.Tensor, weight: Weight, y: torch.Tensor, config: Config | None = None) -> None:
    """x [1, K], y of N elements."""
    task, on = weight.task("gemv", x), machine(x.device)
    config = config or choose(on, task)
    tiles = triton.cdiv(task.n, config.block_n)
    splits = _split(config, tiles, triton.cdiv(task.k, config.block_k), _GEMV_PROGRAMS * on.processors)
    words = weight.packed.view(torch.int32)
    gemv_kernel[(tiles, splits)](
        x, words, weight.scale, weight.zero, weight.bias, out := _output(y, splits),
        task.n, task.k, words.shape[1], *weight.strides(), **gemv_constants(config, task),
        HAS_BIAS=splits == 1 and weight.bias is not None, SPLITS=splits,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    _add_splits(out, weight.bias, y, splits)


def gemm(x: torch.Tensor, weight: Weight, y: torch.Tensor, config: Config | None = None) -> None:
    """x [M, K] by its row stride, y of M * N elements."""
    task, on = weight.task("gemm", x), machine(x.device)
    config = config or choose(on, task)
    tiles, steps = _tiles(config, task)
    splits = _split(config, tiles[0] * tiles[1], steps, _GEMM_PROGRAMS * on.processors)
    gemm_kernel[(*tiles, splits)](
        x, weight.packed, weight.scale, weight.zero, weight.bias, out := _output(y, splits),
        task.m, task.n, task.k, x.stride(0), weight.packed.shape[1], *weight.strides(), **tile_constants(config, task),
        HAS_BIAS=splits == 1 and weight.bias is not None, SPLITS=splits,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    _add_splits(out, weight.bias, y, splits)


def integer(x: Codes, weight: Weight, y: torch.Tensor, config: Config | None = None) -> None:
    """y of M * N elements."""
    task, on = weight.task("integer", x.codes), machine(x.codes.device)
    config = config or choose(on, task)
    tiles, steps = _tiles(config, task)
    least = triton.cdiv(task.k, MAX_RANGE)
    splits = _split(config, tiles[0] * tiles[1], steps, _GEMM_PROGRAMS * on.processors, least)
    sums = None if weight.zero is None else _step_sums(x, task, config, steps)
    integer_kernel[(*tiles, splits)](
        x.codes, x.scale, x.zero, sums,
        weight.packed, weight.scale, weight.zero, weight.bias, out := _output(y, splits),
        task.m, task.n, task.k, weight.packed.shape[1], *weight.strides(), **tile_constants(config, task),
        SHIFTED=x.shifted, ROW_STEP=int(x.by_row), HAS_BIAS=splits == 1 and weight.bias is not None, SPLITS=splits,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    _add_splits(out, weight.bias, y, splits)


def gemv_constants(config: Config, task: Task) -> dict[str, Any]:
    return {
        "GROUP": task.group,
        "BITS": task.bits,
        "HAS_ZERO": task.zero,
        "EVEN": task.k % config.block_k == 0,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }


def tile_constants(config: Config, task: Task) -> dict[str, Any]:
    """Of gemm_kernel and integer_kernel."""
    return {
        "GROUP": task.group,
        "BITS": task.bits,
        "HAS_ZERO": task.zero,
        "ALIGNED": task.group == task.k or task.group % 8 == 0,
        "EVEN": task.group % config.block_k == 0,
        "ONE_GROUP": task.group == task.k,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
    }


def _tiles(config: Config, task: Task) -> tuple[tuple[int, int], int]:
    """Of y, along N and M; and steps of k."""
    tiles = triton.cdiv(task.n, config.block_n), triton.cdiv(task.m, config.block_m)
    return tiles, task.k // task.group * triton.cdiv(task.group, config.block_k)


def _split(config: Config, tiles: int, steps: int, programs: int, least: int = 1) -> int:
    """How many programs share a tile of y: so many that there are about `programs` of them, at least `least`."""
    wanted = config.splits or min(programs // tiles, steps // _FEWEST_STEPS, _MOST_SPLITS)
    return max(1 << max(wanted, 1).bit_length() - 1, least)  # a power of two: fewer kernels to compile


def _step_sums(x: Codes, task: Task, config: Config, steps: int) -> torch.Tensor:
    sums = torch.empty(task.m, steps, dtype=torch.int32, device=x.codes.device)
    at_once = min(triton.next_power_of_2(steps), 4096 // config.block_k)
    step_sums_kernel[(task.m, triton.cdiv(steps, at_once))](
        x.codes, x.zero, sums, task.k, GROUP=task.group, ROW_STEP=int(x.by_row), STEPS=at_once, BLOCK_K=config.block_k
    )
    return sums


def _output(y: torch.Tensor, splits: int) -> torch.Tensor:
    """Where a kernel writes: y itself, or float32 sums of each split."""
    return y if splits == 1 else torch.empty((splits, y.numel()), dtype=torch.float32, device=y.device)


def _add_splits(part: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, splits: int) -> None:
    if splits > 1:
        size, block = y.numel(), 1024
        add_splits_kernel[(triton.cdiv(size, block),)](
            part, bias, y, size, y.shape[-1], HAS_BIAS=bias is not None, SPLITS=splits, BLOCK=block
        )
