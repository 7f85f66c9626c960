"""Round to nearest against a float64 reference written from its definition."""

import pytest
import torch
from remanence.compress.knobs import PLAIN_RTN
from remanence.compress.linear import QuantLinear
from remanence.compress.rtn import rtn
from remanence.compress.spec import QuantSpec

SPECS = [QuantSpec(b, g) for b in (3, 4, 8) for g in (None, 16, 64)]


def reference(weight, spec, scale_dtype):
    """Group by group, in float64."""
    N, K = weight.shape
    G = spec.group_size or K
    half = 2 ** (spec.bits - 1)
    codes, scales = torch.zeros(N, K, dtype=torch.uint8), torch.zeros(N, K // G, dtype=scale_dtype)
    for n in range(N):
        for g in range(K // G):
            w = weight[n, g * G : (g + 1) * G].double()
            scale = torch.tensor((w.abs().max() / (half - 0.5)).item(), dtype=torch.float32).to(scale_dtype)
            scales[n, g] = scale if scale else 1
            q = torch.round(w / scales[n, g].double()).clamp(-half, half - 1)
            codes[n, g * G : (g + 1) * G] = (q + half).to(torch.uint8)
    return codes, scales


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_and_scales(spec, dtype):
    weight = (torch.randn(5, 192, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    scale_dtype = torch.float16 if dtype == torch.float32 else dtype
    codes, scale = reference(weight, spec, scale_dtype)
    q = rtn(weight, spec, scale_dtype, PLAIN_RTN)
    assert torch.equal(q.scale, scale)
    # A quotient that float32 rounds onto a tie may go to the neighbour; nothing else may differ.
    off = (q.codes.int() - codes.int()).abs()
    assert off.max() <= 1
    assert (off != 0).float().mean() < 0.005


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_error_is_at_most_half_a_step(spec):
    weight = torch.randn(7, 128, generator=torch.Generator().manual_seed(1))
    q = rtn(weight, spec, torch.float16, PLAIN_RTN)
    step = q.scale.float().repeat_interleave(128 // q.scale.shape[1], 1)
    # Half a step, and what rounding the scale to 11 bits moves the outermost code.
    assert ((q.dequantize() - weight).abs() <= step * (0.5 + 2 ** (spec.bits - 1) * 2**-10)).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_groups_of_zeros_and_of_equal_values(spec):
    weight = torch.zeros(3, 128)
    weight[1] = 0.25
    weight[2] = -0.25
    q = rtn(weight, spec, torch.float16, PLAIN_RTN)
    assert torch.equal(q.dequantize()[0], weight[0])
    assert torch.isfinite(q.dequantize()).all()
    assert (q.dequantize()[1:].sign() == weight[1:].sign()).all()


def test_scale_below_the_smallest_half_is_no_nan():
    q = rtn(torch.full((1, 16), 1e-9), QuantSpec(4, 16), torch.float16, PLAIN_RTN)
    assert torch.equal(q.dequantize(), torch.zeros(1, 16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(bad):
    weight = torch.ones(2, 16)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        rtn(weight, QuantSpec(4), torch.float16, PLAIN_RTN)


def test_scale_beyond_half_is_refused():
    with pytest.raises(ValueError, match="needs a scale beyond"):
        rtn(torch.full((1, 16), 1e9), QuantSpec(4), torch.float16, PLAIN_RTN)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_quant_linear_equals_dense_linear_on_the_dequantized_weight(spec, bias):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(33, 192, generator=generator)
    b = torch.randn(33, generator=generator) if bias else None
    layer = QuantLinear.from_qtensor(rtn(weight, spec, torch.float16, PLAIN_RTN), b)
    assert torch.equal(layer.dequantized(), rtn(weight, spec, torch.float16, PLAIN_RTN).dequantize())
    for shape in ((192,), (1, 192), (2, 3, 192), (70, 192)):
        x = torch.randn(shape, generator=generator)
        expected = x.double() @ layer.dequantized().double().T + (0 if b is None else b.double())
        # float32 sums of 192 products of order 1
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_state_dict_holds_the_stored_layout():
    layer = QuantLinear.from_qtensor(rtn(torch.randn(8, 64), QuantSpec(4, 16), torch.float16, PLAIN_RTN), None)
    state = layer.state_dict()
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "packed": (torch.uint8, (8, 32)),
        "scale": (torch.float16, (8, 4)),
    }
