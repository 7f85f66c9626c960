"""Rotated models are the same models: in memory, on disk, in stock transformers; and what cannot be rotated is left."""

import pytest
import torch
from remanence.compress.checkpoint import load_model, save_model
from remanence.compress.experts import unfuse_experts_
from remanence.compress.recipe import parse_recipe
from remanence.compress.rotation import hang_, online_layers, online_rotations, plan_rotation, rotate_
from remanence.compress.sequential import compress_
from remanence.compress.spec import Rotation
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SHAPE = {"num_hidden_layers": 2, "max_position_embeddings": 64, "intermediate_size": 88, **IDS}
W48 = {"hidden_size": 48, "num_attention_heads": 4, **SHAPE}
W56 = {"hidden_size": 56, "num_attention_heads": 4, **SHAPE}
W96 = {"hidden_size": 96, "num_attention_heads": 6, **SHAPE}
GROUPED = {"num_key_value_heads": 2}
OPT = {"hidden_size": 56, "word_embed_proj_dim": 56, "ffn_dim": 88, "dropout": 0.0, "num_attention_heads": 4}
OPT |= {"num_hidden_layers": 2, "max_position_embeddings": 64, **IDS}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS}
# So many that the tokens which rotate_ looks at do not reach all of them.
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 40}

RMS, LAYER = False, True
# Architecture: (its config, whether it has LayerNorms, output projection of attention in a layer)
MODELS = {
    "llama": (lambda: LlamaConfig(**W48, **GROUPED), RMS, "self_attn.o_proj"),
    "llama-56": (lambda: LlamaConfig(**W56), RMS, "self_attn.o_proj"),
    "llama-96-biases": (lambda: LlamaConfig(**W96, attention_bias=True, mlp_bias=True), RMS, "self_attn.o_proj"),
    "llama-tied": (lambda: LlamaConfig(**W96, tie_word_embeddings=True), RMS, "self_attn.o_proj"),
    "mistral": (lambda: MistralConfig(**W96, **GROUPED), RMS, "self_attn.o_proj"),
    "qwen2": (lambda: Qwen2Config(**W48, **GROUPED, tie_word_embeddings=True), RMS, "self_attn.o_proj"),
    "qwen3": (lambda: Qwen3Config(**W56, **GROUPED, head_dim=24), RMS, "self_attn.o_proj"),
    "gemma": (lambda: GemmaConfig(**W48, num_key_value_heads=1, head_dim=16), RMS, "self_attn.o_proj"),
    "phi3": (lambda: Phi3Config(**W96, **GROUPED), RMS, "self_attn.o_proj"),
    "phi": (lambda: PhiConfig(**W48), LAYER, "self_attn.dense"),
    "phi-96": (lambda: PhiConfig(**W96, **GROUPED), LAYER, "self_attn.dense"),
    "opt": (lambda: OPTConfig(**OPT), LAYER, "self_attn.out_proj"),
    "opt-untied": (lambda: OPTConfig(**OPT, tie_word_embeddings=False), LAYER, "self_attn.out_proj"),
    "opt-no-biases": (lambda: OPTConfig(**OPT, enable_bias=False), LAYER, "self_attn.out_proj"),
    "gpt2": (lambda: GPT2Config(**GPT2), LAYER, "attn.c_proj"),
    "neox": (lambda: GPTNeoXConfig(**W48), LAYER, "attention.dense"),
    "neox-serial": (lambda: GPTNeoXConfig(**W48, use_parallel_residual=False), LAYER, "attention.dense"),
    "stablelm": (lambda: StableLmConfig(**W96, **GROUPED), LAYER, "self_attn.o_proj"),
    "cohere": (lambda: CohereConfig(**W48, **GROUPED), LAYER, "self_attn.o_proj"),
    "olmo": (lambda: OlmoConfig(**W48, **GROUPED), LAYER, "self_attn.o_proj"),
    "falcon": (
        lambda: FalconConfig(**W48, num_kv_heads=2, new_decoder_architecture=True, alibi=False),
        LAYER,
        "self_attention.dense",
    ),
}
MIXTURES = {
    "mixtral": lambda: MixtralConfig(
        **(W48 | {"intermediate_size": 24}), **GROUPED, num_local_experts=40, num_experts_per_tok=2
    ),
    "qwen2-moe": lambda: Qwen2MoeConfig(**W48, **GROUPED, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3-moe": lambda: Qwen3MoeConfig(**W48, **GROUPED, **EXPERTS, head_dim=16),
}
HADAMARD = Rotation("hadamard")


def build(config, dtype=torch.float32):
    """Random weights everywhere; norms' gains from about 0 to 2, and their biases, are random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.4 if parameter.dim() == 1 else 0.15) * torch.randn(parameter.shape)
    return model.to(dtype)


def logits(model, seed=5, shape=(3, 24)):
    """On other tokens than those that rotate_ looks at."""
    ids = torch.randint(2, 60, shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits


def off(now, before):
    return float((now.double() - before.double()).abs().max() / before.double().abs().max())


def norms(model):
    return {n: p for n, p in model.named_parameters() if "norm" in n or ".ln_" in n}


def traced(model, name):
    """What the module called `name` was given and what it made of it."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    logits(model)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits_in_memory_and_in_stock_transformers(name, tmp_path):
    config, layernorms, out = MODELS[name]
    model = build(config())
    before, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    found = rotate_(model, HADAMARD, seed=1)
    assert off(logits(model), before) < 1e-5
    assert found.difference < 1e-5
    assert found.notes == ()
    assert found.keeps_mean == layernorms
    # Both rotations are there, and every matrix of the model has been changed by one.
    assert list(found.rotations) == ["", *(k for k in found.rotations if k.endswith(f".{out}"))]
    assert len(found.rotations) == 3
    for key, value in model.state_dict().items():
        if value.dim() == 2:
            assert off(value, state[key]) > 0.1, key
    for R in found.rotations.values():
        assert float((R @ R.T - torch.eye(len(R))).abs().max()) < 1e-12
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model)
    assert off(logits(loaded.eval()), before) < 1e-5


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("name", ["llama", "opt", "gemma", "gpt2"])
def test_the_residual_stream_is_rotated(name, kind):
    """What enters the second layer is Q x; and norms have no gain left."""
    model = build(MODELS[name][0]())
    second = {"llama": "model.layers.1", "opt": "model.decoder.layers.1", "gemma": "model.layers.1"}
    where = second.get(name, "transformer.h.1")
    before = traced(model, where)[0]
    found = rotate_(model, Rotation(kind), seed=2)
    Q = found.rotations[""]
    assert off(traced(model, where)[0], before.double() @ Q.T) < 1e-5
    assert off(before, before.double() @ Q.T) > 0.1
    for key, parameter in norms(model).items():
        if key.endswith("weight"):
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if name == "gemma" else 1.0)), key
    biases = [key for key, parameter in norms(model).items() if key.endswith("bias") and parameter.any()]
    # Linear layers took them, but the head, which has no bias.
    assert biases == {"opt": ["model.decoder.final_layer_norm.bias"], "gpt2": ["transformer.ln_f.bias"]}.get(name, [])


def test_heads_are_rotated():
    model = build(MODELS["llama"][0]())
    name = "model.layers.0.self_attn"
    before = traced(model, f"{name}.v_proj")[1]
    found = rotate_(model, HADAMARD)
    after = traced(model, f"{name}.v_proj")[1]
    R = found.rotations[f"{name}.o_proj"]
    assert R.shape == (12, 12)  # two heads of keys and values
    heads = before.double().unflatten(-1, (2, 12)) @ R.T
    assert off(after, heads.flatten(-2)) < 1e-5


def test_seeds_and_kinds_differ():
    made = [
        rotate_(build(LlamaConfig(**W48)), Rotation(kind), seed).rotations[""]
        for kind, seed in (("hadamard", 0), ("hadamard", 0), ("hadamard", 1), ("orthogonal", 0))
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2])
    assert not torch.allclose(made[0], made[3])
    assert float((made[0].abs() - 48**-0.5).abs().max()) < 1e-12


def test_a_tied_head_gets_its_own_weight():
    model = build(MODELS["llama-tied"][0]())
    model.train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rotate_(model, HADAMARD)
    assert model.training
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    before = model.lm_head.weight.clone()
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_outliers_are_spread(name):
    """A channel of the stream that is 30 times as large as the others is no longer seen by linear layers."""
    model = build(MODELS[name][0]())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "embed" in key:
                parameter[:, 7] *= 30
            elif key.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                parameter[7] *= 30
    where = {"llama": "model.layers.1.mlp.up_proj", "opt": "model.decoder.layers.1.fc1"}[name]

    def peak():
        x = traced(model, where)[0]
        return float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())

    before, had = logits(model), peak()
    rotate_(model, HADAMARD)
    assert off(logits(model), before) < 1e-5
    assert peak() < 0.7 * had


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name, tmp_path):
    """Experts without a token, routers, shared experts; written with the experts one by one, read by stock readers."""
    model = build(MIXTURES[name]())
    before = logits(model, shape=(8, 60))
    unfuse_experts_(model)
    ids = plan_rotation(model).ids
    ran = set()
    experts = {key: module for key, module in model.named_modules() if key.endswith("down_proj") and "experts." in key}
    handles = [module.register_forward_hook(lambda *_, key=key: ran.add(key)) for key, module in experts.items()]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    assert 40 < len(ran) < len(experts) - 2
    found = rotate_(model, HADAMARD)
    assert found.difference < 1e-5
    assert off(logits(model, shape=(8, 60)), before) < 1e-5
    assert len(found.rotations) == 3
    words = {f"w{i}": i for i in range(58)} | {"<pad>": 58, "<eos>": 59}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "<pad>")), eos_token="<eos>")
    save_model(model, tokenizer, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert off(logits(loaded, shape=(8, 60)), before) < 1e-5
    assert off(logits(load_model(tmp_path / "m"), shape=(8, 60)), before) < 1e-5


def test_sixteen_bits():
    model = build(MODELS["llama"][0](), torch.bfloat16)
    before = logits(model)
    found = rotate_(model, HADAMARD)
    assert found.difference < 1e-5  # compared in float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    # Weights rounded to 8 bits once more, and other numbers on the way.
    assert 1e-4 < off(logits(model), before) < 0.05


REFUSED = {
    "gemma2": (
        lambda: Gemma2Config(**W48, **GROUPED, head_dim=12),
        r"model.layers.0.post_attention_layernorm is a norm between a layer and the residual stream, with gains from",
    ),
    "olmo2": (lambda: Olmo2Config(**W48, **GROUPED), r"model.layers.0.post_attention_layernorm is a norm between"),
    "opt-350m": (
        lambda: OPTConfig(**OPT, do_layer_norm_before=False),
        r"no linear layer reads what model.decoder.layers.\d.final_layer_norm puts out",
    ),
    "opt-350m-projected": (
        lambda: OPTConfig(**(OPT | {"word_embed_proj_dim": 32}), do_layer_norm_before=False),
        r"no linear layer reads what",
    ),
    "bloom": (
        lambda: BloomConfig(hidden_size=48, n_layer=2, n_head=4, **IDS),
        r"no linear layer reads what transformer.word_embeddings_layernorm puts out",
    ),
}


def assert_untouched(model, state, act, match):
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with pytest.raises(ValueError, match=rf"^model: {type(model).__name__} cannot be rotated: .*{match}"):
        act(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.tie_word_embeddings == tied
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rotated_is_left_as_it_was(name):
    config, match = REFUSED[name]
    model = build(config())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert_untouched(model, state, lambda m: rotate_(m, HADAMARD), match)


def test_norms_behind_writers_with_one_gain_for_all_channels():
    """Such a gain commutes with every rotation."""
    model = build(Gemma2Config(**W48, **GROUPED, head_dim=12))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.fill_(-0.3)
            layer.post_feedforward_layernorm.weight.fill_(0.3)
    before = logits(model)
    rotate_(model, HADAMARD)
    assert off(logits(model), before) < 1e-5


def test_what_is_not_understood_shows_in_the_logits():
    model = build(LlamaConfig(**W48, tie_word_embeddings=True))
    state = {key: value.clone() for key, value in model.state_dict().items()}

    class Bent(nn.Module):
        def forward(self, x):
            return x + x.tanh()

    attention = model.model.layers[0].self_attn
    attention.o_proj = nn.Sequential(attention.o_proj, Bent())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert_untouched(model, state, lambda m: rotate_(m, HADAMARD), "its logits change by .* of the largest")


def test_layers_that_do_not_run_and_norms_of_another_kind():
    model = build(LlamaConfig(**W48))
    model.model.layers[1].side = nn.Linear(48, 48)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert_untouched(model, state, lambda m: rotate_(m, HADAMARD), "model.layers.1.side does not run on plain tokens")

    class MaxNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(48) + 0.5)

        def forward(self, x):
            return self.weight * x / x.abs().amax(-1, keepdim=True)

    model = build(LlamaConfig(**W48))
    model.model.layers[1].input_layernorm = MaxNorm()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    match = "model.layers.1.input_layernorm: MaxNorm does not commute with any rotation"
    assert_untouched(model, state, lambda m: rotate_(m, HADAMARD), match)


def test_a_bias_that_no_layer_could_take():
    model = build(MODELS["opt"][0]())
    with torch.no_grad():
        model.model.decoder.final_layer_norm.weight[3] = 0
        model.model.decoder.layers[0].final_layer_norm.weight[5] = 0  # fc1 has a bias
    state = {key: value.clone() for key, value in model.state_dict().items()}
    match = r"model.decoder.final_layer_norm has gain 0 and bias \S+ in channel 3"
    assert_untouched(model, state, lambda m: rotate_(m, HADAMARD), match)
    with torch.no_grad():
        model.model.decoder.final_layer_norm.bias[3] = 0
    before = logits(model)
    rotate_(model, HADAMARD)
    assert off(logits(model), before) < 1e-5


def test_heads_that_cannot_be_rotated_are_left_out_and_named():
    """Values that go through a nonlinear function: the stream is rotated all the same."""
    model = build(LlamaConfig(**W48))
    attention = model.model.layers[1].self_attn
    attention.v_proj = nn.Sequential(attention.v_proj, nn.Tanh())
    before = logits(model)
    found = rotate_(model, HADAMARD)
    assert off(logits(model), before) < 1e-5
    assert list(found.rotations) == ["", "model.layers.0.self_attn.o_proj"]
    assert len(found.notes) == 1
    assert found.notes[0].startswith("model.layers.1: heads are not rotated")


def test_wrong_input():
    model = build(LlamaConfig(**W48))
    with pytest.raises(ValueError, match="rotation: 'learned' needs calibration data"):
        rotate_(model, Rotation("learned"))
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"cannot be rotated: model.layers.0.mlp.up_proj.weight and .* one weight"):
        rotate_(model, HADAMARD)
    model = compress_(build(LlamaConfig(**W48)), parse_recipe("rtn-w8a16"))
    with pytest.raises(ValueError, match="cannot be rotated: it is quantized already"):
        rotate_(model, HADAMARD)
    model = build(LlamaConfig(**W48))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="cannot be rotated: its logits are not finite"):
        rotate_(model, HADAMARD)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi", "mixtral"])
def test_online_rotations(name):
    """With every transform in place the model is the same; without, it is another one."""
    config = MODELS[name][0] if name in MODELS else MIXTURES[name]
    model = build(config())
    before = logits(model)
    rotate_(model, HADAMARD)
    transforms = online_rotations(model, online_layers(model), seed=3)
    last = {"llama": "down_proj", "opt": "fc2", "gpt2": "mlp.c_proj", "phi": "fc2", "mixtral": "down_proj"}[name]
    assert len(transforms) == (80 if name == "mixtral" else 2)
    assert all(key.endswith(f".{last}") for key in transforms)
    assert off(logits(model), before) > 0.01
    for key, transform in transforms.items():
        module = model.get_submodule(key)
        module.register_forward_pre_hook(lambda _, args, transform=transform: (transform(args[0]),))
    assert off(logits(model), before) < 1e-5
    hung = build(config())
    hang_(hung, online_layers(hung), seed=3)
    assert off(logits(hung), before) < 1e-5
    assert torch.equal(
        hung.get_submodule(next(iter(transforms))).transform.signs, next(iter(transforms.values())).signs
    )
