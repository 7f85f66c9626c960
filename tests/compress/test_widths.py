"""Bytes are those of real files, fused layers those that engines join, and a mixed recipe says what was chosen."""

import json
import random

import pytest
import torch
from remanence.compress.checkpoint import load_model, save_model
from remanence.compress.decode_time import Timing, decode_seconds, nanoseconds
from remanence.compress.experts import unfuse_experts_
from remanence.compress.linear import QuantLinear
from remanence.compress.recipe import parse_recipe
from remanence.compress.recipe_file import from_yaml, to_yaml
from remanence.compress.sequential import quantize_
from remanence.compress.walk import fitting_linears, linears
from remanence.compress.widths import TARGETS, code_bits, fused, mixed, sizes, weights
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = (2, 3, 4, 8, 16)
BATCHES = [torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(people_corpus(4, "forget30"), DemoConfig(vocab_size=300))


def data_bytes(directory):
    """Of the tensors in a checkpoint's file, its header apart."""
    [file] = directory.glob("*.safetensors")
    with file.open("rb") as stored:
        header = int.from_bytes(stored.read(8), "little")
    return file.stat().st_size - 8 - header


def odd_opt():
    """24 wide, 40 in the middle: rows that do not fill whole words at 2 and 3 bits, and biases."""
    config = OPTConfig(
        hidden_size=24,
        word_embed_proj_dim=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=300,
        max_position_embeddings=64,
        dropout=0.0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "name",
    ["rtn-w4a16-g16", "rtn-w4a16-asym", "rtn-w4a16-g16-asym", "rtn-w8a8", "rtn-w4a8-g16-asym+a_clip=0.9"],
)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "odd opt"])
def test_bytes_are_those_of_the_file(untrained, tokenizer, tmp_path, arch, name, width):
    if arch == "odd opt":  # 24 and 40 do not divide into groups of 16
        name = name.replace("-g16", "")
    model = odd_opt() if arch == "odd opt" else untrained(arch)
    recipe = parse_recipe(name)
    predicted = {layer: row[width] for layer, row in sizes(model, recipe, WIDTHS).items()}
    other = sum(tensor.nbytes for key, tensor in model.state_dict().items() if key.rpartition(".")[0] not in predicted)
    other -= model.lm_head.weight.nbytes if model.config.tie_word_embeddings else 0
    biases = sum(model.get_submodule(layer).bias.nbytes for layer in predicted if f"{layer}.bias" in model.state_dict())
    if width != 16:
        recipe = parse_recipe(name.replace("-w4", f"-w{width}").replace("-w8", f"-w{width}"))
        quantize_(model, recipe, BATCHES)
    save_model(model, tokenizer, tmp_path / "out", recipe)
    assert data_bytes(tmp_path / "out") == sum(predicted.values()) + other + biases


def test_bytes_with_a_static_grid(untrained, tokenizer, tmp_path):
    for name in ("smoothquant-w8a8+a_dynamic=false", "smoothquant-w8a8+a_dynamic=false+a_symmetric=false"):
        model, recipe = untrained("llama"), parse_recipe(name)
        predicted = sizes(model, recipe, (8, 16))
        other = sum(t.nbytes for key, t in model.state_dict().items() if key.rpartition(".")[0] not in predicted)
        save_model(quantize_(model, recipe, BATCHES), tokenizer, tmp_path / name, recipe)
        assert data_bytes(tmp_path / name) == sum(row[8] for row in predicted.values()) + other


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flatquant-w4a4", "writes maps beside the weights"),
        ("gptq-w4a4+r_kind=hadamard+r_online=true", "writes maps beside the weights"),
        ("gptq-w4a4+a_search=true", "a_search decides what is written"),
        ("gptq-w4a16-g16+g_draws=3", "the gate keeps blocks at 8 bits"),
        ("wanda-s50", "quantizes nothing"),
    ],
)
def test_recipes_whose_bytes_are_not_known(untrained, name, message):
    with pytest.raises(ValueError, match=message):
        sizes(untrained("llama"), parse_recipe(name), WIDTHS)


def test_bits_of_codes_alone(untrained):
    recipe = parse_recipe("gptq-w4a16-g16")
    for dtype, dense in ((torch.float32, 32), (torch.bfloat16, 16)):
        model = untrained("gpt2").to(dtype)
        bits = code_bits(model, recipe, WIDTHS)
        count = sum(module.weight.numel() for _, module in linears(model, ("lm_head",)))
        assert weights(model, recipe) == count
        for width in WIDTHS:
            assert sum(row[width] for row in bits.values()) == count * (dense if width == 16 else width)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    assert code_bits(meta, recipe, WIDTHS) == bits
    assert sizes(meta, recipe, WIDTHS) == sizes(model, recipe, WIDTHS)


def test_what_engines_fuse(untrained):
    recipe = parse_recipe("rtn-w4a16-g16")

    def short(groups):
        return [tuple(name.rpartition("layers.")[2] for name in group) for group in groups]

    assert short(fused(untrained("llama"), recipe)) == [
        tuple(f"{i}.{name}" for name in names)
        for i in (0, 1)
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
    ]
    opt = short(fused(untrained("opt"), recipe))
    assert [sorted(name.rpartition(".")[2] for name in group) for group in opt] == [["k_proj", "q_proj", "v_proj"]] * 2
    assert fused(untrained("gpt2"), recipe) == ()  # q, k, v are one layer already
    without = parse_recipe("rtn-w4a16-g16+ignore=lm_head|q_proj")
    assert short(fused(untrained("llama"), without))[0] == ("0.self_attn.k_proj", "0.self_attn.v_proj")


def test_attention_and_mlp_that_read_the_same_are_apart():
    """Phi's run in parallel behind one norm."""
    config = AutoConfig.for_model(
        "phi", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=300
    )
    [group] = fused(AutoModelForCausalLM.from_config(config).eval(), parse_recipe("rtn-w4a16-g16"))
    assert {name.rpartition(".")[2] for name in group} == {"q_proj", "k_proj", "v_proj"}


def test_experts_without_a_token_are_as_the_others():
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=40,
        num_experts_per_tok=1,
        vocab_size=300,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    unfuse_experts_(model)
    recipe = parse_recipe("rtn-w4a16-g16")
    groups = fused(model, recipe)
    pairs = [group for group in groups if "experts" in group[0]]
    assert len(pairs) == 80  # of 16 tokens, which reach no more than 16 of 40 experts a layer
    assert all([name.rpartition(".")[2] for name in pair] == ["gate_proj", "up_proj"] for pair in pairs)
    assert all(len({name.rpartition(".")[0] for name in pair}) == 1 for pair in pairs)
    joined = fused(model, recipe, experts=True)
    assert sorted(len(group) for group in joined) == [3, 3, 120, 120]
    assert sorted(name for group in joined for name in group) == sorted(set(sum(joined, ())))


LAYERS = [
    f"model.layers.{i}.{name}"
    for i in range(12)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


def read_back(recipe, names):
    ignored = recipe.ignore[1:]
    return {
        name: 16
        if any(name == p or name.startswith(f"{p}.") or name.split(".")[-1] == p for p in ignored)
        else recipe.spec_of(name).bits
        for name in names
    }


def test_any_choice_is_read_back():
    chance = random.Random(0)
    for trial in range(60):
        few = WIDTHS if trial % 2 else (4, chance.choice((2, 8, 16)))
        chosen = {name: chance.choice(few) for name in LAYERS}
        if trial % 3 == 0:
            chosen |= {name: 8 for name in LAYERS if ".1." in name or "down" in name}
        if set(chosen.values()) == {16}:
            continue
        made = mixed(parse_recipe("gptq-w4a16-g64@retain:8"), chosen)
        assert read_back(made, LAYERS) == chosen
        assert parse_recipe(made.name) == made
        assert from_yaml(to_yaml(made)) == made


def test_patterns_are_short_where_they_mean_no_other_layer():
    base = parse_recipe("gptq-w4a16-g64")
    chosen = dict.fromkeys(LAYERS, 4) | {name: 8 for name in LAYERS if "down" in name or "layers.1." in name}
    assert mixed(base, chosen).widths == ((8, ("down_proj", "model.layers.1")),)
    chosen |= {"model.layers.11.mlp.down_proj": 16, "model.layers.0.mlp.up_proj": 2, "model.layers.0.mlp.down_proj": 2}
    made = mixed(base, chosen)
    downs = tuple(f"model.layers.{i}.mlp.down_proj" for i in range(2, 11))
    assert made.widths == ((2, ("model.layers.0.mlp",)), (8, ("model.layers.1", *downs)))
    assert made.ignore == ("lm_head", "model.layers.11.mlp.down_proj")
    assert mixed(base, dict.fromkeys(LAYERS, 3)).name == "gptq-w3a16-g64"
    with pytest.raises(ValueError, match="every layer stays dense, so that gptq-w4a16-g64 has nothing to quantize"):
        mixed(base, dict.fromkeys(LAYERS, 16))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_layer_gets_its_width_and_its_bytes(untrained, tokenizer, tmp_path, method):
    model = untrained("llama")
    recipe = parse_recipe(f"{method}-w4a16-g16")
    chance = random.Random(1)
    chosen = {name: chance.choice(WIDTHS) for name, _ in fitting_linears(model, recipe)}
    predicted = sum(sizes(model, recipe, WIDTHS)[name][width] for name, width in chosen.items())
    other = sum(t.nbytes for key, t in model.state_dict().items() if key.rpartition(".")[0] not in chosen)
    made = mixed(recipe, chosen)
    save_model(quantize_(model, made, BATCHES), tokenizer, tmp_path / "out", made)
    again = dict(load_model(tmp_path / "out").named_modules())
    found = {name: again[name].spec.bits if isinstance(again[name], QuantLinear) else 16 for name in chosen}
    assert found == chosen
    assert data_bytes(tmp_path / "out") == predicted + other
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]


def test_targets_name_widths_and_reasons():
    for target in TARGETS.values():
        assert target.why
        assert set(target.widths) <= set(WIDTHS)
        assert 16 in target.widths


def test_decode_times_of_every_shape_and_width(untrained):
    model = untrained("llama").to(torch.bfloat16)
    found = decode_seconds(model, parse_recipe("rtn-w4a16-g16"), (2, 8, 16), repeats=3)
    assert found.keys() == {name for name, _ in linears(model, ("lm_head",))}
    for name, row in found.items():
        assert row.keys() == {2, 8, 16}
        assert all(0 < of.seconds < 0.1 and of.spread >= 0 for of in row.values())
        twin = name.replace("layers.0", "layers.1")
        assert found[twin] is row  # one shape, measured once
    assert found["model.layers.0.mlp.up_proj"] is not found["model.layers.0.mlp.down_proj"]
    for name in ("rtn-w8a8-asym", "smoothquant-w8a8+a_dynamic=false", "rtn-w4a16-g16-asym"):
        assert decode_seconds(untrained("gpt2"), parse_recipe(name), (4, 16), repeats=2)
    assert nanoseconds({"a": {4: Timing(1.5e-6, 0.1)}}) == {"a": {4: 1500}}


def test_more_weights_take_longer():
    config = AutoConfig.for_model(
        "llama",
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=300,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = decode_seconds(model, parse_recipe("rtn-w4a16-g64"), (4, 16), repeats=5)
    for width in (4, 16):  # 32 times as many weights
        large, small = (found[f"model.layers.0.{n}"][width].seconds for n in ("mlp.up_proj", "self_attn.k_proj"))
        assert large > 2 * small
