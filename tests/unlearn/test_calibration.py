"""Calibration data: from the sources that were asked for, as many, without padding, drawn by the seed."""

import pytest
import torch
from remanence.compress.spec import Calibration, Retrain, parse_calibration
from remanence.unlearn.calibration import (
    BATCH_TOKENS,
    batched,
    calibration_batches,
    default_calibration,
    retraining_batches,
)
from remanence.unlearn.data import QA
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.encode import Encoder
from remanence.unlearn.people import people_corpus


@pytest.fixture(scope="module")
def corpus():
    return people_corpus(6, "forget30")


@pytest.fixture(scope="module")
def encoder(corpus):
    return Encoder(demo_tokenizer(corpus, DemoConfig(vocab_size=320)), 96)


def sources(corpus):
    return {"retain": corpus.retain, "forget": corpus.forget}


def sequences(batches):
    return [row.tolist() for batch in batches for row in batch]


def test_each_source_gives_what_was_asked_for(corpus, encoder):
    text = " ".join(row.answer for row in corpus.retain) * 3
    found = sequences(
        calibration_batches(parse_calibration("retain:5,forget:3,text:2"), encoder, sources(corpus), text)
    )
    assert len(found) == 10
    pairs = {name: [encoder.pair(r.question, r.answer)[0] for r in rows] for name, rows in sources(corpus).items()}
    assert sum(ids in pairs["retain"] for ids in found) == 5
    assert sum(ids in pairs["forget"] for ids in found) == 3
    stream = encoder.tokenizer(text)["input_ids"]
    windows = [stream[i : i + 96] for i in range(0, len(stream), 96)]
    assert sum(ids in windows for ids in found) == 2


def test_the_seed_draws(corpus, encoder):
    def draw(seed):
        return sequences(calibration_batches(Calibration(retain=4), encoder, sources(corpus), seed=seed))

    assert draw(1) == draw(1) != draw(2)


def test_no_batch_has_padding_or_too_many_tokens():
    made = [[n] * (n % 7 + 1) for n in range(400)]
    batches = batched(made)
    assert sorted(sequences(batches)) == sorted(made)
    assert all(batch.numel() <= BATCH_TOKENS and batch.dtype == torch.int64 for batch in batches)
    assert batched([[1] * (BATCH_TOKENS + 5)])[0].shape == (1, BATCH_TOKENS + 5)


def test_long_texts_are_cut_to_the_length(corpus, encoder):
    rows = {"retain": [QA("", " ".join(row.answer for row in corpus.retain[:9]))]}
    found = sequences(calibration_batches(Calibration(retain=2, length=20), encoder, rows))
    assert len(found) == 2
    assert all(2 <= len(ids) <= 20 for ids in found)


def test_the_default_is_the_retain_set(corpus, encoder):
    assert default_calibration({"retain": corpus.retain[:50]}, "a text", encoder) == Calibration(retain=50)
    assert default_calibration({"retain": corpus.retain * 9}, None, encoder) == Calibration(retain=128)
    assert default_calibration({"retain": corpus.retain * 9}, None, encoder, 7) == Calibration(retain=7)
    text = " ".join(row.answer for row in corpus.retain)
    wanted = default_calibration({"retain": [QA("", text)]}, None, encoder)
    assert wanted.retain == len(encoder.windows([QA("", text)])) > 3, "one row of text is many sequences"
    pieces = len(encoder.tokenizer(text)["input_ids"]) // encoder.max_length
    assert default_calibration({}, text, encoder) == Calibration(text=pieces)
    assert default_calibration({"retain": ()}, text * 100, encoder) == Calibration(text=128)
    with pytest.raises(ValueError, match="calibration: needs data; give --text FILE"):
        default_calibration({"forget": corpus.forget}, None, encoder)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("retain:5000", "retain:5000 asked for, but there are"),
        ("forget:1000", "forget:1000 asked for, but there are"),
        ("text:3", "needs a text; give --text FILE"),
    ],
)
def test_what_is_not_there(corpus, encoder, asked, message):
    with pytest.raises(ValueError, match=message):
        calibration_batches(parse_calibration(asked), encoder, sources(corpus))


def test_a_text_that_is_too_short(corpus, encoder):
    with pytest.raises(ValueError, match="text:3 asked for, but there are 0 sequences"):
        calibration_batches(Calibration(text=3), encoder, sources(corpus), "short")


def test_data_for_retraining(corpus, encoder):
    """All rows of a source, or as many as were asked for; pieces of a text."""
    rows = {"retain": corpus.retain, "forget": corpus.forget}
    text = " ".join(row.answer for row in corpus.retain)
    all_rows = retraining_batches(Retrain(source="forget"), encoder, rows)
    whole = {tuple(encoder.pair(row.question, row.answer)[0]) for row in corpus.forget}
    assert {tuple(ids.tolist()) for batch in all_rows for ids in batch} == whole
    some = retraining_batches(Retrain(source="retain", sequences=3), encoder, rows)
    assert sum(map(len, some)) == 3
    other = retraining_batches(Retrain(source="retain", sequences=3, seed=1), encoder, rows)
    assert [batch.tolist() for batch in some] != [batch.tolist() for batch in other]
    pieces = retraining_batches(Retrain(source="text", length=16, sequences=5), encoder, rows, text)
    assert [list(batch.shape) for batch in pieces] == [[5, 16]]
    for retrain, message in (
        (Retrain(source="text"), "retrain: text needs a text"),
        (Retrain(source="forget", sequences=1000), "retrain: forget:1000 asked for, but there are"),
    ):
        with pytest.raises(ValueError, match=message):
            retraining_batches(retrain, encoder, rows)
    with pytest.raises(ValueError, match="retrain: forget: there is none"):
        retraining_batches(Retrain(source="forget"), encoder, {})
