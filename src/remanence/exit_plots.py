"""The two pictures of an audit of exits: what each layer knows of the forgotten (leak curve), and forgetting against
depth (Pareto)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from .labels import number
from .svg import Labels, drawing, legend, line, mark, shorten, tag, text

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 780, 64.0, 764.0, 34.0, 340.0
WHO = ("target", "unlearned", "oracle")


def leak_plot(name: str, leak: Mapping[str, Any]) -> Markup:
    """Probability of the forgotten answers by layer, with bands of 95%, of one model beside target and oracle.

    leak   as bench/exit_audit.py's document has it. A ring stands at the layers that are shown to leak.
    """
    layers = leak["layers"]

    def x(layer: float) -> float:
        return LEFT + 20 + (layer - 1) / max(1, len(layers) - 1) * (RIGHT - LEFT - 40)

    parts = _axes(f"probability of the forgotten answers: {name}", "layers run")
    for i, who in enumerate(w for w in WHO if all(layer[w] for layer in layers)):
        band = [(x(layer["layer"]), layer[who]) for layer in layers]
        edge = [(at, _y(v["high"])) for at, v in band] + [(at, _y(v["low"])) for at, v in reversed(band)]
        parts.append(tag("polygon", points=_points(edge), class_=f"band {who}"))
        parts.append(tag("polyline", points=_points([(at, _y(v["value"])) for at, v in band]), class_=f"curve {who}"))
        parts += [line(LEFT + 130 * i, 14, LEFT + 24 + 130 * i, 14, f"curve {who}")]
        parts.append(text(LEFT + 30 + 130 * i, 18, who if who != "unlearned" else shorten(name, 12)))
    for layer in layers:
        at = x(layer["layer"])
        parts.append(text(at, BOTTOM + 16, str(layer["layer"]), "small", "middle"))
        if layer["layer"] in leak["leaking"]:
            parts.append(tag("circle", cx=at, cy=_y(layer["unlearned"]["value"]), r=8, class_="ring"))
    return drawing(WIDTH, BOTTOM + 44, f"Leak curve of {name}: {leak['note']}.", parts)


def pareto_plot(name: str, cells: list[Mapping[str, Any]], layers: int) -> Markup:
    """Forget probability against mean depth, a mark per policy and threshold in its verdict's shape; lines join the
    thresholds of one policy. Cells without a depth (no token decoded) are left out."""
    shown = [cell for cell in cells if cell["mean_depth"] is not None]

    def x(depth: float) -> float:
        return LEFT + 20 + (depth - 1) / max(1, layers - 1) * (RIGHT - LEFT - 40)

    parts = [*_axes("probability of the forgotten answers", "mean layers per decoded token"), *legend(LEFT + 6, 16)]
    parts += [text(x(depth), BOTTOM + 16, str(depth), "small", "middle") for depth in range(1, layers + 1)]
    labels = Labels(LEFT + 2, TOP + 2, RIGHT - 2, BOTTOM - 2)
    for policy in dict.fromkeys(cell["policy"] for cell in shown):
        ends = sorted((x(cell["mean_depth"]), _y(cell["forget"])) for cell in shown if cell["policy"] == policy)
        for start, end in pairwise(ends):
            parts.append(line(*start, *end, "spoke"))
    for cell in shown:
        at = x(cell["mean_depth"]), _y(cell["forget"])
        labels.block(*at)
        title = f"{cell['label']}: {cell['verdict']}, forget {number(cell['forget'], 3)}"
        parts.append(mark(*at, cell["verdict"], title))
    for cell in shown:
        parts += labels.place(x(cell["mean_depth"]), _y(cell["forget"]), shorten(cell["label"], 24), "small", 120)
    return drawing(WIDTH, BOTTOM + 44, f"{name}: forget probability by mean depth, {len(shown)} policies.", parts)


def _y(probability: float) -> float:
    return BOTTOM - 10 - min(max(probability, 0.0), 1.0) * (BOTTOM - TOP - 20)


def _points(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _axes(beside: str, under: str) -> list[Markup]:
    parts = [tag("rect", x=LEFT, y=TOP, width=RIGHT - LEFT, height=BOTTOM - TOP, class_="frame")]
    for p in (0, 0.25, 0.5, 0.75, 1):
        parts.append(line(LEFT, _y(p), RIGHT, _y(p), "grid"))
        parts.append(text(LEFT - 6, _y(p) + 4, f"{p:g}", "small", "end"))
    middle = f"translate(14 {(TOP + BOTTOM) / 2:.0f}) rotate(-90)"
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 36, under, "", "middle"))
    return [*parts, tag("text", beside, transform=middle, text_anchor="middle")]
