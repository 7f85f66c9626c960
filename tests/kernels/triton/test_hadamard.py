"""The fast transform against the matrix, in float64."""

import pytest
import torch

launch = pytest.importorskip("remanence.kernels.triton.launch", reason="Triton is not installed: pip install triton")


def sylvester(n):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 4, 64, 512, pytest.param(2048, marks=pytest.mark.slow)])
def test_transform(device, n, dtype):
    x = torch.randn(3, 5, n, generator=torch.Generator().manual_seed(n)).to(device, dtype)
    y = launch.hadamard(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    exact = x.cpu().double() @ sylvester(n) / n**0.5
    # log2(n) additions in float32 and one product, each rounded; then one rounding to a half precision.
    limit = 2**-24 * (n.bit_length() + 1) + {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert float((y.cpu().double() - exact).abs().max() / exact.abs().max()) <= limit


def test_the_longest_row_comes_back(device):
    """H / sqrt(n) is its own inverse; 2 * 15 additions and two products are rounded to float32 in between."""
    x = torch.randn(2, 32768, generator=torch.Generator().manual_seed(0)).to(device)
    again = launch.hadamard(launch.hadamard(x))
    assert float((again - x).abs().max() / x.abs().max()) <= 32 * 2**-24


def test_what_is_not_finite_stays_in_its_row(device):
    x = torch.ones(3, 64, device=device)
    x[1, 5] = float("nan")
    y = launch.hadamard(x[:, :32])
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_no_rows(device):
    assert launch.hadamard(torch.ones(0, 64, device=device)).shape == (0, 64)


@pytest.mark.parametrize("n", [0, 1, 48, 65536])
def test_other_sizes_are_refused_in_words(device, n):
    with pytest.raises(ValueError, match="not a power of two from 2 to 32768"):
        launch.hadamard(torch.ones(2, n, device=device))
