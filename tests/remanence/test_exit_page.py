"""The audit of exits from the command line, on models made here: a document, a page, an exit code; or one line."""

import json
import re
import signal
import sys
from types import SimpleNamespace

import pytest
from remanence.compress.checkpoint import save_model

from remanence.cli import main
from remanence.config import AuditConfig
from remanence.exit_auditing import SCHEMA, Order
from remanence.exit_page import failed, headline, html

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def command(monkeypatch, capfd):
    """`remanence exit audit` in this process: (exit code, stdout, stderr)."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["remanence", "exit", "audit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return SimpleNamespace(code=stop.value.code, **dict(zip(("out", "err"), capfd.readouterr())))

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def models(memorized, tmp_path):
    """A target that knows two layers by heart, its oracle, and files of rows."""
    tokenizer = memorized.encoder.tokenizer
    for name in ("target", "oracle"):
        save_model(getattr(memorized, name), tokenizer, tmp_path / name)
    for name in ("forget", "retain"):
        rows = getattr(memorized.corpus, name)
        lines = [json.dumps({"question": row.question, "answer": row.answer}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_from_models_to_a_page(models, command) -> None:
    given = ("--target", models / "target", "--oracle", models / "oracle", "--unlearned", f"same={models / 'target'}")
    data = ("--forget", models / "forget.jsonl", "--retain", models / "retain.jsonl")
    asked = ("--policies", "fixed,confidence,probe", "--thresholds", "0.5", "--exits", "1", "--no-control")
    done = command(*given, *data, *asked, "--out", models / "out", "--fail-on", "held", "--json")
    assert done.code in (0, 1), done.err
    document = json.loads(done.out)
    assert document == json.loads((models / "out" / "exits.json").read_text())
    assert document["schema"] == SCHEMA
    found = document["audits"]["as given"]
    labels = [cell["label"] for cell in found["models"]["same"]["cells"]]
    assert labels == ["full", "fixed 1", "confidence 0.5", "probe 0.5"]
    assert found["models"]["oracle"]["control"] == "negative"
    # The target as its own unlearned model: nothing was forgotten that could come back.
    assert found["models"]["same"]["cells"][0]["unforgotten"]
    assert len(found["models"]["same"]["leak"]["layers"]) == 2
    page = (models / "out" / "exits.html").read_text()
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=", page)
    assert page.count("<svg") == 2  # of the audited model: its leak curve, its policies by depth
    assert "remanence exit audit" in page
    assert f"report: {models / 'out' / 'exits.html'}" in done.err


def _document():
    """As small as one can be, with a name that would be markup."""
    spread = {"value": 0.5, "low": 0.4, "high": 0.6}
    cell = {
        "label": "fixed 1", "policy": "fixed", "threshold": None, "verdict": "returned", "reason": "it came back",
        "mean_depth": 1.0, "forget": 0.9, "retain": 0.9, "recovered_share": spread, "known_share": None,
        "forget_verbatim": 0.5, "forget_rouge": 0.5, "model_utility": None, "energy": None, "rest": spread,
    }  # fmt: skip
    layer = {
        "layer": 1, "target": spread, "unlearned": spread, "oracle": None, "share": None, "excess": None,
        "p_excess": None,
        "kept": None,
    }  # fmt: skip
    model = {
        "control": None,
        "leak": {"layers": [layer, {**layer, "layer": 2}], "leaking": [1], "worst": 1, "note": "<b>note\x1b[31m"},
        "cells": [{**cell, "label": "full", "policy": "full", "verdict": "held"}, cell],
        "tuning": {},
    }
    target = {**model, "control": "baseline", "leak": None}
    audit = {
        "tuned": False,
        "layers": 2,
        "models": {"target": target, "<script>alert(1)</script>": model},
        "controls": {"baseline": {"ok": True, "detail": "as it must"}},
    }
    return {
        "schema": SCHEMA,
        "environment": {"torch": "2", "transformers": "5"},
        "config": {"target": "demo", "seed": 0},
        "models": {},
        "data": {"name": "people", "forget": 4, "digest": ""},
        "energy": [],
        "audits": {"as given": audit},
        "command": "remanence exit audit",
    }


def test_a_hostile_name_is_inert() -> None:
    page = html(_document())
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>note" not in page
    assert "\x1b" not in page


def test_the_headline_says_what_came_back() -> None:
    document = _document()
    assert headline(document) == (
        "Leaving early gives back what was forgotten: <script>alert(1)</script> (as given) under fixed 1"
    )
    audit = document["audits"]["as given"]
    for cell in audit["models"]["<script>alert(1)</script>"]["cells"]:
        cell["verdict"] = "held"
    assert headline(document) == "Leaving early brought nothing back that was shown"
    audit["controls"]["positive: last-layers"] = {"ok": False, "detail": "held"}
    assert headline(document) == ("The audit is broken: positive: last-layers (as given) did not come out as it must")
    assert failed("tuned", audit) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"policies": ("fixed", "probes")}, "policies: 'probes' is not one of fixed, schedule"),
        ({"thresholds": (0.5, 1.5)}, "thresholds: .* expected numbers between 0 and 1"),
        ({"tune_steps": -1}, "tune-steps: -1: expected at least 0"),
        ({"estimate": True}, "estimate: goes with --energy"),
    ],
)
def test_orders_that_cannot_be(more, said) -> None:
    with pytest.raises(ValueError, match=said):
        Order(AuditConfig(), **more)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--target", "nowhere", "--data", "people", "--unlearned", "x=y"), "nowhere: no such model directory"),
        (("--policies", ","), "policies: empty"),
        (("--thresholds", "a"), "thresholds: 'a' is not a list of numbers"),
        (("--fail-on", "lost"), "fail-on: 'lost' is not one of"),
        (("--unlearned", "x"), "unlearned: 'x' is not of the form NAME=DIR"),
        (("--exits", "one"), "exits: 'one' is not a list of depths"),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, arguments, said) -> None:
    done = command(*arguments, "--out", tmp_path / "out")
    assert done.code == 2, done.err
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
