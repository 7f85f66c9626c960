"""Products with packed weights, against float64, on every path: one row, a few, many."""

import pytest
import torch
from remanence.kernels import reference

launch = pytest.importorskip("remanence.kernels.triton.launch", reason="Triton is not installed: pip install triton")
products = pytest.importorskip(
    "remanence.kernels.triton.products", reason="Triton is not installed: pip install triton"
)
configs = pytest.importorskip("remanence.kernels.triton.configs", reason="Triton is not installed: pip install triton")

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
# Largest error over the largest |y|: float32 sums of a few hundred products in any order, some tens of roundings of
# 2^-24; half precisions: also one rounding of y, by half a unit in its last place.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-11 + 4e-6, torch.bfloat16: 2**-8 + 4e-6}
# Written out for torch's product, each weight and the bias are rounded to x's dtype as well: at most as much again.
DENSE = {torch.float32: 4e-6, torch.float16: 2**-10 + 4e-6, torch.bfloat16: 2**-7 + 4e-6}


def weight(device, n, k, bits, groups=1, asymmetric=False, scale_dtype=torch.float32):
    """(packed, scale, zero, w float64 [N, K])"""
    generator = torch.Generator().manual_seed(n + k + bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = (0.01 + torch.rand(n, groups, generator=generator)).to(scale_dtype)
    zero = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator) if asymmetric else None
    middle = 2 ** (bits - 1) if zero is None else zero.double().repeat_interleave(k // groups, 1)
    w = (codes.double() - middle) * scale.double().repeat_interleave(k // groups, 1)
    return reference.pack(codes, bits).to(device), scale.to(device), _to(zero, device), w.to(device)


def _to(tensor, device):
    return tensor if tensor is None else tensor.to(device)


def rows(device, m, k, dtype=torch.float32, seed=7):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def error(y, x, w, bias=None):
    exact = x.double() @ w.T + (0 if bias is None else bias.double())
    assert (y.dtype, y.shape) == (x.dtype, exact.shape)
    return float((y.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def test_memory_of_outputs_is_poisoned(device):
    assert torch.empty(3, device=device).isnan().all()
    assert (torch.empty(3, dtype=torch.int8, device=device) == 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("m", "n", "k", "groups", "kernel"),
    [(1, 65, 192, 3, "gemv"), (3, 65, 192, 3, "gemm"), (17, 33, 160, 1, "gemm"), (1, 5, 63, 1, "gemv")],
)
def test_product(device, m, n, k, groups, kernel, bits, asymmetric, dtype):
    packed, scale, zero, w = weight(device, n, k, bits, groups, asymmetric)
    x, bias = rows(device, m, k, dtype), rows(device, 1, n)[0]
    if kernel == "gemv" and bits == 3:
        kernel = "gemm"
    if kernel == "gemm" and dtype == torch.float32:
        kernel = "dense"
    assert launch.weight_only_kernel(m, k, groups, bits, dtype) == kernel
    y = launch.w4a16_linear(x, packed, scale, zero, bias, bits)
    assert error(y, x, w, bias) <= (DENSE if kernel == "dense" else TOLERANCE)[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("m", "n", "k", "groups"), [(65, 63, 96, 3), (127, 1, 64, 1), (130, 9, 64, 2), (2, 129, 63, 9)]
)
def test_many_rows_and_odd_groups(device, m, n, k, groups, dtype):
    """Two tiles of M; one feature; above the limit; groups of 7, which no step of k divides into."""
    packed, scale, zero, w = weight(device, n, k, 4, groups, True, dtype)
    x = rows(device, m, k, dtype)
    y = launch.w4a16_linear(x, packed, scale, zero, None, 4)
    assert error(y, x, w) <= DENSE[dtype]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [7, 20, 24, 40])
def test_gemm_takes_groups_that_do_not_fill_a_step(device, group, bits):
    """Not chosen for these sizes, but right: codes that begin within a byte are fetched one by one."""
    packed, scale, zero, w = weight(device, 17, 3 * group, bits, 3, True)
    x = rows(device, 3, 3 * group, torch.float16)
    y = torch.empty(3, 17, dtype=x.dtype, device=device)
    products.gemm(x, products.Weight(packed, scale, zero, None, bits), y, configs.Config(16, 16, 16, 4, 2))
    assert error(y, x, w) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_a_split_of_k_changes_nothing(device, m, splits):
    packed, scale, zero, w = weight(device, 33, 704, 4, 11)
    x, bias = rows(device, m, 704, torch.float16), rows(device, 1, 33)[0]
    y = torch.empty(m, 33, dtype=x.dtype, device=device)
    run, config = (
        (products.gemv, configs.Config(4, 1, 128, 4, 1, splits))
        if m == 1
        else (products.gemm, configs.Config(16, 16, 32, 4, 2, splits))
    )
    run(x, products.Weight(packed, scale, zero, bias, 4), y, config)
    assert error(y, x, w, bias) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("m", [1, 5, 130])
def test_two_runs_give_the_same_bits(device, m):
    packed, scale, zero, _ = weight(device, 40, 1024, 4, 8, True)
    x = rows(device, m, 1024, torch.bfloat16)
    first, second = (launch.w4a16_linear(x, packed, scale, zero, None, 4) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("m", [1, 4, 130])
def test_strides(device, m):
    """Rows of x apart, leading axes, every other element; scales and zero points stored the other way round."""
    packed, scale, zero, w = weight(device, 9, 64, 4, 2, True)
    turned = scale.T.contiguous().T, zero.T.contiguous().T
    wide = rows(device, m, 128, torch.float16)
    for x in (wide[:, 32:96], wide[:, ::2], wide[None, :, :64]):
        y = launch.w4a16_linear(x, packed, *turned, None, 4)
        assert y.shape == (*x.shape[:-1], 9)
        assert error(y.reshape(-1, 9), x.reshape(-1, 64), w) <= DENSE[x.dtype]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [3, 17])
def test_what_is_not_finite_stays_in_its_row(device, m, value):
    packed, scale, _, _ = weight(device, 33, 96, 4, 3)
    x = rows(device, m, 96, torch.bfloat16)
    x[1, 40] = value
    y = launch.w4a16_linear(x, packed, scale, None, None, 4)
    assert not y[1].isfinite().any()
    assert y[[0, *range(2, m)]].isfinite().all()


def test_no_rows_and_no_features(device):
    packed, scale, _, _ = weight(device, 5, 64, 4)
    assert launch.w4a16_linear(rows(device, 3, 64)[:0], packed, scale, None, None, 4).shape == (0, 5)
    assert launch.w4a16_linear(rows(device, 3, 64), packed[:0], scale[:0], None, None, 4).shape == (3, 0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k", "groups"), [(1, 1, 1), (17, 63, 7), (33, 320, 5)])
def test_dequantize_is_the_reference_to_the_bit(device, n, k, groups, bits):
    for asymmetric in (False, True):
        packed, scale, zero, _ = weight(device, n, k, bits, groups, asymmetric, torch.bfloat16)
        assert torch.equal(
            launch.dequantize(packed, scale, zero, bits, k), reference.dequantize(packed, scale, zero, bits, k)
        )


def test_other_devices_are_refused_in_words():
    assert "not on cpu" in launch.supports(torch.device("cpu"))
