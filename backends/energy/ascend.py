"""Ascend NPUs, by the driver's DCMI library, else by npu-smi. Both tell power alone, which is integrated."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping

from . import npu_smi
from .probe import Found, Missing, Silent
from .sampler import SampledPower

NAME = "dcmi"
LIBRARIES = ("libdcmi.so", "/usr/local/Ascend/driver/lib64/driver/libdcmi.so")
# Ten times a second at least; npu-smi takes a good part of a second by itself.
_STEP_S, _SMI_STEP_S = 0.05, 0.5
_MOST = 64
# DCMI's codes: the reason, and the remedy.
_ERRORS = {
    -8002: ("DCMI does not permit it to this user", "Run as root, or join the driver's group (HwHiAiUser)"),
    -8005: ("the Ascend driver has an inner fault", "See dmesg, and npu-smi info"),
    -8006: ("DCMI gave no answer in time", "Try again; see npu-smi info"),
    -8012: ("the Ascend driver is not ready", "Try again; see npu-smi info"),
    -8013: ("DCMI does not tell it in a container", "Measure outside, or in a container with the whole NPU"),
    -8255: ("this NPU or driver does not tell its power", "Install a newer driver"),
}


class _Refusal(RuntimeError):
    def __init__(self, what: str, code: int) -> None:
        self.code = code
        self.reason, self.remedy = _ERRORS.get(code, (f"{what} answers with error {code}", "See npu-smi info"))
        super().__init__(self.reason)


class _Dcmi:
    """The library's functions, whose codes become _Refusal."""

    def __init__(self, library: str) -> None:
        self._c = ctypes.CDLL(library)

    def has(self, function: str) -> bool:
        return hasattr(self._c, function)

    def __call__(self, function: str, *arguments: object) -> None:
        code = getattr(self._c, function)(*arguments) if self.has(function) else -8255
        if code:
            raise _Refusal(function, code)

    def number(self, function: str, *arguments: int) -> int:
        """What it writes into its last argument."""
        result = ctypes.c_int()
        self(function, *arguments, ctypes.byref(result))
        return result.value

    def devices(self) -> dict[int, tuple[int, int]]:
        """Number of a chip -> (card, device in it)."""
        count, cards = ctypes.c_int(), (ctypes.c_int * _MOST)()
        self("dcmi_get_card_list", ctypes.byref(count), cards, _MOST)
        sizes = {card: self.number("dcmi_get_device_num_in_card", card) for card in cards[: count.value]}
        places = [(card, device) for card, size in sizes.items() for device in range(size)]
        return {self._number_of(at, place): place for at, place in enumerate(places)}

    def _number_of(self, at: int, place: tuple[int, int]) -> int:
        """As the driver has it; a release that does not say counts through the cards."""
        number = ctypes.c_int()
        try:
            self("dcmi_get_device_logic_id", ctypes.byref(number), *place)
        except _Refusal:
            return at
        return number.value


def find(index: int, environ: Mapping[str, str] = os.environ, libraries: tuple[str, ...] = LIBRARIES) -> Found:
    """The probe of the NPU that torch-npu numbers `index`."""
    number = visible(index, environ)
    if number is None:
        shown = environ["ASCEND_RT_VISIBLE_DEVICES"]
        return _missing(f"ASCEND_RT_VISIBLE_DEVICES={shown} leaves no NPU {index}", "Name it there")
    why, remedy = "libdcmi.so is not found: no Ascend driver", "Install the driver; npu-smi info then lists the NPU"
    for library in libraries:
        try:
            read = _by_dcmi(_Dcmi(library), number)
            return Found((SampledPower(NAME, "npu", read, _STEP_S, lambda: {"chip": number, "by": "libdcmi"}),))
        except OSError:
            continue
        except _Refusal as refusal:
            why, remedy = refusal.reason, refusal.remedy
            break
    if npu_smi.installed():
        place = npu_smi.chips().get(number, (number, 0))
        if npu_smi.power(*place) is not None:
            return Found((_by_npu_smi(place),))
        why += f"; npu-smi does not tell the power of NPU {place[0]}, chip {place[1]}"
    return _missing(why, remedy)


def visible(index: int, environ: Mapping[str, str]) -> int | None:
    """The chip's own number: ASCEND_RT_VISIBLE_DEVICES renumbers those that it leaves. None: it leaves no such one."""
    shown = environ.get("ASCEND_RT_VISIBLE_DEVICES", "")
    if not shown.strip():
        return index
    numbers = [int(part) for part in shown.split(",") if part.strip().isdigit()]
    return numbers[index] if index < len(numbers) else None


def _missing(reason: str, remedy: str) -> Found:
    return Found(missing=(Missing(NAME, reason, remedy),))


def _by_dcmi(dcmi: _Dcmi, number: int) -> Callable[[], float]:
    """Reads watts; DCMI tells tenths of them."""
    try:
        read = _second(dcmi, number)
    except _Refusal:
        read = _first(dcmi, number)
    return lambda: _audible(read)


def _second(dcmi: _Dcmi, number: int) -> Callable[[], float]:
    """By the second version of DCMI, which numbers chips without cards."""
    dcmi("dcmiv2_init")
    read = _reader(dcmi, "dcmiv2_get_device_power_info", number)
    read()
    return read


def _first(dcmi: _Dcmi, number: int) -> Callable[[], float]:
    dcmi("dcmi_init")
    devices = dcmi.devices()
    if number not in devices:
        raise _Refusal(f"DCMI, which knows the chips {sorted(devices)}, asked for chip {number},", -8008)
    read = _reader(dcmi, "dcmi_get_device_power_info", *devices[number])
    read()
    return read


def _reader(dcmi: _Dcmi, function: str, *place: int) -> Callable[[], float]:
    return lambda: dcmi.number(function, *place) / 10


def _audible(read: Callable[[], float]) -> float:
    try:
        return read()
    except _Refusal as refusal:
        raise Silent(f"{NAME}: {refusal.reason}") from None


def _by_npu_smi(place: tuple[int, int]) -> SampledPower:
    def read() -> float:
        watts = npu_smi.power(*place)
        if watts is None:
            raise Silent("npu-smi: it does not tell the power any more")
        return watts

    told = {"npu": place[0], "chip": place[1], "by": "npu-smi"}
    return SampledPower("npu-smi", "npu", read, _SMI_STEP_S, lambda: told)
