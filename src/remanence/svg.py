"""The little SVG that the plots need: escaped elements, one mark per verdict, labels that keep out of each other's way.

Coordinates are pixels of the drawing, y downwards. Colours come from the page's style sheet, by class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from markupsafe import Markup

from .labels import VERDICTS

LETTER = 6.1  # pixels: mean width of a letter at the plots' 11 px


def tag(name: str, *content: str, **attributes: object) -> Markup:
    """An element. Plain strings are escaped; `class_` is class, `text_anchor` is text-anchor."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value)) for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(content))


def drawing(width: float, height: float, title: str, content: list[Markup]) -> Markup:
    """The whole picture, named for those who do not see it."""
    return tag(
        "svg",
        tag("title", title),
        *content,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=round(width),
        height=round(height),
        role="img",
        aria_label=title,
    )


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start") -> Markup:
    """A line of text, its baseline at y."""
    return tag("text", content, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def mark(x: float, y: float, verdict: str, title: str = "") -> Markup:
    """The verdict's own shape: disc, triangle, square; an empty disc for undecided."""
    name = Markup("<title>{}</title>").format(title) if title else Markup("")
    class_ = f"mark {verdict if verdict in VERDICTS else 'undecided'}"
    if verdict == "returned":
        points = f"{x:.1f},{y - 5.5:.1f} {x + 5.2:.1f},{y + 4:.1f} {x - 5.2:.1f},{y + 4:.1f}"
        return tag("polygon", name, points=points, class_=class_)
    if verdict == "damaged":
        return tag("rect", name, x=x - 4, y=y - 4, width=8, height=8, class_=class_)
    return tag("circle", name, cx=x, cy=y, r=4.2, class_=class_)


def arrow(x: float, y: float, direction: int, verdict: str) -> Markup:
    """The head of an arrow at the edge, pointing out to the left (-1) or the right (+1)."""
    back = x - 7 * direction
    points = f"{x:.1f},{y:.1f} {back:.1f},{y - 4:.1f} {back:.1f},{y + 4:.1f}"
    return tag("polygon", points=points, class_=f"arrow {verdict if verdict in VERDICTS else 'undecided'}")


def legend(x: float, y: float) -> list[Markup]:
    """The verdicts' marks with their words, in a row."""
    parts = []
    for verdict in VERDICTS:
        parts += [mark(x, y - 4, verdict), text(x + 9, y, verdict)]
        x += 84
    return parts


@dataclass
class Labels:
    """Places labels inside [left, right] x [top, bottom]. taken: boxes (x1, y1, x2, y2) that must stay clear.
    anchors: what has a name of its own; no other name may stand so close that it could be taken for it."""

    left: float
    top: float
    right: float
    bottom: float
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)
    anchors: list[tuple[float, float]] = field(default_factory=list)

    def block(self, x: float, y: float, radius: float = 5) -> None:
        self.taken.append((x - radius, y - radius, x + radius, y + radius))

    def block_line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        steps = int(math.hypot(x2 - x1, y2 - y1) // 8)
        for i in range(1, steps):
            self.block(x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps, 2)

    def place(self, x: float, y: float, name: str, class_: str, reach: float) -> list[Markup]:
        """`name` near (x, y), with a leader when it must stand off; nothing when no place within `reach` is free."""
        width = LETTER * len(name) + 6
        for radius in range(9, int(reach), 8):
            for angle in (0, 180, 30, 150, -30, -150, 60, 120, -60, -120, 90, -90):
                u, v = math.cos(math.radians(angle)), math.sin(math.radians(angle))
                middle, centre = x + u * (radius + width / 2), y + v * (radius + 7)
                box = (middle - width / 2, centre - 7, middle + width / 2, centre + 7)
                if self.free(box) and not self._mistaken(box, (x, y)):
                    self.taken.append(box)
                    written = text(middle, centre + 4, name, class_, "middle")
                    near = (min(max(x, box[0]), box[2]), min(max(y, box[1] + 2), box[3] - 2))
                    return [line(x, y, *near, "leader"), written] if radius > 9 else [written]
        return []

    def free(self, box: tuple[float, float, float, float]) -> bool:
        x1, y1, x2, y2 = box
        if x1 < self.left or y1 < self.top or x2 > self.right or y2 > self.bottom:
            return False
        return not any(x1 < c and a < x2 and y1 < d and b < y2 for a, b, c, d in self.taken)

    def _mistaken(self, box: tuple[float, float, float, float], own: tuple[float, float]) -> bool:
        x1, y1, x2, y2 = box
        others = [(x, y) for x, y in self.anchors if math.dist((x, y), own) > 6]
        return any(x1 - 14 < x < x2 + 14 and y1 - 6 < y < y2 + 6 for x, y in others)


def shorten(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _plain(value: object) -> object:
    """Pixels to a tenth, without a negative zero."""
    return round(value, 1) + 0.0 if isinstance(value, float) else value
