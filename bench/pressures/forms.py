"""The same fact in another form than the trained question (ORT, Ye et al. 2025, arXiv 2506.07795): does forgetting
depend on the form?

paraphrase       the paraphrased question, its answer in the paraphrase's words
cloze            the question with its answer sentence, the second half left out and asked for
completion       the answer's first half given after the prompt: does the model go on by itself ("rouge")? Its
                 probability is left out, as the plain answer is scored by the same tokens after the same text
multiple choice  the options lettered and shuffled in the prompt; the letter is asked for
multiple choice by likelihood    the plain question; how the options' probabilities per token share out
reversed         question and answer with the name left out; the name is asked for

These are forms made of a question and its answer by rule. The paper's are written by hand or by a language model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from string import ascii_uppercase

from transformers import PreTrainedModel

from ...unlearn.data import QA
from ...unlearn.encode import Encoder
from ..tofu import choice_probability, mean
from ..tokens import Answer, answers
from .asking import Asked, answer_tokens, ask, plainly, too_long, whole
from .names import mask, subjects, words_of
from .pressed import Pressed
from .templates import TEMPLATES, Templates, fields, of_kind

_BY_LIKELIHOOD, _LETTERED = "multiple choice by likelihood", "multiple choice"


def forms(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[QA],
    others: Sequence[QA] = (),  # noqa: ARG001 (all pressures of asking take the same)
    templates: Templates = TEMPLATES,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Pressed]:
    """A result per form and measure, each over the rows that the form can be made of; the notes say how many these are.

    Of texts: "probability" of what is asked for and "rouge". Of options: "choice", the share of the true one above
    chance, (share - 1/k)/(1 - 1/k) for k options: 0 at chance, 1 when sure, below 0 when the truth is avoided. `before`
    is the plain question in the trained form: its ROUGE beside "rouge", else its probability. `seed` shuffles options.
    """
    plain = plainly(encoder, rows)
    named = of_kind(templates, "forms")
    texts = {"paraphrase": _paraphrased(encoder, rows)}
    for form, make in {"cloze": _halved, "completion": _halved, "reversed": _reversed}.items():
        if form in named:
            texts[form] = make(encoder, rows, named[form])
    groups = {"": plain, **{form: list(items.values()) for form, items in texts.items()}}
    new_tokens = answer_tokens(encoder, [pair for group in groups.values() for pair in group])
    reasons = {form: _none_of(groups[form]) or too_long(encoder, groups[form], new_tokens) for form in texts}
    found = ask(model, encoder, {f: group for f, group in groups.items() if not reasons.get(f)}, new_tokens, batch_size)
    results = []
    for form, items in texts.items():
        for measure in ("rouge",) if form == "completion" else ("probability", "rouge"):
            before = getattr(found[""], measure)
            if reasons[form]:
                results.append(Pressed("forms", measure, before, {}, {form: reasons[form]}))
                continue
            after = {form: getattr(found[form], measure)}
            results.append(Pressed("forms", measure, [before[i] for i in items], after, notes=_note(form, items, rows)))
    return results + _choices(model, encoder, rows, found[""].probability, named.get(_LETTERED), seed, batch_size)


def _none_of(group: Sequence[Asked]) -> str:
    return "" if group else "no row has what this form is made of"


def _note(form: str, items: Collection[int], rows: Sequence[QA]) -> dict[str, str]:
    left = len(rows) - len(items)
    return {form: f"{len(items)} rows" + (f", {left} left out: this form cannot be made of them" if left else "")}


def _paraphrased(encoder: Encoder, rows: Sequence[QA]) -> dict[int, Asked]:
    return {
        i: (encoder.prompt.format(question=row.paraphrased_question), row.paraphrased_answer)
        for i, row in enumerate(rows)
        if row.paraphrased_question and row.paraphrased_answer
    }


def _halved(encoder: Encoder, rows: Sequence[QA], template: str) -> dict[int, Asked]:
    """Answers of one word have no half."""
    found = {}
    for i, row in enumerate(rows):
        words = row.answer.split()
        half = len(words) - len(words) // 2
        if half < len(words):
            parts = {"question": row.question, "beginning": " ".join(words[:half])}
            found[i] = (_filled(encoder, template, parts), " ".join(words[half:]))
    return found


def _reversed(encoder: Encoder, rows: Sequence[QA], template: str) -> dict[int, Asked]:
    """Rows whose question names the person; no word that starts with the name is left once it is masked."""
    found = {}
    for i, (row, name) in enumerate(zip(rows, subjects(rows), strict=True)):
        masked = {"masked_question": mask(row.question, name), "masked_answer": mask(row.answer, name)}
        left = any(re.search(rf"(?<!\w){re.escape(word)}", text) for word in words_of(name) for text in masked.values())
        if name and not left:
            found[i] = (_filled(encoder, template, masked), name)
    return found


def _filled(encoder: Encoder, template: str, parts: dict[str, str]) -> str:
    if "prompt" in fields(template):
        return template.format(prompt=encoder.prompt.format(question=parts["question"]), **parts)
    return encoder.prompt.format(question=template.format(**parts))


def _choices(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[QA],
    plain: Sequence[float],
    template: str | None,
    seed: int,
    batch_size: int,
) -> list[Pressed]:
    """Both multiple choices, over the rows that have wrong answers."""
    options = {i: found for i, row in enumerate(rows) if (found := _options(row))}
    asked = {_BY_LIKELIHOOD: [[(rows[i].question, option) for option in found] for i, found in options.items()]}
    encoders = {_BY_LIKELIHOOD: encoder, _LETTERED: whole(encoder)}
    if template is not None:
        asked[_LETTERED] = [_lettered(encoder, rows[i], found, template, seed) for i, found in options.items()]
    chances = [1 / len(found) for found in options.values()]
    results = []
    for form, sets in asked.items():
        takes = encoders[form]
        prompts = [(takes.prompt.format(question=text), option) for pairs in sets for text, option in pairs]
        reason = too_long(encoder, prompts, 0) if prompts else "no row has wrong answers to choose from"
        if reason:
            results.append(Pressed("forms", "choice", list(plain), {}, {form: reason}))
            continue
        scored = iter(answers(model, takes, [pair for pairs in sets for pair in pairs], batch_size))
        shares = [_share(form, [next(scored) for _ in pairs]) for pairs in sets]
        above = [(share - chance) / (1 - chance) for share, chance in zip(shares, chances, strict=True)]
        levels = f"share {mean(shares):.3f} where chance is {mean(chances):.3f}"
        notes = {form: f"{_note(form, options, rows)[form]}; {levels}"}
        results.append(Pressed("forms", "choice", [plain[i] for i in options], {form: above}, notes=notes))
    return results


def _options(row: QA) -> list[str]:
    """The true one first, in the form of the wrong ones; none without wrong ones, or when two are the same."""
    found = [row.paraphrased_answer or row.answer, *row.perturbed_answers]
    return found if 1 < len(found) == len(set(found)) <= len(ascii_uppercase) else []


def _lettered(encoder: Encoder, row: QA, options: list[str], template: str, seed: int) -> list[Asked]:
    """The prompt with each letter as its answer, the right one first."""
    order = list(range(len(options)))
    random.Random(f"{seed}/{row.question}").shuffle(order)
    listed = "\n".join(f"{letter}. {options[i]}" for letter, i in zip(ascii_uppercase, order))
    text = _filled(encoder, template, {"question": row.question, "options": listed})
    return [(text, ascii_uppercase[order.index(i)]) for i in range(len(options))]


def _share(form: str, scored: Sequence[Answer]) -> float:
    """Of the first among all by probability per token; of letters without the end, as a model may say more after it.

    Per token, because small vocabularies spell some letters with two: a model that knows nothing must be at chance."""
    nll = [-float(a.log_p[:-1].double().mean()) if form == _LETTERED else a.nll for a in scored]
    return choice_probability(nll[0], nll[1:])
