"""The audit of exits from the command line, on models made here: a document, a page, an exit code; or one line."""

import json
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from remanence.backends.energy import probes
from remanence.backends.energy.meter import Lengths
from remanence.backends.energy.probe import Found, Missing
from remanence.backends.energy.sampler import Counter
from remanence.bench.exit_energy import exit_energy
from remanence.compress.checkpoint import save_model
from remanence.compress.early_exit.policy import Fixed, Full

from remanence.cli import main
from remanence.config import AuditConfig
from remanence.exit_auditing import SCHEMA, Order, _Run
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
        "config": {"target": "demo", "seed": 0, "energy": False},
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


def _asked(method, notes=()):
    """The document where joules were asked for; method None: they are not known."""
    document = {**_document(), "energy": list(notes)}
    document["config"]["energy"] = True
    found = {"joules": 0.25, "low": 0.2, "high": 0.3, "methods": [method], "scopes": ["cpu-package"]}
    for model in document["audits"]["as given"]["models"].values():
        model["cells"] = [{**cell, "energy": found if method else None} for cell in model["cells"]]
    return document


def test_the_page_tells_joules_with_their_method() -> None:
    page = html(_document())
    assert "oule" not in page
    assert "J/token" not in page
    assert "counter" not in page
    page = html(_asked("measured-counter"))
    assert page.count("<td>0.25 [0.2, 0.3] (measured-counter; cpu-package)</td>") == 4
    assert "joules for a token (cpu-package)" in page
    assert page.count("<svg") == 3
    page = html(_asked("estimated-tdp", ["no energy counter: rapl: <none>", "time x a constant"]))
    assert page.count("<td>0.25 [0.2, 0.3] (estimated-tdp; cpu-package)</td>") == 4
    assert "no energy counter: rapl: &lt;none&gt;" in page
    assert "time x a constant" in page
    assert page.count("<svg") == 2, "estimates are not plotted"
    page = html(_asked(None, ["no energy counter: rapl: none"]))
    assert "no energy counter: rapl: none" in page
    assert "all policies of a model took turns" not in page


@pytest.fixture
def metered(memorized, monkeypatch):
    """metered(found, **order): what the audit's meter gives of two policies, in short windows, and its notes."""

    def run(found, **more):
        monkeypatch.setitem(probes.COUNTERS, "cpu", (lambda _: found,))
        monkeypatch.setattr(exit_energy, "__defaults__", (Lengths(0.02, 2, 0.02, 0),))
        order = Order(AuditConfig(), energy=True, **more)
        audit = _Run(order, memorized.encoder, memorized.corpus, (1,), None, lambda _: None)
        meter = audit.meter()
        return meter and meter(memorized.target, [Full(), Fixed(exits=(1,))]), audit.notes

    return run


def test_the_meter_tells_method_and_scope(metered) -> None:
    refused = Missing("rapl-package", "no permission to read it", "sudo")
    watts = {"rapl-package": ("cpu-package", 50), "rapl-dram": ("dram", 10)}
    package, dram = (
        Counter(name, scope, lambda watts=watts: [watts * time.perf_counter()], [None], 1e-3)
        for name, (scope, watts) in watts.items()
    )
    found, notes = metered(Found((package, dram)))
    assert list(found) == ["full", "fixed 1"]
    for cell in found.values():
        assert cell["joules"] > 0
        assert cell["low"] < cell["joules"] < cell["high"]
        assert (cell["methods"], cell["scopes"]) == (["measured-counter"], ["cpu-package", "dram"])
    # One that stands still tells nothing, and has no rank.
    still = Counter("rapl-package", "cpu-package", lambda: [1.0], [None], 1e-3)
    found, notes = metered(Found((still,)))
    assert found == {"full": None, "fixed 1": None}
    assert any("rapl-package" in note for note in notes)
    # Memory alone is not what a token takes.
    found, notes = metered(Found((dram,), (refused,)))
    assert found is None
    assert notes == [
        "no energy counter of the device itself: rapl-dram (dram) alone, no total; "
        "rapl-package: no permission to read it"
    ]
    found, notes = metered(Found((dram,), (refused,)), estimate=True)
    for cell in found.values():
        assert (cell["methods"], cell["scopes"]) == (["estimated-tdp"], ["cpu-package"])
        assert (cell["low"], cell["high"]) == pytest.approx((cell["joules"] / 2, cell["joules"] * 2))
    assert any("processor time x a constant" in note for note in notes)


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
