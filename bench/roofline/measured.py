"""What this very device gives at most, measured: its memory, products of one row and of many, and what an op costs.

Memory by copy and triad, bytes as STREAM counts them (cs.virginia.edu/stream), over arrays that no cache holds. Weights
of one row's product take turns, so that each comes from memory. Every figure is a median with its spread (windows.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...backends import ascend
from ...backends.accelerator import module_of
from ...backends.ceilings import ATTENTION, COMPUTE, Ceilings, Pace, Rate
from ...backends.cpu_peaks import last_level_cache
from ...backends.device import Device
from ...backends.sheets import Sheet, sheet_named
from ...kernels import limits, ops
from .paces import PaceSizes, attention_pace, pace
from .weights import DENSE, KINDS, MATRIX, PACKED, Form, Weight, forms_of, matrix_forms
from .windows import LIMIT, Windows

_log = logging.getLogger(__name__)

_SLOW = 0.05  # seconds of a call
_FAST = 2e-4  # less, and starting the call would be a good part of it on a GPU
_LEAST = 512  # features that are not halved


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    features, rows   of a weight, in and out, and of x in the large products. Features are halved for a form whose call
                  takes more than _SLOW; where a call takes less than _FAST, the features of a product with one row are
                  doubled, up to most_features, or the rows of a large one, up to most_rows
    least_bytes, caches   an array of the stream, and the weights that take turns together: at least so many bytes, and
                  so many times the last-level cache; never above a quarter of free memory
    windows, window_s, limit   of each figure (windows.py)
    paces         of products between other ops (paces.py)
    """

    features: int = 4096
    rows: int = 256
    most_features: int = 16384
    most_rows: int = 8192
    least_bytes: int = 64 << 20
    caches: int = 4
    windows: int = 9
    window_s: float = 0.02
    limit: float = LIMIT
    paces: PaceSizes = field(default_factory=PaceSizes)


_SIZES = Sizes()


@torch.no_grad()
def measure_ceilings(device: Device, say: Callable[[str], None] = _log.info, sizes: Sizes = _SIZES) -> Ceilings:
    """Of a device that nobody else uses meanwhile; some 40 seconds on two cores.

    `say` is told what is not measured, and why. ValueError where a figure stays unsteady (which, its spread), or a CPU
    is shared, and what to do then.
    """
    windows = Windows(device, sizes.windows, sizes.window_s, sizes.limit)
    bench = _Bench(device, sizes, cache_bytes(device), windows, say)
    return windows.undisturbed(lambda: _measured(bench))


def _measured(bench: _Bench) -> Ceilings:
    info, sheet = bench.device.info(), _sheet(bench.device)
    ways = _memory(bench)
    forms = forms_of(bench.device, bench.sizes.features, bench.say)
    gemv = _products(bench, forms, _one_row)
    products = _products(bench, forms, _many_rows)
    compute = _compute(bench, forms, products)
    if sheet is not None and "int4" in sheet.compute:  # products in it are not measured
        compute["int4"] = sheet.compute["int4"]
    paces, launch = _paces(bench, forms)
    return Ceilings(
        info["name"],
        # What a product read from memory, memory gives.
        _fastest(ways | {f"{name} with one row": rate for name, rate in gemv.items()}, 1e9, "GB/s"),
        compute,
        info["memory_bytes"],
        bench.cache,
        gemv,
        products,
        launch,
        1.0 if sheet is None else sheet.sparse24.value,
        None if sheet is None or sheet.watts is None else sheet.watts.value,
        paces,
    )


def cache_bytes(device: Device) -> int | None:
    """Of the last-level cache; None: the device does not tell."""
    if device.kind == "cpu":
        return last_level_cache()
    if device.kind == ascend.NAME:
        return device.info()["l2_bytes"]
    has = module_of(device.torch_device).get_device_properties(device.torch_device)
    return int(getattr(has, "L2_cache_size", 0)) or None


def _sheet(device: Device) -> Sheet | None:
    """Of the whole device; None for a slice of a GPU, and for one that has none."""
    info = device.info()
    try:
        sheet = sheet_named(info["name"])
    except ValueError:
        return None
    return sheet if info.get("multiprocessors", sheet.multiprocessors) == sheet.multiprocessors else None


@dataclass(frozen=True)
class _Bench:
    device: Device
    sizes: Sizes
    cache: int | None
    windows: Windows
    say: Callable[[str], None]

    @property
    def at(self) -> torch.device:
        return self.device.torch_device

    def spilling(self) -> int:
        """Bytes that no cache holds, as far as memory allows."""
        wanted = max(self.sizes.least_bytes, self.sizes.caches * (self.cache or 0))
        return min(wanted, self.device.free_memory() // 4)


def _memory(bench: _Bench) -> dict[str, Rate]:
    """Bytes a second by the way through memory."""
    size = bench.spilling() // 4 * 4
    if size < bench.sizes.caches * (bench.cache or 0):
        bench.say(f"memory: arrays of {_mebibytes(size)}, which the cache may hold in part: no more is free")
    told = f"measured: arrays of {_mebibytes(size)}"
    a, b, c = (torch.ones(size // 4, device=bench.at) for _ in range(3))
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, lambda: a.copy_(b)),
        "triad": (3, lambda: torch.add(b, c, alpha=0.5, out=a)),
    }
    reads = bench.device.kind == "cpu" and bool(ops.available_isas())
    if bench.device.kind == "cpu" and not reads:
        ways["dot"] = (2, lambda: torch.dot(b, c))
    found = {way: bench.windows.rate(f"memory, {way}", n * size, call, told) for way, (n, call) in ways.items()}
    if reads:
        limits.read_bandwidth(size, 1)  # maps its memory
        rate, spread = bench.windows.sampled("memory, read", lambda: limits.read_bandwidth(size, 1))
        found["read"] = Rate(rate, told, spread=spread)
    return found


def _products(bench: _Bench, forms: dict[str, Form], product: Callable[[_Bench, str, Form], Rate]) -> dict[str, Rate]:
    """By how weights are kept; product: _one_row or _many_rows."""
    found = {}
    for name, form in forms.items():
        try:
            found[name] = product(bench, name, form)
        except RuntimeError as error:  # a dtype that this device has no product for
            bench.say(f"{name}: not measured: {str(error).splitlines()[0]}")
    return found


def _fitting(bench: _Bench, form: Form, rows: int) -> tuple[Tensor, Weight]:
    """x [rows, features] and a weight of which a call takes neither too long nor hardly any time."""
    sizes, features = bench.sizes, bench.sizes.features
    while True:
        weight = next(form.make(features, 1))
        x = torch.randn(rows, features, device=bench.at).to(form.dtype)
        seconds = bench.windows.once(lambda w=weight, x=x: w.multiply(x))  # type: ignore[misc]
        if seconds > _SLOW and features // 2 >= _LEAST:
            features //= 2
        elif seconds < _FAST and rows == 1 and 2 * features <= sizes.most_features:
            features *= 2
        elif seconds < _FAST and 1 < rows <= sizes.most_rows // 2:
            rows *= 2
        else:
            return x, weight


def _one_row(bench: _Bench, name: str, form: Form) -> Rate:
    """Bytes of weights a second: more of them than a cache holds take turns."""
    x, weight = _fitting(bench, form, 1)
    features = x.shape[-1]
    weights = list(form.make(features, max(2, math.ceil(bench.spilling() / weight.bytes))))

    def turn() -> None:
        for each in weights:
            each.multiply(x)

    told = f"measured: {form.told}, 1 x {features} x {features}, {len(weights)} weights in turns"
    return bench.windows.rate(f"{name}, one row", sum(each.bytes for each in weights), turn, told)


def _many_rows(bench: _Bench, name: str, form: Form) -> Rate:
    """Operations a second."""
    x, weight = _fitting(bench, form, bench.sizes.rows)
    rows, features = x.shape
    told = f"measured: {form.told}, {rows} x {features} x {features}"
    return bench.windows.rate(f"{name}, {rows} rows", 2 * rows * features**2, lambda: weight.multiply(x), told)


def _compute(bench: _Bench, forms: dict[str, Form], products: dict[str, Rate]) -> dict[str, Rate]:
    """Operations a second by kind: of the fastest among its products and, on a CPU, its instructions by themselves."""
    found: dict[str, dict[str, Rate]] = {kind: {} for kind in COMPUTE}
    for name, rate in products.items():
        if name in DENSE:
            found[name][name] = rate
        elif PACKED[name][2] is None:
            found[KINDS[forms[name].dtype]][name] = rate
        elif not (name == "w4a4" and bench.device.kind == ascend.NAME):  # whose operator multiplies int4 as such
            found["int8"][name] = rate
    extra = _products(bench, matrix_forms(bench.device), _many_rows)
    for name, rate in extra.items():
        found[KINDS[MATRIX[name]]][name] = rate
    for kind, rates in _probes(bench).items():
        found[kind] |= rates
    return {kind: _fastest(rates, 1e12, "T operations/s") for kind, rates in found.items() if rates}


def _fastest(rates: dict[str, Rate], unit: float, unit_name: str) -> Rate:
    """The source says by what, and what the others gave."""
    best = max(rates, key=lambda name: rates[name].value)
    others = ", ".join(f"{name} {rate.value / unit:.3g}" for name, rate in rates.items() if name != best)
    told = f"{rates[best].source}: {best}" + (f", before {others} {unit_name}" if others else "")
    return replace(rates[best], source=told)


def _probes(bench: _Bench) -> dict[str, dict[str, Rate]]:
    """What a CPU's instructions give on registers alone. 16-bit numbers that it has none for are multiplied in
    float32."""
    if bench.device.kind != "cpu":
        return {}
    found: dict[str, dict[str, Rate]] = {}
    for kind in limits.peaks(1):
        rate, spread = bench.windows.sampled(f"probe, {kind}", lambda k=kind: limits.peaks(3)[k])  # type: ignore[misc]
        told = f"measured: {ops.isa()} instructions on registers, {bench.device.info()['threads']} threads"
        found[kind] = {f"probe of {kind}": Rate(rate, told, spread=spread)}
    for kind in ("float16", "bfloat16"):
        if "float32" in found:
            found.setdefault(kind, found["float32"])
    return found


def _paces(bench: _Bench, forms: dict[str, Form]) -> tuple[dict[str, Pace], Rate]:
    """By how weights are kept, and seconds of a small op."""
    found: dict[str, Pace] = {}
    launches: list[Rate] = []
    for name, form in forms.items():
        try:
            found[name], launch = pace(bench.device, bench.windows, name, form, bench.spilling(), bench.sizes.paces)
        except RuntimeError:  # said already, where its products were measured
            continue
        launches.append(launch)
    found[ATTENTION] = attention_pace(bench.device, bench.windows, bench.spilling())
    return found, sorted(launches, key=lambda rate: rate.value)[len(launches) // 2]


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
