"""A mixture of experts compressed as a whole: every expert's layers, its router left alone, reloaded bit for bit."""

import copy

import pytest
import torch
from remanence.compress.checkpoint import load_model, save_model
from remanence.compress.linear import QuantLinear
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.compress.stream import compress_to
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus
from safetensors import safe_open
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GptOssConfig, MixtralConfig, Qwen3MoeConfig

IDS = torch.randint(0, 320, (4, 40), generator=torch.Generator().manual_seed(0))
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
CONFIGS = {"mixtral": MixtralConfig(num_local_experts=4, **SHAPE), "qwen3": Qwen3MoeConfig(**EXPERTS, **SHAPE)}


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(people_corpus(4, "forget30"), DemoConfig(vocab_size=320))


@pytest.fixture(scope="module", params=CONFIGS)
def dense(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[request.param]), dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "name", ["rtn-w4a16-g16", "gptq-w4a16-g16", "hqq-w4a16-g32-asym", "awq-w4a16-g32", "magnitude-s50"]
)
def test_every_expert_is_compressed_and_comes_back(dense, name, tokenizer, tmp_path):
    recipe = parse_recipe(name)
    reports = []
    model = compress_(copy.deepcopy(dense), recipe, [IDS], reports.append)
    save_model(model, tokenizer, tmp_path / "out", recipe)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(model))
    assert (logits(model) - logits(dense)).abs().max() > 1e-3
    if recipe.spec is not None:
        packed = {key for key, module in model.named_modules() if isinstance(module, QuantLinear)}
        assert {report.name for report in reports} == packed
        assert len(packed) == 2 * (4 + 4 * 3)  # per block: attention, and gate, up, down of each expert
        assert not any("gate" in key.split(".")[-1] and "gate_proj" not in key for key in packed)


def test_starved_experts_are_named(dense):
    reports = []
    compress_(copy.deepcopy(dense), parse_recipe("gptq-w4a16-g16"), [IDS[:1]], reports.append)
    starved = [report for report in reports if "tokens: rounded to nearest" in report.note]
    assert starved
    assert all(".experts." in report.name and report.damp is None for report in starved)
    assert any(report.damp is not None for report in reports)


def test_stock_transformers_finds_the_packed_experts(dense, tokenizer, tmp_path):
    pytest.importorskip("compressed_tensors", reason="the stock reader; comes with the extra `ct`")
    recipe = parse_recipe("gptq-w4a16-g16")
    model = compress_(copy.deepcopy(dense), recipe, [IDS])
    save_model(model, tokenizer, tmp_path / "out", recipe)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=CompressedTensorsConfig())
    # It multiplies code and scale in the 16 bits of the scale.
    assert (logits(stock) - logits(model)).abs().max() <= 1e-2


def test_from_pretrained_reads_our_file_and_gives_it_to_nobody_else(dense, tokenizer, tmp_path):
    """After `import remanence`, as before it: by the stock reader."""
    pytest.importorskip("compressed_tensors", reason="the stock reader; comes with the extra `ct`")
    model = compress_(copy.deepcopy(dense), parse_recipe("rtn-w4a16-g16"))
    save_model(model, tokenizer, tmp_path / "out", parse_recipe("rtn-w4a16-g16"))
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    compress_to(tmp_path / "dense", parse_recipe("rtn-w4a16-g16"), tmp_path / "streamed")
    for directory in ("out", "streamed"):
        stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / directory, output_loading_info=True)
        assert not info["missing_keys"]
        assert (logits(stock) - logits(model)).abs().max() <= 1e-2
    with pytest.raises(ValueError, match=r"experts that were taken apart .*checkpoint\.save_model"):
        load_model(tmp_path / "out").save_pretrained(tmp_path / "again")
    save_model(load_model(tmp_path / "out"), tokenizer, tmp_path / "again2")
    assert torch.equal(logits(load_model(tmp_path / "again2")), logits(model))


@pytest.mark.parametrize("name", ["rtn-w8a8", "rtn-w4a4"])
def test_stock_readers_would_not_round_the_inputs_of_fused_experts(dense, name, tokenizer, tmp_path):
    save_model(dense, tokenizer, tmp_path / "dense")
    made = compress_to(tmp_path / "dense", parse_recipe(name), tmp_path / "out")
    assert not made["stock_readable"]
    memory = compress_(copy.deepcopy(dense), parse_recipe(name))
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(memory))
    save_model(memory, tokenizer, tmp_path / "memory", parse_recipe(name))
    for directory in ("out", "memory"):
        assert not list((tmp_path / directory).glob("model*.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        "rtn-w4a16-g16+w8=down_proj",
        "rtn-w4a16-g16+w8=model.layers.0.self_attn",
        "rtn-w4a16-g16-asym",
        "rtn-w4a16-g16+ignore=lm_head|model.layers.0.mlp.experts.1",
    ],
)
def test_stock_readers_would_fuse_what_is_packed_unlike(dense, name, tokenizer, tmp_path):
    """One of them reads wrong numbers without a word, the others fail."""
    save_model(dense, tokenizer, tmp_path / "dense")
    recipe = parse_recipe(name)
    made = compress_to(tmp_path / "dense", recipe, tmp_path / "out")
    assert not made["stock_readable"]
    memory = compress_(copy.deepcopy(dense), recipe)
    save_model(memory, tokenizer, tmp_path / "memory", recipe)
    for directory in ("out", "memory"):
        assert torch.equal(logits(load_model(tmp_path / directory)), logits(memory))
        assert not list((tmp_path / directory).glob("model*.safetensors"))


def test_pruned_experts_are_fused_again_where_files_have_them_so(tokenizer, tmp_path):
    """GPT-OSS: transposed, gate and up taking turns, with biases. Any reader takes the file."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, sliding_window=16, layer_types=["full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    dense = AutoModelForCausalLM.from_config(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    for name, data in (("magnitude-s50", ()), ("wanda-s50", [IDS % len(tokenizer)])):
        recipe = parse_recipe(name)
        memory = compress_(copy.deepcopy(dense), recipe, data)
        save_model(memory, tokenizer, tmp_path / f"{name}-memory", recipe)
        made = compress_to(tmp_path / "dense", recipe, tmp_path / f"{name}-out", data)
        assert made["stock_readable"]
        assert made["max_abs_logit_difference"] == 0
        for directory in (f"{name}-memory", f"{name}-out"):
            for reader in (load_model, AutoModelForCausalLM.from_pretrained):
                again = reader(tmp_path / directory).eval()
                assert (again(IDS % len(tokenizer)).logits - memory(IDS % len(tokenizer)).logits).abs().max() <= 1e-5
            fused = load_model(tmp_path / directory).model.layers[0].mlp.experts.gate_up_proj
            assert 0.45 < float((fused == 0).float().mean()) < 0.55


def test_bitsandbytes_would_leave_them_dense(dense):
    pytest.importorskip("bitsandbytes", reason="comes with the extra `bnb`")
    with pytest.raises(ValueError, match=r"bnb-nf4: .* keeps its experts in fused tensors"):
        compress_(copy.deepcopy(dense), parse_recipe("bnb-nf4"))


def test_smoothquant_names_experts_that_saw_nothing(dense):
    reports = []
    compress_(copy.deepcopy(dense), parse_recipe("smoothquant-w8a8"), [IDS[:1, :2]], reports.append)
    unseen = [report for report in reports if report.note.startswith("0 tokens: rounded to nearest")]
    assert unseen
    assert all(".experts." in report.name and report.error is None for report in unseen)
    assert all(report.input_error is None for report in unseen)


@pytest.mark.parametrize("name", ["rtn-w4a16-g16", "gptq-w4a16-g16", "magnitude-s50"])
def test_streamed_and_in_memory_are_the_same(dense, name, tokenizer, tmp_path):
    recipe = parse_recipe(name)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    save_model(compress_(copy.deepcopy(dense), recipe, [IDS]), tokenizer, tmp_path / "memory", recipe)
    compress_to(tmp_path / "dense", recipe, tmp_path / "streamed", [IDS])

    def tensors(directory):
        found = {}
        for file in directory.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        return found

    ours, theirs = tensors(tmp_path / "streamed"), tensors(tmp_path / "memory")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
