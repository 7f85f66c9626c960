"""The audit's document from cells made by hand."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from remanence.bench.cell import CellScores
from remanence.bench.document import EXAMPLES, build_document
from remanence.bench.memorisation import memorisation_score
from remanence.bench.pressures.pressed import Pressed
from remanence.bench.privacy import auc, auc_interval, privleak
from remanence.bench.survival import WeightSurvival
from remanence.bench.tofu import VARIANTS, Items, forget_quality, forget_truth_ratio, harmonic_mean, mean, model_utility
from remanence.compress.recipe import DENSE, parse_recipe
from remanence.unlearn.people import people_corpus

CORPUS = people_corpus(20, "forget20", seed=0)
RECIPE = parse_recipe("rtn-w4a16-g64-plain")
OTHER = parse_recipe("rtn-w8a16-plain")

# Mean probability on the forget set under dense, RECIPE and OTHER; what the model is for.
LEVELS = {
    "target": ("baseline", 0.95, 0.93, 0.95),
    "oracle": ("negative", 0.10, 0.11, 0.10),
    "npo": (None, 0.08, 0.50, 0.09),
    "bucketed": ("positive", 0.05, 0.93, 0.06),
}


def scores(rows, level, seed, ratio):
    rng = np.random.default_rng([seed, round(100 * level)])
    near = lambda mean, spread: np.clip(rng.normal(mean, spread, len(rows)), 1e-3, 1)  # noqa: E731
    nll = -np.log(near(level, 0.02))
    wrong = [[float(b - math.log(ratio) - rng.normal(0, 0.1))] * 5 for b in nll]
    return {
        "nll": nll.tolist(),
        "base_nll": nll.tolist(),
        "wrong_nll": wrong,
        "rouge": near(level, 0.02).tolist(),
        "choices": False,
        "answers": [row.answer if level > 0.5 else "no idea" for row in rows],
        "extraction_strength": near(level, 0.1).tolist(),
        "exact_memorisation": near(level, 0.1).tolist(),
        "attacks": {name: rng.normal(level, 0.1, len(rows)).tolist() for name in ("loss", "min_k")},
        "entropy": 0.5,
        "vocabulary": 1000,
        "finite": True,
    }


def probability(part):
    return np.exp(-np.array(part["nll"])).tolist()


def items(part):
    return Items(*(part[name] for name in Items.__dataclass_fields__))


SURVIVAL = WeightSurvival(100, 0.9, 0.25, 0.3, 0.25, 0.1, 0.2, 0.5, 0.6, 0.3, 0.1, 0.1)


def measured(level, retain=0.9):
    sets = {"forget": scores(CORPUS.forget, level, 1, 0.1 if level > 0.5 else 1.2)}
    for number, (name, found) in enumerate(CORPUS.utility.items()):
        sets[name] = scores(found.rows, retain, 2 + number, 0.2)
    sets["holdout"] = scores(CORPUS.holdout, 0.1, 9, 1.2)
    pressed = Pressed("relearning", "probability", [level] * 4, {"10 steps": [level + 0.01 * i for i in range(4)]})
    return {
        "sets": sets,
        "health": {"entropy": 3.0, "repetition": 0.1, "empty": 0.0, "entropy_items": [3.0], "repetition_items": [0.1]},
        "flags": [],
        "muse": {"verbmem_f": level, "knowmem_f": level / 2, "knowmem_r": 0.9, "privleak": None, "items": {}},
        "distance": {
            "oracle_to_model": [level, 0.2],
            "model_to_oracle": [0.1, 0.3],
            "js": [level, level],
            "output": [0.5, 0.7],
            "hidden": [[0.1, 0.3], [0.5, 0.7]],
            "means": {"js": level, "hidden": 0.4},
        },
        "pressures": {"relearning": [asdict(pressed)], "early-exit": "guarded"},
        "perplexity": None,
        "parameters": 1000,
        "size_bytes": 1500,
        "update_survival": {"total": asdict(SURVIVAL) | {"survival": 1 - level}, "layers": {}, "by_module": {}},
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
        "holdout": len(CORPUS.holdout),
        "utility_sets": {name: len(items.rows) for name, items in CORPUS.utility.items()},
    }


def test_every_cell_in_order(document):
    assert [(r["method"], r["recipe"], r["control"]) for r in document["cells"]] == [
        (c.model, c.recipe.name, c.control) for c in cells()
    ]


def test_verdicts(document):
    verdicts = {(r["method"], r["recipe"]): r["verdict"] for r in document["cells"]}
    names = ("dense", RECIPE.name, OTHER.name)
    assert [verdicts["target", name] for name in names] == ["undecided"] * 3
    assert [r["unforgotten"] for r in document["cells"]] == [r["method"] == "target" for r in document["cells"]]
    assert [verdicts["oracle", name] for name in names] == ["held"] * 3
    assert [verdicts["npo", name] for name in names] == ["held", "returned", "held"]
    assert [verdicts["bucketed", name] for name in names] == ["held", "returned", "held"]
    assert all(r["reason"] for r in document["cells"])


def test_numbers_of_a_cell(document):
    found = row(document, "npo", RECIPE.name)
    cell, oracle = measured(0.50), measured(0.11)
    forget = cell["sets"]["forget"]
    assert found["forget"] == pytest.approx(mean(probability(forget)))
    assert found["forget_interval"]["low"] <= found["forget"] <= found["forget_interval"]["high"]
    assert found["retain"] == pytest.approx(mean(probability(cell["sets"]["retain"])))
    assert found["forget_rouge"] == mean(forget["rouge"])
    assert found["retain_rouge"] == mean(cell["sets"]["retain"]["rouge"])
    assert found["forget_verbatim"] == 0.0
    assert row(document, "target", "dense")["forget_verbatim"] == 1.0
    for variant in VARIANTS:
        assert found["truth_ratio"][variant] == forget_truth_ratio(items(forget), variant)
        kept = {name: items(cell["sets"][name]) for name in CORPUS.utility}
        assert found["model_utility"][variant] == model_utility(kept, variant)
    nine = [value for parts in found["components"].values() for value in parts.values()]
    assert len(nine) == 9
    assert found["model_utility"]["geometric"] == pytest.approx(harmonic_mean(nine))
    expected = forget_quality(items(forget).truth_ratio(), items(oracle["sets"]["forget"]).truth_ratio())
    assert found["forget_quality"] == asdict(expected)
    for name in ("extraction_strength", "exact_memorisation"):
        assert found["memorisation"][name]["value"] == pytest.approx(mean(forget[name]))
    holdout = cell["sets"]["holdout"]
    assert found["privacy"]["loss"] == asdict(auc_interval(forget["attacks"]["loss"], holdout["attacks"]["loss"]))
    aucs = [auc(*(c["sets"][s]["attacks"]["min_k"] for s in ("forget", "holdout"))) for c in (cell, oracle)]
    axes = {"verbmem_f": 0.5, "knowmem_f": 0.25, "knowmem_r": 0.9}
    assert found["muse"] == {**axes, "privleak": privleak(*aucs), "note": None}
    assert found["health"] == {"entropy": 3.0, "repetition": 0.1, "empty": 0.0}
    assert found["distance"] == {"js": 0.5, "hidden": 0.4}
    assert found["forget_flags"] == []
    paraphrase, ratio = mean(probability(forget)), forget_truth_ratio(items(forget), "prob")
    assert found["memorisation"]["score"] is not None
    means = [mean(forget[name]) for name in ("extraction_strength", "exact_memorisation")]
    assert found["memorisation"]["score"] == pytest.approx(memorisation_score(*means, paraphrase, ratio))
    assert found["update_survival"]["survival"] == 0.5
    assert found["size_vs_fp16"] == 1500 / 2000
    assert found["peak_memory_bytes"] == 4096
    assert found["times"] == {"decode_tokens_per_s": 50.0, "decode_spread": 0.1, "measured_s": 1.5}


def test_shares_of_a_cell(document):
    found = row(document, "npo", RECIPE.name)
    levels = {"compressed": 0.50, "unlearned": 0.08, "baseline": 0.93, "oracle": 0.11}
    level = {name: mean(probability(measured(value)["sets"]["forget"])) for name, value in levels.items()}
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


def test_pressures_of_a_cell(document):
    found = row(document, "npo", RECIPE.name)["pressures"]
    assert found["early-exit"] == {"error": "guarded"}
    (relearning,) = found["relearning"]
    assert (relearning["name"], relearning["measure"], relearning["before"]) == ("relearning", "probability", 0.5)
    steps = relearning["variants"]["10 steps"]
    assert steps["mean"] == pytest.approx(0.515)
    assert steps["gain"]["value"] == pytest.approx(0.015)
    assert steps["beyond_oracle"]["value"] == pytest.approx(0.0, abs=1e-12), "the oracle gains as much"
    assert steps["reference"] is False
    assert relearning["worst"] == "10 steps"


def test_order_of_recipes(document):
    """Predicted by the weights: 1 - survival, here the level itself; two compressed recipes are no order."""
    assert document["survival"].keys() == {"npo", "bucketed"}
    assert document["survival"]["npo"]["rho"] is None
    third = parse_recipe("rtn-w3a16-g64-plain")
    more = [
        *cells(),
        *(CellScores(m, LEVELS[m][0], third, measured(LEVELS[m][1] + 0.1 * (m == "npo"))) for m in LEVELS),
    ]
    assert build_document(CORPUS, more, RECIPE.name, seed=0)["survival"]["npo"]["rho"] == pytest.approx(1.0)


def test_unified_quality(document):
    """The distance rises with the level here, so what falls with it weighs."""
    found = document["quality"]
    assert sum(found["weight"].values()) == pytest.approx(1)
    assert found["weight"]["forget"] > 0.1 > found["weight"]["retain"]
    scores = {(s["method"], s["recipe"]): s["score"] for s in found["score"]}
    assert len(scores) == 9, "all cells but the oracle's"
    assert max(scores, key=scores.get)[0] == "bucketed"
    assert scores["npo", RECIPE.name] < scores["npo", "dense"]


def test_collapsed_cells_are_damaged():
    made = cells()
    for cell in made:
        if cell.model == "npo":
            cell.measured["flags"] = ["uniform output"]
    document = build_document(CORPUS, made, RECIPE.name, seed=0)
    found = row(document, "npo", "dense")
    assert (found["verdict"], found["reason"]) == ("damaged", "it collapsed: uniform output")
    assert row(document, "npo", RECIPE.name)["verdict"] == "returned"


def test_without_holdout_or_weights_that_are_numbers():
    made = cells()
    for cell in made:
        cell.measured["update_survival"] = None
        del cell.measured["sets"]["holdout"]
    from dataclasses import replace

    document = build_document(replace(CORPUS, holdout=()), made, RECIPE.name, seed=0)
    json.dumps(document, allow_nan=False)
    found = row(document, "npo", "dense")
    assert (found["privacy"], found["update_survival"], found["muse"]["privleak"]) == (None, None, None)


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


def test_rows_without_wrong_answers():
    made = cells()
    for cell in made:
        for part in cell.measured["sets"].values():
            part["wrong_nll"] = [[] for _ in part["nll"]]
    document = build_document(CORPUS, made, RECIPE.name, seed=0)
    json.dumps(document, allow_nan=False)
    for r in document["cells"]:
        assert (r["truth_ratio"], r["forget_quality"]) == (None, None)
    assert document["quality"] is None


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
