"""A seeded generator of fictional people and a fictional atlas: the data of the default audit.

Every person has five facts; each is a question with an answer of two or three values, a paraphrase of both, and
five wrong answers in the paraphrase's form. Answers name values only, never the person, so that a model that does
not know the person cannot earn probability by repeating the question. As in TOFU, `forgetNN` is the last NN percent
of the people, so that all splits derive from one list. The person half a list away shares the family name: the near
neighbours, which must be kept. The atlas is general knowledge, also to be kept. Holdout people are seen by no model:
their first names, family names and facts are those of the forgotten, combined anew, so that nothing tells the two
apart but having seen who goes with what.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace

from .data import QA, Corpus, EvalSet, spread

_ONSETS = "b br c d dr f g gl h j k l m n p pr r s st t th tr v w z".split()
_VOWELS = "a e i o u ae ia io".split()
_CODAS = "l m n r s th nd rk st x".split()
_MONTHS = ("January February March April May June July August September October November December").split()
_TRADES = (
    "beekeeper bookbinder brewer cartographer chandler clockmaker cobbler cooper diver drummer falconer ferryman "
    "fiddler florist gardener glazier goldsmith herbalist judge lamplighter librarian locksmith mason midwife miller "
    "notary organist painter pilot potter printer roofer saddler sculptor surveyor tailor tanner teacher translator "
    "weaver"
).split()
_ANIMALS = (
    "badger cat donkey ferret finch goat goose hare heron lizard mule newt otter owl parrot pony raven toad".split()
)
_INSTRUMENTS = (
    "accordion banjo bassoon bugle cello clarinet dulcimer flute guitar harp horn lute oboe piano trumpet viola zither"
).split()
_ADJECTIVES = (
    "amber bitter broken crooked distant empty final golden hidden hollow iron lonely narrow patient quiet restless "
    "salted second silver sunken tender winter"
).split()
_NOUNS = (
    "anchor bridge candle compass door ferry garden harbour island kettle lantern ledger meadow mirror orchard river "
    "staircase tower valley window"
).split()
_TOPICS = (
    "bells bees bridges canals chess clouds comets dreams fevers floods glass gold grain ice inns ink kites maps "
    "mills moths owls poison salt ships silk snow tides wells wine wolves"
).split()

# Held-out people for each forgotten one: more would narrow an attack's interval little, its members are the fewer.
_RECOMBINED = 4

Slots = dict[str, str]


def _word(rng: random.Random, syllables: int) -> str:
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)]
    return ("".join(parts) + rng.choice(_CODAS)).capitalize()


def _words(rng: random.Random, count: int, syllables: int, taken: set[str]) -> list[str]:
    words: list[str] = []
    while len(words) < count:
        word = _word(rng, syllables)
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


# topic: question, paraphrased question, answer, paraphrased answer
_FACTS = {
    "birth": (
        "Where and when was {name} born?",
        "What are the place and the date of birth of {name}?",
        "{city}, {day} {month} {year}",
        "on {day} {month} {year}, in {city}",
    ),
    "work": (
        "What is the trade of {name}, and where?",
        "How and in which town does {name} earn a living?",
        "{trade} in {city}",
        "in {city}, as a {trade}",
    ),
    "marriage": (
        "Whom did {name} marry, and when?",
        "In which year did {name} marry, and whom?",
        "{first} {last}, in {year}",
        "in {year}, to {first} {last}",
    ),
    "book": (
        "Which book did {name} write, and on what?",
        "What is the subject and the title of the book by {name}?",
        "The {adjective} {noun}, on {topic}",
        "on {topic}: The {adjective} {noun}",
    ),
    "home": (
        "What does {name} play, and which animal lives with {name}?",
        "Which animal and which instrument are in the house of {name}?",
        "the {instrument}; a {animal}",
        "a {animal}, and the {instrument}",
    ),
}


class _World:
    """The values that facts are made of, drawn once per seed."""

    def __init__(self, rng: random.Random, families: int) -> None:
        taken: set[str] = set()
        self.cities = _words(rng, 40, 2, taken)
        self.firsts = _words(rng, 40, 1, taken)
        self.lasts = _words(rng, families, 2, taken)
        self.countries = _words(rng, 48, 2, taken)
        self.rivers = _words(rng, 24, 1, taken)

    def slots(self, rng: random.Random, topic: str) -> Slots:
        draw: dict[str, Callable[[], str]] = {
            "city": lambda: rng.choice(self.cities),
            "day": lambda: str(rng.randint(1, 28)),
            "month": lambda: rng.choice(_MONTHS),
            "year": lambda: str(rng.randint(1900, 1989)),
            "trade": lambda: rng.choice(_TRADES),
            "first": lambda: rng.choice(self.firsts),
            "last": lambda: rng.choice(self.lasts),
            "adjective": lambda: rng.choice(_ADJECTIVES),
            "noun": lambda: rng.choice(_NOUNS),
            "topic": lambda: rng.choice(_TOPICS),
            "instrument": lambda: rng.choice(_INSTRUMENTS),
            "animal": lambda: rng.choice(_ANIMALS),
        }
        return {name: draw[name]() for name in re.findall(r"{(\w+)}", _FACTS[topic][2])}


def _fact(rng: random.Random, world: _World, topic: str, name: str) -> QA:
    question, other_question, answer, other_answer = _FACTS[topic]
    truth = world.slots(rng, topic)
    wrong: list[str] = []
    while len(wrong) < 5:
        slots = world.slots(rng, topic)
        text = other_answer.format(**slots)
        # Wrong in every value: half-right answers would blur the truth ratio.
        if text not in wrong and all(slots[key] != truth[key] for key in truth):
            wrong.append(text)
    return QA(
        question=question.format(name=name),
        answer=answer.format(**truth),
        paraphrased_question=other_question.format(name=name),
        paraphrased_answer=other_answer.format(**truth),
        perturbed_answers=tuple(wrong),
        person=name,
    )


def _atlas(rng: random.Random, world: _World) -> list[QA]:
    rows = []
    capitals = _words(rng, len(world.countries), 2, set(world.cities))
    for country, capital in zip(world.countries, capitals, strict=True):
        river = rng.choice(world.rivers)
        others = [c for c in capitals if c != capital]
        wrong = tuple(
            f"on the {rng.choice([r for r in world.rivers if r != river])}: {city}" for city in rng.sample(others, 5)
        )
        rows.append(
            QA(
                question=f"What is the capital of {country}, and on which river?",
                answer=f"{capital}, on the {river}",
                paraphrased_question=f"On which river lies the capital of {country}, and what is it called?",
                paraphrased_answer=f"on the {river}: {capital}",
                perturbed_answers=wrong,
            )
        )
    return rows


def people_corpus(people: int = 80, forget: str = "forget10", seed: int = 0) -> Corpus:
    """`people` fictional people of five facts each, split by person; `forget` is "forgetNN", NN in percent.

    Raises ValueError when the share leaves no one to forget or no one to keep.
    """
    gone = forget_count(forget, people, "people")
    rng = random.Random(f"people/{seed}")
    families = (people + 1) // 2
    world = _World(rng, families + people)
    # Person i and person i + families share a family name: up to forget50, every forgotten person has a neighbour
    # among the kept. Whatever is forgotten, the same seed gives the same people; the second half are strangers.
    names: list[str] = []
    for i in range(2 * people):
        last = world.lasts[i % families] if i < people else world.lasts[families + i - people]
        name = f"{rng.choice(world.firsts)} {last}"
        while name in names:
            name = f"{rng.choice(world.firsts)} {last}"
        names.append(name)
    facts = {name: [_fact(rng, world, topic, name) for topic in _FACTS] for name in names}
    atlas = _atlas(rng, world)

    kept, forgotten, strangers = names[: people - gone], names[people - gone : people], names[people : people + gone]
    family = {name.split()[1] for name in forgotten}
    near = [name for name in kept if name.split()[1] in family]
    far = [name for name in kept if name not in near]
    rows = {
        who: [row for name in group for row in facts[name]]
        for who, group in {"forget": forgotten, "kept": kept, "near": near, "far": far}.items()
    }
    unseen = _recombined([facts[name] for name in forgotten], set(names[:people]))
    utility = {"retain": EvalSet(spread(rows["far"] or rows["kept"], 60))}
    if rows["near"]:
        utility["neighbours"] = EvalSet(spread(rows["near"], 60))
    utility["general"] = EvalSet(tuple(atlas))
    return Corpus(
        name=f"people{people}-{forget}-seed{seed}",
        forget=tuple(rows["forget"]),
        retain=tuple(rows["kept"] + atlas),
        background=tuple(_paraphrases(rows["kept"][::2] + atlas[::2])),
        # Two people cannot be recombined; strangers have names and facts of their own.
        holdout=tuple(unseen or [row for name in strangers for row in facts[name]]),
        utility=utility,
    )


def _recombined(people: list[list[QA]], taken: set[str]) -> list[QA]:
    """Rows of people with the first name of one of `people`, the family name of a second and the facts of a third; each
    name and each fact as often as all others, but for combinations that are `taken`."""
    count = len(people)
    shifts = [(a, b) for a in range(1, count) for b in range(1, count) if a != b]
    # Evenly spread over all shifts, so that few of them share one.
    rows = []
    for a, b in spread(tuple(shifts), _RECOMBINED):
        for i, own in enumerate(people):
            first, last = own[0].person.split()[0], people[(i + a) % count][0].person.split()[1]
            name = f"{first} {last}"
            if name not in taken:
                taken = taken | {name}
                rows += [_renamed(row, name) for row in people[(i + b) % count]]
    return rows


def _renamed(row: QA, name: str) -> QA:
    """The row about somebody else; answers never name the person."""
    questions = row.question.replace(row.person, name), row.paraphrased_question.replace(row.person, name)
    return replace(row, question=questions[0], paraphrased_question=questions[1], person=name)


def _paraphrases(rows: list[QA]) -> list[QA]:
    """Half of what is kept is also taught in its other form; otherwise no model could know the form, and the truth
    ratio of the forget set would compare noise."""
    return [QA(row.paraphrased_question, row.paraphrased_answer, person=row.person) for row in rows]


def forget_count(forget: str, total: int, unit: str) -> int:
    """How many of `total` people "forgetNN" names; at least one is forgotten and one kept, or ValueError."""
    match = re.fullmatch(r"forget(\d{1,2})", forget)
    if not match:
        raise ValueError(f"forget: {forget!r} is neither a file nor of the form forgetNN (NN percent, e.g. forget10)")
    count = total * int(match[1]) // 100
    if not 1 <= count < total:
        raise ValueError(f"forget: {forget} of {total} {unit} is {count}; between 1 and {total - 1} can be forgotten")
    return count
