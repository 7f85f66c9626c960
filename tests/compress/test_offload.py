"""Packed weights that stay in the CPU's memory while another device multiplies."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from remanence.compress.linear import QuantLinear
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from remanence.kernels import ops

RECIPES = ("rtn-w4a16-g16", "rtn-w4a16-g16-asym", "rtn-w8a8")


@pytest.fixture(params=RECIPES)
def model(request, untrained):
    return compress_(untrained("llama", 64), parse_recipe(request.param))


def packed_layers(model):
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def generated(model):
    return model.generate(torch.arange(2, 7)[None], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("laid_out", [True, False], ids=["run-time-layout", "stored-layout"])
@pytest.mark.parametrize("buffers", [True, False], ids=["buffers", "parameters"])
def test_accelerate_gives_the_same_tokens(model, laid_out, buffers):
    expected = generated(model)
    offloaded = copy.deepcopy(model)
    layers = packed_layers(offloaded)
    for layer in layers:
        layer.prepack_() if laid_out else layer.unprepack_()
    cpu_offload(offloaded, execution_device="cpu", offload_buffers=buffers)
    if buffers and not laid_out:
        assert all(layer.packed.is_meta for layer in layers)  # it is not there between two calls
    assert torch.equal(generated(offloaded), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_elsewhere(model, dtype):
    """Where the weights are not: they are brought, for this call, in the stored layout, which other devices read."""
    layer = packed_layers(model)[0]
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.empty(3, layer.in_features, dtype=dtype, device="meta")
    y = layer(x)
    assert (y.shape, y.dtype, y.device.type) == ((3, layer.out_features), dtype, "meta")
    assert layer.packed.device.type == "cpu"
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.gpu
def test_a_gpu_multiplies_what_the_cpu_holds(model):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    expected = model(torch.arange(2, 9)[None]).logits
    cpu_offload(model, execution_device="cuda", offload_buffers=True)
    with torch.no_grad():
        logits = model(torch.arange(2, 9, device="cuda")[None]).logits
    assert all(layer.packed.device.type == "cpu" for layer in packed_layers(model))
    assert torch.allclose(logits.cpu(), expected, atol=1e-3)


@pytest.mark.skipif(not ops.available_isas(), reason="the native kernels are not built here")
def test_a_layer_goes_back_to_the_run_time_layout(model):
    layer = packed_layers(model)[0]
    x = torch.randn(3, layer.in_features)
    expected = layer(x)
    layer(x.to("meta"))
    assert layer.blocks is None
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.prepack_()(x), expected)
