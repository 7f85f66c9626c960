"""From what an audit is asked to forget to the rows themselves; without torch, so that bad data is said at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import AuditConfig
from .unlearn.data import QA, Corpus, EvalSet, check_subset, own_corpus, read_rows, spread
from .unlearn.people import forget_count, people_corpus
from .unlearn.tofu import QUESTIONS_PER_AUTHOR, tofu_corpus

# Authors a demo model keeps beside the forgotten ones: it learns them in minutes, and all have perturbed answers.
_KEPT_AUTHORS = 18


def load_corpus(config: AuditConfig) -> Corpus:
    """The data that `config` names."""
    if config.data == "people":
        people = config.people or 80
        corpus = people_corpus(people, _share(config.forget, people), config.seed)
        return _reforget(corpus, config.forget) if Path(config.forget).is_file() else corpus
    if config.data == "tofu":
        return _tofu(config)
    corpus = own_corpus(config.forget, config.retain, config.data)
    for name, rows in (("forget", corpus.forget), ("retain", corpus.retain)):
        if not all(row.question for row in rows):
            raise ValueError(f"{name}: has rows of running text; an audit asks questions (unlearn takes both)")
    return corpus


def rows_by_source(
    data: str | None, data_dir: str | None, retain: str | None, forget: str | None, seed: int
) -> dict[str, Sequence[QA]]:
    """What `--data`, or `--retain` and `--forget`, give a verb that looks at rows: those that are there, by source."""
    if data is not None:
        given: dict[str, Any] = {"forget": forget} if forget else {}
        corpus = load_corpus(AuditConfig(data=data, data_dir=data_dir, seed=seed, **given))
        return {"retain": corpus.retain, "forget": corpus.forget}
    return {name: read_rows(path) for name, path in (("retain", retain), ("forget", forget)) if path}


def check_sources(wanted: Collection[str], what: object, data: str | None, **files: str | None) -> None:
    """ValueError where `what` needs data of a kind that is not given. files: of retain and forget rows, of text; `data`
    has rows of both kinds."""
    for source, file in files.items():
        if source in wanted and file is None and (source == "text" or data is None):
            raise ValueError(f"{source}: missing; {what} needs it; give --{source} FILE")


def _tofu(config: AuditConfig) -> Corpus:
    """All authors for a given model; 18 kept beside the forgotten ones for a demo model, unless the number is given."""
    if config.model != "demo" or config.people is not None:
        corpus = tofu_corpus(config.data_dir, _share(config.forget, 200), config.people)
        return _reforget(corpus, config.forget) if Path(config.forget).is_file() else corpus
    if Path(config.forget).is_file():
        # The file may name any author: take all, forget the file's, then keep only so many of the others.
        corpus = _reforget(tofu_corpus(config.data_dir, "forget01"), config.forget)
        kept = {row.person for row in corpus.retain[: _KEPT_AUTHORS * QUESTIONS_PER_AUTHOR]}
        retain = tuple(row for row in corpus.retain if row.person in kept)
        rows = corpus.utility["retain"].rows
        utility = {
            **corpus.utility,
            "retain": EvalSet(tuple(r for r in rows if r.person in kept) or spread(retain, 100)),
        }
        return replace(corpus, retain=retain, utility=utility, holdout=())
    gone = forget_count(config.forget, 200, "authors")
    return tofu_corpus(config.data_dir, config.forget, min(200, gone + _KEPT_AUTHORS))


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
    if not kept:
        raise ValueError(f"retain: {file} names someone in every group of rows; nothing is left to keep")
    lost = {row.question for row in gone}
    utility = {}
    for name, items in corpus.utility.items():
        left = tuple(row for row in items.rows if row.question not in lost)
        if left:
            utility[name] = EvalSet(left, items.choices)
    if "retain" not in utility:
        utility = {"retain": EvalSet(spread(kept, 60)), **utility}
    background = tuple(row for row in corpus.background if not row.person or row.person not in people)
    return replace(
        corpus,
        name=f"{corpus.name}+{Path(file).name}",
        forget=tuple(gone),
        retain=tuple(kept),
        background=background,
        utility=utility,
    )
