"""`remanence compress` from the inside: orders, calibration data, prediction; what cannot be is said at once."""

import io
import json

import pytest
import torch
from remanence.compress.checkpoint import load_model, load_tokenizer, save_model
from remanence.compress.linear import QuantLinear
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus

from remanence.compressing import Order, compress, show_layers
from remanence.errors import UsageError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model, rows to keep and to forget, a text, and recipes."""
    place = tmp_path_factory.mktemp("files")
    corpus = people_corpus(6, "forget30")
    for name in ("retain", "forget"):
        rows = [json.dumps({"question": row.question, "answer": row.answer}) for row in getattr(corpus, name)]
        (place / f"{name}.jsonl").write_text("\n".join(rows))
    (place / "text.txt").write_text(" ".join(row.answer for row in corpus.retain) * 9)
    (place / "recipe.yaml").write_text("method: gptq\nbits: 4\ngroup_size: 16\ncalibration: retain:3\n")
    return place


@pytest.fixture
def model(untrained, files):
    target = files / "model"
    if not target.exists():
        tokenizer = demo_tokenizer(people_corpus(6, "forget30"), DemoConfig(vocab_size=300))
        save_model(untrained("llama"), tokenizer, target)
    return str(target)


def quantized(path):
    return {name for name, module in load_model(path).named_modules() if isinstance(module, QuantLinear)}


def test_plan_then_run_then_comparison(model, files, tmp_path):
    said, told = [], []
    order = Order(
        model,
        "gptq-w4a16-g16",
        "retain:4,forget:2,text:3,length:64",
        *(str(files / f"{n}.jsonl") for n in ("retain", "forget")),
        text=str(files / "text.txt"),
        device="cpu",
    )
    planned = compress(order, tmp_path / "out", plan_only=True, say=said.append)
    assert planned["recipe"] == "gptq-w4a16-g16@retain:4+forget:2+text:3+length:64"
    assert not (tmp_path / "out").exists()
    made = compress(order, tmp_path / "out", progress=lambda *step: told.append(step), say=said.append)
    assert said[0].startswith("device: cpu, ")
    assert "; kernels: " in said[0]
    assert "of memory at most" in said[1]
    assert "predicted" in said[-1]
    assert made["plan"].keys() == made["actual"].keys() == {"peak_memory", "disk", "seconds"}
    assert made["actual"]["peak_memory"] > 1e8
    assert made["max_abs_logit_difference"] == 0
    assert {layer["name"] for layer in made["layers"]} == quantized(tmp_path / "out")
    assert all(layer["of"] == "outputs" and layer["damp"] == 0.01 for layer in made["layers"])
    assert told[-1][0] < told[-1][1]
    assert any("relative error" in text for _, _, text in told)
    table = io.StringIO()
    show_layers(made["layers"], table)
    assert "in model.layers" in table.getvalue()
    assert " 1.mlp.down_proj " in table.getvalue()
    assert "note" not in table.getvalue()


def test_calibration_is_the_retain_set_or_the_text_unless_said(model, files, tmp_path):
    def settled(**given):
        made = compress(
            Order(model, "gptq-w4a16-g16", device="cpu", **given), tmp_path / "out", plan_only=True, say=str
        )
        return made["recipe"]

    rows = len((files / "retain.jsonl").read_text().splitlines())
    assert settled(retain=str(files / "retain.jsonl")) == f"gptq-w4a16-g16@retain:{rows}"
    assert settled(data="people") == "gptq-w4a16-g16@retain:128"
    pieces = len(load_tokenizer(model)((files / "text.txt").read_text())["input_ids"]) // 128
    assert settled(text=str(files / "text.txt")) == f"gptq-w4a16-g16@text:{pieces}"


def test_a_yaml_recipe_with_its_data(model, files, tmp_path):
    order = Order(model, str(files / "recipe.yaml"), retain=str(files / "retain.jsonl"), device="cpu")
    assert compress(order, tmp_path / "out", plan_only=True, say=str)["recipe"] == "gptq-w4a16-g16@retain:3"


def test_bitsandbytes_is_written_whole(model, tmp_path):
    pytest.importorskip("bitsandbytes", reason="comes with the extra `bnb`")
    made = compress(Order(model, "bnb-nf4", device="cpu"), tmp_path / "out", say=str)
    assert made["max_abs_logit_difference"] == 0
    assert len(made["layers"]) == 14
    with torch.no_grad():
        assert torch.isfinite(load_model(tmp_path / "out")(torch.arange(9)[None]).logits).all()
    with pytest.raises(UsageError, match="not predicted"):
        compress(Order(model, "bnb-nf4"), tmp_path / "other", plan_only=True, say=str)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "dense"}, "recipe: 'dense' compresses nothing"),
        ({"recipe": "gtpq-w4a16"}, "did you mean gptq"),
        ({"recipe": "rtn-w4a16", "calibration": "retain:3"}, "calibration: rtn takes no data"),
        ({"recipe": "rtn-w4a16", "text": "t"}, "text: rtn-w4a16 looks at no data"),
        ({"recipe": "gptq-w4a16", "calibration": "web:3"}, "'web' is not one of"),
        ({"recipe": "rtn-w4a16", "data_dir": "d"}, "data_dir: rtn-w4a16 looks at no data"),
        ({"recipe": "gptq-w4a16", "data": "people", "retain": "r"}, "retain: r beside data: people"),
        ({"recipe": "gptq-w4a16", "retain": "r", "data_dir": "d"}, "data_dir: d goes with --data tofu"),
        ({"recipe": "gptq-w4a16", "retain": "r", "text": "t"}, "text: beside rows; say how much of each"),
        ({"recipe": "gptq-w4a16@retain:2", "calibration": "text:3"}, "calibration: text:3 beside the recipe's own"),
        ({"recipe": "gptq-w4a16"}, "calibration: gptq-w4a16 needs data; give --text FILE"),
        (
            {"recipe": "gptq-w4a16", "text": "t", "calibration": "retain:3"},
            "retain: missing; gptq-w4a16@retain:3",
        ),
        ({"recipe": "magnitude-s50+t_groups=norm"}, r"text: missing; magnitude-s50\+t_groups=norm needs it"),
        ({"recipe": "magnitude-s50+order=prune-unlearn"}, "order: here nothing is unlearned"),
        ({"recipe": "gptq-w4a16", "device": "tpu"}, "device: 'tpu' is not one of auto, cpu"),
    ],
)
def test_orders_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        Order("model", **given)


def test_a_device_that_cannot_be_had(model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UsageError, match=r"device: 'cuda:1' cannot be had: this torch.* is built without CUDA"):
        compress(Order(model, "rtn-w4a16-g16", device="cuda:1"), tmp_path / "out", say=str)
    with pytest.raises(UsageError, match=r"device: bnb-nf4 is made on the CPU, .* leave cuda out"):
        compress(Order(model, "bnb-nf4", device="cuda"), tmp_path / "out", say=str)
    assert not any(tmp_path.iterdir())


def test_more_sequences_than_there_are(model, files, tmp_path):
    order = Order(model, "gptq-w4a16-g16", "forget:5000", forget=str(files / "forget.jsonl"), device="cpu")
    with pytest.raises(ValueError, match="forget:5000 asked for, but there are"):
        compress(order, tmp_path / "out", say=str)
    assert not any(tmp_path.iterdir())
