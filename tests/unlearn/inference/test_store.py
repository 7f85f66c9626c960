"""Guards come back from disk as they were; what is not as it was written is refused with its name."""

import json

import pytest
import torch
from remanence.compress.checkpoint import load_model, load_tokenizer, save_model
from remanence.compress.recipe import parse_recipe
from remanence.compress.stream import compress_to
from remanence.unlearn.inference.builders import BUILDERS
from remanence.unlearn.inference.guarded import Guarded
from remanence.unlearn.inference.store import KINDS, attach, carry, save

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, memorized):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    save_model(memorized.target, memorized.tokenizer, path)
    return path


@pytest.fixture(scope="module")
def guards(memorized, guard_for):
    made = {}

    def build(kind):
        if kind not in made:
            made[kind] = guard_for(kind, memorized.target)
        return made[kind]

    return build


@pytest.fixture(scope="module")
def inputs(memorized):
    corpus = memorized.corpus
    rows = [*corpus.forget[:2], *corpus.retain[:2]]
    batch = memorized.encoder.batch([(row.question, row.answer) for row in rows])
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def test_every_kind_has_a_builder():
    assert set(KINDS) == set(BUILDERS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_comes_back_bit_for_bit(kind, guards, inputs, checkpoint, memorized, tmp_path):
    save(guards(kind), tmp_path)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    back = attach(model, tokenizer, tmp_path)
    assert isinstance(back, Guarded)
    assert back.base is model
    with torch.no_grad():
        wanted = Guarded(memorized.target, guards(kind))(**inputs).logits
        assert torch.equal(back(**inputs).logits, wanted)
        assert not torch.equal(wanted, memorized.target(**inputs).logits)
    assert back.guard.config == guards(kind).config
    save(back, tmp_path / "again")
    for file in ("guard.json", "guard/tensors.safetensors", "guard/assistant/model.safetensors"):
        assert (tmp_path / file).exists() == (tmp_path / "again" / file).exists()
        if (tmp_path / file).exists():
            assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    with pytest.raises(FileExistsError, match="a directory holds one guard"):
        save(guards(kind), tmp_path)


def test_without_a_guard_the_model_is_itself(tmp_path, memorized):
    assert attach(memorized.target, memorized.tokenizer, tmp_path) is memorized.target
    carry(tmp_path, tmp_path / "nowhere", lambda *_: pytest.fail("there is nothing to compress"))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", ["uld", "eco"])
def test_a_guard_goes_along_with_a_compressed_model(kind, guards, inputs, checkpoint, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    recipe = parse_recipe("rtn-w4a16-g32-plain")
    save_model(load_model(checkpoint), load_tokenizer(checkpoint), source)
    save(guards(kind), source)
    # A reader of the model must not take the guard's tensors for weights.
    compress_to(source, recipe, target)
    carry(source, target, lambda start, end: compress_to(start, recipe, end))
    model, tokenizer = load_model(target), load_tokenizer(target)
    back = attach(model, tokenizer, target)
    with torch.no_grad():
        logits = back(**inputs).logits
        assert not torch.equal(logits, model(**inputs).logits)
        assert not torch.equal(logits, Guarded(load_model(source), guards(kind))(**inputs).logits)
    assistant = target / "guard" / "assistant"
    if kind == "uld":
        assert "quantization_config" in json.loads((assistant / "config.json").read_text())
    else:
        assert not assistant.exists()


def edited(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(extra=1), "extra: unknown key"),
        (lambda v: v.pop("kind"), "kind: missing"),
        (lambda v: v.update(kind="lamb"), "kind: 'lamb' is not one of uld, whp, eco, icu, filter"),
        (lambda v: v.update(kind=["eco"]), r"kind: \['eco'\] is not one of"),
        (lambda v: v.update(settings=3), "settings: expected an object, got int"),
        (lambda v: v["settings"].update(streng=1.0), "settings.streng: unknown key"),
        (lambda v: v["settings"].pop("threshold"), "settings.threshold: missing"),
        (lambda v: v["settings"].update(strength="1"), "settings.strength: expected float, got '1'"),
        (lambda v: v["settings"].update(threshold=True), "settings.threshold: expected float, got True"),
        (lambda v: v["settings"].update(threshold=1.5), r"settings.threshold: 1.5 is not in \(0, 1\)"),
        (lambda v: v["settings"].update(strength=float("nan")), "settings.strength: nan is not a number from 0"),
        (lambda v: v["settings"].update(prompt="{question}"), "prompt: '{question}' ends with the question"),
        (lambda v: v.update(kind="icu", settings={"text": " "}), "settings.text: empty"),
        (lambda v: v.update(kind="uld", settings={"weight": 1.0, "ratio": 0.1}), "settings.weight: 1.0 is not in"),
    ],
)
def test_a_wrong_guard_json_is_refused_by_name(change, message, guards, tmp_path, memorized):
    save(guards("eco"), tmp_path)
    edited(tmp_path / "guard.json", change)
    with pytest.raises(ValueError, match=message) as error:
        attach(memorized.target, memorized.tokenizer, tmp_path)
    assert str(error.value).startswith(str(tmp_path / "guard.json"))


def test_damaged_files_are_refused_by_name(guards, tmp_path, memorized, untrained):
    save(guards("eco"), tmp_path)
    file = tmp_path / "guard" / "tensors.safetensors"
    whole = file.read_bytes()

    def refused(message, model=memorized.target):
        with pytest.raises(ValueError, match=message) as error:
            attach(model, memorized.tokenizer, tmp_path)
        assert str(tmp_path) in str(error.value)

    refused("gate_weight: shape .* this model needs .32.", untrained("llama", vocabulary=512))
    file.write_bytes(whole[: len(whole) // 2])
    refused("not a readable safetensors file")
    file.unlink()
    refused("tensors.safetensors: no such file")
    file.write_bytes(whole)
    (tmp_path / "guard.json").write_text("{")
    refused("guard.json:1: not JSON")
    (tmp_path / "guard.json").write_text(
        json.dumps(
            {"kind": "filter", "settings": {"threshold": 0.5, "similar": 1, "ngram": 2, "prompt": "{question}:"}}
        )
    )
    refused("tensors: .* a filter guard has")
    (tmp_path / "guard.json").write_text(json.dumps({"kind": "uld", "settings": {"weight": -1.0, "ratio": 0.1}}))
    refused("no assistant for the uld guard")


def test_an_assistant_of_another_vocabulary_is_refused(guards, tmp_path, memorized, untrained):
    save(guards("whp"), tmp_path)
    with pytest.raises(ValueError, match="assistant: its vocabulary has 512 tokens, the model's 300"):
        attach(untrained("llama"), memorized.tokenizer, tmp_path)
