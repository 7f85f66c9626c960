"""What a recovery pressure brought out of a model: one type for all pressures, compared item by item."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..statistics import Interval, bootstrap_mean


@dataclass(frozen=True)
class Pressed:
    """Knowledge of each item of the forget set, plain and under each variant of a pressure.

    measure     what the numbers are: "probability", "rouge", ...; 0 knows nothing of an item, 1 all of it
    before      per item, asked plainly
    after       variant -> per item, in the order of `before`; empty only where everything was skipped
    skipped     variant that could not be had -> reason
    notes       variant -> what must be known to read its numbers
    references  variants that are no pressure (a control; the answer given away): never the `worst`
    Raises ValueError for unlike lengths, no items or no variants, NaN or infinity (naming the item), or a reference
    that is no variant.
    """

    name: str
    measure: str
    before: list[float]
    after: dict[str, list[float]]
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.before:
            raise ValueError(f"{self.name}: before: no items; at least one is needed")
        if not self.after and not self.skipped:
            raise ValueError(f"{self.name}: after: no variants, measured or skipped; at least one is needed")
        for variant, values in {"before": self.before, **self.after}.items():
            if len(values) != len(self.before):
                raise ValueError(f"{self.name}: {variant}: {len(values)} items beside {len(self.before)} before")
            for i, value in enumerate(values):
                if not math.isfinite(value):
                    raise ValueError(f"{self.name}: {variant}: item {i} is {value}; every score must be a number")
        both = sorted(self.after.keys() & self.skipped.keys())
        if both:
            raise ValueError(f"{self.name}: {both[0]}: both measured and skipped")
        strangers = [name for name in self.references if name not in self.after and name not in self.skipped]
        if strangers:
            raise ValueError(f"{self.name}: references: {strangers[0]!r} is no variant")

    def gained(self, seed: int, over: str | None = None) -> dict[str, Interval]:
        """Mean paired difference to asking plainly, or to the variant `over` (a control), with its 95% interval.

        Above 0: the variant brings knowledge out. Raises ValueError for a variant that was not measured.
        """
        if over is not None and over not in self.after:
            raise ValueError(f"{self.name}: over: {over!r} was not measured; known: {', '.join(self.after) or 'none'}")
        base = self.before if over is None else self.after[over]
        return {
            variant: bootstrap_mean([a - b for a, b in zip(values, base, strict=True)], seed)
            for variant, values in self.after.items()
            if variant != over
        }

    @property
    def worst(self) -> str | None:
        """The variant with the highest mean, references aside, the first of equals; None where there is none."""
        means = {name: math.fsum(v) / len(v) for name, v in self.after.items() if name not in self.references}
        return max(means, key=lambda name: means[name], default=None)
