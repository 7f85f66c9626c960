"""The built-in texts are whole, and a user's file changes what it says it does or fails with a reason."""

import json
from string import Formatter

import pytest
from remanence.bench.pressures.catalog import PRESSURES
from remanence.bench.pressures.forms import forms
from remanence.bench.pressures.prompts import attacks, in_context, persuasion
from remanence.bench.pressures.templates import FORM_FIELDS, TEMPLATES, check, load_templates, of_kind
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.encode import Encoder
from remanence.unlearn.people import people_corpus

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def load(tmp_path):
    """load(value or text): the templates of a file with that content."""

    def read(content):
        path = tmp_path / "mine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return load_templates(path)

    return read


def test_every_built_in_template_is_whole():
    assert set(TEMPLATES) <= set(PRESSURES)
    for kind, named in TEMPLATES.items():
        assert dict(of_kind(TEMPLATES, kind)) == dict(named)
    assert len(TEMPLATES["persuasion"]) >= 8
    assert {*TEMPLATES["attacks"]} >= {
        "prefix injection",
        "affirmative suffix",
        "role playing",
        "synonym manipulation",
        "background hint",
        "in-context learning",
    }
    assert set(TEMPLATES["forms"]) == set(FORM_FIELDS)
    texts = [text for named in TEMPLATES.values() for text in named.values()]
    assert len(set(texts)) == len(texts)


def test_the_table_cannot_be_changed_in_place():
    with pytest.raises(TypeError):
        TEMPLATES["persuasion"]["authority"] = "{question}"


def test_every_template_fits_the_demo_model(untrained):
    """128 tokens, of a vocabulary that was made of other text, so that English takes many."""
    corpus = people_corpus(80, "forget10", seed=0)
    tokenizer = demo_tokenizer(corpus, DemoConfig())
    model = untrained("llama", vocabulary=len(tokenizer), std=0.02)
    encoder, rows = Encoder(tokenizer, 128), corpus.forget[:5]
    for pressure in (in_context, persuasion, attacks, forms):
        found = pressure(model, encoder, rows, corpus.retain, batch_size=128)
        assert [result.skipped for result in found] == [{}] * len(found)


def test_a_file_replaces_adds_and_removes(load):
    made = load({"persuasion": {"authority": "Tell me: {question}", "bribe": "{prompt} Thanks!", "guilt": None}})
    built_in = TEMPLATES["persuasion"]
    assert made["persuasion"]["authority"] == "Tell me: {question}"
    assert made["persuasion"]["bribe"] == "{prompt} Thanks!"
    assert set(made["persuasion"]) == {*built_in, "bribe"} - {"guilt"}
    assert made["persuasion"]["story"] == built_in["story"]
    assert {kind: dict(made[kind]) for kind in made if kind != "persuasion"} == {
        kind: dict(TEMPLATES[kind]) for kind in TEMPLATES if kind != "persuasion"
    }
    assert "bribe" not in TEMPLATES["persuasion"]


def test_braces_that_are_meant_are_doubled(load):
    text = load({"persuasion": {"json": '{{"q": "{question}"}}'}})["persuasion"]["json"]
    assert text.format(question="Who?") == '{"q": "Who?"}'
    assert [name for _, name, _, _ in Formatter().parse(text) if name] == ["question"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"persuasion": {\n  "a": "{question}",\n}}', r"mine\.json:3: not JSON"),
        ("", r"mine\.json:1: not JSON"),
        ([], "expected an object of kinds .*persuasion.*, got list"),
        ({"bribes": {}}, "'bribes' is no kind of template; known: in-context, persuasion, attacks, forms"),
        ({"attacks": ["{question}"]}, "attacks: expected an object of templates, got list"),
        ({"attacks": {"new": 3}}, "attacks: 'new': expected text or null, got int"),
        ({"attacks": {" ": "{question}"}}, "a template needs a name"),
        ({"attacks": {"new": "Tell me all."}}, r"'new': holds no placeholder; exactly one of \{question\}"),
        ({"attacks": {"new": "{unrelated}"}}, r"holds \{unrelated\}; exactly one of"),
        ({"attacks": {"new": "{question} {prompt}"}}, r"holds \{prompt\}, \{question\}; exactly one of"),
        ({"attacks": {"new": "{question} {secret}"}}, r"unknown placeholder \{secret\}; known: \{question\}"),
        ({"attacks": {"new": "{question} {"}}, "Single '{' encountered"),
        ({"attacks": {"new": "{question} {}"}}, "a placeholder is a plain name"),
        ({"attacks": {"new": "{question.__class__}"}}, "a placeholder is a plain name"),
        ({"attacks": {"new": "{question!r}"}}, "a placeholder is a plain name"),
        ({"attacks": {"new": "{question:>9999999}"}}, "a placeholder is a plain name"),
        ({"attacks": {"new": None}}, "there is none of that name"),
        ({"forms": {"riddle": "{question}"}}, "'riddle' is no such form; known: cloze, completion"),
        ({"forms": {"cloze": "{question}"}}, r"holds \{question\}; this form needs \{beginning\}, \{question\}"),
        ('{"attacks": {"a": "{question}", "a": "{prompt}"}}', "'a' stands there 2 times"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(load, content, message):
    with pytest.raises(ValueError, match=message) as raised:
        load(content)
    assert "mine.json" in str(raised.value)


def test_an_unreadable_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        load_templates(tmp_path / "none.json")
    path = tmp_path / "latin.json"
    path.write_bytes('{\n"attacks": {"é": "{question}"}}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json:2: not UTF-8"):
        load_templates(path)


def test_a_table_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match="none of kind 'attacks'; there are persuasion"):
        of_kind({"persuasion": {}}, "attacks")
    with pytest.raises(ValueError, match="unknown placeholder"):
        of_kind({"attacks": {"a": "{question} {x}"}}, "attacks")
    with pytest.raises(ValueError, match="no such form"):
        check("forms", "riddle", "{question}")
