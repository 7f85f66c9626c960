"""Measures that try what they score, by hand: PMPQ, KL, the error of a layer's outputs."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from remanence.compress.knobs import RTN
from remanence.compress.recipe import parse_recipe
from remanence.compress.response import divergence
from remanence.compress.rtn import rtn
from remanence.compress.sensitivity import sensitivities
from remanence.compress.spec import QuantSpec
from remanence.compress.walk import fitting_linears, weight_of

DRAW = torch.Generator().manual_seed(0)
BATCHES = [torch.randint(2, 300, shape, generator=DRAW) for shape in ((2, 40), (3, 25), (1, 90))]
RECIPE = parse_recipe("rtn-w4a16-g16")
WIDTHS = (2, 3, 4, 8)


def one_layer(model, name):
    """Scores that one alone, to keep the tests short."""
    others = [other for other, _ in fitting_linears(model, RECIPE) if other != name]
    return replace(RECIPE, ignore=("lm_head", *others))


def rounded(weight, bits):
    return rtn(weight.detach(), QuantSpec(bits, 16), torch.float16, RTN()).dequantize()


@torch.no_grad()
def nats(model, ids):
    """Sum of the next-token losses."""
    return -float(model(ids).logits.double()[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).sum())


@pytest.mark.parametrize(
    ("arch", "name"), [("llama", "model.layers.1.mlp.up_proj"), ("gpt2", "transformer.h.0.attn.c_attn")]
)
def test_pmpq(untrained, arch, name):
    model = untrained(arch).double()
    found = sensitivities(model, "pmpq", BATCHES, one_layer(model, name))
    rises = []
    for ids in BATCHES:
        rise = 0.0
        for level in (0.1, 0.3, 0.5):
            pruned = copy.deepcopy(model)
            weight = pruned.get_submodule(name).weight
            order = weight.detach().abs().flatten().argsort(stable=True)
            weight.data.view(-1)[order[: round(level * weight.numel())]] = 0
            rise += (nats(pruned, ids) - nats(model, ids)) / 3
        rises.append(rise)
    counts = [ids[:, 1:].numel() for ids in BATCHES]
    mean = sum(rises) / sum(counts)
    assert found.scores == pytest.approx({name: mean}, abs=1e-6)
    spread = sum((rise - mean * count) ** 2 for rise, count in zip(rises, counts)) * 3 / 2
    assert found.noise == pytest.approx({name: math.sqrt(spread) / sum(counts)}, rel=1e-4)


def test_kl(untrained):
    name = "model.layers.0.self_attn.o_proj"
    model = untrained("llama").double()
    found = sensitivities(model, "kl", BATCHES, one_layer(model, name))
    for bits in WIDTHS:
        other = copy.deepcopy(model)
        layer = other.get_submodule(name)
        layer.weight.data = rounded(layer.weight, bits).double()
        total, count = 0.0, 0
        with torch.no_grad():
            for ids in BATCHES:
                p, q = (m(ids).logits.softmax(-1) for m in (model, other))
                total += float((p * (p / q).log()).sum())
                count += ids.numel()
        assert found.costs[name][bits] == pytest.approx(total / count, rel=1e-5)
    assert found.scores[name] == found.costs[name][4]


def test_divergence_in_parts_and_of_tiny_differences(monkeypatch):
    draw = np.random.default_rng(0)
    p, q = (torch.from_numpy(draw.standard_normal((3, 17, 50))).float() for _ in range(2))
    expected = (p.double().softmax(-1) * (p.double().log_softmax(-1) - q.double().log_softmax(-1))).sum()
    assert divergence(p, q) == pytest.approx(float(expected), rel=1e-12)
    monkeypatch.setattr("remanence.compress.response._LOGITS", 7 * 50)
    assert divergence(p, q) == pytest.approx(float(expected), rel=1e-12)
    # About half the variance of the difference under p: 1e-9 here, lost in float32.
    near = p.double() + 1e-5 * q.double()
    weights = p.double().softmax(-1)
    variance = (weights * q.double() ** 2).sum(-1) - (weights * q.double()).sum(-1) ** 2
    assert divergence(p.double(), near) == pytest.approx(float(variance.sum()) * 0.5e-10, rel=1e-3)


@pytest.mark.parametrize(
    ("arch", "name"), [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.1.mlp.c_proj")]
)
def test_error_of_outputs(untrained, arch, name):
    model = untrained(arch).double()
    layer, inputs = model.get_submodule(name), []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().flatten(0, 1)))
    for ids in BATCHES:
        model(ids)
    hook.remove()
    W, x = weight_of(layer).detach(), torch.cat(inputs)
    relative, absolute = (sensitivities(model, measure, BATCHES, RECIPE) for measure in ("error", "error_absolute"))
    for bits in WIDTHS:
        off = float((x @ (W - rounded(W, bits)).T).square().sum())
        assert relative.costs[name][bits] == pytest.approx(off / float((x @ W.T).square().sum()), rel=1e-9)
        assert absolute.costs[name][bits] == pytest.approx(off / len(x), rel=1e-9)
    each = [float((part @ (W - rounded(W, 4)).T).square().sum()) for part in inputs]
    assert len(each) == len(BATCHES)
    sizes = [len(part) for part in inputs]
    spread = sum((off - absolute.scores[name] * size) ** 2 for off, size in zip(each, sizes)) * 3 / 2
    assert absolute.noise[name] == pytest.approx(math.sqrt(spread) / sum(sizes), rel=1e-9)
