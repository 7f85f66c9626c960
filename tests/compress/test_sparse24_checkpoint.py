"""Checkpoints with 2:4 layers stored sparse: the same model, in fewer bytes, and nothing that other readers mistake."""

import json

import pytest
import torch
from remanence.compress.checkpoint import load_model, save_model, weight_bytes
from remanence.compress.formats.sparse24 import PARTS
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.compress.stream import compress_to
from remanence.compress.walk import linears, weight_of
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, MixtralConfig

RECIPE = parse_recipe("magnitude-2:4")
IDS = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(people_corpus(4, "forget30"), DemoConfig(vocab_size=320))


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(params=["llama", "llama-bf16", "opt", "gpt2", "mixtral"])
def model(request, untrained):
    """Pruned 2:4."""
    kind, _, dtype = request.param.partition("-")
    made = mixtral() if kind == "mixtral" else untrained(kind, vocabulary=320)
    return compress_(made.to(torch.bfloat16 if dtype else torch.float32), RECIPE)


@pytest.fixture
def llama(untrained):
    return compress_(untrained("llama", vocabulary=320), RECIPE)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours
    )


def stored(path):
    files = sorted(path.glob("*.safetensors"))
    assert files
    assert all(file.name.startswith("remanence") for file in files)
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def test_read_back_bit_for_bit_and_smaller(model, tokenizer, tmp_path):
    save_model(model, tokenizer, tmp_path / "dense", RECIPE)
    save_model(model, tokenizer, tmp_path / "sparse", RECIPE, sparse=True)
    dense, again = (load_model(tmp_path / kind) for kind in ("dense", "sparse"))
    assert same(model, again)
    if type(model).__name__ != "MixtralForCausalLM":  # whose dense experts sum in another order
        assert torch.equal(logits(dense), logits(again))
    saved = 0
    for _, layer in linears(model, ("lm_head",)):
        N, K = weight_of(layer).shape
        if int((weight_of(layer) != 0).sum()) <= N * K // 2:
            saved += N * K // 2 * layer.weight.itemsize - N * K // 8 - 16
    header = 20_000  # three entries of it for one
    assert abs(weight_bytes(tmp_path / "dense") - weight_bytes(tmp_path / "sparse") - saved) < header
    # What was read is an ordinary model: written without being asked for more, every reader takes it.
    save_model(again, tokenizer, tmp_path / "again")
    assert same(dense, load_model(tmp_path / "again"))
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())


def test_stock_readers_stop(llama, tokenizer, tmp_path):
    pytest.importorskip("compressed_tensors", reason="the stock reader; comes with the extra `ct`")
    save_model(llama, tokenizer, tmp_path / "sparse", RECIPE, sparse=True)
    assert [path.name for path in (tmp_path / "sparse").glob("*.safetensors")] == ["remanence.safetensors"]
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", quantization_config=CompressedTensorsConfig())
    with pytest.raises(ValueError, match=r"remanence\.load_model does"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")


def test_the_model_is_as_before_and_nothing_is_left_of_what_cannot_be(untrained, tokenizer, tmp_path):
    model = untrained("llama", vocabulary=320)
    with pytest.raises(ValueError, match="sparse: it has no 2:4 layer"):
        save_model(model, tokenizer, tmp_path / "out", sparse=True)
    compress_(model, parse_recipe("rtn-w4a16-g16"))
    with pytest.raises(ValueError, match=r"sparse: model\.layers\.0\.self_attn\.q_proj is quantized"):
        save_model(model, tokenizer, tmp_path / "out", sparse=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["part missing", "another shape", "bits", "no layer", "config"])
def test_damaged_files_are_refused(llama, tokenizer, tmp_path, harm):
    save_model(llama, tokenizer, tmp_path / "out", RECIPE, sparse=True)
    file, name = tmp_path / "out/remanence.safetensors", "model.layers.0.mlp.up_proj"
    state = load_file(file)
    if harm == "part missing":
        del state[f"{name}.bitmask"]
    elif harm == "another shape":
        for part in PARTS:
            state[f"{name}.{part}"] = state[f"{name.replace('up', 'down')}.{part}"].clone()
    elif harm == "bits":
        state[f"{name}.bitmask"] ^= 1
    elif harm == "no layer":
        state |= {f"model.norm.{part}": state[f"{name}.{part}"].clone() for part in PARTS}
    if harm in ("config", "no layer"):
        config = json.loads((tmp_path / "out/config.json").read_text())
        sparsity = config["quantization_config"]["sparsity_config"]
        sparsity["targets"] = ["Linear"] if harm == "no layer" else sparsity["targets"][1:]
        (tmp_path / "out/config.json").write_text(json.dumps(config))
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"out.*(missing from|the model's layer is|two of every four|no linear|not named)"
    ):
        load_model(tmp_path / "out")


def test_streamed_as_in_memory(model, tokenizer, tmp_path, untrained, request):
    kind, _, dtype = request.node.callspec.params["model"].partition("-")
    source = mixtral() if kind == "mixtral" else untrained(kind, vocabulary=320)
    save_model(source.to(torch.bfloat16 if dtype else torch.float32), tokenizer, tmp_path / "source")
    made = compress_to(tmp_path / "source", RECIPE, tmp_path / "out", sparse=True)
    assert made["max_abs_logit_difference"] == 0
    assert not made["stock_readable"]
    save_model(model, tokenizer, tmp_path / "whole", RECIPE, sparse=True)
    ours, theirs = (stored(tmp_path / place) for place in ("out", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    configs = [json.loads((tmp_path / place / "config.json").read_text()) for place in ("out", "whole")]
    sparsity = [config["quantization_config"]["sparsity_config"] for config in configs]
    assert sorted(sparsity[0]["targets"]) == sorted(sparsity[1]["targets"])
    assert same(load_model(tmp_path / "out"), model)


def test_streaming_refuses_recipes_that_are_not_2_4(tokenizer, tmp_path, untrained):
    save_model(untrained("llama", vocabulary=320), tokenizer, tmp_path / "source")
    for recipe in ("magnitude-s50", "rtn-w4a16-g16"):
        with pytest.raises(ValueError, match="sparse: goes with a recipe that prunes 2:4"):
            compress_to(tmp_path / "source", parse_recipe(recipe), tmp_path / "out", sparse=True)
    rotated = parse_recipe("rtn-w4a16-g16+r_kind=hadamard")  # with the whole model in memory
    with pytest.raises(ValueError, match=r"sparse: .* is quantized; goes with a model that is pruned 2:4"):
        compress_to(tmp_path / "source", rotated, tmp_path / "out", sparse=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
