"""Models in memory: calibrated block by block, reloaded bit for bit; what cannot be is said before anything changes."""

import copy

import pytest
import torch
from remanence.compress.block import Hidden, block_names, enter
from remanence.compress.checkpoint import load_model, save_model
from remanence.compress.linear import QuantLinear
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus
from transformers import AutoModelForCausalLM, LlamaConfig

IDS = torch.randint(2, 300, (4, 48), generator=torch.Generator().manual_seed(0))
CALIBRATED = [
    "gptq-w4a16-g16",
    "gptq-w3a16-g16-asym",
    "awq-w4a16-g16",
    "signround-w4a16-g16+iterations=4",
    "smoothquant-w8a16",
]


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(people_corpus(4, "forget30"), DemoConfig(vocab_size=320))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("name", CALIBRATED)
def test_what_is_saved_comes_back_bit_for_bit(untrained, arch, name, tokenizer, tmp_path):
    recipe, reports = parse_recipe(name), []
    model = compress_(untrained(arch), recipe, [IDS[:2], IDS[2:]], reports.append)
    save_model(model, tokenizer, tmp_path / "out", recipe)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(model))
    packed = {key: module for key, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert {report.name for report in reports} == packed.keys()
    assert all(report.of == "outputs" and 0 < report.error < 1 for report in reports)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gptq-w4a16-g16", "awq-w4a16-g16"])
def test_models_in_16_bits_too(untrained, name, dtype, tokenizer, tmp_path):
    recipe = parse_recipe(name)
    save_model(untrained("llama").to(dtype), tokenizer, tmp_path / "dense")
    # Loaded, as .to() also rounds the rotary frequencies, which no checkpoint holds.
    model = compress_(load_model(tmp_path / "dense"), recipe, [IDS])
    save_model(model, tokenizer, tmp_path / "out", recipe)
    again = load_model(tmp_path / "out")
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", CALIBRATED[:3])
def test_calibration_is_on_what_the_compressed_model_sees(untrained, name):
    """Block 1's inputs are those of the compressed block 0: another block 0 makes another block 1."""
    recipe = parse_recipe(name)
    one, other = untrained("llama"), untrained("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(-1)
    found = [compress_(model, recipe, [IDS]).model.layers[1].self_attn.o_proj for model in (one, other)]
    assert not torch.equal(found[0].dequantized(), found[1].dequantized())


def test_the_blocks_calls_are_those_of_the_model(untrained):
    for arch in ("llama", "opt", "gpt2"):
        model = untrained(arch)
        hidden = Hidden([IDS], model.config.hidden_size, model.dtype)
        calls = enter(model, [IDS], hidden)
        state = hidden.read(0)
        with torch.no_grad():
            for name, call in zip(block_names(model), calls, strict=True):
                arguments = call[4, 48]
                state = model.get_submodule(name)(state, *arguments.args, **arguments.kwargs)
                state = state[0] if isinstance(state, tuple) else state
            expected = model(IDS, output_hidden_states=True).hidden_states
        norm = {"llama": "model.norm", "opt": "model.decoder.final_layer_norm", "gpt2": "transformer.ln_f"}[arch]
        assert torch.allclose(model.get_submodule(norm)(state), expected[-1], atol=1e-6)


def test_a_layer_outside_the_blocks_is_rounded_and_named(untrained):
    reports = []
    model = compress_(untrained("llama"), parse_recipe("gptq-w4a16-g16+ignore="), [IDS], reports.append)
    assert isinstance(model.lm_head, QuantLinear)
    notes = {report.name: report.note for report in reports if report.note}
    assert notes == {"lm_head": "outside the decoder blocks: round to nearest"}


def unchanged(model, before):
    return all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "batches", "message"),
    [
        ("gptq-w4a16-g16", [], "needs data, and there is none"),
        ("gptq-w4a16-g16", [torch.zeros(0, 8, dtype=torch.int64)], r"batch 0 has the shape \[0, 8\]"),
        ("gptq-w4a16-g16", [torch.zeros(8, dtype=torch.int64)], r"batch 0 has the shape \[8\]"),
        ("gptq-w4a16-g24", [IDS], r"q_proj: 32 input features do not divide into groups of 24"),
        ("awq-w4a16-g128", [IDS], r"32 input features do not divide into groups of 128"),
        ("gptq-w4a16-g16", [IDS, IDS + 300], "calibration: token [0-9]+, but the model embeds 300"),
        ("rtn-w4a16-g16+ignore=lm_haed", [], "'lm_haed' names no module of LlamaForCausalLM; did you mean lm_head"),
        ("rtn-w4a16-g16+ignore=re:.*nothing", [], "'re:.*nothing' names no module"),
        ("rtn-w4a16-g16+ignore=re:(", [], "is no regular expression"),
    ],
)
def test_what_cannot_be_is_said_before_anything_changes(untrained, name, batches, message):
    model = untrained("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        compress_(model, parse_recipe(name), batches)
    assert unchanged(model, before)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.input_layernorm", "model.norm"])
@pytest.mark.parametrize("recipe", ["rtn-w4a16-g16", "gptq-w4a16-g16"])
def test_nan_outside_the_layers_is_named_too(untrained, recipe, name):
    model = untrained("llama")
    model.get_submodule(name).weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=f"{name}.weight: contains NaN or infinity"):
        compress_(model, parse_recipe(recipe), [IDS])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["rtn-w4a16-g16", "gptq-w4a16-g16", "hqq-w4a16-g16", "awq-w4a16-g16"])
def test_a_weight_that_is_no_number_is_named(untrained, name, value):
    model = untrained("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = value
    before = copy.deepcopy(model.model.layers[0].state_dict())
    with pytest.raises(ValueError, match=f"{name}: model.layers.1.mlp.down_proj: weight: contains NaN or infinity"):
        compress_(model, parse_recipe(name), [IDS])
    assert unchanged(model.model.layers[0], before)


def tied():
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_a_tied_head_is_left_alone_or_refused():
    model = compress_(tied(), parse_recipe("gptq-w4a16-g16"), [IDS])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"lm_head: its weight is also model.embed_tokens.weight"):
        compress_(tied(), parse_recipe("rtn-w4a16-g16+ignore="))


@pytest.mark.parametrize("name", ["rtn-w4a16-g16", "gptq-w4a16-g16"])
def test_layers_that_share_a_weight_are_refused(untrained, name):
    model = untrained("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj: its weight is also model.layers.1.mlp.up_proj.weight"):
        compress_(model, parse_recipe(name), [IDS])
    model = untrained("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.gate_proj: its weight is also model.layers.1.mlp.gate_proj.weight"
    ):
        compress_(model, parse_recipe(name), [IDS])


@pytest.mark.parametrize("name", ["rtn-w4a16-g16", "gptq-w4a16-g16", "awq-w4a16-g16", "hqq-w4a16-g16-asym"])
def test_a_group_of_zeros_stays_zero(untrained, name):
    model = untrained("llama")
    model.model.layers[0].mlp.up_proj.weight.data[3, :16] = 0
    model.model.layers[0].mlp.gate_proj.weight.data[:, 16:] = 0
    compress_(model, parse_recipe(name), [IDS])
    assert torch.isfinite(logits(model)).all()
    assert (model.model.layers[0].mlp.gate_proj.dequantized()[:, 16:] == 0).all()


def test_patterns_leave_layers_dense(untrained):
    def quantized(ignore):
        model = compress_(untrained("llama"), parse_recipe(f"rtn-w4a16-g16+ignore={ignore}"))
        return {key for key, module in model.named_modules() if isinstance(module, QuantLinear)}

    every = quantized("lm_head")
    assert every - quantized("lm_head|down_proj") == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert every - quantized("lm_head|re:.*layers\\.0\\..*") == {key for key in every if ".layers.0." in key}
    assert every - quantized("lm_head|model.layers.1.mlp") == {key for key in every if ".layers.1.mlp." in key}
    assert quantized("") == every | {"lm_head"}
