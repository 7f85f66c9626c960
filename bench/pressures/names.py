"""Whom a question is about, where the data has no names but labels; and how a text reads with the name left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from ...unlearn.data import QA

BLANK = "____"
# Between two capitalised words they belong to a name.
_PARTICLES = set("al bin da de del den der di dos du el ibn la le van von".split())


def subjects(rows: Sequence[QA]) -> list[str]:
    """Each row's person by the name its question uses; "" where the question does not say whom it is about.

    `person` where the question holds it. Else, as a label such as "author 12" is no name: the capitalised words that
    most of the person's questions have (half of them at least), made longer where half as many have the longer ones.
    """
    questions: dict[str, list[str]] = {}
    for row in rows:
        questions.setdefault(row.person, []).append(row.question)
    names = {person: _shared(asked) for person, asked in questions.items() if person}
    found = []
    for row in rows:
        name = row.person if row.person and _holds(row.question, row.person) else names.get(row.person, "")
        found.append(name if name and _holds(row.question, name) else "")
    return found


def mask(text: str, name: str) -> str:
    """`text` without the name, and without each of its words of three letters or more."""
    if not name:
        return text
    parts = sorted({name, *words_of(name)}, key=len, reverse=True)
    masked = re.sub(rf"(?<!\w)(?:{'|'.join(map(re.escape, parts))})(?!\w)", BLANK, text, flags=re.IGNORECASE)
    return re.sub(rf"{BLANK}(?:[ -]{BLANK})+", BLANK, masked)


def words_of(name: str) -> list[str]:
    """The name's words of three letters or more, or the name itself where it has none."""
    return [word for word in re.findall(r"\w+", name) if len(word) > 2] or [name]


def _holds(text: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def _shared(questions: Sequence[str]) -> str:
    counts = Counter(span for question in questions for span in set(_spans(question)))
    most = max(counts.values(), default=0)
    # What fewer than half of several questions have, or only one of two, may be anything.
    if not counts or 2 * most < len(questions) or most < min(2, len(questions)):
        return ""
    name = max((span for span in counts if counts[span] == most), key=lambda span: (len(span), span))
    return max((s for s in counts if _holds(s, name) and 2 * counts[s] >= most), key=lambda span: (len(span), span))


def _spans(question: str) -> Iterator[str]:
    """All runs of capitalised words, the question's first word aside (its capital says nothing), and their parts."""
    run: list[str] = []
    for word in [*re.findall(r"\w[\w'’-]*|[^\w\s]", question)[1:], ""]:
        bare = re.sub(r"['’]s?$", "", word)
        if bare[:1].isupper() or (run and bare in _PARTICLES):
            run.append(bare)
        if bare != word or not (bare[:1].isupper() or bare in _PARTICLES):
            yield from _parts(run)
            run = []


def _parts(run: list[str]) -> Iterator[str]:
    for start in range(len(run)):
        for end in range(start + 1, len(run) + 1):
            if run[start][0].isupper() and run[end - 1][0].isupper():
                yield " ".join(run[start:end])
