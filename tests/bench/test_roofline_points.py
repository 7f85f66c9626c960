"""`bench roofline`: its points hold, and a part that is wrong is noticed."""

from dataclasses import replace

import pytest
from remanence.backends.ceilings import Ceilings, Pace, Rate
from remanence.bench import roofline_points
from remanence.bench.frame import run


def failing(checks):
    return [check["what"] for check in checks if not check["ok"]]


@pytest.mark.slow
def test_walks_files_and_llm_viewer():
    found = run("roofline", 0, parts=("walk", "stored", "viewer"))
    assert not failing(found["checks"])
    assert len([row for row in found["rows"] if "GFLOP" in row]) == 24
    assert len([row for row in found["rows"] if "recipe" in row]) == 6


def test_a_difference_that_nobody_explains_is_noticed(monkeypatch):
    theirs = roofline_points.llm_viewer.viewer

    def other(*arguments):
        counts = theirs(*arguments)
        return replace(counts, decode_ops=1.01 * counts.decode_ops)

    monkeypatch.setattr(roofline_points, "_VIEWED", ("Qwen3-0.6B",))
    rows, checks = roofline_points.viewed()
    assert not failing(checks)
    assert {row["why"] for row in rows if "why" in row} >= {"Qwen3-0.6B, kv_bytes", "Qwen3-0.6B, decode_ops"}
    monkeypatch.setattr(roofline_points.llm_viewer, "viewer", other)
    assert len(failing(roofline_points.viewed()[1])) == 1


def test_measured_rows_and_their_checks(monkeypatch):
    """On a tiny model, with ceilings that are made up: what is compared, not the figures."""
    pace = Pace(Rate(1e-9, "s", spread=0.0), {1: Rate(1e15, "s", spread=0.0)})
    high = Ceilings(
        "d",
        Rate(1e15, "s", spread=0.0),
        {"float32": Rate(1e15, "s", spread=0.0)},
        cache_bytes=10,
        launch=Rate(1e-9, "s", spread=0.0),
        paces={"float32": pace, "w4a16": pace},
    )
    made = roofline_points._model
    monkeypatch.setattr(roofline_points, "_model", lambda seed, dtype, layers: made(seed, dtype, 1, 256, 256, 64))  # noqa: ARG005
    monkeypatch.setattr(roofline_points, "_LOAD", (4, 3, (1,)))
    monkeypatch.setattr(roofline_points, "measure_ceilings", lambda _: high)
    rows, checks = roofline_points.measured()
    timed = [row for row in rows if "kept" in row]
    assert [(row["kept"], row["phase"]) for row in timed[:3]] == [
        ("float32", "prefill"),
        ("float32", "decode"),
        ("bfloat16", "prefill"),
    ]
    assert len(timed) == 8
    for row in timed:
        assert row["attained"] == pytest.approx(row["floor ms"] / row["measured ms"])
        assert row["estimate / measured"] == pytest.approx(row["estimate ms"] / row["measured ms"])
    assert timed[4]["weights, MB"] < timed[0]["weights, MB"]
    assert failing(checks) == ["estimate against the clock, largest factor"]  # no machine is as fast as that


def test_a_part_that_there_is_not():
    with pytest.raises(ValueError, match="parts: 'x' is not one of walk, stored, measured, viewer"):
        run("roofline", 0, parts=("x",))
