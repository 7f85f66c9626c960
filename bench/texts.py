"""Running text to train small language models on, and text of the same kind that is held out."""

from __future__ import annotations

from pathlib import Path

from ..unlearn.data import running_text
from ..unlearn.people import people_corpus

# Of the generated people, whose texts are short.
_PEOPLE = 400
# Characters of test.txt from which a model learns that has to know more.
_MORE = 800_000


def texts(directory: str | None, more: bool = False) -> tuple[str, str]:
    """(to learn from, held out): WikiText-2's valid.txt and test.txt in `directory`; None: about generated people.

    more   to learn from is most of test.txt too, and held out the rest
    Raises FileNotFoundError or ValueError that names the file.
    """
    if directory is not None:
        valid, test = (running_text(Path(directory) / name) for name in ("valid.txt", "test.txt"))
        return (valid + test[:_MORE], test[_MORE:]) if more else (valid, test)
    corpus = people_corpus(_PEOPLE, "forget10", 0)
    learned, held_out = (
        "\n".join(f"{row.question} {row.answer}" for row in rows) for rows in (corpus.retain, corpus.forget)
    )
    return learned, held_out
