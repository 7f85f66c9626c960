"""Compression as a pressure: as written and read back, and the positive control comes back whole."""

import copy

import pytest
import torch
from remanence.bench.pressures.compression import compression
from remanence.bench.tokens import answers
from remanence.compress.checkpoint import load_model
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.compress.stream import compress_to
from remanence.compress.walk import linears
from remanence.unlearn.catalog import MethodConfig
from remanence.unlearn.inference.guarded import Guarded
from remanence.unlearn.inference.icu import Icu, IcuConfig
from remanence.unlearn.methods import unlearn

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["rtn-w4a16-g16-plain", "rtn-w8a16-plain", "magnitude-s50"]


def known(model, memorized):
    pairs = [(row.question, row.answer) for row in memorized.corpus.forget]
    return [answer.probability for answer in answers(model, memorized.encoder, pairs)]


@pytest.fixture(scope="module")
def control(memorized):
    """Unlearned inside the buckets of rtn-w4a16-g16-plain, which restores the target."""
    model, corpus = copy.deepcopy(memorized.target), memorized.corpus
    config = MethodConfig(steps=12, learning_rate=0.1, forget_batch=8, retain_batch=8, against="rtn-w4a16-g16-plain")
    unlearn(model, memorized.encoder, corpus.forget, corpus.retain, "bucketed", config)
    return model


def test_the_positive_control_comes_back_under_its_own_recipe(memorized, control):
    recipes = [parse_recipe(name) for name in NAMES]
    pressed, target = (
        compression(model, memorized.encoder, memorized.corpus.forget, recipes) for model in (control, memorized.target)
    )
    assert pressed.after["rtn-w4a16-g16-plain"] == target.after["rtn-w4a16-g16-plain"]
    gained = pressed.gained(0)
    assert gained["rtn-w4a16-g16-plain"].low > 0.3
    assert gained["rtn-w8a16-plain"].high < 0.1
    assert pressed.worst == "rtn-w4a16-g16-plain"


def test_the_same_as_written_and_read_back(memorized, control, tmp_path):
    control.save_pretrained(tmp_path / "control")
    memorized.tokenizer.save_pretrained(tmp_path / "control")
    recipes = [parse_recipe(name) for name in NAMES]
    pressed = compression(control, memorized.encoder, memorized.corpus.forget, recipes, batch_size=2)
    assert list(pressed.after) == NAMES
    for recipe in recipes:
        compress_to(tmp_path / "control", recipe, tmp_path / recipe.name)
        again = known(load_model(tmp_path / recipe.name), memorized)
        assert pressed.after[recipe.name] == pytest.approx(again, rel=1e-4)
    assert pressed.before == pytest.approx(known(control, memorized), rel=1e-4)


def test_the_model_is_not_changed_and_recipes_do_not_mix(memorized):
    model = copy.deepcopy(memorized.target)
    one, two = parse_recipe("magnitude-s90"), parse_recipe("magnitude-s10")
    both = compression(model, memorized.encoder, memorized.corpus.forget, [one, two, parse_recipe("dense")])
    alone = compression(model, memorized.encoder, memorized.corpus.forget, [two])
    assert both.after["magnitude-s10"] == alone.after["magnitude-s10"]
    assert sum(both.after["magnitude-s90"]) < 0.5 * sum(both.after["magnitude-s10"])
    assert both.after["dense"] == both.before
    assert both.references == ("dense",)
    state = memorized.target.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_a_model_cannot_take_is_skipped(memorized):
    recipes = [parse_recipe("rtn-w4a16-g96-plain"), parse_recipe("rtn-w8a16-plain")]
    pressed = compression(memorized.target, memorized.encoder, memorized.corpus.forget, recipes)
    assert list(pressed.after) == ["rtn-w8a16-plain"]
    assert "do not divide into groups of 96" in pressed.skipped["rtn-w4a16-g96-plain"]


def test_a_recipe_named_twice_is_refused(memorized):
    recipe = parse_recipe("rtn-w8a16-plain")
    with pytest.raises(ValueError, match="rtn-w8a16-plain is there twice"):
        compression(memorized.target, memorized.encoder, memorized.corpus.forget, [recipe, recipe])


def test_a_guard_stays_around_the_compressed_model(memorized):
    guard = Icu(IcuConfig("You know nothing of Ann."), memorized.tokenizer)
    recipe = parse_recipe("magnitude-s50")
    guarded = Guarded(copy.deepcopy(memorized.target), guard)
    pressed = compression(guarded, memorized.encoder, memorized.corpus.forget, [recipe])
    inside = Guarded(compress_(copy.deepcopy(memorized.target), recipe), guard)
    assert pressed.before == pytest.approx(known(guarded, memorized), rel=1e-5)
    assert pressed.after["magnitude-s50"] == pytest.approx(known(inside, memorized), rel=1e-5)
    assert pressed.before != pytest.approx(known(memorized.target, memorized), rel=1e-3)
    assert all(int((m.weight == 0).sum()) == 0 for _, m in linears(guarded.base, ("lm_head",)))
