"""The pictures of a profile: its passes under the roofs of the device, and what more sequences at a time bring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .compress.recipe import brief
from .picture_files import standalone, write_picture
from .profile_show import named, operations, source
from .svg import LETTER, Labels, drawing, line, shorten, tag, text
from .units import figure, percent, printable, si

Record = Mapping[str, Any]

WIDTH = 860.0
LEFT, TOP, HEIGHT = 76.0, 64.0, 380.0
BOTTOM = TOP + HEIGHT
# Where plots end and the names of their lines begin.
RIGHT, NAMES = WIDTH - 158, WIDTH - 140
# Classes of curves, in the order in which contexts are drawn.
CURVES = ("a", "b", "c", "d", "e", "f")
# Kinds of modules with less of a pass than this share are not drawn: they are many, and say little.
LARGE = 0.03
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True)
class Axis:
    """A logarithmic scale from `low` at pixel `start` to `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten; with their double and fivefold where there would be fewer than three."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 2, 5)):
            found = [factor * 10.0**power for power in powers for factor in factors]
            found = [value for value in found if self.low <= value * (1 + 1e-9) and value <= self.high * (1 + 1e-9)]
            if len(found) > 2:
                break
        return found


@dataclass(frozen=True)
class Spot:
    """A pass, or a kind of modules in it, in the plane of the roofline: operations per byte, and a second.

    reached   operations a second that were measured; None: they were not
    """

    phase: str
    name: str
    intensity: float
    floor: float
    reached: float | None

    @property
    def shown(self) -> float:
        return self.floor if self.reached is None else self.reached


def roofline_plot(profile: Record) -> Markup:
    """Operations a second against operations per byte: the roofs of the device, a mark for each pass at its floor
    (hollow) and as measured (filled), and a small one for each kind of modules that takes a good part of it."""
    device, phases = profile["device"], profile["phases"]
    passes = [spot for phase in phases if (spot := _spot(phase, phase["phase"], f"batch {phase['batch']}"))]
    parts = [spot for phase in phases for spot in _parts(phase)]
    used = {module["compute"] for phase in phases for module in phase["modules"]} | {p["compute"] for p in phases}
    memory = device["memory"]["value"]
    x, y = _axes_of([*passes, *parts], memory, [rate["value"] for rate in device["compute"].values()])
    labels = Labels(LEFT + 2, TOP + 2, RIGHT - 2, BOTTOM - 2)
    body = _frame(x, y, [(value, _tick(value)) for value in x.ticks()], "operations per byte", "operations a second")
    for spot in (*passes, *parts):
        labels.block(x(spot.intensity), y(spot.shown), 6)
        labels.block(x(spot.intensity), y(spot.floor), 6)
    roofs, written = _roofs(device, used, x, y, labels)
    marks: list[Markup] = []
    for spot in parts:
        about = f"{spot.phase}, {spot.name}: {_place(spot)}"
        marks.append(_mark(x(spot.intensity), y(spot.shown), 2.6, spot, "part", spot.reached is not None, about))
    for spot in passes:
        at, name = x(spot.intensity), f"{spot.phase}, {spot.name}"
        if spot.reached is not None:
            marks.append(line(at, y(spot.floor), at, y(spot.reached), f"gap {spot.phase}"))
            labels.block_line(at, y(spot.floor), at, y(spot.reached))
        marks.append(_mark(at, y(spot.floor), 5, spot, "pass", False, f"{name}: {_place(spot)}"))
        if spot.reached is not None:
            about = f"{name}, measured: {si(spot.reached, 'OP/s')}"
            marks.append(_mark(at, y(spot.reached), 5, spot, "pass", True, about))
    body += [*roofs, *written, *_names(passes, parts, x, y, labels), *marks]
    key = [("square", "pass prefill", "prefill"), ("disc", "pass decode", "decode"), ("disc", "key", "floor")]
    if any(spot.reached for spot in passes):
        key.append(("disc", "key full", "measured"))
    body += _heading(profile, [*key, ("dot", "key", "kinds of modules")] if parts else key)
    title = f"Roofline of {printable(profile['model'])} on {printable(device['device'])}: {len(passes)} passes."
    told = "; ".join(printable(f"{named(phase)}: {_told(phase)}") for phase in phases)
    return drawing(WIDTH, BOTTOM + 48, title, [tag("desc", f"Hollow marks are floors. {told}."), *body])


def sweep_plot(profile: Record) -> Markup:
    """Tokens a second against the batch, a curve for each context: discs wait for memory, squares for arithmetic; where
    the memory of the device ends marks are hollow and curves dashed."""
    rows = [row for row in profile["sweep"] if row["tokens_per_s"]]
    rows = [row for row in rows if row["phase"] == "decode"] or rows
    contexts = sorted({row["context"] for row in rows})
    batches = sorted({row["batch"] for row in rows}) or [1]
    speeds = [row["tokens_per_s"] for row in rows] or [1.0]
    low, high = min(speeds) / 1.3, max(speeds) * 1.3
    x = Axis(min(batches) / 1.15, max(max(batches), 2 * min(batches)) * 1.15, LEFT, RIGHT)
    y = Axis(low, max(high, low * 10), BOTTOM, TOP)
    body = _frame(x, y, _batch_ticks(x, batches), "sequences at a time", "tokens a second")
    ends: list[tuple[float, float, str]] = []
    for number, context in enumerate(contexts):
        class_ = CURVES[number % len(CURVES)]
        found = sorted((row for row in rows if row["context"] == context), key=lambda row: row["batch"])
        at = [(x(row["batch"]), y(row["tokens_per_s"])) for row in found]
        for (start, _), (end, row) in pairwise(zip(at, found)):
            body.append(line(*start, *end, f"curve {class_}" if row["fits"] is not False else f"curve over {class_}"))
        for place, row in zip(at, found):
            state = "over" if row["fits"] is False else "fits"
            body.append(_shape(*place, 3.6, row["bound"] == "compute", f"point {state} {class_}", _swept(row)))
        ends.append((*at[-1], f"context {context}"))
    body += _at_the_right(ends)
    key = [("disc", "key full", "waits for memory"), ("square", "key full", "waits for arithmetic")]
    body += _heading(profile, [*key, ("disc", "key", "does not fit")])
    title = f"Tokens a second of {printable(profile['model'])} by batch, {len(contexts)} contexts."
    told = "; ".join(_swept(row) for row in rows)
    return drawing(WIDTH, BOTTOM + 48, title, [tag("desc", told), *body])


def save_plot(path: Path | str, picture: Markup) -> None:
    """Write one of these pictures as .svg or .png, by the suffix; raises as `picture_files.check_place`."""
    write_picture(path, standalone(picture, "profile.css"))


def _names(passes: Sequence[Spot], parts: Sequence[Spot], x: Axis, y: Axis, labels: Labels) -> list[Markup]:
    """Every pass's, and those of kinds of modules for which there is room right beside their mark."""
    labels.anchors = [(x(spot.intensity), y(spot.shown)) for spot in passes]
    found: list[Markup] = []
    for spot in passes:
        found += labels.place(x(spot.intensity), y(spot.shown), f"{spot.phase}, {spot.name}", "", 150)
    # Of marks that cover each other one is named: attention asks for the same bytes per operation at every batch.
    covered: set[tuple[str, int, int]] = set()
    for spot in parts:
        at, up, kind = x(spot.intensity), y(spot.shown), spot.name.partition(",")[0]
        if (place := (kind, round(at / 6), round(up / 6))) not in covered:
            covered.add(place)
            found += labels.place(at, up, kind, "small", 17)
    # Leaders first: they pass behind the names of others.
    return sorted(found, key=lambda part: not part.startswith("<line"))


def _spot(each: Record, phase: str, name: str) -> Spot | None:
    """None for what has no place there: no operation, no byte, or a floor of nothing."""
    if not (each["flops"] and each["bytes"] and each["floor_s"]):
        return None
    reached = each["flops"] / each["measured_s"] if each["measured_s"] else None
    return Spot(printable(phase), name, each["flops"] / each["bytes"], each["flops"] / each["floor_s"], reached)


def _parts(phase: Record) -> list[Spot]:
    """The kinds of modules that take a good part of the pass."""
    found = []
    for kind in dict.fromkeys(module["kind"] for module in phase["modules"]):
        modules = [module for module in phase["modules"] if module["kind"] == kind]
        sums = {key: sum(module[key] or 0 for module in modules) for key in ("flops", "bytes", "floor_s")}
        took = [module["measured_s"] for module in modules]
        sums["measured_s"] = 0 if None in took else sum(took)
        spot = _spot(sums, phase["phase"], f"{printable(kind)}, batch {phase['batch']}")
        if spot and sums["floor_s"] >= LARGE * phase["floor_s"]:
            found.append(spot)
    return found


def _axes_of(spots: Sequence[Spot], memory: float, peaks: Sequence[float]) -> tuple[Axis, Axis]:
    across = [spot.intensity for spot in spots] + [peak / memory for peak in peaks]
    up = [value for spot in spots for value in (spot.floor, spot.shown)] + list(peaks)
    x_low, x_high = min(across) / 2.5, max(across) * 4
    # Where no pass is low, the slope still has to be seen as one.
    return Axis(min(x_low, x_high / 300), x_high, LEFT, RIGHT), Axis(
        min(min(up) / 3, max(up) / 300), max(up) * 2, BOTTOM, TOP
    )


def _roofs(
    device: Record, used: set[str | None], x: Axis, y: Axis, labels: Labels
) -> tuple[list[Markup], list[Markup]]:
    """Lines, and apart from them their names: a slope for memory, a ceiling for each kind of numbers with its ridge.

    Kinds with the same ceiling share a line.
    """
    memory = device["memory"]["value"]
    same: dict[tuple[float, str], list[str]] = {}
    for kind, rate in device["compute"].items():
        same.setdefault((rate["value"], source(rate)), []).append(kind)
    lines: list[Markup] = []
    written: list[Markup] = []
    names: list[tuple[float, float, str]] = []
    highest = max((value for value, _ in same), default=y.high)
    # The slope begins where it enters the picture: at the left, or at the bottom.
    start = max(x.low, y.low / memory)
    slope = (x(start), y(start * memory), x(highest / memory), y(highest))
    lines.append(line(*slope, "roof used"))
    for (peak, certainty), kinds in sorted(same.items(), reverse=True):
        ridge = x(peak / memory)
        class_ = "roof used" if used & set(kinds) else "roof"
        lines += [line(ridge, y(peak), x.end, y(peak), class_), line(ridge, y(peak), ridge, BOTTOM, "ridge")]
        labels.block_line(ridge, y(peak), x.end, y(peak))
        written += _on_axis(figure(peak / memory), ridge, labels)
        unit = "FLOP/s" if all(operations(kind) == "FLOP/s" for kind in kinds) else "OP/s"
        value = f"{si(peak, unit)}, {certainty.partition(',')[0]}"
        names.append((x.end, y(peak), f"{shorten(', '.join(map(printable, kinds)), 22)}\n{value}"))
    labels.block_line(*slope)
    written += _on_slope(f"memory: {si(memory, 'B/s')}, {source(device['memory'])}", slope, labels)
    return lines, [*written, *_at_the_right(names)]


def _on_axis(name: str, ridge: float, labels: Labels) -> list[Markup]:
    """The operations per byte of a ridge, at the foot of its line."""
    width = LETTER * len(name) + 6
    box = (ridge + 1, BOTTOM - 16, ridge + 1 + width, BOTTOM - 3)
    if not labels.free(box):
        return []
    labels.taken.append(box)
    return [text(ridge + 4, BOTTOM - 6, name, "small")]


def _on_slope(name: str, slope: tuple[float, float, float, float], labels: Labels) -> list[Markup]:
    """Beside the slope, to its left, as far up as there is room."""
    x1, y1, x2, y2 = slope
    width = LETTER * len(name) + 6
    for step in range(19, 0, -1):
        x, y = x1 + (x2 - x1) * step / 20, y1 + (y2 - y1) * step / 20
        for box in ((x - 8 - width, y - 14, x - 8, y), (x + 10, y + 2, x + 10 + width, y + 16)):
            if labels.free(box):
                labels.taken.append(box)
                return [text(box[0] + 3, box[3] - 3, name, "small")]
    return []


def _mark(x: float, y: float, radius: float, spot: Spot, what: str, measured: bool, about: str) -> Markup:
    class_ = f"{what} measured {spot.phase}" if measured else f"{what} {spot.phase}"
    return _shape(x, y, radius, spot.phase == "prefill", class_, about)


def _shape(x: float, y: float, radius: float, square: bool, class_: str, about: str = "") -> Markup:
    name = tag("title", about) if about else Markup("")
    if square:
        return tag("rect", name, x=x - radius, y=y - radius, width=2 * radius, height=2 * radius, class_=class_)
    return tag("circle", name, cx=x, cy=y, r=radius, class_=class_)


def _place(spot: Spot) -> str:
    return f"{figure(spot.intensity)} operations per byte, at most {si(spot.floor, 'OP/s')}"


def _told(phase: Record) -> str:
    reached = f", measured {si(phase['measured_s'], 's')}" if phase["measured_s"] else ""
    attained = f" ({percent(phase['attained'])} attained)" if phase["attained"] else ""
    return f"bound by {phase['bound']}, floor {si(phase['floor_s'], 's')}{reached}{attained}"


def _swept(row: Record) -> str:
    fits = ", does not fit" if row["fits"] is False else ""
    return (
        f"context {row['context']}, batch {row['batch']}: {figure(row['tokens_per_s'])} tokens/s, "
        f"bound by {row['bound']}{fits}"
    )


def _frame(x: Axis, y: Axis, across: Sequence[tuple[float, str]], below: str, beside: str) -> list[Markup]:
    parts = [line(LEFT, BOTTOM, x.end, BOTTOM, "axis"), line(LEFT, TOP, LEFT, BOTTOM, "axis")]
    for value, name in across:
        parts += [
            line(x(value), BOTTOM, x(value), BOTTOM + 4, "axis"),
            text(x(value), BOTTOM + 17, name, "small", "middle"),
        ]
    for value in y.ticks():
        parts.append(line(LEFT, y(value), x.end, y(value), "tick"))
        parts.append(text(LEFT - 8, y(value) + 4, _tick(value), "small", "end"))
    parts.append(text((LEFT + x.end) / 2, BOTTOM + 38, below, "", "middle"))
    parts.append(text(LEFT - 60, TOP - 12, beside, "small"))
    return parts


def _heading(profile: Record, key: Sequence[tuple[str, str, str]]) -> list[Markup]:
    """What is profiled on what, and below it what marks mean."""
    recipe = f" as {brief(profile['recipe'])}" if profile["recipe"] else ""
    about = printable(f"{profile['model']}{recipe} on {profile['device']['device']}")
    parts = [text(LEFT - 60, 16, shorten(about, 110), "name")]
    left = WIDTH - sum(LETTER * len(name) + 26 for *_, name in key)
    for shape, class_, name in key:
        radius = 2.6 if shape == "dot" else 4.2
        parts += [_shape(left, 40, radius, shape == "square", class_), text(left + 10, 44, name)]
        left += LETTER * len(name) + 26
    return parts


def _batch_ticks(x: Axis, batches: Sequence[int]) -> list[tuple[float, str]]:
    """The batches themselves, without those that stand too close to the one before."""
    kept: list[tuple[float, str]] = []
    for batch in batches:
        if not kept or x(batch) - x(kept[-1][0]) > 12 + LETTER * len(f"{batch}"):
            kept.append((batch, f"{batch}"))
    return kept


def _at_the_right(ends: Sequence[tuple[float, float, str]]) -> list[Markup]:
    """A name of one or two lines for each line at its end, pushed apart, within the height of the plot."""
    step = 30 if any("\n" in name for *_, name in ends) else 15
    parts: list[Markup] = []
    ordered = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for i, (_, y, _) in enumerate(ordered):
        room = BOTTOM - step * (len(ordered) - 1 - i)
        heights.append(min(max(y, heights[-1] + step if heights else TOP), room))
    for (x, y, name), height in zip(ordered, heights):
        lines = name.split("\n")
        parts.append(line(x + 5, y, NAMES - 4, height, "leader"))
        first = height + 4 - 6.5 * (len(lines) - 1)
        parts += [text(NAMES, first + 13 * i, written, "small") for i, written in enumerate(lines)]
    return parts


def _tick(value: float) -> str:
    """1 T, 100 G, 0.01: a power of ten, or its double or fivefold."""
    step = max(0, math.floor(math.log10(value) / 3 + 1e-9))
    return f"{value / 1000**step:g} {_PREFIXES[step]}".rstrip()
