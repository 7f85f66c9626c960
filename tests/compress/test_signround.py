"""Learned rounding: its gradients and steps against autograd in float64, and what it does to trained blocks."""

import copy
from collections import defaultdict

import pytest
import torch
from remanence.compress.block import Block, Hidden, block_names, enter, first
from remanence.compress.experts import unfuse_experts_
from remanence.compress.knobs import RTN, SignRound
from remanence.compress.recipe import Recipe
from remanence.compress.rtn import rtn
from remanence.compress.signround import LEAST, MOST, Rounding, _gradients, _picks, learn, output_errors, solve
from remanence.compress.spec import QuantSpec
from remanence.compress.walk import weight_of
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.usefixtures("one_thread")

SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
BITS = pytest.mark.parametrize("bits", [2, 3, 4])


def alike(spec):
    """The same format for every layer."""
    return defaultdict(lambda: spec)


def options(spec, **knobs):
    return SignRound(scale="signed-max" if spec.symmetric else "minmax", **knobs)


def recipe(spec, **knobs):
    return Recipe("signround", spec, options=options(spec, **knobs))


def nearest(weight, spec, dtype=torch.float16):
    return rtn(weight.detach(), spec, dtype, RTN("signed-max" if spec.symmetric else "minmax"))


def blocks(model, batches):
    """Every decoder block with what the dense model feeds it."""
    hidden = Hidden(batches, model.config.hidden_size, model.dtype)
    for name, calls in zip(block_names(model), enter(model, batches, hidden), strict=True):
        module = model.get_submodule(name)
        linears = {
            inner: layer
            for inner, layer in module.named_modules()
            if isinstance(layer, nn.Linear | Conv1D) and inner != "mlp.gate"
        }
        block = Block(name, module, linears, model.config, calls, hidden)
        yield block
        with torch.no_grad():
            outputs = [block.forward(i) for i in range(len(block))]
        for i, output in enumerate(outputs):
            hidden.write(i, output)


def tokens(vocabulary, *shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(2, vocabulary, shape, generator=g) for shape in shapes]


@pytest.fixture
def trained(memorized):
    """A copy of the trained model, and what it learned as batches of sequences of one length."""
    by_length = {}
    for row in memorized.corpus.retain:
        ids = memorized.encoder.pair(row.question, row.answer)[0]
        by_length.setdefault(len(ids), []).append(ids)
    batches = [torch.tensor(rows[:8]) for _, rows in sorted(by_length.items())]
    return copy.deepcopy(memorized.target), batches[:8]


def outputs64(block, weights=None):
    """The block's output on every batch, float64, with `weights` [N, K] by name in place of its own."""
    module = copy.deepcopy(block.module).double().requires_grad_(False)
    own = {
        f"{name}.weight": weight.double().T if isinstance(block.linears[name], Conv1D) else weight.double()
        for name, weight in (weights or {}).items()
    }
    found = []
    for i in range(len(block)):
        hidden = block.hidden(i).double()
        call = block._calls[hidden.shape[0], hidden.shape[1]]
        kwargs = {
            key: tuple(t.double() for t in value) if key == "position_embeddings" else value
            for key, value in call.kwargs.items()
        }
        found.append(first(torch.func.functional_call(module, own, (hidden, *call.args), kwargs)))
    return found


def difference(a, b):
    """Mean squared difference over all batches."""
    return sum(float((x - y).square().sum()) for x, y in zip(a, b)) / sum(x.numel() for x in a)


# One weight


def through(x, new):
    """`new` going forward, the identity going back."""
    return x + (new - x).detach()


def reference(rounding, offset, alpha, beta):
    """w_hat [N, n, G] from the paper's formula; float64 with autograd."""
    start, most = rounding.start, 2**rounding.start.spec.bits - 1
    w, s0 = rounding.w.double(), start.scale.double()
    if beta is None:
        s, z = s0 * alpha, torch.tensor(float(2 ** (start.spec.bits - 1)))
    else:
        low, high = -start.zero.double() * s0, (most - start.zero.double()) * s0
        s = (high * alpha - low * beta) / most
    s = through(s, s.to(start.scale.dtype).double())
    if beta is not None:
        z = -low * beta / s
        z = through(z, z.round())[:, :, None]
    t = w / s[:, :, None] + offset
    return s[:, :, None] * ((through(t, t.round()) + z).clamp(0, most) - z)


def moved(spec, seed=0):
    """A Rounding away from its start, with weights that clip; odd sizes."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 3 * 24, generator=g) * 0.02
    rounding = Rounding(weight, nearest(weight, spec))
    rounding.offset = torch.rand(7, 3, 24, generator=g) - 0.5
    rounding.alpha = 0.6 + 0.8 * torch.rand(7, 3, generator=g)
    if rounding.beta is not None:
        rounding.beta = 0.6 + 0.8 * torch.rand(7, 3, generator=g)
    return rounding, torch.randn(7, 3, 24, generator=g)


@BITS
@SYMMETRIC
def test_weight_and_gradients(bits, symmetric):
    rounding, g = moved(QuantSpec(bits, 24, symmetric))
    learned = [rounding.offset, rounding.alpha] + ([] if symmetric else [rounding.beta])
    leaves = [tensor.double().requires_grad_() for tensor in learned]
    expected = reference(rounding, leaves[0], leaves[1], None if symmetric else leaves[2])
    torch.testing.assert_close(rounding.weight().view_as(rounding.w).double(), expected.detach(), rtol=1e-6, atol=1e-9)
    # Some weights have to clip, and some not, for all terms to be seen.
    at_end = (expected.detach() / expected.detach().abs().amax(2, keepdim=True)).abs() > 0.999
    assert 0 < at_end.float().mean() < 1
    expected.backward(g.double())
    for found, leaf in zip(rounding.gradients(g), leaves):
        torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-4, atol=1e-6)


@BITS
@SYMMETRIC
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_starts_at_round_to_nearest(bits, symmetric, dtype):
    spec = QuantSpec(bits, 16, symmetric)
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)) * 0.03
    weight[0], weight[1, :16] = 0, 0.01
    start = nearest(weight, spec, dtype)
    found = Rounding(weight, start).qtensor()
    assert torch.equal(found.codes, start.codes)
    if dtype != torch.float32:  # there the range, made and divided again, may be off by the last bit
        assert torch.equal(found.scale, start.scale)
    assert symmetric or torch.equal(found.zero, start.zero)


@SYMMETRIC
def test_one_step(symmetric):
    rounding, g = moved(QuantSpec(3, 24, symmetric))
    before = [rounding.offset.clone(), rounding.alpha.clone(), None if symmetric else rounding.beta.clone()]
    gradients = rounding.gradients(g)
    rounding.descend_(g.flatten(1), 0.125)
    after = [rounding.offset, rounding.alpha, rounding.beta]
    for old, gradient, new, bounds in zip(before, gradients, after, [(-0.5, 0.5), (LEAST, MOST), (LEAST, MOST)]):
        if old is not None:
            expected = (old.double() - 0.125 * gradient.double().sign()).clamp(*bounds)
            torch.testing.assert_close(new.double(), expected, rtol=0, atol=1e-6)
            assert (new == bounds[0]).any() or old is not before[0]  # some offsets end at the bound
    # Weights that clip have no gradient, and stay.
    assert torch.equal(after[0] == before[0], gradients[0] == 0)


@BITS
@SYMMETRIC
def test_zeros_stay_zero_at_the_bounds(bits, symmetric):
    weight, spec = torch.randn(6, 48, generator=torch.Generator().manual_seed(2)), QuantSpec(bits, 24, symmetric)
    weight[:, ::3] = 0
    rounding = Rounding(weight, nearest(weight, spec))
    for offset in (-0.5, 0.5):
        for alpha in (LEAST, 0.77, MOST):
            rounding.offset.fill_(offset)
            rounding.alpha.fill_(alpha)
            assert (rounding.weight()[:, ::3] == 0).all()
            assert (rounding.weight() != 0).any()


def test_scale_stays_in_its_dtype():
    # The least and the largest half: a scale half as large is zero, one half as much again infinite.
    for value, alpha in ((2.0**-24, LEAST), (65504.0, MOST)):
        weight = torch.full((1, 16), 8 * value)
        rounding = Rounding(weight, nearest(weight, QuantSpec(4, 16)))
        rounding.alpha.fill_(alpha)
        assert rounding.grid()[0].abs().item() == value


# One block


def test_gradient_of_the_objective(trained):
    model, batches = trained
    block = next(blocks(model, batches))
    spec = QuantSpec(3, 32)
    weights = {name: nearest(layer.weight, spec).dequantize() for name, layer in block.linears.items()}
    fixed = {name: weights.pop(name) for name in ("self_attn.q_proj", "mlp.up_proj")}
    with torch.no_grad():
        targets = [block.forward(i) for i in range(len(block))]
    hats = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    picked, unit = [1, 4], 0.3
    found = _gradients(block, hats, fixed, targets, picked, unit)
    seen = sum(targets[i].shape[0] * targets[i].shape[1] for i in picked)

    # The same by autograd, in a copy that has these weights for its own.
    learned = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    outputs = outputs64(block, fixed | learned)
    loss = sum((outputs[i] - targets[i].double()).square().sum() for i in picked) / (unit * seen) ** 0.5
    for name, expected in zip(learned, torch.autograd.grad(loss, list(learned.values()))):
        assert (found[name].double() - expected).norm() < 1e-4 * expected.norm(), name
    assert found.keys() == weights.keys()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("bits", "least"), [(2, 0.4), (3, 0.5), (4, 0.6)])
def test_objective_falls_on_every_layer_of_a_trained_model(trained, bits, least):
    model, batches = trained
    spec, count = QuantSpec(bits, 32), 0
    for block in blocks(model, batches):
        own = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
        found = learn(block, alike(spec), options(spec, iterations=60))
        # Measured again in float64, with what is stored.
        dense = outputs64(block)
        start = {name: nearest(layer.weight, spec).dequantize() for name, layer in block.linears.items()}
        assert found.before == pytest.approx(difference(outputs64(block, start), dense), rel=1e-4)
        end = {name: q.dequantize() for name, q in found.q.items()}
        assert found.after == pytest.approx(difference(outputs64(block, end), dense), rel=1e-4)
        assert found.after < least * found.before, block.name
        for name, parameter in block.module.named_parameters():
            assert isinstance(parameter, nn.Parameter)
            assert torch.equal(parameter, own[name])
        assert not any(module._forward_pre_hooks for module in block.module.modules())
        count += 1
    assert count == 2


def test_asymmetric(trained):
    model, batches = trained
    spec = QuantSpec(3, 32, symmetric=False)
    block = next(blocks(model, batches))
    found = learn(block, alike(spec), options(spec, iterations=60))
    assert found.after < 0.4 * found.before
    for name, q in found.q.items():
        assert q.zero.dtype == torch.uint8
        assert int(q.zero.max()) <= 7
        start = nearest(block.linears[name].weight, spec)
        assert not torch.equal(q.scale, start.scale), name


def test_never_worse_than_round_to_nearest(trained):
    model, batches = trained
    spec = QuantSpec(4, 32)
    block = next(blocks(model, batches))
    # Steps from bound to bound.
    found = learn(block, alike(spec), options(spec, iterations=3, learning_rate=50.0))
    assert found.after == found.before
    for name, q in found.q.items():
        start = nearest(block.linears[name].weight, spec)
        assert torch.equal(q.codes, start.codes)
        assert torch.equal(q.scale, start.scale)


def test_same_data_same_result(trained):
    model, batches = trained
    spec = QuantSpec(3, 32)
    block = next(blocks(model, batches))
    a = learn(block, alike(spec), options(spec, iterations=20))
    torch.manual_seed(99)
    b = learn(block, alike(spec), options(spec, iterations=20))
    other = learn(block, alike(spec), options(spec, iterations=20, batch=100))
    assert a.after == b.after
    assert all(torch.equal(a.q[name].codes, b.q[name].codes) for name in a.q)
    assert any(not torch.equal(a.q[name].codes, other.q[name].codes) for name in a.q)


@SYMMETRIC
def test_pruned_weights_stay_zero(trained, symmetric):
    model, batches = trained
    spec = QuantSpec(3, 32, symmetric)
    block = next(blocks(model, batches))
    gone = {}
    for name, layer in block.linears.items():
        gone[name] = layer.weight.detach().abs() < layer.weight.detach().abs().median()
        layer.weight.data[gone[name]] = 0
    found = learn(block, alike(spec), options(spec, iterations=40))
    assert found.after < found.before
    for name, q in found.q.items():
        assert (q.dequantize()[gone[name]] == 0).all()
        assert (q.dequantize()[~gone[name]] != 0).float().mean() > 0.3


def test_solve(trained):
    model, batches = trained
    spec = QuantSpec(3, None)
    block = next(blocks(model, batches))
    solved = solve(block, recipe(spec, iterations=10))
    assert list(solved) == list(block.linears)
    # The errors of every layer again, from what the dense block's layers see.
    rows = {name: [] for name in block.linears}
    handles = [
        layer.register_forward_pre_hook(lambda _, x, name=name: rows[name].append(x[0].flatten(0, 1)))
        for name, layer in block.linears.items()
    ]
    with torch.no_grad():
        for i in range(len(block)):
            block.forward(i)
    for handle in handles:
        handle.remove()
    for name, layer in block.linears.items():
        x, w = torch.cat(rows[name]).double(), layer.weight.detach().double()
        off = x @ (w - solved[name].q.dequantize().double()).T
        assert solved[name].error == pytest.approx(float(off.square().sum() / (x @ w.T).square().sum()), rel=1e-4)
        assert solved[name].note == ""
        assert solved[name].q.scale.shape == (w.shape[0], 1)


def test_no_grad_around_it(trained):
    model, batches = trained
    spec = QuantSpec(3, 32)
    block = next(blocks(model, batches))
    with torch.no_grad():
        found = learn(block, alike(spec), options(spec, iterations=20))
    assert found.after < found.before


def test_bfloat16(trained):
    model, batches = trained
    spec = QuantSpec(3, 32)
    block = next(blocks(model.bfloat16(), batches))
    found = learn(block, alike(spec), options(spec, iterations=40))
    assert found.after < 0.6 * found.before
    assert all(q.scale.dtype == torch.bfloat16 for q in found.q.values())
    assert block.module.self_attn.q_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("arch", ["gpt2", "opt"])
def test_other_architectures(untrained, arch):
    model = untrained(arch)
    block = next(blocks(model, tokens(300, (4, 12), (4, 9), (4, 30))))
    spec = QuantSpec(3, 16)
    found = learn(block, alike(spec), options(spec, iterations=40))
    assert found.after < 0.7 * found.before
    end = {name: q.dequantize() for name, q in found.q.items()}
    assert all(end[name].shape == weight_of(layer).shape for name, layer in block.linears.items())
    assert found.after == pytest.approx(difference(outputs64(block, end), outputs64(block)), rel=1e-4)


def test_experts_with_too_few_tokens_are_rounded_to_nearest():
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=1,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert unfuse_experts_(model)
    # One of the first two experts has a logit above zero for every token: the last is never chosen, the third seldom.
    router = model.model.layers[0].mlp.gate.weight.data
    router[1], router[3] = -router[0], 0
    router[2] *= 0.25
    block = next(blocks(model, tokens(64, (8, 10), (4, 8))))
    experts = {name for name in block.linears if ".experts." in name}
    assert len(experts) == 12
    spec = QuantSpec(3, 16)
    found = learn(block, alike(spec), options(spec, iterations=30))
    solved = solve(block, recipe(spec, iterations=30))
    few = {name for name in experts if found.tokens[name] < 32}
    unused = {name for name in experts if found.tokens[name] == 0}
    assert unused < few
    assert len(unused) == 3
    assert few < experts
    for name, layer in block.linears.items():
        same = torch.equal(solved[name].q.codes, nearest(layer.weight, spec).codes)
        assert same == (name in few), name
        assert solved[name].note == (f"{found.tokens[name]} tokens: rounded to nearest" if name in few else "")
        assert (solved[name].error is None) == (name in unused)
    assert found.after < found.before
    # 8 * 10 + 4 * 8 tokens, each to one expert.
    assert sum(found.tokens[name] for name in experts if name.endswith("down_proj")) == 112


def test_nothing_to_learn(trained):
    model, batches = trained
    block = next(blocks(model, batches))
    for layer in block.linears.values():
        layer.weight.data.zero_()
    found = learn(block, alike(QuantSpec(4, 32)), SignRound())
    assert (found.before, found.after) == (0, 0)
    assert output_errors(block, found.q) == dict.fromkeys(block.linears, 0.0)
    assert all((q.dequantize() == 0).all() for q in found.q.values())
    empty = Block("none", block.module, {}, block.config, block._calls, block._hidden)
    assert solve(empty, recipe(QuantSpec(4, 32))) == {}


def test_picks():
    picks = _picks([3, 5, 2, 8, 1], 8)
    seen = [next(picks) for _ in range(60)]
    for picked in seen:
        sizes = [[3, 5, 2, 8, 1][i] for i in picked]
        assert sum(sizes) >= 8 or len(picked) == 5
        assert sum(sizes[:-1]) < 8
    order = [i for picked in seen for i in picked]
    # Whole epochs: every batch once in five, in changing order.
    epochs = [order[at : at + 5] for at in range(0, len(order) - 4, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    assert next(_picks([1, 1], 8)) in ([0, 1], [1, 0])
