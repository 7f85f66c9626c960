"""`remanence export`: from a compressed checkpoint to another engine's directory, or one line and nothing written."""

import json
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from remanence.compress.checkpoint import load_tokenizer, save_model
from remanence.compress.formats import modelslim
from remanence.compress.formats.modelslim_reader import read
from remanence.compress.recipe import parse_recipe
from remanence.compress.stream import compress_to
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus

from remanence.cli import main
from remanence.exporting import FORMATS, export

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def models(untrained, tmp_path_factory):
    """A dense model, and what two recipes make of it."""
    place = tmp_path_factory.mktemp("models")
    save_model(
        untrained("llama"), demo_tokenizer(people_corpus(6, "forget30"), DemoConfig(vocab_size=300)), place / "d"
    )
    compress_to(place / "d", parse_recipe("rtn-w8a8"), place / "w8a8")
    compress_to(place / "d", parse_recipe("rtn-w4a16-g16-plain"), place / "w4a16")
    return place


@pytest.fixture
def command(monkeypatch, capfd):
    """`remanence export` in this process: (exit code, stdout, stderr)."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["remanence", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return SimpleNamespace(code=stop.value.code, **dict(zip(("out", "err"), capfd.readouterr())))

    yield run
    signal.signal(signal.SIGTERM, handler)


def test_what_is_written_and_said(models, command, tmp_path):
    done = command(models / "w8a8", "--format=modelslim", "--out", tmp_path / "new/out", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert made.pop("notes")
    size = sum(path.stat().st_size for path in (tmp_path / "new/out").glob("*.safetensors"))
    # Two blocks of 2 x 32 x 32, 2 x 16 x 32 and 3 x 32 x 64; five norms, embeddings and head.
    parameters = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64) + 5 * 32 + 2 * 300 * 32
    assert made == {
        "out": str(tmp_path / "new/out"),
        "format": "modelslim",
        "types": {"W8A8_DYNAMIC": 14},
        "size_bytes": size,
        "fp16_bytes": 2 * parameters,
        "max_abs_weight_difference": 0.0,
    }
    assert len(read(tmp_path / "new/out")) == 14 + 7
    assert load_tokenizer(tmp_path / "new/out").get_vocab() == load_tokenizer(models / "d").get_vocab()


def test_in_words(models, command, tmp_path):
    done = command(models / "w8a8", "--format=modelslim", "--out", tmp_path / "out", "--no-verify")
    assert done.code == 0, done.err
    assert "types: 14 W8A8_DYNAMIC\n" in done.out
    assert "max_abs_weight_difference" not in done.out
    assert "note: 14 layers were made for inputs with the largest |x| at half the range" in done.err


@pytest.mark.parametrize(
    ("model", "format", "message"),
    [
        ("w8a8", "gguf", "format: 'gguf' is not one of modelslim"),
        ("absent", "modelslim", "absent: no such model directory"),
        ("d", "modelslim", "model: none of its layers is packed; expected one made by `remanence compress`"),
        ("w4a16", "modelslim", "model.layers.0.self_attn.q_proj: has w4a16; expected w8a8, w8a16, w4a4, or w4a4 with"),
    ],
)
def test_what_cannot_be_is_one_line(model, format, message, models, command, tmp_path):
    done = command(models / model, "--format", format, "--out", tmp_path / "new/out")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("remanence: ")
    assert message in done.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_another_place_is_asked_for(models, command, tmp_path):
    (tmp_path / "mine").write_text("")
    done = command(models / "w8a8", "--format=modelslim", "--out", tmp_path)
    assert done.code == 2
    assert "exists and is not empty" in done.err


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weight", lambda q: q + (torch.arange(q.numel()).view(q.shape) == 5).to(q)),
        ("weight_scale", lambda scale: torch.nextafter(scale, 2 * scale)),
    ],
)
def test_what_is_read_back_as_something_else_is_not_kept(part, change, models, command, tmp_path, monkeypatch):
    """One code, or one bit of the scales, of one layer."""
    tensors = modelslim.layer_tensors

    def other(layer, *rest):
        made = tensors(layer, *rest)
        if layer.in_features == 64:
            made[part] = change(made[part])
        return made

    monkeypatch.setattr(modelslim, "layer_tensors", other)
    done = command(models / "w8a8", "--format=modelslim", "--out", tmp_path / "out")
    assert done.code == 1
    assert "mlp.down_proj.weight: read back off by up to" in done.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_when_it_is_read_back_is_not_kept(models, tmp_path, monkeypatch):
    def write(plan, model, tokenizer, work):
        for name in [name for name in plan.types if name.endswith("up_proj")]:
            del model.get_submodule(name.rpartition(".")[0]).up_proj
        modelslim.write(plan, model, tokenizer, work)

    chosen = FORMATS["modelslim"]
    monkeypatch.setitem(FORMATS, "modelslim", type(chosen)(chosen.plan, write, chosen.compare))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight: is not there when it is read back"):
        export(str(models / "w8a8"), "modelslim", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_norm_that_is_read_back_as_another_is_not_kept(models, tmp_path, monkeypatch):
    own = modelslim._own

    def other(module):
        return {name: tensor * 2 if tensor.shape == (32,) else tensor for name, tensor in own(module).items()}

    monkeypatch.setattr(modelslim, "_own", other)
    with pytest.raises(ValueError, match=r"layernorm\.weight: read back off by up to 1; expected the same numbers"):
        export(str(models / "w8a8"), "modelslim", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_maps_and_what_they_leave_in_front_are_compared_too(models, tmp_path, monkeypatch):
    batches = torch.randint(2, 300, (2, 4, 32), generator=torch.Generator().manual_seed(0))
    recipe = parse_recipe("flatquant-w4a4+epochs=1+ignore=lm_head|o_proj")
    compress_to(models / "d", recipe, models / "maps", list(batches))
    made = export(str(models / "maps"), "modelslim", tmp_path / "out")
    assert made["types"] == {"W4A4_FLATQUANT_DYNAMIC": 12}
    assert 0 < made["max_abs_weight_difference"] < 1e-6  # of scales that were divided: float32 twice
    assert any("went into 6 norms and layers in front" in note for note in made["notes"])

    tensors = modelslim.layer_tensors
    monkeypatch.setattr(modelslim, "layer_tensors", lambda *given: tensors(*given) | {"clip_ratio": torch.ones(1)})
    with pytest.raises(ValueError, match=r"q_proj\.weight: read back with another map or clip"):
        export(str(models / "maps"), "modelslim", tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
