"""Knowledge probes: accuracy by likelihood against plain NumPy, and knowledge lost beside perplexity."""

import copy
import math

import numpy as np
import pytest
import torch
from remanence.bench.probes import ChoiceAccuracy, choice_accuracy, knowledge_beside_perplexity
from remanence.unlearn.data import QA, read_rows
from remanence.unlearn.encode import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")


def nll(model, encoder, question, answer):
    """(sum, number) of nats of the answer's tokens, one pass per answer, float64."""
    ids, labels = encoder.pair(question, answer)
    with torch.no_grad():
        z = model(torch.tensor([ids])).logits[0].double().numpy()
    z = z - z.max(1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    own = [-log_p[i - 1, ids[i]] for i in range(1, len(ids)) if labels[i] != -100]
    return sum(own), len(own)


@pytest.fixture(scope="module")
def rows(memorized):
    return [*memorized.corpus.forget, *memorized.corpus.retain[:20]]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_against_numpy(memorized, rows, batch_size):
    mixed = [QA("Who?", "No one."), *rows]
    found = choice_accuracy(memorized.oracle, memorized.encoder, mixed, batch_size)
    normalised, raw = [], []
    for row in rows:
        options = [row.paraphrased_answer or row.answer, *row.perturbed_answers]
        scored = [nll(memorized.oracle, memorized.encoder, row.question, text) for text in options]
        normalised.append(int(np.argmin([s / n for s, n in scored])) == 0)
        raw.append(int(np.argmin([s for s, _ in scored])) == 0)
    assert found.normalised == normalised
    assert found.raw == raw
    assert 0 < sum(normalised) < len(rows)  # else nothing was compared
    assert found.rows == list(range(1, len(mixed)))
    assert found.chance == [1 / (1 + len(row.perturbed_answers)) for row in rows]


def test_who_learnt_it_knows_it(memorized):
    forget, retain = memorized.corpus.forget, memorized.corpus.utility["retain"].rows
    target, oracle = (
        [choice_accuracy(model, memorized.encoder, rows).interval() for rows in (forget, retain)]
        for model in (memorized.target, memorized.oracle)
    )
    assert target[0].value == target[1].value == oracle[1].value == 1
    assert oracle[0].value <= 0.4
    # Twenty of twenty: at least 0.025 ** (1 / 20) of all, at 95%.
    assert (oracle[1].low, oracle[1].high) == (pytest.approx(0.025 ** (1 / 20)), 1)


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_a_collapsed_model_knows_nothing(memorized, rows, value):
    broken = copy.deepcopy(memorized.target)
    broken.set_output_embeddings(torch.nn.Linear(64, 512, bias=False))
    torch.nn.init.constant_(broken.get_output_embeddings().weight, value)
    found = choice_accuracy(broken, memorized.encoder, rows)
    assert not any(found.normalised)
    assert found.finite == (value == 0.0)
    if math.isnan(value):
        assert not any(found.raw)
    interval = found.interval()
    assert interval.value == interval.low == 0 < interval.high < 0.2


def test_raw_favours_short_answers(memorized):
    """Where every token is equally likely, the shorter answer is likelier as a whole, and none is per token."""
    uniform = copy.deepcopy(memorized.target)
    uniform.set_output_embeddings(torch.nn.Linear(64, 512, bias=False))
    torch.nn.init.zeros_(uniform.get_output_embeddings().weight)
    short, long = "Oslo", "in the old town of Oslo, by the sea"
    rows = [QA("Where?", short, perturbed_answers=(long,)), QA("Where?", long, perturbed_answers=(short,))]
    found = choice_accuracy(uniform, memorized.encoder, rows)
    assert (found.raw, found.normalised) == ([True, False], [False, False])


def test_rows_without_wrong_answers(memorized):
    with pytest.raises(ValueError, match="rows: none of 1 has wrong answers"):
        choice_accuracy(memorized.target, memorized.encoder, [QA("Who?", "No one.")])
    with pytest.raises(ValueError, match="rows: none of 0"):
        choice_accuracy(memorized.target, memorized.encoder, [])


def test_real_sets(real_data, memorized):
    """World facts in TOFU's files, on a model that never heard of them: near chance."""
    rows = read_rows(real_data("tofu", "world_facts_perturbed.json"))
    found = choice_accuracy(memorized.target, Encoder(memorized.tokenizer, 128), rows)
    assert len(found.rows) == 117
    assert set(found.chance) == {0.25}
    interval = found.interval()
    assert 0.1 < interval.low < interval.value < interval.high < 0.5


def probes(right, chance=0.25):
    return ChoiceAccuracy(right, right, [chance] * len(right), list(range(len(right))), True)


def test_beside_perplexity():
    target, model = probes([True] * 8 + [False] * 2), probes([True] * 4 + [False] * 6)
    found = knowledge_beside_perplexity(10.5, 10.0, model, target)
    assert found.perplexity_change == pytest.approx(0.05)
    assert found.knowledge_loss.value == pytest.approx(0.5)
    assert 0 < found.knowledge_loss.low < 0.5 < found.knowledge_loss.high <= 1.25
    assert (found.accuracy, found.target_accuracy, found.chance) == (0.4, 0.8, 0.25)
    same = knowledge_beside_perplexity(10.0, 10.0, target, target)
    assert (same.knowledge_loss.low, same.knowledge_loss.value, same.knowledge_loss.high) == (0, 0, 0)
    assert knowledge_beside_perplexity(10.0, 10.0, model, probes([False] * 10)).knowledge_loss is None
    assert knowledge_beside_perplexity(9.0, 10.0, target, model).knowledge_loss.value == pytest.approx(-1)


def test_beside_perplexity_refuses():
    with pytest.raises(ValueError, match="they must be the same"):
        knowledge_beside_perplexity(1.0, 1.0, probes([True]), probes([True, False]))
    with pytest.raises(ValueError, match="target_perplexity: nan"):
        knowledge_beside_perplexity(1.0, math.nan, probes([True]), probes([True]))
    with pytest.raises(ValueError, match="perplexity: 0"):
        knowledge_beside_perplexity(0.0, 1.0, probes([True]), probes([True]))
