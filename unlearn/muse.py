"""MUSE (Shi et al. 2024, arXiv 2407.06460): news or books as running text, from a directory or the hub.

The raw splits are enough for unlearning: `forget`, and `retain1` to keep. MUSE's own questions, passages and texts for
membership inference are read from knowmem/, verbmem/ and privleak/; `muse_from_corpus` makes the like of any corpus.
Nothing of the data is shipped here, as it has no licence of its own.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data import QA, Corpus, EvalSet, json_values, read_rows, read_text, spread

_HUB = {"muse-news": "muse-bench/MUSE-News", "muse-books": "muse-bench/MUSE-Books"}
_ENDINGS = ("jsonl", "json", "txt", "parquet")
_HALF = re.compile("[\ud800-\udfff]")
# The form of MUSE's questions. The space at its end is a token of its own for byte-level tokenizers, where no text has
# one; MUSE's numbers are for Llama-2's, which copes.
PROMPT = "Question: {question}\nAnswer: "
SHOTS = 10


@dataclass(frozen=True)
class MuseData:
    """What MUSE's axes are measured on; an axis without rows cannot be measured.

    verbmem    (prompt, what follows it), or a question with its answer, or running text (no question)
    forget_qa, retain_qa      questions about what is forgotten and about what is kept (utility)
    forget_icl, retain_icl    the shots shown before each of them
    privleak_forget, privleak_retain, privleak_holdout    running texts or answers to questions; no model saw holdout
    prompt     format string with {question} for the questions of forget_qa and retain_qa; None: the encoder's own
    """

    name: str
    verbmem: tuple[QA | tuple[str, str], ...]
    forget_qa: tuple[QA, ...]
    forget_icl: tuple[QA, ...]
    retain_qa: tuple[QA, ...]
    retain_icl: tuple[QA, ...]
    privleak_forget: tuple[QA, ...]
    privleak_retain: tuple[QA, ...]
    privleak_holdout: tuple[QA, ...]
    prompt: str | None = None


def muse_corpus(name: str, directory: Path | str | None = None, forget: str = "forget") -> Corpus:
    """The texts of `muse-news` or `muse-books`.

    directory   holds forget.* and retain1.* (or retain.*), itself or in raw/; None fetches them from the hub
    forget      the split that is forgotten; retain1 is kept
    Raises FileNotFoundError naming what is missing, ValueError for a file of the wrong shape.
    """
    sets = {
        part: _texts(_file(name, directory, ("", "raw"), names))
        for part, names in (("f", (forget,)), ("r", ("retain1", "retain")))
    }
    utility = {"retain": EvalSet(spread(sets["r"], 100))}
    return Corpus(f"{name}-{forget}", tuple(sets["f"]), tuple(sets["r"]), utility=utility)


def muse_data(name: str, directory: Path | str | None = None) -> MuseData:
    """MUSE's evaluation sets of `muse-news` or `muse-books`, as its repository or its hub datasets lay them out.

    directory   holds knowmem/{forget_qa,forget_qa_icl,retain_qa,retain_qa_icl}.*, verbmem/forget.* and
                privleak/{forget,retain,holdout}.* (retain2 for retain in its first version); None fetches them
    Raises FileNotFoundError naming what is missing, ValueError naming file and row of a wrong shape.
    """

    def rows(folder: str, parts: tuple[str, ...], fields: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        return _read(_file(name, directory, (folder,), parts), fields)

    def questions(*parts: str) -> tuple[QA, ...]:
        return tuple(QA(question, answer) for question, answer in rows("knowmem", parts, ("question", "answer")))

    def texts(*parts: str) -> tuple[QA, ...]:
        return tuple(QA("", text) for (text,) in rows("privleak", parts, ("text",)))

    return MuseData(
        name=name,
        verbmem=tuple((prompt, truth) for prompt, truth in rows("verbmem", ("forget",), ("prompt", "gt"))),
        forget_qa=questions("forget_qa"),
        forget_icl=questions("forget_qa_icl"),
        retain_qa=questions("retain_qa", "retain2_qa"),
        retain_icl=questions("retain_qa_icl", "retain2_qa_icl"),
        privleak_forget=texts("forget"),
        privleak_retain=texts("retain", "retain2"),
        privleak_holdout=texts("holdout"),
        prompt=PROMPT,
    )


def muse_from_corpus(corpus: Corpus, shots: int = SHOTS, seed: int = 0) -> MuseData:
    """MUSE's axes for any corpus, in the form of its own questions.

    Forgotten passages are its forget rows: the continuation of a question's prompt is the answer. The shots, the same
    for both sets of questions, are drawn from what is kept: rows that are not evaluated as "retain", then, where
    these are too few, evaluated ones, which leave that set. Running texts (no question) have no knowledge axes.
    A model that was trained on one question at a time may lose even what it knows after other questions: measure it
    without shots. Its knowledge axis is then its verbatim one.
    Raises ValueError when shots would leave nothing to evaluate.
    """
    if shots < 0:
        raise ValueError(f"shots: {shots}; expected 0 or more")
    evaluated = corpus.utility["retain"].rows if "retain" in corpus.utility else spread(corpus.retain, 100)
    questions = tuple(row for row in evaluated if row.question)
    asked = {row.question for row in questions}
    rng = random.Random(f"muse/{seed}")
    pool = [row for row in corpus.retain if row.question and row.question not in asked]
    taken = rng.sample(pool, min(shots, len(pool)))
    forget = tuple(row for row in corpus.forget if row.question)
    if forget or questions:
        short = shots - len(taken)
        if short >= len(questions):
            raise ValueError(
                f"shots: {shots} of {corpus.name}, which keeps {len(pool) + len(questions)} questions, "
                "would leave none to evaluate"
            )
        taken += rng.sample(questions, short)
    shown = {row.question for row in taken}
    return MuseData(
        name=corpus.name,
        verbmem=corpus.forget,
        forget_qa=forget,
        forget_icl=tuple(taken),
        retain_qa=tuple(row for row in questions if row.question not in shown),
        retain_icl=tuple(taken),
        privleak_forget=corpus.forget,
        privleak_retain=evaluated,
        privleak_holdout=corpus.holdout,
    )


def _file(name: str, directory: Path | str | None, folders: tuple[str, ...], parts: tuple[str, ...]) -> Path:
    """The first of `parts` that is there, in one of `folders`; on the hub in the last of these."""
    if directory is None:
        return _from_hub(_HUB[name], folders[-1], parts)
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"data-dir: {root}: no such directory")
    for part in parts:
        for place in (root / folder for folder in folders):
            for path in sorted(place.glob(f"{part}*")) if place.is_dir() else []:
                if _is(path.name, part):
                    return path
    others = "".join(f", nor in {folder}/" for folder in folders[1:])
    raise FileNotFoundError(
        f"{root / folders[0]}: no {' or '.join(parts)} with one of the endings {', '.join(_ENDINGS)}{others}"
    )


def _from_hub(repository: str, folder: str, parts: tuple[str, ...]) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        files = HfApi().list_repo_files(repository, repo_type="dataset")
        for part in parts:
            for file in sorted(files):
                if file.startswith(f"{folder}/") and _is(Path(file).name, part):
                    return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except OSError as error:
        raise FileNotFoundError(f"{repository}: not to be had from the hub ({str(error).splitlines()[0]})") from None
    raise FileNotFoundError(f"{repository}: has no {' or '.join(f'{folder}/{part}' for part in parts)}")


def _is(file: str, part: str) -> bool:
    """Whether a file is the split `part`, in one piece: forget.jsonl, forget-00000-of-00001.parquet."""
    return re.fullmatch(rf"{re.escape(part)}(-00000-of-00001)?\.({'|'.join(_ENDINGS)})", file) is not None


def _texts(path: Path) -> list[QA]:
    if path.suffix != ".parquet":
        return read_rows(path)
    return [QA("", text) for (text,) in _columns(path, ("text",)) if text and text.strip()]


def _read(path: Path, fields: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Every row's `fields`, all of them text that is not empty; a row that is a text itself is its only field."""
    if path.suffix == ".parquet":
        found = [(f"{path}: row {i}", row) for i, row in enumerate(_columns(path, fields), 1)]
    else:
        found = [(where, _values(value, fields, where)) for where, value in list(json_values(path, read_text(path)))]
    if not found:
        raise ValueError(f"{path}: no rows")
    for where, row in found:
        for field, text in zip(fields, row, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}: {field}: missing or empty; expected text")
            if _HALF.search(text):
                raise ValueError(f"{where}: {field}: half of a surrogate pair; the escapes \\uXXXX come in pairs there")
    return tuple(row for _, row in found)


def _values(value: object, fields: tuple[str, ...], where: str) -> tuple[Any, ...]:
    if isinstance(value, str) and len(fields) == 1:
        return (value,)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with {' and '.join(fields)}, got {type(value).__name__}")
    return tuple(value.get(field) for field in fields)


def _columns(path: Path, names: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """The rows of a parquet file, these columns of it."""
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path}: parquet needs pyarrow; pip install pyarrow") from None
    try:
        table = parquet.read_table(path, columns=list(names))
        columns = [table.column(name).to_pylist() for name in names]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {' and '.join(names)}: not a parquet file with these columns ({error})") from None
    return list(zip(*columns, strict=True))
