"""The leak curve against a logit lens written out by hand, on architectures that end differently."""

import copy

import numpy as np
import pytest
import torch
from remanence.bench.pressures.early_exit import early_exit, leak
from remanence.bench.pressures.pressed import Pressed
from remanence.bench.tokens import answers
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import quantize_
from remanence.unlearn.inference.guarded import Guarded
from remanence.unlearn.inference.icu import Icu, IcuConfig
from remanence.unlearn.layers import decoder_layers, first_layers
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, OPTConfig, PhiConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def made(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def opt_350m():
    """Norms after the blocks, none at the end, and a projection between the blocks and the head."""
    layout = {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "dropout": 0.0}
    return made(OPTConfig(**SHAPE, **layout, init_std=0.3))


def gemma2():
    layout = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 5.0}
    return made(Gemma2Config(**SHAPE, **layout, initializer_range=0.3))


def gpt_neox():
    return made(GPTNeoXConfig(**SHAPE, intermediate_size=64, initializer_range=0.3))


def phi():
    return made(PhiConfig(**SHAPE, intermediate_size=64, initializer_range=0.3))


# What stands between the hidden state and the logits.
ENDS = {
    "llama": lambda m, h: m.lm_head(m.model.norm(h)),
    "gpt2": lambda m, h: m.lm_head(m.transformer.ln_f(h)),
    "opt": lambda m, h: m.lm_head(m.model.decoder.final_layer_norm(h)),
    "opt-350m": lambda m, h: m.lm_head(m.model.decoder.project_out(h)),
    "gemma2": lambda m, h: 5.0 * torch.tanh(m.lm_head(m.model.norm(h)) / 5.0),
    "gpt-neox": lambda m, h: m.get_output_embeddings()(m.gpt_neox.final_layer_norm(h)),
    "phi": lambda m, h: m.lm_head(m.model.final_layernorm(h)),
}
BIG = {"opt-350m": opt_350m, "gemma2": gemma2, "gpt-neox": gpt_neox, "phi": phi}


def by_hand(model, end, encoder, row):
    """[L] probabilities of one answer: from the hidden state after every layer but the last, and from the logits."""
    ids, labels = (torch.tensor([part]) for part in encoder.pair(row.question, row.answer))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, use_cache=False)
        curve = [end(model, hidden) for hidden in out.hidden_states[1:-1]] + [out.logits]
    found = []
    for logits in curve:
        z = logits[0, :-1].double().numpy()
        log_p = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
        wanted = labels[0, 1:].numpy()
        at = np.flatnonzero(wanted != -100)
        found.append(np.exp(log_p[at, wanted[at]].mean()))
    return found


@pytest.mark.parametrize("arch", ENDS)
def test_every_layer_is_decoded_with_the_models_own_end(memorized, untrained, arch):
    model = BIG[arch]() if arch in BIG else untrained(arch, vocabulary=512)
    rows, state = memorized.corpus.forget[:3], copy.deepcopy(model.state_dict())
    pressed = early_exit(model, memorized.encoder, rows, batch_size=2)
    layers = len(decoder_layers(model))
    assert list(pressed.after) == [f"layer {k}" for k in range(1, layers + 1)]
    expected = np.array([by_hand(model, ENDS[arch], memorized.encoder, row) for row in rows])
    found = np.array(list(pressed.after.values())).T
    # float32 logits of size 10 are off by some 1e-6, and so are logarithms of probabilities.
    assert np.allclose(np.log(found), np.log(expected), atol=1e-4)
    assert np.allclose(np.log(pressed.before), np.log(expected[:, -1]), atol=1e-4)
    assert len({tuple(values) for values in pressed.after.values()}) == layers, "no two layers say the same"
    assert pressed.references == (f"layer {layers}",)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert len(decoder_layers(model)) == layers


def test_the_last_layer_is_the_plain_model(memorized):
    pressed = early_exit(memorized.target, memorized.encoder, memorized.corpus.forget)
    assert pressed.after["layer 2"] == pytest.approx(pressed.before, rel=1e-6)
    assert sum(pressed.before) / len(pressed.before) > 0.9
    assert leak(pressed).layer == 2
    assert (leak(pressed).above.low, leak(pressed).above.high) == (0, 0)


def test_what_only_the_last_layer_hides_is_found(memorized):
    """The target with one more layer, of random weights, so that the layer before the last knows all."""
    model, rows = copy.deepcopy(memorized.target), memorized.corpus.forget
    last = copy.deepcopy(model.model.layers[-1])
    torch.manual_seed(0)
    for parameter in last.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    last.self_attn.layer_idx = 2
    model.model.layers.append(last)
    model.config.num_hidden_layers = 3
    pressed = early_exit(model, memorized.encoder, rows)
    known = [answer.probability for answer in plain(memorized.target, memorized.encoder, rows)]
    assert pressed.after["layer 2"] == pytest.approx(known, rel=1e-5)
    assert pressed.worst == "layer 2"
    found = leak(pressed, seed=3)
    assert found.layer == 2
    assert found.mean == pytest.approx(np.mean(known), rel=1e-5)
    gaps = np.array(pressed.after["layer 2"]) - np.array(pressed.after["layer 3"])
    assert found.above.value == pytest.approx(gaps.mean())
    assert 0.5 < found.above.low <= found.above.value <= found.above.high


def plain(model, encoder, rows):
    return answers(model, encoder, [(row.question, row.answer) for row in rows])


def test_the_oracle_leaks_nothing(memorized):
    pressed = early_exit(memorized.oracle, memorized.encoder, memorized.corpus.forget)
    assert max(max(values) for values in pressed.after.values()) < 0.2


def test_among_equal_layers_there_is_no_leak():
    curve = {"layer 1": [0.5, 0.1], "layer 2": [0.1, 0.2], "layer 3": [0.5, 0.1]}
    assert leak(Pressed("early exit", "probability", [0.5, 0.1], curve)).layer == 3
    one = leak(Pressed("early exit", "probability", [0.2], {"layer 1": [0.9], "layer 2": [0.2]}))
    assert (one.layer, one.mean) == (1, 0.9)
    assert one.above.value == pytest.approx(0.7)


def test_packed_layers_are_passed_through_too(memorized):
    model = quantize_(copy.deepcopy(memorized.target), parse_recipe("rtn-w8a16-plain"))
    rows = memorized.corpus.forget
    packed, dense = (early_exit(m, memorized.encoder, rows) for m in (model, memorized.target))
    for layer, values in dense.after.items():
        assert packed.after[layer] == pytest.approx(values, abs=0.05)


def test_one_layer_is_the_whole_model(memorized):
    model = copy.deepcopy(memorized.target)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    pressed = early_exit(model, memorized.encoder, memorized.corpus.forget[:1])
    assert list(pressed.after) == ["layer 1"]
    assert pressed.after["layer 1"] == pytest.approx(pressed.before, rel=1e-6)
    assert pressed.worst is None


@pytest.mark.parametrize("count", [0, -1, 3])
def test_layers_that_are_not_there_are_refused(memorized, count):
    with (
        pytest.raises(ValueError, match=f"count: {count} is not between 1 and 2"),
        first_layers(memorized.target, count),
    ):
        raise AssertionError


def test_the_layers_are_back_after_an_error(memorized):
    model = copy.deepcopy(memorized.target)
    with pytest.raises(RuntimeError, match="stopped"), first_layers(model, 1):
        raise RuntimeError("stopped")
    assert len(decoder_layers(model)) == 2


def test_a_guarded_model_is_refused(memorized):
    guard = Icu(IcuConfig("You know nothing of Ann."), memorized.tokenizer)
    with pytest.raises(ValueError, match="guarded at inference time"):
        early_exit(Guarded(copy.deepcopy(memorized.target), guard), memorized.encoder, memorized.corpus.forget)


def test_no_rows_are_refused(memorized):
    with pytest.raises(ValueError, match="no items"):
        early_exit(memorized.target, memorized.encoder, ())
