"""bitsandbytes as a recipe: what is stored against an independent decoder, and that it is still stored after use."""

import copy
import json

import numpy as np
import pytest
import torch
from remanence.compress.bnb import bnb_, dequantized_weight, keep_exact_, load_bnb, quantized_layer
from remanence.compress.knobs import BnB
from remanence.compress.recipe import parse_recipe
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import norm
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8"]
IDS = torch.arange(40)[None]


def nf4_levels():
    """Of the 4-bit NormalFloat: quantiles of N(0, 1), eight above zero, seven below, zero itself, scaled to [-1, 1]."""
    tail = 0.9677083
    above = norm.ppf(np.linspace(tail, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(tail, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0.0], below]))
    return levels / np.abs(levels).max()


def fp4_levels():
    """Sign, two bits of exponent, one of mantissa, as bitsandbytes numbers them; the largest is 1."""
    above = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
    return np.concatenate([above, -above])


LEVELS = {"nf4": nf4_levels(), "fp4": fp4_levels()}


def decoded(state, kind, shape):
    """[N, K] float64 from the tensors of a file: the first of two codes is in the high bits of their byte."""
    state = {key: value.numpy() for key, value in state.items()}
    if kind == "int8":
        return state["weight"].astype(np.float64) * state["SCB"].astype(np.float64)[:, None] / 127
    about = json.loads(state[f"weight.quant_state.bitsandbytes__{kind}"].tobytes())
    assert about["blocksize"] == 64
    scales = state["weight.absmax"].astype(np.float64)
    if "weight.nested_absmax" in state:
        coarse = np.repeat(state["weight.nested_absmax"].astype(np.float64), about["nested_blocksize"])[: scales.size]
        levels = state["weight.nested_quant_map"].astype(np.float64)
        scales = levels[state["weight.absmax"]] * coarse + about["nested_offset"]
    codes = np.stack([state["weight"] >> 4, state["weight"] & 15], axis=-1).reshape(-1)[: np.prod(shape)]
    return (LEVELS[kind][codes] * np.repeat(scales, 64)[: codes.size]).reshape(shape)


def wide(arch, dtype=torch.float32, **more):
    """Untrained, 64 wide: the shapes that bitsandbytes' CPU kernel takes."""
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "vocab_size": 256}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "hidden_size": 64}
    kinds = {
        "llama": lambda: LlamaConfig(
            intermediate_size=128, num_key_value_heads=2, initializer_range=0.2, **shape, **ids
        ),
        "opt": lambda: OPTConfig(ffn_dim=128, word_embed_proj_dim=64, dropout=0.0, init_std=0.2, **shape, **ids),
    }
    config = kinds[arch]()
    for key, value in more.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def tensors_of(directory):
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def put(directory, tensors):
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("N", "K"), [(64, 128), (5, 62), (33, 192), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stored_numbers_are_those_of_the_papers(name, N, K, dtype):
    options = parse_recipe(name).options
    torch.manual_seed(1)
    weight = torch.randn(N, K).to(dtype)
    layer = quantized_layer(weight, None, options)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    ours = dequantized_weight(layer)
    expected = decoded(state, options.kind, (N, K))
    assert ours.shape == (N, K)
    assert ours.dtype == torch.float32
    # Levels and scales are stored in float32, the levels of the NormalFloat to about seven digits.
    np.testing.assert_allclose(ours.numpy(), expected, rtol=2e-6, atol=2e-7 * float(weight.abs().max()))
    # Rounded to the nearest level: no other one is closer, but for ties within float32.
    w = weight.double().numpy()
    if options.kind == "int8":
        step = state["SCB"].double().numpy()[:, None] / 127
        np.testing.assert_allclose(state["SCB"].numpy(), np.abs(weight.half().float().numpy()).max(1))
        assert np.all(np.abs(expected - w) <= step * 0.5 + 2e-3 * np.abs(w))  # of the weight in float16
    elif not options.double_quant:
        scales = np.repeat(state["weight.absmax"].double().numpy(), 64)[: N * K].reshape(N, K)
        assert np.allclose(scales.reshape(-1)[:64], np.abs(w.reshape(-1)[:64]).max())  # a block runs over rows
        nearest = np.abs(LEVELS[options.kind] * scales[..., None] - w[..., None]).min(-1)
        # bitsandbytes divides FP4's range at points rounded to six digits.
        np.testing.assert_allclose(np.abs(expected - w), nearest, atol=1e-4)


def test_double_quantization_costs_little_and_saves_scales():
    torch.manual_seed(2)
    weight = torch.randn(256, 256)
    plain, double = (quantized_layer(weight, None, BnB("nf4", dq)) for dq in (False, True))
    errors = [float((dequantized_weight(layer) - weight).square().mean()) for layer in (plain, double)]
    assert errors[0] < errors[1] < 1.02 * errors[0]
    sizes = [sum(v.numel() * v.element_size() for v in layer.state_dict().values()) for layer in (plain, double)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
def test_saved_after_passes_it_loads_back_exactly(arch, name, untrained, tmp_path):
    """Passes must not change what is stored: neither in eval mode nor of odd shapes (32 wide is no block of 64)."""
    model = untrained(arch)
    dense = logits(model)
    assert bnb_(model, parse_recipe(name)) is model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    here = logits(model)
    model.train()
    model(IDS)
    model.eval()
    assert torch.equal(logits(model), here)
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == set()
    assert float((here - dense).abs().max()) > 0
    model.save_pretrained(tmp_path / "one")
    loaded = load_bnb(tmp_path / "one")
    assert not loaded.training
    assert torch.equal(logits(loaded), here)
    loaded.save_pretrained(tmp_path / "two")  # what was loaded can be saved again
    assert torch.equal(logits(load_bnb(tmp_path / "two")), here)
    assert torch.equal(logits(copy.deepcopy(loaded)), here)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("arch", "dtype"), [("llama", torch.float32), ("opt", torch.bfloat16), ("opt", torch.float16)])
def test_equals_what_transformers_quantizes(arch, name, dtype, tmp_path):
    """Every stored byte; and its own load of our file. (64 wide: where its kernel would change the weights.)"""
    dense = wide(arch, dtype)
    dense.save_pretrained(tmp_path / "dense")
    model = bnb_(dense, parse_recipe(name))
    config = copy.deepcopy(model.config.quantization_config)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype="auto", device_map={"": "cpu"}
    )
    theirs, ours = stock.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    here = logits(model)
    model.save_pretrained(tmp_path / "packed")
    assert tensors_of(tmp_path / "packed").keys() <= ours.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map={"": "cpu"})
    keep_exact_(again)
    assert torch.equal(logits(again), here)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}


def test_what_is_ignored_stays_dense_also_for_the_reader(tmp_path):
    model = wide("llama")
    kept = model.model.layers[1].mlp.down_proj.weight
    bnb_(model, parse_recipe("bnb-nf4+ignore=lm_head|model.layers.1.mlp.down_proj|q_proj"))
    assert model.model.layers[1].mlp.down_proj.weight is kept
    model.save_pretrained(tmp_path / "m")
    loaded = load_bnb(tmp_path / "m")
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert {name: type(module) for name, module in loaded.named_modules()} == kinds
    dense = {name for name, kind in kinds.items() if kind is nn.Linear}
    assert dense == {"lm_head", "model.layers.1.mlp.down_proj", *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))}
    assert torch.equal(logits(loaded), logits(model))


def test_reports_every_layer():
    model, seen = wide("llama"), []
    weights = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if type(module) is nn.Linear
    }
    bnb_(model, parse_recipe("bnb-int8"), lambda *row: seen.append(row))
    assert [name for name, _, _ in seen] == [name for name in weights if name != "lm_head"]
    for name, error, seconds in seen:
        off = dequantized_weight(model.get_submodule(name)) - weights[name]
        assert error == pytest.approx(float(off.square().sum() / weights[name].square().sum()), rel=1e-5)
        assert 0 < error < 1e-3
        assert seconds > 0


def test_what_cannot_be_quantized_is_refused_before_anything_changes():
    class Own(nn.Linear):
        pass

    def spoilt(value):
        model = wide("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] = value
        return model

    def other():
        model = wide("llama")
        model.model.layers[1].mlp.up_proj = Own(64, 128, bias=False)
        return model

    def picky():
        model = wide("llama")
        model._keep_in_fp32_modules = ["up_proj"]
        return model

    nf4, int8 = parse_recipe("bnb-nf4"), parse_recipe("bnb-int8")
    cases = [
        (spoilt(float("nan")), nf4, r"bnb-nf4: model\.layers\.1\.mlp\.up_proj: weight: contains NaN"),
        (spoilt(float("inf")), int8, r"up_proj: weight: contains NaN or infinity"),
        (spoilt(1e5), int8, r"up_proj: weight: 100000 is beyond float16"),
        (picky(), nf4, r"0\.mlp\.up_proj: readers would leave it dense with up_proj"),
        (other(), nf4, r"up_proj: is a Own, which readers of such files leave dense"),
        (wide("llama", tie_word_embeddings=True), parse_recipe("bnb-nf4+ignore="), r"lm_head: its weight is also"),
        (wide("llama"), parse_recipe("rtn-w4a16-g64"), r"rtn-w4a16-g64.* is none of bitsandbytes' formats"),
        (
            wide("llama"),
            parse_recipe("bnb-nf4+ignore=model|lm_head"),
            r"LlamaForCausalLM has no linear layer to quantize",
        ),
        (bnb_(wide("llama"), nf4), nf4, r"is a Linear4bit, which readers of such files leave dense"),
    ]
    for model, recipe, message in cases:
        before = dict(model.named_modules())
        with pytest.raises(ValueError, match=message):
            bnb_(model, recipe)
        assert dict(model.named_modules()) == before, message


def test_a_rearranged_or_foreign_layer_has_no_stored_numbers():
    with pytest.raises(ValueError, match="expected a quantized layer of bitsandbytes, got Linear"):
        dequantized_weight(nn.Linear(2, 2))
    layer = quantized_layer(torch.randn(64, 64), None, BnB("nf4"))
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="rearranged by a pass on the CPU"):
        dequantized_weight(layer)


@pytest.mark.parametrize("damage", ["absmax", "weight", "levels", "dense", "norm", "extra", "SCB", "flags", "cut"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    model = bnb_(wide("llama"), parse_recipe("bnb-int8" if damage == "SCB" else "bnb-nf4"))
    model.save_pretrained(tmp_path)
    tensors, key = tensors_of(tmp_path), "model.layers.0.mlp.up_proj.weight"
    if damage == "absmax":
        tensors[f"{key}.absmax"] = tensors[f"{key}.absmax"][:-1].clone()
    elif damage == "weight":
        tensors[key] = tensors[key][:-1].clone()
    elif damage == "levels":
        tensors[f"{key}.quant_map"] = tensors[f"{key}.quant_map"] * 1.5
    elif damage == "dense":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{key}.")}
    elif damage == "norm":
        del tensors["model.norm.weight"]
    elif damage == "extra":
        tensors["model.layers.0.mlp.side_proj.weight"] = torch.zeros(2, 2)
    elif damage == "SCB":
        tensors[key.replace("weight", "SCB")] = torch.ones(3)
    put(tmp_path, tensors)
    if damage == "cut":
        (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    if damage == "flags":
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["load_in_8bit"] = True
        (tmp_path / "config.json").write_text(json.dumps(config))
    messages = {
        "absmax": r"up_proj\.weight\.absmax: 127 scales, expected 128",
        "weight": r"up_proj\.weight: 4095 bytes, expected 4096",
        "levels": r"up_proj\.weight\.quant_map: not the sixteen levels of nf4",
        "dense": r"up_proj\.weight\.quant_state: missing|cannot be read",
        "norm": r"missing keys in its weights, first model\.norm\.weight",
        "extra": r"unexpected keys in its weights, first model\.layers\.0\.mlp\.side_proj\.weight",
        "SCB": r"up_proj\.SCB: \(3,\), expected \(128,\)|cannot be read",
        "flags": r"expected one of load_in_8bit and load_in_4bit",
        "cut": r"cannot be read: ",
    }
    with pytest.raises(ValueError, match=messages[damage]):
        load_bnb(tmp_path)


def test_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install remanence\[bnb\]"):
        bnb_(wide("llama"), parse_recipe("bnb-nf4"))
