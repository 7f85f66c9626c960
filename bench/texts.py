"""Running text to train small language models on, and text of the same kind that is held out."""

from __future__ import annotations

from pathlib import Path

from ..unlearn.data import running_text
from ..unlearn.people import people_corpus

# Of the generated people, whose texts are short.
_PEOPLE = 400


def texts(directory: str | None) -> tuple[str, str]:
    """(to learn from, held out): WikiText-2's valid.txt and test.txt in `directory`; None: about generated people.

    Raises FileNotFoundError or ValueError that names the file.
    """
    if directory is not None:
        return running_text(Path(directory) / "valid.txt"), running_text(Path(directory) / "test.txt")
    corpus = people_corpus(_PEOPLE, "forget10", 0)
    learned, held_out = (
        "\n".join(f"{row.question} {row.answer}" for row in rows) for rows in (corpus.retain, corpus.forget)
    )
    return learned, held_out
