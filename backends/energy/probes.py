"""Which probes go with a device: its own, and beside an accelerator those of its host."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..device import Device
from . import ascend, jetson, nvml, rapl
from .estimate import Estimate
from .probe import ESTIMATE, Found, Missing, Probe, disjoint


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

# Of a kind of device, the scopes that are its own; where none of them is counted, what is counted is a part. The board
# "jetson" is named, as its GPU is on it; what the board of another machine takes is without the GPU's.
OWN: dict[str, tuple[str, ...]] = {"cpu": ("cpu-package", "system"), "cuda": ("gpu", jetson.NAME), "npu": ("npu",)}


def probes(device: Device, allow_estimate: bool = False, cpu_watts: float | None = None) -> Found:
    """Those of `device` that there are, and why each other is missing.

    allow_estimate   of the processor, where nothing measures the device, or memory beside it alone
    cpu_watts        what the estimate takes all of the processor's threads to need at most
    """
    if cpu_watts is not None and not (math.isfinite(cpu_watts) and cpu_watts > 0):
        raise ValueError(f"cpu-watts: {cpu_watts:g} is not finite and above 0")
    found = Found()
    for look in COUNTERS[device.kind]:
        found += look(device)
    if summed(found, device) or not allow_estimate:
        return found
    if device.kind != "cpu":
        why = Missing("estimate", f"processor time says nothing of {device.name}", "Measure it by a counter, above")
        return found + Found(missing=(why,))
    info = device.info()
    return found + Found((Estimate(info["name"], info["cores"], cpu_watts),))


def summed(found: Found, device: Device) -> tuple[Probe, ...]:
    """Those that make up the total of `device`; none: it is not known, whatever else is counted."""
    return disjoint(found.probes, OWN[device.kind])


def survey() -> Found:
    """Of every kind, for the first device of it."""
    return nvml.find(0) + rapl.find() + ascend.find(0) + jetson.find()


def no_counter(found: Found) -> str:
    """One line: what was looked for, and why each is missing; of a device whose own scope nothing counts."""
    parts = [f"{probe.name} ({probe.scope})" for probe in found.probes if probe.method != ESTIMATE]
    why = [f"{each.probe}: {each.reason}" for each in found.missing]
    if not parts:
        return "no energy counter: " + "; ".join(why)
    return "; ".join([f"no energy counter of the device itself: {', '.join(parts)} alone, no total", *why])
