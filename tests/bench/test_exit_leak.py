"""Leak curves: one pass beside a pass per layer, and shares against float64 by hand."""

import numpy as np
import pytest
import torch
from remanence.bench.exit_leak import Curve, answers_by_depth, curve, leak_curve
from remanence.bench.pressures.early_exit import early_exit
from remanence.bench.statistics import holm, resamples, share_difference_draws
from remanence.bench.verdict import MARGIN
from transformers import GPT2Config, GPT2LMHeadModel

pytestmark = pytest.mark.usefixtures("one_thread")

ITEMS = 40


def made(levels, seed=0, spread=0.05):
    """A curve whose layers have about these means."""
    rng = np.random.default_rng(seed)
    rows = [np.clip(level + spread * rng.standard_normal(ITEMS), 0, 1).tolist() for level in levels]
    return Curve(rows, [[value > 0.5 for value in row] for row in rows])


TARGET, ORACLE = made([0.06, 0.4, 0.7, 0.9], 1), made([0.05, 0.06, 0.07, 0.06], 2)


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_one_pass_sees_what_a_pass_for_each_layer_sees(memorized, untrained, arch):
    model, rows = untrained(arch, vocabulary=512), memorized.corpus.forget
    found = curve(model, memorized.encoder, rows, batch_size=2)
    pressed = early_exit(model, memorized.encoder, rows)
    assert len(found.probability) == len(pressed.after) == 2
    for ours, theirs in zip(found.probability, pressed.after.values(), strict=True):
        assert np.log(ours) == pytest.approx(np.log(theirs), abs=1e-4)
    assert found.probability[0] != pytest.approx(found.probability[1], rel=0.01)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_exactness_is_greedy_and_of_every_token(memorized):
    found = curve(memorized.target, memorized.encoder, memorized.corpus.forget)
    assert all(found.exact[-1])
    pairs = [(row.question, row.answer) for row in memorized.corpus.forget]
    by_hand = [
        [bool(answer.greedy.all()) for answer in depth]
        for depth in answers_by_depth(memorized.target, memorized.encoder, pairs)
    ]
    assert found.exact == by_hand
    assert not any(curve(memorized.oracle, memorized.encoder, memorized.corpus.forget).exact[-1])


def test_shares_are_those_of_the_means():
    unlearned = made([0.05, 0.3, 0.5, 0.1], 3)
    found = leak_curve(TARGET, unlearned, ORACLE, seed=4)
    for i, layer in enumerate(found.layers):
        part, low, whole = (np.mean(c.probability[i]) for c in (unlearned, ORACLE, TARGET))
        assert layer.unlearned.value == pytest.approx(part)
        assert layer.unlearned.low <= layer.unlearned.value <= layer.unlearned.high
        if i:
            assert layer.share.value == pytest.approx((part - low) / (whole - low), rel=1e-12)
            assert layer.share.low <= layer.share.value <= layer.share.high
        assert layer.exact["target"] == np.mean(TARGET.exact[i])
    assert found.layers[0].share is None, "target and oracle say the same there"
    assert found.layers[0].excess is None
    assert found.layers[-1].excess is None
    shares = [layer.share.value for layer in found.layers[1:]]
    assert [layer.excess.value for layer in found.layers[1:3]] == pytest.approx([s - shares[-1] for s in shares[:2]])
    assert found.worst == 2 + int(np.argmax(shares))
    assert found.leaking == [2, 3]
    assert "shown to leak over 10% more than the last: layers 2, 3" in found.note


def test_excess_is_a_paired_bootstrap_with_holm():
    unlearned = made([0.05, 0.14, 0.18, 0.1], 5, spread=0.1)
    found = leak_curve(TARGET, unlearned, ORACLE, seed=6)
    index = resamples(ITEMS, 6)
    shares = []
    for i in range(4):
        p, f, w = (np.asarray(c.probability[i], dtype=np.float64)[index].mean(1) for c in (unlearned, ORACLE, TARGET))
        shares.append((p - f) / (w - f))
    raw = []
    for i in (1, 2):
        parts = (unlearned.probability[i], ORACLE.probability[i], TARGET.probability[i])
        last = (unlearned.probability[-1], ORACLE.probability[-1], TARGET.probability[-1])
        draws = share_difference_draws(parts, last, 6)
        assert draws.draws == pytest.approx(shares[i] - shares[3], abs=1e-12)
        raw.append(draws.p_below(MARGIN))
    assert [found.layers[i].p_excess for i in (1, 2)] == pytest.approx(holm(raw))
    assert max(raw) > 0.03, "a case without doubt says nothing of the correction"
    assert holm(raw) != raw


def test_a_model_that_forgot_alike_everywhere_leaks_nowhere():
    found = leak_curve(TARGET, made([0.05, 0.06, 0.07, 0.06], 7), ORACLE, seed=0)
    assert found.leaking == []
    assert "no layer is shown to leak" in found.note


def test_what_leaks_less_than_the_last_layer_is_no_leak():
    found = leak_curve(TARGET, made([0.05, 0.06, 0.3, 0.9], 8), ORACLE, seed=0)
    assert found.leaking == []
    assert found.worst == 4


def test_without_an_oracle_shares_are_of_the_whole():
    unlearned = made([0.05, 0.2, 0.2, 0.1], 9)
    found = leak_curve(TARGET, unlearned, None, seed=0)
    assert found.layers[2].oracle is None
    share = np.mean(unlearned.probability[2]) / np.mean(TARGET.probability[2])
    assert found.layers[2].share.value == pytest.approx(share)
    assert set(found.layers[0].exact) == {"target", "unlearned"}


def test_where_nothing_was_taught_nothing_is_defined():
    found = leak_curve(ORACLE, TARGET, ORACLE, seed=0)
    assert found.worst is None
    assert all(layer.share is None and layer.p_excess is None for layer in found.layers)
    assert found.note == "no layer tells the target from the oracle, so that no leak is defined"


def test_a_last_layer_without_a_share_is_said():
    target = made([0.06, 0.4, 0.7, 0.07], 1)
    found = leak_curve(target, made([0.05, 0.3, 0.5, 0.1], 3), ORACLE, seed=0)
    assert found.layers[1].share is not None
    assert found.layers[1].excess is None
    assert "nothing can be compared" in found.note


def test_what_is_kept_is_over_the_last_layers():
    found = leak_curve(TARGET, TARGET, ORACLE, seed=0, kept=[0.1, 0.4, 0.6, 0.8])
    assert [layer.kept for layer in found.layers] == pytest.approx([0.125, 0.5, 0.75, 1])


def test_curves_of_other_models_are_refused():
    with pytest.raises(ValueError, match="oracle: 3 layers beside 4"):
        leak_curve(TARGET, TARGET, made([0.1, 0.1, 0.1]), seed=0)
    short = Curve([row[:-1] for row in ORACLE.probability], ORACLE.exact)
    with pytest.raises(ValueError, match="oracle: curves of 39 to 40 items"):
        leak_curve(TARGET, TARGET, short, seed=0)


def test_an_unknown_architecture_is_refused(memorized):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(ValueError, match="cannot leave early"):
        curve(model, memorized.encoder, memorized.corpus.forget)


def test_unlike_lists_have_no_difference():
    with pytest.raises(ValueError, match="equal ones are needed"):
        share_difference_draws(([1.0], [0.0], [1.0]), ([1.0, 1.0], [0.0, 0.0], [1.0, 1.0]), 0)


def test_resamples_without_a_gap_are_far_on_either_side():
    """Two items, one without a gap: a quarter of the resamples draws it twice."""
    first = ([0.5, 0.5], [0.0, 0.0], [1.0, 0.0])
    second = ([0.5, 0.5], [0.0, 0.0], [1.0, 1.0])
    draws = share_difference_draws(first, second, 0).draws
    far = ~np.isfinite(draws)
    assert 0.2 < far.mean() < 0.3
    assert (draws == np.inf).any()
    assert (draws == -np.inf).any()
    assert draws[~far] == pytest.approx(np.where(draws[~far] > 0.25, 0.5, 0.0))
