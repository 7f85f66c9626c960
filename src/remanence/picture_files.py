"""Pictures as files of their own: SVG with its colours written into it, and PNG of the very same drawing."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from markupsafe import Markup

from .compress.files import write_bytes
from .svg import tag

SUFFIXES = (".svg", ".png")
PAPER = "#ffffff"
# Pixels of a PNG for one of the drawing: sharp on the screens of today, and in print.
ZOOM = 2
_LETTER = '<svg xmlns="http://www.w3.org/2000/svg" width="16" height="16"><text x="2" y="14">A</text></svg>'


def standalone(picture: Markup, *sheets: str) -> str:
    """The picture as a file of its own, on white, with the light colours that the page gives it.

    Colours are written out, not as var(--name): few readers of SVG besides browsers know those.

    sheets   style sheets in templates/ that the picture needs besides page.css, for example "exits.css"
    """
    templates = Path(__file__).parent / "templates"
    styles = "\n".join((templates / name).read_text(encoding="utf-8") for name in ("page.css", *sheets))
    # Of the page's styles only those of drawings. What stands at the margin is not inside of a query for dark or print.
    rules = re.findall(r"(?:^|(?<=\} ))svg[^{]*\{[^}]*\}", styles, re.MULTILINE)
    names = " ".join(re.findall(r"^:root[^{]*\{[^}]*\}", styles, re.MULTILINE))
    colours = dict(re.findall(r"(--[\w-]+):\s*([^;}]+)", names))
    written = re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]].strip(), "\n".join(rules))
    paper = tag("rect", width="100%", height="100%", fill=PAPER)
    head, _, rest = str(picture).partition(">")
    # A reader takes the title for the picture's own only where it comes first.
    title, end, body = rest.partition("</title>")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{title}{end}{tag("style", Markup(written))}{paper}{body}\n'


def png_bytes(svg: str) -> bytes:
    """The picture of `standalone` as a PNG of twice its size, by resvg.

    Raises ModuleNotFoundError without it; ValueError on a system without fonts, where it would leave out every text.
    """
    return bytes(_resvg().svg_to_bytes(svg_string=svg, zoom=ZOOM, background=PAPER))


def check_place(path: Path | str) -> None:
    """Refuse a place that no picture can be written to, before it is computed: ValueError for a suffix that is neither
    .svg nor .png; for .png what `png_bytes` raises."""
    if _kind(path) == ".png":
        _resvg()


def write_picture(path: Path | str, svg: str) -> None:
    """Write the picture of `standalone` as SVG or PNG, by the suffix, all of it or nothing; raises as `check_place`."""
    write_bytes(path, svg.encode() if _kind(path) == ".svg" else png_bytes(svg))


def _kind(path: Path | str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: a picture ends in {' or '.join(SUFFIXES)}, not in {suffix or 'nothing'}")
    return suffix


def _resvg() -> ModuleType:
    """The module, once it has drawn a letter: it says nothing where it finds no font, and leaves text out."""
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a picture as .png needs resvg-py; pip install remanence[png]") from None
    blank = re.sub("<text.*</text>", "", _LETTER)
    if resvg_py.svg_to_bytes(svg_string=_LETTER) == resvg_py.svg_to_bytes(svg_string=blank):
        raise ValueError(
            "a picture as .png needs a font and this system has none; install one (Debian, Ubuntu: fonts-dejavu-core, "
            "Fedora: dejavu-sans-fonts) or write .svg, which brings its text as text"
        )
    return resvg_py
