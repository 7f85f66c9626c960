"""The walk against sums that anyone can write down from a model's published dimensions."""

import math
import time
from dataclasses import dataclass

import pytest
import torch
from remanence.bench.roofline.walk import walk
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
)


@dataclass
class Published:
    """Dimensions as the makers publish them, and the config that has them."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool
    gated: bool = True
    experts: tuple[int, int] = (1, 1)
    window: int | None = None
    windowed: int = 0  # layers with a window
    norms: int = 0  # parameters beside matrices
    router: int = 0


LLAMA2 = Published(4096, 32, 32, 32, 128, 11008, 32000, False, norms=65 * 4096)
LLAMA31 = Published(4096, 32, 32, 8, 128, 14336, 128256, False, norms=65 * 4096)
QWEN3 = Published(1024, 28, 16, 8, 128, 3072, 151936, True, norms=57 * 1024 + 28 * 2 * 128)
# Biases of attention and feed-forward part, two norms with biases, and one at the end.
_OPT_BESIDE = 32 * (4 * 2560 + 10240 + 2560 + 4 * 2560) + 2 * 2560
OPT = Published(2560, 32, 32, 32, 80, 10240, 50272, True, gated=False, norms=_OPT_BESIDE)
MIXTRAL = Published(4096, 32, 32, 8, 128, 14336, 32000, False, experts=(8, 2), norms=65 * 4096, router=32 * 8 * 4096)
GEMMA3 = Published(
    1152, 26, 4, 1, 256, 6912, 262144, True, window=512, windowed=22, norms=26 * (4 * 1152 + 2 * 256) + 1152
)


def llama(of: Published) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=of.hidden,
        intermediate_size=of.inner,
        num_hidden_layers=of.layers,
        num_attention_heads=of.heads,
        num_key_value_heads=of.kv_heads,
        vocab_size=of.vocabulary,
        tie_word_embeddings=of.tied,
    )


CONFIGS = {
    "Llama-2-7B": (LLAMA2, llama(LLAMA2)),
    "Llama-3.1-8B": (LLAMA31, llama(LLAMA31)),
    "Qwen3-0.6B": (
        QWEN3,
        Qwen3Config(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
    ),
    "OPT-2.7B": (
        OPT,
        OPTConfig(
            hidden_size=2560,
            word_embed_proj_dim=2560,
            ffn_dim=10240,
            num_hidden_layers=32,
            num_attention_heads=32,
            vocab_size=50272,
        ),
    ),
    "Mixtral-8x7B": (
        MIXTRAL,
        MixtralConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32000,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=None,
        ),
    ),
    "Gemma-3-1B": (
        GEMMA3,
        Gemma3TextConfig(
            hidden_size=1152,
            intermediate_size=6912,
            num_hidden_layers=26,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            vocab_size=262144,
            sliding_window=512,
            tie_word_embeddings=True,
        ),
    ),
}


def skeleton(config, dtype=torch.bfloat16):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def matrices(of: Published) -> int:
    """Weights of a layer's attention and of one expert's (or the only) feed-forward part."""
    return _attention(of) + _feed_forward(of)


def _attention(of: Published) -> int:
    return of.hidden * of.head_dim * (2 * of.heads + 2 * of.kv_heads)


def _feed_forward(of: Published) -> int:
    return (3 if of.gated else 2) * of.hidden * of.inner


def flops(of: Published, batch: int, tokens: int, context: int, heads: int) -> float:
    """2 for each weight that a token meets, 4 x head size for a pair of query and key; the head for `heads` tokens."""
    _, chosen = of.experts
    each = of.layers * (_attention(of) + chosen * _feed_forward(of)) + of.router
    seen = sum(context + i + 1 for i in range(tokens))
    inside = sum(min(context + i + 1, of.window or math.inf) for i in range(tokens))
    pairs = (of.layers - of.windowed) * seen + of.windowed * inside
    return batch * (2 * each * tokens + 4 * of.heads * of.head_dim * pairs + 2 * heads * of.hidden * of.vocabulary)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 8])
def test_products_and_weights_are_those_of_the_published_dimensions(name, batch):
    of, config = CONFIGS[name]
    model = skeleton(config)
    start = time.perf_counter()
    prefill, decode = walk(model, batch, 1024, context=2047)
    assert time.perf_counter() - start < 5
    assert prefill.total("flops") == pytest.approx(flops(of, batch, 1024, 0, 1), rel=1e-3)
    assert decode.total("flops") == pytest.approx(flops(of, batch, 1, 2047, 1), rel=1e-3)
    assert not decode.uncounted
    assert not prefill.uncounted

    parameters = {id(p): p.numel() * 2 for p in model.parameters()}
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    assert tied == of.tied
    read = sum(parameters.values()) - (0 if tied else embedding.numel() * 2)
    if name.startswith("OPT"):  # rows of positions are fetched as rows of tokens are
        read -= model.model.decoder.embed_positions.weight.numel() * 2
    experts, chosen = of.experts
    idle = experts * (1 - chosen / experts) ** batch
    read -= round(of.layers * idle * _feed_forward(of) * 2) if experts > 1 else 0
    assert decode.total("weight_bytes") == pytest.approx(read, rel=0 if experts == 1 else 1e-12)
    # And by hand, that the config is the published one.
    by_hand = of.layers * (_attention(of) + (experts - idle if experts > 1 else 1) * _feed_forward(of))
    by_hand += of.vocabulary * of.hidden + of.norms + of.router
    assert read == pytest.approx(2 * by_hand, rel=1e-9)

    kept = 2 * 2 * of.kv_heads * of.head_dim * batch
    seen = (of.layers - of.windowed) * 2048 + of.windowed * min(2048, of.window or 2048)
    assert decode.total("kv_read") == kept * seen
    assert decode.total("kv_written") == kept * of.layers
    assert decode.cache_bytes(2048) == kept * seen


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


def test_prefill_is_what_torchs_own_counter_counts_with_the_mask_taken_off():
    """Peer: torch's FlopCounterMode on real tensors with eager attention, which counts every pair twice over."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(), attn_implementation="eager")
    ids = torch.zeros(3, 7, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=1)
    prefill, _ = walk(skeleton(tiny()), 3, 7)
    full, causal = 7 * 7, 7 * 8 // 2
    hidden = 2 * 3 * 4 * 2 * (8 + 8) * (full - causal)  # layers, batch, heads
    assert prefill.total("flops") == counter.get_total_flops() - hidden


def test_recurrent_layers_are_counted_as_torchs_own_counter_does():
    from torch.utils.flop_counter import FlopCounterMode

    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    prefill, decode = walk(skeleton(config), 2, 6)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        AutoModelForCausalLM.from_config(config)(torch.zeros(2, 6, dtype=torch.long), logits_to_keep=1)
    assert prefill.total("flops") == counter.get_total_flops()
    assert 0 < decode.total("flops") < prefill.total("flops")
    assert prefill.cached == decode.cached > 0  # its state does not grow
    assert not decode.attention


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
