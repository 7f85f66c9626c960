"""Leak curve, Pareto plot, quality by depth: well-formed, to scale, escaped."""

import xml.etree.ElementTree as ET

import pytest

from remanence.exit_plots import depth_plot, leak_plot, measured_joules, pareto_plot
from remanence.picture_files import standalone

SVG = {"height", "width", "viewBox"}
CLASSES = {"target": "a", "unlearned": "b", "oracle": "c"}


def interval(value, reach=0.05):
    return {"value": value, "low": value - reach, "high": value + reach}


def leak(oracle=True):
    rows = [
        {"layer": i + 1, "target": interval(t), "unlearned": interval(u), "oracle": interval(o) if oracle else None}
        for i, (t, u, o) in enumerate([(0.2, 0.2, 0.1), (0.8, 0.6, 0.1), (0.9, 0.1, 0.1)])
    ]
    return {"layers": rows, "leaking": [2], "worst": 2, "note": "most is left after layer 2"}


def cell(label, depth, forget, verdict="held"):
    return {"label": label, "policy": label.split()[0], "mean_depth": depth, "forget": forget, "verdict": verdict}


def parsed(markup):
    root = ET.fromstring(str(markup))
    assert set(root.keys()) >= SVG
    return root


def with_class(root, class_):
    return [part for part in root.iter() if part.get("class") == class_]


def test_a_leak_curve_has_a_band_around_each_line():
    root = parsed(leak_plot("npo", leak()))
    for who, ends in (("target", (0.2, 0.8, 0.9)), ("unlearned", (0.2, 0.6, 0.1)), ("oracle", (0.1, 0.1, 0.1))):
        # The second line of its class is the legend's.
        curve, _ = with_class(root, f"series {CLASSES[who]}")
        (band,) = with_class(root, f"band {CLASSES[who]}")
        heights = [float(point.split(",")[1]) for point in curve.get("points").split()]
        edges = [float(point.split(",")[1]) for point in band.get("points").split()]
        # 300 pixels for a probability of 1, downwards from 340.
        assert heights == pytest.approx([340 - 300 * value for value in ends], abs=0.06)
        assert edges[:3] == pytest.approx([340 - 300 * (value + 0.05) for value in ends], abs=0.06)
        assert edges[3:] == pytest.approx([340 - 300 * (value - 0.05) for value in reversed(ends)], abs=0.06)
    assert len(with_class(root, "ring")) == 1


def test_without_an_oracle_there_is_no_third_line():
    assert not with_class(parsed(leak_plot("npo", leak(oracle=False))), "band c")


def test_a_pareto_plot_has_a_mark_for_each_cell_and_joins_thresholds():
    cells = [cell("full", 8, 0.1), cell("saturation 0.8", 3, 0.7, "returned"), cell("saturation 0.9", 5, 0.3)]
    root = parsed(pareto_plot("npo", [*cells, cell("fixed 2", None, 0.1)], 8))
    # The legend has one of each verdict.
    assert len(with_class(root, "mark returned")) == 2
    assert len(with_class(root, "mark held")) == 3
    assert len(with_class(root, "spoke")) == 1
    said = "".join(root.itertext())
    assert "saturation 0.8: returned" in said
    assert "fixed 2" not in said
    (spoke,) = with_class(root, "spoke")
    # Depths 0..8 over 690 pixels from 74.
    assert float(spoke.get("x1")) == pytest.approx(74 + 3 / 8 * 690, abs=0.06)
    assert float(spoke.get("y1")) == pytest.approx(340 - 300 * 0.7, abs=0.06)


def joules(cell, value, method="measured-counter"):
    return {**cell, "energy": {"joules": value, "low": None, "high": None, "methods": [method], "scopes": ["gpu"]}}


def test_a_pareto_plot_by_measured_joules():
    cells = [joules(cell("full", 8, 0.1), 0.031), joules(cell("fixed 2", None, 0.7, "returned"), 0.01)]
    root = parsed(pareto_plot("npo", cells, 8, "energy"))
    assert len(with_class(root, "mark returned")) == 2
    said = set(root.itertext())
    assert "joules for a token (gpu)" in said
    # Steps of a twentieth up to the first at or above the most, over 690 pixels from 74.
    assert {"0", "0.005", "0.03", "0.035"} <= said
    lines = [part for part in root.iter() if part.get("class") == "axis" and part.get("x1") == part.get("x2")]
    assert max(float(part.get("x1")) for part in lines) == pytest.approx(764, abs=0.1)


@pytest.mark.parametrize(
    "cells",
    [
        [],
        [joules(cell("full", 8, 0.1), 0.03), {**cell("fixed 2", 2, 0.7), "energy": None}],
        [joules(cell("full", 8, 0.1), 0.03), joules(cell("fixed 2", 2, 0.7), 0.01, "estimated-tdp")],
    ],
)
def test_an_estimate_does_not_stand_beside_a_measurement(cells):
    assert not measured_joules(cells)
    with pytest.raises(ValueError, match="npo: joules of some cells are estimated or not known"):
        pareto_plot("npo", cells, 8, "energy")


def test_quality_against_depth_has_a_line_for_each_policy():
    series = {"probe": [(4, 0.8, 0.75, 0.85), (12, 1, 1, 1)], "fixed": [(2, 0.62, 0.6, 0.64), (12, 1, 1, 1)]}
    root = parsed(depth_plot(series, 12))
    line, _ = with_class(root, "series a")
    first, last = (tuple(map(float, point.split(","))) for point in line.get("points").split())
    # The axis begins at the tenth below the smallest value: .6.
    assert first == pytest.approx((74 + 4 / 12 * 690, 340 - 300 * 0.5), abs=0.06)
    assert last == pytest.approx((74 + 690, 40), abs=0.06)
    assert len(with_class(root, "whisker-b")) == 2
    assert {"probe", "fixed"} <= set(root.itertext())


def test_names_are_escaped():
    evil = "<script>"
    depths = depth_plot({evil: [(1, 1, 1, 1)]}, 4)
    for picture in (leak_plot(evil, leak()), pareto_plot(evil, [cell(evil, 2, 0.5)], 4), depths):
        assert "<script" not in str(picture)
        parsed(picture)


def test_a_picture_of_its_own_brings_its_colours():
    picture = standalone(depth_plot({"probe": [(4, 0.8, 0.75, 0.85), (12, 1, 1, 1)]}, 12), "exits.css")
    root = ET.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    style = next(part.text for part in root.iter() if part.tag.endswith("style"))
    # Colours stand there as themselves; :root and var() are the page's.
    assert "svg .series.a, svg .whisker-a { stroke: #1f6aa5; }" in style
    assert "fill: #1c2024" in style
    assert not {name for name in ("body", "var(", ":root") if name in style}
