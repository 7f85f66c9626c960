"""What leaving early costs, by hand from the shapes; truncated models."""

from __future__ import annotations

import pytest
import torch
from remanence.compress.checkpoint import load_model, write_model
from remanence.compress.early_exit.cost import costs
from remanence.compress.early_exit.policy import NEVER, Agent, Confidence, Fixed, Full, Probe, Saturation
from remanence.compress.early_exit.truncated import truncate_
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.unlearn.demo import byte_bpe
from remanence.unlearn.layers import first_layers
from transformers import AutoModelForCausalLM, LlamaConfig

D, F, V, L, H, KV, HD = 64, 96, 199, 6, 4, 2, 16


def test_a_llama_by_hand(tiny) -> None:
    found = costs(tiny("llama"), context=100)
    attention = D * H * HD + 2 * D * KV * HD + H * HD * D
    layer = 2 * (attention + 3 * D * F) + 4 * 100 * H * HD
    assert found.layer.operations == layer
    assert found.layer.bytes == 4 * (attention + 3 * D * F + 2 * D + 2 * 100 * KV * HD)
    assert found.keys_values.operations == 2 * 2 * D * KV * HD
    assert found.head.operations == 2 * D * V
    policy = Confidence(exits=(2, 4), threshold=0.9)
    # Half leave at 2, after one check; half stay, after two.
    spent = (2 * layer + 4 * 2 * 2 * D * KV * HD + 2 * D * V) / 2 + (6 * layer + 2 * 2 * D * V) / 2
    assert found.effective_depth({2: 5, 6: 5}, policy) == pytest.approx(spent / layer)
    assert found.mean({2: 5, 6: 5}, policy).operations == pytest.approx(spent + 2 * D * V)


def test_the_whole_model_is_as_deep_as_it_is(tiny) -> None:
    found = costs(tiny("qwen3"))
    for policy in (Full(), Confidence(exits=(1, 2), threshold=NEVER)):
        assert found.effective_depth({L: 7}, policy) == pytest.approx(L)
    assert found.effective_depth({3: 7}, Fixed(exits=(3,))) > 3
    with pytest.raises(ValueError, match="no token was decoded"):
        found.effective_depth({}, Full())


def test_a_check_by_the_head_costs_layers_where_the_vocabulary_is_large() -> None:
    """Llama-3.2-1B's proportions (reference: one check is 4.3 layers), from its published dimensions, on meta."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = costs(model)
    assert found.head.operations / found.layer.operations == pytest.approx(4.3, abs=0.05)
    assert found.keys_values.operations / found.layer.operations == pytest.approx(0.034, abs=0.001)
    assert found.checks(8, Saturation(exits=(4, 8, 12))).operations == 2 * 6 * 2048


def test_bytes_of_a_check_are_those_of_the_policys_weights(tiny) -> None:
    found, e = costs(tiny("llama")), torch.zeros(3, D)
    probe = Probe(exits=(1, 2, 4), mean=e, deviation=e + 1, weight=e, bias=torch.zeros(3))
    # Mean, deviation and weight of one exit in float32, and its bias; two exits are asked on the way to 3.
    assert found.checks(3, probe).bytes == 2 * (12 * D + 4)
    layers = tuple((torch.zeros(n, k), torch.zeros(n)) for n, k in ((5, D), (2, 5)))
    assert found.checks(1, Agent(exits=(1,), layers=layers)).bytes == 4 * (5 * D + 5 + 2 * 5 + 2)
    assert found.checks(1, Saturation(exits=(1,))).bytes == 0
    assert found.checks(2, Confidence(exits=(1, 2))).bytes == 2 * 4 * D * V


@pytest.mark.parametrize("kind", ["phi3", "opt"])
def test_other_shapes(tiny, kind) -> None:
    found = costs(tiny(kind))
    assert found.keys_values.operations == (2 * 2 * D * KV * HD if kind == "phi3" else 2 * 2 * D * D)


def test_packed_weights_are_read_as_they_are_stored(tiny) -> None:
    dense, model = costs(tiny("llama")), compress_(tiny("llama"), parse_recipe("rtn-w4a16-g32"))
    packed = costs(model)
    assert packed.layer.operations == dense.layer.operations
    # 4 bits and a 16-bit scale for each 32 weights against 32 bits; rows are filled up to 64, which k and v are not.
    norms = 4 * 2 * D
    ratio = (packed.layer.bytes - norms) / (dense.layer.bytes - norms)
    assert (4 + 16 / 32) / 32 <= ratio < 1.4 * (4 + 16 / 32) / 32


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "phi3", "opt"])
def test_a_truncated_model_is_an_ordinary_checkpoint(tiny, prompts, tmp_path, kind) -> None:
    model, (ids, mask) = tiny(kind), prompts()
    with torch.no_grad(), first_layers(model, 4):
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    write_model(truncate_(model, 4), byte_bpe(["a text"], 300), tmp_path)
    for found in (load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert found.config.num_hidden_layers == 4
        with torch.no_grad():
            assert torch.equal(found(input_ids=ids, attention_mask=mask, use_cache=False).logits, expected)
            again = found.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert again.shape == (5, 13)
    with pytest.raises(ValueError, match="depth: 6 is not between 1 and 5"):
        truncate_(tiny(kind), 6)
