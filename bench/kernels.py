"""The kernels beside their peers: a linear layer and a whole model on this CPU, and a linear layer on a GPU. Without
one, what the compiler says of the GPU's kernels: registers, shared memory, instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import gpu_aot, gpu_linear, kernel_linear, kernel_model

Result = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def _gpu(seed: int, marlin: str | None) -> Result:
    return gpu_linear.run(seed, marlin) if torch.cuda.is_available() else gpu_aot.run(seed, groups=(128,))


PARTS: dict[str, Callable[[int, str | None], Result]] = {
    "linear": lambda seed, _: kernel_linear.measure(seed),
    "model": lambda seed, _: kernel_model.measure(seed),
    "gpu": _gpu,
}


def run(seed: int = 0, parts: Sequence[str] = tuple(PARTS), marlin: str | None = None) -> Result:
    """(rows, checks) of the parts asked for; ValueError for one that is not in PARTS.

    marlin   a checkout of Marlin's repository, compiled with nvcc to be a peer on the GPU
    """
    rows: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts: {part!r} is not one of {', '.join(PARTS)}")
        more, others = PARTS[part](seed, marlin)
        rows += more
        checks += others
    return rows, checks
