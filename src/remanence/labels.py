"""What people read in place of the document's keys: names of models, words of verdicts, figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .compress.recipe import brief

VERDICTS = ("held", "returned", "damaged", "undecided")
# A shape beside every colour: the page is also read in print and by the colour-blind.
GLYPHS = {"held": "●", "returned": "▲", "damaged": "■", "undecided": "○", "failed": "×"}
_ROLES = {"baseline": "baseline", "negative": "negative control", "positive": "positive control"}
_NONE = "–"


@dataclass(frozen=True)
class Row:
    """A model with its cells by recipe. role: its part in the assay; None for what is only audited."""

    name: str
    role: str | None
    cells: dict[str, dict[str, Any]]

    @property
    def title(self) -> str:
        return f"{self.name} ({self.role})" if self.role else self.name

    @property
    def audited(self) -> bool:
        """Whether its verdicts are findings; `bucketed` may be both a control and audited."""
        return any(cell.get("control") is None for cell in self.cells.values())


def with_brief_recipes(value: Any) -> Any:
    """The same JSON value with recipes called as people read them: long lists of layers are shortened."""
    if isinstance(value, list):
        return [with_brief_recipes(item) for item in value]
    if isinstance(value, dict):
        return {key: _brief(key, with_brief_recipes(item)) for key, item in value.items()}
    return value


def _brief(key: str, value: Any) -> Any:
    return brief(value) if key == "recipe" and isinstance(value, str) else value


def role(method: str, control: str | None) -> str | None:
    """A model's part in the assay, None for one that is only audited."""
    return _ROLES["positive"] if method == "bucketed" else _ROLES.get(control or "")


def label(method: str, control: str | None) -> str:
    """A row's name: the model with its part in the assay."""
    part = role(method, control)
    return f"{method} ({part})" if part else method


def word(cell: dict[str, Any]) -> str:
    """The cell's verdict, or "failed" for a cell that could not be measured."""
    return "failed" if "error" in cell else str(cell["verdict"])


def not_forgotten(cell: dict[str, Any]) -> bool:
    """Whether the verdict stayed open because nothing had been forgotten that could return."""
    return bool(cell.get("unforgotten")) and cell["verdict"] == "undecided"


def number(value: object, digits: int = 2) -> str:
    """`value` with `digits` decimals and a true minus sign, never a negative zero; a dash for what is no number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return _NONE
    text = f"{abs(value):,.{digits}f}"
    return f"−{text}" if value < 0 and text.strip("0.,") else text


def significant(value: object, unit: float = 1) -> str:
    """`value` in `unit`s with three significant digits, all digits of what is larger."""
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value == 0:
        return number(value, 0)
    return number(value / unit, max(0, 2 - math.floor(math.log10(abs(value / unit)))))


def interval(share: object, digits: int = 2) -> str:
    """A {value, low, high} as `value [low, high]`; a dash without one."""
    if not isinstance(share, dict):
        return _NONE
    value, low, high = (number(share.get(key), digits) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def duration(seconds: float) -> str:
    """Seconds as people say them: 41 s, 4 min 35 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def listing(names: list[str]) -> str:
    """The names in a sentence: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
