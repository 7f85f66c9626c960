"""Rows of x as integers, and products of integers: against the reference, whose sums are int64 and float64."""

import pytest
import torch
from remanence.kernels import reference
from remanence.kernels.reference import NARROW

launch = pytest.importorskip("remanence.kernels.triton.launch", reason="Triton is not installed: pip install triton")
products = pytest.importorskip(
    "remanence.kernels.triton.products", reason="Triton is not installed: pip install triton"
)
configs = pytest.importorskip("remanence.kernels.triton.configs", reason="Triton is not installed: pip install triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Largest error over the largest |y|: sums over a step are exact; after them come a few tens of roundings of 2^-24 in
# float32, and one of y to a half precision.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-11 + 4e-6, torch.bfloat16: 2**-8 + 4e-6}
PER_TOKEN = (None, None)


def rows(device, m, k, dtype=torch.float32, seed=3):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    x[:, ::7] *= 30
    return x.to(device, dtype)


def weight(device, n, k, bits, groups, asymmetric):
    generator = torch.Generator().manual_seed(n + k + bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = 0.01 + torch.rand(n, groups, generator=generator)
    zero = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator) if asymmetric else None
    return reference.pack(codes, bits).to(device), scale.to(device), zero if zero is None else zero.to(device)


def error(x, grid, packed, scale, zero, bias, bits, x_bits=8, row_grid=True, clip=1.0):
    arguments = (x, *grid, packed, scale, zero, bias, bits, x_bits, row_grid, clip)
    y = launch.integer_linear(*arguments)
    assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], len(packed)))
    _, *others = (a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments)
    exact = reference.integer_linear(x.cpu().float(), *others).double()
    return float((y.cpu().double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("row_grid", [True, False, NARROW])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("bits", "x_bits"), [(8, 8), (4, 8), (4, 4), (3, 8), (2, 4)])
@pytest.mark.parametrize(("m", "n", "k", "groups"), [(3, 17, 256, 2), (5, 33, 130, 1)])
def test_product(device, m, n, k, groups, bits, x_bits, asymmetric, row_grid):
    x, bias = rows(device, m, k), rows(device, 1, n)[0]
    off = error(x, PER_TOKEN, *weight(device, n, k, bits, groups, asymmetric), bias, bits, x_bits, row_grid)
    assert off <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "groups"), [(1, 63, 9), (65, 60, 3), (130, 96, 2), (2, 100, 1)])
def test_odd_sizes_and_groups(device, m, k, groups, dtype):
    """Groups of 7, 20 and 48 end within a step of k; codes of a group of 7 begin within a byte."""
    off = error(rows(device, m, k, dtype), PER_TOKEN, *weight(device, 9, k, 4, groups, True), None, 4, 8, False, 0.9)
    assert off <= TOLERANCE[dtype]


@pytest.mark.parametrize("zero", [0, -17])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_one_grid_for_all_rows(device, asymmetric, zero):
    grid = torch.tensor([0.37], device=device), torch.tensor([zero], dtype=torch.int32, device=device)
    assert error(rows(device, 5, 192), grid, *weight(device, 7, 192, 8, 3, asymmetric), None, 8) <= 4e-6


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_a_split_of_k_changes_nothing(device, splits, groups):
    packed, scale, zero = weight(device, 9, 768, 8, groups, True)
    x, bias = rows(device, 3, 768), rows(device, 1, 9)[0]
    codes = products.Codes(*launch.quantize_per_token(x, 8, False, 1.0), by_row=True, shifted=True)
    y = torch.empty(3, 9, device=device)
    config = configs.Config(16, 16, 64, 4, 2, splits)
    products.integer(codes, products.Weight(packed, scale, zero, bias, 8), y, config)
    exact = reference.integer_linear(x, None, None, packed, scale, zero, bias, 8, 8, False, 1.0).double()
    assert float((y.double() - exact).abs().max() / exact.abs().max()) <= 4e-6


@pytest.mark.slow
def test_a_row_longer_than_int32_can_sum(device):
    """255 * 255 * 40960 is above 2^31: the row is cut, so that every sum stays exact."""
    k = 40960
    packed = torch.full((2, k), 255, dtype=torch.uint8, device=device)
    scale, zero = torch.ones(2, 1, device=device), torch.zeros(2, 1, dtype=torch.uint8, device=device)
    x = torch.ones(1, k, device=device)
    y = launch.integer_linear(x, None, None, packed, scale, zero, None, 8, 8, False, 1.0)
    assert torch.allclose(y, torch.full_like(y, 255.0 * k), rtol=4e-6)


def test_two_runs_give_the_same_bits(device):
    x, stored = rows(device, 3, 1024, torch.bfloat16), weight(device, 9, 1024, 4, 8, True)
    first, second = (launch.integer_linear(x, None, None, *stored, None, 4, 8, True, 1.0) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite_stays_in_its_row(device, value, symmetric, groups):
    x, stored = rows(device, 3, 96), weight(device, 5, 96, 4, groups, True)
    x[1, 7] = value
    y = launch.integer_linear(x, None, None, *stored, None, 4, 8, symmetric, 1.0)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_no_rows(device):
    stored = weight(device, 5, 64, 4, 1, False)
    assert launch.integer_linear(rows(device, 2, 64)[:0], None, None, *stored, None, 4, 8, True, 1.0).shape == (0, 5)
    assert [len(t) for t in launch.quantize_per_token(rows(device, 2, 64)[:0], 8, True, 1.0)] == [0, 0, 0]


def special_rows(device, k, dtype):
    x = rows(device, 14, k, dtype)
    x[3] = 0
    x[4], x[5] = x[4].abs(), -x[5].abs()
    x[6, 3], x[7, 4], x[8, 5] = float("nan"), float("inf"), -float("inf")
    x[9] *= 1e-4
    x[10, 7] = -1.5 * x[10].abs().max()  # between two codes, both there
    x[11] = torch.finfo(dtype).tiny / 2
    x[12, ::2], x[12, 1::2] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    x[13, 0] = -0.0
    return x


@pytest.mark.parametrize("grid", [True, False, NARROW])
@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_quantized_to_the_bit(device, dtype, bits, clip, grid):
    x = special_rows(device, 129, dtype)
    expected = reference.quantize_per_token(x.cpu(), bits, grid, clip)
    for ours, theirs in zip(launch.quantize_per_token(x, bits, grid, clip), expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu().nan_to_num(-7), theirs.nan_to_num(-7))


def test_long_and_strided_rows_are_quantized_to_the_bit(device):
    for x in (rows(device, 2, 9000)[:, 1:], rows(device, 2, 600)[:, ::3], rows(device, 6, 40).reshape(2, 3, 40)):
        expected = reference.quantize_per_token(x.cpu(), 8, False, 1.0)
        found = launch.quantize_per_token(x, 8, False, 1.0)
        assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(found, expected, strict=True))
