"""Relearning: as plain AdamW written out, looked at on the way, and telling what was hidden from what is new."""

import copy

import numpy as np
import pytest
import torch
from remanence.bench.pressures.pressed import Pressed
from remanence.bench.pressures.relearn import DEMO, Relearning, relearn, relearn_advantage, split
from remanence.bench.statistics import bootstrap_mean
from remanence.bench.tokens import answers
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import quantize_
from remanence.unlearn.catalog import MethodConfig
from remanence.unlearn.data import QA
from remanence.unlearn.encode import epochs
from remanence.unlearn.inference.guarded import Guarded
from remanence.unlearn.inference.icu import Icu, IcuConfig
from remanence.unlearn.methods import unlearn

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = Relearning(steps=(4, 12), learning_rate=1e-3)
TEXT = (QA("", "The river rises near the old bridge."), QA("", "Two boats go down to the sea before winter."))


def known(model, encoder, rows):
    return [answer.probability for answer in answers(model, encoder, [(row.question, row.answer) for row in rows])]


@pytest.fixture(scope="module")
def unlearned(memorized):
    model, corpus = copy.deepcopy(memorized.target), memorized.corpus
    config = MethodConfig(steps=12, learning_rate=1e-3, forget_batch=8, retain_batch=8, gamma=0.2)
    unlearn(model, memorized.encoder, corpus.forget, corpus.retain, "graddiff", config)
    return model


@pytest.fixture(scope="module")
def both(memorized, unlearned):
    """The same attack on the unlearned model and on the oracle."""
    others = {"retain": memorized.corpus.retain, "text": TEXT}
    return tuple(
        relearn(model, memorized.encoder, memorized.corpus.forget, others, FAST)
        for model in (unlearned, memorized.oracle)
    )


def test_what_was_hidden_comes_back_from_the_retain_set_alone(both):
    hidden, never = both
    # Four rows are left to look at: their intervals are wide.
    assert hidden.gained(0)["retain: 12 steps"].value > 0.1
    assert relearn_advantage(hidden, never)["retain: 12 steps"].value > 0.1
    assert relearn_advantage(hidden, never)["forget 25%: 12 steps"].value > 0.05
    assert never.gained(0)["retain: 12 steps"].value < 0.05
    assert hidden.gained(0)["text: 12 steps"].value < hidden.gained(0)["retain: 12 steps"].value


def test_the_rows_shown_are_learned_and_kept_apart(both, memorized, unlearned):
    held_out, shown = split(memorized.corpus.forget, 0.25, 0)
    for attacked, model in zip(both, (unlearned, memorized.oracle), strict=True):
        assert attacked.before == pytest.approx(known(model, memorized.encoder, held_out), rel=1e-4)
        assert attacked.shown.before == pytest.approx(known(model, memorized.encoder, shown), rel=1e-4)
        assert min(attacked.shown.after["forget 25%: 12 steps"]) > 0.5
        assert max(attacked.after["forget 25%: 12 steps"]) < min(attacked.shown.after["forget 25%: 12 steps"])
    names = [f"{source}: {steps} steps" for source in ("forget 25%", "retain", "text") for steps in (4, 12)]
    assert list(both[0].after) == list(both[0].shown.after) == names
    assert both[0].skipped == {}


def by_hand(model, encoder, rows, steps, rate, size, seed):
    """AdamW (Loshchilov & Hutter 2019) at decay 0, in float64 and written out; rows as the seed shuffles them."""
    model = copy.deepcopy(model).double()
    order = epochs(len(rows), size, torch.Generator().manual_seed(seed * 1009))
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step in range(1, steps + 1):
        batch = encoder.batch([(rows[i].question, rows[i].answer) for i in next(order)])
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        wanted = batch.labels[:, 1:]
        log_p = logits.log_softmax(2)[wanted != -100].gather(1, wanted[wanted != -100][:, None])
        gradients = torch.autograd.grad(-log_p.mean(), parameters)
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        scale = min(1.0, float(1 / (norm + 1e-6)))
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * scale * g)
                v.mul_(0.95).add_(0.05 * (scale * g).square())
                p -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    return model.float()


def test_the_steps_are_those_of_plain_adamw(memorized, unlearned):
    settings = Relearning(share=0.4, steps=(1, 3), learning_rate=1e-3, batch_size=3)
    retain = memorized.corpus.retain[:7]
    attacked = relearn(unlearned, memorized.encoder, memorized.corpus.forget, {"retain": retain}, settings, seed=5)
    held_out, shown = split(memorized.corpus.forget, 0.4, 5)
    for name, rows in (("forget 40%", shown), ("retain", retain)):
        for steps in (1, 3):
            model = by_hand(unlearned, memorized.encoder, rows, steps, 1e-3, 3, 5)
            # Adam's first steps are signs: a gradient of float32's rounding error moves a weight as far as any other.
            for part, found in ((held_out, attacked), (shown, attacked.shown)):
                expected = known(model, memorized.encoder, part)
                assert found.after[f"{name}: {steps} steps"] == pytest.approx(expected, rel=5e-3)
                assert np.abs(np.log(expected) - np.log(found.before)).max() > 0.02


def test_looking_on_the_way_changes_nothing_and_the_seed_decides(memorized, both, unlearned):
    corpus, before = memorized.corpus, copy.deepcopy(unlearned.state_dict())
    settings = Relearning(steps=(12,), learning_rate=1e-3)
    alone = relearn(unlearned, memorized.encoder, corpus.forget, {"retain": corpus.retain}, settings)
    assert alone.after["retain: 12 steps"] == both[0].after["retain: 12 steps"]
    assert alone.after["forget 25%: 12 steps"] == both[0].after["forget 25%: 12 steps"]
    other = relearn(unlearned, memorized.encoder, corpus.forget, {"retain": corpus.retain}, FAST, seed=1)
    assert other.after["retain: 12 steps"] != both[0].after["retain: 12 steps"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in unlearned.state_dict().items())
    assert not unlearned.training


def test_quantized_models_are_attacked_dequantized(memorized, unlearned, both):
    model = quantize_(copy.deepcopy(unlearned), parse_recipe("rtn-w8a16-plain"))
    packed = copy.deepcopy(model.state_dict())
    attacked = relearn(model, memorized.encoder, memorized.corpus.forget, {"retain": memorized.corpus.retain}, FAST)
    held_out, _ = split(memorized.corpus.forget, 0.25, 0)
    assert attacked.before == pytest.approx(known(model, memorized.encoder, held_out), rel=1e-3)
    # Eight bits change little: the attack goes as on the model itself.
    assert attacked.after["retain: 12 steps"] == pytest.approx(both[0].after["retain: 12 steps"], abs=0.05)
    assert all(torch.equal(tensor, packed[name]) for name, tensor in model.state_dict().items())


def test_a_16_bit_model_is_attacked_in_float32(memorized, unlearned):
    """At 1e-6 nearly every update is below half a bfloat16 step."""
    model, rows = copy.deepcopy(unlearned).bfloat16(), memorized.corpus.forget
    settings = Relearning(steps=(5,), learning_rate=1e-6)
    attacked, wide = (relearn(m, memorized.encoder, rows, {}, settings) for m in (model, copy.deepcopy(model).float()))
    assert (attacked.before, attacked.after) == (wide.before, wide.after)
    assert attacked.after["forget 25%: 5 steps"] != attacked.before
    assert model.dtype == torch.bfloat16


def test_training_has_dropout_and_looking_has_none(memorized, untrained):
    """GPT-2 has dropout 0.1: a batch of one would see other masks than a batch of all."""
    model, corpus = untrained("gpt2", vocabulary=512), memorized.corpus
    model.train()
    often, once = (
        relearn(model, memorized.encoder, corpus.forget, {}, Relearning(steps=steps, learning_rate=1e-3), 0, size)
        for steps, size in (((1, 2, 3), 1), ((3,), 64))
    )
    assert once.before == pytest.approx(often.before, rel=1e-3)
    assert once.after["forget 25%: 3 steps"] == pytest.approx(often.after["forget 25%: 3 steps"], rel=1e-3)
    assert once.after["forget 25%: 3 steps"] != pytest.approx(once.before, rel=1e-2)


@pytest.mark.parametrize(
    ("rows", "share", "count"), [(1, 0.5, 0), (2, 0.1, 1), (2, 0.9, 1), (5, 0.25, 1), (7, 0.5, 4), (40, 0.25, 10)]
)
def test_split(rows, share, count):
    forget = tuple(QA(f"q{i}", f"a{i}") for i in range(rows))
    held_out, shown = split(forget, share, seed=3)
    assert len(shown) == count
    assert sorted([*held_out, *shown], key=forget.index) == list(forget)
    assert list(held_out) == sorted(held_out, key=forget.index)
    assert list(shown) == sorted(shown, key=forget.index)
    assert split(forget, share, seed=3) == (held_out, shown)
    if rows == 40:
        assert split(forget, share, seed=4) != (held_out, shown)


def test_a_lone_row_is_never_shown(memorized, unlearned):
    settings = Relearning(steps=(2,), learning_rate=1e-3)
    row, retain = memorized.corpus.forget[:1], memorized.corpus.retain
    attacked = relearn(unlearned, memorized.encoder, row, {"retain": retain, "nothing": ()}, settings)
    assert attacked.shown is None
    assert list(attacked.after) == ["retain: 2 steps"]
    assert attacked.skipped == dict.fromkeys(["forget 25%: 2 steps", "nothing: 2 steps"], "no rows to learn from")
    assert len(attacked.before) == 1


def test_a_broken_model_is_skipped_with_the_reason(memorized):
    model = copy.deepcopy(memorized.target)
    model.lm_head.weight.data.fill_(torch.nan)
    attacked = relearn(model, memorized.encoder, memorized.corpus.forget, {"retain": memorized.corpus.retain}, FAST)
    assert attacked.after == {}
    assert set(attacked.skipped) == {f"{s}: {n} steps" for s in ("forget 25%", "retain") for n in (4, 12)}
    assert all("loss is nan at step 1 of 12" in reason for reason in attacked.skipped.values())


def test_what_is_not_to_be_learned_from_is_refused(memorized):
    forget, encoder = memorized.corpus.forget, memorized.encoder
    with pytest.raises(ValueError, match=r"others: mixed shares 1 row\(s\) with the forget set, first 'W"):
        relearn(memorized.target, encoder, forget, {"mixed": (*memorized.corpus.retain[:3], forget[1])}, FAST)
    with pytest.raises(ValueError, match="forget: no rows"):
        relearn(memorized.target, encoder, (), {}, FAST)
    with pytest.raises(ValueError, match="'forget 25%' is the name of the part"):
        relearn(memorized.target, encoder, forget, {"forget 25%": TEXT}, FAST)
    guard = Icu(IcuConfig("You know nothing of Ann."), memorized.tokenizer)
    with pytest.raises(ValueError, match="guarded at inference time"):
        relearn(Guarded(copy.deepcopy(memorized.target), guard), encoder, forget, {}, FAST)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("share", 0.0),
        ("share", 1.0),
        ("share", float("nan")),
        ("steps", ()),
        ("steps", (0, 5)),
        ("steps", (10, 5)),
        ("steps", (5, 5)),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("batch_size", 0),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}: "):
        Relearning(**{field: value})


def test_defaults_are_those_of_the_literature():
    assert Relearning() == Relearning(share=0.25, steps=(10, 50), learning_rate=1e-5, batch_size=4)
    assert DEMO.learning_rate > Relearning().learning_rate


def test_advantage_is_the_paired_difference_of_gains():
    rng = np.random.default_rng(0)
    u, o = rng.random((3, 9)), rng.random((3, 9))
    mine = Pressed("relearning", "probability", list(u[0]), {"a": list(u[1]), "b": list(u[2])})
    never = Pressed("relearning", "probability", list(o[0]), {"a": list(o[1]), "c": list(o[2])})
    found = relearn_advantage(mine, never, seed=7)
    assert found == {"a": bootstrap_mean((u[1] - u[0] - (o[1] - o[0])).tolist(), 7)}
    assert relearn_advantage(mine, mine)["b"].value == 0
    with pytest.raises(ValueError, match="9 and 8 items"):
        relearn_advantage(mine, Pressed("relearning", "probability", [0.1] * 8, {"a": [0.1] * 8}))
