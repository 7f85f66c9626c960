"""Each form asks for the same fact, over the rows that it can be made of, on a scale where 0 is knowing nothing."""

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from remanence.bench.pressures.forms import _halved, _lettered, _options, _reversed, forms
from remanence.bench.pressures.names import mask, subjects
from remanence.bench.pressures.templates import TEMPLATES
from remanence.bench.tokens import answers
from remanence.unlearn.data import QA
from remanence.unlearn.encode import Encoder
from remanence.unlearn.people import people_corpus
from remanence.unlearn.tofu import tofu_corpus

pytestmark = pytest.mark.usefixtures("one_thread")
LETTERED, BY_LIKELIHOOD = "multiple choice", "multiple choice by likelihood"


@pytest.fixture(scope="module")
def long(memorized):
    return Encoder(memorized.tokenizer, 512)


@pytest.fixture(scope="module")
def found(memorized, long):
    return forms(memorized.target, long, memorized.corpus.forget)


def by_form(results):
    return {(form, result.measure): result for result in results for form in {*result.after, *result.skipped}}


def test_every_form_is_measured_in_its_measures(memorized, found):
    texts = [(form, measure) for form in ("paraphrase", "cloze", "reversed") for measure in ("probability", "rouge")]
    expected = {*texts, ("completion", "rouge"), (LETTERED, "choice"), (BY_LIKELIHOOD, "choice")}
    assert set(by_form(found)) == expected
    plain = [a.probability for a in answers(memorized.target, memorized.encoder, pairs(memorized.corpus.forget))]
    for (form, measure), result in by_form(found).items():
        assert result.name == "forms"
        assert result.notes[form].startswith(f"{len(plain)} rows")
        if measure != "rouge":
            assert result.before == pytest.approx(plain, abs=1e-6)


def pairs(rows):
    return [(row.question, row.answer) for row in rows]


def test_texts_are_what_the_forms_are_made_of(memorized, long, found):
    """Against the same scores of texts written out here."""
    texts = {
        "paraphrase": lambda r: (r.paraphrased_question, r.paraphrased_answer),
        "cloze": lambda r: (f"{r.question} Fill the gap: {halves(r.answer)[0]} ____", halves(r.answer)[1]),
        "reversed": lambda r: (
            f"Whose name is left out? {r.question.replace(r.person, '____')} {r.answer.replace(r.person, '____')}",
            r.person,
        ),
    }
    for form, make in texts.items():
        expected = [a.probability for a in answers(memorized.target, long, [make(r) for r in memorized.corpus.forget])]
        assert by_form(found)[form, "probability"].after[form] == pytest.approx(expected, abs=1e-6)


def halves(answer):
    words = answer.split(" ")
    half = (len(words) + 1) // 2
    return " ".join(words[:half]), " ".join(words[half:])


def test_a_model_that_knows_goes_on_by_itself_and_one_that_does_not_cannot_choose(memorized, long, found):
    target = by_form(found)
    oracle = by_form(forms(memorized.oracle, long, memorized.corpus.forget))
    assert np.mean(target["completion", "rouge"].after["completion"]) > 0.9
    assert np.mean(oracle["completion", "rouge"].after["completion"]) < 0.5
    assert np.mean(target[BY_LIKELIHOOD, "choice"].after[BY_LIKELIHOOD]) > 0.2
    assert abs(np.mean(oracle[BY_LIKELIHOOD, "choice"].after[BY_LIKELIHOOD])) < 0.2


def log_probabilities(model, tokenizer, text, answer, end):
    prompt = tokenizer(text)["input_ids"]
    wanted = tokenizer(" " + answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end
    with torch.no_grad():
        z = model(torch.tensor([prompt + wanted])).logits[0, len(prompt) - 1 : -1].double().numpy()
    z = z - z.max(1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    return np.array([row[token] for row, token in zip(log_p, wanted, strict=True)])


def test_choices_against_numpy(memorized, found):
    likely, lettered = (by_form(found)[form, "choice"] for form in (BY_LIKELIHOOD, LETTERED))
    template, model, tokenizer = TEMPLATES["forms"][LETTERED], memorized.target, memorized.tokenizer
    for i, row in enumerate(memorized.corpus.forget):
        options = [row.paraphrased_answer, *row.perturbed_answers]
        plain = memorized.encoder.prompt.format(question=row.question)
        p = np.exp([log_probabilities(model, tokenizer, plain, option, end=True).mean() for option in options])
        k = len(options)
        assert likely.after[BY_LIKELIHOOD][i] == pytest.approx((p[0] / p.sum() - 1 / k) / (1 - 1 / k), abs=1e-4)
        asked = _lettered(memorized.encoder, row, options, template, seed=0)
        p = np.exp([log_probabilities(model, tokenizer, text, letter, end=False).mean() for text, letter in asked])
        assert lettered.after[LETTERED][i] == pytest.approx((p[0] / p.sum() - 1 / k) / (1 - 1 / k), abs=1e-4)
    share = float(lettered.notes[LETTERED].split("share ")[1].split(" ")[0])
    assert share == pytest.approx(np.mean(lettered.after[LETTERED]) * (1 - 1 / 6) + 1 / 6, abs=1e-3)
    assert lettered.notes[LETTERED].endswith("chance is 0.167")


def test_letters_are_shuffled_by_the_seed_and_the_right_one_comes_first(memorized):
    rows = people_corpus(80, "forget10", seed=0).forget
    places = Counter()
    for row in rows:
        options = _options(row)
        asked = _lettered(memorized.encoder, row, options, "{question}\n{options}", 0)
        assert asked == _lettered(memorized.encoder, row, options, "{question}\n{options}", 0)
        text, right = asked[0]
        listed = dict(line.split(". ", 1) for line in text.split("\n")[1:-1])
        assert list(listed) == list("ABCDEF")
        assert [listed[letter] for _, letter in asked] == options
        assert options[0] == row.paraphrased_answer
        assert {text for text, _ in asked} == {text}
        places[right] += 1
    # 40 rows over 6 letters.
    assert set(places) == set("ABCDEF")
    assert max(places.values()) < 16
    others = [_lettered(memorized.encoder, row, _options(row), "{question}\n{options}", 1)[0][1] for row in rows]
    assert others != [
        _lettered(memorized.encoder, row, _options(row), "{question}\n{options}", 0)[0][1] for row in rows
    ]


def test_a_model_without_a_preference_is_at_chance(memorized, long):
    model = copy.deepcopy(memorized.target)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    results = by_form(forms(model, long, memorized.corpus.forget))
    for form in (LETTERED, BY_LIKELIHOOD):
        assert results[form, "choice"].after[form] == pytest.approx([0.0] * 5, abs=1e-6)


def test_each_form_has_its_own_items(memorized, long):
    a, b, c, d = memorized.corpus.forget[:4]
    rows = [
        replace(a, answer="One", person=""),
        replace(b, perturbed_answers=()),
        replace(c, paraphrased_answer="", perturbed_answers=("x", "x")),
        d,
    ]
    results = by_form(forms(memorized.target, long, rows))
    plain = [answer.probability for answer in answers(memorized.target, long, pairs(rows))]
    for form, measure, chosen in [
        ("paraphrase", "probability", [0, 1, 3]),
        ("cloze", "probability", [1, 2, 3]),
        ("completion", "rouge", [1, 2, 3]),
        ("reversed", "probability", [1, 2, 3]),
        (BY_LIKELIHOOD, "choice", [0, 3]),
        (LETTERED, "choice", [0, 3]),
    ]:
        result = results[form, measure]
        assert f"{len(chosen)} rows, {4 - len(chosen)} left out" in result.notes[form]
        if measure != "rouge":
            assert result.before == pytest.approx([plain[i] for i in chosen], abs=1e-6)


def test_forms_that_no_row_has_are_skipped_with_a_reason(memorized, long):
    results = by_form(forms(memorized.target, long, [QA("who?", "I")]))
    assert all(not result.after for result in results.values())
    assert results["cloze", "probability"].skipped == {"cloze": "no row has what this form is made of"}
    assert results[LETTERED, "choice"].skipped == {LETTERED: "no row has wrong answers to choose from"}
    assert len(results) == 9


def test_forms_that_are_too_long_are_skipped(memorized):
    results = by_form(forms(memorized.target, Encoder(memorized.tokenizer, 76), memorized.corpus.forget))
    assert "this model takes 76" in results[LETTERED, "choice"].skipped[LETTERED]
    assert BY_LIKELIHOOD in results[BY_LIKELIHOOD, "choice"].after


def test_a_file_may_leave_a_form_out(memorized, long):
    table = {"forms": {"cloze": TEMPLATES["forms"]["cloze"]}}
    kept = {form for form, _ in by_form(forms(memorized.target, long, memorized.corpus.forget[:1], templates=table))}
    assert kept == {"cloze", "paraphrase", BY_LIKELIHOOD}


def test_halves_of_answers(memorized):
    rows = [QA("q?", text) for text in ("one", "one two", "one two three", "a b c d")]
    made = _halved(memorized.encoder, rows, "{prompt} {beginning}")
    prompt = "Question: q?\nAnswer: "
    assert made == {1: (prompt + "one", "two"), 2: (prompt + "one two", "three"), 3: (prompt + "a b", "c d")}


def test_names_of_people_are_found_behind_labels():
    rows = people_corpus(80, "forget10", seed=0).forget
    assert subjects(rows) == [row.person for row in rows]
    labelled = [replace(row, person=f"person {i // 5}") for i, row in enumerate(rows)]
    assert subjects(labelled) == [row.person for row in rows]
    assert subjects([replace(row, person="") for row in rows]) == [""] * len(rows)


@pytest.mark.parametrize(
    ("questions", "names"),
    [
        (["Who is Ann Lee?", "Is Ann Lee tall?", "What of Lee's book?"], ["Ann Lee", "Ann Lee", ""]),
        (["Where was Juan de la Cruz born?", "Did Juan de la Cruz sing?"], ["Juan de la Cruz"] * 2),
        (["Is Zoë Ångström, of Oslo, at home?", "Has Zoë Ångström left?"], ["Zoë Ångström"] * 2),
        (["Does she write?", "Where does she live?"], ["", ""]),
        (["Who was in Paris?", "Who was in Rome?"], ["", ""]),
        (["Who is the author of Nightfall?"], ["Nightfall"]),
        (["Is it Urban Fiction?", "Why Urban Fiction?", "Who?", "When?", "Where?"], [""] * 5),
        (["Who?"], [""]),
        (["Bo?", ""], ["", ""]),
    ],
)
def test_names_in_questions(questions, names):
    assert subjects([QA(question, "x", person="author 1") for question in questions]) == names


def test_names_of_tofus_authors(real_data):
    """Real questions: each author has one name, which all but the first question or two say."""
    corpus = tofu_corpus(real_data("tofu", "full.json").parent, "forget05")
    names = subjects(corpus.forget)
    for author in {row.person for row in corpus.forget}:
        own = Counter(name for row, name in zip(corpus.forget, names, strict=True) if row.person == author)
        assert len(own) == 2
        assert own[""] <= 2
    assert "Moshe Ben-David" in names
    made = _reversed(Encoder(None, 512), corpus.forget, "{masked_question} {masked_answer}")
    assert len(made) > 0.9 * len(names)
    assert not [text for text, name in made.values() if name.split()[-1] in text]


@pytest.mark.parametrize(
    ("text", "name", "masked"),
    [
        ("What did Ann Lee's mother do?", "Ann Lee", "What did ____'s mother do?"),
        ("Lee, or ANN, wrote it.", "Ann Lee", "____, or ____, wrote it."),
        ("Is Annabel Leeds here?", "Ann Lee", "Is Annabel Leeds here?"),
        ("Hsiao Yun-Hwa and Yun-Hwa", "Hsiao Yun-Hwa", "____ and ____"),
        ("Bo Li met Bo.", "Bo Li", "____ met Bo."),
        ("C. (x) [y", "C. (x)", "____ [y"),
        ("Nothing here", "", "Nothing here"),
    ],
)
def test_names_are_masked(text, name, masked):
    assert mask(text, name) == masked


def test_a_row_that_still_tells_the_name_is_left_out(memorized):
    rows = [
        QA("Where was Ann Lee born?", "In Leeds, as Annabel wrote", person="Ann Lee"),
        QA("Whom did Ann Lee meet?", "Bob", person="Ann Lee"),
    ]
    template = TEMPLATES["forms"]["reversed"]
    made = _reversed(memorized.encoder, rows, template)
    text = "Question: Whose name is left out? Whom did ____ meet? Bob\nAnswer:"
    assert made == {1: (text, "Ann Lee")}
