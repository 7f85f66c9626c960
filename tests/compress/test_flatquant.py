"""FlatQuant: its map and gradients against float64, and what it does to trained blocks with outlier channels."""

import copy
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from remanence.compress.activations import fake_quantize
from remanence.compress.block import Block, Hidden, block_names, enter, first
from remanence.compress.checkpoint import load_model, save_model
from remanence.compress.experts import unfuse_experts_
from remanence.compress.flatquant import (
    Grids,
    Rounded,
    _fixed,
    _steps,
    cut_and_round,
    descend,
    flat_rotation,
    learn,
    round_rows,
    shared_inputs,
    solve,
    straight_through,
)
from remanence.compress.knobs import RTN, FlatQuant
from remanence.compress.kronecker import Kronecker, factors
from remanence.compress.linear import QuantLinear
from remanence.compress.recipe import Recipe, parse_recipe
from remanence.compress.rotation import hang_, online_layers
from remanence.compress.rtn import rtn
from remanence.compress.sequential import compress_
from remanence.compress.sites import observe
from remanence.compress.spec import ActivationSpec, QuantSpec
from remanence.compress.walk import weight_of
from scipy.linalg import hadamard
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.usefixtures("one_thread")


def alike(spec):
    """The same format for every layer."""
    return defaultdict(lambda: spec)


W4, A4 = QuantSpec(4), ActivationSpec(4)
W4A4 = Grids(alike(W4), "signed-max", A4)


def tokens(vocabulary, *shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(2, vocabulary, shape, generator=g) for shape in shapes]


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


@torch.no_grad()
def add_outliers(model, factor=30.0, count=3):
    """Some channels of every norm's output and of what down_proj reads, times `factor`; the model does the same."""
    g = torch.Generator().manual_seed(7)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            channels = torch.randperm(len(norm.weight), generator=g)[:count]
            norm.weight[channels] *= factor
            for reader in readers:
                reader.weight[:, channels] /= factor
        channels = torch.randperm(len(mlp.up_proj.weight), generator=g)[:count]
        mlp.up_proj.weight[channels] *= factor
        mlp.down_proj.weight[:, channels] /= factor


@pytest.fixture
def trained(memorized):
    """A copy of the trained model with outlier channels, and what it learned as batches of one length each."""
    by_length = {}
    for row in memorized.corpus.retain:
        ids = memorized.encoder.pair(row.question, row.answer)[0]
        by_length.setdefault(len(ids), []).append(ids)
    model = copy.deepcopy(memorized.target)
    add_outliers(model)
    return model, [torch.tensor(rows[:8]) for _, rows in sorted(by_length.items())][4:8]


def rounded64(x, spec):
    """Rows of x float64 rounded on the symmetric grid of ActivationSpec, from its formula."""
    half = 2 ** (spec.bits - 1)
    scale = spec.clip * x.abs().amax(-1, keepdim=True) / (half - 0.5)
    scale[scale == 0] = 1
    return (x / scale).round().clamp(-half, half - 1) * scale


def weight64(q):
    """[N, K] float64 from the codes."""
    codes = q.codes.double().view(*q.scale.shape, -1)
    zero = 2 ** (q.spec.bits - 1) if q.zero is None else q.zero.double()[:, :, None]
    return ((codes - zero) * q.scale.double()[:, :, None]).flatten(1)


def outputs64(block, layers=None, exact=None):
    """The block's output on every batch, float64; `layers`: Rounded in place of its own, all computed anew with dense
    matrices. exact: weight [N, K] by name in place of the integers, and nothing is rounded."""
    module = copy.deepcopy(block.module).double().requires_grad_(False)
    for name, layer in (layers or {}).items():
        inner, bias = module.get_submodule(name), block.linears[name].bias
        weight = weight64(layer.q) if exact is None else exact[name].double()
        T = None if layer.transform is None else layer.transform.dense()

        def forward(x, layer=layer, weight=weight, bias=bias, T=T):
            x = x if T is None else x @ T
            x = x if layer.activation is None or exact is not None else rounded64(x, layer.activation)
            return x @ weight.T + (0 if bias is None else bias.double())

        inner.forward = forward
    found = []
    for i in range(len(block)):
        hidden = block.hidden(i).double()
        call = block._calls[hidden.shape[0], hidden.shape[1]]
        kwargs = {
            key: tuple(t.double() for t in value) if key == "position_embeddings" else value
            for key, value in call.kwargs.items()
        }
        with torch.no_grad():
            found.append(first(module(hidden, *call.args, **kwargs)))
    return found


def difference(a, b):
    """Mean squared difference over all batches."""
    return sum(float((x - y).square().sum()) for x, y in zip(a, b)) / sum(x.numel() for x in a)


def rotated(block, spec, activation, seed=0):
    """Every layer behind a random Hadamard rotation of its whole input, rounded to nearest with clip search."""
    g, found, signs = torch.Generator().manual_seed(seed), {}, {}
    for name, layer in block.linears.items():
        weight = weight_of(layer).detach()
        K = weight.shape[1]
        signs.setdefault(K, 2 * torch.randint(0, 2, (K, 1), generator=g) - 1)
        made = Kronecker(torch.ones(1, 1), (signs[K] * torch.tensor(hadamard(K)) / K**0.5).float(), torch.ones(K))
        found[name] = Rounded(rtn(made.fold(weight).float(), spec, torch.float16, RTN()), made, activation)
    return found


# The map alone


def test_map_alone_changes_nothing(trained):
    model, batches = trained
    for block in blocks(model, batches):
        layers = learn(block, W4A4, FlatQuant(epochs=2)).layers
        assert all(layer.transform is not None for layer in layers.values())
        folded = {name: layer.transform.fold(block.linears[name].weight) for name, layer in layers.items()}
        dense = outputs64(block)
        size = max(float(x.abs().max()) for x in dense)
        again = outputs64(block, layers, folded)
        assert max(float((x - y).abs().max()) for x, y in zip(again, dense)) < 1e-10 * size
        assert difference(outputs64(block, layers), dense) > 1e-6 * size  # rounding is what does something
        # The same with all in float32, by the layers' own forward.
        with torch.no_grad():
            before = [block.forward(i) for i in range(len(block))]
            for name, layer in block.linears.items():
                layer.weight.copy_(folded[name])
                layer.register_forward_pre_hook(lambda _, x, made=layers[name].transform: (made(x[0]),))
            after = [block.forward(i) for i in range(len(block))]
        assert max(float((x - y).abs().max()) for x, y in zip(after, before)) < 1e-5 * size
        break  # its weights are changed now


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12, 15, 48, 64, 97])
def test_flat_rotation(n):
    H = flat_rotation(n, torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-6)
    assert H.abs().max() <= (2 / n) ** 0.5 + 1e-6
    if n > 4:
        other = flat_rotation(n, torch.Generator().manual_seed(1)).double()
        assert not torch.equal(H, other)
        assert torch.equal(H.abs(), other.abs())


# Rounding and its gradients


def through(x, new):
    """`new` going forward, the identity going back."""
    return x + (new - x).detach()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("narrow", [False, True])
def test_gradients_of_rounded_rows(bits, narrow):
    g = torch.Generator().manual_seed(1)
    x, flow = torch.randn(6, 40, generator=g), torch.randn(6, 40, generator=g)
    x[3] = 0
    share = torch.tensor(0.7, requires_grad=True)
    leaf = x.clone().requires_grad_()
    found = round_rows(leaf, ActivationSpec(bits, narrow=narrow), share)
    assert torch.equal(found, fake_quantize(x, ActivationSpec(bits, clip=share.item(), narrow=narrow)))
    found.backward(flow)
    # From the formula, in float64: only round() passes its gradient unchanged.
    other, part = x.double().requires_grad_(), share.detach().double().requires_grad_()
    most = 2 ** (bits - 1) - 1
    least = -most if narrow else -most - 1
    scale = part * other.abs().amax(-1, keepdim=True) / ((most - least) / 2)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    t = other / scale
    expected = through(t, t.round()).clamp(least, most) * scale
    cut = (t.round() > most) | (t.round() < least)
    assert 0 < float(cut.float().mean()) < 0.5
    torch.testing.assert_close(found.detach().double(), expected.detach(), rtol=1e-6, atol=1e-7)
    expected.backward(flow.double())
    torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(share.grad.double(), part.grad, rtol=1e-4, atol=1e-5)
    assert float(share.grad.abs()) > 0.1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("grid", [{}, {"symmetric": False}, {"narrow": True}], ids=["sym", "asym", "narrow"])
def test_rounded_rows_are_those_of_the_layer(bits, grid):
    spec = ActivationSpec(bits, **grid)
    g = torch.Generator().manual_seed(2)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((1, 1), (5, 63), (2, 3, 65)):
            x = (torch.randn(shape, generator=g) + 0.3).to(dtype)
            share = torch.tensor(0.8, requires_grad=True)
            found = round_rows(x, spec, share)
            assert found.dtype == dtype
            assert torch.equal(found, fake_quantize(x, replace(spec, clip=share.item())))
            if x.numel() > 1:
                found.float().square().sum().backward()
                assert float(share.grad) > 0  # a wider range makes them larger


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_gradients_of_rounded_weights(bits, symmetric):
    spec = QuantSpec(bits, 24, symmetric)
    grids = Grids(alike(spec), "signed-max" if symmetric else "minmax", None)
    g = torch.Generator().manual_seed(3)
    w, flow = torch.randn(7, 72, generator=g) * 0.02, torch.randn(7, 3, 24, generator=g)
    cut = (0.5 + 0.5 * torch.rand(7, generator=g)).requires_grad_()
    q = cut_and_round(w, cut.detach(), spec, grids.scale, torch.float32)
    leaf = w.view(7, 3, 24).clone().requires_grad_()
    size = leaf.abs().amax(2, keepdim=True) if symmetric else leaf.amax(2, keepdim=True) - leaf.amin(2, keepdim=True)
    hard = q.dequantize().view(7, 3, 24)
    found = straight_through(leaf, hard, q.scale[:, :, None], cut[:, None, None] * size)
    assert torch.equal(found, hard)
    found.backward(flow)
    # From the formula, in float64, the zero point fixed.
    other, part = w.double().view(7, 3, 24).requires_grad_(), cut.detach().double().requires_grad_()
    low, high = other.amin(2, keepdim=True), other.amax(2, keepdim=True)
    most = 2**bits - 1
    if symmetric:
        scale = part[:, None, None] * torch.where(high > -low, high, low) / -(2 ** (bits - 1))
        zero = torch.tensor(2.0 ** (bits - 1))
    else:
        scale = part[:, None, None] * (high - low) / most
        zero = (-low * part[:, None, None] / scale).detach().round()
    t = other / scale
    expected = ((through(t, t.round()) + zero).clamp(0, most) - zero) * scale
    torch.testing.assert_close(hard.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    cut_off = (t.round() + zero).clamp(0, most) != t.round() + zero
    assert 0.02 < float(cut_off.float().mean()) < 0.6
    expected.backward(flow.double())
    torch.testing.assert_close(cut.grad.double(), part.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


def test_layers_of_one_input_share_its_map(trained):
    model, batches = trained
    block = next(blocks(model, batches))
    inputs, _ = observe(block)
    shared = shared_inputs(block, inputs, W4A4, seed=0)
    assert [[name.split(".")[1] for name in one.weights] for one in shared] == [
        *(["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]),
    ]
    layers = learn(block, W4A4, FlatQuant(epochs=4)).layers
    for one in shared:
        maps = [layers[name].transform for name in one.weights]
        assert len({id(made) for made in maps}) == len(maps)
        for made in maps:
            assert all(torch.equal(a, b) for a, b in zip(made.buffers(), maps[0].buffers(), strict=True))
            assert (len(made.left), len(made.right)) == factors(made.features)
        assert len({layers[name].activation.clip for name in one.weights}) == 1
    assert len({float(layers[next(iter(one.weights))].activation.clip) for one in shared}) == 4


def test_gradient_reaches_everything_learned(trained):
    model, batches = trained
    block = next(blocks(model, batches))
    inputs, _ = observe(block)
    shared = shared_inputs(block, inputs, W4A4, seed=0)
    with torch.no_grad():
        targets = [(i, block.forward(i)) for i in range(len(block))]
    error = descend(block, shared, {}, targets)
    assert error > 0
    for one in shared:
        for name, parameter in one.named_parameters():
            assert parameter.grad is not None, name
            assert float((parameter.grad != 0).float().mean()) > 0.9, name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in block.module.modules())


def test_gradient_passes_layers_that_learn_nothing(trained):
    """With 8 bits behind it, nearly as with dense layers there; past o_proj nothing of it is left but that way."""
    model, batches = trained
    block = next(blocks(model, batches))
    inputs, _ = observe(block)
    spec, activation = QuantSpec(8), ActivationSpec(8)
    nearest = {
        name: Rounded(rtn(layer.weight.detach(), spec, torch.float16, RTN()), None, activation)
        for name, layer in block.linears.items()
    }
    fixed = {
        name: _fixed(block, name, nearest[name])
        for name in nearest
        if name.split(".")[1] not in ("q_proj", "k_proj", "v_proj")
    }
    targets = [(i, torch.zeros_like(block.hidden(i))) for i in range(len(block))]
    gradients = []
    for others in (fixed, {}):
        one = shared_inputs(block, inputs, W4A4, seed=0)[0]
        descend(block, [one], others, targets)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in one.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98
    assert not torch.equal(*gradients)


def test_gradients_of_the_map(trained):
    """Of x' = x T, and of W' = W T^-T with next to no rounding: as autograd has them for the dense T in float64."""
    model, batches = trained
    block = next(blocks(model, batches))
    inputs, _ = observe(block)
    one = shared_inputs(block, inputs, Grids(alike(QuantSpec(8)), "signed-max", None), seed=0)[0]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    flow = torch.randn(5, 64, generator=torch.Generator().manual_seed(5))
    one.rounded_input(x).backward(flow)
    leaves = [p.detach().double().requires_grad_() for p in (one.left, one.right, one.log_scale)]
    dense = torch.kron(leaves[0], leaves[1]) / leaves[2].exp()[:, None]
    (x.double() @ dense).backward(flow.double())
    for parameter, leaf in zip((one.left, one.right, one.log_scale), leaves):
        torch.testing.assert_close(parameter.grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)
    one.zero_grad()
    for cut in one.cuts:
        cut.data.fill_(20)  # nothing is cut off
    name = "self_attn.q_proj"
    flow = torch.randn(64, 64, generator=torch.Generator().manual_seed(6))
    one.rounded_weight(name).backward(flow)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    dense = torch.kron(leaves[0], leaves[1]) / leaves[2].exp()[:, None]
    (block.linears[name].weight.detach().double() @ torch.linalg.inv(dense).T).backward(flow.double())
    for parameter, leaf in zip((one.left, one.right, one.log_scale), leaves):
        assert float((parameter.grad.double() - leaf.grad).norm()) < 0.05 * float(leaf.grad.norm())


# Blocks


def test_better_than_a_fixed_rotation_on_every_block(trained):
    model, batches = trained
    count = 0
    for block in blocks(model, batches):
        own = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
        dense = outputs64(block)
        shared = shared_inputs(block, observe(block)[0], W4A4, seed=0)
        start = {name: layer for one in shared for name, layer in one.rounded().items()}
        found = learn(block, W4A4, FlatQuant(epochs=6))
        # Measured again in float64, with what is stored; ties of float32 are none there.
        nearest = {
            name: Rounded(rtn(layer.weight.detach(), W4, torch.float16, RTN()), None, A4)
            for name, layer in block.linears.items()
        }
        assert found.before == pytest.approx(difference(outputs64(block, nearest), dense), rel=0.02)
        assert found.after == pytest.approx(difference(outputs64(block, found.layers), dense), rel=0.02)
        fixed = min(
            difference(outputs64(block, rotated(block, W4, ActivationSpec(4, clip=clip), seed)), dense)
            for clip, seed in ((1.0, 0), (0.9, 0), (0.9, 1))
        )
        assert fixed < 0.5 * found.before, block.name
        assert found.after < 0.2 * fixed, block.name
        assert found.after < 0.9 * difference(outputs64(block, start), dense), block.name
        for name, layer in found.layers.items():
            for learned, first_guess in zip(layer.transform.buffers(), start[name].transform.buffers(), strict=True):
                assert float((learned - first_guess).norm() / first_guess.norm()) > 0.01
        for name, parameter in block.module.named_parameters():
            assert torch.equal(parameter, own[name])
            assert parameter.grad is None
        assert not any("forward" in vars(module) for module in block.module.modules())
        count += 1
    assert count == 2


def test_same_data_and_seed_same_result(trained):
    model, batches = trained
    block = next(blocks(model, batches))
    a = learn(block, W4A4, FlatQuant(epochs=1))
    torch.manual_seed(99)
    with torch.no_grad():  # as the caller has it
        b = learn(block, W4A4, FlatQuant(epochs=1))
    c = learn(block, W4A4, FlatQuant(epochs=1, seed=1))
    assert a.after == b.after != c.after
    for name in block.linears:
        assert torch.equal(a.layers[name].q.codes, b.layers[name].q.codes)
        assert torch.equal(a.layers[name].transform.left, b.layers[name].transform.left)
        assert a.layers[name].activation == b.layers[name].activation
        assert not torch.equal(a.layers[name].q.codes, c.layers[name].q.codes)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_codes_come_from_what_is_stored(trained, tmp_path, symmetric):
    """From the file's map and the dense weight: the same W', whose nearest codes on the file's grid are the file's."""
    from safetensors.torch import load_file, save_file

    model, batches = trained
    block = next(blocks(model, batches))
    spec = QuantSpec(4, 32, symmetric)
    layers = learn(block, Grids(alike(spec), "signed-max" if symmetric else "minmax", A4), FlatQuant(epochs=1)).layers
    save_file(
        {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.transform.state_dict().items()},
        tmp_path / "maps.safetensors",
    )
    stored = load_file(tmp_path / "maps.safetensors")
    for name, layer in layers.items():
        made = Kronecker(*(stored[f"{name}.{part}"] for part in ("left", "right", "scale")))
        assert made.left.dtype == torch.float32
        q, w = layer.q, made.fold(block.linears[name].weight.detach()).float()
        groups = w.view(len(w), -1, 32)
        zero = 8 if q.zero is None else q.zero.float()[:, :, None]
        codes = ((groups / q.scale.float()[:, :, None]).round() + zero).clamp(0, 15).to(torch.uint8)
        assert torch.equal(codes.flatten(1), q.codes)
        x = torch.randn(9, w.shape[1], generator=torch.Generator().manual_seed(0))
        assert torch.equal(replace(layer, transform=made).rounded_input(x), layer.rounded_input(x))


@pytest.mark.parametrize(
    ("grids", "least"),
    [
        (Grids(alike(QuantSpec(4, 32)), "absmax", A4), 0.5),
        (Grids(alike(QuantSpec(4, 32, False)), "minmax", ActivationSpec(4, symmetric=False)), 0.6),
        (Grids(alike(QuantSpec(4)), "signed-max", ActivationSpec(8)), 0.8),
        (Grids(alike(QuantSpec(3)), "signed-max", None), 0.9),
    ],
    ids=["groups", "asymmetric", "w4a8", "w3a16"],
)
def test_other_grids(trained, grids, least):
    model, batches = trained
    block = next(blocks(model, batches))
    found = learn(block, grids, FlatQuant(epochs=3))
    assert found.after < least * found.before
    for layer in found.layers.values():
        assert layer.q.spec == grids.specs[""]
        assert (layer.activation is None) == (grids.activation is None)
        assert layer.activation is None or 0.5 < layer.activation.clip < 1


def test_solve(trained):
    model, batches = trained
    block = next(blocks(model, batches))
    options = FlatQuant(epochs=1)
    solved = solve(block, Recipe("flatquant", W4, options=options, activation=A4))
    found = learn(block, W4A4, options)
    assert list(solved) == list(block.linears)
    rows = {name: [] for name in block.linears}
    for seen in block.inputs(list(block.linears)):
        for name, x in seen.items():
            rows[name].append(x.double())
    for name, layer in block.linears.items():
        got, expected = solved[name], found.layers[name]
        assert torch.equal(got.q.codes, expected.q.codes)
        assert torch.equal(got.transform.scale, expected.transform.scale)
        assert got.clip == expected.activation.clip
        assert got.note == ""
        x, w = torch.cat(rows[name]), layer.weight.detach().double()
        y = rounded64(x @ got.transform.dense(), ActivationSpec(4, clip=got.clip)) @ weight64(got.q).T
        assert got.error == pytest.approx(float((y - x @ w.T).square().sum() / (x @ w.T).square().sum()), rel=0.1)


def test_whole_model_and_its_file(trained, memorized, tmp_path):
    model, batches = trained
    with torch.no_grad():
        dense = model(batches[-1]).logits
    losses = {}
    for name in ("rtn-w4a4", "flatquant-w4a4+epochs=2"):
        recipe, packed = parse_recipe(name), copy.deepcopy(model)
        compress_(packed, recipe, batches)
        with torch.no_grad():
            logits = packed(batches[-1]).logits
        losses[name] = float((logits - dense).square().mean())
    assert losses["flatquant-w4a4+epochs=2"] < 0.2 * losses["rtn-w4a4"]
    save_model(packed, memorized.tokenizer, tmp_path / "saved", recipe)
    again = load_model(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(batches[-1]).logits, logits)
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, QuantLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        loaded = again.get_submodule(name)
        assert torch.equal(loaded.codes(), layer.codes())
        assert torch.equal(loaded.transform.left, layer.transform.left)
        assert loaded.activation.clip == layer.activation.clip


def test_bfloat16(trained):
    model, batches = trained
    block = next(blocks(model.bfloat16(), batches))
    found = learn(block, W4A4, FlatQuant(epochs=3))
    assert found.after < 0.3 * found.before
    for layer in found.layers.values():
        assert layer.q.scale.dtype == torch.bfloat16
        assert layer.transform.left.dtype == torch.float32


@pytest.mark.parametrize(
    ("arch", "norm", "readers"),
    [
        ("gpt2", "ln_1", ["attn.c_attn"]),
        ("opt", "self_attn_layer_norm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    ],
)
def test_other_architectures(untrained, arch, norm, readers):
    model = untrained(arch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    block = next(blocks(model, tokens(300, (4, 12), (4, 9), (4, 30))))
    assert all(layer.bias is not None for layer in block.linears.values())
    with torch.no_grad():
        for parameter in block.module.get_submodule(norm).parameters():
            parameter[5] *= 30
        for name in readers:
            weight = block.linears[name].weight
            (weight if isinstance(block.linears[name], Conv1D) else weight.T)[5] /= 30
    found = learn(block, W4A4, FlatQuant(epochs=5))
    assert found.after < 0.6 * found.before
    assert found.after == pytest.approx(difference(outputs64(block, found.layers), outputs64(block)), rel=0.02)
    for name, layer in found.layers.items():
        assert layer.q.codes.shape == weight_of(block.linears[name]).shape
        assert layer.transform is not None


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
    options = FlatQuant(epochs=8)
    solved = solve(block, Recipe("flatquant", W4, options=options, activation=A4))
    found = learn(block, W4A4, options)
    experts = {name for name in block.linears if ".experts." in name}
    few = {name for name in experts if found.tokens[name] < 32}
    unused = {name for name in experts if found.tokens[name] == 0}
    assert unused < few < experts
    assert len(unused) == 3
    for name, layer in block.linears.items():
        same = torch.equal(solved[name].q.codes, rtn(layer.weight.detach(), W4, torch.float16, RTN()).codes)
        assert same == (name in few), name
        assert (solved[name].transform is None) == (name in few)
        assert (solved[name].clip is None) == (name in few)
        assert solved[name].note == (f"{found.tokens[name]} tokens: rounded to nearest" if name in few else "")
        assert (solved[name].error is None) == (name in unused)
    assert found.after < found.before
    gate, up = (f"mlp.experts.0.{name}_proj" for name in ("gate", "up"))
    assert torch.equal(solved[gate].transform.left, solved[up].transform.left)
    assert not torch.equal(solved[gate].transform.left, solved["mlp.experts.1.up_proj"].transform.left)


def test_none_where_none_is_better(trained):
    model, batches = trained
    block = next(blocks(model, batches))
    # Codes and nothing else: round to nearest is exact, no map can be better.
    with torch.no_grad():
        for layer in block.linears.values():
            layer.weight.copy_(rtn(layer.weight, QuantSpec(4), torch.float16, RTN()).dequantize())
    grids = Grids(alike(QuantSpec(4)), "signed-max", ActivationSpec(8))
    found = learn(block, grids, FlatQuant(epochs=1, learning_rate=0.5))
    assert found.after == found.before
    options = FlatQuant(epochs=1, learning_rate=0.5)
    solved = solve(block, Recipe("flatquant", QuantSpec(4), options=options, activation=ActivationSpec(8)))
    assert {got.note for got in solved.values()} == {"no transform is better: rounded to nearest"}
    assert all(got.transform is None and got.clip is None for got in solved.values())
    assert all(0 < got.error < 1e-2 for got in solved.values())


def test_nothing_to_learn(trained):
    model, batches = trained
    block = next(blocks(model, batches))
    for layer in block.linears.values():
        layer.weight.data.zero_()
    found = learn(block, W4A4, FlatQuant())
    assert (found.before, found.after) == (0, 0)
    empty = Block("none", block.module, {}, block.config, block._calls, block._hidden)
    assert solve(empty, Recipe("flatquant", W4, activation=A4)) == {}


def test_what_it_refuses(trained):
    model, batches = trained
    block = next(blocks(model, batches))
    with pytest.raises(ValueError, match="a_dynamic: False does not go with FlatQuant"):
        learn(block, Grids(alike(W4), "signed-max", ActivationSpec(8, dynamic=False)), FlatQuant())
    assert not any("forward" in vars(module) for module in block.module.modules())
    with pytest.raises(ValueError, match=r"learning_rate: 1e\+30: .*; expected a smaller one"):
        learn(block, W4A4, FlatQuant(learning_rate=1e30))
    assert not any("forward" in vars(module) for module in block.module.modules())
    hang_(model, online_layers(model))
    with pytest.raises(ValueError, match=r"r_online: mlp\.down_proj has a transform in front of it already"):
        learn(block, W4A4, FlatQuant())


def test_steps():
    steps = _steps([3, 5, 2, 8, 1], FlatQuant(epochs=20, batch=8))
    order = [i for picked in steps for i in picked]
    epochs = [order[at : at + 5] for at in range(0, 100, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    sizes = [sum([3, 5, 2, 8, 1][i] for i in picked) for picked in steps]
    assert sum(size >= 8 for size in sizes) >= 20
    assert [len(picked) for picked in _steps([4, 4, 4], FlatQuant(epochs=1, batch=8))] == [2, 1]
