"""NVIDIA GPUs, through torch. Nothing is asked of CUDA before a function here is called."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from .accelerator import AllocatorPeak, EventTimer
from .device import PEAKS, Peak
from .sheets import sheet_of_gpu


def count() -> int:
    """CUDA devices that torch sees."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.device_count() if torch.version.cuda and torch.cuda.is_available() else 0


def refusal(index: int) -> tuple[str, str] | None:
    """Why CUDA device `index` cannot be used, and what would help; None: it can, as one small tensor on it shows."""
    if torch.version.cuda is None:
        return (
            f"this torch, {torch.__version__}, is built without CUDA",
            "Install a torch with CUDA (see pytorch.org/get-started), or choose the device cpu",
        )
    with warnings.catch_warnings(record=True) as said:  # torch warns where the driver is too old, and goes on
        warnings.simplefilter("always")
        seen = count() if torch.cuda.is_available() else 0
    if not seen:
        told = str(said[0].message).strip().splitlines()[0].rstrip(".") if said else "torch sees no NVIDIA GPU"
        if driver() is None:
            return f"{told}: no NVIDIA driver is loaded", "Install the driver; nvidia-smi then lists the GPU"
        return told, "See whether nvidia-smi lists a GPU, and whether CUDA_VISIBLE_DEVICES hides it"
    if index >= seen:
        return f"torch sees {seen} CUDA device{'s' * (seen > 1)}, numbered from 0", "Choose one of them"
    try:
        torch.zeros(1, device=f"cuda:{index}").item()
    except RuntimeError as error:  # no kernels for so old a GPU, no memory left, a GPU that another process holds
        return f"cuda:{index} does not work: {str(error).splitlines()[0]}", "Choose another device"
    return None


def driver() -> str | None:
    """Release of NVIDIA's kernel driver, e.g. "550.54.15"; None where none is loaded, or it does not say."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+(\.\d+)+)", text)
    return found[1] if found else None


class CudaDevice:
    """CUDA device `index`. Making it asks nothing of CUDA."""

    kind = "cuda"
    float64 = True

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self.torch_device = torch.device("cuda", index)

    def info(self) -> dict[str, Any]:
        has = torch.cuda.get_device_properties(self.torch_device)
        return {
            "name": has.name,
            "multiprocessors": has.multi_processor_count,
            "capability": f"{has.major}.{has.minor}",
            "memory_bytes": has.total_memory,
            "cuda": torch.version.cuda,
            "driver": driver(),
        }

    @property
    def uuid(self) -> str | None:
        """Of the GPU, without "GPU-"; None: torch before 2.5 does not tell."""
        told = getattr(torch.cuda.get_device_properties(self.torch_device), "uuid", None)
        return None if told is None else str(told).removeprefix("GPU-")

    def free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def timed(self) -> EventTimer:
        return EventTimer(self.torch_device)

    def peak_memory(self, held: int = 0) -> AllocatorPeak:  # noqa: ARG002, the allocator knows what is held
        return AllocatorPeak(self.torch_device)

    def peaks(self) -> dict[str, Peak | None]:
        has = torch.cuda.get_device_properties(self.torch_device)
        peaks: dict[str, Peak | None] = dict.fromkeys(PEAKS)
        sheet = sheet_of_gpu(has.name, has.multi_processor_count)
        if sheet is not None:
            peaks |= {kind: Peak(rate.value, rate.source) for kind, rate in sheet.compute.items() if kind in PEAKS}
        clock, width = getattr(has, "memory_clock_rate", 0), getattr(has, "memory_bus_width", 0)  # kHz, bits
        if clock and width:  # torch before 2.7 does not tell
            peaks["memory"] = Peak(2 * clock * 1e3 * width / 8, "memory clock and bus width, as the driver has them")
        return peaks
