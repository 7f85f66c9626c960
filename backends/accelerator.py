"""What CUDA and Ascend devices have in common: torch's events and allocator count alike on both."""

from __future__ import annotations

from typing import Any

import torch


def module_of(device: torch.device) -> Any:
    """The part of torch that is about its kind."""
    return getattr(torch, device.type)


class EventTimer:
    """Seconds that a block took on the device, between two of its events; asking waits for the second."""

    def __init__(self, device: torch.device) -> None:
        module = module_of(device)
        self._stream = module.current_stream(device)
        self._start, self._end = (module.Event(enable_timing=True) for _ in range(2))

    def __enter__(self) -> EventTimer:
        self._start.record(self._stream)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.record(self._stream)

    @property
    def seconds(self) -> float:
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


class AllocatorPeak:
    """Most bytes of tensors on the device during a block, those of before it included: torch's allocator counts."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.peak_bytes = device, 0

    def __enter__(self) -> AllocatorPeak:
        module_of(self._device).reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        self.peak_bytes = module_of(self._device).max_memory_allocated(self._device)
