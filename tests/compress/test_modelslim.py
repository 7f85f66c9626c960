"""ModelSlim directories: what an independent reader makes of them is the model; what they cannot hold is refused."""

import copy
import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from remanence.compress.activations import fake_quantize
from remanence.compress.diagonal import divisors
from remanence.compress.experts import unfuse_experts_
from remanence.compress.formats import modelslim
from remanence.compress.formats.modelslim import packed, plan, save
from remanence.compress.formats.modelslim_layer import decomposition
from remanence.compress.formats.modelslim_reader import FLOAT, dense_model, read
from remanence.compress.hadamard import OnlineHadamard, randomized
from remanence.compress.knobs import RTN
from remanence.compress.kronecker import Kronecker
from remanence.compress.linear import QuantLinear
from remanence.compress.recipe import parse_recipe
from remanence.compress.rtn import rtn
from remanence.compress.sequential import quantize_
from remanence.compress.spec import ActivationSpec, QuantSpec
from remanence.compress.walk import linears
from remanence.compress.walk import replace as put
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(2, 320, (2, 9), generator=torch.Generator().manual_seed(0))
DESCRIPTION, INDEX = "quant_model_description.json", "quant_model_weights.safetensors.index.json"
SHARD = "quant_model_weights-00001-of-00001.safetensors"
# Sizes with odd factors, and maps of 6 x 8, 10 x 16, 12 x 16 and 14 x 16, which the engine has for them.
USUAL = {"vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "pad_token_id": 0}
USUAL |= {"eos_token_id": 1, "bos_token_id": None, "max_position_embeddings": 64}
GATED = USUAL | {"intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": LlamaConfig(**GATED, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**GATED, tie_word_embeddings=True),
    "llama-heads": LlamaConfig(**GATED | {"num_key_value_heads": 6}, attention_bias=True),
    "mistral": MistralConfig(**GATED | {"intermediate_size": 224}),
    "qwen2": Qwen2Config(**GATED),
    "qwen3": Qwen3Config(**GATED | {"head_dim": 32}, tie_word_embeddings=True),
    "opt": OPTConfig(**USUAL, word_embed_proj_dim=48, ffn_dim=160, dropout=0.0, tie_word_embeddings=False),
    "opt-tied": OPTConfig(**USUAL, word_embed_proj_dim=24, ffn_dim=160, dropout=0.0),
    "opt-gelu": OPTConfig(**USUAL, word_embed_proj_dim=48, ffn_dim=160, dropout=0.0, activation_function="gelu"),
    "opt-post": OPTConfig(**USUAL, word_embed_proj_dim=48, ffn_dim=160, dropout=0.0, do_layer_norm_before=False),
}
RECIPES = {
    "rtn-w8a8": "W8A8_DYNAMIC",
    "rtn-w8a16-plain": "W8A16",
    "rtn-w8a16-asym": "W8A16",
    "rtn-w4a4": "W4A4_DYNAMIC",
}


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(people_corpus(4, "forget30"), DemoConfig(vocab_size=320))


def dense(kind, dtype=torch.float32):
    """Untrained, with biases and gains that differ, and weights large enough that logits do."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32).eval()
    g = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        gain = parameter.dim() == 1 and name.endswith("weight")
        parameter.data.normal_(float(gain), 0.1 if parameter.dim() == 1 else 0.2, generator=g)
    return model.to(dtype)


def compressed(kind, recipe, dtype=torch.float32):
    return quantize_(dense(kind, dtype), parse_recipe(recipe)).eval()


def mapped(kind, diagonal=True, sizes=decomposition, heads="alike"):
    """With FlatQuant's maps as its solver leaves them: one for each input, with a copy for every layer that reads it.

    Heads that share their values have one diagonal, unless `heads` differ.
    """
    model, g = dense(kind), torch.Generator().manual_seed(2)
    shared = {}
    for name, layer in [(name, layer) for name, layer in linears(model, ("lm_head",)) if ".layers." in name]:
        K, site = layer.in_features, name.rpartition(".")[0] + ("" if layer_of_input(name) else name)
        if site not in shared:
            left, right = (torch.eye(n) + 0.2 * torch.randn(n, n, generator=g) for n in sizes(K))
            scale = (0.3 * torch.randn(K, generator=g)).exp() if diagonal else torch.ones(K)
            if name.endswith("o_proj") and heads == "alike":
                config = model.config
                grouped = scale.view(config.num_key_value_heads, -1, config.head_dim)
                scale = grouped[:, :1].expand_as(grouped).flatten()
            shared[site] = left, right, scale, 0.8 + 0.1 * len(shared) % 0.2
        left, right, scale, clip = shared[site]
        transform = Kronecker(left.clone(), right.clone(), scale.clone())
        q = rtn(transform.fold(layer.weight.detach()).float(), QuantSpec(4), torch.float32, RTN())
        made = QuantLinear.from_qtensor(q, layer.bias, ActivationSpec(4, clip=clip))
        made.transform = transform
        put(model, name, made)
    return model.eval()


def layer_of_input(name):
    """Whether others read the same input."""
    return name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@torch.no_grad()
def logits(model):
    return model(IDS).logits.float()


def without_rounding(model):
    """The same model with inputs as they are."""
    model = copy.deepcopy(model)
    for layer in packed(model).values():
        layer.activation = None
    return model


def close(first, second):
    """Sums of float32 in another order."""
    return torch.allclose(first, second, rtol=0, atol=2e-5 * float(first.abs().max()))


def tensors(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "opt", "opt-tied"])
def test_read_back_is_the_model(kind, recipe, tokenizer, tmp_path):
    model = compressed(kind, recipe)
    made = save(model, tokenizer, tmp_path / "out")
    found, layers = read(tmp_path / "out"), packed(model)
    assert Counter(made.types.values()) == {RECIPES[recipe]: len(layers)}
    for name, layer in layers.items():
        entry = found[f"{name}.weight"]
        assert entry.type == RECIPES[recipe]
        assert torch.equal(entry.weight, layer.dequantized()), name
    for name, parameter in model.named_parameters():
        assert found[name].type == FLOAT
        assert torch.equal(found[name].weight, parameter), name
    assert close(logits(dense_model(tmp_path / "out")), logits(without_rounding(model)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_keep_their_dtype_and_scales(dtype, tokenizer, tmp_path):
    model = compressed("llama", "rtn-w8a8", dtype)
    made = save(model, tokenizer, tmp_path / "out")
    stored, config = tensors(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    found = read(tmp_path / "out")
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert stored["model.norm.weight"].dtype == stored["model.layers.0.mlp.up_proj.bias"].dtype == dtype
    for name, layer in packed(model).items():
        assert stored[f"{name}.weight_scale"].dtype == torch.float32
        assert torch.equal(stored[f"{name}.weight_scale"], layer.scale.float())
        assert torch.equal(found[f"{name}.weight"].weight, layer.dequantized())
    assert not any("rounds to" in note for note in made.notes)


def test_scales_that_the_engine_will_round_are_noted():
    assert any("torch.bfloat16" in note for note in plan(compressed("llama", "rtn-w8a8")).notes)
    assert not any("rounds to" in note for note in plan(compressed("llama", "rtn-w4a4")).notes)  # kept in float32 there


def test_codes_and_the_sign_of_the_offset(tokenizer, tmp_path):
    """(q + offset) * scale, as the engine's kernels have it, by hand."""
    model = compressed("llama", "rtn-w8a16-asym")
    save(model, tokenizer, tmp_path / "out")
    stored, name = tensors(tmp_path / "out"), "model.layers.1.mlp.down_proj"
    layer = packed(model)[name]
    q, scale, offset = (stored[f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_offset"))
    assert q.dtype == torch.int8
    assert q.shape == (48, 160)
    assert scale.shape == offset.shape == (48, 1)
    assert torch.equal(q.int() + 128, layer.codes().int())
    assert offset.any()
    assert torch.equal((q.double() + offset.double()) * scale.double(), layer.dequantized().double())


def test_four_bit_codes_are_one_a_byte(tokenizer, tmp_path):
    model = compressed("opt", "rtn-w4a4")
    save(model, tokenizer, tmp_path / "out")
    stored = tensors(tmp_path / "out")
    for name, layer in packed(model).items():
        q = stored[f"{name}.weight"]
        assert q.shape == (layer.out_features, layer.in_features)
        assert (q.min(), q.max()) == (-8, 7)
        assert torch.equal(q.int() + 8, layer.codes().int())


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3", "opt", "opt-tied"])
def test_description_is_complete(kind, tokenizer, tmp_path):
    model = compressed(kind, "rtn-w8a8")
    save(model, tokenizer, tmp_path / "out")
    description = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    heading = {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "group_size": 0, "metadata": {}, "optional": {}}
    assert heading.items() <= description.items()
    types, stored = {k: v for k, v in description.items() if k not in heading}, tensors(tmp_path / "out")
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert types.keys() == stored.keys() | tied
    assert tied.isdisjoint(stored)
    assert types["lm_head.weight"] == FLOAT
    for name, value in types.items():
        layer, _, part = name.rpartition(".")
        assert value == ("W8A8_DYNAMIC" if layer in packed(model) and part != "bias" else FLOAT)
    # What the engine asks for by name: the weight of every linear layer, and of embeddings.
    asked = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding | QuantLinear)]
    assert {f"{name}.weight" for name in asked} <= types.keys()


def test_files_are_those_the_engine_looks_for(tokenizer, tmp_path):
    save(compressed("llama", "rtn-w8a8"), tokenizer, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {DESCRIPTION, INDEX, SHARD, "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    stored = tensors(tmp_path / "out")
    assert index["weight_map"] == dict.fromkeys(stored, SHARD)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())


def test_many_shards(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(modelslim, "_SHARD_BYTES", 20_000)
    model = compressed("llama", "rtn-w8a8")
    save(model, tokenizer, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"quant_model_weights-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert close(logits(dense_model(tmp_path / "out")), logits(without_rounding(model)))


def test_layers_that_stay_dense_are_float(tokenizer, tmp_path):
    model = compressed("llama", "rtn-w8a8+ignore=lm_head|down_proj|q_proj|k_proj|v_proj")
    made = save(model, tokenizer, tmp_path / "out")
    assert {name.rpartition(".")[2] for name in made.types} == {"o_proj", "gate_proj", "up_proj"}
    assert read(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"].type == FLOAT
    assert close(logits(dense_model(tmp_path / "out")), logits(without_rounding(model)))


def test_mixed_types(tokenizer, tmp_path):
    model = compressed("llama", "rtn-w4a4")
    for name, layer in dense("llama").named_modules():
        if name.endswith("down_proj"):
            q = rtn(layer.weight.detach(), QuantSpec(8), torch.float32, RTN())
            put(model, name, QuantLinear.from_qtensor(q, layer.bias, ActivationSpec(8)))
    save(model, tokenizer, tmp_path / "out")
    assert Counter(plan(model).types.values()) == {"W4A4_DYNAMIC": 12, "W8A8_DYNAMIC": 2}
    assert json.loads((tmp_path / "out" / DESCRIPTION).read_text())["model_quant_type"] == "W4A4_DYNAMIC"
    assert close(logits(dense_model(tmp_path / "out")), logits(without_rounding(model)))


# --- FlatQuant's maps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama-heads", "mistral", "qwen2", "qwen3", "opt", "opt-tied"])
def test_maps_and_their_diagonals(kind, tokenizer, tmp_path):
    model = mapped(kind)
    made = save(model, tokenizer, tmp_path / "out")
    found = read(tmp_path / "out")
    for name, layer in packed(model).items():
        entry, by = found[f"{name}.weight"], made.divisors.get(name, torch.ones(layer.out_features))
        assert entry.type == "W4A4_FLATQUANT_DYNAMIC"
        assert torch.equal(entry.left, layer.transform.left)
        assert torch.equal(entry.right, layer.transform.right)
        assert entry.clip == pytest.approx(layer.activation.clip, rel=2**-24)
        assert torch.allclose(entry.weight, layer.dequantized() / by[:, None], rtol=2**-22, atol=0)
    # No diagonal is left in any file, so equal logits say that all went where they belong.
    assert len(made.divisors) == 8
    assert close(logits(dense_model(tmp_path / "out")), logits(without_rounding(model)))


@pytest.mark.parametrize("kind", ["llama-heads", "opt"])
def test_inputs_are_rounded_to_the_same_codes(kind, tokenizer, tmp_path):
    """With what the files hold in the layers' places, maps and clips in front as the engine runs them."""
    model = mapped(kind)
    save(model, tokenizer, tmp_path / "out")
    found, again = read(tmp_path / "out"), dense_model(tmp_path / "out")

    class Engine(nn.Module):
        def __init__(self, entry, bias):
            super().__init__()
            self.entry, self.bias = entry, bias

        def forward(self, x):
            e = self.entry
            X = x.reshape(-1, len(e.left), len(e.right))
            x = (e.left.T @ X @ e.right).reshape(x.shape)
            return nn.functional.linear(fake_quantize(x, ActivationSpec(4, clip=e.clip)), e.weight, self.bias)

    for name in packed(model):
        again.set_submodule(name, Engine(found[f"{name}.weight"], again.get_submodule(name).bias))
    off = (logits(again) - logits(model)).abs()
    # A number near the middle of two codes may go the other way now and then; none does by much.
    assert off.mean() < 1e-2 * logits(model).std()
    assert off.mean() < 0.1 * (logits(without_rounding(model)) - logits(model)).abs().mean()


def test_maps_without_a_diagonal_change_nothing_else(tokenizer, tmp_path):
    model = mapped("mistral", diagonal=False)
    made = save(model, tokenizer, tmp_path / "out")
    assert made.divisors == {}
    found = read(tmp_path / "out")
    assert all(torch.equal(found[name].weight, parameter) for name, parameter in model.named_parameters())
    for name, layer in packed(model).items():
        assert torch.equal(found[f"{name}.weight"].weight, layer.dequantized())


def test_a_dense_layer_in_front_takes_the_diagonal(tokenizer, tmp_path):
    model, plain = mapped("llama-heads"), dense("llama-heads")
    for name in [name for name in packed(model) if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")]:
        put(model, name, plain.get_submodule(name))
    made = save(model, tokenizer, tmp_path / "out")
    assert "model.layers.0.self_attn.v_proj" in made.divisors
    assert "model.layers.0.input_layernorm" not in made.divisors
    assert close(logits(dense_model(tmp_path / "out")), logits(without_rounding(model)))


@pytest.mark.parametrize(
    ("kind", "layer", "message"),
    [
        ("llama", "model.layers.0.self_attn.o_proj", "differs between heads which share the values"),
        ("opt-gelu", "model.decoder.layers.0.fc2", "nothing is known to feed this layer of OPTForCausalLM that"),
        ("opt-post", "model.decoder.layers.0.self_attn.k_proj", "nothing is known to feed"),
    ],
)
def test_a_diagonal_that_cannot_be_taken_out(kind, layer, message):
    with pytest.raises(ValueError, match=message) as error:
        plan(mapped(kind, heads="different"))
    assert str(error.value).startswith(f"{layer}: ")
    plan(mapped(kind, diagonal=False))


def test_layers_with_one_input_have_one_diagonal():
    model = mapped("llama-heads")
    model.get_submodule("model.layers.1.mlp.gate_proj").transform.scale[3] *= 2
    with pytest.raises(
        ValueError, match=r"mlp.gate_proj: its map has a diagonal that .*mlp.up_proj, with the same input"
    ):
        divisors(model, packed(model))
    put(model, "model.layers.1.mlp.gate_proj", dense("llama-heads").get_submodule("model.layers.1.mlp.gate_proj"))
    with pytest.raises(ValueError, match="gate_proj FLOAT"):
        plan(model)


def test_joined_layers_have_one_map():
    model = mapped("llama-heads")
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.v_proj").transform.left[0, 0] += 1
    with pytest.raises(ValueError, match=r"self_attn: v_proj has another map or clip than q_proj"):
        plan(model)
    model = mapped("llama-heads")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.activation = replace(layer.activation, clip=0.5)
    with pytest.raises(ValueError, match=r"mlp: up_proj has another map or clip than gate_proj"):
        plan(model)


@pytest.mark.parametrize(
    ("features", "sizes"), [(48, (6, 8)), (88, (4, 22)), (40, (4, 10)), (99, (9, 11)), (7, (1, 7))]
)
def test_sizes_of_maps_are_the_engines(features, sizes):
    assert decomposition(features) == sizes


def test_every_size_is_the_engines():
    """As it finds them: a difference of two squares, the first of them as small as can be."""
    squares = {n * n: n for n in range(3000)}
    for features in range(1, 3000):
        if features % 4 != 2:
            m = next(m for m in range(features + 1) if m * m - features in squares)
            d = squares[m * m - features]
            assert decomposition(features) == (m - d, m + d), features
    with pytest.raises(ValueError, match="features: 6 is twice an odd number"):
        decomposition(6)


def test_maps_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"down_proj: has a map of 7 x 32; expected 14 x 16"):
        plan(mapped("mistral", sizes=lambda n: (7, 32) if n == 224 else decomposition(n)))


def test_inputs_for_which_the_engine_has_no_map_are_refused():
    model = mapped("llama")
    transform = Kronecker(torch.eye(4), torch.eye(22), torch.ones(88))
    made = QuantLinear.from_qtensor(rtn(torch.randn(48, 88), QuantSpec(4), torch.float32, RTN()), None, A4)
    made.transform = transform
    put(model, "model.layers.0.mlp.down_proj", made)
    with pytest.raises(
        ValueError, match=r"down_proj: has 88 inputs, of which the engine makes 4 x 22; expected a mult"
    ):
        plan(model)


# --- what is refused --------------------------------------------------------------------------------------------------


def one(kind="llama", name="model.layers.1.mlp.down_proj", recipe="rtn-w8a8"):
    """A model that can be written, and one of its layers to spoil."""
    model = compressed(kind, recipe)
    return model, model.get_submodule(name)


def spoiled(change, **given):
    model, layer = one(**given)
    change(layer)
    return model


def other(spec, activation=None, static=None):
    """The layer in another format."""

    def change(layer):
        made = QuantLinear.from_qtensor(rtn(layer.dequantized(), spec, torch.float32, RTN()), None, activation, static)
        vars(layer).update(vars(made))

    return change


def hang(layer):
    layer.transform = OnlineHadamard(*randomized(layer.in_features, torch.Generator().manual_seed(0)))


A8, A4 = ActivationSpec(8), ActivationSpec(4)
STATIC = (torch.ones(1), torch.zeros(1, dtype=torch.int32))
REFUSED = {
    "groups": (other(QuantSpec(8, 32), A8), "has 5 groups of inputs, each with its scale; expected one scale per"),
    "w4a16": (other(QuantSpec(4)), "has w4a16; expected w8a8, w8a16, w4a4"),
    "w4a8": (other(QuantSpec(4), A8), "has w4a8; expected w8a8"),
    "w3": (other(QuantSpec(3)), "has w3a16; expected"),
    "w2": (other(QuantSpec(2, 32)), "has w2a16; expected"),
    "w8a4": (other(QuantSpec(8), A4), "has w8a4; expected"),
    "w8a8-asym": (other(QuantSpec(8, symmetric=False), A8), "has asymmetric weights at w8a8; expected symmetric ones"),
    "w4a4-asym": (other(QuantSpec(4, symmetric=False), A4), "has asymmetric weights at w4a4; expected symmetric ones"),
    "inputs-asym": (other(QuantSpec(8), ActivationSpec(8, False)), "has inputs on an asymmetric grid; expected a symm"),
    "static": (other(QuantSpec(8), ActivationSpec(8, dynamic=False), STATIC), "has a static scale for its inputs"),
    "clip": (other(QuantSpec(8), ActivationSpec(8, clip=0.9)), "has inputs clipped to 0.9; expected a clip with"),
    "online": (hang, "has an online OnlineHadamard in front; expected none, or FlatQuant's map"),
    "conv1d": (lambda layer: setattr(layer, "replaces", "Conv1D"), "has a packed Conv1D; expected a packed nn.Linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, tokenizer, tmp_path):
    change, message = REFUSED[case]
    model = spoiled(change)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj: ") as error:
        save(model, tokenizer, tmp_path / "new" / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_w8_with_a_map_is_refused():
    model = mapped("llama")
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    layer.activation = replace(layer.activation, bits=8)
    with pytest.raises(ValueError, match=r"down_proj: has w4a8 with a map in front; expected w8a8"):
        plan(model)


def test_a_map_in_front_of_a_dense_layer_is_refused():
    model = compressed("llama", "rtn-w4a4+ignore=lm_head|down_proj")
    hang(model.get_submodule("model.layers.0.mlp.down_proj"))
    with pytest.raises(ValueError, match=r"down_proj: is not quantized, and has a OnlineHadamard in front of it"):
        plan(model)


def test_a_packed_head_is_refused():
    with pytest.raises(ValueError, match="lm_head: has 8-bit weights, and is the head"):
        plan(compressed("llama", "rtn-w8a8+ignore=model.layers"))


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="none of its layers is packed"):
        plan(dense("llama"))


def test_gpt2_is_refused():
    config = GPT2Config(vocab_size=320, n_embd=48, n_layer=1, n_head=2, n_positions=64)
    model = quantize_(AutoModelForCausalLM.from_config(config).eval(), parse_recipe("rtn-w8a8"))
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn: has a packed Conv1D; expected a packed nn"):
        plan(model)


@pytest.mark.parametrize("apart", [False, True])
def test_experts_are_refused(apart):
    config = MixtralConfig(**USUAL, intermediate_size=56, num_key_value_heads=2, num_local_experts=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    if apart:
        unfuse_experts_(model)
    for name, layer in [(n, m) for n, m in model.named_modules() if "attn." in n and isinstance(m, nn.Linear)]:
        q = rtn(layer.weight.detach(), QuantSpec(8), torch.float32, RTN())
        put(model, name, QuantLinear.from_qtensor(q, layer.bias, A8))
    with pytest.raises(ValueError, match="mixture of experts; expected linear layers alone"):
        plan(model)


def test_inputs_of_odd_count_at_four_bits_are_refused():
    q = rtn(torch.randn(9, 12), QuantSpec(4), torch.float32, RTN())
    model = compressed("llama", "rtn-w4a4")
    put(model, "model.layers.0.mlp.down_proj", QuantLinear.from_qtensor(q, None, A4))
    with pytest.raises(ValueError, match="has 12 inputs at 4 bits; expected a multiple of 8"):
        plan(model)


@pytest.mark.parametrize(
    ("recipe", "parent", "listed"),
    [
        ("rtn-w8a8+ignore=lm_head|k_proj", "self_attn", "q_proj W8A8_DYNAMIC, k_proj FLOAT, v_proj W8A8_DYNAMIC"),
        ("rtn-w8a8+ignore=lm_head|gate_proj", "mlp", "gate_proj FLOAT, up_proj W8A8_DYNAMIC"),
    ],
)
def test_layers_that_the_engine_joins_have_one_type(recipe, parent, listed, tokenizer, tmp_path):
    model = compressed("llama", recipe)
    with pytest.raises(ValueError, match=r"which the engine joins into one layer; expected one type: ") as error:
        save(model, tokenizer, tmp_path / "out")
    assert str(error.value).startswith(f"model.layers.0.{parent}: has {listed}, ")
    assert "ignore=" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_of_joined_layers_two_widths_are_refused():
    model = compressed("qwen3", "rtn-w8a8")
    layer = model.get_submodule("model.layers.1.self_attn.v_proj")
    q = rtn(layer.dequantized(), QuantSpec(4), torch.float32, RTN())
    put(model, "model.layers.1.self_attn.v_proj", QuantLinear.from_qtensor(q, layer.bias, A4))
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn: has q_proj W8A8_DYNAMIC, .* v_proj W4A4_DYNAMIC, which"
    ):
        plan(model)


def test_nothing_is_left_of_a_write_that_fails(tokenizer, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no more")

    monkeypatch.setattr(modelslim, "_number", fail)
    with pytest.raises(OSError, match="no more"):
        save(compressed("llama", "rtn-w8a8"), tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_there_stays_as_it_is(tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    with pytest.raises(FileExistsError):
        save(compressed("llama", "rtn-w8a8"), tokenizer, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_the_model_is_left_as_it_was(tokenizer, tmp_path):
    model = mapped("llama-heads")
    before = logits(model)
    save(model, tokenizer, tmp_path / "out")
    assert torch.equal(logits(model), before)


def test_notes_on_grids():
    def narrow(made):
        return [note for note in made.notes if "half the range" in note]

    for recipe in ("rtn-w8a8", "rtn-w4a4"):
        (note,) = narrow(plan(compressed("llama", recipe)))
        assert note.startswith("14 layers")
        assert narrow(plan(compressed("llama", f"{recipe}+a_narrow=true"))) == []
    assert narrow(plan(compressed("llama", "rtn-w8a16-plain"))) == []


# --- no file is trusted -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("written")
    save(mapped("opt"), tokenizer, place / "maps")
    save(compressed("llama", "rtn-w8a8"), tokenizer, place / "w8a8")
    return place


@pytest.fixture
def place(written, tmp_path):
    """A copy to spoil."""
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def store(directory, **changed):
    """Tensors in place of those in the file; None: without."""
    state = load_file(directory / SHARD)
    for name, tensor in changed.items():
        state.pop(name) if tensor is None else state.update({name: tensor})
    save_file(state, directory / SHARD)


FC1 = "model.decoder.layers.0.fc1"
MAPS = {
    "nan scale": ({f"{FC1}.weight_scale": torch.full((160, 1), torch.nan)}, "weight_scale: contains NaN"),
    "scale of float16": (
        {f"{FC1}.weight_scale": torch.ones(160, 1).half()},
        "weight_scale: torch.float16 .160, 1.; exp",
    ),
    "flat scale": (
        {f"{FC1}.weight_scale": torch.ones(160)},
        r"weight_scale: torch.float32 \[160\]; expected .* \[160, 1",
    ),
    "offset": ({f"{FC1}.weight_offset": torch.ones(160, 1)}, "weight_offset: not zero; expected zeros"),
    "code 8": (
        {f"{FC1}.weight": torch.full((160, 48), 8, dtype=torch.int8)},
        r"weight: codes 8 .. 8; expected -8 .. 7",
    ),
    "code -9": ({f"{FC1}.weight": torch.full((160, 48), -9, dtype=torch.int8)}, "weight: codes -9 .. -9; expected"),
    "float codes": ({f"{FC1}.weight": torch.zeros(160, 48)}, "weight: torch.float32 .*; expected torch.int8"),
    "one row": (
        {f"{FC1}.weight": torch.zeros(48, dtype=torch.int8)},
        r"weight: torch.int8 \[48\]; expected torch.int8",
    ),
    "other map": ({f"{FC1}.left_trans": torch.eye(8)}, r"left_trans: torch.float32 \[8, 8\]; expected .* \[6, 6\]"),
    "nan map": ({f"{FC1}.right_trans": torch.full((8, 8), torch.inf)}, "right_trans: contains NaN or infinity"),
    "clip 0": ({f"{FC1}.clip_ratio": torch.zeros(1)}, "clip_ratio: 0; expected above 0"),
    "clip 2": ({f"{FC1}.clip_ratio": torch.full((1,), 2.0)}, "clip_ratio: 2; expected above 0 and at most 1"),
    "nan bias": ({f"{FC1}.bias": torch.full((160,), torch.nan)}, "bias: contains NaN"),
    "integer norm": (
        {"model.decoder.final_layer_norm.weight": torch.ones(48, dtype=torch.int8)},
        "expected a floating",
    ),
    "no scale": ({f"{FC1}.weight_scale": None}, "weight_scale: listed in .*, there in None; expected one place"),
    "one more": ({"model.more": torch.ones(1)}, "model.more: listed in None, there in .*; expected one place"),
}


@pytest.mark.parametrize("case", MAPS)
def test_hostile_tensors(case, place):
    changed, message = MAPS[case]
    store(place / "maps", **changed)
    with pytest.raises(ValueError, match=message) as error:
        read(place / "maps")
    assert "\n" not in str(error.value)


def drop(name):
    return lambda value: value.pop(name)


def put_in(**changed):
    return lambda value: value.update(changed)


DESCRIPTIONS = {
    "unknown type": (
        put_in(**{f"{FC1}.weight": "W4A8_DYNAMIC"}),
        "fc1.weight: 'W4A8_DYNAMIC' is not one of FLOAT, W8A16",
    ),
    "no text": (put_in(**{f"{FC1}.weight": None}), "fc1.weight: None is not one of FLOAT"),
    "an object": (put_in(more={"a": 1}), "more: {'a': 1} is not one of FLOAT"),
    "no type": (drop(f"{FC1}.weight"), "fc1.weight: has no type; expected one for every tensor"),
    "no tensor": (put_in(**{"model.more.weight": "FLOAT"}), "more.weight: is described as FLOAT, and missing"),
    "half a layer": (put_in(**{f"{FC1}.weight": "FLOAT"}), "fc1.weight: is FLOAT; expected W4A4_FLATQUANT_DYNAMIC, as"),
    "another type": (
        put_in(**{f"{FC1}.left_trans": "W4A4_DYNAMIC"}),
        "left_trans: is W4A4_DYNAMIC; expected W4A4_FLATQUANT",
    ),
    "a typed bias": (
        put_in(**{f"{FC1}.bias": "W4A4_DYNAMIC"}),
        "bias: is no tensor of W4A4_DYNAMIC, which has weight,",
    ),
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_hostile_descriptions(case, place):
    change, message = DESCRIPTIONS[case]
    rewrite(place / "maps" / DESCRIPTION, change)
    with pytest.raises(ValueError, match=message) as error:
        read(place / "maps")
    assert "\n" not in str(error.value)


def test_a_layer_of_fewer_parts_than_its_type_has(place):
    names = [f"model.layers.1.mlp.down_proj.{part}" for part in ("weight", "weight_scale", "weight_offset")]
    rewrite(place / "w8a8" / DESCRIPTION, put_in(**dict.fromkeys(names, "W4A4_FLATQUANT_DYNAMIC")))
    with pytest.raises(
        ValueError, match=r"down_proj.left_trans: is missing; expected W4A4_FLATQUANT_DYNAMIC, as weight is"
    ):
        read(place / "w8a8")


def elsewhere(name):
    return lambda value: value["weight_map"].update({f"{FC1}.weight": name})


@pytest.mark.parametrize("name", ["../w8a8/" + SHARD, "/etc/passwd", "..", "sub/x.safetensors", 3, None, "config.json"])
def test_an_index_leads_nowhere_else(name, place):
    rewrite(place / "maps" / INDEX, elsewhere(name))
    with pytest.raises(ValueError, match=r"is not the name of a \.safetensors file in the directory"):
        read(place / "maps")


def test_an_index_names_files_that_are_there(place):
    rewrite(place / "maps" / INDEX, elsewhere("absent.safetensors"))
    with pytest.raises(ValueError, match=r"'absent.safetensors' is not a file in the directory"):
        read(place / "maps")


def test_a_link_leads_nowhere_else(place):
    (place / "maps" / SHARD).unlink()
    (place / "maps" / SHARD).symlink_to(place / "w8a8" / SHARD)
    with pytest.raises(ValueError, match="is not a file in the directory"):
        read(place / "maps")


def test_a_tensor_in_two_files(place):
    shutil.copy(place / "maps" / SHARD, place / "maps/more.safetensors")
    with pytest.raises(ValueError, match=r"is in more\.safetensors too|is in quant_model.* too"):
        read(place / "maps")


def test_a_tensor_twice_in_one_file(place):
    path = place / "maps" / SHARD
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].decode().rstrip()
    again = f'"{FC1}.bias":' + json.dumps(json.loads(header)[f"{FC1}.bias"])
    header = f"{header[:-1]},{again}}}".encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    with pytest.raises(ValueError, match=r"fc1\.bias: is there twice"):
        read(place / "maps")


@pytest.mark.parametrize("file", [DESCRIPTION, INDEX])
def test_a_key_that_is_there_twice(file, place):
    text = (place / "maps" / file).read_text()
    (place / "maps" / file).write_text(text.rstrip()[:-1] + ', "same": 1, "same": 2}')
    with pytest.raises(ValueError, match="same: is there twice"):
        read(place / "maps")


@pytest.mark.parametrize("file", [DESCRIPTION, INDEX])
@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "expected an object"), (None, "is missing")])
def test_files_that_are_no_json(file, text, message, place):
    path = place / "maps" / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(place / "maps")


def test_a_file_cut_short(place):
    path = place / "maps" / SHARD
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read(place / "maps")


def test_a_model_of_another_config(place):
    rewrite(place / "w8a8/config.json", put_in(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"model.layers.1.*: not in both the model of config.json and the files"):
        dense_model(place / "w8a8")


def test_the_reader_knows_neither_writer_nor_layers():
    import ast
    from pathlib import Path

    from remanence.compress.formats import modelslim_reader

    tree = ast.parse(Path(modelslim_reader.__file__).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
