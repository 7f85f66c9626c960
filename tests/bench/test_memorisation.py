"""Extraction strength and exact memorisation against plain NumPy, from made-up answers and from a trained model."""

import numpy as np
import pytest
import torch
from remanence.bench.memorisation import exact_memorisation, extraction_strength, memorisation_score
from remanence.bench.tokens import Answer, answers
from remanence.unlearn.encode import IGNORE

pytestmark = pytest.mark.usefixtures("one_thread")


def answer(greedy):
    n = len(greedy)
    return Answer(torch.zeros(n), torch.tensor(greedy, dtype=torch.bool), torch.zeros(n), torch.ones(n), True)


def plain_strength(greedy):
    """From the definition: the smallest k for which all of greedy[k:] is right; k = n is always one."""
    n = len(greedy)
    return 1 - min(k for k in range(n + 1) if all(greedy[k:])) / n


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33])
def test_both_are_the_plain_definitions(n):
    rng = np.random.default_rng(n)
    for right in (0.2, 0.8, 0.97):
        for _ in range(40):
            greedy = (rng.random(n) < right).tolist()
            assert extraction_strength(answer(greedy)) == plain_strength(greedy)
            assert exact_memorisation(answer(greedy)) == pytest.approx(np.mean(greedy), abs=1e-15)
            if n > 1:
                assert extraction_strength(answer(greedy), with_end=False) == plain_strength(greedy[:-1])
                assert exact_memorisation(answer(greedy), with_end=False) == pytest.approx(
                    np.mean(greedy[:-1]), abs=1e-15
                )


@pytest.mark.parametrize(
    ("greedy", "strength", "without_end"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 0, 0, 0], 0.0, 0.0),
        ([1, 1, 1, 0], 0.0, 1.0),
        ([0, 0, 0, 1], 0.25, 0.0),
        ([0, 1, 0, 1], 0.25, 0.0),
        ([0, 1, 1, 1], 0.75, 2 / 3),
    ],
)
def test_extraction_strength_by_hand(greedy, strength, without_end):
    assert extraction_strength(answer(greedy)) == pytest.approx(strength, abs=1e-15)
    assert extraction_strength(answer(greedy), with_end=False) == pytest.approx(without_end, abs=1e-15)


def test_the_value_differs_from_open_unlearning_only_where_the_last_token_is_wrong():
    def theirs(greedy):
        for k in range(len(greedy)):
            if all(greedy[k:]):
                break
        return 1 - k / len(greedy)

    rng = np.random.default_rng(0)
    for n in (1, 4, 9):
        for _ in range(50):
            greedy = (rng.random(n) < 0.7).tolist()
            found = extraction_strength(answer([*greedy, False]), with_end=False)
            assert found == pytest.approx(theirs(greedy) if greedy[-1] else theirs(greedy) - 1 / n, abs=1e-15)


@pytest.mark.parametrize("measure", [extraction_strength, exact_memorisation])
def test_an_answer_without_tokens_is_refused(measure):
    with pytest.raises(ValueError, match="no tokens; "):
        measure(answer([]))
    with pytest.raises(ValueError, match="no tokens before its end of sequence"):
        measure(answer([1]), with_end=False)


def test_score_is_the_harmonic_mean_of_what_is_left():
    expected = 4 / (1 / 0.5 + 1 / 0.25 + 1 / 0.8 + 1 / 0.4)
    assert memorisation_score(0.5, 0.75, 0.2, 0.6) == pytest.approx(expected, rel=1e-15)
    assert memorisation_score(0, 0, 0, 0) == 1
    assert memorisation_score(0, 0, 1, 0) == 0, "one measure that sees everything is enough"


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
def test_score_names_what_is_not_a_share(bad):
    with pytest.raises(ValueError, match=r"truth_ratio: .* is not in 0\.\.1"):
        memorisation_score(0.1, 0.1, 0.1, bad)


def test_target_knows_its_forget_set_by_heart_and_the_oracle_does_not(memorized):
    pairs = [(row.question, row.answer) for row in memorized.corpus.forget]
    target = answers(memorized.target, memorized.encoder, pairs)
    oracle = answers(memorized.oracle, memorized.encoder, pairs)
    assert np.mean([extraction_strength(a) for a in target]) > 0.9
    assert np.mean([exact_memorisation(a) for a in target]) > 0.95
    assert np.mean([extraction_strength(a, with_end=False) for a in oracle]) < 0.5
    # Every oracle knows when an answer is over: counting the end alone is not memorisation.
    assert np.mean([exact_memorisation(a, with_end=False) for a in oracle]) < 0.6


def test_model_answers_one_at_a_time_in_plain_numpy(memorized):
    corpus, encoder, model = memorized.corpus, memorized.encoder, memorized.oracle
    rows = [*corpus.retain[:10], *corpus.forget, *corpus.holdout]
    pairs = [(row.question, row.answer) for row in rows] + [("", row.question) for row in rows]
    expected = []
    for question, text in pairs:
        ids, labels = encoder.pair(question, text)
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0].double().numpy().argmax(1)
        expected.append([best[i - 1] == labels[i] for i in range(1, len(ids)) if labels[i] != IGNORE])
    assert len({plain_strength(greedy) for greedy in expected}) > 3, "too little varies for a comparison"
    for batch_size in (1, 7, 64):
        for greedy, found in zip(expected, answers(model, encoder, pairs, batch_size), strict=True):
            assert extraction_strength(found) == plain_strength(greedy)
            assert exact_memorisation(found) == pytest.approx(np.mean(greedy), abs=1e-15)
