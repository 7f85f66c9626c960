"""Analytic sizes against those of real layers, real files and a real cache."""

import copy

import pytest
import torch
from remanence.bench.roofline import stored
from remanence.bench.roofline.walk import walk
from remanence.compress.checkpoint import load_model, save_model, skeleton
from remanence.compress.kv_attach import attach_kv_, serving_of
from remanence.compress.kv_cache import KVCache
from remanence.compress.linear import QuantLinear
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.compress.sparse_linear import KERNELS, swap_
from remanence.compress.spec import KVSpec
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

RECIPES = [
    "rtn-w4a16-g32",
    "rtn-w4a16-g32-asym",
    "rtn-w8a16",
    "rtn-w3a16-g32-asym",
    "rtn-w8a8",
    "rtn-w4a8-g32",
    "rtn-w4a4",
    "hqq-w4a16-g32-asym",
    "rtn-w4a16-g32+w8=down_proj",
]


def tiny(dtype=torch.float32, **changes):
    given = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "attention_bias": True,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**given | changes), dtype=dtype).eval()


def tensor_bytes(directory):
    """Of all tensors in the files, from the files."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(tensors.get_tensor(key).nbytes for key in tensors.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recipes_sizes_are_those_of_its_files_and_its_layers(recipe, dtype, memorized, tmp_path):
    model, asked = tiny(dtype), parse_recipe(recipe)
    model.save_pretrained(tmp_path / "dense")
    bones = skeleton(tmp_path / "dense")
    forms, dense = stored.forms_of_recipe(bones, asked), stored.module_bytes(bones)
    compress_(model, asked)
    save_model(model, memorized.tokenizer, tmp_path / "packed", asked)
    assert stored.checkpoint_bytes(dense, forms) == tensor_bytes(tmp_path / "packed")

    assert stored.forms_of_model(model) == forms
    loaded = load_model(tmp_path / "packed")  # in the layout that this machine's kernels read
    assert stored.forms_of_model(loaded) == forms
    assert stored.resident_bytes(dense, forms) == sum(tensor.nbytes for tensor in model.state_dict().values())

    again = skeleton(tmp_path / "packed", compressed=True)
    assert stored.forms_of_checkpoint(tmp_path / "packed", again) == forms


def test_bytes_that_a_decode_step_reads_of_a_w4a16_checkpoint(memorized, tmp_path):
    """Group 128: the codes, scales and zeros of a file, to a tenth of a percent, its header and all."""
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 8}
    model = tiny(torch.bfloat16, **shape, num_key_value_heads=8, attention_bias=False, vocab_size=2048)
    asked = parse_recipe("rtn-w4a16-g128")
    model.save_pretrained(tmp_path / "dense")
    bones = skeleton(tmp_path / "dense")
    forms, dense = stored.forms_of_recipe(bones, asked), stored.module_bytes(bones)
    compress_(model, asked)
    save_model(model, memorized.tokenizer, tmp_path / "packed", asked)
    [file] = (tmp_path / "packed").glob("*.safetensors")
    assert stored.checkpoint_bytes(dense, forms) == pytest.approx(file.stat().st_size, rel=1e-3)
    _, decode = walk(bones, 1, 8)
    decode = stored.apply(decode, forms, dense)
    embedding = bones.get_input_embeddings().weight
    read = tensor_bytes(tmp_path / "packed") - embedding.numel() * embedding.itemsize
    assert decode.total("weight_bytes") == pytest.approx(read, rel=1e-4)  # shapes are in the file, and never read


@pytest.mark.parametrize("recipe", ["bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-int8"])
def test_bitsandbytes_formats(recipe, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, asked = tiny(), parse_recipe(recipe)
    model.save_pretrained(tmp_path)
    forms = stored.forms_of_recipe(skeleton(tmp_path), asked)
    compress_(model, asked)
    found = stored.forms_of_model(model)
    assert found.keys() == forms.keys()
    for name, form in forms.items():
        assert found[name].compute == form.compute
        # Beside the numbers a file has a description of a hundred bytes; of layers this small it shows.
        assert form.bytes <= found[name].bytes <= form.bytes + 1500


def test_sparse_layers_are_kept_as_values_and_bits(tmp_path):
    model, asked = tiny(), parse_recipe("magnitude-2:4")
    model.save_pretrained(tmp_path)
    bones = skeleton(tmp_path)
    forms = stored.forms_of_recipe(bones, asked)
    compress_(model, asked)
    swap_(model, list(forms), KERNELS["bitmask"])
    found = stored.forms_of_model(model)
    assert {name: form.bytes for name, form in found.items()} == {name: form.bytes for name, form in forms.items()}
    assert all(form.sparse for form in found.values())


def experts():
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_experts_that_are_quantized_are_read_where_tokens_go(memorized, tmp_path):
    model, asked = experts(), parse_recipe("rtn-w4a16-g32")
    model.save_pretrained(tmp_path / "dense")
    bones = skeleton(tmp_path / "dense")
    forms, dense = stored.forms_of_recipe(bones, asked), stored.module_bytes(bones)
    compress_(model, asked)
    save_model(model, memorized.tokenizer, tmp_path / "packed", asked)
    assert stored.checkpoint_bytes(dense, forms) == tensor_bytes(tmp_path / "packed")
    assert stored.forms_of_model(model) == forms
    assert stored.forms_of_checkpoint(tmp_path / "packed", skeleton(tmp_path / "packed", compressed=True)) == forms
    name = "model.layers.0.mlp.experts"
    whole = sum(
        layer.packed.nbytes + layer.scale.nbytes
        for key, layer in model.named_modules()
        if key.startswith(name) and isinstance(layer, QuantLinear)
    )
    for batch, met in ((1, 2), (2, 4 * (1 - 0.5**2)), (64, 4 * (1 - 0.5**64))):
        _, decode = walk(bones, batch, 3)
        part = stored.apply(decode, forms, dense).by_module()[name]
        assert part.weight_bytes == pytest.approx(whole * met / 4)
        assert part.kept == "w4a16"
    copied, found = stored.meta_copy(model)
    assert found == forms
    assert walk(copied, 1, 3) == walk(bones, 1, 3)


def test_a_model_in_memory_is_walked_as_its_files_are(tmp_path):
    model, asked = tiny(), parse_recipe("rtn-w4a8-g32")
    model.save_pretrained(tmp_path)
    expected = walk(skeleton(tmp_path), 2, 5)
    compress_(model, asked)
    state = copy.deepcopy(model.state_dict())
    copied, forms = stored.meta_copy(model)
    assert walk(copied, 2, 5) == expected
    assert forms == stored.forms_of_recipe(skeleton(tmp_path), asked)
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert not next(model.parameters()).is_meta


def test_numbers_that_multiply_follow_from_both_sides():
    model = tiny()
    model.to("meta")
    for recipe, compute in (
        ("rtn-w4a16-g32", "float32"),
        ("rtn-w4a8-g32", "int8"),
        ("rtn-w8a8", "int8"),
        ("rtn-w4a4", "int4"),
    ):
        _, decode = walk(model, 1, 4)
        decode = stored.apply(decode, stored.forms_of_recipe(model, parse_recipe(recipe)), stored.module_bytes(model))
        parts = decode.by_module()
        assert parts["model.layers.1.mlp.up_proj"].compute == compute
        assert parts["lm_head"].compute == "float32"
        assert parts["model.layers.1.self_attn"].compute == "float32"


@pytest.mark.parametrize(
    "spec",
    [
        KVSpec(4, group_size=8, residual=4),
        KVSpec(8, group_size=16, residual=0),
        KVSpec(2, group_size=8, residual=4, keys="token"),
    ],
)
def test_a_quantized_cache_takes_what_the_formula_says(spec):
    model = tiny()
    ids = torch.randint(2, 300, (2, 37), generator=torch.Generator().manual_seed(0))
    [*kept] = walk(tiny().to("meta"), 2, 36)[1].attention
    attach_kv_(model, spec)
    cache = KVCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    assert serving_of(model).chunks
    analytic = 2 * sum(stored.kv_bytes(spec, each, 37) for each in kept)
    assert cache.memory_bytes() - cache.rows.nbytes == analytic


def test_without_files_the_sizes_of_a_compressed_model_are_not_known(tmp_path):
    config = tiny().config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        stored.forms_of_checkpoint(tmp_path, tiny().to("meta"))
    config.quantization_config = {"quant_method": "magic"}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: quantization_config\.quant_method: 'magic' is not one of"):
        stored.forms_of_checkpoint(tmp_path, tiny().to("meta"))
