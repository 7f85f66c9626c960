"""The pictures of leaving early: what each layer already says, and what a policy's depth costs or gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from markupsafe import Markup

from .backends.energy.probe import ESTIMATE
from .labels import VERDICTS
from .svg import Labels, drawing, legend, line, mark, shorten, tag, text

WIDTH = 780.0
LEFT, TOP, HEIGHT = 64.0, 40.0, 300.0
# Classes of lines, in the order in which series are drawn.
SERIES = ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j")

Scale = Callable[[float], float]


def leak_plot(name: str, leak: Mapping[str, Any]) -> Markup:
    """Probability of the answers after each layer, by its own norm and head: target, unlearned model, oracle, each with
    its 95% interval. A ring stands at the layers that are shown to leak more than the last."""
    layers = leak["layers"]
    x, y = _scales(1, max(2, len(layers)), 0.0, 1.0)
    body = _axes(x, y, [layer["layer"] for layer in layers], (0, 0.25, 0.5, 0.75, 1), "layer after which it is decoded")
    body.append(text(LEFT - 48, TOP - 24, "probability of the true answers", "small"))
    named = [("target", "a"), ("unlearned", "b"), ("oracle", "c")]
    told = [(who, class_) for who, class_ in named if layers[0][who] is not None]
    for who, class_ in told:
        found = [(layer["layer"], layer[who]) for layer in layers]
        band = [(x(at), y(spread["high"])) for at, spread in found]
        band += [(x(at), y(spread["low"])) for at, spread in reversed(found)]
        body.append(tag("polygon", points=_points(band), class_=f"band {class_}"))
        body.append(_path([(x(at), y(spread["value"])) for at, spread in found], class_))
        body += [
            tag("circle", tag("title", f"{_who(name, who)}, layer {at}: {_spread(spread)}"), cx=x(at),
                cy=y(spread["value"]), r=3.2, class_=f"dot {class_}")
            for at, spread in found
        ]  # fmt: skip
    for layer in layers:
        if layer["layer"] in leak["leaking"]:
            body.append(tag("circle", cx=x(layer["layer"]), cy=y(layer["unlearned"]["value"]), r=8, class_="ring"))
    body += _key([(_who(name, who), class_) for who, class_ in told])
    title = f"Leak curve of {name}: probability of the answers to forget after each of {len(layers)} layers."
    return drawing(WIDTH, TOP + HEIGHT + 52, title, body)


def pareto_plot(
    name: str, cells: Sequence[Mapping[str, Any]], layers: int, by: Literal["mean_depth", "energy"] = "mean_depth"
) -> Markup:
    """What a policy costs against forget probability of one model, a mark for each policy and threshold: what saves
    stands left, what knows nothing of the forget set below. Lines join the thresholds of one policy.

    by   "mean_depth", or "energy": joules for a token; ValueError where not every cell has measured ones
    """
    if by == "energy" and not measured_joules(cells):
        raise ValueError(f"{name}: joules of some cells are estimated or not known, they cannot stand side by side")
    costs = [cell["energy"]["joules"] if by == "energy" else cell["mean_depth"] for cell in cells]
    most = max(costs, default=0.0) or 1.0 if by == "energy" else layers
    ticks = _round_ticks(most) if by == "energy" else _ticks(layers)
    x, y = _scales(0, max(most, ticks[-1]), 0.0, 1.0)
    scopes = " + ".join(cells[0]["energy"]["scopes"]) if by == "energy" else ""
    across = f"joules for a token ({scopes})" if by == "energy" else "mean depth in layers per decoded token"
    body = _axes(x, y, ticks, (0, 0.25, 0.5, 0.75, 1), across)
    body.append(text(LEFT - 48, TOP - 24, "forget probability", "small"))
    body += legend(WIDTH - 84 * len(VERDICTS), 12)
    shown = [(cell, (x(cost), y(cell["forget"]))) for cell, cost in zip(cells, costs) if cost is not None]
    for policy in dict.fromkeys(cell["policy"] for cell, _ in shown):
        for start, end in pairwise(sorted(at for cell, at in shown if cell["policy"] == policy)):
            body.append(line(*start, *end, "spoke"))
    labels = Labels(LEFT + 2, TOP + 2, WIDTH - 2, TOP + HEIGHT - 2)
    for cell, at in shown:
        labels.block(*at)
        body.append(mark(*at, cell["verdict"], f"{cell['label']}: {cell['verdict']}, forget {cell['forget']:.3f}"))
    for cell, at in shown:
        body += labels.place(*at, shorten(cell["label"], 24), "small", 120)
    what = "joules for a token" if by == "energy" else "mean depth"
    title = f"{name}: {what} against forget probability, {len(shown)} policies."
    return drawing(WIDTH, TOP + HEIGHT + 52, title, body)


def measured_joules(cells: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every cell has joules that were measured, of the same scopes."""
    found = [cell["energy"] for cell in cells]
    if not found or any(each is None or ESTIMATE in each["methods"] for each in found):
        return False
    return len({tuple(each["scopes"]) for each in found}) == 1


def depth_plot(series: Mapping[str, Sequence[tuple[float, float, float, float]]], layers: int) -> Markup:
    """Quality against mean depth, one line for each policy: (mean depth, agreement with the whole model's tokens, low,
    high), shallow to deep."""
    least = min((low for points in series.values() for _, _, low, _ in points), default=0.0)
    floor = min(0.9, max(0.0, math.floor(least * 10) / 10))
    x, y = _scales(0, layers, floor, 1.0)
    marks = [floor + (1 - floor) * i / 4 for i in range(5)]
    body = _axes(x, y, _ticks(layers), marks, "mean depth in layers per decoded token")
    body.append(text(LEFT - 48, TOP - 24, "share of tokens that are the whole model's", "small"))
    for number, (name, points) in enumerate(series.items()):
        class_ = SERIES[number % len(SERIES)]
        body.append(_path([(x(depth), y(value)) for depth, value, _, _ in points], class_))
        for depth, value, low, high in points:
            body.append(line(x(depth), y(low), x(depth), y(high), f"whisker-{class_}"))
            about = f"{name}: depth {depth:.2f}, {value:.3f} [{low:.3f}, {high:.3f}]"
            body.append(tag("circle", tag("title", about), cx=x(depth), cy=y(value), r=3.2, class_=f"dot {class_}"))
    names = [(name, SERIES[number % len(SERIES)]) for number, name in enumerate(series)]
    rows = -(-len(names) // 4)
    body += _key(names, TOP + HEIGHT + 62)
    title = f"Line plot: quality against mean depth for {len(series)} policies."
    return drawing(WIDTH, TOP + HEIGHT + 60 + 18 * rows, title, body)


def _who(name: str, who: str) -> str:
    return name if who == "unlearned" else who


def _spread(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _scales(x_low: float, x_high: float, y_low: float, y_high: float) -> tuple[Scale, Scale]:
    def x(value: float) -> float:
        return LEFT + 10 + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - 26)

    def y(value: float) -> float:
        return TOP + HEIGHT - (min(max(value, y_low), y_high) - y_low) / (y_high - y_low) * HEIGHT

    return x, y


def _ticks(layers: int) -> list[int]:
    step = max(1, layers // 8)
    return list(range(0, layers + 1, step))


def _round_ticks(most: float) -> list[float]:
    """From 0 to `most` or just above it, in steps of 1, 2 or 5 times a power of ten; 4 to 10 of them."""
    power = 10.0 ** math.floor(math.log10(most / 4))
    step = max(factor * power for factor in (1, 2, 5) if factor * power <= most / 4)
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


def _axes(x: Scale, y: Scale, across: Sequence[float], up: Sequence[float], below: str) -> list[Markup]:
    bottom = TOP + HEIGHT
    parts = [line(LEFT, bottom, WIDTH - 8, bottom, "axis"), line(LEFT, TOP - 8, LEFT, bottom, "axis")]
    step = max(1, len(across) // 16)
    for value in across[::step]:
        parts += [
            line(x(value), bottom, x(value), bottom + 4, "axis"),
            text(x(value), bottom + 16, f"{value:g}", "small", "middle"),
        ]
    for value in up:
        parts += [
            line(LEFT, y(value), WIDTH - 8, y(value), "grid"),
            text(LEFT - 8, y(value) + 4, f"{value:.3g}", "small", "end"),
        ]
    parts.append(text((LEFT + WIDTH) / 2, bottom + 36, below, "", "middle"))
    return parts


def _path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    return tag("polyline", points=_points(points), class_=f"series {class_}")


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _key(names: Sequence[tuple[str, str]], y: float = 12.0) -> list[Markup]:
    """Names of series with their lines, four in a row."""
    parts: list[Markup] = []
    for number, (name, class_) in enumerate(names):
        left = LEFT + 180 * (number % 4) + (120 if y < TOP else 0)
        at = y + 18 * (number // 4)
        parts += [_path([(left, at - 4), (left + 22, at - 4)], class_), text(left + 28, at, shorten(name, 24))]
    return parts
