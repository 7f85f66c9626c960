"""MUSE's texts and evaluation sets from a local folder: which files are taken, in which shape, and what is said when
one is missing; and the same sets made of other corpora."""

import json

import pytest
from remanence.unlearn.data import QA, Corpus, EvalSet
from remanence.unlearn.muse import PROMPT, muse_corpus, muse_data, muse_from_corpus
from remanence.unlearn.people import people_corpus

GONE, KEPT = ["A first report.", "A second one."], ["Something else.", "And more.", "And more still."]


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif path.suffix == ".json":
        path.write_text(json.dumps(texts))
    elif path.suffix == ".txt":
        path.write_text("\n".join(texts))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts, "id": list(range(len(texts)))}), path)


@pytest.mark.parametrize("place", [".", "raw"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", "-00000-of-00001.parquet"])
@pytest.mark.parametrize("kept", ["retain1", "retain"])
def test_texts_of_both_splits(tmp_path, place, ending, kept):
    if "parquet" in ending:
        pytest.importorskip("pyarrow")
    for part, texts in (("forget", GONE), (kept, KEPT)):
        write(tmp_path / place / f"{part}{ending}", texts)
    corpus = muse_corpus("muse-news", tmp_path)
    assert corpus.forget == tuple(QA("", text) for text in GONE)
    assert corpus.retain == tuple(QA("", text) for text in KEPT)
    assert corpus.name == "muse-news-forget"
    assert corpus.utility["retain"].rows == corpus.retain


def test_a_book_is_one_text(tmp_path):
    write(tmp_path / "forget.txt", GONE)
    write(tmp_path / "retain1.txt", KEPT)
    corpus = muse_corpus("muse-books", str(tmp_path))
    assert corpus.forget == (QA("", "\n".join(GONE)),)
    assert len(corpus.retain) == 1


def test_another_split_can_be_forgotten(tmp_path):
    write(tmp_path / "forget_2.jsonl", GONE[:1])
    write(tmp_path / "forget.jsonl", GONE)
    write(tmp_path / "retain1.jsonl", KEPT)
    corpus = muse_corpus("muse-news", tmp_path, "forget_2")
    assert [row.answer for row in corpus.forget] == GONE[:1]
    assert corpus.name == "muse-news-forget_2"


def test_files_of_like_names_are_not_taken(tmp_path):
    """retain1 is preferred to retain; retain2, forget_qa and a part of several are other things."""
    for name, texts in (("forget_qa", KEPT), ("forget", GONE), ("retain2", GONE), ("retain1", KEPT), ("retain", GONE)):
        write(tmp_path / f"{name}.jsonl", texts)
    write(tmp_path / "forget-00000-of-00002.jsonl", KEPT)
    corpus = muse_corpus("muse-news", tmp_path)
    assert [row.answer for row in corpus.forget] == GONE
    assert [row.answer for row in corpus.retain] == KEPT


@pytest.mark.parametrize(
    ("there", "error", "said"),
    [
        (None, FileNotFoundError, "data-dir: .*none: no such directory"),
        ([], FileNotFoundError, "no forget with one of the endings jsonl, json, txt, parquet, nor in raw/"),
        (["forget.jsonl"], FileNotFoundError, "no retain1 or retain with one of the endings"),
        (["retain1.jsonl", "forget.csv"], FileNotFoundError, "no forget with one of"),
    ],
    ids=["folder", "forget", "retain", "ending"],
)
def test_what_is_missing_is_named(tmp_path, there, error, said):
    for name in there or []:
        (tmp_path / name).write_text('"text"\n')
    with pytest.raises(error, match=said):
        muse_corpus("muse-news", tmp_path / "none" if there is None else tmp_path)


def test_a_wrong_row_is_named(tmp_path):
    write(tmp_path / "retain1.jsonl", KEPT)
    (tmp_path / "forget.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(ValueError, match=r"forget\.jsonl:2: question: missing or empty"):
        muse_corpus("muse-news", tmp_path)


def test_a_text_in_both_splits_is_refused(tmp_path):
    write(tmp_path / "forget.jsonl", GONE)
    write(tmp_path / "retain1.jsonl", [*KEPT, GONE[1]])
    with pytest.raises(ValueError, match="forget and retain of muse-news-forget share 1"):
        muse_corpus("muse-news", tmp_path)


def test_a_parquet_file_of_another_shape(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write(tmp_path / "retain1.jsonl", KEPT)
    parquet.write_table(pyarrow.table({"body": GONE}), tmp_path / "forget.parquet")
    with pytest.raises(ValueError, match=r"forget\.parquet: .*text"):
        muse_corpus("muse-news", tmp_path)
    (tmp_path / "forget.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"forget\.parquet"):
        muse_corpus("muse-news", tmp_path)


def rows_of(part, fields, count):
    """Rows with a line separator of Unicode's and quotes in them."""
    return [{field: f'{part} "{field}"\u2028{i}' for field in fields} for i in range(count)]


SETS = {
    "knowmem/forget_qa": ("question", "answer"),
    "knowmem/forget_qa_icl": ("question", "answer"),
    "knowmem/retain_qa": ("question", "answer"),
    "knowmem/retain_qa_icl": ("question", "answer"),
    "verbmem/forget": ("prompt", "gt"),
    "privleak/forget": ("text",),
    "privleak/retain": ("text",),
    "privleak/holdout": ("text",),
}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({key: [row[key] for row in rows] for key in rows[0]}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:  # as in the repository: texts are an array of strings
        path.write_text(json.dumps([row["text"] if set(row) == {"text"} else row for row in rows]))


def write_sets(folder, ending, renamed=()):
    for count, (name, fields) in enumerate(SETS.items(), 1):
        file = dict(renamed).get(name, name)
        write_rows(folder / f"{file}{ending}", [{**row, "id": "0"} for row in rows_of(name, fields, count)])


@pytest.mark.parametrize("ending", [".json", ".jsonl", "-00000-of-00001.parquet"])
@pytest.mark.parametrize("first_version", [False, True])
def test_evaluation_sets_in_every_layout(tmp_path, ending, first_version):
    if "parquet" in ending:
        pytest.importorskip("pyarrow")
    renamed = {name: name.replace("retain", "retain2") for name in SETS} if first_version else {}
    for count, (name, fields) in enumerate(SETS.items(), 1):
        write_rows(tmp_path / f"{renamed.get(name, name)}{ending}", rows_of(name, fields, count))
    data = muse_data("muse-books", tmp_path)
    assert (data.name, data.prompt) == ("muse-books", PROMPT)
    found = {
        "knowmem/forget_qa": data.forget_qa,
        "knowmem/forget_qa_icl": data.forget_icl,
        "knowmem/retain_qa": data.retain_qa,
        "knowmem/retain_qa_icl": data.retain_icl,
        "verbmem/forget": data.verbmem,
        "privleak/forget": data.privleak_forget,
        "privleak/retain": data.privleak_retain,
        "privleak/holdout": data.privleak_holdout,
    }
    for count, (name, fields) in enumerate(SETS.items(), 1):
        rows = [tuple(row.values()) for row in rows_of(name, fields, count)]
        if fields == ("prompt", "gt"):
            assert found[name] == tuple(rows)
        else:
            assert found[name] == tuple(QA(*row) if len(row) == 2 else QA("", *row) for row in rows)


def test_columns_beside_those_asked_for_are_left(tmp_path):
    write_sets(tmp_path, ".jsonl")
    assert len(muse_data("muse-news", tmp_path).verbmem) == 5


@pytest.mark.parametrize("gone", SETS)
def test_a_missing_set_is_named(tmp_path, gone):
    write_sets(tmp_path, ".json")
    (tmp_path / f"{gone}.json").unlink()
    folder, part = gone.split("/")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/{folder}: no {part}.* with one of the endings jsonl"):
        muse_data("muse-news", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data-dir: .*none: no such directory"):
        muse_data("muse-news", tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("knowmem/forget_qa.json", '[{"question": "a", "answer": "b"}, {"question": "a"}]', "row 2: answer: missing"),
        ("knowmem/forget_qa.json", '[{"question": " ", "answer": "b"}]', "row 1: question: missing or empty"),
        ("knowmem/forget_qa.json", '[{"question": ["a"], "answer": "b"}]', "row 1: question: missing or empty"),
        ("knowmem/retain_qa_icl.json", '["text"]', "row 1: expected an object with question and answer, got str"),
        ("verbmem/forget.json", '[{"prompt": "a", "truth": "b"}]', "row 1: gt: missing"),
        ("verbmem/forget.json", '[{"prompt": "a", "gt": "\\ud83d"}]', "row 1: gt: half of a surrogate pair"),
        ("privleak/holdout.json", '["a", 3]', "row 2: expected an object with text, got int"),
        ("privleak/holdout.json", "[]", "holdout.json: no rows"),
        ("privleak/holdout.json", "", "holdout.json: no rows"),
        ("privleak/holdout.json", '["a"\n"b"]', "holdout.json:2: not JSON"),
        ("privleak/forget.json", '{"text": "a"}\n\n{"text": "b"', "forget.json:3: not JSON"),
        ("privleak/forget.json", b'{"text": "a"}\n{"text": "\xff"}', "forget.json:2: not UTF-8"),
    ],
)
def test_a_wrong_row_of_a_set_is_named(tmp_path, file, content, said):
    write_sets(tmp_path, ".json")
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said) as error:
        muse_data("muse-news", tmp_path)
    assert file in str(error.value)


def test_a_wrong_column_of_a_set_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_sets(tmp_path, ".parquet")
    path = tmp_path / "verbmem/forget.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "gt": ["c", None]}), path)
    with pytest.raises(ValueError, match=r"verbmem/forget\.parquet: row 2: gt: missing or empty"):
        muse_data("muse-news", tmp_path)
    parquet.write_table(pyarrow.table({"prompt": ["a"], "truth": ["b"]}), path)
    with pytest.raises(ValueError, match=r"verbmem/forget\.parquet: prompt and gt: not a parquet file with these"):
        muse_data("muse-news", tmp_path)


def test_the_sets_of_a_question_corpus():
    corpus = people_corpus(20, "forget10", 0)
    data = muse_from_corpus(corpus)
    assert data.verbmem == data.forget_qa == data.privleak_forget == corpus.forget
    assert data.privleak_holdout == corpus.holdout
    assert data.retain_qa == data.privleak_retain == corpus.utility["retain"].rows
    assert data.forget_icl == data.retain_icl
    assert data.prompt is None
    assert len(set(data.forget_icl)) == 10
    assert set(data.forget_icl) <= set(corpus.retain) - set(data.retain_qa)
    assert muse_from_corpus(corpus) == data
    assert muse_from_corpus(corpus, seed=1).forget_icl != data.forget_icl


def question(i):
    return QA(f"Question {i}?", f"Answer {i}.")


@pytest.mark.parametrize("utility", [{}, {"retain": EvalSet(tuple(question(i) for i in range(12)))}])
def test_shots_are_not_evaluated_where_rows_are_few(utility):
    """13 rows are kept and 12 or all of them evaluated: 10 shots leave 3."""
    corpus = Corpus("few", (question(99),), tuple(question(i) for i in range(13)), utility=utility)
    data = muse_from_corpus(corpus)
    assert len(set(data.retain_icl)) == 10
    assert len(data.retain_qa) == 3
    assert not set(data.retain_icl) & set(data.retain_qa)
    assert {*data.retain_icl, *data.retain_qa} == set(corpus.retain)
    assert (question(12) in data.retain_icl) or not utility
    assert data.privleak_holdout == ()
    assert len(muse_from_corpus(corpus, shots=12).retain_qa) == 1
    with pytest.raises(ValueError, match="shots: 13 of few, which keeps 13 questions, would leave none to evaluate"):
        muse_from_corpus(corpus, shots=13)
    with pytest.raises(ValueError, match="shots: -1; expected 0 or more"):
        muse_from_corpus(corpus, shots=-1)
    none = muse_from_corpus(corpus, shots=0)
    assert (none.retain_icl, len(none.retain_qa)) == ((), 12 if utility else 13)


def test_running_text_has_no_questions():
    corpus = Corpus("texts", (QA("", GONE[0]),), tuple(QA("", text) for text in KEPT))
    data = muse_from_corpus(corpus)
    assert data.verbmem == data.privleak_forget == corpus.forget
    assert data.privleak_retain == corpus.retain
    assert data.forget_qa == data.forget_icl == data.retain_qa == data.retain_icl == ()
