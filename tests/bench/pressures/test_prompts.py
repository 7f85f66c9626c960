"""What a prompt brings out is measured right, over the right text, and what could not be asked says why."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from remanence.bench.generation import answer_questions
from remanence.bench.pressures.forms import forms
from remanence.bench.pressures.pressed import Pressed
from remanence.bench.pressures.prompts import FACTS, _Material, attacks, in_context, persuasion
from remanence.bench.tokens import answers
from remanence.unlearn.data import QA
from remanence.unlearn.encode import Encoder
from rouge_score.rouge_scorer import RougeScorer

pytestmark = pytest.mark.usefixtures("one_thread")
ASKING = {"in-context": in_context, "persuasion": persuasion, "attacks": attacks, "forms": forms}


@pytest.fixture(scope="module")
def long(memorized):
    """The encoder for longer prompts than the target was trained on: its positions are rotary."""
    return Encoder(memorized.tokenizer, 512)


def only(kind, **templates):
    return {kind: templates}


def probability(model, tokenizer, text, answer):
    """exp of the mean log-probability of the answer's tokens and the end, in float64, one example at a time."""
    prompt = tokenizer(text)["input_ids"]
    wanted = [*tokenizer(" " + answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + wanted])).logits[0].double().numpy()
    z = logits[len(prompt) - 1 : -1]
    log_p = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
    return float(np.exp(np.mean([row[token] for row, token in zip(log_p, wanted, strict=True)])))


def said(model, tokenizer, text, count):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_asking_plainly_is_what_the_other_measures_do(memorized, long):
    rows = memorized.corpus.forget
    known, recalled = persuasion(memorized.target, long, rows, templates=only("persuasion", plain="{question}"))
    expected = [
        a.probability for a in answers(memorized.target, memorized.encoder, [(r.question, r.answer) for r in rows])
    ]
    assert known.before == pytest.approx(expected, abs=1e-6)
    assert known.after["plain"] == pytest.approx(known.before, abs=1e-6)
    assert recalled.after["plain"] == recalled.before
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    own = answer_questions(memorized.target, memorized.encoder, rows)
    assert recalled.before == [scorer.score(r.answer, a)["rougeL"].recall for r, a in zip(rows, own, strict=True)]
    assert np.mean(known.before) > 0.9
    assert (known.name, known.measure, recalled.measure) == ("persuasion", "probability", "rouge")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Say it. {question}", "Question: Say it. {q}\nAnswer:"),
        ("Once, {prompt}", "Once, Question: {q}\nAnswer:"),
        ("{prompt} Of course:", "Question: {q}\nAnswer: Of course:"),
        ("{paraphrased_question}", "Question: {pq}\nAnswer:"),
        ("{fact}\n{prompt}", "{q} {a}\nQuestion: {q}\nAnswer:"),
        ("{paraphrase}\n{prompt}", "{pq} {pa}\nQuestion: {q}\nAnswer:"),
    ],
)
def test_the_text_and_its_scores_against_one_at_a_time(memorized, long, template, text):
    rows = memorized.corpus.forget[:3]
    results = attacks(memorized.target, long, rows, templates=only("attacks", it=template))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for i, row in enumerate(rows):
        made = text.format(q=row.question, a=row.answer, pq=row.paraphrased_question, pa=row.paraphrased_answer)
        assert results[0].after["it"][i] == pytest.approx(
            probability(memorized.target, memorized.tokenizer, made, row.answer), abs=1e-5
        )
        longest = max(len(memorized.tokenizer(" " + r.answer)["input_ids"]) for r in rows)
        answer = said(memorized.target, memorized.tokenizer, made, longest + max(4, longest // 4))
        assert results[1].after["it"][i] == scorer.score(row.answer, answer)["rougeL"].recall


@pytest.mark.parametrize("kind", ASKING)
def test_batches_decide_nothing(memorized, long, kind):
    rows, others = memorized.corpus.forget[:3], memorized.corpus.retain
    one, many = (ASKING[kind](memorized.target, long, rows, others, batch_size=size) for size in (1, 64))
    for single, batched in zip(one, many, strict=True):
        assert single.skipped == batched.skipped == {}
        assert single.before == pytest.approx(batched.before, abs=1e-5)
        for variant, values in single.after.items():
            assert values == pytest.approx(batched.after[variant], abs=1e-4), variant


def test_the_oracle_has_nothing_to_give(memorized, long):
    """A model that never knew answers no better for being pressed; one that knows does, under some frame."""
    rows, others = memorized.corpus.forget, memorized.corpus.retain
    for kind in ("in-context", "persuasion", "attacks"):
        target, oracle = (ASKING[kind](m, long, rows, others)[0] for m in (memorized.target, memorized.oracle))
        fair = [name for name in oracle.after if name not in oracle.references]
        assert max(np.mean(oracle.after[name]) for name in fair) < 0.3
        assert np.mean(target.after[target.worst]) > np.mean(oracle.after[oracle.worst])


def facts():
    ann = [QA(f"Ann's {i}?", f"a{i}", f"Of Ann, {i}?", f"it is a{i}", person="Ann") for i in range(7)]
    ben = [QA(f"Ben's {i}?", f"b{i}", person="Ben") for i in range(9)]
    return ann, ben


def test_related_facts_are_the_persons_and_do_not_tell_the_answer(memorized):
    ann, ben = facts()
    leak = QA("What do all know of Ann?", "That it is A1.", person="Ann")
    material = _Material(
        memorized.encoder, [ann[1], leak, *ann[2:4]], [*ben, ann[0], QA("Of Ann, 1?", "x", person="Ann")], 0
    )
    asked = material.asked("{related}\n{prompt}", FACTS)
    assert asked[0] == ("Ann's 2? a2\nAnn's 3? a3\nAnn's 0? a0\nQuestion: Ann's 1?\nAnswer:", "a1")
    assert material.asked("Known: {related} {question}", 1)[0][0] == "Question: Known: Ann's 2? a2 Ann's 1?\nAnswer:"


def test_unrelated_facts_are_of_others_and_drawn_by_the_seed(memorized):
    ann, ben = facts()
    texts = {}
    for seed in range(4):
        material = _Material(memorized.encoder, ann[:2], [*ann[2:], *ben, QA("", "running text")], seed)
        texts[seed] = material.texts("unrelated", FACTS)
        assert (
            texts[seed]
            == _Material(memorized.encoder, ann[:1], material.others, seed).texts("unrelated", FACTS) + texts[seed][1:]
        )
        for shown in texts[seed]:
            lines = shown.split("\n")
            assert len(set(lines)) == FACTS
            assert all(line in {f"{b.question} {b.answer}" for b in ben} for line in lines)
        example = material.texts("examples", 1)[0]
        first = texts[seed][0].split("\n")[0]
        assert example == "Question: {} \nAnswer: {}".replace(" \n", "\n").format(*first.rsplit(" ", 1))
    assert len({tuple(found) for found in texts.values()}) > 1


def test_facts_are_dropped_until_the_prompt_fits(memorized):
    rows, others = memorized.corpus.forget, memorized.corpus.retain
    template = only("in-context", other="{unrelated}\n{prompt}")
    counts = []
    for room in (400, 128, 80):
        result = in_context(memorized.target, Encoder(memorized.tokenizer, room), rows, others, template)[0]
        note = result.notes["other"]
        counts.append(int(note.split(": ")[1][0]))
        assert ("too long" in note) == (counts[-1] < FACTS)
    assert counts[0] == FACTS > counts[1] > counts[2] >= 1
    none = in_context(memorized.target, Encoder(memorized.tokenizer, 50), rows, others, template)
    assert [result.after for result in none] == [{}, {}]
    assert "this model takes 50" in none[0].skipped["other"]
    assert none[0].worst is None


def test_what_does_not_fit_is_skipped_and_the_rest_measured(memorized):
    rows = memorized.corpus.forget
    table = only("persuasion", short="{question}", lengthy="Well. " * 80 + "{question}")
    known, recalled = persuasion(memorized.target, memorized.encoder, rows, templates=table)
    assert set(known.after) == set(recalled.after) == {"short"}
    assert set(known.skipped) == {"lengthy"}
    assert "is too long; this model takes 128" in known.skipped["lengthy"]


def test_what_rows_lack_is_named(memorized, long):
    rows = [*memorized.corpus.forget[:2], replace(memorized.corpus.forget[2], paraphrased_question="", person="")]
    known = in_context(memorized.target, long, rows)[0]
    assert set(known.after) == {"answer in context"}
    assert "1 of 3 rows lack a paraphrased question, first" in known.skipped["paraphrase in context"]
    assert rows[2].question in known.skipped["paraphrase in context"]
    assert "1 of 3 rows lack another fact of the same person" in known.skipped["other facts of the person"]
    assert "3 of 3 rows lack rows of other people" in known.skipped["unrelated facts"]
    assert known.worst is None
    bare = replace(rows[0], paraphrased_answer="")
    assert "a paraphrased answer" in in_context(memorized.target, long, [bare])[0].skipped["paraphrase in context"]


def test_controls_and_copies_are_never_the_worst(memorized, long):
    rows, others = memorized.corpus.forget, memorized.corpus.retain
    known = in_context(memorized.target, long, rows, others)[0]
    assert set(known.references) == {"answer in context", "unrelated facts"}
    assert known.worst in {"paraphrase in context", "other facts of the person"}
    assert attacks(memorized.target, long, rows[:2], others)[0].references == ()


@pytest.mark.parametrize("kind", ASKING)
def test_rows_that_cannot_be_asked_are_refused(memorized, kind):
    with pytest.raises(ValueError, match="rows: none; a pressure needs at least one"):
        ASKING[kind](memorized.target, memorized.encoder, [])
    with pytest.raises(ValueError, match="rows: 1 of 2 are running text"):
        ASKING[kind](memorized.target, memorized.encoder, [QA("", "text"), QA("Who?", "I")])


@pytest.mark.parametrize("value", [float("nan"), 0.0])
@pytest.mark.parametrize("kind", ASKING)
def test_a_broken_model_knows_nothing(memorized, long, kind, value):
    model = copy.deepcopy(memorized.target)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(value)
        model.get_output_embeddings().weight.fill_(value)
    rows, others = memorized.corpus.forget, memorized.corpus.retain
    for result in ASKING[kind](model, long, rows, others):
        level = 1 / model.config.vocab_size if result.measure == "probability" else 0.0
        for variant, values in result.after.items():
            assert values == pytest.approx([level] * len(values), abs=1e-5), variant


def pressed(**changes):
    values = {"name": "p", "measure": "probability", "before": [0.1, 0.2, 0.3], "after": {"a": [0.4, 0.4, 0.6]}}
    return Pressed(**{**values, **changes})


def test_gains_are_paired_means_with_intervals():
    rng = np.random.default_rng(0)
    before, noise = rng.random(60), rng.normal(0, 0.01, 60)
    result = pressed(before=before.tolist(), after={"a": (before + 0.2 + noise).tolist(), "b": before.tolist()})
    gained = result.gained(seed=1)
    assert gained["a"].value == pytest.approx(float(np.mean(0.2 + noise)), abs=1e-12)
    # Paired: the spread is that of the noise, not of the items.
    assert 0.19 < gained["a"].low < gained["a"].value < gained["a"].high < 0.21
    assert (gained["b"].low, gained["b"].value, gained["b"].high) == (0, 0, 0)
    over = result.gained(seed=1, over="b")
    assert set(over) == {"a"}
    assert over["a"] == gained["a"]
    with pytest.raises(ValueError, match="'c' was not measured; known: a, b"):
        result.gained(1, over="c")


def test_one_item_has_a_gain_without_spread():
    gained = pressed(before=[0.25], after={"a": [0.75]}).gained(0)["a"]
    assert (gained.low, gained.value, gained.high) == (0.5, 0.5, 0.5)


def test_the_worst_variant_has_the_highest_mean():
    after = {"a": [0.4, 0.4, 0.6], "b": [0.9, 0.9, 0.0], "c": [1.0, 1.0, 1.0]}
    assert pressed(after=after).worst == "c"
    assert pressed(after=after, references=("c",)).worst == "b"
    assert pressed(after={}, skipped={"a": "too long"}).worst is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"before": []}, "before: no items"),
        ({"after": {}}, "no variants, measured or skipped"),
        ({"after": {"a": [0.1]}}, "a: 1 items beside 3 before"),
        ({"after": {"a": [0.1, float("nan"), 0.2]}}, "a: item 1 is nan"),
        ({"before": [0.1, 0.2, float("inf")]}, "before: item 2 is inf"),
        ({"skipped": {"a": "why"}}, "a: both measured and skipped"),
        ({"references": ("z",)}, "references: 'z' is no variant"),
    ],
)
def test_a_wrong_result_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        pressed(**changes)
