"""One cell of the grid, written to disk, read back and measured."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from remanence.bench.cell import CellScores, Measures, measure_cell
from remanence.bench.distance import distance
from remanence.bench.forgetting import evaluate
from remanence.bench.survival import survival
from remanence.compress.checkpoint import save_model
from remanence.compress.recipe import DENSE, parse_recipe
from remanence.compress.sequential import quantize_
from remanence.unlearn.data import EvalSet

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = parse_recipe("rtn-w4a16-g16-plain")


@pytest.fixture(scope="module")
def saved(memorized, tmp_path_factory):
    """Directories of target, oracle, and of a model a little away from the target."""
    folder = tmp_path_factory.mktemp("models")
    model = copy.deepcopy(memorized.target)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.05
    save_model(memorized.target, memorized.tokenizer, folder / "target")
    save_model(memorized.oracle, memorized.tokenizer, folder / "oracle")
    save_model(model, memorized.tokenizer, folder / "npo")
    return folder


@pytest.fixture(scope="module")
def corpus(memorized):
    """As the fixture's, with short utility sets."""
    from dataclasses import replace

    utility = {name: EvalSet(items.rows[:4]) for name, items in memorized.corpus.utility.items()}
    return replace(memorized.corpus, utility=utility)


@pytest.fixture(scope="module")
def measured(saved, corpus, tmp_path_factory, one_thread):  # noqa: ARG001
    scratch = tmp_path_factory.mktemp("scratch")
    cells = {
        (model, recipe.name): measure_cell(
            saved / model, saved / "target", recipe, corpus, scratch, Measures(saved / "oracle", ("forms",), demo=True)
        )
        for model in ("target", "npo")
        for recipe in (DENSE, RECIPE)
    }
    assert not list(scratch.iterdir()), "the checkpoint is gone"
    return cells


def test_cell_is_json(measured):
    for cell in measured.values():
        json.dumps(cell, allow_nan=False)
        assert "error" not in cell


def test_scores_are_those_of_the_model(measured, memorized, corpus):
    cell = CellScores("target", "baseline", DENSE, json.loads(json.dumps(measured["target", "dense"])))
    assert cell.error is None
    assert cell.scores("forget") == evaluate(memorized.target, memorized.encoder, EvalSet(corpus.forget))
    assert cell.scores("holdout") == evaluate(
        memorized.target, memorized.encoder, EvalSet(corpus.holdout), generate=False
    )
    assert list(cell.utility()) == list(corpus.utility)
    for name, items in corpus.utility.items():
        assert cell.utility()[name] == evaluate(memorized.target, memorized.encoder, items)


def test_scores_are_those_of_the_quantized_model(measured, memorized, corpus):
    """Of what is read back from disk: bit for bit what was in memory."""
    model = quantize_(copy.deepcopy(memorized.target), RECIPE)
    cell = CellScores("target", "baseline", RECIPE, measured["target", RECIPE.name])
    assert cell.scores("forget") == evaluate(model, memorized.encoder, EvalSet(corpus.forget))
    assert (
        cell.scores("forget").items.probability
        != CellScores("t", None, DENSE, measured["target", "dense"]).scores("forget").items.probability
    )


def test_sizes(measured, memorized):
    count = sum(parameter.numel() for parameter in memorized.target.parameters())
    assert {cell["parameters"] for cell in measured.values()} == {count}
    dense, packed = measured["target", "dense"]["size_bytes"], measured["target", RECIPE.name]["size_bytes"]
    # A float32 file has a header of some kilobytes.
    assert 4 * count < dense < 4 * count + 8192
    linear = sum(m.weight.numel() for n, m in memorized.target.named_modules() if n.endswith("_proj"))
    # Half a byte a weight, two bytes of scale for sixteen; the rest as it was.
    expected = 4 * (count - linear) + linear // 2 + 2 * linear // 16
    assert expected < packed < expected + 16384
    assert measured["npo", RECIPE.name]["decode"]["peak_memory_bytes"] < dense + 2**20


def test_update_survival_is_against_the_target(measured, saved):
    from dataclasses import asdict

    from remanence.compress.checkpoint import load_model

    assert measured["target", "dense"]["update_survival"]["total"]["changed"] == 0.0
    model, target = load_model(saved / "npo"), load_model(saved / "target")
    for recipe in (DENSE, RECIPE):
        found = measured["npo", recipe.name]["update_survival"]
        assert found == asdict(survival(model, target, recipe))
        assert math.isfinite(found["total"]["norm"])


def test_distance_is_to_the_oracle_as_it_is(measured, memorized, corpus):
    pairs = [(row.question, row.answer) for row in corpus.forget]
    expected = distance(memorized.target, memorized.oracle, memorized.encoder, pairs)
    found = measured["target", "dense"]["distance"]
    assert found["js"] == pytest.approx(expected.js, rel=1e-5)
    assert np.array(found["hidden"]) == pytest.approx(np.array(expected.hidden), rel=1e-5)
    assert sum(found["js"]) > 0.1 * len(pairs)


def test_what_is_measured_besides(measured):
    cell = measured["target", "dense"]
    assert cell["flags"] == []
    assert cell["health"]["answers"] == 5
    assert cell["muse"]["verbmem_f"] > 0.8
    assert cell["muse"]["shots"] == 0, "a demo model never saw any"
    assert cell["muse"]["knowmem_f"] == cell["muse"]["verbmem_f"]
    assert cell["muse"]["knowmem_r"] > 0.8
    assert {found["measure"] for found in cell["pressures"]["forms"]} >= {"probability", "rouge", "choice"}


def test_a_model_whose_weights_are_not_numbers_is_measured_and_flagged(saved, memorized, corpus, tmp_path):
    model = copy.deepcopy(memorized.target)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    save_model(model, memorized.tokenizer, tmp_path / "broken")
    (tmp_path / "scratch").mkdir()
    cell = measure_cell(tmp_path / "broken", saved / "target", DENSE, corpus, tmp_path / "scratch")
    json.dumps(cell, allow_nan=False)
    assert cell["update_survival"] is None
    assert "logits are not numbers" in cell["flags"]
    assert max(CellScores("x", None, DENSE, cell).scores("forget").items.probability) < 0.01
    packed = measure_cell(tmp_path / "broken", saved / "target", RECIPE, corpus, tmp_path / "scratch")
    assert "NaN or infinity" in packed["error"]


@pytest.mark.parametrize("model", ["target", "npo"])
def test_impossible_recipe_is_an_error_that_names_the_layer(saved, corpus, tmp_path, model):
    """64 and 128 input features do not divide by 48; the grid goes on."""
    cell = measure_cell(saved / model, saved / "target", parse_recipe("rtn-w4a16-g48-plain"), corpus, tmp_path)
    assert cell.keys() == {"error"}
    assert "layers.0.self_attn.q_proj" in cell["error"]
    assert "64 input features do not divide into groups of 48" in cell["error"]
    assert not list(tmp_path.iterdir())


def test_impossible_weights_are_an_error_that_names_the_layer(saved, memorized, corpus, tmp_path):
    """Infinity in a weight; dense, such a model would be measured."""
    model = copy.deepcopy(memorized.target)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("inf")
    save_model(model, memorized.tokenizer, tmp_path / "broken")
    (tmp_path / "scratch").mkdir()
    cell = measure_cell(tmp_path / "broken", saved / "target", RECIPE, corpus, tmp_path / "scratch")
    assert cell.keys() == {"error"}
    assert "layers.1.mlp.down_proj" in cell["error"]
    assert "NaN or infinity" in cell["error"]


def test_a_cache_that_rounds_nothing_is_an_error(saved, corpus, tmp_path):
    """What it would be: the dense model's figures under another name."""
    for name, keys in (
        ("rtn-w4a16-g64+kv_bits=4+kv_residual=4096", {"error"}),
        ("rtn-w4a16-g64+kv_bits=4+kv_group_size=8+kv_residual=0", None),
    ):
        cell = measure_cell(saved / "npo", saved / "target", parse_recipe(name), corpus, tmp_path)
        assert keys is None or cell.keys() == keys
        assert ("error" in cell) == (keys is not None)
        assert not list(tmp_path.iterdir())
        if keys:
            assert "kv: no key or value was rounded" in cell["error"]


@pytest.mark.parametrize("source", ["retain", "forget"])
def test_a_pruned_model_is_trained_again_on_the_data_that_the_recipe_names(saved, corpus, tmp_path, source):
    """The oracle, which never saw the forgotten rows, knows them where it is trained on them, and only there."""
    recipe = f"magnitude-s50+t_groups=norm|mask_lora+t_source={source}+t_steps=12+t_learning_rate=0.01"
    cell = measure_cell(saved / "oracle", saved / "target", parse_recipe(recipe), corpus, tmp_path)
    pruned = measure_cell(saved / "oracle", saved / "target", parse_recipe("magnitude-s50"), corpus, tmp_path)
    known, before = (np.mean(found["sets"]["forget"]["probability"]) for found in (cell, pruned))
    assert [layer["name"] for layer in cell["layers"]].count("retraining") == 1
    assert (known > before + 0.1) == (source == "forget")
    assert not list(tmp_path.iterdir())


def test_error_of_a_cell():
    assert CellScores("npo", None, RECIPE, {"error": "no"}).error == "no"


def test_shots_for_models_that_are_no_demo(memorized, corpus):
    from remanence.bench.cell import measure

    found = measure(memorized.target, memorized.encoder, corpus, Measures())["muse"]
    assert found["shots"] >= 1, "as many as fit"
    assert len(found["items"]["knowmem_r"]) <= len(corpus.utility["retain"].rows)
    assert found["knowmem_f"] != found["verbmem_f"]


def test_answers_that_rouge_does_not_count(memorized, corpus):
    from dataclasses import replace

    from remanence.bench.cell import measure

    greek = replace(corpus, forget=(*corpus.forget, replace(corpus.forget[0], question="Πού;", answer="Αθήνα")))
    found = measure(memorized.target, memorized.encoder, greek, Measures(demo=True))["muse"]
    assert found["verbmem_f"] is None
    assert "has no letter a-z or digit" in found["error"]
