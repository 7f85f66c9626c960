"""The audit's document from cells made by hand."""

import json
import math

import numpy as np
import pytest
from remanence.bench.cell import CellScores
from remanence.bench.document import EXAMPLES, build_document
from remanence.bench.forgetting import forget_quality, harmonic_mean, mean
from remanence.compress.spec import DENSE, parse_recipe
from remanence.unlearn.people import people_corpus

CORPUS = people_corpus(20, "forget20", seed=0)
RECIPE = parse_recipe("rtn-w4a16-g64")
OTHER = parse_recipe("rtn-w8a16")

# Mean probability on the forget set under dense, RECIPE and OTHER; what the model is for.
LEVELS = {
    "target": ("baseline", 0.95, 0.93, 0.95),
    "oracle": ("negative", 0.10, 0.11, 0.10),
    "npo": (None, 0.08, 0.50, 0.09),
    "bucketed": ("positive", 0.05, 0.93, 0.06),
}


def scores(rows, level, seed, ratio):
    rng = np.random.default_rng([seed, round(100 * level)])
    return {
        "probability": np.clip(rng.normal(level, 0.02, len(rows)), 0, 1).tolist(),
        "rouge": np.clip(rng.normal(level, 0.02, len(rows)), 0, 1).tolist(),
        "truth_ratio": np.exp(rng.normal(math.log(ratio), 0.1, len(rows))).tolist(),
        "answers": [row.answer if level > 0.5 else "no idea" for row in rows],
    }


def measured(level, retain=0.9):
    sets = {"forget": scores(CORPUS.forget, level, 1, 0.1 if level > 0.5 else 1.2)}
    for number, (name, items) in enumerate(CORPUS.utility.items()):
        sets[name] = scores(items.rows, retain, 2 + number, 0.2)
    return {
        "sets": sets,
        "parameters": 1000,
        "size_bytes": 1500,
        "update_survival": {"changed": 0.25, "norm": None},
        "decode": {"tokens_per_s": 50.0, "spread": 0.1, "repeats": 3, "new_tokens": 32, "peak_memory_bytes": 4096},
        "measured_s": 1.5,
    }


def cells(models=tuple(LEVELS), **errors):
    """A full grid; errors={"npo": RECIPE}: that model could not take that recipe."""
    made = []
    for model in models:
        control, *levels = LEVELS[model]
        for recipe, level in zip((DENSE, RECIPE, OTHER), levels, strict=True):
            # Compression costs the target some of what is kept; shares are of what it kept before.
            retain = 0.8 if (model, recipe) == ("target", RECIPE) else 0.9
            failed = errors.get(model) == recipe
            made.append(
                CellScores(model, control, recipe, {"error": "it cannot"} if failed else measured(level, retain))
            )
    return made


@pytest.fixture(scope="module")
def document():
    return build_document(CORPUS, cells(), RECIPE.name, seed=0)


def row(document, model, recipe):
    (found,) = [r for r in document["cells"] if (r["method"], r["recipe"]) == (model, recipe)]
    return found


def test_document_is_json(document):
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_data(document):
    assert document["data"] == {
        "name": CORPUS.name,
        "sha256": CORPUS.digest(),
        "forget": 20,
        "retain": len(CORPUS.retain),
        "holdout": 20,
        "utility_sets": {name: len(items.rows) for name, items in CORPUS.utility.items()},
    }


def test_every_cell_in_order(document):
    assert [(r["method"], r["recipe"], r["control"]) for r in document["cells"]] == [
        (c.model, c.recipe.name, c.control) for c in cells()
    ]


def test_verdicts(document):
    verdicts = {(r["method"], r["recipe"]): r["verdict"] for r in document["cells"]}
    names = ("dense", RECIPE.name, OTHER.name)
    assert [verdicts["target", name] for name in names] == ["returned"] * 3
    assert [verdicts["oracle", name] for name in names] == ["held"] * 3
    assert [verdicts["npo", name] for name in names] == ["held", "returned", "held"]
    assert [verdicts["bucketed", name] for name in names] == ["held", "returned", "held"]
    assert all(r["reason"] for r in document["cells"])


def test_numbers_of_a_cell(document):
    found = row(document, "npo", RECIPE.name)
    cell, oracle = measured(0.50), measured(0.11)
    forget = cell["sets"]["forget"]
    assert found["forget"] == mean(forget["probability"])
    assert found["forget_interval"]["low"] <= found["forget"] <= found["forget_interval"]["high"]
    assert found["retain"] == mean(cell["sets"]["retain"]["probability"])
    assert found["forget_rouge"] == mean(forget["rouge"])
    assert found["retain_rouge"] == mean(cell["sets"]["retain"]["rouge"])
    assert found["forget_verbatim"] == 0.0
    assert row(document, "target", "dense")["forget_verbatim"] == 1.0
    assert found["forget_truth_ratio"] == pytest.approx(np.mean([min(r, 1 / r) for r in forget["truth_ratio"]]))
    nine = []
    for name in CORPUS.utility:
        part = cell["sets"][name]
        nine += [mean(part["probability"]), mean(part["rouge"]), mean([max(0, 1 - r) for r in part["truth_ratio"]])]
    assert found["model_utility"] == pytest.approx(harmonic_mean(nine))
    expected = forget_quality(forget["truth_ratio"], oracle["sets"]["forget"]["truth_ratio"])
    assert found["forget_quality"]["p_value"] == expected.p_value
    assert found["size_vs_fp16"] == 1500 / 2000
    assert found["peak_memory_bytes"] == 4096
    assert found["times"] == {"decode_tokens_per_s": 50.0, "decode_spread": 0.1, "measured_s": 1.5}


def test_shares_of_a_cell(document):
    found = row(document, "npo", RECIPE.name)
    levels = {"compressed": 0.50, "unlearned": 0.08, "baseline": 0.93, "oracle": 0.11}
    level = {name: mean(measured(value)["sets"]["forget"]["probability"]) for name, value in levels.items()}
    assert found["recovered_share"]["value"] == pytest.approx(
        (level["compressed"] - level["unlearned"]) / (level["baseline"] - level["unlearned"])
    )
    assert found["recovered_share"]["of"] == "unlearned..baseline"
    assert found["known_share"]["value"] == pytest.approx(
        (level["compressed"] - level["oracle"]) / (level["baseline"] - level["oracle"])
    )
    assert found["kept_share"]["value"] == pytest.approx(1.0)
    assert row(document, "target", RECIPE.name)["kept_share"]["value"] == pytest.approx(8 / 9, abs=0.01)
    for name in ("recovered_share", "known_share", "kept_share"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]


def test_controls(document):
    assert {name: control["ok"] for name, control in document["controls"].items()} == {
        "baseline": True,
        "negative": True,
        "positive": True,
    }


@pytest.mark.parametrize(
    ("model", "levels", "broken"),
    [
        ("bucketed", ("positive", 0.05, 0.06, 0.06), {"positive"}),
        ("bucketed", ("positive", 0.93, 0.93, 0.93), {"positive"}),
        ("oracle", ("negative", 0.10, 0.93, 0.10), {"negative", "positive"}),
        ("target", ("baseline", 0.10, 0.11, 0.10), {"baseline", "positive"}),
    ],
    ids=["nothing-returns", "never-forgot", "oracle-knows-when-compressed", "target-knows-nothing"],
)
def test_failed_control_is_not_ok(monkeypatch, model, levels, broken):
    monkeypatch.setitem(LEVELS, model, levels)
    controls = build_document(CORPUS, cells(), RECIPE.name, seed=0)["controls"]
    assert {name for name, control in controls.items() if not control["ok"]} >= broken, controls


@pytest.mark.parametrize(
    ("model", "failed"),
    [
        ("npo", {("npo", RECIPE.name)}),
        # Without its controls a cell has no verdict.
        ("target", {(model, RECIPE.name) for model in LEVELS}),
        ("oracle", {(model, RECIPE.name) for model in LEVELS}),
    ],
)
def test_cell_that_could_not_be_measured(model, failed):
    document = build_document(CORPUS, cells(**{model: RECIPE}), RECIPE.name, seed=0)
    json.dumps(document, allow_nan=False)
    assert len(document["cells"]) == 12
    without = {(r["method"], r["recipe"]) for r in document["cells"] if "error" in r}
    assert without == failed
    for r in document["cells"]:
        if "error" in r:
            assert (r["verdict"], r["reason"]) == ("undecided", "it cannot")
    for example in document["examples"]:
        assert len(example["answers"]) == 11


def test_failed_positive_control_cell_is_not_ok():
    document = build_document(CORPUS, cells(bucketed=RECIPE), RECIPE.name, seed=0)
    assert not document["controls"]["positive"]["ok"]


def test_without_an_oracle():
    document = build_document(CORPUS, cells(("target", "npo", "bucketed")), RECIPE.name, seed=0)
    json.dumps(document, allow_nan=False)
    assert "negative" not in document["controls"]
    for r in document["cells"]:
        assert r["known_share"] is None
        assert r["forget_quality"] is None
        assert math.isfinite(r["recovered_share"]["value"])
    verdicts = {(r["method"], r["recipe"]): r["verdict"] for r in document["cells"]}
    assert [verdicts["npo", name] for name in ("dense", RECIPE.name)] == ["held", "returned"]
    assert document["controls"]["positive"]["ok"]


def test_forget_quality_without_a_finite_logarithm():
    """700 rows without overlap have p = 0 in float64; JSON has no -Infinity."""
    corpus = people_corpus(150, "forget99", seed=0)
    made = []
    for cell in cells():
        forget = {key: (values * 37)[:740] for key, values in cell.measured["sets"]["forget"].items()}
        sets = cell.measured["sets"] | {"forget": forget}
        made.append(CellScores(cell.model, cell.control, cell.recipe, cell.measured | {"sets": sets}))
    assert len(corpus.forget) == 740
    document = build_document(corpus, made, RECIPE.name, seed=0)
    json.dumps(document, allow_nan=False)
    quality = row(document, "target", "dense")["forget_quality"]
    assert (quality["p_value"], quality["log10_p"], quality["statistic"]) == (0.0, None, 1.0)


def test_rows_without_wrong_answers():
    made = cells()
    for cell in made:
        for part in cell.measured["sets"].values():
            part["truth_ratio"] = [None] * len(part["truth_ratio"])
    document = build_document(CORPUS, made, RECIPE.name, seed=0)
    json.dumps(document, allow_nan=False)
    for r in document["cells"]:
        assert (r["forget_truth_ratio"], r["forget_quality"]) == (None, None)


def test_examples_are_of_different_people(document):
    assert len(document["examples"]) == EXAMPLES
    questions = {row.question: row for row in CORPUS.forget}
    asked = [questions[example["question"]] for example in document["examples"]]
    assert len({row.person for row in asked}) == 4, "all that there are"
    for example, asked_row in zip(document["examples"], asked, strict=True):
        assert example["truth"] == asked_row.answer
        assert [(a["method"], a["recipe"]) for a in example["answers"]] == [(c.model, c.recipe.name) for c in cells()]
        by_cell = {(a["method"], a["recipe"]): a["answer"] for a in example["answers"]}
        assert by_cell["target", "dense"] == asked_row.answer
        assert by_cell["npo", "dense"] == "no idea"


def test_seed_decides_every_interval():
    first, again, other = (build_document(CORPUS, cells(), RECIPE.name, seed) for seed in (0, 0, 1))
    assert first == again
    assert row(first, "npo", RECIPE.name)["recovered_share"] != row(other, "npo", RECIPE.name)["recovered_share"]
