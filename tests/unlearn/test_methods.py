"""Unlearning on a model that does know: the forget set goes, the retain set stays, the seed decides every bit."""

import copy
import json
import math
import re

import pytest
import torch
from remanence.unlearn.catalog import MethodConfig
from remanence.unlearn.feed import Feed
from remanence.unlearn.keeper import Saving
from remanence.unlearn.likelihood import answer_likelihood, mean_probability
from remanence.unlearn.methods import Setup, unlearn
from remanence.unlearn.reference import reference_nll
from remanence.unlearn.train import Diverged

pytestmark = pytest.mark.usefixtures("one_thread")

# Chosen for the six people of the fixture: a second each.
CONFIGS = {
    "npo": MethodConfig(steps=20, learning_rate=1e-3, warmup=5, forget_batch=8, retain_batch=24, gamma=0.15),
    "graddiff": MethodConfig(steps=20, learning_rate=1e-3, warmup=5, forget_batch=8, retain_batch=24, gamma=0.1),
    "bucketed": MethodConfig(
        steps=20,
        learning_rate=0.04,
        warmup=5,
        decay="constant",
        forget_batch=8,
        retain_batch=24,
        alpha=2.0,
        against="rtn-w4a16-g16-plain",
    ),
}


def direct_nll(model, encoder, question, answer):
    """(summed NLL, tokens) of one answer, alone and in float64."""
    ids, labels = encoder.pair(question, answer)
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    picked = [log_p[t - 1, label].item() for t, label in enumerate(labels) if label >= 0]
    return -math.fsum(picked), len(picked)


def knows(model, memorized, rows):
    return mean_probability(model, memorized.encoder, [(row.question, row.answer) for row in rows])


def run(memorized, method, config, seed=0, **more):
    corpus = memorized.corpus
    return unlearn(
        copy.deepcopy(memorized.target), memorized.encoder, corpus.forget, corpus.retain, method, config, seed, **more
    )


def first_loss(memorized, method, config, directory):
    """What the log says of the first update."""
    run(memorized, method, config, setup=Setup(saving=Saving(directory, 0, {})))
    return json.loads((directory / "log.jsonl").read_text().splitlines()[0])["loss"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihood_is_that_of_each_answer_alone(memorized, batch_size):
    """In the order given, whatever the batches; rows of unlike length, both wrong and right answers."""
    rows = [*memorized.corpus.retain[:9], *memorized.corpus.forget]
    pairs = [(row.question, text) for row in rows for text in (row.answer, row.perturbed_answers[0])]
    exact = copy.deepcopy(memorized.target).double()
    expected = [direct_nll(exact, memorized.encoder, *pair) for pair in pairs]
    totals, counts = answer_likelihood(memorized.target, memorized.encoder, pairs, batch_size)
    assert counts == [tokens for _, tokens in expected]
    # The model runs in float32: about 1e-6 a logit, relative to logits of some tens.
    assert totals == pytest.approx([total for total, _ in expected], rel=1e-4, abs=1e-4)
    assert mean_probability(memorized.target, memorized.encoder, pairs) == pytest.approx(
        sum(math.exp(-total / tokens) for total, tokens in expected) / len(expected), rel=1e-5
    )


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_reference_is_the_start_models_nll_of_every_row(memorized, batch_size):
    rows = memorized.corpus.forget
    feed = Feed(memorized.encoder, {"forget": [(row.question, row.answer) for row in rows]}, {"forget": 2}, seed=0)
    memorized.target.train()
    reference = reference_nll(memorized.target, feed, "forget", batch_size)
    assert memorized.target.training, "as it was"
    memorized.target.eval()
    exact = copy.deepcopy(memorized.target).double()
    expected = [direct_nll(exact, memorized.encoder, row.question, row.answer)[0] for row in rows]
    assert reference.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert not reference.requires_grad


def test_npo_starts_where_the_reference_is(memorized, tmp_path):
    """Its first loss is gamma (2/beta) log 2 + alpha NLL_r: rows and reference belong together."""
    # All retain rows in one batch, so that the retain term is known.
    config = MethodConfig(steps=1, forget_batch=3, retain_batch=99, gamma=0.7, alpha=1.5, beta=0.2)
    exact = copy.deepcopy(memorized.target).double()
    rows = [direct_nll(exact, memorized.encoder, row.question, row.answer) for row in memorized.corpus.retain]
    kept = sum(total for total, _ in rows) / sum(tokens for _, tokens in rows)
    expected = 0.7 * 2 / 0.2 * math.log(2) + 1.5 * kept
    assert first_loss(memorized, "npo", config, tmp_path) == pytest.approx(expected, rel=1e-4)


def test_graddiff_starts_at_the_difference_of_both_means(memorized, tmp_path):
    config = MethodConfig(steps=1, forget_batch=99, retain_batch=99, gamma=0.7, alpha=1.5)
    exact, means = copy.deepcopy(memorized.target).double(), []
    for part in (memorized.corpus.forget, memorized.corpus.retain):
        rows = [direct_nll(exact, memorized.encoder, row.question, row.answer) for row in part]
        means.append(sum(total for total, _ in rows) / sum(tokens for _, tokens in rows))
    expected = -0.7 * means[0] + 1.5 * means[1]
    assert first_loss(memorized, "graddiff", config, tmp_path) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", CONFIGS)
def test_forget_set_goes_and_retain_set_stays(memorized, method):
    model = run(memorized, method, CONFIGS[method]).model
    forget, retain = (knows(model, memorized, rows) for rows in (memorized.corpus.forget, memorized.corpus.retain))
    assert knows(memorized.target, memorized, memorized.corpus.forget) > 0.9
    assert forget < 0.2
    assert retain > 0.6
    assert not model.training


@pytest.mark.parametrize("method", CONFIGS)
def test_same_seed_same_bits(memorized, method):
    config = MethodConfig(steps=3, learning_rate=1e-2, forget_batch=2, retain_batch=4, against="rtn-w4a16-g16-plain")
    first, again, other = (run(memorized, method, config, seed).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_target_is_unlearned_in_place(memorized):
    model = copy.deepcopy(memorized.target)
    corpus, config = memorized.corpus, MethodConfig(steps=1, learning_rate=1e-3)
    assert unlearn(model, memorized.encoder, corpus.forget, corpus.retain, "npo", config).model is model
    assert not torch.equal(model.lm_head.weight, memorized.target.lm_head.weight)


def test_progress(memorized):
    seen, config = [], MethodConfig(steps=3, learning_rate=1e-3, forget_batch=2, retain_batch=2, check_every=2)
    run(memorized, "graddiff", config, progress=lambda *at: seen.append(at))
    assert [at[:2] for at in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(re.match(r"loss -?\d", text) for _, _, text in seen)
    assert ["forget P 0.9" in text and "retain P 0.9" in text for _, _, text in seen] == [False, True, True]


def test_unknown_method(memorized):
    with pytest.raises(ValueError, match="method: 'gradient ascent' is unknown"):
        run(memorized, "gradient ascent", None)


@pytest.mark.parametrize("method", ["npo", "graddiff"])
def test_divergence_is_raised(memorized, method):
    with pytest.raises(Diverged, match=r"the (forget|retain) loss is .* at step 2 of 8"):
        run(memorized, method, MethodConfig(steps=8, learning_rate=1e20, warmup=0))
