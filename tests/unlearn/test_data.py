"""Rows from files, a user's own corpus, and what both refuse."""

import json
import os
import subprocess
import sys

import pytest
from remanence.unlearn.data import (
    QA,
    Corpus,
    EvalSet,
    forgetting_first,
    own_corpus,
    read_rows,
    requests,
    running_text,
    spread,
)

ROWS = [
    {"question": "Who?", "answer": "Ann"},
    {
        "question": "Where?",
        "answer": "Rome",
        "paraphrased_question": "In which place?",
        "paraphrased_answer": "It is Rome",
        "perturbed_answer": ["It is Oslo", "It is Bonn"],
        "person": "Ann",
    },
]
READ = [
    QA("Who?", "Ann"),
    QA("Where?", "Rome", "In which place?", "It is Rome", ("It is Oslo", "It is Bonn"), "Ann"),
]


def lines(rows=ROWS, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        lines(),
        lines().rstrip("\n"),
        lines(end="\r\n"),
        lines(end="\n\n  \n"),
        "\n\r\n" + lines(),
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2).replace("\n", "\r\n"),
        "\n  " + json.dumps(ROWS),
        json.dumps(ROWS, ensure_ascii=True),
        lines([row | {"unknown": [1, {"deep": None}]} for row in ROWS]),
        lines([dict.fromkeys(ROWS[1]) | row for row in ROWS]),
    ],
    ids=[
        "json-lines",
        "no-last-newline",
        "crlf",
        "blank-lines",
        "blank-lines-first",
        "array",
        "array-indented-crlf",
        "array-after-space",
        "array-ascii",
        "unknown-fields",
        "null-is-missing",
    ],
)
def test_read_rows(tmp_path, content):
    assert read_rows(write(tmp_path / "rows.json", content)) == READ


@pytest.mark.parametrize("content", [lines(), json.dumps(ROWS)], ids=["json-lines", "array"])
def test_byte_order_mark_is_no_part_of_the_text(tmp_path, content):
    """Windows editors write one."""
    assert read_rows(write(tmp_path / "rows.json", b"\xef\xbb\xbf" + content.encode())) == READ


@pytest.mark.parametrize(
    "separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"], ids=lambda c: f"U+{ord(c):04X}"
)
def test_line_separators_inside_a_string(tmp_path, separator):
    """str.splitlines() would cut the row in two. Control characters are escaped in JSON, the others need not be."""
    answer = f"one{separator}two"
    assert read_rows(write(tmp_path / "rows.json", lines([{"question": "Q?", "answer": answer}])))[0].answer == answer


def test_empty_file_has_no_rows(tmp_path):
    assert read_rows(write(tmp_path / "rows.json", "\n \n")) == []


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json: no such file"):
        read_rows(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lines() + "{question: 1}\n", "rows.json:3: not JSON"),
        (lines(end="\r\n\r\n") + '{"question": "Q"\r\n', "rows.json:5: not JSON"),
        ('[\n{"question": "Q",\n"answer": oops}]', "rows.json:3: not JSON"),
        ("[1, 2", "rows.json:1: not JSON"),
        (lines().encode() + b'{"question": "caf\xe9", "answer": "x"}\n', "rows.json:3: not UTF-8"),
        (lines().encode("utf-16"), "rows.json:1: not UTF-8"),
        (b"\xef\xbb\xbf" + lines().encode() + b'{"question": "caf\xe9"}', "rows.json:3: not UTF-8"),
    ],
    ids=["line", "crlf-line", "array-line", "array-cut", "latin-1", "utf-16", "latin-1-after-mark"],
)
def test_unreadable_text_names_file_and_line(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        read_rows(write(tmp_path / "rows.json", content))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "A"}, "question: missing or empty"),
        ({"question": "Q"}, "answer: missing or empty"),
        ({"question": "  ", "answer": "A"}, "question: missing or empty"),
        ({"question": "Q", "answer": None}, "answer: missing or empty"),
        ({"question": 5, "answer": "A"}, "question: expected text, got int"),
        ({"question": "Q", "answer": ["A"]}, "answer: expected text, got list"),
        ({"question": "Q", "answer": "A", "paraphrased_answer": {"a": 1}}, "paraphrased_answer: expected text"),
        ({"question": "Q", "answer": "A", "person": 3}, "person: expected text, got int"),
        ({"question": "Q", "answer": "A", "perturbed_answer": "wrong"}, "perturbed_answer: expected a list"),
        ({"question": "Q", "answer": "A", "perturbed_answer": ["x", 2]}, "perturbed_answer: expected a list"),
        ({"question": "Q", "answer": "A", "perturbed_answer": ["x", " "]}, "perturbed_answer: expected a list"),
        # What is false is not what is missing.
        ({"question": "Q", "answer": "A", "paraphrased_answer": 0}, "paraphrased_answer: expected text, got int"),
        ({"question": "Q", "answer": "A", "person": []}, "person: expected text, got list"),
        ({"question": "Q", "answer": "A", "perturbed_answer": False}, "perturbed_answer: expected a list"),
        (["Q", "A"], "expected an object with question and answer, got list"),
        (7, "expected an object with question and answer, got int"),
        (None, "expected an object with question and answer, got NoneType"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else json.dumps(value)[:60],
)
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_wrong_row_is_named(tmp_path, row, said, layout):
    if layout == "lines":
        content, where = lines([*ROWS, row]), "rows.json:3"
    else:
        content, where = json.dumps([*ROWS, row]), "rows.json: row 3"
    with pytest.raises(ValueError, match=f"{where}: {said}"):
        read_rows(write(tmp_path / "rows.json", content))


def test_half_a_surrogate_pair_is_refused(tmp_path):
    """JSON can spell it, but it is no text: no tokenizer takes it, and it has no digest."""
    with pytest.raises(ValueError, match=r"rows\.json:1"):
        read_rows(write(tmp_path / "rows.json", r'{"question": "Q\ud800", "answer": "A"}'))


def qa(*names):
    return [{"question": f"Who is {name}?", "answer": name} for name in names]


@pytest.fixture
def files(tmp_path):
    """files(forget="a", data="abc") writes one file of rows per name: {name: path}."""

    def make(**names):
        return {key: write(tmp_path / f"{key}.json", lines(qa(*value))) for key, value in names.items()}

    return make


def test_own_corpus_takes_the_rest_of_the_data(files):
    corpus = own_corpus(**files(forget="bd", data="abcde"), retain=None)
    assert [row.answer for row in corpus.forget] == ["b", "d"]
    assert [row.answer for row in corpus.retain] == ["a", "c", "e"]
    assert corpus.utility == {"retain": EvalSet(corpus.retain)}
    assert corpus.name == "own:forget.json"


def test_own_corpus_from_two_files(files):
    corpus = own_corpus(**files(forget="ab", retain="cd"))
    assert [row.answer for row in corpus.retain] == ["c", "d"]


def test_own_corpus_measures_retain_on_at_most_100_rows(files, tmp_path):
    write(tmp_path / "many.json", lines(qa(*map(str, range(250)))))
    corpus = own_corpus(**files(forget="ab"), retain=tmp_path / "many.json")
    assert len(corpus.retain) == 250
    assert len(corpus.utility["retain"].rows) == 100


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"forget": "abx", "data": "abc"}, "forget: 1 of 3 rows are not in the data .*'Who is x\\?'"),
        ({"forget": "a", "retain": "bx", "data": "abc"}, "retain: 1 of 2 rows are not in the data"),
        ({"forget": "abc", "data": "abc"}, "retain: the retain set of own:forget.json is empty"),
        ({"forget": "a", "retain": ""}, "retain: the retain set .* is empty"),
        ({"forget": "", "retain": "a"}, "forget: the forget set .* is empty"),
        ({"forget": "ab", "retain": "bc"}, "share 1 question.*'Who is b\\?'"),
        ({"forget": "ab", "retain": "bc", "data": "abc"}, "share 1 question"),
        ({"forget": "a"}, "retain: missing"),
    ],
    ids=[
        "forget-not-in-data",
        "retain-not-in-data",
        "nothing-left",
        "retain-empty",
        "forget-empty",
        "overlap",
        "overlap-in-data",
        "no-retain",
    ],
)
def test_own_corpus_refuses(files, names, said):
    with pytest.raises(ValueError, match=said):
        own_corpus(**{"retain": None} | files(**names))


def test_same_question_with_another_answer_is_not_in_the_data(tmp_path):
    forget = write(tmp_path / "forget.json", lines([{"question": "Who?", "answer": "Bob"}]))
    data = write(tmp_path / "data.json", lines())
    with pytest.raises(ValueError, match="must be a subset"):
        own_corpus(forget, None, data)


def test_question_that_stays_with_another_answer_is_refused(tmp_path):
    """Forgetting one answer to a question while training on another answer to it is no split."""
    rows = [{"question": "Who?", "answer": "Ann"}, {"question": "Who?", "answer": "Bob"}]
    forget, data = write(tmp_path / "forget.json", lines(rows[:1])), write(tmp_path / "data.json", lines(rows))
    with pytest.raises(ValueError, match="share 1 question"):
        own_corpus(forget, None, data)


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [
        (5, 10, [0, 1, 2, 3, 4]),
        (5, 5, [0, 1, 2, 3, 4]),
        (10, 5, [0, 2, 4, 6, 8]),
        (7, 3, [0, 2, 4]),
        (3, 1, [0]),
        (0, 4, []),
    ],
)
def test_spread(count, most, expected):
    rows = [QA(str(i), "x") for i in range(count)]
    assert [int(row.question) for row in spread(rows, most)] == expected


@pytest.mark.parametrize("count", [101, 137, 199, 3600])
def test_spread_is_even(count):
    chosen = [int(row.question) for row in spread([QA(str(i), "x") for i in range(count)], 100)]
    steps = [b - a for a, b in zip(chosen, [*chosen[1:], count])]
    assert len(chosen) == 100
    assert chosen[0] == 0
    assert max(steps) - min(steps) <= 1


FORGET, RETAIN, OTHER = QA("q1", "a1"), QA("q2", "a2"), QA("q3", "a3")


def test_digest_is_of_the_content():
    first = Corpus("c", (FORGET,), (RETAIN,), utility={"retain": EvalSet((RETAIN,)), "more": EvalSet((OTHER,))})
    again = Corpus("c", (QA("q1", "a1"),), (RETAIN,), utility={"more": EvalSet((OTHER,)), "retain": EvalSet((RETAIN,))})
    assert first.digest() == again.digest()
    assert len(first.digest()) == 64


@pytest.mark.parametrize(
    "other",
    [
        Corpus("d", (FORGET,), (RETAIN, OTHER)),
        Corpus("c", (FORGET, OTHER), (RETAIN,)),
        Corpus("c", (FORGET,), (OTHER, RETAIN)),
        Corpus("c", (FORGET,), (RETAIN,), background=(OTHER,)),
        Corpus("c", (FORGET,), (RETAIN,), holdout=(OTHER,)),
        Corpus("c", (QA("q1", "a1", perturbed_answers=("x",)),), (RETAIN, OTHER)),
        Corpus("c", (QA("q1", "a1", paraphrased_answer="x"),), (RETAIN, OTHER)),
        Corpus("c", (FORGET,), (RETAIN, OTHER), utility={"retain": EvalSet((RETAIN,))}),
        Corpus("c", (FORGET,), (RETAIN, OTHER), utility={"retain": EvalSet((RETAIN,), choices=True)}),
    ],
    ids=["name", "forget", "order", "background", "holdout", "wrong-answers", "paraphrase", "utility", "choices"],
)
def test_digest_changes_with(other):
    plain = Corpus("c", (FORGET,), (RETAIN, OTHER))
    assert other.digest() != plain.digest()
    if other.utility:
        assert other.digest() != Corpus("c", (FORGET,), (RETAIN, OTHER), utility={"retain": EvalSet((OTHER,))}).digest()


def test_digest_and_people_are_the_same_in_every_process():
    """Caches are keyed by it, so nothing may depend on the hash seed."""
    code = "from remanence.unlearn.people import people_corpus; print(people_corpus(10, 'forget20', 3).digest())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


# --- running text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"text": "one"}\n\n{"text": "two\\nlines"}\n'),
        ("rows.json", '[{"text": "one"}, {"text": "two\\nlines", "id": 7}]'),
        ("rows.json", '["one", "two\\nlines"]'),
        ("rows.jsonl", '"one"\n"two\\nlines"\n'),
    ],
    ids=["lines", "array", "array of strings", "lines of strings"],
)
def test_rows_of_text(tmp_path, name, content):
    assert read_rows(write(tmp_path / name, content)) == [QA("", "one"), QA("", "two\nlines")]


def test_a_txt_file_is_one_text(tmp_path):
    text = '{"not": "json"}\n\n[1, 2\n  spaces at the end  \n'
    assert read_rows(write(tmp_path / "book.txt", text)) == [QA("", text)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": ""}, "text: missing or empty; expected running text"),
        ({"text": "  \n"}, "text: missing or empty"),
        ({"text": None}, "text: missing or empty"),
        ({"text": ["one"]}, "text: missing or empty"),
        (
            {"text": "one", "question": "Q"},
            "text: beside question; a row is running text, or a question with its answer",
        ),
        ({"text": "one", "answer": "A"}, "text: beside answer"),
        ("", "text: missing or empty"),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_wrong_text_is_named(tmp_path, row, said, layout):
    rows = [{"text": "one"}, {"question": "Q", "answer": "A"}, row]
    content, where = (lines(rows), "rows.json:3") if layout == "lines" else (json.dumps(rows), "rows.json: row 3")
    with pytest.raises(ValueError, match=f"{where}: {said}"):
        read_rows(write(tmp_path / "rows.json", content))


@pytest.mark.parametrize("row", [{"text": "\ud800"}, "\ud800"], ids=["object", "string"])
def test_half_a_surrogate_pair_in_a_text_is_refused(tmp_path, row):
    with pytest.raises(ValueError, match=r"rows\.json:1: half of a surrogate pair"):
        read_rows(write(tmp_path / "rows.json", json.dumps(row)))


@pytest.mark.parametrize(
    ("content", "said"),
    [(" \n\n", "book.txt: empty; expected running text"), (b"one\ntwo \xe9", "book.txt:2: not UTF-8 text")],
    ids=["empty", "latin-1"],
)
def test_wrong_txt_files(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        read_rows(write(tmp_path / "book.txt", content))


def test_texts_are_told_apart_by_themselves(tmp_path):
    """They have no question; a text in both sets is refused all the same."""
    forget = write(tmp_path / "forget.json", '["one", "two"]')
    retain = write(tmp_path / "retain.json", '["three", "four"]')
    corpus = own_corpus(forget, retain)
    assert [row.answer for row in corpus.retain] == ["three", "four"]
    write(tmp_path / "retain.json", '["three", "two"]')
    with pytest.raises(ValueError, match=r"share 1 question.* first 'two'"):
        own_corpus(forget, retain)
    data = write(tmp_path / "data.json", '["one", "two", "three"]')
    assert [row.answer for row in own_corpus(forget, None, data).retain] == ["three"]
    write(tmp_path / "forget.json", '["one", "six"]')
    with pytest.raises(ValueError, match=r"forget: 1 of 2 rows are not in the data .*'six'"):
        own_corpus(forget, None, data)


def rows_of(*people):
    return tuple(QA(f"q{i} of {name}?", f"a{i}", person=name) for name in people for i in range(3))


def test_requests_keep_people_together():
    rows = rows_of("a", "b", "c", "d", "e")
    for count in range(1, 6):
        parts = requests(rows, count)
        assert tuple(row for part in parts for row in part) == rows
        sizes = [len({row.person for row in part}) for part in parts]
        assert sum(sizes) == 5, "no person in two requests"
        assert max(sizes) - min(sizes) <= 1
    nameless = tuple(QA(f"q{i}?", "a") for i in range(4))
    assert [len(part) for part in requests(nameless, 3)] == [1, 1, 2]
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"requests: {count}: the forget set is of 5 people; between 1 and that"):
            requests(rows, count)


def test_what_was_not_asked_for_yet_is_kept():
    corpus = Corpus("c", rows_of("a", "b", "c"), rows_of("k"))
    first = forgetting_first(corpus, 3, 2)
    assert first.forget == rows_of("a", "b")
    assert first.retain == rows_of("k", "c")
    assert first.name == "c-2of3"
    assert forgetting_first(corpus, 3, 3) is corpus
    with pytest.raises(ValueError, match="request: 4 is not one of the 3 requests"):
        forgetting_first(corpus, 3, 4)


def test_text_files(tmp_path):
    (tmp_path / "t.txt").write_text("words")
    assert running_text(tmp_path / "t.txt") == "words"
    (tmp_path / "e.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"e\.txt: empty"):
        running_text(tmp_path / "e.txt")
    with pytest.raises(FileNotFoundError, match=r"n\.txt: no such file"):
        running_text(tmp_path / "n.txt")
