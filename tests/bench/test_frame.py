"""The frame of the benchmarks: names, shape of the result, tables."""

import json

import pytest
from remanence.bench import frame, startup


def test_unknown_name():
    with pytest.raises(ValueError, match="'nothing' is not one of kernels"):
        frame.run("nothing", 0)


def test_every_benchmark_is_there_and_said_in_words():
    from importlib import import_module

    for module, words in frame.BENCHES.values():
        assert callable(import_module(f"remanence.bench.{module}").run)
        assert words


@pytest.fixture
def result(monkeypatch):
    """The start-up benchmark with its commands cut down to two, run once."""
    commands = {name: startup._COMMANDS[name] for name in ("python -c pass", "remanence --help")}
    monkeypatch.setattr(startup, "_COMMANDS", commands)
    monkeypatch.setattr(startup, "REPEATS", 1)
    return frame.run("startup", 0)


def test_result(result):
    assert result.keys() >= {"rows", "checks"}
    assert [row["command"] for row in result["rows"]] == ["python -c pass", "remanence --help"]
    for row in result["rows"]:
        assert 0 < row["best_s"] <= row["median_s"]
        assert row["spread_s"] >= 0
        assert row["repeats"] == 1
    (check,) = result["checks"]
    assert check.keys() == {"what", "limit", "value", "ok"}
    assert check["value"] == result["rows"][1]["median_s"]
    assert check["ok"] == (check["value"] < check["limit"])
    json.dumps(result, allow_nan=False)


def test_tables(capsys):
    rows = [{"shape": "8x8", "median_s": 0.001234567}, {"shape": "9x9", "note": "slow"}]
    checks = [{"what": "error", "limit": 1e-6, "value": 2e-6, "ok": False}]
    frame.show({"name": "tiny", "rows": rows, "checks": checks})
    shown = capsys.readouterr().out
    for text in ("tiny", "shape", "median_s", "note", "8x8", "0.001235", "slow", "checks", "1e-06", "False"):
        assert text in shown
    assert "None" not in shown


def test_empty_tables_are_left_out(capsys):
    frame.show({"name": "tiny", "rows": [], "checks": []})
    assert capsys.readouterr().out == ""
