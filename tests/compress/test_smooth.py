"""What may be smoothed in each architecture, what must not be, and that folding changes nothing but rounding."""

import pytest
import torch
from remanence.compress.block import Block, Hidden, block_names, decoder_list, enter
from remanence.compress.experts import unfuse_experts_
from remanence.compress.smooth import fold_, pairs, survey
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, **IDS}
MLP = {"intermediate_size": 64}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_experts": 6}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, **IDS}

ATTENTION = [
    "input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj",
    "self_attn.v_proj -> self_attn.o_proj",
]
LLAMA = [
    *ATTENTION,
    "post_attention_layernorm -> mlp.gate_proj, mlp.up_proj",
    "mlp.up_proj -> mlp.down_proj",
]
PARALLEL = [
    "input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, mlp.gate_proj, mlp.up_proj",
    LLAMA[1],
    LLAMA[3],
]
NEOX = [
    "input_layernorm -> attention.query_key_value",
    "attention.query_key_value -> attention.dense",
    "post_attention_layernorm -> mlp.dense_h_to_4h",
]
# Architecture: (its config, what may be smoothed, which other layers may not). Behind a GELU nothing may; Olmo has no
# weights in its norms (Olmo2 none in front); OPT-350M and one sort of Bloom add the norm's output to the residual.
MODELS = {
    "llama": (lambda: LlamaConfig(**SHAPE, **MLP, **GROUPED), LLAMA, ()),
    "llama-biases": (lambda: LlamaConfig(**SHAPE, **MLP, attention_bias=True, mlp_bias=True), LLAMA, ()),
    "llama-square": (lambda: LlamaConfig(**SHAPE, intermediate_size=32), LLAMA, ()),
    "llama-reglu": (lambda: LlamaConfig(**SHAPE, **MLP, hidden_act="relu"), LLAMA, ()),
    "mistral": (lambda: MistralConfig(**SHAPE, **MLP, **GROUPED), LLAMA, ()),
    "qwen2": (lambda: Qwen2Config(**SHAPE, **MLP, **GROUPED), LLAMA, ()),
    "qwen3": (lambda: Qwen3Config(**SHAPE, **MLP, **GROUPED, head_dim=16), LLAMA, ()),
    "gemma": (lambda: GemmaConfig(**SHAPE, **MLP, num_key_value_heads=1, head_dim=16), LLAMA, ()),
    "gemma2": (
        lambda: Gemma2Config(**SHAPE, **MLP, **GROUPED, head_dim=8),
        [*ATTENTION, "pre_feedforward_layernorm -> mlp.gate_proj, mlp.up_proj", LLAMA[3]],
        (),
    ),
    "phi": (
        lambda: PhiConfig(**SHAPE, **MLP),
        [f"{ATTENTION[0]}, mlp.fc1", "self_attn.v_proj -> self_attn.dense"],
        ("mlp.fc2",),
    ),
    "phi3": (
        lambda: Phi3Config(**SHAPE, **MLP, **GROUPED),
        [
            "input_layernorm -> self_attn.qkv_proj",
            "self_attn.qkv_proj -> self_attn.o_proj",
            "post_attention_layernorm -> mlp.gate_up_proj",
            "mlp.gate_up_proj -> mlp.down_proj",
        ],
        (),
    ),
    "opt": (
        lambda: OPTConfig(**SHAPE, **OPT),
        [
            "self_attn_layer_norm -> self_attn.k_proj, self_attn.v_proj, self_attn.q_proj",
            "self_attn.v_proj -> self_attn.out_proj",
            "final_layer_norm -> fc1",
            "fc1 -> fc2",
        ],
        (),
    ),
    "opt-350m": (
        lambda: OPTConfig(**SHAPE, **OPT, do_layer_norm_before=False),
        ["self_attn.v_proj -> self_attn.out_proj", "fc1 -> fc2"],
        ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "fc1"),
    ),
    "opt-gelu": (
        lambda: OPTConfig(**SHAPE, **OPT, activation_function="gelu"),
        [
            "self_attn_layer_norm -> self_attn.k_proj, self_attn.v_proj, self_attn.q_proj",
            "self_attn.v_proj -> self_attn.out_proj",
            "final_layer_norm -> fc1",
        ],
        ("fc2",),
    ),
    "gpt2": (
        lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS),
        ["ln_1 -> attn.c_attn", "attn.c_attn -> attn.c_proj", "ln_2 -> mlp.c_fc"],
        ("mlp.c_proj",),
    ),
    "bigcode": (
        lambda: GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64, **IDS),
        ["ln_1 -> attn.c_attn", "attn.c_attn -> attn.c_proj", "ln_2 -> mlp.c_fc"],
        ("mlp.c_proj",),
    ),
    "neox": (lambda: GPTNeoXConfig(**SHAPE, **MLP), NEOX, ("mlp.dense_4h_to_h",)),
    "neox-serial": (
        lambda: GPTNeoXConfig(**SHAPE, **MLP, use_parallel_residual=False),
        NEOX,
        ("mlp.dense_4h_to_h",),
    ),
    "stablelm": (lambda: StableLmConfig(**SHAPE, **MLP, **GROUPED), LLAMA, ()),
    "stablelm-parallel": (
        lambda: StableLmConfig(**SHAPE, **MLP, **GROUPED, use_parallel_residual=True),
        PARALLEL,
        (),
    ),
    "cohere": (lambda: CohereConfig(**SHAPE, **MLP, **GROUPED), PARALLEL, ()),
    "olmo": (
        lambda: OlmoConfig(**SHAPE, **MLP, **GROUPED),
        [LLAMA[1], LLAMA[3]],
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
    ),
    "olmo2": (
        lambda: Olmo2Config(**SHAPE, **MLP, **GROUPED),
        [LLAMA[1], LLAMA[3]],
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
    ),
    "falcon": (
        lambda: FalconConfig(**SHAPE, num_kv_heads=2, new_decoder_architecture=True, alibi=False),
        [
            "ln_attn -> self_attention.query_key_value",
            "self_attention.query_key_value -> self_attention.dense",
            "ln_mlp -> mlp.dense_h_to_4h",
        ],
        ("mlp.dense_4h_to_h",),
    ),
    "bloom": (
        lambda: BloomConfig(**BLOOM),
        [
            "input_layernorm -> self_attention.query_key_value",
            "self_attention.query_key_value -> self_attention.dense",
            "post_attention_layernorm -> mlp.dense_h_to_4h",
        ],
        ("mlp.dense_4h_to_h",),
    ),
    "bloom-post": (
        lambda: BloomConfig(**BLOOM, apply_residual_connection_post_layernorm=True),
        ["self_attention.query_key_value -> self_attention.dense"],
        ("self_attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
}
MIXTURES = {
    "mixtral": lambda: MixtralConfig(**SHAPE, **MLP, **GROUPED, num_local_experts=6, num_experts_per_tok=2),
    "qwen2-moe": lambda: Qwen2MoeConfig(**SHAPE, **MLP, **GROUPED, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SHAPE, **MLP, **GROUPED, **EXPERTS, head_dim=16),
}


def build(config, dtype=torch.float32):
    """Random weights in every parameter, norms and biases too, so that each has its say."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.to(dtype)


def block_of(model, lengths=(9, 12, 9)):
    """The last decoder layer, with what the ones before it make of batches of two sequences."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(2, 60, (2, length), generator=generator) for length in lengths]
    hidden = Hidden(batches, 32, model.dtype)
    calls = enter(model, batches, hidden)
    names, layers = block_names(model), decoder_list(model)[2]
    with torch.no_grad():
        for name, layer, call in zip(names[:-1], layers[:-1], calls[:-1], strict=True):
            before = Block(name, layer, {}, model.config, call, hidden)
            for i in range(len(batches)):
                hidden.write(i, before.forward(i))
    linears = {name: m for name, m in layers[-1].named_modules() if isinstance(m, nn.Linear | Conv1D)}
    return Block(names[-1], layers[-1], linears, model.config, calls[-1], hidden)


def outputs(block):
    with torch.no_grad():
        return torch.cat([block.forward(i).flatten() for i in range(len(block))])


def off(now, before):
    return float((now.double() - before.double()).norm() / before.double().norm())


def old_outputs(pair):
    """Features that the earlier operation puts out."""
    return getattr(pair.module, "nf", None) or len(pair.module.weight)


def random_scales(pair, seed=2):
    """From about 1/10 to 10."""
    s = (0.8 * torch.randn(len(pair.rows), generator=torch.Generator().manual_seed(seed))).exp()
    return pair.tie(s)


@pytest.mark.parametrize("name", MODELS)
def test_what_may_be_smoothed(name):
    config, expected, refused = MODELS[name]
    found, reasons = survey(block_of(build(config())))
    assert [pair.name for pair in found] == expected
    assert set(reasons) == set(refused)


@pytest.mark.parametrize("name", MODELS)
def test_folding_random_scales_leaves_the_output(name):
    block = block_of(build(MODELS[name][0]()))
    before = outputs(block)
    found = pairs(block)
    weights = {key: value.clone() for key, value in block.module.state_dict().items()}
    for pair in found:
        fold_(pair, random_scales(pair))
        # float32 rounding: each weight that took part is off by up to 6e-8 of itself
        assert off(outputs(block), before) < 2e-6, pair.name
    for pair in found:
        assert not torch.allclose(pair.module.weight, weights[f"{pair.previous}.weight"], rtol=0.1)
        fold_(pair, 1 / random_scales(pair))
    for key, value in block.module.state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma", "opt", "gpt2", "phi3", "falcon"])
def test_folding_is_the_formula_in_float64(name):
    """previous / s, (1 + w) / s - 1 in Gemma's norms, W diag(s); only the rows that are read."""
    block = block_of(build(MODELS[name][0]()))
    for pair in pairs(block):
        s = random_scales(pair)
        before = {n: m.weight.detach().double().clone() for n, m in {pair.previous: pair.module, **pair.fed}.items()}
        bias = None if getattr(pair.module, "bias", None) is None else pair.module.bias.detach().double().clone()
        fold_(pair, s)
        whole = torch.ones(old_outputs(pair), dtype=torch.float64)
        for k, row in enumerate(pair.rows.tolist()):
            whole[row] = s[k].double()
        for reader, module in pair.fed.items():
            diagonal = torch.diag(s.double())
            now = diagonal @ before[reader] if isinstance(module, Conv1D) else before[reader] @ diagonal
            torch.testing.assert_close(module.weight.double(), now, rtol=1e-6, atol=1e-9)
        old = before[pair.previous]
        if pair.form == "shifted norm":
            assert name == "gemma"
            expected = (1 + old) / whole - 1
        elif pair.form == "norm" or isinstance(pair.module, Conv1D):
            expected = old / whole
        else:
            expected = torch.diag(1 / whole) @ old
        torch.testing.assert_close(pair.module.weight.double(), expected, rtol=1e-6, atol=1e-6)
        if bias is not None:
            torch.testing.assert_close(pair.module.bias.double(), bias / whole, rtol=1e-6, atol=1e-9)


def test_grouped_heads_share_their_scale():
    pair = next(pair for pair in pairs(block_of(build(MODELS["llama"][0]()))) if "v_proj" in pair.previous)
    # 4 heads of 8 channels, 2 of keys and values: heads 0 and 1 read the first 8 rows
    assert pair.rows.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    s = torch.rand(32, generator=torch.Generator().manual_seed(3)) + 0.5
    tied = pair.tie(s)
    torch.testing.assert_close(tied[:8], (s[:8] * s[8:16]).sqrt())
    assert torch.equal(tied[:8], tied[8:16])
    torch.testing.assert_close(pair.tie(tied), tied)
    with pytest.raises(ValueError, match=r"s: differs between channels that share an output of self_attn.v_proj"):
        fold_(pair, s)


def test_bfloat16_rounds_each_weight_once():
    """8 bits of mantissa; powers of two fold without any rounding."""
    block = block_of(build(MODELS["opt"][0](), torch.bfloat16))
    before = outputs(block)
    for pair in pairs(block):
        powers = pair.tie(2.0 ** torch.randint(-2, 3, (len(pair.rows),), generator=torch.Generator().manual_seed(4)))
        fold_(pair, powers)
    assert torch.equal(outputs(block), before)
    for pair in pairs(block):
        s = random_scales(pair)
        old = {name: module.weight.detach().double() for name, module in pair.fed.items()}
        fold_(pair, s)
        for name, module in pair.fed.items():
            torch.testing.assert_close(module.weight.double(), old[name] * s, rtol=2**-8, atol=0)
    assert off(outputs(block), before) < 1e-2


@pytest.mark.parametrize(
    ("s", "message"),
    [
        (torch.ones(31), r"s: \[31\] for the 32 channels"),
        (torch.zeros(32), r"s: 0 .. 0 for .*; expected above 0 and finite"),
        (-torch.ones(32), r"expected above 0 and finite"),
        (torch.full((32,), torch.inf), r"expected above 0 and finite"),
        (torch.full((32,), torch.nan), r"expected above 0 and finite"),
    ],
)
def test_bad_scales(s, message):
    block = block_of(build(MODELS["llama"][0]()))
    weights = {key: value.clone() for key, value in block.module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fold_(pairs(block)[0], s)
    assert all(torch.equal(value, weights[key]) for key, value in block.module.state_dict().items())


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_and_router_behind_one_norm(name):
    """All experts, also those without a token, and the router are multiplied; each expert's up goes with its down."""
    model = build(MIXTURES[name]())
    unfuse_experts_(model)
    block = block_of(model, lengths=(2, 30))
    with torch.no_grad():
        ran = {key.split(".")[2] for key in next(block.inputs([n for n in block.linears if ".experts." in n]))}
    assert len(ran) < 6  # the first batch leaves some experts out
    before = outputs(block)
    found = pairs(block)
    behind = next(pair for pair in found if pair.previous == "post_attention_layernorm")
    assert {n for n in behind.fed if ".experts." in n} == {
        f"mlp.experts.{e}.{part}_proj" for e in range(6) for part in ("gate", "up")
    }
    assert "mlp.gate" in behind.fed
    assert behind.parent == "mlp"
    assert {f"mlp.experts.{e}.up_proj" for e in range(6)} <= {pair.previous for pair in found}
    for pair in found:
        fold_(pair, random_scales(pair))
    assert off(outputs(block), before) < 2e-6
    router = behind.fed["mlp.gate"].weight
    with torch.no_grad():
        router /= random_scales(behind)
    assert off(outputs(block), before) > 1e-2


@pytest.mark.parametrize("name", MIXTURES)
def test_fused_experts_are_readers_that_nobody_scales(name):
    found, reasons = survey(block_of(build(MIXTURES[name]())))
    assert not [pair for pair in found if pair.previous == "post_attention_layernorm"]
    assert reasons["mlp.gate"].startswith("by post_attention_layernorm: the block's output changes")


def test_shared_weights_are_left_alone():
    """Multiplied for one reader, the weight would be wrong for the other."""
    model = build(MODELS["llama"][0]())
    layer = decoder_list(model)[2][-1]
    layer.mlp.gate_proj.weight = layer.mlp.up_proj.weight
    found, reasons = survey(block_of(model))
    assert [pair.name for pair in found] == LLAMA[:2]
    assert reasons["mlp.up_proj"] == "by post_attention_layernorm: a weight is shared with another layer"
    assert reasons["mlp.down_proj"] == "by mlp.up_proj: a weight is shared with another layer"


def test_infinite_outputs_are_refused():
    model = build(MODELS["llama"][0]())
    with torch.no_grad():
        decoder_list(model)[2][-1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.1: what it puts out .* is not finite"):
        pairs(block_of(model))
