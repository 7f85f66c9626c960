"""What fits, against the sizes of walks at those very lengths and batches."""

import pytest
import torch
from remanence.bench.roofline.capacity import USABLE, Memory
from remanence.bench.roofline.walk import walk
from remanence.compress.spec import KVSpec
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MambaConfig


def skeleton(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "gemma3": Gemma3TextConfig(
        **SIZES, **HEADS, head_dim=16, sliding_window=16, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    ),
    "mamba": MambaConfig(hidden_size=64, num_hidden_layers=3, vocab_size=128, state_size=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_of_any_length_is_reckoned_from_two(name):
    model = skeleton(CONFIGS[name])
    memory = Memory(0.0, *walk(model, 1, 24, 30))
    for tokens in (40, 200):
        _, later = walk(model, 1, 24, tokens - 1)
        assert memory.cache(tokens) == pytest.approx(later.cached, rel=2e-2)


def test_room_is_filled_and_not_overfilled():
    model = skeleton(CONFIGS["llama"])
    memory = Memory(1e6, *walk(model, 1, 24, 30))
    room = 5e6
    batch = memory.largest_batch(24, 40, room)
    assert memory.total(batch, 24, 40) <= USABLE * room < memory.total(batch + 1, 24, 40)
    context = memory.largest_context(room, 10**6)
    assert memory.total(1, context, context) <= USABLE * room < memory.total(1, context + 1, context + 1)
    assert memory.largest_context(room, 50) == 50
    assert memory.largest_batch(24, 40, 1e6) == 0
    assert memory.largest_context(1e6, 50) == 0


def test_a_smaller_cache_leaves_room_for_more():
    steps = walk(skeleton(CONFIGS["llama"]), 1, 24, 30)
    plain, four = Memory(1e6, *steps), Memory(1e6, *steps, KVSpec(4, group_size=16, residual=16))
    assert four.largest_context(5e6, 10**6) > plain.largest_context(5e6, 10**6)
    assert four.cache(1000) < 0.45 * plain.cache(1000)  # a quarter, with a scale and a least value of 16 numbers
