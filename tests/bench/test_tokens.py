"""One pass over given answers, against one row at a time in float64, and on models that are broken."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from remanence.bench.tokens import FLOOR, answers, by_length
from remanence.unlearn.encode import Encoder
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


class Fixed(nn.Module):
    """A "model" whose logits at every position are what `logits` makes of the ids [B, T]."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.logits(input_ids))


@pytest.fixture(scope="module")
def pairs(memorized):
    rows = [*memorized.corpus.forget, *memorized.corpus.retain[:7], *memorized.corpus.holdout[:3]]
    return [(r.question, r.answer) for r in rows] + [("", rows[0].answer + " " + rows[1].answer)]


def plain(model, encoder, question, answer):
    """(log_p, greedy, mean, deviation) in float64, alone."""
    ids, labels = encoder.pair(question, answer)
    with torch.no_grad():
        z = model(torch.tensor([ids])).logits[0].numpy().astype(np.float64)
    at = [t for t, label in enumerate(labels) if label >= 0 and t > 0]
    rows = z[[t - 1 for t in at]]
    log_p = rows - rows.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p, taken = np.exp(log_p), [labels[t] for t in at]
    mean = (p * log_p).sum(1)
    deviation = np.sqrt((p * (log_p - mean[:, None]) ** 2).sum(1))
    return log_p[range(len(at)), taken], rows.argmax(1) == taken, mean, deviation


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_against_one_row_at_a_time(memorized, pairs, batch_size):
    exact = copy.deepcopy(memorized.target).double()
    found = answers(memorized.target, memorized.encoder, pairs, batch_size)
    assert len(found) == len(pairs)
    for answer, pair in zip(found, pairs, strict=True):
        log_p, greedy, mean, deviation = plain(exact, memorized.encoder, *pair)
        np.testing.assert_allclose(answer.log_p, log_p, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(answer.mean, mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(answer.deviation, deviation, rtol=1e-3, atol=1e-3)
        assert answer.greedy.tolist() == greedy.tolist()
        assert answer.nll == pytest.approx(-log_p.mean(), rel=1e-4, abs=1e-5)
        assert answer.probability == pytest.approx(math.exp(log_p.mean()), rel=1e-4)
        assert answer.finite


def test_nothing_to_score(memorized):
    assert answers(memorized.target, memorized.encoder, []) == []


def test_the_end_counts_in_answers_and_not_in_texts(memorized):
    tokenizer = memorized.tokenizer
    found = answers(memorized.target, memorized.encoder, [("Who?", "a b"), ("", "a b c")])
    assert len(found[0].log_p) == len(tokenizer(" a b")["input_ids"]) + 1
    assert len(found[1].log_p) == len(tokenizer("a b c")["input_ids"]) - 1, "nothing predicts the first"


@pytest.mark.parametrize("logits", [math.nan, math.inf, -math.inf, 0.0], ids=str)
def test_broken_models_know_nothing(memorized, pairs, logits):
    size = len(memorized.tokenizer)
    model = Fixed(lambda ids: torch.full((*ids.shape, size), logits))
    for answer in answers(model, memorized.encoder, pairs):
        assert answer.nll == pytest.approx(math.log(size), rel=1e-6)
        assert answer.mean.tolist() == pytest.approx([-math.log(size)] * len(answer.log_p))
        assert answer.deviation.tolist() == pytest.approx([0.0] * len(answer.log_p), abs=1e-5)
        assert not answer.greedy.any(), "the first of equal tokens is the padding"
        assert answer.finite == (logits == 0.0)


def test_one_broken_position_is_uniform_and_the_others_are_not(memorized):
    size = len(memorized.tokenizer)

    def logits(ids):
        z = torch.zeros((*ids.shape, size))
        z.scatter_(2, ids.roll(-1, 1)[..., None], 20.0)  # knows every next token
        z[:, -3] = math.nan
        return z

    answer = answers(Fixed(logits), memorized.encoder, [("Who?", "a long answer")])[0]
    expected = [True] * len(answer.log_p)
    expected[-2] = False
    assert (answer.greedy.tolist(), answer.finite) == (expected, False)
    assert answer.log_p[-2] == pytest.approx(-math.log(size))


def test_forbidden_tokens_have_the_floor(memorized):
    """A guard's -inf is meant: the token is never said, and the number stays one."""
    size, banned = len(memorized.tokenizer), memorized.tokenizer(" a")["input_ids"][0]

    def logits(ids):
        z = torch.zeros((*ids.shape, size))
        z[..., banned] = -math.inf
        return z

    answer = answers(Fixed(logits), memorized.encoder, [("Who?", "a")])[0]
    assert answer.log_p[0] == FLOOR
    assert answer.finite
    assert answer.mean[0] == pytest.approx(-math.log(size - 1))
    assert math.isfinite(answer.deviation[0])
    assert answer.probability == 0.0


def test_the_first_of_equal_tokens_is_the_greedy_one(memorized):
    size = len(memorized.tokenizer)
    (first,) = memorized.tokenizer(" a")["input_ids"]
    for rival, greedy in ((first + 1, True), (first - 1, False)):

        def logits(ids, rival=rival):
            z = torch.zeros((*ids.shape, size))
            z[..., [first, rival]] = 5.0
            return z

        assert answers(Fixed(logits), memorized.encoder, [("Who?", "a")])[0].greedy[0].item() is greedy


def test_a_large_vocabulary_is_taken_in_pieces(memorized, pairs, monkeypatch):
    whole = answers(memorized.target, memorized.encoder, pairs[:4])
    monkeypatch.setattr("remanence.bench.tokens.CHUNK", 2 * len(memorized.tokenizer))
    for one, other in zip(whole, answers(memorized.target, memorized.encoder, pairs[:4]), strict=True):
        assert one.log_p.equal(other.log_p)
        assert one.greedy.equal(other.greedy)


def test_pair_that_does_not_fit(memorized):
    with pytest.raises(ValueError, match="this model takes 4"):
        answers(memorized.target, Encoder(memorized.tokenizer, 4), [("Who was it?", "a b c d")])


def test_batches_of_like_length():
    assert list(by_length([5, 1, 3, 2], 2)) == [[1, 3], [2, 0]]
    assert list(by_length([], 2)) == []
