"""The machine of a run: what decides its figures besides the configuration, and the line that says what computes."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from . import __version__
from .backends.cpu import CpuDevice
from .backends.device import Device, device
from .kernels.ops import isa
from .kernels.registry import summary


def environment() -> dict[str, Any]:
    """What decides a figure besides the configuration; JSON values."""
    return {
        "remanence": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("transformers", "numpy", "scipy")},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": CpuDevice().info(),
        "kernel_isa": isa(),
    }


def device_for_run(spec: str, say: Callable[[str], None]) -> Device:
    """The device of a run, which `say` is told with the kernels on it, in one line; ValueError as `device`."""
    why: list[str] = []
    taken = device(spec, why.append)
    say("; ".join([f"device: {taken.name}, {described(taken)}", *why, f"kernels: {summary(taken.kind)}"]))
    return taken


def described(each: Device) -> str:
    """A device in a few words."""
    info = each.info()
    size = f"{info['memory_bytes'] / 2**30:.1f} GiB"
    if each.kind == "cpu":
        return f"{info['name']}, {info['cores']} cores ({info['threads']} used), {size}"
    if each.kind == "cuda":
        return f"{info['name']}, compute capability {info['capability']}, {size}"
    return f"{info['name']} (product {info['product'] or 'unknown here'}), {size}"
