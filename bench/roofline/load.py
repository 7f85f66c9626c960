"""What a profile is asked about. No torch here, so that what makes no sense is said before it loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .speculation import expected_depth, expected_tokens


@dataclass(frozen=True)
class Load:
    """What is served: so many sequences side by side, tokens of each prompt, and tokens of each answer."""

    batches: tuple[int, ...] = (1,)
    prompt: int = 512
    new: int = 128

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batch: {', '.join(map(str, self.batches)) or 'none'}; expected numbers from 1 on")
        for name, value, least in (("prompt", self.prompt, 1), ("new", self.new, 2)):
            if value < least:
                raise ValueError(f"{name}: {value} is below {least}")

    @property
    def context(self) -> int:
        """Tokens in the cache before the middle one of the answer."""
        return self.prompt + (self.new - 1) // 2


@dataclass(frozen=True)
class Early:
    """How a model leaves early, or drafts: tokens by depth; layers that draft, tokens drafted, and the probability that
    one of them is the whole model's."""

    histogram: Mapping[int, int] = field(default_factory=dict)
    draft: tuple[int, int, float] | None = None

    def check(self, layers: int) -> None:
        """ValueError for what a model of so many layers cannot do."""
        for depth in self.histogram:
            if not 1 <= depth <= layers:
                raise ValueError(f"histogram: depth {depth} is not from 1 to {layers}, the model's layers")
        if self.histogram:
            expected_depth(self.histogram)
        if self.draft is not None:
            drafting, length, accept = self.draft
            if not 1 <= drafting < layers:
                raise ValueError(f"draft layers: {drafting} is not from 1 to {layers - 1}")
            if length < 1:
                raise ValueError(f"draft length: {length} is below 1")
            expected_tokens(accept, length)
