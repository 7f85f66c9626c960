"""The generator of fictional people: seeded, split by person, with neighbours kept and wrong answers wholly wrong."""

import re

import pytest
from remanence.unlearn.people import people_corpus

# (people, forget): from the smallest corpus to TOFU's size.
SIZES = [
    (2, "forget50"),
    (3, "forget50"),
    (4, "forget25"),
    (5, "forget20"),
    (7, "forget15"),
    (20, "forget10"),
    (81, "forget10"),
    (81, "forget50"),
    (200, "forget01"),
    (200, "forget50"),
]
sizes = pytest.mark.parametrize(("people", "forget"), SIZES, ids=lambda value: str(value))

# The paraphrased answers, written down again: every group is one value.
FORMS = {
    "birth": r"on (\d+) (\w+) (\d+), in (\w+)",
    "work": r"in (\w+), as a (\w+)",
    "marriage": r"in (\d+), to (\w+) (\w+)",
    "book": r"on (\w+): The (\w+) (\w+)",
    "home": r"a (\w+), and the (\w+)",
    "capital": r"on the (\w+): (\w+)",
}


def form(row):
    """(topic, values) of a row's paraphrased answer."""
    found = {name: re.fullmatch(pattern, row.paraphrased_answer) for name, pattern in FORMS.items()}
    found = {name: match.groups() for name, match in found.items() if match}
    assert len(found) == 1, row
    return found.popitem()


def persons(rows):
    return {row.person for row in rows if row.person}


def everything(corpus):
    return [*corpus.forget, *corpus.retain, *corpus.holdout]


def test_same_seed_same_corpus():
    assert people_corpus(12, "forget25", seed=5) == people_corpus(12, "forget25", seed=5)


def test_other_seeds_other_people():
    first, second = (people_corpus(20, "forget10", seed=seed) for seed in (0, 1))
    assert not persons(everything(first)) & persons(everything(second))
    assert first.digest() != second.digest()
    assert {row.question for row in first.retain if not row.person}.isdisjoint(
        row.question for row in second.retain if not row.person
    )


@sizes
def test_split_by_person(people, forget):
    corpus = people_corpus(people, forget)
    gone = people * int(forget.removeprefix("forget")) // 100
    parts = [persons(corpus.forget), persons(corpus.retain), persons(corpus.holdout)]
    assert [len(part) for part in parts[:2]] == [gone, people - gone]
    assert len(set.union(*parts)) == people + len(parts[2]), "no person is in two parts"
    for part in (corpus.forget, corpus.retain, corpus.holdout):
        for person in persons(part):
            rows = [row for row in part if row.person == person]
            assert sorted(form(row)[0] for row in rows) == ["birth", "book", "home", "marriage", "work"]
            assert all(person in row.question and person in row.paraphrased_question for row in rows)


@sizes
def test_every_forgotten_person_has_a_kept_neighbour_of_the_same_family_name(people, forget):
    corpus = people_corpus(people, forget)
    near = persons(corpus.utility["neighbours"].rows)
    assert near <= persons(corpus.retain)
    families = {name.split()[1] for name in persons(corpus.retain)}
    assert {name.split()[1] for name in persons(corpus.forget)} <= families
    assert {name.split()[1] for name in near} <= {name.split()[1] for name in persons(corpus.forget)}
    assert not persons(corpus.holdout) & near


@sizes
def test_held_out_people_are_the_forgotten_ones_combined_anew(people, forget):
    corpus = people_corpus(people, forget)
    gone, unseen = persons(corpus.forget), persons(corpus.holdout)
    if len(gone) < 3:  # strangers with names and facts of their own
        assert len(unseen) == len(gone)
        families = {name.split()[1] for name in persons(everything(corpus)) - unseen}
        assert {name.split()[1] for name in unseen}.isdisjoint(families)
        return
    for part in (0, 1):
        assert {name.split()[part] for name in unseen} <= {name.split()[part] for name in gone}
    owners = {}
    for row in corpus.forget:
        owners.setdefault((form(row)[0], row.answer), []).append(row.person)
    count = dict.fromkeys(owners, 0)
    for row in corpus.holdout:
        count[form(row)[0], row.answer] += 1
    # As far as names are free, each fact comes as often as all others.
    assert all(number <= 4 * len(owners[fact]) for fact, number in count.items())
    if len(gone) > 3:
        assert len(unseen) >= 2 * len(gone)


def test_recombination_is_balanced_where_no_name_is_taken():
    from remanence.unlearn.people import _recombined

    corpus = people_corpus(40, "forget20", seed=2)
    names = dict.fromkeys(row.person for row in corpus.forget)
    people = [[row for row in corpus.forget if row.person == name] for name in names]
    distinct = [
        group
        for i, group in enumerate(people)
        if all(set(group[0].person.split()).isdisjoint(other[0].person.split()) for other in people[:i])
    ]
    rows = _recombined(distinct, set())
    names = [row.person for row in rows[::5]]
    assert len(names) == len(set(names)) == 4 * len(distinct)
    for part in (0, 1):
        assert {sum(n.split()[part] == g[0].person.split()[part] for n in names) for g in distinct} == {4}
    assert [row.answer for row in rows].count(distinct[0][0].answer) == 4
    for row in rows:
        (owner,) = [g[0].person for g in distinct if (form(row)[0], row.answer) in {(form(r)[0], r.answer) for r in g}]
        assert set(row.person.split()).isdisjoint(owner.split()), "no part of the name goes with its own facts"
        for question in (row.question, row.paraphrased_question):
            assert row.person in question
            assert owner not in question


@sizes
def test_wrong_answers_are_wrong_in_every_value(people, forget):
    for row in everything(people_corpus(people, forget)):
        topic, truth = form(row)
        assert len(set(row.perturbed_answers)) == 5
        for wrong in row.perturbed_answers:
            match = re.fullmatch(FORMS[topic], wrong)
            assert match, f"{wrong!r} has not the form of {row.paraphrased_answer!r}"
            assert all(a != b for a, b in zip(match.groups(), truth, strict=True)), (wrong, row.paraphrased_answer)


@sizes
def test_paraphrase_says_the_same_in_other_words(people, forget):
    for row in everything(people_corpus(people, forget)):
        _, values = form(row)
        assert set(values) <= set(re.findall(r"\w+", row.answer))
        assert row.paraphrased_answer != row.answer
        assert row.paraphrased_question != row.question


@sizes
def test_answers_do_not_name_the_person(people, forget):
    """A model could earn probability by repeating the question."""
    for row in everything(people_corpus(people, forget)):
        if row.person:
            assert row.person not in row.answer
            assert row.person not in row.paraphrased_answer


@sizes
def test_nothing_of_the_forgotten_is_trained_on(people, forget):
    corpus = people_corpus(people, forget)
    hidden = persons(corpus.forget) | persons(corpus.holdout)
    trained = [*corpus.retain, *corpus.background]
    assert not persons(trained) & hidden
    names = re.compile("|".join(rf"\b{name}\b" for name in hidden))
    assert not any(names.search(row.question) for row in trained)
    forms = {row.paraphrased_question for row in [*corpus.forget, *corpus.holdout]}
    assert forms.isdisjoint(row.question for row in trained)
    # The background is the other form of what is kept, and only that.
    kept = {(row.paraphrased_question, row.paraphrased_answer) for row in corpus.retain}
    assert {(row.question, row.answer) for row in corpus.background} <= kept
    atlas = sum(not row.person for row in corpus.retain)
    half = [-(-count // 2) for count in (len(corpus.retain) - atlas, atlas)]
    assert [sum(bool(row.person) == named for row in corpus.background) for named in (True, False)] == half


@sizes
def test_no_question_is_asked_twice(people, forget):
    questions = [row.question for row in everything(people_corpus(people, forget))]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("people", [20, 40, 100])
def test_splits_are_nested(people):
    """As in TOFU: forget05 is the end of forget10, and both come from one list of people."""
    less, more = people_corpus(people, "forget05"), people_corpus(people, "forget10")
    assert persons(less.forget) < persons(more.forget)
    assert less.forget == more.forget[-len(less.forget) :]
    assert persons(less.forget) | persons(less.retain) == persons(more.forget) | persons(more.retain)
    assert [row for row in less.retain if not row.person] == [row for row in more.retain if not row.person]


def test_utility_sets():
    corpus = people_corpus(81, "forget10")
    assert list(corpus.utility) == ["retain", "neighbours", "general"]
    for name, items in corpus.utility.items():
        assert set(items.rows) <= set(corpus.retain), name
        assert not items.choices
    assert persons(corpus.utility["retain"].rows).isdisjoint(persons(corpus.utility["neighbours"].rows))
    assert not persons(corpus.utility["general"].rows)


@pytest.mark.parametrize(
    ("people", "forget", "said"),
    [
        (80, "forget00", "forget00 of 80 people is 0"),
        (10, "forget05", "forget05 of 10 people is 0"),
        (1, "forget99", "between 1 and 0"),
        (0, "forget10", "forget10 of 0 people is 0"),
        (80, "forget100", "'forget100' is neither a file nor of the form forgetNN"),
        (80, "forget", "neither a file"),
        (80, "10", "neither a file"),
        (80, "forget-5", "neither a file"),
        (80, "retain90", "neither a file"),
    ],
)
def test_refused(people, forget, said):
    with pytest.raises(ValueError, match=said):
        people_corpus(people, forget)
