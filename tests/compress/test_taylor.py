"""Measures by derivatives against explicit gradients, exact Hessians and true changes of the loss."""

import copy
import math

import numpy as np
import pytest
import torch
from remanence.compress import taylor
from remanence.compress.block import block_names
from remanence.compress.knobs import RTN
from remanence.compress.recipe import parse_recipe
from remanence.compress.rtn import rtn
from remanence.compress.sensitivity import sensitivities
from remanence.compress.spec import QuantSpec
from remanence.compress.walk import fitting_linears, weight_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig

DRAW = torch.Generator().manual_seed(0)
BATCHES = [torch.randint(2, 60, shape, generator=DRAW) for shape in ((2, 30), (3, 20), (1, 45))]
RECIPE = parse_recipe("rtn-w4a16-g16")
WIDTHS = (2, 3, 4, 8)
NARROW = ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj"]


def rounded(weight, bits):
    return rtn(weight.detach(), QuantSpec(bits, 16), torch.float16, RTN()).dequantize()


def mean_loss(logits, ids):
    """In the dtype of the logits; transformers takes float32."""
    return -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).mean()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_tdmpq_by_explicit_gradients(untrained, arch):
    model = untrained(arch, vocabulary=60).double()
    found = sensitivities(model, "tdmpq", BATCHES, RECIPE)
    layers = fitting_linears(model, RECIPE)
    expected = {name: dict.fromkeys(WIDTHS, 0.0) for name, _ in layers}
    total = sum(ids[:, 1:].numel() for ids in BATCHES)
    each = []
    for ids in BATCHES:
        model.zero_grad()
        mean_loss(model(ids).logits, ids).backward()
        for name, layer in layers:
            W = weight_of(layer).detach()
            g = layer.weight.grad.T if arch == "gpt2" else layer.weight.grad
            for bits in WIDTHS:
                off = W - rounded(W, bits)
                change = float((g * off).abs().sum() + 0.5 * (g**2 * off**2).sum())
                expected[name][bits] += change * ids[:, 1:].numel() / total
                if name == layers[0][0] and bits == 4:
                    each.append((change, ids[:, 1:].numel()))
    for name, costs in expected.items():
        assert {bits: found.costs[name][bits] for bits in WIDTHS} == pytest.approx(costs, rel=1e-6)
        assert found.scores[name] == found.costs[name][4]
    first = layers[0][0]
    spread = sum(count**2 * (change - expected[first][4]) ** 2 for change, count in each) * 3 / 2
    assert found.noise[first] == pytest.approx(math.sqrt(spread) / total, rel=1e-4)


def test_perturbed_input_adds_up_to_the_change_of_the_loss(untrained, monkeypatch):
    """With signs, g d is the change of the loss but for a second order, with (change of g) d / 2 but for a third."""
    # All of it in float64, which Llama's norms are not.
    model, ids = untrained("gpt2", vocabulary=60).double(), BATCHES[0]
    layers = block_names(model)
    drawn = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    clean = model.get_input_embeddings()(ids).detach()
    off = {}
    for epsilon in (1e-3, 1e-4):
        monkeypatch.setattr(taylor, "EPSILON", epsilon)
        noisy = clean + epsilon * clean.square().mean().sqrt() * drawn
        with torch.no_grad():
            losses = [mean_loss(model(inputs_embeds=x).logits, ids) for x in (noisy, clean)]
        change = float(losses[0] - losses[1])
        noises = (None, torch.Generator().manual_seed(3))
        before, after = (taylor.states_and_gradients(model, layers, ids, noise) for noise in noises)
        for layer, (h, g), (h_after, g_after) in zip(layers, before, after):
            d = h_after - h
            first, second = float((g * d).sum()), float(((g_after - g) * d).sum()) / 2
            off[layer, epsilon] = first - change, first + second - change
    for layer in layers:
        (once, twice), (once_near, twice_near) = off[layer, 1e-3], off[layer, 1e-4]
        assert once / once_near == pytest.approx(100, rel=0.2)
        assert twice / twice_near == pytest.approx(1000, rel=0.2)
        assert abs(twice_near) < 0.1 * abs(once_near)
    # What is scored is the sum of norms: no less than any change with signs.
    scores = sensitivities(model, "tdmpq_input", [ids], RECIPE, seed=3).scores
    for layer, (h, g), (h_after, g_after) in zip(layers, before, after):
        by_hand = ((h_after - h).norm(dim=2) * (g.norm(dim=2) + 0.5 * (g_after - g).norm(dim=2))).sum()
        assert scores[f"{layer}.mlp.c_fc"] == pytest.approx(float(by_hand), rel=1e-9)
        assert float(by_hand) >= abs(change)


@pytest.fixture(scope="module")
def narrow():
    """A model 16 wide in float64, and the Hessians of two of its layers, [128, 128], on every batch."""
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().requires_grad_(False)
    return model, {name: [exact_hessian(model, name, ids) for ids in BATCHES] for name in NARROW}


def exact_hessian(model, name, ids):
    weight = model.get_submodule(name).weight

    def at(flat):
        changed = {f"{name}.weight": flat.view_as(weight)}
        return mean_loss(torch.func.functional_call(model, changed, (ids,)).logits, ids)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(at, weight.flatten(), vectorize=True)


def drawn_traces(model, layers, seed=0, probes=200):
    with taylor._twice_differentiable(model):
        return taylor.hessian_traces(model, layers, BATCHES[0], probes, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NARROW)
def test_hutchinson_against_the_exact_hessian(narrow, name):
    model, hessians = narrow
    H, layer = hessians[name][0], model.get_submodule(name)
    (drawn,) = drawn_traces(model, [layer])
    signs = torch.Generator().manual_seed(0)
    for product in drawn:
        v = (torch.randint(0, 2, layer.weight.shape, generator=signs) * 2 - 1).double().flatten()
        assert product == pytest.approx(float(v @ H @ v), rel=1e-4, abs=1e-5)  # norms are in float32
    error = np.std(drawn, ddof=1) / math.sqrt(len(drawn))
    assert abs(np.mean(drawn) - float(H.trace())) < 3 * error
    # Of +-1, v^T H v varies by twice the sum of squares beside the diagonal.
    beside = H - H.diagonal().diag()
    assert np.var(drawn, ddof=1) == pytest.approx(2 * float(beside.square().sum()), rel=0.4)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_all_layers_at_once_have_the_same_traces(narrow):
    model, hessians = narrow
    layers = dict(fitting_linears(model, RECIPE))
    drawn = dict(zip(layers, drawn_traces(model, list(layers.values()))))
    for name in NARROW:
        error = np.std(drawn[name], ddof=1) / math.sqrt(len(drawn[name]))
        assert abs(np.mean(drawn[name]) - float(hessians[name][0].trace())) < 3 * error


def test_a_layer_whose_output_goes_nowhere_has_no_curvature(narrow):
    model = copy.deepcopy(narrow[0])
    mlp = model.model.layers[1].mlp
    mlp.down_proj.weight.zero_()
    for layer, matters in ((mlp.gate_proj, False), (mlp.up_proj, False), (model.model.layers[0].mlp.up_proj, True)):
        (drawn,) = drawn_traces(model, [layer], probes=3)
        assert any(drawn) == matters


def test_hessian_is_the_mean_of_the_diagonal_times_the_squared_error(narrow):
    model, hessians = narrow
    found = sensitivities(model, "hessian", BATCHES, RECIPE)
    counts = [ids[:, 1:].numel() for ids in BATCHES]
    layers, draw = dict(fitting_linears(model, RECIPE)), torch.Generator().manual_seed(0)
    with taylor._twice_differentiable(model):
        drawn = [taylor.hessian_traces(model, list(layers.values()), ids, 22, draw) for ids in BATCHES]  # 64 in all
    for i, (name, layer) in enumerate(layers.items()):
        trace = np.average([np.mean(traces[i]) for traces in drawn], weights=counts)
        assert found.scores[name] == pytest.approx(trace / layer.weight.numel(), rel=1e-9)
    for name in NARROW:
        size = model.get_submodule(name).weight.numel()
        mean = np.average([float(H.trace()) / size for H in hessians[name]], weights=counts)
        assert abs(found.scores[name] - mean) < 4 * found.noise[name]
    for name, layer in fitting_linears(model, RECIPE):
        for bits in WIDTHS:
            squared = float((layer.weight - rounded(layer.weight, bits)).square().sum())
            assert found.costs[name][bits] == pytest.approx(max(found.scores[name], 0) * squared, rel=1e-4)


@pytest.mark.parametrize("arch", ["opt", "gpt2"])
def test_attention_of_every_model_has_a_second_derivative(untrained, arch):
    model = untrained(arch, vocabulary=60)
    layers = [layer for _, layer in fitting_linears(model, RECIPE)]
    kinds = {}
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        kinds[kind] = drawn_traces(model, layers, probes=2)
    assert np.allclose(kinds["sdpa"], kinds["eager"], rtol=1e-2, atol=1e-2)
    assert np.abs(kinds["sdpa"]).min() > 0


def test_attention_without_a_second_derivative_is_named(untrained):
    model = untrained("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention 'flash_attention_2' has no second derivative"):
        sensitivities(copy.deepcopy(model), "hessian", BATCHES, RECIPE)
