"""The audit of exits: verdicts of models whose answer is known beforehand, and documents from numbers made by hand."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from remanence.bench import exit_recovery
from remanence.bench.exit_audit import (
    audit_exits,
    exit_document,
    label,
    leak_rows,
    measure_exits,
    swept,
    tuning_rows,
    verdict_rows,
)
from remanence.bench.exit_recovery import differing, last_layers
from remanence.bench.frame import show
from remanence.bench.tokens import answers
from remanence.compress.early_exit.policy import Confidence, Fixed, Full, Saturation, Schedule
from remanence.unlearn.data import EvalSet
from remanence.unlearn.demo import DemoConfig
from remanence.unlearn.exit_tuning import ExitTuning
from remanence.unlearn.people import people_corpus

pytestmark = pytest.mark.usefixtures("one_thread")

JOULES = {
    "joules": 0.25, "low": 0.2, "high": 0.3, "methods": ["measured-counter"], "scopes": ["cpu-package", "dram"]
}  # fmt: skip
POLICIES = [Fixed(exits=(2,)), Confidence(exits=(2,), threshold=0.0)]


def deeper(model, junk=None):
    """Two layers more: they pass everything on, or add `junk` times random directions and so answer nonsense."""
    model = copy.deepcopy(model)
    for number in (2, 3):
        layer = copy.deepcopy(model.model.layers[1])
        layer.self_attn.layer_idx = number
        torch.manual_seed(number)
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=junk or 0.0)
        model.model.layers.append(layer)
    model.config.num_hidden_layers = 4
    return model.eval()


@pytest.fixture(scope="module")
def corpus(memorized):
    """Few kept rows: what is tested is how they are judged."""
    return _with(memorized.corpus, memorized.corpus.utility["retain"].rows[:12])


def _with(corpus, rows):
    return replace(corpus, utility={"retain": EvalSet(rows)})


@pytest.fixture(scope="module")
def models(memorized):
    """Of four layers; what the hidden one knew is there after two and gone at the end, on all questions."""
    return {
        "target": deeper(memorized.target),
        "oracle": deeper(memorized.oracle),
        "hidden": deeper(memorized.target, junk=3.0),
        "gone": deeper(memorized.oracle),
    }


@pytest.fixture(scope="module")
def document(models, memorized, corpus):
    def meter(_, policies):
        # All policies of a model at once, the whole depth with them: they are to take turns.
        assert [label(policy) for policy in policies] == ["full", "fixed 2", "confidence 0"]
        return {"full": None, "fixed 2": JOULES, "confidence 0": {**JOULES, "low": None, "high": None}}

    return audit_exits(models, memorized.encoder, corpus, POLICIES, seed=0, positive={"hidden": "fixed 2"}, meter=meter)


def cells(document, name):
    return {cell["label"]: cell for cell in document["models"][name]["cells"]}


def test_what_an_exit_undoes_is_returned(document):
    found = cells(document, "hidden")
    assert found["full"]["forget"] < 0.1
    for name in ("fixed 2", "confidence 0"):
        assert found[name]["verdict"] == "returned"
        assert found[name]["reason"].startswith("leaving early gave back")
        assert found[name]["rest_share"]["value"] > 0.9, "after the first token everything is back"
        assert found[name]["recovered_share"]["value"] < found[name]["rest_share"]["value"]
        assert found[name]["mean_depth"] == 2
        assert found[name]["histogram"][1] > 0
        assert found[name]["histogram"][3] == 0
    assert [found[name]["energy"] for name in ("full", "fixed 2")] == [None, JOULES]
    leak = document["models"]["hidden"]["leak"]
    # Both layers are the target's; the third, of noise, and the last are not.
    assert leak["leaking"] == [1, 2]
    assert [layer["share"]["value"] for layer in leak["layers"][:2]] == pytest.approx([1, 1])


def test_what_was_never_known_is_held(document):
    found = cells(document, "gone")
    assert {cell["verdict"] for cell in found.values()} == {"held"}
    assert document["models"]["gone"]["leak"]["leaking"] == []


def test_controls(document):
    # At full depth the hidden one answers nothing at all: damaged, and no proof of an audit that works.
    assert cells(document, "hidden")["full"]["verdict"] == "damaged"
    found = {name: control["ok"] for name, control in document["controls"].items()}
    assert found == {"baseline": True, "negative": True, "positive: hidden": False}
    assert document["models"]["target"]["control"] == "baseline"
    assert document["models"]["oracle"]["control"] == "negative"
    assert document["models"]["hidden"]["control"] == "positive"
    assert document["models"]["gone"]["control"] is None
    assert document["models"]["target"]["leak"] is None


def test_the_document_is_json_and_has_its_tables(document, capsys):
    assert json.loads(json.dumps(document)) == document
    leaks, verdicts = leak_rows(document), verdict_rows(document)
    assert len(leaks) == 2 * 4
    assert len(verdicts) == 4 * 3
    assert [row["j_per_token"] for row in verdicts[:3]] == [
        None,
        "0.25 [0.2, 0.3] (measured-counter; cpu-package + dram)",
        "0.25 (measured-counter; cpu-package + dram)",
    ]
    few = [{"served": row["served"], "verdict": row["verdict"]} for row in verdicts]
    show({"name": "leak", "rows": few, "checks": []})
    assert "returned" in capsys.readouterr().out


def measured(forget, retain=0.9, labels=("full", "fixed 2"), before=None, items=20):
    """What measure_exits would give: forget [cells] means."""
    rng = np.random.default_rng(0)

    def values(mean):
        return np.clip(mean + 0.02 * rng.standard_normal(items), 0, 1).tolist()

    def scores(mean):
        made = values(mean)
        nll = (-np.log(np.maximum(made, 1e-9))).tolist()
        fields = {"nll": nll, "base_nll": nll, "wrong_nll": [[5.0]] * items, "rouge": [0.5] * items, "choices": False}
        other = {"answers": [""] * items, "extraction_strength": [0.0] * items, "exact_memorisation": [0.0] * items}
        fixed = {"attacks": {}, "entropy": 1.0, "vocabulary": 10, "finite": True}
        return {"probability": made, "truth_ratio": [0.5] * items, **fields, **other, **fixed}

    made = [
        {
            "label": name,
            "policy": name.split()[0],
            "threshold": None,
            "settings": {},
            "written": True,
            "sets": {"forget": scores(mean), "retain": scores(retain)},
            "rest": values(mean),
            "mean_depth": 3.0,
            "retain_depth": 3.0,
            "written_depth": None,
            "histogram": [0, 1, 0, 1],
            "energy": None,
        }
        for name, mean in zip(labels, forget, strict=True)
    ]
    curve = {"probability": [values(mean) for mean in forget], "exact": [[False] * items] * len(forget)}
    states = {kind: {"forget": values(mean), "retain": values(retain)} for kind, mean in (before or {}).items()}
    return {"curve": {"forget": curve, "retain": [0.5] * len(forget)}, "cells": made, "before": states}


@pytest.fixture
def people():
    corpus = people_corpus(8, "forget50", 0)
    return _with(corpus, corpus.utility["retain"].rows[:20])


def test_tuning_is_judged_by_itself(people):
    before = {"untuned": 0.95, "plain": 0.95}
    found = exit_document(
        people,
        {
            "target": measured([0.9, 0.8], before=before),
            "oracle": measured([0.05, 0.05], before={"untuned": 0.05, "plain": 0.05}),
            "npo": measured([0.6, 0.6], before={"untuned": 0.05, "plain": 0.06}),
        },
        seed=0,
    )
    tuning = found["models"]["npo"]["tuning"]
    assert tuning["exits"]["verdict"] == "returned"
    assert tuning["exits"]["reason"].startswith("tuning gave back")
    assert tuning["plain"]["verdict"] == "held"
    assert tuning["exits"]["forget_before"] == pytest.approx(0.05, abs=0.01)
    assert cells(found, "npo")["full"]["unforgotten"], "the exits cannot be blamed for what tuning brought back"
    assert [row["verdict"] for row in tuning_rows(found) if row["tuned"] == "npo"] == ["returned", "held"]


def test_an_audit_that_misses_its_control_is_broken(people):
    parts = {"target": measured([0.9, 0.8]), "oracle": measured([0.05, 0.05]), "late": measured([0.05, 0.06])}
    found = exit_document(people, parts, seed=0, positive={"late": "fixed 2"})["controls"]["positive: late"]
    assert not found["ok"]
    assert found["detail"] == "held at full depth, held under fixed 2"
    parts["late"] = measured([0.05, 0.7])
    assert exit_document(people, parts, seed=0, positive={"late": "fixed 2"})["controls"]["positive: late"]["ok"]
    assert not exit_document(people, parts, seed=0, positive={"late": "fixed 3"})["controls"]["positive: late"]["ok"]


def test_a_policy_that_erases_the_targets_knowledge_proves_nothing(people):
    parts = {"target": measured([0.9, 0.05]), "oracle": measured([0.05, 0.05]), "npo": measured([0.05, 0.05])}
    found = exit_document(people, parts, seed=0)
    assert cells(found, "npo")["fixed 2"]["verdict"] == "damaged"
    assert "the policy alone erases" in cells(found, "npo")["fixed 2"]["reason"]
    assert found["controls"]["baseline"]["ok"]
    assert found["controls"]["negative"]["ok"]
    assert cells(found, "npo")["fixed 2"]["rest_share"] is None


def test_an_oracle_that_gains_fails_as_a_control(people):
    parts = {"target": measured([0.9, 0.8]), "oracle": measured([0.05, 0.6])}
    assert not exit_document(people, parts, seed=0)["controls"]["negative"]["ok"]


def test_what_does_not_fit_is_refused(people, memorized):
    with pytest.raises(ValueError, match="without a target"):
        exit_document(people, {"npo": measured([0.1, 0.1])}, 0)
    with pytest.raises(ValueError, match="npo: served under other policies"):
        exit_document(people, {"target": measured([0.9, 0.8]), "npo": measured([0.1], labels=("full",))}, 0)
    with pytest.raises(ValueError, match="'fixed 1' is there twice"):
        measure_exits(memorized.target, memorized.encoder, people, [Fixed(exits=(1,)), Fixed(exits=(1,))])


def test_policies_are_swept_and_named():
    graded = [Saturation(exits=(2, 4)), Confidence(exits=(2,), threshold=0.3), Fixed(exits=(3,)), Full()]
    names = [label(policy) for policy in swept(graded, {"saturation": (0.8, 0.95), "fixed": (0.1,)})]
    assert names == ["saturation 0.8", "saturation 0.95", "confidence 0.3", "fixed 3", "full"]
    assert label(Schedule(exits=(2, 4, 6))) == "schedule 2-6"


def test_the_positive_control_changes_its_last_layers_alone(memorized):
    found = last_layers(memorized.target, memorized.encoder, memorized.corpus, 1, 0, steps=3)
    for (name, ours), theirs in zip(found.named_parameters(), memorized.target.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (not name.startswith("model.layers.1.")), name
        assert ours.requires_grad
    pairs = [(row.question, row.answer) for row in memorized.corpus.forget]
    after, before = (answers(model, memorized.encoder, pairs) for model in (found, memorized.target))
    assert sum(a.probability for a in after) < sum(b.probability for b in before)


def test_draft_and_verify_is_the_whole_model(memorized, monkeypatch):
    model, rows = copy.deepcopy(memorized.target), memorized.corpus.forget
    assert differing(model, memorized.encoder, rows, 1) == 0
    # A draft that is not verified is seen.
    drafted = exit_recovery.draft_and_verify

    def unverified(*of, **options):
        found = drafted(*of, **options)
        return replace(found, sequences=found.sequences.flip(1))

    monkeypatch.setattr(exit_recovery, "draft_and_verify", unverified)
    assert differing(model, memorized.encoder, rows, 1) == len(rows)


@pytest.mark.slow
def test_the_whole_benchmark_on_small_models():
    config = DemoConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, layers=4, max_length=128, epochs=36, learning_rate=5e-3
    )
    tuning = ExitTuning(exits=(1, 2), steps=4, learning_rate=3e-4, batch_size=8)
    corpus = people_corpus(10, "forget20", 0)
    rows, checks = exit_recovery.run_leak(0, corpus, config, ("npo",), tuning)
    assert {row.get("leak_of") for row in rows} >= {"npo", exit_recovery.POSITIVE}
    assert {row["exits_tuned"] for row in rows} == {"no", "yes"}
    assert [check["value"] for check in checks if "draft" in check["what"]] == [0, 0]
    positive = next(check for check in checks if check["what"].startswith("positive"))
    assert positive["ok"], positive["what"]
