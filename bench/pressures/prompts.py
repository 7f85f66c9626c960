"""Pressures that change the prompt and leave the weights alone. The texts are in templates.py.

Each gives two results over the same items: "probability" of the true answer, and "rouge", the recall of the greedy
answer. A variant that cannot be had for every row (what it is filled with is missing, or the prompt is too long for the
model) is skipped and says why, as its items would not be those of the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from transformers import PreTrainedModel

from ...unlearn.data import QA
from ...unlearn.encode import Encoder
from .asking import Asked, answer_tokens, ask, plainly, too_long
from .pressed import Pressed
from .templates import TEMPLATES, Templates, fields, of_kind

# Facts or examples put into a prompt at most; fewer where more are too long or there are none.
FACTS = 4
_COUNTED = {"related", "unrelated", "examples"}
_PLAIN = ""  # no template has this name


def in_context(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[QA],
    others: Sequence[QA] = (),
    templates: Templates = TEMPLATES,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Pressed]:
    """Ununlearning (Shumailov et al. 2024, arXiv 2407.00106): the fact, or facts beside it, come back in the context.

    others   rows of other people: the control, by which is seen what any context does
    "answer in context" shows the true answer word by word and measures copying, which any model may do: a reference.
    Other facts of the person are drawn from `rows` and `others`; one that has the row's answer in it is not used.
    """
    return _press("in-context", model, encoder, _Material(encoder, rows, others, seed), templates, batch_size)


def persuasion(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[QA],
    others: Sequence[QA] = (),
    templates: Templates = TEMPLATES,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Pressed]:
    """Persuasive framings of the question, as in SKeB (arXiv 2510.25732); `before` is the plain frame."""
    return _press("persuasion", model, encoder, _Material(encoder, rows, others, seed), templates, batch_size)


def attacks(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[QA],
    others: Sequence[QA] = (),
    templates: Templates = TEMPLATES,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Pressed]:
    """Adversarial prompts of the kinds of RWKU (Jin et al. 2024, arXiv 2406.10890) that a template can make of a row.

    others   retained rows of other people, answered before the question (in-context learning)
    Two are weaker than RWKU's: cross-lingual puts the instruction alone into another language, the question stays as it
    is and its answer is expected as it was taught; synonym manipulation asks the paraphrased question. Multiple choice
    and the reversed question are forms.
    """
    return _press("attacks", model, encoder, _Material(encoder, rows, others, seed), templates, batch_size)


class _Skipped(Exception):
    """A variant that some row cannot be asked under; the reason."""


@dataclass(frozen=True)
class _Material:
    """What templates are filled with."""

    encoder: Encoder
    rows: Sequence[QA]
    others: Sequence[QA]
    seed: int

    def asked(self, template: str, count: int) -> list[Asked]:
        """The template filled for each row, with at most `count` facts, in the encoder's prompt unless it holds one."""
        held = sorted(fields(template))
        columns = zip(*(self.texts(field, count) for field in held), strict=True)
        texts = [template.format(**dict(zip(held, column, strict=True))) for column in columns]
        if "prompt" not in held:
            texts = [self.encoder.prompt.format(question=text) for text in texts]
        return [(text, row.answer) for text, row in zip(texts, self.rows, strict=True)]

    def texts(self, field: str, count: int) -> list[str]:
        """What {field} stands for, for each row."""
        if field in _COUNTED:
            show = self._example if field == "examples" else _fact
            return ["\n".join(show(fact) for fact in facts[:count]) for facts in self.facts(field)]
        if field == "prompt":
            return [self.encoder.prompt.format(question=row.question) for row in self.rows]
        if field == "fact":
            return [_fact(row) for row in self.rows]
        if field == "question":
            return [row.question for row in self.rows]
        self._need([bool(row.paraphrased_question) for row in self.rows], "a paraphrased question")
        if field == "paraphrased_question":
            return [row.paraphrased_question for row in self.rows]
        self._need([bool(row.paraphrased_answer) for row in self.rows], "a paraphrased answer")
        return [f"{row.paraphrased_question} {row.paraphrased_answer}" for row in self.rows]

    def facts(self, field: str) -> list[list[QA]]:
        """For each row the facts that {field} may show, FACTS of them at most."""
        found = self._related if field == "related" else self._unrelated
        what = "another fact of the same person" if field == "related" else "rows of other people"
        self._need([bool(facts) for facts in found], what)
        return found

    @cached_property
    def _related(self) -> list[list[QA]]:
        """The person's other facts, in their order."""
        by_person: dict[str, dict[QA, None]] = {}
        for other in (*self.rows, *self.others):
            by_person.setdefault(other.person, {})[other] = None
        return [
            list(islice((o for o in by_person[row.person] if row.person and _says_nothing_of(row, o)), FACTS))
            for row in self.rows
        ]

    @cached_property
    def _unrelated(self) -> list[list[QA]]:
        """Facts of other people, drawn by the seed and the row's question."""
        found = []
        for row in self.rows:
            drawn = random.Random(f"{self.seed}/{row.question}").sample(range(len(self.others)), len(self.others))
            strangers = (o for i in drawn if not (o := self.others[i]).person or o.person != row.person)
            found.append(list(islice((o for o in strangers if _says_nothing_of(row, o)), FACTS)))
        return found

    def _example(self, row: QA) -> str:
        return f"{self.encoder.prompt.format(question=row.question)} {row.answer}"

    def _need(self, has: list[bool], what: str) -> None:
        lacking = has.count(False)
        if lacking:
            raise _Skipped(f"{lacking} of {len(has)} rows lack {what}, first {self.rows[has.index(False)].question!r}")


def _fact(row: QA) -> str:
    return f"{row.question} {row.answer}"


def _says_nothing_of(row: QA, other: QA) -> bool:
    """Whether `other` is a question, a different one, and does not hold the row's answer."""
    same = other.question in ("", row.question, row.paraphrased_question)
    return not same and row.answer.casefold() not in _fact(other).casefold()


def _press(
    kind: str,
    model: PreTrainedModel,
    encoder: Encoder,
    material: _Material,
    templates: Templates,
    batch_size: int,
) -> list[Pressed]:
    plain = plainly(encoder, material.rows)
    new_tokens = answer_tokens(encoder, plain)
    named = of_kind(templates, kind)
    groups = {_PLAIN: plain}
    skipped, notes = {}, {}
    for name, template in named.items():
        try:
            groups[name], note = _longest_that_fits(material, template, new_tokens)
        except _Skipped as reason:
            skipped[name] = str(reason)
        else:
            notes.update({name: note} if note else {})
    references = tuple(name for name, template in named.items() if _is_reference(fields(template)))
    found = ask(model, encoder, groups, new_tokens, batch_size)
    plain_recall = found.pop(_PLAIN)
    return [
        Pressed(
            kind,
            measure,
            getattr(plain_recall, measure),
            {name: getattr(recall, measure) for name, recall in found.items()},
            skipped,
            notes,
            references,
        )
        for measure in ("probability", "rouge")
    ]


def _longest_that_fits(material: _Material, template: str, new_tokens: int) -> tuple[list[Asked], str]:
    """The template filled with as many facts as the model can take for every row, and how many these are."""
    counted = fields(template) & _COUNTED
    for count in range(FACTS if counted else 1, 0, -1):
        asked = material.asked(template, count)
        reason = too_long(material.encoder, asked, new_tokens)
        if not reason:
            shown = {min(count, len(facts)) for field in counted for facts in material.facts(field)}
            cut = ", as more are too long for this model" if counted and count < FACTS else ""
            return asked, f"facts shown: {min(shown)} to {max(shown)}{cut}" if shown else ""
    raise _Skipped(reason)


def _is_reference(held: set[str]) -> bool:
    """A control has nothing of the person in it; with the answer itself in the prompt, copying is measured."""
    return "fact" in held or held & {*_COUNTED, "paraphrase"} == {"unrelated"}
