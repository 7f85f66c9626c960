"""Recipes with several widths: every layer gets its own, by every quantizer, in memory, streamed, on disk."""

import pytest
import torch
from remanence.compress.checkpoint import load_model, save_model
from remanence.compress.linear import QuantLinear
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.compress.stream import Job, compress_streamed
from remanence.compress.walk import dequantize_
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(2, 300, (4, 40), generator=torch.Generator().manual_seed(0))
WIDTHS = "+w2=model.layers.0.mlp|re:.*1.*q_proj+w8=v_proj"
NAMES = [
    "rtn-w4a16-g16",
    "hqq-w4a16-g16-asym",
    "gptq-w4a16-g16",
    "gptq-w4a16-g16-asym+act_order=static",
    "awq-w4a16-g16",
    "smoothquant-w4a8",
    "signround-w4a16-g16+iterations=2",
    "flatquant-w4a4+epochs=1",
]


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(people_corpus(4, "forget30"), DemoConfig(vocab_size=320))


def expected(name):
    if name.startswith("model.layers.0.mlp.") or name == "model.layers.1.self_attn.q_proj":
        return 2
    return 8 if name.endswith("v_proj") else 4


def packed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_has_its_width(name, untrained, tokenizer, tmp_path):
    model, base, reports = untrained("llama"), parse_recipe(name), []
    plain = name.split("+")[0]
    recipe = parse_recipe(name.replace(plain, plain + WIDTHS, 1))
    compress_(model, recipe, [IDS] if recipe.calibrated else [], reports.append)
    layers = packed(model)
    assert len(layers) == 14
    assert {key: layer.spec.bits for key, layer in layers.items()} == {key: expected(key) for key in layers}
    assert {report.name: report.bits for report in reports} == {key: expected(key) for key in layers}
    assert all(layer.spec.group_size == base.spec.group_size for layer in layers.values())
    save_model(model, tokenizer, tmp_path / "out", recipe)
    again = load_model(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert {key: layer.spec for key, layer in packed(again).items()} == {k: layer.spec for k, layer in layers.items()}


@pytest.mark.parametrize("name", ["rtn-w4a16-g16", "gptq-w4a16-g16"])
def test_layers_alone_are_what_they_are_in_a_recipe_of_one_width(name, untrained):
    """With data of the dense model (sequential=false) widths do not touch each other inside the first block."""
    extra = "+sequential=false" if name.startswith("gptq") else ""
    data = [IDS] if name.startswith("gptq") else []
    mixed = packed(compress_(untrained("llama"), parse_recipe(f"{name}{extra}{WIDTHS}"), data))
    for bits in (2, 4, 8):
        alone = packed(compress_(untrained("llama"), parse_recipe(name.replace("w4", f"w{bits}") + extra), data))
        for key, layer in mixed.items():
            if layer.spec.bits == bits and (name.startswith("rtn") or ".layers.0." in key):
                assert torch.equal(layer.packed, alone[key].packed)
                assert torch.equal(layer.scale, alone[key].scale)


@pytest.mark.parametrize("name", ["rtn-w4a16-g16", "gptq-w4a16-g16"])
def test_from_shard_to_shard_and_by_from_pretrained(name, untrained, tokenizer, tmp_path):
    recipe = parse_recipe(name + WIDTHS)
    batches = [IDS] if recipe.calibrated else []
    save_model(untrained("llama"), tokenizer, tmp_path / "dense")
    compress_streamed(Job(tmp_path / "dense", recipe, batches), tokenizer, tmp_path / "out")
    memory = compress_(load_model(tmp_path / "dense"), recipe, batches)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(memory))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    torch.testing.assert_close(logits(dequantize_(stock)), logits(memory), rtol=1e-3, atol=1e-3)


def test_a_pattern_that_names_no_layer_is_refused(untrained):
    for name, message in (
        ("rtn-w4a16-g16+w8=v_prj", "w8: 'v_prj' names no module of .* quantized layers; did you mean v_proj"),
        ("rtn-w4a16-g16+w8=re:[", r"w8: 're:\[' is no regular expression"),
        ("rtn-w4a16-g16+w8=lm_head", "w8: 'lm_head' names no module"),
    ):
        with pytest.raises(ValueError, match=message):
            compress_(untrained("llama"), parse_recipe(name))
