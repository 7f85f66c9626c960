"""What makers' sheets say of devices, by name: a roofline's ceilings of a device that is not here. No torch here.

Every number has its source, and is dense: half of what a sheet states "with sparsity". What is told by others than the
maker is marked as quoted; of a range the lower end is taken.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .ceilings import COMPUTE, Ceilings, Rate

_DENSE_ONLY = Rate(1.0, "no products of 2:4 weights")
# Before a name, what does not tell devices apart.
_MAKERS = ("nvidia", "geforce", "amd", "instinct", "huawei", "ascend")


@dataclass(frozen=True)
class Sheet:
    """One device.

    aliases           other names that people give it; what torch calls it is one, too
    memory_bytes      that it has. Of GPUs as the sheet writes it, a GB 10^9: never more than a driver then gives
    memory            bytes a second
    compute           operations a second by a kind in COMPUTE; a kind that the device has not is left out
    cache_bytes       of its last-level cache
    sparse24          how many times faster 2:4 weights are multiplied
    watts             that its maker allows
    torch_names       as torch names it, where it names it
    multiprocessors   of the whole GPU; a slice of it (MIG) has fewer, and is not what the sheet is about
    chip              name of CANN's platform file about it
    """

    name: str
    memory_bytes: Rate
    memory: Rate
    compute: Mapping[str, Rate]
    cache_bytes: Rate | None = None
    sparse24: Rate = _DENSE_ONLY
    watts: Rate | None = None
    aliases: tuple[str, ...] = ()
    torch_names: tuple[str, ...] = ()
    multiprocessors: int | None = None
    chip: str | None = None

    def ceilings(self) -> Ceilings:
        """As a roofline asks for them. Where CANN is set up ($ASCEND_HOME_PATH), what its platform file says of an
        Ascend chip goes before this table."""
        return Ceilings(
            self.name,
            self.memory,
            {**self.compute, **self._by_platform_file()},
            int(self.memory_bytes.value),
            None if self.cache_bytes is None else int(self.cache_bytes.value),
            sparse24=self.sparse24.value,
            watts=None if self.watts is None else self.watts.value,
        )

    def _by_platform_file(self) -> dict[str, Rate]:
        if self.chip is None or not os.environ.get("ASCEND_HOME_PATH"):
            return {}
        from .ascend import platform_peaks  # loads torch

        told = platform_peaks(self.chip)
        return {kind: Rate(peak.value, peak.source) for kind, peak in told.items() if peak and kind in COMPUTE}


def sheet_named(name: str) -> Sheet:
    """By its name or an alias, in any case, with or without its maker's: "A100", "H100 SXM", "Ascend910B4", "rtx 4090".

    Raises ValueError for another: which there are, and which of them come close.
    """
    plain = _plain(name)
    if plain in _BY_NAME:
        return _BY_NAME[plain]
    close = dict.fromkeys(_BY_NAME[each].name for each in difflib.get_close_matches(plain, _BY_NAME))
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"device: {name!r} is not one of {', '.join(SHEETS)}{meant}")


def sheet_of_gpu(torch_name: str, multiprocessors: int) -> Sheet | None:
    """Of a whole GPU as torch sees it; None: there is no sheet of it, or it is a slice of one."""
    for sheet in SHEETS.values():
        if torch_name in sheet.torch_names and multiprocessors == sheet.multiprocessors:
            return sheet
    return None


def _plain(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for maker in _MAKERS:
        plain = plain.removeprefix(maker)
    return plain


def _tera(source: str, rates: Mapping[str, float], quoted: bool = False) -> dict[str, Rate]:
    """rates: 10^12 operations a second by kind; half: float16 and bfloat16, summed in float32."""
    half = rates.get("half")
    told = {**rates, **({} if half is None else {"float16": half, "bfloat16": half})}
    return {kind: Rate(told[kind] * 1e12, source, quoted) for kind in COMPUTE if kind in told}


def _nvidia(
    name: str,
    gigabytes: float,
    gigabytes_s: float,
    compute: Mapping[str, Rate],
    cache: Rate,
    watts: float,
    source: str,
    quoted: bool = False,
    **names: Any,
) -> Sheet:
    return Sheet(
        name,
        Rate(gigabytes * 1e9, source, quoted),
        Rate(gigabytes_s * 1e9, source, quoted),
        compute,
        cache,
        Rate(2.0, "NVIDIA: 2:4 weights on tensor cores from Ampere on"),
        Rate(watts, source, quoted),
        **names,
    )


_A100 = "NVIDIA A100 data sheet"
_A100_RATES = _tera(_A100, {"float32": 19.5, "half": 312, "int8": 624, "int4": 1248})
_A100_CACHE = Rate(40 * 2**20, "NVIDIA A100 architecture paper")
_H100, _H200 = "NVIDIA H100 SXM data sheet", "NVIDIA H200 SXM data sheet"
_HOPPER = {"float32": 67, "half": 989.5, "float8": 1979, "int8": 1979}  # tensor cores without int4
_HOPPER_CACHE = Rate(50 * 2**20, "NVIDIA H100 architecture paper")
_L4, _ADA = "NVIDIA L4 data sheet", "NVIDIA Ada architecture paper"
_ADA_INT4 = "twice int8, as in NVIDIA's Ada architecture paper; the data sheet has none"
_B200 = "quoted: glennklockwood.com/garden/processors/B200"

_GPUS = (
    _nvidia(
        "A100-40G", 40, 1555, _A100_RATES, _A100_CACHE, 400, _A100,
        aliases=("A100 40GB", "A100 SXM4 40G"), torch_names=("NVIDIA A100-SXM4-40GB",), multiprocessors=108,
    ),
    _nvidia(
        "A100-80G", 80, 2039, _A100_RATES, _A100_CACHE, 400, _A100,
        aliases=("A100", "A100 80GB", "A100 SXM", "A100 SXM4 80G"), torch_names=("NVIDIA A100-SXM4-80GB",),
        multiprocessors=108,
    ),
    _nvidia(
        "H100", 80, 3350, _tera(_H100, _HOPPER), _HOPPER_CACHE, 700, _H100,
        aliases=("H100 SXM", "H100 SXM5", "H100 80GB"), torch_names=("NVIDIA H100 80GB HBM3",), multiprocessors=132,
    ),
    _nvidia(
        "H200", 141, 4800, _tera(_H200, _HOPPER), replace(_HOPPER_CACHE, source=f"{_HOPPER_CACHE.source}: as H100"),
        700, _H200, aliases=("H200 SXM",), torch_names=("NVIDIA H200",), multiprocessors=132,
    ),
    _nvidia(
        "L4", 24, 300,
        _tera(_L4, {"float32": 30.3, "half": 121, "float8": 242.5, "int8": 242.5})
        | _tera(_ADA_INT4, {"int4": 485}, quoted=True),
        Rate(48 * 2**20, _ADA), 72, _L4, torch_names=("NVIDIA L4",), multiprocessors=58,
    ),
    _nvidia(
        "RTX4090", 24, 1008,
        _tera(_ADA, {"float32": 82.6, "half": 165.2, "float8": 330.3, "int8": 660.6, "int4": 1321.2}),
        Rate(72 * 2**20, _ADA), 450, _ADA,
        aliases=("4090",), torch_names=("NVIDIA GeForce RTX 4090",), multiprocessors=128,
    ),
    _nvidia(
        "B200", 180, 8000, _tera(_B200, {"float32": 80, "half": 2250, "float8": 4500, "int8": 4500}, quoted=True),
        Rate(126 * 2**20, "quoted: measurements of others", quoted=True), 1000, f"{_B200}; memory of 180 to 192 GB",
        quoted=True, aliases=("B200 SXM",), torch_names=("NVIDIA B200",), multiprocessors=148,
    ),
)  # fmt: skip

_MI300X = "AMD Instinct MI300X data sheet"
_AMD = Sheet(
    "MI300X",
    Rate(192e9, _MI300X),
    Rate(5300e9, _MI300X),
    _tera(_MI300X, {"float32": 163.4, "half": 1307.4, "float8": 2614.9, "int8": 2614.9}),
    Rate(256 * 2**20, f"{_MI300X}: Infinity Cache"),
    Rate(2.0, f"{_MI300X}: with structured sparsity"),
    Rate(750, _MI300X),
)

# M, K and N of what a core's matrix unit multiplies in a cycle, in CANN's platform files.
_BLOCKS = {"float16": (16, 16, 16), "bfloat16": (16, 16, 16), "int8": (16, 32, 16), "int4": (16, 64, 16)}


def _ascend(
    name: str,
    chip: str,
    cores: int,
    megahertz: int,
    gibibytes: int,
    cache_mebibytes: int,
    memory: Rate,
    kinds: tuple[str, ...] = tuple(_BLOCKS),
    watts: Rate | None = None,
    aliases: tuple[str, ...] = (),
) -> Sheet:
    """From what CANN's platform file says of the chip; bandwidth it does not have."""
    file = f"{chip}.ini of CANN 8.1.RC1"

    def rate(kind: str) -> Rate:
        m, k, n = _BLOCKS[kind]
        source = f"derived: {cores} cores x {megahertz} MHz x {m} x {k} x {n} x 2, of {file}"
        return Rate(cores * megahertz * 1e6 * m * k * n * 2, source)

    return Sheet(
        name,
        Rate(gibibytes * 2**30, file),
        memory,
        {kind: rate(kind) for kind in COMPUTE if kind in kinds},
        Rate(cache_mebibytes * 2**20, file),
        watts=watts,
        aliases=(chip, *aliases),
        chip=chip,
    )


def _quoted(gigabytes_s: float, text: str) -> Rate:
    return Rate(gigabytes_s * 1e9, f"quoted: {text}", quoted=True)


_ASCENDS = (
    _ascend("910B1", "Ascend910B1", 24, 1850, 64, 192, _quoted(1600, "about 1600 GB/s; no sheet of Huawei's has it")),
    _ascend("910B2", "Ascend910B2", 24, 1800, 64, 192, _quoted(1600, "about 1600 GB/s; no sheet of Huawei's has it")),
    _ascend("910B3", "Ascend910B3", 20, 1800, 64, 192, _quoted(1200, "1200 to 1600 GB/s, by different pages")),
    _ascend("910B4", "Ascend910B4", 20, 1500, 32, 96, _quoted(800, "800 to 1200 GB/s, by different pages")),
    _ascend(
        "910C", "Ascend910_9391", 24, 1850, 64, 192,
        _quoted(1600, "CloudMatrix384, arXiv 2506.12708: 3200 GB/s of a package; this is one of its two dies"),
        aliases=("910C die",),
    ),
    # Its matrix unit multiplies int4, too, but no operator of torch-npu has it do so.
    _ascend(
        "310P3", "Ascend310P3", 8, 1060, 24, 16, _quoted(204.8, "204.8 GB/s of LPDDR4X"), ("float16", "int8"),
        Rate(72, "quoted: of an Atlas 300I Pro card", quoted=True), ("310P",),
    ),
)  # fmt: skip

SHEETS = {sheet.name: sheet for sheet in (*_GPUS, _AMD, *_ASCENDS)}
_BY_NAME = {
    _plain(name): sheet
    for sheet in SHEETS.values()
    for name in (sheet.name, *sheet.aliases, *sheet.torch_names)
}  # fmt: skip
