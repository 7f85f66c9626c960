"""What all sensitivity measures have in common: the model stays as it was, scores, their noise and their costs."""

import copy
import math

import numpy as np
import pytest
import torch
from remanence.compress.block import block_names
from remanence.compress.experts import unfuse_experts_
from remanence.compress.knobs import RTN
from remanence.compress.probe import ratio
from remanence.compress.recipe import parse_recipe
from remanence.compress.rtn import relative_error, rtn
from remanence.compress.sensitivity import MEASURES, Sensitivity, sensitivities, significant
from remanence.compress.spec import QuantSpec
from remanence.compress.walk import fitting_linears
from transformers import AutoModelForCausalLM, MixtralConfig

RECIPE = parse_recipe("rtn-w4a16-g16")
WIDTHS = (2, 3, 4, 8)
BY_WIDTH = ("tdmpq", "error", "error_absolute", "kl")
SEEN = [measure for measure in MEASURES if measure != "random"]


def tokens(*shapes, vocabulary=300, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocabulary, shape, generator=draw) for shape in shapes]


BATCHES = tokens((2, 20), (3, 15), (1, 40))


def names(model):
    return [name for name, _ in fitting_linears(model, RECIPE)]


def rounded(weight, bits, dtype=torch.float16):
    return rtn(weight, QuantSpec(bits, 16), dtype, RTN())


def state(model):
    """Everything that must come back."""
    tensors = [(key, id(t), t.dtype, t.clone()) for key, t in model.state_dict(keep_vars=True).items()]
    parameters = [
        (key, id(p), p.requires_grad, p.grad is None or p.grad.clone()) for key, p in model.named_parameters()
    ]
    modules = [
        (key, id(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for key, module in model.named_modules()
    ]
    return tensors, parameters, modules


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_on_every_model_which_stays_as_it_is(untrained, arch, measure):
    model = untrained(arch).train()
    model.get_submodule(block_names(model)[0]).eval()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    before, drawn = state(model), torch.get_rng_state()
    found = sensitivities(model, measure, BATCHES, RECIPE, WIDTHS)
    assert same(state(model), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert found.measure == measure
    assert list(found.scores) == list(found.costs) == names(model)
    assert all(math.isfinite(score) for score in found.scores.values())
    assert all(set(costs) == {*WIDTHS, 16} and costs[16] == 0 for costs in found.costs.values())
    assert all(costs[2] >= costs[3] >= costs[4] >= costs[8] >= 0 for costs in found.costs.values())
    assert found.unseen == ()
    # Of two layers, each is as like the other one as that is like it.
    distinct = {"cmpq": 1, "svcca": 1, "pwcca": 2, "tdmpq_input": 2}.get(measure, len(found.scores))
    assert len(set(found.scores.values())) == distinct
    assert set(found.noise) == (set() if measure in ("cmpq", "svcca", "pwcca", "random") else set(found.scores))


@pytest.mark.parametrize("measure", MEASURES)
def test_models_in_16_bits_are_measured_in_float32(untrained, measure):
    model = untrained("llama").to(torch.bfloat16)
    wide = copy.deepcopy(model).float()
    before = state(model)
    found, expected = (sensitivities(m, measure, BATCHES, RECIPE) for m in (model, wide))
    assert same(state(model), before)
    # Scales in bfloat16 against float16: the same numbers but for the rounding of scales.
    for name, score in found.scores.items():
        assert score == pytest.approx(expected.scores[name], rel=0.1 if measure in BY_WIDTH else 1e-5)


def test_the_model_comes_back_from_an_error_too(untrained):
    model = untrained("llama")
    model.model.embed_tokens.weight.data[:] = torch.nan
    before = [tensor.clone() for tensor in model.state_dict().values()]
    for measure in ("tdmpq", "kl", "cmpq", "hessian", "pmpq"):
        with pytest.raises(ValueError, match=r"nan|NaN"):
            sensitivities(model, measure, BATCHES, RECIPE)
        assert all(torch.allclose(a, b, equal_nan=True) for a, b in zip(model.state_dict().values(), before))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_costs_of_one_score_go_with_the_relative_error(untrained):
    model = untrained("llama")
    for measure in ("pmpq", "cmpq", "random", "tdmpq_input"):
        found = sensitivities(model, measure, BATCHES, RECIPE)
        for name, layer in fitting_linears(model, RECIPE):
            for bits in WIDTHS:
                error = relative_error(layer.weight.detach(), rounded(layer.weight.detach(), bits))
                assert found.costs[name][bits] == pytest.approx(max(found.scores[name], 0) * error, rel=1e-9)
        if measure == "pmpq":
            assert min(found.scores.values()) < 0


# What any measure of layers one by one must see


@pytest.mark.parametrize("measure", ["pmpq", "tdmpq", "kl"])
def test_a_layer_whose_output_goes_nowhere_does_not_matter(untrained, measure):
    model = untrained("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    found = sensitivities(model, measure, BATCHES, RECIPE)
    for part in ("gate_proj", "up_proj"):
        assert found.scores[f"model.layers.1.mlp.{part}"] == 0
        assert abs(found.scores[f"model.layers.0.mlp.{part}"]) > 1e-6


def test_experts_without_tokens_are_named_and_fused_ones_are_put_back():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    apart = copy.deepcopy(model)
    unfuse_experts_(apart)
    before = state(model)
    (ids,) = tokens((1, 3))
    for measure in ("tdmpq", "hessian", "error"):
        found = sensitivities(model, measure, [ids], RECIPE)
        assert same(state(model), before)
        assert list(found.scores) == [name for name, _ in fitting_linears(apart, RECIPE)]
        assert found.unseen
        assert all(".experts." in name for name in found.unseen)
        assert all(found.scores[name] == 0 for name in found.unseen)
        assert all(found.scores[name] != 0 for name in found.scores if "experts" not in name)
        assert sensitivities(apart, measure, [ids], RECIPE).scores == found.scores


# Noise


def test_ratio_and_its_standard_error():
    assert ratio([(3.0, 2.0)]) == (1.5, None)
    assert ratio([(3.0, 2.0), (6.0, 4.0)]) == (1.5, 0.0)
    assert ratio([(0.0, 0.0), (0.0, 0.0)]) == (0.0, 0.0)
    values = np.random.default_rng(0).standard_normal(12)
    value, noise = ratio([(float(v), 1.0) for v in values])
    assert value == pytest.approx(values.mean())
    assert noise == pytest.approx(values.std(ddof=1) / math.sqrt(12))
    # Many draws of the same experiment scatter by about what one of them says.
    draw = np.random.default_rng(1)
    found = []
    for _ in range(400):
        weights = draw.integers(10, 40, 30)
        found.append(ratio([(float(w * (2 + draw.standard_normal())), float(w)) for w in weights]))
    scatter = np.std([value for value, _ in found])
    assert np.mean([noise for _, noise in found]) == pytest.approx(scatter, rel=0.1)


def test_significant_means_two_standard_errors():
    scores, noise = {"a": 1.0, "b": -1.0, "c": 1.0, "d": 0.0}, {"a": 0.4, "b": 0.5, "c": 0.6, "d": 0.0}
    assert significant(Sensitivity("pmpq", scores, noise, {})) == ["a", "b"]
    with pytest.raises(ValueError, match="cmpq has no standard errors"):
        significant(Sensitivity("cmpq", scores, {}, {}))


@pytest.mark.parametrize("measure", ["pmpq", "tdmpq", "kl", "error"])
def test_batches_that_are_all_the_same_leave_no_noise(untrained, measure):
    model = untrained("llama")
    one, three = (sensitivities(model, measure, BATCHES[:1] * k, RECIPE) for k in (1, 3))
    assert one.noise == {}
    assert three.scores == pytest.approx(one.scores, rel=1e-5)
    assert all(noise < 1e-6 * abs(three.scores[name]) + 1e-12 for name, noise in three.noise.items())


# Choices and mistakes


def test_drawn_by_seed(untrained):
    model = untrained("llama")
    for measure in ("random", "tdmpq_input", "hessian"):
        one, again, other = (sensitivities(model, measure, BATCHES[:1], RECIPE, seed=s).scores for s in (1, 1, 2))
        assert one == again
        assert one != other
    assert sensitivities(model, "random", [], RECIPE).scores.keys() == dict.fromkeys(names(model)).keys()


@pytest.mark.parametrize("name", ["gptq-w3a16-g16-asym", "hqq-w4a16-g16", "awq-w8a16", "rtn-w2a16-g32-plain"])
def test_the_grid_is_the_recipes(untrained, name):
    model, recipe = untrained("llama"), parse_recipe(name)
    found = sensitivities(model, "error", BATCHES, recipe, (8, 4, 16))
    knobs = {knob: getattr(recipe.options, knob) for knob in ("scale", "clip") if hasattr(recipe.options, knob)}
    layer = model.model.layers[0].mlp.up_proj
    inputs = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().flatten(0, 1)))
    for ids in BATCHES:
        model(ids)
    hook.remove()
    W, x = layer.weight.detach(), torch.cat(inputs)
    for bits in (4, 8, recipe.spec.bits):
        spec = QuantSpec(bits, recipe.spec.group_size, recipe.spec.symmetric)
        off = (x @ (W - rtn(W, spec, torch.float16, RTN(**knobs)).dequantize()).T).square().sum()
        expected = pytest.approx(float(off / (x @ W.T).square().sum()), rel=1e-5)
        if bits != recipe.spec.bits:
            assert found.costs["model.layers.0.mlp.up_proj"][bits] == expected
        else:
            assert found.scores["model.layers.0.mlp.up_proj"] == expected
    assert set(found.costs["model.layers.0.mlp.up_proj"]) == {4, 8, 16}


def test_progress_is_told_to_the_end(untrained):
    for measure in SEEN:
        told = []
        keep = told.append
        sensitivities(
            untrained("llama"), measure, BATCHES[:1], RECIPE, (4,), progress=lambda *said, keep=keep: keep(said)
        )
        done = [step for step, _, _ in told]
        assert done == sorted(done)
        assert done[-1] == told[-1][1] > 0


@pytest.mark.parametrize(
    ("measure", "batches", "recipe", "widths", "message"),
    [
        ("trace", BATCHES, "rtn-w4a16-g16", WIDTHS, "measure: 'trace' is not one of cmpq, svcca"),
        ("kl", BATCHES, "rtn-w4a16-g16", (4, 5), r"widths: \[4, 5\]; expected some of 2, 3, 4, 8, 16"),
        ("kl", [], "rtn-w4a16-g16", WIDTHS, "needs data, and there is none"),
        ("kl", [torch.zeros(3, 1, dtype=torch.int64)], "rtn-w4a16-g16", WIDTHS, "batch 0 has 1 token a sequence"),
        ("kl", tokens((2, 9), vocabulary=900), "rtn-w4a16-g16", WIDTHS, "but the model embeds 300"),
        ("kl", BATCHES, "magnitude-s50", WIDTHS, "quantizes nothing"),
        ("kl", BATCHES, "rtn-w4a16-g24", WIDTHS, "do not divide into groups of 24"),
    ],
)
def test_mistakes_are_said(untrained, measure, batches, recipe, widths, message):
    with pytest.raises(ValueError, match=message):
        sensitivities(untrained("llama"), measure, batches, parse_recipe(recipe), widths)


def test_a_shared_weight_is_refused(untrained):
    with pytest.raises(ValueError, match=r"its weight is also transformer\.wte\.weight"):
        sensitivities(untrained("gpt2"), "tdmpq", BATCHES, parse_recipe("rtn-w4a16-g16+ignore="))
