"""What a device gives at most, as a roofline asks: arithmetic by kind of numbers, memory, what starting an op costs.

From a data sheet (sheets.py), from a CPU's own description, or measured on the very device. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# Kinds of numbers that products are computed in, as a roofline's ceilings are named.
COMPUTE = ("float32", "float16", "bfloat16", "float8", "int8", "int4")

# Name of the pace of attention, which has no weights.
ATTENTION = "attention"


@dataclass(frozen=True)
class Rate:
    """One number of a device.

    value    operations a second (a product and its sum are two, dense), bytes a second, or seconds
    source   where it comes from, in words
    quoted   told by others than the maker, or by sources that contradict each other
    spread   of a measured one: interquartile range over the median; None: it was not measured
    """

    value: float
    source: str
    quoted: bool = False
    spread: float | None = None

    @property
    def measured(self) -> bool:
        return self.spread is not None

    def as_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "source": self.source,
            "measured": self.measured,
            "quoted": self.quoted,
            "spread": self.spread,
        }


@dataclass(frozen=True)
class Pace:
    """Of products with weights that are kept in one way, as a model makes them: between other ops.

    start   seconds that one takes beyond its weights
    rows    operations a second without that, by the rows of x
    """

    start: Rate
    rows: Mapping[int, Rate]

    def as_json(self) -> dict[str, Any]:
        return {
            "start": self.start.as_json(),
            "rows": {str(count): rate.as_json() for count, rate in self.rows.items()},
        }


@dataclass(frozen=True)
class Ceilings:
    """Of one device.

    memory     bytes a second
    compute    operations a second by a kind in COMPUTE, without sparsity; a kind that the device has not is left out
    gemv       bytes of weights a second that a product with one row reads, by how weights are kept ("float32",
               "bfloat16", "w4a16"); measured alone
    products   operations a second of a large product by the same names as `gemv`; measured alone
    launch     seconds that a small op takes; measured alone
    paces      how products go in a model, by the same names as `gemv`; measured alone
    memory_bytes, cache_bytes   of the device, and of its last-level cache; None: not known
    sparse24   how many times faster 2:4 weights are multiplied, where the device has that; 1.0 elsewhere
    watts      power that its maker allows; None: not known
    """

    device: str
    memory: Rate
    compute: Mapping[str, Rate]
    memory_bytes: int | None = None
    cache_bytes: int | None = None
    gemv: Mapping[str, Rate] = field(default_factory=dict)
    products: Mapping[str, Rate] = field(default_factory=dict)
    launch: Rate | None = None
    sparse24: float = 1.0
    watts: float | None = None
    paces: Mapping[str, Pace] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "dense": True,
            "memory": self.memory.as_json(),
            "compute": {name: rate.as_json() for name, rate in self.compute.items()},
            "gemv": {name: rate.as_json() for name, rate in self.gemv.items()},
            "products": {name: rate.as_json() for name, rate in self.products.items()},
            "launch": None if self.launch is None else self.launch.as_json(),
            "memory_bytes": self.memory_bytes,
            "cache_bytes": self.cache_bytes,
            "sparse24": self.sparse24,
            "watts": self.watts,
            "paces": {name: pace.as_json() for name, pace in self.paces.items()},
        }


def ceilings_from_json(value: object) -> Ceilings:
    """What `Ceilings.as_json` wrote, and nothing else; ValueError names the first thing that is missing, too much or of
    another type."""
    told = _object(value, "ceilings", _FIELDS)
    if told["dense"] is not True:
        raise ValueError(f"dense: {told['dense']!r} is not true")
    if unknown := set(_object(told["compute"], "compute")) - set(COMPUTE):
        raise ValueError(f"compute: {min(unknown)!r} is not one of {', '.join(COMPUTE)}")
    return Ceilings(
        _text(told["device"], "device"),
        _rate(told["memory"], "memory"),
        _rates(told["compute"], "compute"),
        _whole(told["memory_bytes"], "memory_bytes"),
        _whole(told["cache_bytes"], "cache_bytes"),
        _rates(told["gemv"], "gemv"),
        _rates(told["products"], "products"),
        None if told["launch"] is None else _rate(told["launch"], "launch"),
        _positive(told["sparse24"], "sparse24"),
        None if told["watts"] is None else _positive(told["watts"], "watts"),
        {name: _pace(each, f"paces.{name}") for name, each in _object(told["paces"], "paces").items()},
    )


_FIELDS = (
    *("device", "dense", "memory", "compute", "gemv", "products", "launch"),
    *("memory_bytes", "cache_bytes", "sparse24", "watts", "paces"),
)
_RATE_FIELDS = ("value", "source", "measured", "quoted", "spread")


def _rates(value: object, where: str) -> dict[str, Rate]:
    return {name: _rate(each, f"{where}.{name}") for name, each in _object(value, where).items()}


def _pace(value: object, where: str) -> Pace:
    told = _object(value, where, ("start", "rows"))
    rows = _rates(told["rows"], f"{where}.rows")
    if not rows or not all(count.isdecimal() and int(count) for count in rows):
        raise ValueError(f"{where}.rows: {', '.join(rows) or 'empty'}; expected numbers of rows")
    return Pace(_rate(told["start"], f"{where}.start"), {int(count): rate for count, rate in rows.items()})


def _rate(value: object, where: str) -> Rate:
    told = _object(value, where, _RATE_FIELDS)
    spread = told["spread"]
    if spread is not None and (spread != 0 or isinstance(spread, bool)):
        spread = _positive(spread, f"{where}.spread")
    for name in ("measured", "quoted"):
        if not isinstance(told[name], bool):
            raise ValueError(f"{where}.{name}: {told[name]!r} is neither true nor false")
    rate = Rate(_positive(told["value"], f"{where}.value"), _text(told["source"], f"{where}.source"), told["quoted"])
    if told["measured"] is not (spread is not None):
        raise ValueError(f"{where}.measured: {told['measured']} does not go with a spread of {spread}")
    return replace(rate, spread=spread)


def _object(value: object, where: str, fields: tuple[str, ...] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where}: {type(value).__name__} is not an object")
    if fields is not None and set(value) != set(fields):
        raise ValueError(f"{where}: {', '.join(sorted(set(value) ^ set(fields)))} missing, or too much")
    return value


def _positive(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{where}: {value!r} is not a number above 0")
    return float(value)


def _whole(value: object, where: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{where}: {value!r} is not a whole number above 0")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {value!r} is not a text")
    return value
