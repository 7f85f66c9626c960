"""The pictures of a profile: to scale, told apart, escaped, readable, the same as SVG and as PNG."""

import functools
import os
import re
import struct
import sys
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise

import pytest

from remanence.picture_files import check_place, png_bytes, standalone
from remanence.profile_plots import Axis, roofline_plot, save_plot, sweep_plot
from remanence.svg import LETTER

PNG = b"\x89PNG\r\n\x1a\n"


def with_class(root, *classes):
    """Elements that have all of them."""
    return [part for part in root.iter() if set(classes) <= set((part.get("class") or "").split())]


def parsed(picture):
    root = ET.fromstring(str(picture))
    # For those who do not see it: a name, and what it says.
    assert [part.tag for part in root][:2] == ["title", "desc"]
    assert root.get("role") == "img"
    return root


def boxes(root):
    """(text, x1, y1, x2, y2), as wide as the plots take letters to be."""
    found = []
    for part in root.iter("text"):
        width = LETTER * len(part.text)
        left = float(part.get("x")) - {"start": 0, "middle": width / 2, "end": width}[part.get("text-anchor")]
        y = float(part.get("y"))
        found.append((part.text, left, y - 9, left + width, y + 2))
    return found


def overlaps(root):
    return [
        (one[0], other[0])
        for one, other in combinations(boxes(root), 2)
        if one[1] < other[3] and other[1] < one[3] and one[2] < other[4] and other[2] < one[4]
    ]


@pytest.fixture
def drawable():
    try:
        check_place("a.png")
    except (ModuleNotFoundError, ValueError) as error:
        pytest.skip(f"no PNG here: {error}")


def test_marks_stand_under_the_roof(profile):
    made = profile()
    root = parsed(roofline_plot(made))
    device = made["device"]
    (_, corner), *_ = [
        ((float(part.get("x1")), float(part.get("y1"))), (float(part.get("x2")), float(part.get("y2"))))
        for part in with_class(root, "roof", "used")
    ]
    ceiling = min(float(p.get("y1")) for p in with_class(root, "roof", "used") if p.get("y1") == p.get("y2"))
    # The slope ends where the highest ceiling begins: one per kind or kinds with the same ceiling.
    assert corner[1] == min(float(p.get("y1")) for p in with_class(root, "roof"))
    assert len(with_class(root, "roof")) == 1 + len({rate["value"] for rate in device["compute"].values()})
    assert len(with_class(root, "ridge")) == 3
    hollow = [p for p in with_class(root, "pass") if "measured" not in p.get("class") and list(p)]
    assert all(float(p.get("y", p.get("cy"))) + 5.1 >= ceiling for p in hollow)
    said = set(root.itertext())
    assert {"bfloat16, float16", "712 TFLOP/s, measured", "memory: 4.37 TB/s, measured, spread 1.2 %"} <= said
    assert {"1 T", "10 T", "100 T", "1 P", "1", "10", "100", "1 k"} <= said
    # A ridge of 712 T over 4.37 T operations per byte.
    assert "163" in said
    assert {f"{name}, batch {batch}" for name in ("prefill", "decode") for batch in (1, 8)} <= said


def test_measured_marks_are_filled_and_lower(profile):
    root = parsed(roofline_plot(profile()))
    for kind, place in (("decode", "cy"), ("prefill", "y")):
        marks = [p for p in with_class(root, "pass", kind) if list(p)]
        filled = [p for p in marks if "measured" in p.get("class")]
        assert len(marks) == 2 * len(filled) == 4
        assert min(float(p.get(place)) for p in filled) > min(float(p.get(place)) for p in marks)
    assert len(with_class(root, "gap")) == 4
    root = parsed(roofline_plot(profile(measured=False)))
    assert not with_class(root, "measured")
    assert not with_class(root, "gap")
    assert "measured" not in set(root.itertext())


def test_a_mark_stands_at_its_figures(profile):
    """Two marks of the same axes are as far apart as their logarithms."""
    made = profile()
    root = parsed(roofline_plot(made))
    one, eight = [p for p in with_class(root, "pass", "decode") if list(p) and "measured" not in p.get("class")]
    first, second = (phase for phase in made["phases"] if phase["phase"] == "decode")
    (left, right) = [float(p.get("x1")) for p in root.iter("line") if p.get("y2") == "448.0"][:2]  # ticks of 1 and 10
    decades = (float(eight.get("cx")) - float(one.get("cx"))) / (right - left)
    assert 10**decades == pytest.approx(second["intensity"] / first["intensity"], rel=0.01)


@pytest.mark.parametrize("measured", [True, False])
def test_labels_do_not_overlap(profile, measured):
    made = profile(measured)
    assert overlaps(parsed(roofline_plot(made))) == []
    assert overlaps(parsed(sweep_plot(made))) == []
    # Many marks in one place, ceilings close to each other, contexts that go the same way.
    made["phases"] = [{**phase, "batch": i} for i in range(1, 9) for phase in made["phases"]]
    for i, kind in enumerate(("float32", "float16", "float8", "int8", "bfloat16")):
        made["device"]["compute"][kind]["value"] = 700e12 * 1.04**i
    made["sweep"] = [{**row, "context": row["context"] + i} for row in made["sweep"] for i in range(3)]
    root = parsed(roofline_plot(made))
    assert overlaps(root) == []
    # Every ceiling has its name nevertheless.
    assert {"float32", "float16", "float8", "int8", "bfloat16"} <= set(root.itertext())
    assert overlaps(parsed(sweep_plot(made))) == []


def test_a_sweep_shows_where_memory_ends_and_what_is_waited_for(profile):
    made = profile()
    root = parsed(sweep_plot(made))
    over = [row for row in made["sweep"] if not row["fits"]]
    assert len(with_class(root, "point", "over")) == len(with_class(root, "curve", "over")) == len(over) > 0
    assert len(with_class(root, "point", "fits")) == len(made["sweep"]) - len(over)
    squares = [p for p in with_class(root, "point") if p.tag == "rect"]
    assert len(squares) == sum(row["bound"] == "compute" for row in made["sweep"]) > 0
    assert {"context 512", "context 2048", "context 8192", "1", "1024", "1 k", "10 k"} <= set(root.itertext())
    points = with_class(root, "point", "a")
    # Batches double: the same step to the right.
    at = [float(p.get("cx") or float(p.get("x")) + 3.6) for p in points]
    steps = [b - a for a, b in pairwise(at)]
    assert max(steps) - min(steps) < 0.25


def test_little_is_enough(profile):
    bare = profile(measured=False, phases=[], sweep=[])
    assert len(with_class(parsed(roofline_plot(bare)), "pass")) == 2  # the key's
    assert not with_class(parsed(sweep_plot(bare)), "point")
    one = profile(sweep=profile()["sweep"][:1])
    assert len(with_class(parsed(sweep_plot(one)), "point")) == 1
    none = profile(measured=False)
    for phase in none["phases"]:
        phase["flops"] = 0
    parsed(roofline_plot(none))


def test_ticks_are_powers_of_ten_or_enough_of_them():
    assert Axis(0.3, 2e4, 0, 1).ticks() == [1, 10, 100, 1000, 10_000]
    assert Axis(150, 2100, 0, 1).ticks() == [200, 500, 1000, 2000]


def test_names_are_inert(profile):
    evil = "<script>alert(1)</script>\x1b\x00\"'"
    made = profile(model=evil)
    made["device"]["device"] = evil
    made["device"]["compute"][evil] = made["device"]["compute"]["int8"]
    made["phases"][0]["phase"] = evil
    made["phases"][0]["modules"][0]["kind"] = evil
    for picture in (roofline_plot(made), sweep_plot(made)):
        for written in (str(picture), standalone(picture, "profile.css")):
            assert "<script" not in written
            ET.fromstring(written)


def test_a_file_brings_its_colours(profile):
    picture = standalone(roofline_plot(profile()), "profile.css")
    root = ET.fromstring(picture)
    style = next(part.text for part in root.iter() if part.tag.endswith("style"))
    assert "svg .pass.decode { stroke: #1f6aa5; }" in style
    assert not {name for name in ("body", "var(", ":root", "@media") if name in style}
    # Dark is the page's: every colour of a picture has its dark one there.
    css = open_css()
    light, dark = css.split("@media (prefers-color-scheme: dark)")
    names = set(re.findall(r"(--p-[\w-]+):", light))
    assert names == set(re.findall(r"(--p-[\w-]+):", dark)) == set(re.findall(r"var\((--p-[\w-]+)\)", css))


def open_css():
    from pathlib import Path

    from remanence import profile_plots

    return (Path(profile_plots.__file__).parent / "templates/profile.css").read_text()


@pytest.mark.usefixtures("drawable")
def test_a_png_is_the_same_drawing_at_twice_its_size(profile, tmp_path):
    picture = sweep_plot(profile())
    save_plot(tmp_path / "new" / "a.png", picture)
    content = (tmp_path / "new" / "a.png").read_bytes()
    assert content.startswith(PNG)
    root = ET.fromstring(str(picture))
    assert struct.unpack(">II", content[16:24]) == (2 * int(root.get("width")), 2 * int(root.get("height")))
    assert content == png_bytes(standalone(picture, "profile.css"))


@pytest.mark.usefixtures("drawable")
def test_without_a_font_there_is_no_picture_without_text(profile, tmp_path, monkeypatch):
    import resvg_py

    blind = functools.partial(resvg_py.svg_to_bytes, skip_system_fonts=True)
    monkeypatch.setattr(resvg_py, "svg_to_bytes", blind)
    with pytest.raises(ValueError, match=r"needs a font .* fonts-dejavu-core.* or write \.svg"):
        save_plot(tmp_path / "a.png", sweep_plot(profile()))
    assert list(tmp_path.iterdir()) == []
    save_plot(tmp_path / "a.svg", sweep_plot(profile()))


def test_without_the_library_it_says_what_to_install(profile, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install remanence\[png\]"):
        check_place(tmp_path / "a.png")
    check_place(tmp_path / "a.svg")
    with pytest.raises(ModuleNotFoundError):
        png_bytes(standalone(sweep_plot(profile()), "profile.css"))


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.svg.gz"])
def test_another_suffix_is_refused(profile, tmp_path, name):
    for use in (check_place, lambda path: save_plot(path, sweep_plot(profile()))):
        with pytest.raises(ValueError, match=rf"{name}: a picture ends in \.svg or \.png"):
            use(tmp_path / name)


def test_a_file_is_whole_or_the_old_one(profile, tmp_path, monkeypatch):
    place = tmp_path / "a.SVG"
    place.write_text("old")

    def full(*_):
        raise OSError("full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="full"):
            save_plot(place, roofline_plot(profile()))
    assert [path.name for path in tmp_path.iterdir()] == ["a.SVG"]
    assert place.read_text() == "old"
    save_plot(place, roofline_plot(profile()))
    assert ET.fromstring(place.read_text()).get("width") == "860"
