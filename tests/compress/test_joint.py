"""Layers that share their input: what they give together is what each gives alone, whatever is done with them."""

import copy
import pickle

import pytest
import torch
from remanence.compress.linear import QuantLinear, prepack_
from remanence.compress.rtn import RTN, rtn
from remanence.compress.spec import ActivationSpec, QuantSpec
from remanence.kernels import ops
from torch import nn

pytestmark = pytest.mark.skipif(not ops.available_isas(), reason="the native kernels are not built here")

K = 96
SPECS = {
    "w4a16": (QuantSpec(bits=4, group_size=32), None),
    "w3a16-asym": (QuantSpec(bits=3, group_size=32, symmetric=False), None),
    "w8a8": (QuantSpec(bits=8, group_size=None), ActivationSpec(bits=8)),
}


class Attention(nn.Module):
    """Three layers of one input, as those of a model are called."""

    def __init__(self, form="w4a16", widths=(128, 64, 40), bias=False, dtype=torch.bfloat16):
        super().__init__()
        spec, activation = SPECS[form]
        generator = torch.Generator().manual_seed(0)
        for name, n in zip(("q_proj", "k_proj", "v_proj"), widths, strict=True):
            weight = torch.randn(n, K, generator=generator).to(dtype)
            offset = torch.randn(n, generator=generator).to(dtype) if bias else None
            self.add_module(name, QuantLinear.from_qtensor(rtn(weight, spec, dtype, RTN()), offset, activation))
        prepack_(self)

    def layers(self):
        return [self.q_proj, self.k_proj, self.v_proj]

    def forward(self, x):
        return [layer(x) for layer in self.layers()]


def alone(layers, x):
    """What each layer gives without its siblings."""
    return [layer.product(x, layer.blocks, layer.out_features) for layer in layers]


def row(seed=1, dtype=torch.bfloat16):
    return torch.randn(1, 1, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("form", SPECS)
def test_together_as_alone(form):
    module = Attention(form)
    joint = module.q_proj.joint
    assert joint is not None
    assert all(layer.joint is joint for layer in module.layers())
    for x in (row(), row(2, torch.float32), row(3).squeeze(), torch.randn(3, K, dtype=torch.bfloat16)):
        for got, expected in zip(module(x), alone(module.layers(), x), strict=True):
            assert torch.equal(got, expected)
            assert got.is_contiguous()


def test_one_call_for_all(monkeypatch):
    calls = []
    product = QuantLinear.product
    monkeypatch.setattr(QuantLinear, "product", lambda self, x, *rest: calls.append(len(x)) or product(self, x, *rest))
    module = Attention()
    module(row())
    assert len(calls) == 1
    module(row())
    assert len(calls) == 2
    module(torch.randn(2, K))
    assert len(calls) == 5


def test_in_any_order_and_more_than_once():
    module, x = Attention(), row()
    q, k, v = alone(module.layers(), x)
    for name, expected in (("v", v), ("q", q), ("q", q), ("k", k), ("v", v), ("v", v)):
        assert torch.equal(getattr(module, f"{name}_proj")(x), expected)


def test_an_input_that_was_changed_in_between():
    module, x = Attention(), row()
    module.q_proj(x)
    x.mul_(2)
    assert torch.equal(module.k_proj(x), alone(module.layers(), x)[1])


def test_an_equal_input_is_another():
    module, x = Attention(), row()
    module.q_proj(x)
    other = row(7)
    assert torch.equal(module.k_proj(other), alone(module.layers(), other)[1])


def test_inference_mode():
    module = Attention()
    with torch.inference_mode():
        x = row()
        for got, expected in zip(module(x), alone(module.layers(), x), strict=True):
            assert torch.equal(got, expected)


def test_a_row_on_another_device():
    module = Attention()
    assert [y.shape for y in module(row().to("meta"))] == [(1, 1, 128), (1, 1, 64), (1, 1, 40)]
    assert module.q_proj.joint is None  # in the stored layout, which other devices read


def test_gradients_pass():
    module = Attention()
    with torch.enable_grad():
        x = row(dtype=torch.float32).requires_grad_()
        sum(y.sum() for y in module(x)).backward()
    expected = sum(layer.dequantized().sum(0) for layer in module.layers())
    assert torch.allclose(x.grad.flatten(), expected, atol=1e-5)


@pytest.mark.parametrize("options", [{"widths": (100, 64, 64)}, {"bias": True}], ids=["a-part-of-a-block", "biases"])
def test_what_cannot_be_joined_is_multiplied_alone(options):
    module, x = Attention(**options), row()
    assert module.q_proj.joint is None
    for got, expected in zip(module(x), alone(module.layers(), x), strict=True):
        assert torch.equal(got, expected)


def test_weights_of_another_form_are_not_joined():
    module = Attention()
    module.k_proj = Attention("w3a16-asym").k_proj
    assert prepack_(module).q_proj.joint is None
    module(row())


def test_a_cast_model_is_joined_again():
    module = Attention().to(torch.float32)
    x = row(dtype=torch.float32)
    joint = module.q_proj.joint
    assert joint is not None
    assert joint is module.v_proj.joint
    assert module.q_proj.scale.dtype == torch.float32
    for got, expected in zip(module(x), alone(module.layers(), x), strict=True):
        assert torch.equal(got, expected)


def test_a_copy_is_of_itself():
    module, x = Attention(), row()
    other = copy.deepcopy(module)
    module.q_proj(x)
    assert other.q_proj.joint is not module.q_proj.joint
    assert {layer.joint for layer in other.layers()} == {other.q_proj.joint}
    for got, expected in zip(other(x), alone(module.layers(), x), strict=True):
        assert torch.equal(got, expected)


def test_new_weights_of_one_layer():
    module, x = Attention(), row()
    module(x)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert set(state) == {f"{name}_proj.{part}" for name in "qkv" for part in ("packed", "scale")}
    state["k_proj.scale"] *= 2
    before = alone(module.layers(), x)
    module.load_state_dict(state)
    after = module(x)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], 2 * before[1])
    assert module.q_proj.joint is module.k_proj.joint is not None


@pytest.mark.parametrize("asked_first", ["q_proj", "k_proj"])
def test_a_layer_that_is_given_a_bias(asked_first):
    module, x = Attention(), row()
    module.k_proj.bias = torch.full((64,), 10.0)
    module.get_submodule(asked_first)(x)
    for got, expected in zip(module(x), alone(module.layers(), x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("other", [ActivationSpec(bits=4), ActivationSpec(bits=8, narrow=True)], ids=str)
def test_a_layer_that_is_given_another_activation(other):
    module, x = Attention("w8a8"), row()
    before = module(x)
    module.k_proj.activation = other
    after = module(x)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    assert torch.equal(after[1], alone(module.layers(), x)[1])


def test_a_pickled_module_that_has_multiplied():
    module, x = Attention(), row()
    module.q_proj(x)
    other = pickle.loads(pickle.dumps(module))
    for got, expected in zip(other(x), alone(module.layers(), x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("part", ["packed", "scale"])
def test_a_stored_part_that_is_set_is_taken(part):
    layer, x = Attention().q_proj, row()
    before = layer(x)
    setattr(layer, part, getattr(layer, part).flip(0))
    assert layer.blocks is None
    stored = layer(x)
    assert not torch.equal(stored, before)
    assert torch.equal(layer.prepack_()(x), stored)


def test_a_dtype_that_no_kernel_reads():
    """float64 scales stay as they are, and the op says what it takes."""
    module = Attention(dtype=torch.float32).double()
    assert [layer.blocks for layer in module.layers()] == [None] * 3
    with pytest.raises(ValueError, match=r"scale: torch\.float64 is not"):
        module(row(dtype=torch.float32))
    module.float()
    for got, expected in zip(module(row()), Attention(dtype=torch.float32)(row()), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("k", [95, 88, 0])
def test_an_input_of_another_width(k):
    layer = Attention().q_proj
    for laid_out in (layer, copy.deepcopy(layer).unprepack_()):
        with pytest.raises(ValueError, match=rf"x: shape \[1, {k}\] is not \[..., 96\]"):
            laid_out(torch.ones(1, k))


def test_one_layer_in_the_stored_layout():
    module, x = Attention(), row()
    expected = alone(module.layers(), x)
    module.k_proj.unprepack_()
    for got, y in zip(module(x), expected, strict=True):
        assert torch.equal(got, y)
    assert module.q_proj.joint is None


def test_no_weight_is_held_twice():
    module = Attention()
    storages = {layer.blocks.untyped_storage().data_ptr() for layer in module.layers()}
    held = module.q_proj.blocks.untyped_storage().nbytes()
    assert len(storages) == 1
    assert held == sum(layer.blocks.nbytes for layer in module.layers())
