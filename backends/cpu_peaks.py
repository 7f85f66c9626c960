"""What a CPU could do at most, by what it says of itself: cores x clock x operations in a cycle. No torch here.

How many multiplications a core starts in a cycle no CPU says: two units of the full width are assumed, which is true of
most server cores and twice too many of some (narrow AVX-512); what is measured on the CPU goes before all of this.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from .device import Peak

_ROOT = Path("/")
_UNITS = "two units assumed"

# By kind of numbers: the flags that an instruction takes, operations of a core in a cycle (a product and its sum are
# two), and how it comes to them. The first whose flags are all there is taken.
_INSTRUCTIONS: dict[str, tuple[tuple[tuple[str, ...], float, str], ...]] = {
    "float32": (
        (("avx512f",), 64, f"16 lanes x 2 FMA x 2 (AVX-512; {_UNITS})"),
        (("avx2", "fma"), 32, f"8 lanes x 2 FMA x 2 (AVX2; {_UNITS})"),
        (("asimd",), 16, f"4 lanes x 2 FMA x 2 (NEON; {_UNITS})"),
        (("neon",), 16, f"4 lanes x 2 FMA x 2 (NEON; {_UNITS})"),
    ),
    "float16": (
        (("amx_fp16",), 1024, "a tile of 16 x 32 x 16 products in 16 cycles x 2 (AMX)"),
        (("avx512_fp16",), 128, f"32 lanes x 2 FMA x 2 (AVX-512; {_UNITS})"),
        (("asimdhp",), 32, f"8 lanes x 2 FMA x 2 (NEON; {_UNITS})"),
    ),
    "bfloat16": (
        (("amx_tile", "amx_bf16"), 1024, "a tile of 16 x 32 x 16 products in 16 cycles x 2 (AMX)"),
        (("avx512_bf16",), 128, f"32 products x 2 x 2 (vdpbf16ps; {_UNITS})"),
        (("asimd", "bf16"), 64, f"16 products x 2 x 2 (bfmmla; {_UNITS})"),
    ),
    "int8": (
        (("amx_tile", "amx_int8"), 2048, "a tile of 16 x 64 x 16 products in 16 cycles x 2 (AMX)"),
        (("avx512_vnni",), 256, f"64 products x 2 x 2 (vpdpbusd of 512 bits; {_UNITS})"),
        (("avx_vnni",), 128, f"32 products x 2 x 2 (vpdpbusd of 256 bits; {_UNITS})"),
        # As csrc/ has it: two vpmaddubsw are added in 16 bits and widened by one vpmaddwd, so that of three
        # multiplications two are of bytes. Two byte codes of full range would overflow, and go at half of this.
        (("avx512bw",), 2 * 64 * 2 * 2 / 3, f"64 products x 2 x 2 x 2/3 (vpmaddubsw of 512 bits; {_UNITS})"),
        (("avx2",), 2 * 32 * 2 * 2 / 3, f"32 products x 2 x 2 x 2/3 (vpmaddubsw of 256 bits; {_UNITS})"),
        (("asimd", "i8mm"), 128, f"32 products x 2 x 2 (smmla; {_UNITS})"),
        (("asimddp",), 64, f"16 products x 2 x 2 (sdot; {_UNITS})"),
    ),
}


def cpu_peaks(root: Path = _ROOT, cpus: Collection[int] | None = None) -> dict[str, Peak | None]:
    """Operations a second by kind of numbers, of all cores that `cpus` are on; None: the CPU has no instruction for the
    kind, or does not tell its clock.

    root   of the machine's files
    cpus   processors, as the system numbers them; None: those that this process may use. Two that are hyperthreads of
           one core share its units; a share of their time (a quota) is not looked at
    """
    table = _processors(root)
    numbers = sorted(usable_cpus() if cpus is None else cpus)
    cores = [members[0] for members in _cores(root, table, numbers)]
    clocks = [_clock(root, table, number) for number in cores]
    known = [hertz for hertz in clocks if hertz is not None]
    flags = _flags(table)
    if not known or len(known) < len(cores):
        return dict.fromkeys(_INSTRUCTIONS)
    told = f"{len(cores)} cores x {_span(known)} GHz ({_clock_source(root, cores[0])})"
    return {kind: _peak(rows, flags, sum(known), told) for kind, rows in _INSTRUCTIONS.items()}


def last_level_cache(root: Path = _ROOT, cpus: Collection[int] | None = None) -> int | None:
    """Bytes of the last-level caches together that the processors `cpus` use, each once; None: the system does not
    say. root, cpus: as for `cpu_peaks`."""
    sizes: dict[tuple[int, ...], int] = {}
    for number in usable_cpus() if cpus is None else cpus:
        found = max(_caches(root, number), default=None)
        if found is None:
            return None
        _, shared, size = found
        sizes[shared] = size
    return sum(sizes.values()) or None


def usable_cpus() -> Collection[int]:
    """Numbers of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _peak(
    rows: Iterable[tuple[tuple[str, ...], float, str]], flags: Collection[str], hertz: float, told: str
) -> Peak | None:
    """hertz: of all cores together."""
    for needed, operations, how in rows:
        if all(flag in flags for flag in needed):
            return Peak(hertz * operations, f"derived: {told} x {how}")
    return None


def _processors(root: Path) -> dict[int, dict[str, str]]:
    """The blocks of /proc/cpuinfo by number; empty where there is no such file."""
    found: dict[int, dict[str, str]] = {}
    fields: dict[str, str] = {}
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, colon, value = (part.strip() for part in line.partition(":"))
        if name == "processor" and value.isdigit():  # on old ARM also a name, before the first block
            fields = found[int(value)] = {}
        elif colon:
            fields.setdefault(name, value)
    return found


def _flags(table: dict[int, dict[str, str]]) -> frozenset[str]:
    """What every processor has: a program may be moved from one to another."""
    each = [frozenset(of.get("flags", of.get("Features", "")).split()) for of in table.values()]
    return frozenset.intersection(*each) if each else frozenset()


def _cores(root: Path, table: dict[int, dict[str, str]], numbers: Iterable[int]) -> list[list[int]]:
    """Processors by the core that they are on. Where nothing tells, each is a core."""
    cores: dict[object, list[int]] = {}
    for number in numbers:
        siblings = _text(_cpu(root, number) / "topology/thread_siblings_list")
        of = table.get(number, {})
        core: object = number
        if siblings is not None:
            core = tuple(_list(siblings))
        elif "core id" in of:
            core = (of.get("physical id"), of["core id"])
        cores.setdefault(core, []).append(number)
    return list(cores.values())


def _clock(root: Path, table: dict[int, dict[str, str]], number: int) -> float | None:
    """In hertz: the highest that the system would set, else the present one."""
    highest = _text(_cpu(root, number) / "cpufreq/cpuinfo_max_freq")
    try:
        hertz = float(highest) * 1e3 if highest is not None else float(table[number]["cpu MHz"]) * 1e6
    except (KeyError, ValueError):
        return None
    return hertz if hertz > 0 else None


def _clock_source(root: Path, number: int) -> str:
    if (_cpu(root, number) / "cpufreq/cpuinfo_max_freq").exists():
        return "cpuinfo_max_freq"
    return "now, by /proc/cpuinfo; a boost may exceed it"


def _span(hertz: Collection[float]) -> str:
    low, high = min(hertz) / 1e9, max(hertz) / 1e9
    return f"{high:.2f}" if high - low < 0.01 else f"{low:.2f}-{high:.2f}"


def _caches(root: Path, number: int) -> list[tuple[int, tuple[int, ...], int]]:
    """(level, the processors that share it, bytes) of every cache of data that a processor has."""
    found = []
    for place in (_cpu(root, number) / "cache").glob("index[0-9]*"):
        level, size, shared = (_text(place / name) for name in ("level", "size", "shared_cpu_list"))
        if _text(place / "type") != "Instruction" and level and size and shared:
            found.append((int(level), tuple(_list(shared)), _bytes(size)))
    return found


def _bytes(size: str) -> int:
    """ "32768K" """
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)


def _list(text: str) -> list[int]:
    """ "0-1,4" -> [0, 1, 4]"""
    spans = (part.partition("-") for part in text.split(","))
    return [number for low, _, high in spans for number in range(int(low), int(high or low) + 1)]


def _cpu(root: Path, number: int) -> Path:
    return root / f"sys/devices/system/cpu/cpu{number}"


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
