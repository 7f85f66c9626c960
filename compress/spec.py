"""What the numbers mean (QuantSpec, PruneSpec), how they were chosen (Recipe). Small, frozen, printable, hashable.

Short names: `dense` keeps the checkpoint as it is; `<method>-w<bits>a16[-g<group size>]`, e.g. `rtn-w4a16-g64`, or
`rtn-w8a16` for one scale per output channel. `a16` says that activations stay in the model's own dtype; it may be left
out when asking (`rtn-w4-g64`). `<method>-s<percent>`, e.g. `magnitude-s50`, sets that percentage of weights to zero.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

BITS = (3, 4, 8)
METHODS = ("rtn",)
PRUNERS = ("magnitude",)
_COMMON = (
    "dense",
    "rtn-w8a16",
    "rtn-w8a16-g64",
    "rtn-w4a16",
    "rtn-w4a16-g64",
    "rtn-w4a16-g128",
    "rtn-w3a16-g64",
    "magnitude-s30",
    "magnitude-s50",
    "magnitude-s70",
)


@dataclass(frozen=True)
class QuantSpec:
    """A weight format: symmetric integers of `bits` bits, one scale per `group_size` input features.

    group_size None: one scale per output channel. code = q + 2^(bits-1), w = q * scale.
    """

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits: {self.bits} is not one of {', '.join(map(str, BITS))}")
        if self.group_size is not None and (self.group_size < 16 or self.group_size % 8):
            raise ValueError(f"group_size: {self.group_size} is not a multiple of 8, at least 16")

    def groups(self, features: int) -> int:
        """Number of groups along `features` input features; ValueError when they do not divide."""
        if self.group_size is None:
            return 1
        if features % self.group_size:
            raise ValueError(f"{features} input features do not divide into groups of {self.group_size}")
        return features // self.group_size


@dataclass(frozen=True)
class PruneSpec:
    """Unstructured sparsity: the share of every layer's own weights that is zero, in whole percent from 10 to 90."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0.1 <= self.sparsity <= 0.9 or self.sparsity != self.percent / 100:
            raise ValueError(f"sparsity: {self.sparsity} is not a whole percentage from 0.1 to 0.9")

    @property
    def percent(self) -> int:
        return round(100 * self.sparsity)


@dataclass(frozen=True)
class Recipe:
    """How a model is made smaller: a method, a format, and what stays as it is. spec None: nothing is quantized.

    ignore   module names that stay dense; the output head by default, as everywhere in the field
    prune    what becomes zero, by `method`; a recipe prunes or quantizes, not both
    """

    method: str
    spec: QuantSpec | None
    ignore: tuple[str, ...] = ("lm_head",)
    prune: PruneSpec | None = None

    def __post_init__(self) -> None:
        if self.prune is not None and self.spec is not None:
            raise ValueError(f"prune: {self.prune} beside {self.spec}; a recipe prunes or quantizes, not both")

    @property
    def compresses(self) -> bool:
        """Whether it changes any weight."""
        return self.spec is not None or self.prune is not None

    @property
    def name(self) -> str:
        if self.prune is not None:
            return f"{self.method}-s{self.prune.percent}"
        if self.spec is None:
            return self.method
        group = "" if self.spec.group_size is None else f"-g{self.spec.group_size}"
        return f"{self.method}-w{self.spec.bits}a16{group}"

    def __str__(self) -> str:
        return self.name


DENSE = Recipe("dense", None)


def parse_recipe(name: str) -> Recipe:
    """A Recipe from its short name; ValueError suggests the nearest one."""
    if name == "dense":
        return DENSE
    quantizer = re.fullmatch(r"([a-z]+)-w(\d+)(?:a16)?(?:-g(\d+))?", name)
    pruner = re.fullmatch(r"([a-z]+)-s(\d+)", name)
    try:
        if quantizer and quantizer[1] in METHODS:
            return Recipe(quantizer[1], QuantSpec(int(quantizer[2]), int(quantizer[3]) if quantizer[3] else None))
        if pruner and pruner[1] in PRUNERS:
            return Recipe(pruner[1], None, prune=PruneSpec(int(pruner[2]) / 100))
    except ValueError as error:
        raise ValueError(f"recipe: {name!r}: {error}") from None
    near = difflib.get_close_matches(name, _COMMON, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"known forms: {', '.join(_COMMON)}"
    raise ValueError(f"recipe: {name!r} is unknown; {hint}")
