"""What a device gives at most, as a roofline asks: arithmetic by kind of numbers, memory, what starting an op costs.

From a data sheet (sheets.py), from a CPU's own description, or measured on the very device. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Kinds of numbers that products are computed in, as a roofline's ceilings are named.
COMPUTE = ("float32", "float16", "bfloat16", "float8", "int8", "int4")


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
class Ceilings:
    """Of one device.

    memory     bytes a second
    compute    operations a second by a kind in COMPUTE, without sparsity; a kind that the device has not is left out
    gemv       bytes of weights a second that a product with one row reads, by how weights are kept ("float32",
               "bfloat16", "w4a16"); measured alone
    products   operations a second of a large product by the same names as `gemv`; measured alone
    launch     seconds that an op takes that does nothing; measured alone
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
        }
