"""The walk against sums that anyone can write down from a model's published dimensions."""

import inspect

import pytest
import torch
from remanence.bench.roofline.published import MODELS
from remanence.bench.roofline.recorder import Seen
from remanence.bench.roofline.walk import walk
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    Exaone4Config,
    FalconConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    Qwen2MoeConfig,
    Qwen3Config,
)


def skeleton(config, dtype=torch.bfloat16):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 8])
def test_products_and_weights_are_those_of_the_published_dimensions(name, batch):
    of = MODELS[name]
    model = skeleton(of.made())
    prefill, decode = walk(model, batch, 1024, context=2047)
    assert prefill.total("flops") == pytest.approx(of.flops(batch, 1024, 0), rel=1e-3)
    assert decode.total("flops") == pytest.approx(of.flops(batch, 1, 2047), rel=1e-3)
    assert not (*prefill.uncounted, *decode.uncounted)
    assert decode.total("weight_bytes") == pytest.approx(2 * of.read(batch), rel=1e-12)
    assert decode.total("kv_read") == 2 * batch * of.kv(2048) == decode.cache_bytes(2048)
    assert decode.total("kv_written") == 2 * batch * of.layers * 2 * of.kv_heads * of.head_dim

    # The parameters of the model itself, those counted that are no table of which rows are fetched.
    embedding = model.get_input_embeddings().weight
    tables = [] if of.tied else [embedding]
    if name == "OPT-2.7B":
        tables.append(model.model.decoder.embed_positions.weight)
    held = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in tables)
    idle = of.experts[0] * (1 - of.experts[1] / of.experts[0]) ** batch
    held -= of.layers * idle * of.feed_forward if of.experts[0] > 1 else 0
    assert decode.total("weight_bytes") == 2 * held


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Mixtral-8x7B", "Gemma-3-1B"])
def test_a_batch_is_reckoned_from_one_sequence(name):
    model = skeleton(MODELS[name].made())
    one, eight = walk(model, 1, 16, context=700), walk(model, 8, 16, context=700)
    for mine, walked in zip(one, eight, strict=True):
        mine = mine.with_batch(8)
        assert (mine.batch, mine.attention) == (8, walked.attention)
        assert mine.cached == pytest.approx(walked.cached, rel=1e-2)  # beside keys, a window's cache has a counter
        assert mine.workspace == pytest.approx(walked.workspace, rel=0.05)
        for a, b in zip(mine.parts, walked.parts, strict=True):
            assert (a.module, a.kind, a.ops, a.rows) == (b.module, b.kind, b.ops, b.rows)
            if a.kind == "other":  # positions are the same for all sequences, and made once or for each
                continue
            for number in ("flops", "weight_bytes", "kv_read", "kv_written", "activation_bytes"):
                assert getattr(a, number) == pytest.approx(getattr(b, number), rel=1e-9)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("context", "window"), [(9, None), (9, 4), (9, 100), (9, 10), (9, 12)])
def test_pairs_are_those_of_a_mask(tokens, context, window):
    """Counted from a mask of booleans, query by query."""
    config = Gemma3TextConfig(
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=32,
        sliding_window=window or 4,
        layer_types=["full_attention" if window is None else "sliding_attention"],
    )
    _, decode = walk(skeleton(config), 2, 5, context, tokens)
    total = context + tokens
    query, key = torch.arange(context, total)[:, None], torch.arange(total)[None]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    part = decode.by_module()["model.layers.0.self_attn"]
    assert part.flops == 2 * 2 * 2 * (8 + 8) * int(mask.sum())  # batch, heads, product and sum
    assert part.kv_read == 2 * 2 * 2 * 8 * int(mask.any(0).sum())


def tiny(**changes):
    given = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    return LlamaConfig(**given | changes)


WIDTHS = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 64}
GROUPED = WIDTHS | {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=4),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "phi3": lambda: Phi3Config(**GROUPED),
    "cohere2": lambda: Cohere2Config(**GROUPED | {"num_hidden_layers": 4}, sliding_window=4),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED | {"num_hidden_layers": 7}, head_dim=8, sliding_window=4),
    "opt": lambda: OPTConfig(**WIDTHS, num_hidden_layers=2, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0),
    "gpt-neox": lambda: GPTNeoXConfig(**WIDTHS, num_hidden_layers=2, intermediate_size=48),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64),
    "falcon": lambda: FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64),
    "bloom": lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2-moe": lambda: Qwen2MoeConfig(**GROUPED, **EXPERTS, num_experts=4, shared_expert_intermediate_size=24),
    "gpt-oss": lambda: GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "mamba": lambda: MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_are_those_that_torchs_own_counter_sees(name, monkeypatch):
    """Peer: FlopCounterMode on real tensors, with attention op by op. In a prompt it counts what the mask hides."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    config = ARCHITECTURES[name]()
    eager = {} if name == "mamba" else {"attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name](), **eager).eval()
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("eager")
    ids = torch.zeros(2, 9, dtype=torch.long)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        out = model(ids, use_cache=True, **last)
    kept = {"cache_params": out.cache_params} if name == "mamba" else {"past_key_values": out.past_key_values}
    with torch.no_grad(), FlopCounterMode(display=False) as later:
        model(ids[:, :1], use_cache=True, **kept)
    _, decode = walk(skeleton(config), 2, 9)
    assert decode.total("flops") == later.get_total_flops()
    monkeypatch.setattr(Seen, "pairs", lambda self, T, S, context: T * S)  # noqa: ARG005
    prefill, _ = walk(skeleton(config), 2, 9)
    assert prefill.total("flops") == whole.get_total_flops()


def test_the_state_of_a_recurrent_layer_does_not_grow():
    prefill, decode = walk(skeleton(ARCHITECTURES["mamba"]()), 2, 6)
    assert prefill.cached == decode.cached > 0
    assert not decode.attention


def test_keys_that_are_kept_as_latents_are_counted_as_they_are_kept():
    config = DeepseekV3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
        q_lora_rank=16,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    )
    _, decode = walk(skeleton(config), 2, 8, 12)
    if decode.attention:
        pytest.skip("this transformers keeps keys and values as attention sees them")
    kept = 2 * 2 * 2 * (32 + 8) * 13  # bytes, sequences, layers
    assert decode.cached == kept == pytest.approx(decode.total("kv_read"))
    assert any("the cache keeps 25% of the keys and values" in said for said in decode.assumed)


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
}


def test_layers_that_say_that_they_have_no_window_have_none():
    config = Exaone4Config(**SMALL, num_hidden_layers=4, sliding_window=8, sliding_window_pattern=4)
    _, decode = walk(skeleton(config), 1, 16, 99)
    kept = {each.module: each.window for each in decode.attention}
    assert list(kept.values()) == [8, 8, 8, None]
    assert decode.total("kv_read") == 2 * 2 * 32 * (3 * 8 + 100)


@pytest.mark.parametrize(("context", "inside"), [(31, 8), (32, 1), (37, 6)])
def test_pieces_that_see_themselves_alone(context, inside):
    """Llama 4: three of four layers see the keys of their own piece of 8 tokens."""
    config = Llama4TextConfig(
        **SMALL, num_hidden_layers=4, head_dim=16, attention_chunk_size=8, intermediate_size_mlp=96
    )
    prefill, decode = walk(skeleton(config), 1, 16, context)
    assert decode.total("kv_read") == 2 * 2 * 32 * (3 * inside + context + 1)
    flops = [part.flops for part in prefill.parts if part.kind == "attention"]
    pairs = [2 * (8 * 9 // 2)] * 3 + [16 * 17 // 2]
    assert flops == [4 * 64 * each for each in pairs]


def test_an_attention_that_calls_torchs_is_counted_as_that():
    config = FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    prefill, decode = walk(skeleton(config), 2, 16, 20)
    assert decode.total("kv_read") == 2 * 2 * 2 * 2 * 16 * 21  # bytes, keys and values, layers, sequences, one head
    assert sum(p.flops for p in prefill.parts if p.kind == "attention") == 2 * 2 * 4 * 64 * (16 * 17 // 2)
    assert not decode.uncounted


def test_an_attention_that_cannot_be_exchanged_is_told():
    _, decode = walk(skeleton(BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=64)), 1, 8)
    assert any("BloomForCausalLM has an attention of its own" in said for said in decode.assumed)


def test_a_model_without_a_cache_is_refused():
    config = OpenAIGPTConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=64)
    with pytest.raises(ValueError, match="OpenAIGPTLMHeadModel keeps no cache to decode with"):
        walk(skeleton(config), 1, 8)


def test_layers_that_share_keys_keep_them_once():
    config = Gemma3nTextConfig(
        **SMALL,
        num_hidden_layers=10,
        head_dim=16,
        num_kv_shared_layers=4,
        sliding_window=8,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=64,
        laurel_rank=8,
        activation_sparsity_pattern=[0.95] * 5 + [0.0] * 5,
    )
    _, decode = walk(skeleton(config), 1, 8, 40)
    assert len(decode.attention) == 6
    assert decode.cache_bytes(41) == pytest.approx(decode.cached, rel=0.1)


class Strange(nn.Module):
    def forward(self, x):
        return torch.linalg.qr(x.float())[0][..., :1] + x


def test_an_op_whose_work_is_not_known_is_listed_with_its_place():
    model = skeleton(tiny())
    model.model.layers[1].mlp.act_fn = Strange()
    prefill, _ = walk(model, 1, 4)
    assert [(found.op, found.count, found.modules) for found in prefill.uncounted] == [
        ("linalg_qr", 1, ("model.layers.1.mlp.act_fn",))
    ]


class ByValue(nn.Module):
    def forward(self, x):
        return x[x[..., 0] > 0]


def test_what_needs_values_is_refused_by_op_and_module():
    model = skeleton(tiny())
    model.model.norm = ByValue()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be walked without values: model\.norm, at index"):
        walk(model, 1, 4)


def test_a_value_that_is_read_is_told():
    """Positions that stretch with the text ask how long it is."""
    config = tiny(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    prefill, _ = walk(skeleton(config), 1, 4)
    assert prefill.assumed == ("model.rotary_emb: a value that only a real run would know is taken for 0",)
    assert prefill.total("flops") == walk(skeleton(tiny()), 1, 4)[0].total("flops")


def test_an_adapter_is_counted_beside_its_layer():
    peft = pytest.importorskip("peft")
    model = skeleton(tiny())
    with torch.device("meta"):
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    _, plain = walk(skeleton(tiny()), 2, 3)
    _, decode = walk(adapted, 2, 3)
    more = 2 * 2 * (4 * 32 + 32 * 4)  # layers, sequences
    assert decode.total("flops") == plain.total("flops") + 2 * more
    adapters = sum(p.numel() * p.itemsize for n, p in adapted.named_parameters() if "lora_" in n)
    assert decode.total("weight_bytes") == plain.total("weight_bytes") + adapters


def test_gpt2_has_its_layers_the_other_way_round():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)
    _, decode = walk(skeleton(config), 1, 5)
    assert decode.by_module()["transformer.h.0.attn.c_attn"].kind == "linear"
    assert decode.by_module()["transformer.h.0.attn.c_attn"].flops == 2 * 32 * 96
    assert decode.total("flops") == 2 * (2 * 12 * 32 * 32 + 64 * 32) + 2 * 4 * 32 * 6


def test_the_model_is_left_as_it_was():
    model = skeleton(tiny())
    before = model.config._attn_implementation
    walk(model, 1, 4)
    assert model.config._attn_implementation == before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch": 0}, "batch: 0 is below 1"),
        ({"prompt": 0}, "prompt: 0 is below 1"),
        ({"context": 3}, "context: 3 tokens are fewer than the prompt's 4"),
        ({"tokens": 0}, "tokens: 0 is below 1"),
    ],
)
def test_numbers_that_make_no_sense(given, said):
    with pytest.raises(ValueError, match=said):
        walk(skeleton(tiny()), **{"batch": 1, "prompt": 4} | given)


def test_a_model_with_values_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM is not on the meta device"):
        walk(AutoModelForCausalLM.from_config(tiny()), 1, 4)
