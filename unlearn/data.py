"""Question/answer data for unlearning: what is forgotten, what is kept, and how both are read from files.

A row has TOFU's fields (Maini et al. 2024, arXiv 2401.06121). Files are JSON lines or one JSON array of objects
with `question` and `answer`, and optionally `paraphrased_question`, `paraphrased_answer`, `perturbed_answer`; or with
`text` alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class QA:
    """One question with its answer; `perturbed_answers` are wrong answers in the form of the paraphrased one.

    A row of running text (as MUSE has them) has it as its answer and no question.
    """

    question: str
    answer: str
    paraphrased_question: str = ""
    paraphrased_answer: str = ""
    perturbed_answers: tuple[str, ...] = ()
    person: str = ""


@dataclass(frozen=True)
class EvalSet:
    """Rows that a measurement runs over. `choices`: the probability of an answer is its share among its wrong
    options, as TOFU does for real authors and world facts."""

    rows: tuple[QA, ...]
    choices: bool = False


@dataclass(frozen=True)
class Corpus:
    """A forget set, a retain set, and the sets on which utility is measured.

    forget      to be forgotten; the target saw it, the oracle did not
    retain      to be kept; unlearning methods may train on it
    background  what demo models are trained on besides (a pretrained model brings its own)
    holdout     of the same kind as forget, seen by no model (membership inference)
    utility     named evaluation sets, "retain" first
    """

    name: str
    forget: tuple[QA, ...]
    retain: tuple[QA, ...]
    background: tuple[QA, ...] = ()
    holdout: tuple[QA, ...] = ()
    utility: dict[str, EvalSet] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.forget:
            raise ValueError(f"forget: the forget set of {self.name} is empty; at least one row is needed")
        if not self.retain:
            raise ValueError(f"retain: the retain set of {self.name} is empty; at least one row is needed")
        both = {row.question or row.answer for row in self.forget} & {row.question or row.answer for row in self.retain}
        if both:
            raise ValueError(
                f"forget and retain of {self.name} share {len(both)} question(s), first {min(both)!r}; "
                "a row is either forgotten or kept"
            )

    def digest(self) -> str:
        """sha256 over every row of every set."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def read_rows(path: Path | str) -> list[QA]:
    """Read rows from a JSON-lines file or a JSON array; a .txt file is one row of running text.

    Raises FileNotFoundError for a missing file, ValueError naming file and line for anything unreadable.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    text = read_text(path)
    if path.suffix == ".txt":
        if not text.strip():
            raise ValueError(f"{path}: empty; expected running text")
        return [QA("", text)]
    return [_row(value, where) for where, value in json_values(path, text)]


def json_values(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """(where it stands, value) of each row in the text of a JSON array or of JSON lines; ValueError names the line."""
    if text.lstrip().startswith("["):
        for i, value in enumerate(_array(path, text), 1):
            yield f"{path}: row {i}", value
        return
    # Not splitlines(): JSON strings may hold U+2028, U+0085 and other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
            yield f"{path}:{number}", value


def read_text(path: Path) -> str:
    """A text file's content; ValueError names the line that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        bad = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{bad}: not UTF-8 text ({error.reason})") from None


def running_text(path: Path | str) -> str:
    """A UTF-8 text file that is not empty; FileNotFoundError or ValueError names it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"text: {path}: no such file")
    text = read_text(Path(path))
    if not text.strip():
        raise ValueError(f"text: {path}: empty; expected running text")
    return text


def _array(path: Path, text: str) -> list[object]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None


def _row(value: object, where: str) -> QA:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with question and answer, got {type(value).__name__}")
    texts = {}
    for key in ("question", "answer", "paraphrased_question", "paraphrased_answer", "person"):
        text = value.get(key)
        if not isinstance(text, str | None):
            raise ValueError(f"{where}: {key}: expected text, got {type(text).__name__}")
        texts[key] = text or ""
    if "text" in value:
        return _text_row(value, where)
    for key in ("question", "answer"):
        if not texts[key].strip():
            raise ValueError(f"{where}: {key}: missing or empty; every row needs a question and an answer")
    perturbed = [] if value.get("perturbed_answer") is None else value["perturbed_answer"]
    if not isinstance(perturbed, list) or not all(isinstance(p, str) and p.strip() for p in perturbed):
        raise ValueError(f"{where}: perturbed_answer: expected a list of non-empty texts")
    for text in (*texts.values(), *perturbed):
        _whole(text, where)
    return QA(perturbed_answers=tuple(perturbed), **texts)


def _whole(text: str, where: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: half of a surrogate pair in {text[:80]!r}; the escapes \\uXXXX come in pairs there")


def _text_row(value: dict[str, object], where: str) -> QA:
    both = sorted({"question", "answer"} & value.keys())
    if both:
        raise ValueError(f"{where}: text: beside {both[0]}; a row is running text, or a question with its answer")
    text = value["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: text: missing or empty; expected running text")
    _whole(text, where)
    return QA("", text)


def own_corpus(forget: Path | str, retain: Path | str | None, data: Path | str | None = None) -> Corpus:
    """A corpus from a user's files. With `data` given, forget must be part of it, and retain defaults to the rest.

    Raises ValueError when the forget set is not part of the data, or neither `retain` nor `data` is given.
    """
    forget_rows = read_rows(forget)
    if data is None and retain is None:
        raise ValueError("retain: missing; give --retain FILE, or --data FILE with all rows")
    if data is not None:
        all_rows = read_rows(data)
        check_subset(forget_rows, all_rows, str(data))
        if retain is None:
            gone = {(row.question, row.answer) for row in forget_rows}
            retain_rows = [row for row in all_rows if (row.question, row.answer) not in gone]
        else:
            retain_rows = read_rows(retain)
            check_subset(retain_rows, all_rows, str(data), what="retain")
    else:
        assert retain is not None
        retain_rows = read_rows(retain)
    utility = {"retain": EvalSet(spread(retain_rows, 100))}
    return Corpus(f"own:{Path(forget).name}", tuple(forget_rows), tuple(retain_rows), utility=utility)


def requests(forget: tuple[QA, ...], count: int) -> list[tuple[QA, ...]]:
    """The forget set in `count` requests of like size, in order; a person's rows stay together.

    Raises ValueError when there are fewer people (or rows, where rows name nobody) than requests.
    """
    people: dict[str, list[QA]] = {}
    for i, row in enumerate(forget):
        people.setdefault(row.person or f"row {i}", []).append(row)
    groups = list(people.values())
    if not 1 <= count <= len(groups):
        raise ValueError(f"requests: {count}: the forget set is of {len(groups)} people; between 1 and that many")
    bounds = [i * len(groups) // count for i in range(count + 1)]
    return [tuple(row for group in groups[a:b] for row in group) for a, b in pairwise(bounds)]


def forgetting_first(corpus: Corpus, count: int, forgotten: int) -> Corpus:
    """The corpus when only the first `forgotten` of `count` requests have been made; the others are kept."""
    parts = requests(corpus.forget, count)
    if not 1 <= forgotten <= count:
        raise ValueError(f"request: {forgotten} is not one of the {count} requests")
    if forgotten == count:
        return corpus
    gone = tuple(row for part in parts[:forgotten] for row in part)
    kept = tuple(row for part in parts[forgotten:] for row in part)
    name = f"{corpus.name}-{forgotten}of{count}"
    return replace(corpus, name=name, forget=gone, retain=corpus.retain + kept)


def check_subset(part: list[QA], whole: list[QA], name: str, what: str = "forget") -> None:
    """Raise ValueError unless every row of `part` is a row of `whole` (same question, same answer)."""
    known = {(row.question, row.answer) for row in whole}
    strangers = [row for row in part if (row.question, row.answer) not in known]
    if strangers:
        raise ValueError(
            f"{what}: {len(strangers)} of {len(part)} rows are not in the data ({name}), "
            f"first {strangers[0].question or strangers[0].answer[:80]!r}; the {what} set must be a subset of the data"
        )


def spread(rows: Sequence[Item], most: int) -> tuple[Item, ...]:
    """At most `most` rows, evenly spread over all of them, in order."""
    if len(rows) <= most:
        return tuple(rows)
    return tuple(rows[i * len(rows) // most] for i in range(most))
