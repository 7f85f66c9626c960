"""Ascend NPUs, through torch-npu. Whatever is missing of wheel, CANN, driver and device is told, never raised.

torch-npu itself is loaded by autoload.py. Verified on a machine without an NPU only: see the README.
"""

from __future__ import annotations

import configparser
import functools
import os
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .accelerator import AllocatorPeak, EventTimer
from .ascend_products import Product, product_named
from .autoload import PACKAGE, failure, load
from .device import PEAKS, Peak

NAME = "npu"
_CANN = "/usr/local/Ascend/ascend-toolkit/set_env.sh"
_DRIVER = Path("/usr/local/Ascend/driver/version.info")
# Names of libraries, in what the loader says of one that it does not find.
_DRIVER_LIBRARIES = ("libascend_hal", "libdrv", "libmmpa", "libdcmi")
# In the platform files: the dtype of a product, and the name of its block sizes M, K, N.
_BLOCKS = {"float16": "Default", "bfloat16": "Default", "int8": "DT_INT8"}


def installed() -> bool:
    """Whether there is a wheel of torch-npu, loadable or not."""
    return failure() is not None or find_spec(PACKAGE) is not None


def count() -> int:
    """NPUs that torch sees; 0 where anything of what they need is missing."""
    if not installed() or load() is not None:
        return 0
    try:
        return module().device_count() if module().is_available() else 0
    except Exception:  # whatever a driver that does not answer makes of it
        return 0


def module() -> Any:
    """torch.npu, which is there once torch-npu is loaded."""
    return torch.npu  # type: ignore[attr-defined]


def refusal(index: int) -> tuple[str, str] | None:
    """Why NPU `index` cannot be used, and what would help; None: it can, as one small tensor on it shows."""
    if not installed():
        return "torch-npu is not installed", f"pip install torch-npu=={_release()}, the release of this torch, and CANN"
    if load() is not None:
        return _unloaded(str(failure()))
    seen = count()
    if not seen:
        if driver() is None and not any(Path("/dev").glob("davinci[0-9]*")):
            return "torch-npu sees no NPU: no Ascend driver is loaded", "Install the driver; npu-smi info then lists it"
        return "torch-npu sees no NPU", "See whether npu-smi info lists one, and ASCEND_RT_VISIBLE_DEVICES hides it"
    if index >= seen:
        return f"torch-npu sees {seen} NPU{'s' * (seen > 1)}, numbered from 0", "Choose one of them"
    try:
        torch.zeros(1, device=f"{NAME}:{index}").item()
    except RuntimeError as error:
        return f"npu:{index} does not work: {str(error).splitlines()[0]}", "Choose another device"
    return None


def _release() -> str:
    """Of torch, without what stands behind a plus: torch-npu has the same."""
    return torch.__version__.partition("+")[0]


def _unloaded(said: str) -> tuple[str, str]:
    """The piece that is missing, from what the failed import said, and the remedy."""
    wheel = _wheel()
    if wheel is not None and wheel.split(".")[:2] != _release().split(".")[:2]:
        return f"torch-npu {wheel} does not go with torch {_release()}", f"pip install torch-npu=={_release()}"
    if torch.version.cuda is not None:
        return "torch-npu refuses a torch that is built for CUDA", "Install torch's CPU build, and torch-npu beside it"
    library = re.search(r"(lib\w+)\.so", said)
    if library and library[1].startswith(_DRIVER_LIBRARIES):
        return f"the Ascend driver's {library[0]} is not found", "Install the driver; npu-smi info then lists the NPU"
    if library or "ASCEND_HOME_PATH" in said or "cann" in said.lower():
        what = f"{library[0]} is not found" if library else said
        if home := os.environ.get("ASCEND_HOME_PATH"):
            return f"CANN at {home} cannot be loaded: {what}", f"source {home}/set_env.sh in this shell first"
        return f"CANN is not installed, or not set up: {what}", f"Install CANN, and source {_CANN} in this shell first"
    return (
        f"torch-npu cannot be loaded: {said}",
        "Install it anew, in the release of torch, beside the CANN it asks for",
    )


def _wheel() -> str | None:
    try:
        return version("torch-npu")
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """Release of the Ascend driver, e.g. "25.0.rc1"; None where there is none, or it does not say."""
    try:
        found = re.search(r"^Version\s*=\s*(\S+)", _DRIVER.read_text(), flags=re.MULTILINE | re.IGNORECASE)
    except OSError:
        return None
    return found[1] if found else None


class AscendDevice:
    """NPU `index`. Making it asks nothing of torch-npu, without which torch does not know the name "npu"."""

    kind = NAME
    float64 = False  # torch-npu makes float32 of it, with a warning

    def __init__(self, index: int) -> None:
        self.index = index
        self.name = f"{NAME}:{index}"

    @property
    def torch_device(self) -> torch.device:
        return torch.device(NAME, self.index)

    @functools.cached_property
    def chip(self) -> str:
        """As torch-npu names it, e.g. "Ascend910B4"."""
        return module().get_device_name(self.index)

    def info(self) -> dict[str, Any]:
        has, product = module().get_device_properties(self.index), _product(self.chip)
        return {
            "name": self.chip,
            "product": None if product is None else product.name,
            "memory_bytes": module().mem_get_info(self.index)[1],
            "l2_bytes": int(getattr(has, "L2_cache_size", 0)) or None,
            "cann": _cann(),
            "driver": driver(),
            "torch_npu": _wheel(),
        }

    def free_memory(self) -> int:
        return module().mem_get_info(self.index)[0]

    def synchronize(self) -> None:
        module().synchronize(self.index)

    def timed(self) -> EventTimer:
        return EventTimer(self.torch_device)

    def peak_memory(self, held: int = 0) -> AllocatorPeak:  # noqa: ARG002, the allocator knows what is held
        return AllocatorPeak(self.torch_device)

    def peaks(self) -> dict[str, Peak | None]:
        return platform_peaks(self.chip)


def _product(chip: str) -> Product | None:
    """None for a chip that is not known here."""
    try:
        return product_named(chip)
    except ValueError:
        return None


def _cann() -> str | None:
    try:
        from torch_npu.npu.utils import get_cann_version  # not there in older releases

        return get_cann_version() or None
    except (ImportError, RuntimeError):
        return None


def platform_peaks(chip: str, home: str | None = None) -> dict[str, Peak | None]:
    """What a chip could do at most, from CANN's own platform file: cores x clock x the block that its matrix unit
    multiplies in a cycle, M x K x N, times 2. By name in PEAKS; None where the file does not say (its bandwidth), or
    where there is none.

    home   of CANN; None: as the environment has it
    """
    peaks: dict[str, Peak | None] = dict.fromkeys(PEAKS)
    home = home or os.environ.get("ASCEND_HOME_PATH")
    places = [] if not home else [*Path(home).glob(f"data/platform_config/{chip}.ini")]
    places += [] if not home else [*Path(home).glob(f"*/data/platform_config/{chip}.ini")]
    for place in places[:1]:
        told = configparser.ConfigParser(strict=False, interpolation=None)
        try:
            told.read(place)
            cores = told.getint("SoCInfo", "cube_core_cnt", fallback=told.getint("SoCInfo", "ai_core_cnt", fallback=0))
            clock = told.getint("AICoreSpec", "cube_freq") * 1e6
            for dtype, block in _BLOCKS.items():
                m, k, n = map(int, told.get("DtypeMKN", block).split(","))
                peaks[dtype] = Peak(cores * clock * m * k * n * 2, f"cores, clock and block size in {place.name}")
        except (configparser.Error, ValueError):
            return dict.fromkeys(PEAKS)
        product = _product(chip)
        if product is not None and not product.bfloat16:
            peaks["bfloat16"] = None
    return peaks
