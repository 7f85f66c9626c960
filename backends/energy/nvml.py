"""NVIDIA GPUs, by NVML: the counter of energy since the driver was loaded (Volta and later), else integrated power.

The counter steps about every 100 ms. Power is a mean over the last second on Ampere and later but for GA100, and A100
and H100 look at it for a quarter of the time (arXiv 2312.02741): hence windows of five seconds and more.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from typing import Any

from .probe import Found, Missing, Probe, Silent
from .sampler import Counter, SampledPower

NAME = "nvml"
LIBRARY = "libnvidia-ml.so.1"
_STEP_S = 0.1
_UNSUPPORTED, _NO_FUNCTION = 3, 13
# nvmlReturn_t: the reason, and the remedy.
_ERRORS = {
    1: ("NVML was not initialised", "Try again; this is a fault of ours"),
    2: ("NVML takes an argument for invalid", "See whether nvidia-smi lists the GPU under this name"),
    _UNSUPPORTED: ("this GPU or driver does not tell its energy or power", "A GPU since Volta tells; a vGPU may not"),
    4: ("NVML does not permit it to this user", "Run as root, or have the administrator permit it"),
    6: ("NVML does not find this GPU", "See whether nvidia-smi -L lists it in this container"),
    8: ("the GPU's external power cables are not attached", "Attach them"),
    9: ("NVIDIA's driver is not loaded", "Load it; nvidia-smi then lists the GPU"),
    10: ("NVML gave no answer in time", "Try again; see dmesg"),
    12: ("NVML does not find its own library", "Install NVIDIA's driver anew"),
    _NO_FUNCTION: ("this driver's NVML is too old: it lacks a function", "Install a newer driver"),
    15: ("the GPU has fallen off the bus", "Restart the machine; see dmesg"),
    16: ("the GPU must be reset", "nvidia-smi --gpu-reset"),
    18: ("NVIDIA's library and kernel driver are of different releases", "Restart, so that the new driver is loaded"),
}
_MIG = Missing(
    NAME,
    "the GPU is split by MIG, and its counter is about the whole of it",
    "Measure on a GPU without MIG (nvidia-smi -mig 0)",
)


class _Refusal(RuntimeError):
    """code: nvmlReturn_t"""

    def __init__(self, code: int) -> None:
        self.code = code
        self.reason, self.remedy = _ERRORS.get(code, (f"NVML answers with error {code}", "See nvml.h for its meaning"))
        super().__init__(self.reason)


class _Nvml:
    """The library's functions, whose error codes become _Refusal. Kept open until the process ends."""

    def __init__(self, library: str) -> None:
        self._c = ctypes.CDLL(library)
        self("nvmlInit_v2")

    def __call__(self, function: str, *arguments: Any) -> None:
        call = getattr(self._c, function, None)
        code = _NO_FUNCTION if call is None else call(*arguments)
        if code:
            raise _Refusal(code)

    def number(self, function: str, *arguments: Any, kind: Any = ctypes.c_uint, more: int = 0) -> int:
        """What the function writes into its first place for a result; `more`: places after it that nobody asks for."""
        results = [kind() for _ in range(1 + more)]
        self(function, *arguments, *map(ctypes.byref, results))
        return results[0].value

    def text(self, function: str, *arguments: Any) -> str:
        buffer = ctypes.create_string_buffer(96)
        self(function, *arguments, buffer, ctypes.c_uint(len(buffer)))
        return buffer.value.decode(errors="replace")

    def handle(self, place: str) -> ctypes.c_void_p:
        """Of a GPU by number, or by UUID, whole or its beginning."""
        handle = ctypes.c_void_p()
        if place.isdigit():
            self("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(int(place)), ctypes.byref(handle))
        else:
            self("nvmlDeviceGetHandleByUUID", self._uuid(place).encode(), ctypes.byref(handle))
        return handle

    def _uuid(self, beginning: str) -> str:
        if len(beginning) == len("GPU-01234567-0123-0123-0123-0123456789ab"):
            return beginning
        handles = [self.handle(str(i)) for i in range(self.number("nvmlDeviceGetCount_v2"))]
        every = [self.text("nvmlDeviceGetUUID", handle) for handle in handles]
        return next((uuid for uuid in every if uuid.startswith(beginning)), beginning)


def find(index: int, uuid: str | None = None, environ: Mapping[str, str] = os.environ, library: str = LIBRARY) -> Found:
    """The probe of the GPU that CUDA numbers `index`.

    uuid   as CUDA tells it, without "GPU-": CUDA's numbers are by speed, NVML's by PCI bus, so this is surer than both
    """
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    places = [str(index)] if shown is None else [place.strip() for place in shown.split(",")][index:]
    if places and places[0].startswith("MIG"):
        return Found(missing=(_MIG,))
    if not places or not (places[0].isdigit() or places[0].startswith("GPU-")):  # "" and "-1" hide all
        return _missing(f"CUDA_VISIBLE_DEVICES={shown} leaves no GPU {index}", "Name it there")
    try:
        return _of(_Nvml(library), places[0] if uuid is None else f"GPU-{uuid}")
    except OSError:
        return _missing(
            f"{library} is not found: no NVIDIA driver", "Install the driver; nvidia-smi then lists the GPU"
        )
    except _Refusal as refusal:
        return _missing(refusal.reason, refusal.remedy)


def _missing(reason: str, remedy: str) -> Found:
    return Found(missing=(Missing(NAME, reason, remedy),))


def _of(nvml: _Nvml, place: str) -> Found:
    gpu = nvml.handle(place)
    if _told(lambda: nvml.number("nvmlDeviceGetMigMode", gpu, more=1)):
        return Found(missing=(_MIG,))

    def about() -> dict[str, Any]:
        return _about(nvml, gpu)

    def millijoules() -> int:
        return nvml.number("nvmlDeviceGetTotalEnergyConsumption", gpu, kind=ctypes.c_ulonglong)

    def milliwatts() -> int:
        return nvml.number("nvmlDeviceGetPowerUsage", gpu)

    probe: Probe
    try:
        millijoules()
        probe = Counter(NAME, "gpu", lambda: [_audible(millijoules) / 1e3], [None], _STEP_S, about)
    except _Refusal as refusal:
        if refusal.code not in (_UNSUPPORTED, _NO_FUNCTION):
            raise
        milliwatts()
        probe = SampledPower(NAME, "gpu", lambda: _audible(milliwatts) / 1e3, _STEP_S, about)
    return Found((probe,))


def _audible(read: Callable[[], int]) -> int:
    try:
        return read()
    except _Refusal as refusal:
        raise Silent(f"{NAME}: {refusal.reason}") from None


def _told(ask: Callable[[], Any]) -> Any:
    """None where this GPU or this user is not told."""
    try:
        return ask()
    except _Refusal:
        return None


def _about(nvml: _Nvml, gpu: ctypes.c_void_p) -> dict[str, Any]:
    limit = _told(lambda: nvml.number("nvmlDeviceGetEnforcedPowerLimit", gpu))
    ecc = _told(lambda: nvml.number("nvmlDeviceGetEccMode", gpu, more=1))
    sensor, sm, memory = ctypes.c_uint(0), ctypes.c_uint(1), ctypes.c_uint(2)
    return {
        "gpu": _told(lambda: nvml.text("nvmlDeviceGetName", gpu)),
        "driver": _told(lambda: nvml.text("nvmlSystemGetDriverVersion")),
        "power_limit_w": None if limit is None else limit / 1e3,
        "ecc": None if ecc is None else bool(ecc),
        "mig": False,
        "temperature_c": _told(lambda: nvml.number("nvmlDeviceGetTemperature", gpu, sensor)),
        "sm_clock_mhz": _told(lambda: nvml.number("nvmlDeviceGetClockInfo", gpu, sm)),
        "memory_clock_mhz": _told(lambda: nvml.number("nvmlDeviceGetClockInfo", gpu, memory)),
    }
