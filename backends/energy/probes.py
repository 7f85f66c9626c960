"""Which probes go with a device: its own, and beside an accelerator those of its host."""

from __future__ import annotations

from collections.abc import Callable

from ..device import Device
from . import ascend, jetson, nvml, rapl
from .estimate import Estimate
from .probe import Found, Missing


def _gpu(device: Device) -> Found:
    from ..cuda import CudaDevice

    uuid = device.uuid if isinstance(device, CudaDevice) else None
    return nvml.find(device.torch_device.index or 0, uuid)


def _npu(device: Device) -> Found:
    return ascend.find(device.torch_device.index or 0)


def _host(_: Device) -> Found:
    return rapl.find()


def _board(_: Device) -> Found:
    return jetson.find()


COUNTERS: dict[str, tuple[Callable[[Device], Found], ...]] = {
    "cpu": (_host, _board),
    "cuda": (_gpu, _host, _board),
    "npu": (_npu, _host),
}


def probes(device: Device, allow_estimate: bool = False, cpu_watts: float | None = None) -> Found:
    """Those of `device` that there are, and why each other is missing.

    allow_estimate   of the processor, where nothing measures the device
    cpu_watts        what the estimate takes all of the processor's threads to need at most
    """
    if cpu_watts is not None and cpu_watts <= 0:
        raise ValueError(f"cpu-watts: {cpu_watts:g} is not above 0")
    found = Found()
    for look in COUNTERS[device.kind]:
        found += look(device)
    if found.probes or not allow_estimate:
        return found
    if device.kind != "cpu":
        why = Missing("estimate", f"processor time says nothing of {device.name}", "Measure it by a counter, above")
        return found + Found(missing=(why,))
    info = device.info()
    return found + Found((Estimate(info["name"], info["cores"], cpu_watts),))


def survey() -> Found:
    """Of every kind, for the first device of it."""
    return nvml.find(0) + rapl.find() + ascend.find(0) + jetson.find()


def no_counter(found: Found) -> str:
    """One line: what was looked for, and why each is missing."""
    return "no energy counter: " + "; ".join(f"{each.probe}: {each.reason}" for each in found.missing)
