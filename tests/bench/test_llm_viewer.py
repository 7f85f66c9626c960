"""LLM-Viewer's formulas give what it was seen to print, the closed forms what models are, and causes the whole gap."""

from dataclasses import astuple, replace

import pytest
from remanence.bench.llm_viewer import Counts, Shape, closed_form, explained, ours, viewer

LLAMA2 = Shape(4096, 32, 32, 32, 128, 11008, 32000)
LLAMA31 = Shape(4096, 32, 32, 8, 128, 14336, 128256)
QWEN3 = Shape(1024, 28, 16, 8, 128, 3072, 151936, tied=True, qk_norm=True)
# Nothing divides: 100 / 7 heads is no whole number, and not what a head has.
ODD = Shape(100, 3, 7, 7, 20, 33, 211, qkv_bias=True)
SHAPES = [LLAMA2, LLAMA31, QWEN3, ODD]


# Printed by LLM-Viewer itself at 472f71f: operations of a decode step and of prefill, bytes of weights in memory and
# read, bytes of the cache; for a batch, a length, and bits of a weight.
SEEN = [
    (LLAMA2, 1, 2048, 16, (14169669632, 28751179022336, 12952010752, 13214154752, 1073741824)),
    (LLAMA2, 8, 65, 4, (104958828544, 6755214991360, 3238002688, 3303538688, 272629760)),
    (LLAMA31, 1, 2048, 16, (15570567168, 30813157588992, 13958643712, 15009316864, 268435456)),
    (LLAMA31, 8, 65, 4, (116166008832, 7281818247168, 3489660928, 3752329216, 68157440)),
    (QWEN3, 1, 2048, 16, (1100210176, 1934753136640, 704643072, 1015808000, 117440512)),
    (QWEN3, 8, 65, 4, (6946735616, 371879593472, 176160768, 253952000, 29818880)),
    (ODD, 1, 2048, 16, (2949388, 5997154924, 299400, 341600, 2457600)),
    (ODD, 8, 65, 4, (3273320, 201962600, 74850, 85400, 624000)),
]


@pytest.mark.parametrize(("shape", "batch", "context", "bits", "seen"), SEEN)
def test_the_formulas_are_theirs(shape, batch, context, bits, seen):
    assert astuple(viewer(shape, batch, context, bits)) == pytest.approx(seen, rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "ops", "weights", "kv"),
    [(LLAMA2, 1.429e10, 13.48e9, 1.074e9), (LLAMA31, 1.608e10, 16.06e9, 0.2684e9), (QWEN3, 1.662e9, 1.192e9, 0.2349e9)],
)
def test_the_closed_form_is_what_was_counted_on_the_models(shape, ops, weights, kv):
    """One token for a sequence of 2048; noted with four digits."""
    true = ours(shape, 1, 2048)
    assert (true.decode_ops, true.weight_bytes, true.kv_bytes) == pytest.approx((ops, weights, kv), rel=5e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "context"), [(1, 2048), (8, 1), (3, 65)])
def test_causes_explain_the_whole_difference(shape, batch, context):
    found = explained(shape, batch, context, ours(shape, batch, context), viewer(shape, batch, context))
    assert found.keys() == Counts.__dataclass_fields__.keys()
    assert all(difference.residual < 1e-3 for difference in found.values())


def test_what_no_cause_explains_is_seen():
    true = ours(LLAMA31, 1, 2048)
    wrong = replace(true, decode_ops=true.decode_ops * 1.01, kv_bytes=true.kv_bytes * 1.01)
    found = explained(LLAMA31, 1, 2048, wrong, viewer(LLAMA31, 1, 2048))
    assert found["decode_ops"].residual > 0.1
    # Both agree on the cache, so nothing explains a difference.
    assert found["kv_bytes"].causes == {}
    assert found["kv_bytes"].residual == pytest.approx(1)


def test_causes_are_named_where_they_act():
    llama, qwen = (
        explained(s, 1, 2048, ours(s, 1, 2048), viewer(s, 1, 2048))["weight_bytes"].causes for s in (LLAMA2, QWEN3)
    )
    assert llama.keys() == {"the head is not in memory", "the embedding is not in memory", "norms and biases"}
    assert qwen.keys() == {
        "the head is not in memory",
        "q, k, v and o are sized by hidden / heads",
        "norms and biases",
    }


def test_the_closed_form_is_the_model():
    """Parameters and a walk's operations, of a small model that transformers builds."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = Shape(64, 2, 4, 2, 24, 96, 131)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
        intermediate_size=96, vocab_size=131, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    form = closed_form(shape, 2, 7)
    assert form["weight_bytes"] == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert form["read_bytes"] == form["weight_bytes"] - 2 * model.model.embed_tokens.weight.numel()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = model(torch.ones(2, 7, dtype=torch.long), logits_to_keep=1).past_key_values
    # The counter has no mask: 49 pairs where a token sees 28. And rotary angles are a product too: 12 by 1 by 7.
    full = 4 * 2 * 2 * 4 * 24 * (49 - 28)
    rotary = counter.get_total_flops() - form["flops"] - full
    assert 0 <= rotary <= 2 * 2 * 12 * 7
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
    step = closed_form(shape, 2, 1, 7)
    assert 0 <= counter.get_total_flops() - step["flops"] <= 2 * 2 * 12
    assert step["kv_bytes"] == sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)


def test_bits_are_of_matrices():
    """Norms stay in 16 bits, and so does the table of an embedding that is not the head."""
    wide, narrow = (closed_form(LLAMA2, 1, 1, 0, bits) for bits in (16, 4))
    matrices = LLAMA2.layers * (LLAMA2.attention + LLAMA2.mlp) + LLAMA2.table
    assert wide["weight_bytes"] - narrow["weight_bytes"] == 1.5 * matrices
    assert viewer(LLAMA2, 1, 64, 4).weight_bytes == viewer(LLAMA2, 1, 64).weight_bytes / 4
