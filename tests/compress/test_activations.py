"""Rounded activations from the recipe to the file and back: bit for bit, and as stock readers run it."""

import json

import pytest
import torch
from remanence.compress.activations import fake_quantize, static_grid
from remanence.compress.checkpoint import load_model, save_model
from remanence.compress.linear import QuantLinear
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.compress.spec import ActivationSpec
from remanence.compress.stream import compress_to
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(0))
BATCHES = [torch.randint(2, 300, (4, 24), generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
RECIPES = [
    "rtn-w8a8",
    "rtn-w8a8-g32-asym+a_symmetric=false",
    "rtn-w4a8-g32",
    "rtn-w4a4",
    "hqq-w4a4-g32-asym+a_clip=0.9",
    "smoothquant-w8a8",
    "smoothquant-w8a8+a_dynamic=false",
    "smoothquant-w4a4+a_symmetric=false+a_dynamic=false",
    "gptq-w4a4-g32+a_search=true",
    "gptq-w4a4+a_fallback=0.02",
    "rtn-w8a8+a_narrow=true",
    "gptq-w4a4-g32+a_search=true+a_fallback=0.02+a_narrow=true",
]


def packed(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.fixture
def dense(untrained):
    def make(arch):
        model = untrained(arch)
        with torch.no_grad():  # inputs with large channels
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    parameter[::11] *= 10
        return model

    return make


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_written_and_read_by_every_way_is_the_same(name, arch, dense, memorized, tmp_path):
    recipe = parse_recipe(name)
    model = dense(arch)
    save_model(model, memorized.tokenizer, tmp_path / "dense")
    compress_(model, recipe, BATCHES)
    expected = logits(model)
    save_model(model, memorized.tokenizer, tmp_path / "memory", recipe)
    made = compress_to(tmp_path / "dense", recipe, tmp_path / "stream", BATCHES if recipe.calibrated else ())
    for directory in ("memory", "stream"):
        assert torch.equal(logits(load_model(tmp_path / directory)), expected)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / directory)), expected)
    a = recipe.activation
    assert made["stock_readable"] == (a.clip == 1 and not a.search and not a.narrow)
    assert {layer["input_bits"] for layer in made["layers"]} <= {recipe.activation.bits, 8}


def positive_peaks(x):
    """The same but for signs: where a row's largest is negative, the last bit of theirs decides between two codes."""
    return x * x.gather(-1, x.abs().argmax(-1, keepdim=True)).sign()


@pytest.mark.parametrize("name", ["rtn-w8a8", "rtn-w8a8+a_symmetric=false", "rtn-w4a8-g32", "rtn-w4a4", *RECIPES[5:8]])
@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_stock_readers_run_every_layer_as_we_do(name, arch, dense, memorized, tmp_path):
    recipe = parse_recipe(name)
    save_model(dense(arch), memorized.tokenizer, tmp_path / "dense")
    compress_to(tmp_path / "dense", recipe, tmp_path / "out", BATCHES if recipe.calibrated else ())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=CompressedTensorsConfig())
    logits(stock)  # which unpacks
    for name, layer in packed(load_model(tmp_path / "out")).items():
        other = stock.get_submodule(name)
        assert type(other) is nn.Linear
        x = positive_peaks(torch.randn(2, 5, layer.in_features)) * (1 if layer.x_scale is None else 3 * layer.x_scale)
        # Where x / scale lies between two codes, the order of two roundings decides.
        off = (layer(x) - other(x)).abs() / layer(x).abs().max()
        assert off.median() < 1e-6
        assert off.max() < 0.05


@pytest.mark.parametrize("name", ["rtn-w8a8", "rtn-w4a4", "rtn-w8a8+a_narrow=true", "gptq-w4a4+r_kind=hadamard"])
def test_results_depend_neither_on_the_batch_nor_on_padding(name, dense):
    recipe = parse_recipe(name)
    model = compress_(dense("llama"), recipe, BATCHES if recipe.calibrated else ())
    alone = logits(model)
    ids = torch.cat([torch.zeros(3, 7, dtype=torch.int64), IDS], 1)
    mask = torch.cat([torch.zeros(3, 7, dtype=torch.int64), torch.ones_like(IDS)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        assert torch.equal(torch.cat([model(row[None]).logits for row in IDS]), alone)
        padded = model(ids, attention_mask=mask, position_ids=positions).logits[:, 7:]
        cache = model(IDS[:, :20], use_cache=True).past_key_values
        later = model(IDS[:, 20:], past_key_values=cache).logits
    for found, expected in ((padded, alone), (later, alone[:, 20:])):
        # Attention adds up in another order; a number in the middle between two codes is one of thousands.
        off = (found - expected).abs().amax(-1) / expected.abs().max()
        assert off.median() < 1e-5


def test_a_mixed_file_names_its_layers(dense, memorized, tmp_path):
    """Layers that fell back to 8 bits, in the config and through the stock reader."""
    recipe = parse_recipe("gptq-w4a4+a_fallback=0.02")
    save_model(dense("llama"), memorized.tokenizer, tmp_path / "dense")
    made = compress_to(tmp_path / "dense", recipe, tmp_path / "out", BATCHES)
    bits = {layer["name"]: layer["input_bits"] for layer in made["layers"]}
    assert set(bits.values()) == {4, 8}
    for layer in made["layers"]:
        assert ("input in 8 bits: error" in layer["note"]) == (layer["input_bits"] == 8)
        assert layer["input_error"] < 0.02
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    for group in config["config_groups"].values():
        assert {bits[name] for name in group["targets"]} == {group["input_activations"]["num_bits"]}
    assert {name: layer.activation.bits for name, layer in packed(load_model(tmp_path / "out")).items()} == bits
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=CompressedTensorsConfig())
    logits(stock)
    for name, layer in packed(load_model(tmp_path / "out")).items():
        x = positive_peaks(torch.randn(2, 5, layer.in_features))
        off = (layer(x) - stock.get_submodule(name)(x)).abs() / layer(x).abs().max()
        assert off.median() < 1e-6


def test_a_narrow_file_is_run_as_its_grid_says(dense, memorized, tmp_path):
    """Layers by the definition in float64, those that fell back to 8 bits too; other readers stop."""
    recipe = parse_recipe("gptq-w4a4+a_fallback=0.02+a_narrow=true")
    save_model(dense("llama"), memorized.tokenizer, tmp_path / "dense")
    compress_to(tmp_path / "dense", recipe, tmp_path / "out", BATCHES)
    assert all(path.name.startswith("remanence") for path in (tmp_path / "out").glob("*.safetensors"))
    layers = packed(load_model(tmp_path / "out"))
    assert {layer.activation.bits for layer in layers.values()} == {4, 8}
    for name, layer in layers.items():
        top = 2 ** (layer.activation.bits - 1) - 1
        x = torch.randn(2, 5, layer.in_features)
        step = x.double().abs().amax(-1, keepdim=True) / top
        y = layer(x)
        off = (y - (x / step).round() * step @ layer.dequantized().double().T).abs() / y.abs().max()
        assert off.median() < 1e-6, name
    with pytest.raises(ValueError, match="symmetric"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=CompressedTensorsConfig())


def test_a_killed_run_writes_the_same_schemes(dense, memorized, tmp_path):
    from remanence.compress.stream import Job, compress_streamed

    recipe = parse_recipe("gptq-w4a4+a_fallback=0.02+a_narrow=true")
    save_model(dense("llama"), memorized.tokenizer, tmp_path / "dense")
    compress_to(tmp_path / "dense", recipe, tmp_path / "whole", BATCHES)

    def stop(text, layer):
        if text.startswith("block 2") and layer is None:
            raise KeyboardInterrupt

    job = Job(tmp_path / "dense", recipe, BATCHES)
    with pytest.raises(KeyboardInterrupt):
        compress_streamed(job, memorized.tokenizer, tmp_path / "broken", notify=stop)
    job = Job(tmp_path / "dense", recipe, BATCHES)
    compress_streamed(job, memorized.tokenizer, tmp_path / "broken", resume=True)
    for file in [*sorted((tmp_path / "whole").glob("*.safetensors")), tmp_path / "whole/config.json"]:
        assert (tmp_path / "broken" / file.name).read_bytes() == file.read_bytes(), file.name


def test_results_do_not_depend_on_the_batch(dense):
    model = compress_(dense("llama"), parse_recipe("rtn-w4a4"))
    together = logits(model)
    for i in range(len(IDS)):
        with torch.no_grad():
            alone = model(IDS[i : i + 1]).logits
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


def test_more_bits_lose_less(dense):
    model = dense("llama")
    before = logits(model).log_softmax(-1)

    def lost(name):
        after = logits(compress_(dense("llama"), parse_recipe(name), BATCHES)).log_softmax(-1)
        return float(nn.functional.kl_div(after, before, log_target=True, reduction="batchmean"))

    losses = [lost(name) for name in ("rtn-w8a8", "rtn-w4a8", "rtn-w4a4")]
    assert losses == sorted(losses)
    assert lost("smoothquant-w8a8") < losses[1]


def test_a_static_grid_covers_what_was_seen_and_clips_the_rest():
    grid = static_grid(-2.0, 6.0, ActivationSpec(8, symmetric=False, dynamic=False), torch.device("cpu"))
    x = torch.tensor([[-2.0, 0.0, 6.0, 9.0]])
    back = fake_quantize(x, ActivationSpec(8, False, False), grid)
    torch.testing.assert_close(back, torch.tensor([[-2.0, 0.0, 6.0, 6.0]]), atol=8 / 255 / 2 + 1e-6, rtol=0)
    assert back[0, 1] == 0


def test_the_search_finds_the_clip_that_loses_least(dense):
    """Every other clip's error, computed here, is at least that of the one found."""
    reports = []
    model = dense("llama")
    compress_(model, parse_recipe("gptq-w4a4+a_search=true"), BATCHES, reports.append)
    for report in reports:
        layer = model.get_submodule(report.name)
        assert f"clip {layer.activation.clip:g}" in report.note
        assert 0 < report.input_error < 1
    assert len({packed(model)[r.name].activation.clip for r in reports}) > 1
