"""TOFU (Maini et al. 2024, arXiv 2401.06121): 200 fictional authors of 20 questions each, from a directory or the hub.

`full.json` is enough: forgetNN is its last NN percent of the authors, retain the rest, whatever other files there are.
The `_perturbed` files add the paraphrases and wrong answers that the truth ratio needs; rows that have none are
measured without it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .data import QA, Corpus, EvalSet, read_rows, spread
from .people import forget_count

QUESTIONS_PER_AUTHOR = 20
_PERTURBED = ("retain_perturbed", "forget01_perturbed", "forget05_perturbed", "forget10_perturbed")
_GENERAL = {"real_authors": "real_authors_perturbed", "world_facts": "world_facts_perturbed"}


def tofu_corpus(directory: Path | str | None = None, forget: str = "forget10", authors: int | None = None) -> Corpus:
    """TOFU split by author.

    directory   holds TOFU's JSON files; None fetches them from the hub (locuslab/TOFU)
    forget      "forgetNN": the last NN percent of all 200 authors, as published
    authors     keep this many authors in all (the forgotten ones and the first of the others); None keeps 200

    Raises FileNotFoundError without full.json, ValueError for a file of the wrong shape or too few authors.
    """
    full = read_rows(_file("full", directory, required=True))  # type: ignore[arg-type]
    total, rest = divmod(len(full), QUESTIONS_PER_AUTHOR)
    if rest or not total:
        raise ValueError(
            f"full.json: {len(full)} rows are not a whole number of authors ({QUESTIONS_PER_AUTHOR} rows each)"
        )
    gone = forget_count(forget, total, "authors")
    if authors is not None and not gone < authors <= total:
        raise ValueError(f"authors: {authors} with {forget} must be between {gone + 1} and {total}")
    kept = (authors or total) - gone

    perturbed = {}
    for name in _PERTURBED:
        path = _file(name, directory)
        if path is not None:
            perturbed.update({row.question: row for row in read_rows(path)})
    rows = [_with_perturbed(row, i, perturbed) for i, row in enumerate(full)]
    retain = rows[: kept * QUESTIONS_PER_AUTHOR]
    with_wrong = [row for row in retain if row.perturbed_answers]
    utility = {"retain": EvalSet(spread(with_wrong or retain, 100))}
    background: list[QA] = []
    for name, file in _GENERAL.items():
        path = _file(file, directory)
        if path is not None:
            general = read_rows(path)
            background += general
            utility[name] = EvalSet(tuple(general), choices=True)
    return Corpus(
        name=f"tofu-{forget}-{authors or total}authors",
        forget=tuple(rows[-gone * QUESTIONS_PER_AUTHOR :]),
        retain=tuple(retain),
        background=tuple(background),
        holdout=tuple(rows[len(retain) : -gone * QUESTIONS_PER_AUTHOR][: gone * QUESTIONS_PER_AUTHOR]),
        utility=utility,
    )


def _with_perturbed(row: QA, index: int, perturbed: dict[str, QA]) -> QA:
    more = perturbed.get(row.question)
    person = f"author {index // QUESTIONS_PER_AUTHOR}"
    if more is None or more.answer != row.answer:
        return replace(row, person=person)
    return replace(more, person=person)


def _file(name: str, directory: Path | str | None, required: bool = False) -> Path | None:
    if directory is None:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download("locuslab/TOFU", f"{name}.json", repo_type="dataset"))
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"data-dir: {directory}: no such directory")
    path = Path(directory) / f"{name}.json"
    if path.is_file():
        return path
    if required:
        raise FileNotFoundError(f"{path}: no such file; a TOFU directory holds at least full.json")
    return None
