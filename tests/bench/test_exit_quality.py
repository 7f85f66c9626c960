"""Quality against depth: readings by hand, curves compared at equal depth where the answer is known, and the whole of
it on a model that is trained in seconds."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from remanence.bench import exit_quality
from remanence.bench.exit_quality import CONTEXT, WINDOW, Curve, Judge, Read, against, run_quality, series, subject
from remanence.bench.texts import texts
from remanence.compress.early_exit.agent import AgentTraining
from remanence.compress.early_exit.anatomy import anatomy
from remanence.compress.early_exit.policy import Fixed, Full
from remanence.unlearn.demo import DemoConfig, byte_bpe, demo_model

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = DemoConfig(vocab_size=400, hidden_size=32, intermediate_size=48, layers=4, heads=2, kv_heads=1, max_length=80)


@pytest.fixture(scope="module")
def judged():
    text = texts(None)[1][:1500]
    tokenizer = byte_bpe(text.splitlines(), 400)
    return demo_model(SHAPE, tokenizer, 0).eval(), Judge(tokenizer, text)


def test_a_reading_is_what_a_shorter_model_says(judged):
    """The first two layers see the same states whatever happens above them."""
    model, judge = judged
    whole = judge.likeliest(model)
    logits = model(judge.ids).logits
    assert torch.equal(whole, logits[:, CONTEXT:-1].argmax(-1))
    full = judge.read(model, Full(), whole)
    assert (full.depth == 4).all()
    assert (full.agreement == 1).all()
    log_p = logits.detach().double().log_softmax(-1)
    at = range(CONTEXT, WINDOW - 1)
    wanted = [-np.mean([float(log_p[n, t, ids[t + 1]]) for t in at]) for n, ids in enumerate(judge.ids)]
    assert full.nll == pytest.approx(wanted, abs=1e-5)

    fixed = judge.read(model, Fixed(exits=(2,)), whole)
    assert (fixed.depth == 2).all()
    assert full.effective == pytest.approx(4)
    assert 2 < fixed.effective < 3  # keys and values of two layers more
    states = model(judge.ids, output_hidden_states=True).hidden_states[2]
    early = anatomy(model).logits(states)[:, CONTEXT:-1].argmax(-1)
    assert fixed.agreement == pytest.approx((early == whole).double().mean(1).numpy())
    assert 0 < fixed.agreement.mean() < 1


def curve(depths, agreements, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    reads = [
        Read(Full(), float(d), np.full(60, float(d)), a + noise * rng.normal(size=60), np.zeros(60))
        for d, a in zip(depths, agreements)
    ]
    return Curve(tuple(reads))


def test_curves_are_compared_at_equal_depth():
    ours, theirs = curve([2, 6, 10], [0.5, 0.9, 1.0]), curve([4, 8, 10], [0.6, 0.8, 1.0])
    found = against("agent", ours, theirs, 0)
    assert (found["from_depth"], found["to_depth"]) == (4, 10)
    # Ours less theirs at depths 4, 6, 8, 10: .7 - .6, .9 - .7, .95 - .8, 1 - 1; straight between.
    grid = np.linspace(4, 10, 9)
    wanted = np.mean([np.interp(d, [4, 6, 8, 10], [0.1, 0.2, 0.15, 0]) for d in grid])
    assert found["difference"] == pytest.approx(wanted)
    assert found["low"] == pytest.approx(wanted)
    assert against("agent", theirs, theirs, 0)["difference"] == 0


def test_the_interval_of_a_comparison_is_of_pairs():
    """Texts that are hard for both widen nothing; a difference that is noise includes 0, one that is not does not."""
    hard = np.random.default_rng(3).normal(size=60)

    def shifted(one, by):
        return Curve(tuple(replace(read, agreement=read.agreement + by) for read in one.reads))

    one = shifted(curve([2, 6, 10], [0.5, 0.8, 1.0], 0.02, 1), hard)
    better = shifted(curve([2, 6, 10], [0.53, 0.83, 1.0], 0.02, 2), hard)
    found = against("agent", better, one, 0)
    assert 0 < found["low"] < found["difference"] < found["high"] < 0.05
    same = against("agent", shifted(curve([2, 6, 10], [0.5, 0.8, 1.0], 0.02, 5), hard), one, 0)
    assert same["low"] < 0 < same["high"]


def test_curves_that_share_no_depth_are_not_compared():
    found = against("agent", curve([2, 3], [0.1, 0.2]), curve([3, 5], [0.1, 0.2]), 0)
    assert found["difference"] is None


@pytest.fixture(scope="module")
def tiny():
    tuning = replace(exit_quality.TUNING, exits=(1, 2, 3), steps=25, length=64, learning_rate=5e-3)
    training = AgentTraining(
        steps=1024, rollout=512, batch_size=128, learning_rate=5e-3, environments=8, standardised=True
    )
    return run_quality(subject(0, None, SHAPE, 3, tuning, (24_000, 9_000, 5_000, 24_000)), 0, {"learner": training})


@pytest.mark.slow
def test_the_whole_table(tiny):
    rows, checks = tiny
    kinds = [key for key, _ in itertools.groupby(next(iter(row)) for row in rows)]
    assert kinds == ["model", "exit", "policy", "compared", "calibrated"]
    names = list(series(rows))
    assert names == ["fixed", "schedule", "saturation", "confidence", "probe", "learner"]
    for points in series(rows).values():
        assert [depth for depth, *_ in points] == sorted(depth for depth, *_ in points)
        assert points[-1] == (4.0, 1.0, 1.0, 1.0)  # every curve comes to the whole model
        assert all(1 <= depth <= 4 and low <= agreement <= high for depth, agreement, low, high in points)
    assert len(series(rows)["probe"]) > 3
    assert {row["compared"] for row in rows if "compared" in row} == set(names) - {"probe"}
    by_name = {check["what"]: check for check in checks}
    assert by_name["agreement of a policy that never leaves"]["value"] == 1.0
    assert by_name["nats per token at the first exit, below those before tuning"]["ok"]


@pytest.mark.slow
def test_tuning_is_told_beside_its_control(tiny):
    models = {row["model"]: row for row in tiny[0] if "model" in row}
    before, control, tuned = (models[name] for name in ("as trained", "trained on (control)", "tuned for exits"))
    assert before["more"] == 0
    assert tuned["nll_1"] < control["nll_1"] - 0.3
    assert tuned["nll_1"] < before["nll_1"]
    assert tuned["low"] <= tuned["more"] <= tuned["high"]
    # The tables' two ways to read the whole model agree on which is better, up to what prompts add.
    assert np.sign(tuned["nll_4"] - before["nll_4"]) == np.sign(tuned["more"])


@pytest.mark.slow
def test_what_calibration_promises_holds_on_other_texts(tiny):
    rows, checks = tiny
    found = [row for row in rows if "calibrated" in row]
    names = ["saturation", "confidence", "probe", "learner"]
    assert [(row["calibrated"], row["delta"]) for row in found] == [(n, d) for n in names for d in (0.05, 0.1)]
    for row in found:
        assert row["texts"] >= 150
        assert 0 <= row["low"] <= row["loss_judged"] <= row["high"] <= 1
        assert row["loss_calibration"] < row["delta"]
        if row["threshold"] is None:  # nobody leaves
            assert (row["loss_judged"], row["mean_depth"], row["effective"]) == (0, 4, pytest.approx(4))
    assert any(row["mean_depth"] < 4 for row in found)
    for careful, bold in zip(found[::2], found[1::2]):
        assert bold["mean_depth"] <= careful["mean_depth"]
    told = [check for check in checks if "calibrated" in check["what"]]
    assert [(c["limit"], c["value"], c["ok"]) for c in told] == [(r["delta"], r["low"], True) for r in found]


def test_a_broken_promise_is_told():
    class Made:
        _fits, agents, states, probe = (), {}, SimpleNamespace(exits=(1,)), Fixed(exits=(1,))

    class One:
        def likeliest(self, model):
            return model

        def read(self, model, policy, whole):  # noqa: ARG002
            return Read(policy, 1.0, *np.ones((3, 2)))

    models = [{"model": "as trained", "nll_1": 2.0}, {"model": "tuned for exits", "nll_1": 1.0}]
    lows = [{"calibrated": "probe", "delta": 0.1, "low": low} for low in (0.0, 0.1, 0.11)]
    found = exit_quality.checks([*models, *lows], Made(), None, One())
    assert [check["ok"] for check in found if "calibrated" in check["what"]] == [True, True, False]


@pytest.mark.parametrize("characters", [(24_000, 9_000, 5_000, 24_000), (120_000, 60_000, 24_000, 40_000)])
def test_parts_of_the_text_have_nothing_in_common(characters):
    parts = exit_quality._texts(None, characters)
    assert tuple(map(len, parts)) == characters
    lines = [set(part.splitlines()[1:-1]) for part in parts]  # the border may cut one
    assert not any(a & b for a, b in itertools.combinations(lines, 2))
    assert "capital of" not in parts[3]  # the atlas: no such text is judged


def test_too_little_text_to_judge_on():
    tokenizer = byte_bpe(["some words"], 300)
    with pytest.raises(ValueError, match="text: 0 windows of 64 tokens to judge on"):
        Judge(tokenizer, "some words")
