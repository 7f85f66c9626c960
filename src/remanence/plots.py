"""The two pictures of an audit: how much came back (forest), and forgetting against keeping (scatter)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from .bench.verdict import KEPT, MARGIN
from .labels import Row, interval, number, word
from .svg import Labels, arrow, drawing, legend, line, mark, shorten, tag, text

WIDTH = 780
# Shares beyond these ends are drawn as arrows at the edge; their figures stand at the right.
LOW, HIGH = -0.2, 1.2
USUAL = "unlearned..baseline"

Scale = Callable[[float], float]


def forest(rows: list[Row], recipes: list[str]) -> Markup:
    """Recovered share with its interval, one line per cell, grouped by model; audited models first."""
    left = 24 + 6.7 * min(28, max(map(len, recipes)))
    right = WIDTH - 160.0
    step = 19 if len(rows) * len(recipes) <= 50 else 16

    def x(share: float) -> float:
        return left + (min(max(share, LOW), HIGH) - LOW) / (HIGH - LOW) * (right - left)

    body, y, top = [], 62.0, 44.0
    for i, row in enumerate(rows):
        if row.role and (i == 0 or not rows[i - 1].role):
            y += 8
            body += [text(0, y + 4, "CONTROLS", "small"), line(0, y + 10, WIDTH, y + 10, "rule")]
            y += 26
        body.append(text(0, y + 4, shorten(row.title, 60), "name"))
        for recipe in (r for r in recipes if r in row.cells):
            y += step
            body.append(text(12, y + 4, shorten(recipe, 28), "code"))
            body += _share(row, recipe, y, x)
        y += step + 10
    bottom = y - 8
    return drawing(WIDTH, bottom + 44, _forest_title(rows), [*_forest_axes(x, top, bottom), *legend(left, 12), *body])


def _forest_title(rows: list[Row]) -> str:
    return f"Forest plot: recovered share with its 95% interval, {sum(len(r.cells) for r in rows)} cells."


def _forest_axes(x: Scale, top: float, bottom: float) -> list[Markup]:
    parts = [tag("rect", x=x(MARGIN), y=top, width=x(HIGH) - x(MARGIN), height=bottom - top, class_="zone")]
    parts += [line(x(v), top, x(v), bottom, "axis") for v in (0, 1)]
    parts.append(line(x(MARGIN), top, x(MARGIN), bottom, "margin"))
    parts += [
        text(x(0), top - 6, "none", "small", "end"),
        text(x(MARGIN), top - 6, f"margin {MARGIN:.2f}", "small"),
        text(x(1), top - 6, "all", "small", "middle"),
        text(WIDTH, top - 6, "share [95% interval]", "small", "end"),
        line(x(LOW), bottom, x(HIGH), bottom, "axis"),
        text(x(0.5), bottom + 34, "recovered share of what was forgotten (no unit)", "", "middle"),
    ]
    for value in (0, 0.25, 0.5, 0.75, 1):
        parts.append(line(x(value), bottom, x(value), bottom + 4, "axis"))
        parts.append(text(x(value), bottom + 16, f"{value:g}", "small", "middle"))
    return parts


def _share(row: Row, recipe: str, y: float, x: Scale) -> list[Markup]:
    """One line of the forest plot."""
    cell = row.cells[recipe]
    verdict = word(cell)
    if verdict == "failed":
        return [text(WIDTH, y + 4, "failed", "small", "end")]
    share = cell["recovered_share"]
    value, low, high = share["value"], share["low"], share["high"]
    note = "†" if share.get("of", USUAL) != USUAL else ""
    parts = [text(WIDTH, y + 4, interval(share) + note, "figures", "end")]
    if not _finite(value, low, high):
        return parts
    parts.append(line(x(low), y, x(high), y, f"whisker {verdict}"))
    if low < LOW:
        parts.append(arrow(x(LOW), y, -1, verdict))
    if high > HIGH:
        parts.append(arrow(x(HIGH), y, 1, verdict))
    if LOW <= value <= HIGH:
        parts.append(mark(x(value), y, verdict, f"{row.name} {recipe}: {verdict}, {interval(share)}"))
    return parts


def scatter(rows: list[Row], recipes: list[str]) -> Markup:
    """Forget against retain probability, one mark per cell; lines lead from dense to compressed cells."""
    cells = [cell for row in rows for cell in row.cells.values() if _has_point(cell)]
    left, right, top, bottom = 64.0, WIDTH - 16.0, 34.0, 440.0
    x_high = max(0.1, min(1.0, math.ceil(max((c["forget"] for c in cells), default=1) * 10) / 10))
    # Never a span below a tenth, so that a hair's breadth does not look like a loss.
    y_low = max(0.0, min(0.9, math.floor(min((c["retain"] for c in cells), default=0) * 10 - 0.1) / 10))

    def x(probability: float) -> float:
        # Room for names left of 0.
        return left + 76 + probability / x_high * (right - left - 92)

    def y(probability: float) -> float:
        return bottom - 14 - (probability - y_low) / (1 - y_low) * (bottom - top - 28)

    labels = Labels(left + 2, top + 2, right - 2, bottom - 2)
    inside = _damage(rows, y_low, (left, right, bottom), y, labels)
    for row in rows:
        inside += _spokes(row, x, y, labels)
    for row in rows:
        for recipe in (r for r in recipes if r in row.cells and _has_point(row.cells[r])):
            inside += _point(row, recipe, x, y, labels)
    inside += _names(rows, x, y, labels)
    key = [*legend(left + 6, 12), tag("circle", cx=left + 360, cy=8, r=8, class_="ring")]
    key.append(text(left + 374, 12, "ringed: dense, before compression"))
    title = f"Scatter plot: forget probability against retain probability, {len(cells)} cells."
    axes = _scatter_axes((left, right, top, bottom), x, y, x_high, y_low)
    return drawing(WIDTH, bottom + 44, title, [*axes, *key, *inside])


def _damage(rows: list[Row], y_low: float, ends: tuple[float, float, float], y: Scale, labels: Labels) -> list[Markup]:
    """The line below which a model is damaged, or a word on where it lies."""
    left, right, bottom = ends
    dense = next((row.cells["dense"] for row in rows if row.name == "target" and "dense" in row.cells), {})
    if not _has_point(dense):
        return []
    limit = KEPT * dense["retain"]
    if limit < y_low:
        note = f"damage begins at {number(limit)}, below this drawing"
        return [text(right - 6, bottom - 8, note, "small", "end")]
    labels.block_line(left, y(limit), right, y(limit))
    note = f"damage: below {KEPT:.0%} of the target"
    return [line(left, y(limit), right, y(limit), "damage"), text(right - 6, y(limit) + 13, note, "small", "end")]


def _scatter_axes(
    box: tuple[float, float, float, float], x: Scale, y: Scale, x_high: float, y_low: float
) -> list[Markup]:
    left, right, top, bottom = box
    parts = [tag("rect", x=left, y=top, width=right - left, height=bottom - top, class_="frame")]
    for p in _ticks(0, x_high):
        parts.append(line(x(p), top, x(p), bottom, "grid"))
        parts.append(text(x(p), bottom + 16, number(p), "small", "middle"))
    for p in _ticks(y_low, 1):
        parts.append(line(left, y(p), right, y(p), "grid"))
        parts.append(text(left - 6, y(p) + 4, number(p), "small", "end"))
    under = "forget probability, 0 to 1 (mean P of the true answers; further left: forgotten)"
    beside = f"retain probability, from {y_low:g} to 1 (higher: kept)"
    middle = f"translate(14 {(top + bottom) / 2:.0f}) rotate(-90)"
    parts.append(text((left + right) / 2, bottom + 36, under, "", "middle"))
    return [*parts, tag("text", beside, transform=middle, text_anchor="middle")]


def _ticks(low: float, high: float) -> list[float]:
    step = next(step for step in (0.02, 0.05, 0.1, 0.2) if (high - low) / step <= 6.01)
    return [low + i * step for i in range(round((high - low) / step) + 1)]


def _spokes(row: Row, x: Scale, y: Scale, labels: Labels) -> list[Markup]:
    dense = row.cells.get("dense", {})
    if not _has_point(dense):
        return []
    parts = []
    for cell in row.cells.values():
        if cell is not dense and _has_point(cell):
            ends = x(dense["forget"]), y(dense["retain"]), x(cell["forget"]), y(cell["retain"])
            labels.block_line(*ends)
            parts.append(line(*ends, "spoke"))
    return parts


def _point(row: Row, recipe: str, x: Scale, y: Scale, labels: Labels) -> list[Markup]:
    cell = row.cells[recipe]
    at = x(cell["forget"]), y(cell["retain"])
    labels.block(*at, 7 if recipe == "dense" else 5)
    figures = f"forget {number(cell['forget'], 3)}, retain {number(cell['retain'], 3)}"
    ring = [tag("circle", cx=at[0], cy=at[1], r=8, class_="ring")] if recipe == "dense" else []
    return [*ring, mark(*at, word(cell), f"{row.name} {recipe}: {word(cell)}, {figures}")]


def _names(rows: list[Row], x: Scale, y: Scale, labels: Labels) -> list[Markup]:
    """Every model's name at its dense mark; then, where there is room, the cells that returned or moved far."""
    parts, moved = [], []
    labels.anchors += [
        (x(dense["forget"]), y(dense["retain"]))
        for dense in (row.cells.get("dense", {}) for row in rows)
        if _has_point(dense)
    ]
    for row in rows:
        points = {recipe: cell for recipe, cell in row.cells.items() if _has_point(cell)}
        if not points:
            continue
        first = points.get("dense") or next(iter(points.values()))
        start = x(first["forget"]), y(first["retain"])
        parts += labels.place(*start, shorten(row.name, 28), "name", 330)
        for recipe, cell in points.items():
            at = x(cell["forget"]), y(cell["retain"])
            if math.dist(start, at) > 60:
                moved.append((at, shorten(f"{row.name} {recipe}", 40)))
    for at, name in moved:
        parts += labels.place(*at, name, "small", 60)
    return parts


def _has_point(cell: dict[str, Any]) -> bool:
    return _finite(cell.get("forget"), cell.get("retain"))


def _finite(*values: object) -> bool:
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
