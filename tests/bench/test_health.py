"""Output health: the numbers against plain NumPy, and that each way of collapsing has its flag and sound text none."""

import math
from collections import Counter

import numpy as np
import pytest
from remanence.bench.generation import answer_questions
from remanence.bench.health import flags, health, ngram_entropy, repetition, words
from remanence.bench.tokens import answers

pytestmark = pytest.mark.usefixtures("one_thread")

SOUND = [
    "Anna Berg was born in Oslo.",
    "She writes crime novels, mostly.",
    "Her father was a baker.",
    "In 1962.",
    "Two.",
]


def plain_entropy(units):
    def one(n):
        grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
        if not grams:
            return 0.0
        share = np.array(list(Counter(grams).values()), dtype=np.float64) / len(grams)
        return float(-(share * np.log2(share)).sum())

    return float(np.mean([2 / 3 * one(2), 4 / 3 * one(3)]))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 30])
def test_entropy_and_repetition(length):
    units = np.random.default_rng(length).integers(0, 4, length).tolist()
    assert ngram_entropy(units) == pytest.approx(plain_entropy(units), abs=1e-12)
    grams = [tuple(units[i : i + 4]) for i in range(length - 3)]
    assert repetition(units) == (1 - len(set(grams)) / len(grams) if grams else 0)


def test_by_hand():
    """a b a b a: ab ba ab ba is one bit, aba bab aba has shares 2/3 and 1/3; 4-grams abab baba are different."""
    assert ngram_entropy("ababa") == pytest.approx(1 / 3 + 2 / 3 * (math.log2(3) - 2 / 3))
    assert repetition("ababa") == 0
    assert repetition("aaaaaaa") == 0.75
    assert words("Born in 1962, she's Ana-Lucía.") == [
        "Born", "in", "1962", ",", "she", "'", "s", "Ana", "-", "Lucía", "."
    ]  # fmt: skip


def test_health_of_sound_answers():
    found = health(SOUND, ["a", "b", "c", "d", "e"])
    assert found.entropy == pytest.approx(np.mean([plain_entropy(words(text)) for text in SOUND]))
    assert (found.answers, found.questions, found.distinct, found.empty, found.looping) == (5, 5, 1, 0, 0)
    assert found.commonest == 0.2
    assert flags(found) == ()


def test_no_answers_and_empty_ones():
    nothing = health([])
    assert (nothing.answers, nothing.entropy, nothing.repetition, nothing.distinct, nothing.commonest) == (
        0,
        0,
        0,
        0,
        0,
    )
    assert flags(nothing) == ("no answers",)
    empty = health(["", " \n", ""])
    assert (empty.empty, empty.entropy, empty.repetition, empty.commonest) == (1, 0, 0, 0)
    assert flags(empty) == ("empty answers",)
    assert flags(health(["", *SOUND])) == ()
    assert health(["Two."]).entropy == 0


def test_one_answer_to_everything():
    same = ["I do not know."] * 4 + SOUND[:3]
    assert flags(health(same)) == ("one answer to everything",)
    assert flags(health(["I do not  know.", "i do not know."] * 2 + SOUND[:3])) == ("one answer to everything",)
    # The same question asked four times has one answer; and two questions out of two may have one.
    assert flags(health(same, ["a", "a", "a", "a", "b", "c", "d"])) == ()
    assert flags(health(["Yes."] * 4)) == ()
    assert flags(health(["I do not know."] * 3 + SOUND[:3])) == ()


def test_loops():
    loop = "the cat and " * 20
    assert flags(health([loop, *SOUND])) == ()
    found = health([loop, loop + "then", *SOUND])
    assert found.looping == pytest.approx(2 / 7)
    assert flags(found) == ("repeats itself",)


def test_token_ids_instead_of_words():
    found = health(["没有空格的句子", "x"], token_ids=[[1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], []])
    assert found.repetition_items == [pytest.approx(1 - 4 / 9), 0]
    assert found.entropy_items[0] == pytest.approx(plain_entropy([1, 2, 3, 4] * 3))
    with pytest.raises(ValueError, match="token_ids: 1 for 2 answers"):
        health(["a", "b"], token_ids=[[1]])
    with pytest.raises(ValueError, match="questions: 1 for 2 answers"):
        health(["a", "b"], ["q"])


def test_flags_from_the_model(memorized, untrained):
    rows = memorized.corpus.retain[:8]
    pairs = [(row.question, row.answer) for row in rows]

    def raised(model):
        scored = answers(model, memorized.encoder, pairs)
        texts = answer_questions(model, memorized.encoder, rows)
        entropies = [-value for answer in scored for value in answer.mean.tolist()]
        found = health(texts, [row.question for row in rows])
        return flags(found, all(answer.finite for answer in scored), entropies, 512)

    assert raised(memorized.target) == ()
    broken = untrained("llama", vocabulary=512)
    broken.lm_head.weight.data.fill_(math.nan)
    assert {"logits are not numbers", "uniform output"} <= set(raised(broken))
    broken.lm_head.weight.data.zero_()
    assert "uniform output" in raised(broken)
    assert "logits are not numbers" not in raised(broken)


def test_bounds_of_uniform():
    sound = health(SOUND)
    assert flags(sound, entropies=[0.979 * math.log(500)], vocabulary=500) == ()
    assert flags(sound, entropies=[0.981 * math.log(500)], vocabulary=500) == ("uniform output",)
    with pytest.raises(ValueError, match="vocabulary: None"):
        flags(sound, entropies=[1.0])


@pytest.mark.parametrize("model", ["llama2-7b_full", "llama2-7b_retain90"])
def test_real_answers_are_sound(real_data, model):
    import json

    for name in ("eval_log.json", "eval_log_forget.json"):
        rows = json.loads(real_data("tofu-logs", model, name).read_text())["generated_text"].values()
        found = health([row[1] for row in rows], [row[0] for row in rows])
        assert found.answers == 300
        assert 4 < found.entropy < 6
        assert found.repetition < 0.005
        assert flags(found) == ()
