"""TOFU's splits out of full.json, against the published split files."""

import json
import shutil

import pytest
from remanence.unlearn.tofu import tofu_corpus

SHARES = [("forget01", "retain99"), ("forget05", "retain95"), ("forget10", "retain90")]


@pytest.fixture(scope="module")
def tofu(real_data):
    return real_data("tofu")


def published(directory, name):
    """(question, answer) of every row, read without the code under test."""
    rows = [json.loads(line) for line in (directory / f"{name}.json").read_text().split("\n") if line.strip()]
    return [(row["question"], row["answer"]) for row in rows]


def pairs(rows):
    return [(row.question, row.answer) for row in rows]


@pytest.mark.parametrize(("forget", "retain"), SHARES)
def test_splits_are_the_published_ones(tofu, forget, retain):
    corpus = tofu_corpus(tofu, forget)
    assert pairs(corpus.forget) == published(tofu, forget)
    assert pairs(corpus.retain) == published(tofu, retain)
    assert corpus.holdout == ()


@pytest.mark.parametrize(("forget", "count"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_forget_rows_have_paraphrases_and_wrong_answers(tofu, forget, count):
    """As in the published file of that split, row by row."""
    corpus = tofu_corpus(tofu, forget)
    assert len(corpus.forget) == count
    perturbed = [json.loads(line) for line in (tofu / f"{forget}_perturbed.json").read_text().splitlines()]
    for row, expected in zip(corpus.forget, perturbed, strict=True):
        assert row.question == expected["question"]
        assert row.paraphrased_answer == expected["paraphrased_answer"] != ""
        assert list(row.perturbed_answers) == expected["perturbed_answer"]
        assert len(set(row.perturbed_answers)) == 5


@pytest.mark.parametrize(("forget", "retain"), SHARES)
def test_utility_sets(tofu, forget, retain):
    corpus = tofu_corpus(tofu, forget)
    assert list(corpus.utility) == ["retain", "real_authors", "world_facts"]
    kept = set(published(tofu, retain))
    assert len(corpus.utility["retain"].rows) == 100
    assert all((row.question, row.answer) in kept for row in corpus.utility["retain"].rows)
    assert all(len(row.perturbed_answers) == 5 for row in corpus.utility["retain"].rows)
    assert [corpus.utility[name].choices for name in corpus.utility] == [False, True, True]
    assert pairs(corpus.utility["real_authors"].rows) == published(tofu, "real_authors_perturbed")
    assert pairs(corpus.utility["world_facts"].rows) == published(tofu, "world_facts_perturbed")
    assert {len(row.perturbed_answers) for row in corpus.utility["world_facts"].rows} == {3}


@pytest.mark.parametrize(("authors", "forget", "kept", "held_out"), [(30, "forget10", 10, 20), (3, "forget01", 1, 2)])
def test_subset_of_authors(tofu, authors, forget, kept, held_out):
    full, corpus = published(tofu, "full"), tofu_corpus(tofu, forget, authors)
    assert pairs(corpus.forget) == published(tofu, forget), "the forgotten authors are the published ones"
    assert pairs(corpus.retain) == full[: kept * 20]
    assert pairs(corpus.holdout) == full[kept * 20 : (kept + held_out) * 20]
    assert {row.person for row in corpus.retain} == {f"author {i}" for i in range(kept)}
    parts = [{row.person for row in rows} for rows in (corpus.forget, corpus.retain, corpus.holdout)]
    assert len(set.union(*parts)) == sum(map(len, parts)), "no author is in two parts"


def test_holdout_shrinks_when_few_authors_are_left(tofu):
    corpus = tofu_corpus(tofu, "forget10", 195)
    assert len(corpus.holdout) == 5 * 20
    assert set(pairs(corpus.holdout)).isdisjoint(pairs(corpus.forget) + pairs(corpus.retain))


@pytest.mark.parametrize(
    ("forget", "authors"), [("forget10", 20), ("forget10", 0), ("forget10", 201), ("forget01", 2), ("forget01", -1)]
)
def test_wrong_number_of_authors(tofu, forget, authors):
    with pytest.raises(ValueError, match=rf"authors: {authors} with {forget} must be between (3|21) and 200"):
        tofu_corpus(tofu, forget, authors)


@pytest.mark.parametrize("forget", ["forget00", "forget", "forget100", "tofu"])
def test_wrong_split(tofu, forget):
    with pytest.raises(ValueError, match="forget: "):
        tofu_corpus(tofu, forget)


@pytest.mark.parametrize(("forget", "retain"), SHARES)
def test_full_alone_is_enough(tofu, tmp_path, forget, retain):
    shutil.copy(tofu / "full.json", tmp_path)
    corpus = tofu_corpus(tmp_path, forget)
    assert pairs(corpus.forget) == published(tofu, forget)
    assert pairs(corpus.retain) == published(tofu, retain)
    assert not any(row.perturbed_answers or row.paraphrased_answer for row in corpus.forget)
    assert list(corpus.utility) == ["retain"]
    assert len(corpus.utility["retain"].rows) == 100
    assert corpus.background == ()


def test_wrong_answers_of_another_edition_are_not_mixed_in(tofu, tmp_path):
    """A perturbed row whose right answer differs belongs to other data."""
    shutil.copy(tofu / "full.json", tmp_path)
    rows = [json.loads(line) for line in (tofu / "forget01_perturbed.json").read_text().splitlines()]
    rows[0]["answer"] += " Or not."
    (tmp_path / "forget01_perturbed.json").write_text("\n".join(map(json.dumps, rows)))
    corpus = tofu_corpus(tmp_path, "forget01")
    assert pairs(corpus.forget) == published(tofu, "forget01")
    assert [len(row.perturbed_answers) for row in corpus.forget] == [0] + [5] * 39


def test_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data-dir: .*nowhere: no such directory"):
        tofu_corpus(tmp_path / "nowhere")


def test_missing_full(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"full\.json: no such file"):
        tofu_corpus(tmp_path)


def some_rows(count):
    return "".join(json.dumps({"question": f"Q{i}?", "answer": f"A{i}"}) + "\n" for i in range(count))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "0 rows are not a whole number of authors"),
        (some_rows(39), "39 rows are not a whole number of authors"),
        (some_rows(40) + "{", r"full\.json:41: not JSON"),
        (some_rows(20), "forget: forget10 of 1 authors is 0"),
        (some_rows(39) + '{"question": "Q?"}', r"full\.json:40: answer: missing"),
    ],
    ids=["empty", "part-of-an-author", "broken-line", "too-few-authors", "no-answer"],
)
def test_malformed_full(tmp_path, content, said):
    (tmp_path / "full.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        tofu_corpus(tmp_path)


def test_malformed_perturbed_file_is_named(tofu, tmp_path):
    shutil.copy(tofu / "full.json", tmp_path)
    (tmp_path / "forget10_perturbed.json").write_text('{"question": "Q?", "answer": "A", "perturbed_answer": "one"}\n')
    with pytest.raises(ValueError, match=r"forget10_perturbed\.json:1: perturbed_answer"):
        tofu_corpus(tmp_path)
