"""Experts apart compute what they did fused, see their own tokens only, and are found again in checkpoints."""

import copy
import json
import weakref

import pytest
import torch
from remanence.compress.experts import (
    ExpertList,
    apart_on_disk,
    checkpoint_names,
    has_fused_experts,
    routers,
    source_keys,
    starved,
    unfuse_experts_,
)
from remanence.compress.linear import QuantLinear
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(2, 34).view(2, 16)
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
# Three of six experts: sums of two have no order, so that top-2 would not show a wrong one.
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 3}
QWEN = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 8}
DEEPSEEK = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
FULL = {"layer_types": ["full_attention"] * 2}
ARCHITECTURES = {
    "mixtral": LOCAL,
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    "qwen3_moe": QWEN | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "phimoe": LOCAL | {"num_experts_per_tok": 2},  # its router takes two, whatever its config says
    "gpt_oss": LOCAL | FULL | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "deepseek_v3": DEEPSEEK,
    "ernie4_5_moe": {
        "moe_num_experts": 6,
        "moe_k": 3,
        "moe_intermediate_size": 24,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 1,
    },
    "lfm2_moe": QWEN | FULL | {"num_dense_layers": 0, "norm_topk_prob": True},
    "minimax_m2": LOCAL | {"head_dim": 8},
    "nemotron_h": {  # no gate
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "layers_block_type": ["attention", "moe"],
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,
    },
}
# Where the usual layout is not <expert>.gate_proj/up_proj/down_proj below the model's own names, and where it is.
USUAL = {
    "mixtral": ("model.layers.0.mlp.experts.5.", "model.layers.0.block_sparse_moe.experts.5.", ("w1", "w3", "w2")),
    "phimoe": ("model.layers.0.mlp.experts.5.", "model.layers.0.block_sparse_moe.experts.5.", ("w1", "w3", "w2")),
    "minimax_m2": ("model.layers.0.mlp.experts.5.", "model.layers.0.block_sparse_moe.experts.5.", ("w1", "w3", "w2")),
    "lfm2_moe": ("model.layers.0.feed_forward.experts.5.",) * 2 + (("w1", "w3", "w2"),),
    "qwen3_moe": ("model.layers.0.mlp.experts.5.",) * 2 + (("gate_proj", "up_proj", "down_proj"),),
    "deepseek_v3": ("model.layers.1.mlp.experts.5.",) * 2 + (("gate_proj", "up_proj", "down_proj"),),
    "gpt_oss": ("model.layers.0.mlp.experts.5.",) * 2 + (("gate_proj", "up_proj", "down_proj"),),
}
every = pytest.mark.parametrize("arch", ARCHITECTURES)


def make(arch, **changes):
    config = AutoConfig.for_model(arch, **(COMMON | ARCHITECTURES.get(arch, {}) | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    return model


def fused_modules(model):
    return [module for module in model.modules() if "down_proj" in module._parameters]


def routing(tokens, experts, k):
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
    return index, torch.rand(tokens, k, generator=generator)


def by_hand(fused, x, index, weights):
    """The sum over experts, one token at a time, in float64, from the fused tensors."""

    def matrix(name, expert):
        weight = fused.get_parameter(name)[expert].double()
        return weight.T if fused.is_transposed else weight

    def bias(name, expert):
        return fused.get_parameter(f"{name}_bias")[expert].double() if fused.has_bias else 0

    out = torch.zeros_like(x, dtype=torch.float64)
    for t, token in enumerate(x.double()):
        for expert, weight in zip(index[t].tolist(), weights[t].double().tolist()):
            if fused.has_gate:
                both = matrix("gate_up_proj", expert) @ token + bias("gate_up_proj", expert)
                if "GptOss" in type(fused).__name__:
                    gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
                    inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                else:
                    gate, up = both.split(len(both) // 2)
                    inner = gate * torch.sigmoid(gate) * up  # silu
            else:
                inner = torch.relu(matrix("up_proj", expert) @ token).square()
            out[t] += weight * (matrix("down_proj", expert) @ inner + bias("down_proj", expert))
    return out


@every
@torch.no_grad()
def test_apart_as_fused(arch):
    """Both round to float32 at every step: 1e-5 of the largest output is some ten such roundings."""
    model = make(arch)
    fused, expected = copy.deepcopy(fused_modules(model)), model(IDS).logits
    assert has_fused_experts(model)
    names = unfuse_experts_(model)
    assert not has_fused_experts(model)
    assert len(names) == len(fused)

    ran = set()
    for name in names:
        for expert in range(6):
            layer = model.get_submodule(f"{name}.{expert}.up_proj")
            layer.register_forward_hook(lambda *_, expert=expert: ran.add(expert))
    logits = model(IDS).logits
    assert len(ran) > 2, "a model that routes all tokens alike would show nothing"
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()

    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(2))
    index, weights = routing(20, 6, 3)
    for name, before in zip(names, fused):
        truth = by_hand(before, x, index, weights)
        apart = model.get_submodule(name)(x, index, weights)
        assert apart.dtype == torch.float32
        assert (apart - truth).abs().max() < 1e-5 * truth.abs().max()


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss", "nemotron_h"])
def test_gradients_as_fused(arch):
    model = make(arch)
    (fused, *_) = copy.deepcopy(fused_modules(model))
    apart = model.get_submodule(unfuse_experts_(model)[0])
    index, weights = routing(20, 6, 3)
    found = []
    for module in (fused, apart):
        x = torch.randn(20, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        w = weights.clone().requires_grad_()
        module(x, index, w).square().sum().backward()
        found += [(x.grad, w.grad)]
    for expected, got in zip(*found):
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    down = fused.down_proj.grad[4].T if fused.is_transposed else fused.down_proj.grad[4]
    assert torch.allclose(apart.get_submodule("4.down_proj").weight.grad, down, rtol=1e-4, atol=1e-4 * down.abs().max())


@torch.no_grad()
def test_layers_see_the_rows_of_their_own_tokens():
    model = make("qwen3_moe")
    experts = model.get_submodule(unfuse_experts_(model)[0])
    seen = {}
    for name, module in experts.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0]))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    # 6 is beyond the last expert: no expert; 2 and 5 get no token.
    index = torch.tensor([[0, 1, 3], [3, 6, 0], [4, 3, 6], [3, 1, 4], [6, 6, 6]])
    out = experts(x, index, torch.full((5, 3), 0.5))
    tokens = {0: [0, 1], 1: [0, 3], 3: [0, 1, 2, 3], 4: [2, 3]}
    assert {name.split(".")[0] for name in seen} == {str(expert) for expert in tokens}
    for expert, rows in tokens.items():
        ((gate,), (up,), (down,)) = (seen[f"{expert}.{layer}_proj"] for layer in ("gate", "up", "down"))
        assert torch.equal(gate, x[rows])
        assert gate.data_ptr() == up.data_ptr(), "one Hessian serves both"
        assert down.shape == (len(rows), 24)
    assert not out[4].any()


@torch.no_grad()
def test_half_precision_sums_in_float32():
    """Added up in bfloat16, six outputs would lose another bit or two."""
    model = make("qwen3_moe")
    (fused, *_) = copy.deepcopy(fused_modules(model.to(torch.bfloat16)))
    apart = model.get_submodule(unfuse_experts_(model)[0])
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    index, weights = routing(200, 6, 6)
    for dtype in (torch.bfloat16, torch.float32):  # routers give either
        w = weights.to(dtype)
        truth = by_hand(fused, x, index, w)
        out, reference = apart(x, index, w), fused(x, index, w)
        assert out.dtype == torch.bfloat16
        assert (out - truth).square().mean() < 1.05 * (reference - truth).square().mean()
        assert (out - truth).abs().max() < 0.02 * truth.abs().max()


@every
def test_without_weights_the_structure_is_the_same(arch):
    model = make(arch)
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(model.config)
    assert unfuse_experts_(hollow) == unfuse_experts_(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in hollow.named_parameters()} == shapes
    assert {parameter.device.type for parameter in hollow.parameters()} == {"meta"}
    assert checkpoint_names(hollow) == checkpoint_names(model)


@every
def test_every_layer_is_its_own_part_of_the_fused_tensor(arch):
    """Computing alike is not enough: halves taken for turns, and put back so, would compute GPT-OSS just as well."""
    model = make(arch)
    fused = copy.deepcopy(fused_modules(model))
    for name, before in zip(unfuse_experts_(model), fused):
        for expert in range(6):
            layers = dict(model.get_submodule(f"{name}.{expert}").named_children())
            down = before.down_proj[expert]
            if arch == "gpt_oss":
                both, bias = before.gate_up_proj[expert].T, before.gate_up_proj_bias[expert]
                down = down.T
                expected = {"gate_proj": both[0::2], "up_proj": both[1::2], "down_proj": down}
                assert torch.equal(layers["gate_proj"].bias, bias[0::2])
                assert torch.equal(layers["up_proj"].bias, bias[1::2])
                assert torch.equal(layers["down_proj"].bias, before.down_proj_bias[expert])
            elif arch == "nemotron_h":
                expected = {"up_proj": before.up_proj[expert], "down_proj": down}
            else:
                both = before.gate_up_proj[expert]
                expected = {"gate_proj": both[:24], "up_proj": both[24:], "down_proj": down}
            assert set(layers) == set(expected)
            for member, weight in expected.items():
                assert torch.equal(layers[member].weight, weight)
                assert (layers[member].out_features, layers[member].in_features) == weight.shape


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])  # one of contiguous parts, one of strided ones
def test_every_weight_has_memory_of_its_own(arch):
    model = make(arch).to(torch.bfloat16).requires_grad_(False)
    names = unfuse_experts_(model)
    parts = [p for name in names for p in model.get_submodule(name).parameters()]
    assert len({p.untyped_storage().data_ptr() for p in parts}) == len(parts)
    assert all(p.untyped_storage().nbytes() == p.nbytes and p.is_contiguous() for p in parts)
    assert {(p.dtype, p.requires_grad) for p in parts} == {(torch.bfloat16, False)}
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])
def test_a_fused_tensor_is_gone_before_the_next_is_taken_apart(arch):
    """Else there would be two models in memory at the end."""
    model = make(arch)
    first, last = fused_modules(model)
    when = []
    for parameter in first.parameters():
        weakref.finalize(parameter, lambda: when.append(type(model.model.layers[1].mlp.experts)))
    kind, count = type(last), len(list(first.parameters()))
    del parameter, first, last
    unfuse_experts_(model)
    assert when == [kind] * count, "the second layer was still as it had been"


def saved(model, directory):
    """What transformers writes, in several files."""
    model.save_pretrained(directory, max_shard_size="20KB")
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 1
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def read(source, stored):
    tensor = stored[source.key]
    return source.take(tensor if source.expert is None else tensor[source.expert])


@every
def test_found_in_what_transformers_saved(arch, tmp_path):
    model = make(arch)
    stored = saved(model, tmp_path)
    unfuse_experts_(model)
    sources = source_keys(model, stored)
    state = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(sources) == set(state) - tied
    assert {source.key for source in sources.values()} == set(stored)
    assert apart_on_disk(model) == all(source.expert is None for source in sources.values()) == (arch != "gpt_oss")
    for name, source in sources.items():
        assert torch.equal(read(source, stored), state[name]), name


@every
def test_found_where_they_are_fused(arch):
    """A file under the model's own names; its experts are read one by one."""
    model = make(arch)
    stored = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    unfuse_experts_(model)
    sources = source_keys(model, stored)
    state = model.state_dict()
    assert set(sources) == set(state)
    assert any(source.expert == 5 for source in sources.values())
    for name, source in sources.items():
        assert torch.equal(read(source, stored), state[name]), name


@pytest.mark.parametrize("arch", USUAL)
def test_the_usual_names(arch):
    own, usual, layers = USUAL[arch]
    model = make(arch)
    unfuse_experts_(model)
    names = checkpoint_names(model)
    assert set(names) == set(model.state_dict())
    assert len(set(names.values())) == len(names)
    for member, layer in zip(("gate_proj", "up_proj", "down_proj"), layers):
        assert names[f"{own}{member}.weight"] == f"{usual}{layer}.weight"
    # ... and a file with these is read back, whatever transformers makes of it.
    assert {name: source.key for name, source in source_keys(model, list(names.values())).items()} == names


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "gpt_oss"])
@torch.no_grad()
def test_transformers_reads_what_is_written_under_the_usual_names(arch, tmp_path):
    model = make(arch)
    expected = model(IDS).logits
    unfuse_experts_(model)
    names = checkpoint_names(model)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {names[key]: tensor for key, tensor in model.state_dict().items() if key not in tied}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(json.loads(model.config.to_json_string()) | {"dtype": "float32"}))
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(stock.eval()(IDS).logits, expected)


def test_names_stay_when_layers_are_packed():
    model = make("mixtral")
    unfuse_experts_(model)
    before = checkpoint_names(model)
    experts = model.get_submodule("model.layers.1.mlp.experts.3")
    packed, scale = torch.zeros(24, 16, dtype=torch.uint8), torch.ones(24, 1)
    experts.gate_proj = QuantLinear(None, 32, packed, scale, None)
    assert checkpoint_names(model) == before


def test_names_do_not_depend_on_where_the_model_was_read_from(tmp_path):
    """transformers writes a model back in the layout that it was read in; the usual layout is asked for here."""
    model = make("mixtral")
    model.save_pretrained(tmp_path)
    reread = AutoModelForCausalLM.from_pretrained(tmp_path)
    reread._weight_conversions = kept = []
    unfuse_experts_(model)
    unfuse_experts_(reread)
    assert checkpoint_names(reread) == checkpoint_names(model)
    assert reread._weight_conversions is kept


def test_a_layout_that_is_no_renaming_is_refused():
    """Bailing's files hold three convolutions where the model holds one."""
    try:
        config = AutoConfig.for_model("bailing_hybrid", **(COMMON | DEEPSEEK | {"num_experts": 4}))
    except ValueError:
        pytest.skip("this transformers has no such model")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    unfuse_experts_(model)
    with pytest.raises(ValueError, match=r"self_attn\.conv1d\.weight of a BailingHybridForCausalLM in another form"):
        checkpoint_names(model)


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("llama4_text", LOCAL | FULL | {"head_dim": 8, "no_rope_layers": [1, 1]}, r"layers\.0.*Llama4TextExperts"),
        ("jetmoe", LOCAL | {"kv_channels": 8, "num_key_value_heads": 4}, r"layers\.0.*JetMoeParallelExperts"),
    ],
)
def test_unknown_experts_are_named(arch, changes, message):
    config = AutoConfig.for_model(arch, **(COMMON | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert has_fused_experts(model)
    with pytest.raises(ValueError, match=message + ".*form of its own"):
        unfuse_experts_(model)


def test_nothing_is_changed_when_one_is_refused():
    model = make("mixtral")
    last = fused_modules(model)[-1]
    last.forward = last.forward  # as accelerate does
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts: MixtralExperts has its forward replaced"):
        unfuse_experts_(model)
    del last.forward
    assert list(model.state_dict()) == keys
    last.extra = nn.Parameter(torch.zeros(6, 2, 2))
    with pytest.raises(ValueError, match=r"MixtralExperts has parameters.*'extra': 3"):
        unfuse_experts_(model)
    assert sorted(model.state_dict()) == sorted([*keys, "model.layers.1.mlp.experts.extra"])
    with pytest.raises(ValueError, match="MixtralExperts is the experts alone"):
        unfuse_experts_(fused_modules(make("mixtral"))[0])


def test_experts_used_in_two_places_stay_one():
    model = make("mixtral")
    first, second = (layer.mlp for layer in model.model.layers)
    second.experts = first.experts
    names = unfuse_experts_(model)
    assert names == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert isinstance(first.experts, ExpertList)
    assert second.experts is first.experts


def test_routers():
    """Most are no nn.Linear in transformers 5, and need no naming; which are depends on its version."""
    found = {arch: routers(make(arch)) for arch in ("qwen2_moe", "phimoe", "mixtral")}
    for layer in (0, 1):
        assert f"model.layers.{layer}.mlp.shared_expert_gate" in found["qwen2_moe"]
        assert f"model.layers.{layer}.mlp.router" in found["phimoe"]
    for arch, names in found.items():
        model = make(arch)
        unfuse_experts_(model)
        assert routers(model) == names, "the same before and after"
        left = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - set(names)
        assert not [name for name in left if "gate." in f"{name}." or "router" in name]
        assert f"model.layers.0.mlp.experts.0.{'gate_proj'}" in left


def test_a_model_without_experts_is_left_alone(untrained):
    for arch in ("llama", "opt", "gpt2"):
        model = untrained(arch)
        keys = list(model.state_dict())
        assert not has_fused_experts(model)
        assert unfuse_experts_(model) == []
        assert routers(model) == []
        assert list(model.state_dict()) == keys
        assert checkpoint_names(model) == dict(zip(keys, keys))
        assert apart_on_disk(model)


@pytest.mark.parametrize(
    ("features", "enough"), [(1, 32), (32, 32), (256, 32), (263, 32), (264, 33), (4096, 512), (14336, 1792)]
)
def test_starved(features, enough):
    assert starved(0, features)
    assert starved(enough - 1, features)
    assert not starved(enough, features)
