"""From what an audit is asked to forget to the rows themselves; without torch, so that bad data is said at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .config import AuditConfig
from .unlearn.data import Corpus, EvalSet, check_subset, own_corpus, read_rows
from .unlearn.people import people_corpus
from .unlearn.tofu import tofu_corpus


def load_corpus(config: AuditConfig) -> Corpus:
    """The data that `config` names."""
    if config.data == "people":
        people = config.people or 80
        corpus = people_corpus(people, _share(config.forget, people), config.seed)
    elif config.data == "tofu":
        authors = config.people or (20 if config.model == "demo" else None)
        corpus = tofu_corpus(config.data_dir, _share(config.forget, 200), authors)
    else:
        return own_corpus(config.forget, config.retain, config.data)
    if Path(config.forget).is_file():
        return _reforget(corpus, config.forget)
    return corpus


def _share(forget: str, people: int) -> str:
    """A "forgetNN" as it is; for a file of rows the smallest split, whose place its rows then take."""
    return f"forget{-(-100 // people):02d}" if Path(forget).is_file() else forget


def _reforget(corpus: Corpus, file: str) -> Corpus:
    """The same data, with the rows of `file` forgotten instead, together with all rows of the same people."""
    rows = read_rows(file)
    everything = [*corpus.retain, *corpus.forget]
    check_subset(rows, everything, corpus.name)
    asked = {(row.question, row.answer) for row in rows}
    people = {row.person for row in everything if (row.question, row.answer) in asked and row.person}
    gone = [row for row in everything if row.person in people or (row.question, row.answer) in asked]
    kept = [row for row in everything if row not in gone]
    lost = {row.question for row in gone}
    utility = {}
    for name, items in corpus.utility.items():
        left = tuple(row for row in items.rows if row.question not in lost)
        if left:
            utility[name] = EvalSet(left, items.choices)
    background = tuple(row for row in corpus.background if not row.person or row.person not in people)
    return replace(
        corpus,
        name=f"{corpus.name}+{Path(file).name}",
        forget=tuple(gone),
        retain=tuple(kept),
        background=background,
        utility=utility,
    )
