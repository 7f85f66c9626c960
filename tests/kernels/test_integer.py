"""Activations as integers: grids and products, against NumPy's int64 and float64, on every instruction set."""

import numpy as np
import pytest
import torch
from remanence.kernels import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRIDS = [ops.ASYMMETRIC, ops.SYMMETRIC, ops.NARROW]
SHAPES = [(1, 1, 1), (3, 5, 63), (17, 9, 130), (2, 33, 515), (5, 3, 1031)]  # M, N, K


def numpy_grid(x, bits, grid, clip):
    """Codes, scale and zero of one row, in float32 as the op's contract has it."""
    low, high = np.float32(clip) * min(x.min(), 0), np.float32(clip) * max(x.max(), 0)
    top = 2 ** (bits - 1) - 1
    parts = {ops.ASYMMETRIC: 2**bits - 1, ops.SYMMETRIC: (2**bits - 1) / 2, ops.NARROW: top}[grid]
    scale = np.float32((high - low if grid == ops.ASYMMETRIC else max(-low, high)) / parts)
    scale = np.float32(1) if scale == 0 else scale
    zero = int(np.rint(np.float32(-(2 ** (bits - 1)) - low / scale))) if grid == ops.ASYMMETRIC else 0
    codes = np.clip(np.rint(x / scale + np.float32(zero)), -top if grid == ops.NARROW else -top - 1, top)
    if grid == ops.SYMMETRIC and x.any():
        codes[x == -np.abs(x).max()] = -(2 ** (bits - 1))
    return codes.astype(np.int64), scale, zero


def sample(m, n, k, bits, groups=1, asymmetric=False, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    x[:, ::7] *= 30
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = 0.01 + torch.rand(n, groups, generator=generator)
    zero = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator) if asymmetric else None
    return x.to(dtype), codes, scale, zero, torch.randn(n, generator=generator)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_rows_are_rounded_as_the_contract_says(bits, grid, clip):
    x = sample(20, 1, 65, 4)[0]
    x[3] = 0
    x[4] = x[4].abs()
    x[5] = -x[5].abs()
    codes, scale, zero = ops.quantize_per_token(x, bits, grid, clip)
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.int8, torch.float32, torch.int32)
    for i in range(len(x)):
        expected = numpy_grid(x[i].numpy(), bits, grid, clip)
        assert np.array_equal(codes[i].numpy(), expected[0])
        assert scale[i].item() == expected[1]
        assert zero[i].item() == expected[2]
    if clip == 1:
        off = ((codes - zero) * scale - x).abs() / scale
        # The largest of a symmetric row stands between two codes, of which the upper one is not there.
        assert off.max() <= 0.5 + 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_the_last_bit_of_a_row_does_not_decide(bits):
    """-max|x| is half-way between two codes: rows that are the same but for float noise have the same codes."""
    x = sample(40, 1, 65, 4)[0]
    x[:, 7] = -1.5 * x.abs().amax(1)
    codes = ops.quantize_per_token(x, bits)[0]
    assert (codes[:, 7] == -(2 ** (bits - 1))).all()
    for noise in (1 - 2**-23, 1 + 2**-23, 1 + 2**-22):
        assert (ops.quantize_per_token(x * noise, bits)[0] != codes).float().mean() < 1e-3


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("k", [1, 63, 65, 131])
def test_the_narrow_grid_by_its_definition(bits, clip, k):
    """In float64: the step is the largest |x| over 2^(bits-1) - 1, and codes end there on both sides."""
    top = 2 ** (bits - 1) - 1
    x = sample(20, 1, k, 4)[0]
    x[3] = 0
    x[4], x[5] = x[4].abs(), -x[5].abs()
    x[6, k // 2] = -1.5 * x[6].abs().max() - 1
    codes, scale, zero = ops.quantize_per_token(x, bits, ops.NARROW, clip)
    exact = x.double().numpy()
    largest = np.abs(exact).max(1, keepdims=True)
    step = np.where(largest == 0, 1, clip * largest / top)
    np.testing.assert_allclose(scale.numpy(), step, rtol=2**-22)  # three roundings of float32
    assert zero.count_nonzero() == 0
    clear = np.abs(exact / step % 1 - 0.5) > 1e-4  # what is half-way between two codes is in the next test
    assert clear.mean() > 0.98
    assert np.array_equal(codes.numpy()[clear], np.clip(np.rint(exact / step), -top, top)[clear])
    assert (codes.abs().amax(1) == top)[x.any(1)].all()
    assert codes[6, k // 2] == -top


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ties_of_the_narrow_grid_go_to_even(bits):
    top = 2 ** (bits - 1) - 1
    x = torch.arange(-4 * top, 4 * top + 1) / 4  # with a step of 1
    codes, scale, _ = ops.quantize_per_token(x, bits, ops.NARROW)
    assert scale.item() == 1
    assert np.array_equal(codes.numpy(), np.rint(x.double().numpy()))
    codes, scale, _ = ops.quantize_per_token(2 * x, bits, ops.NARROW, 0.5)
    assert scale.item() == 1
    assert np.array_equal(codes.numpy(), np.clip(np.rint(2 * x.double().numpy()), -top, top))


@pytest.mark.parametrize("grid", [ops.SYMMETRIC, ops.NARROW])
def test_a_row_of_zeros_stays_one(grid):
    codes, scale, zero = ops.quantize_per_token(torch.zeros(2, 8), 8, grid)
    assert (codes.count_nonzero(), scale.tolist(), zero.count_nonzero()) == (0, [[1.0], [1.0]], 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_not_finite_stays_so_in_its_row_alone(value, grid):
    x, codes, scale, _, bias = sample(3, 5, 64, 4)
    x[1, 7] = value
    y = ops.integer_linear(x, ops.pack(codes, 4), scale, None, bias, 4, 8, grid)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("x_bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_sums_are_exact_integers(m, n, k, bits, x_bits, symmetric):
    """With scales of one, what comes out is the integer itself."""
    x, codes, _, zero, _ = sample(m, n, k, bits, 1, True)
    one, shift = torch.ones(1), torch.tensor([0 if symmetric else 3], dtype=torch.int32)
    y = ops.integer_linear(
        x, ops.pack(codes, bits), torch.ones(n, 1), zero, None, bits, x_bits, symmetric, 1.0, one, shift
    )
    low, high = -(2 ** (x_bits - 1)), 2 ** (x_bits - 1) - 1
    a = np.clip(np.rint(x.numpy() + shift.numpy()), low, high).astype(np.int64) - shift.numpy()
    expected = a @ (codes.numpy().astype(np.int64) - zero.numpy().astype(np.int64)).T
    assert np.abs(expected).max() < 2**24, "what float32 can still hold"
    assert np.array_equal(y.numpy(), expected.astype(np.float32))


def test_sums_are_exact_at_their_largest():
    """All codes at the ends of their ranges, over more features than one float32 sum could hold."""
    x = torch.full((1, 66_000), -1e9)
    codes = torch.full((1, 66_000), 255, dtype=torch.uint8)
    zero, shift = torch.zeros(1, 1, dtype=torch.uint8), torch.tensor([127], dtype=torch.int32)
    y = ops.integer_linear(x, ops.pack(codes, 8), torch.ones(1, 1), zero, None, 8, 8, False, 1.0, torch.ones(1), shift)
    assert y.item() == np.float32(-255 * 255 * 66_000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "x_bits", "groups"), [(8, 8, 1), (4, 8, 5), (4, 4, 1), (2, 4, 13), (3, 8, 1)])
@pytest.mark.parametrize(("asymmetric", "grid"), [(True, False), (False, True), (True, ops.NARROW)])
def test_integer_and_float_path_agree(dtype, bits, x_bits, groups, asymmetric, grid):
    x, codes, scale, zero, bias = sample(7, 11, 65, bits, groups, asymmetric, dtype)
    packed = ops.pack(codes, bits)
    y = ops.integer_linear(x, packed, scale, zero, bias, bits, x_bits, grid)
    assert y.dtype == dtype
    exact = reference.integer_linear(x, None, None, packed, scale, zero, bias, bits, x_bits, grid, 1.0)
    a, s, z = ops.quantize_per_token(x, x_bits, grid)
    middle = 2 ** (bits - 1) if zero is None else zero.double().repeat_interleave(65 // groups, 1)
    w = (codes.double() - middle) * scale.double().repeat_interleave(65 // groups, 1)
    fake = ((a - z).double() * s.double()) @ w.T + bias.double()
    tolerance = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype] * fake.abs().max()
    assert (y.double() - fake).abs().max() <= tolerance
    assert (exact.double() - fake).abs().max() <= tolerance


def test_a_row_does_not_depend_on_the_others():
    x, codes, scale, _, bias = sample(9, 33, 515, 4)
    packed = ops.pack(codes, 4)
    together = ops.integer_linear(x.view(3, 3, 515), packed, scale, None, bias, 4, 4).view(9, -1)
    for i in range(9):
        assert torch.equal(ops.integer_linear(x[i], packed, scale, None, bias, 4, 4), together[i])


def test_gradients_pass_the_rounding():
    x, codes, scale, _, bias = sample(4, 6, 64, 4)
    packed = ops.pack(codes, 4)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    grad = torch.randn(4, 6)
    ops.integer_linear(x, packed, scale, None, bias, 4, 8).backward(grad)
    w = ops.dequantize(packed, scale, None, 4, 64)
    torch.testing.assert_close(x.grad, grad @ w)
    torch.testing.assert_close(bias.grad, grad.sum(0))


@pytest.mark.parametrize("static", [True, False])
def test_opcheck(static):
    x, codes, scale, _, bias = sample(4, 6, 64, 4)
    grid = (torch.ones(1), torch.zeros(1, dtype=torch.int32)) if static else (None, None)
    args = (x.requires_grad_(), *grid, ops.pack(codes, 4), scale, None, bias, 4, 8, True, 1.0)
    torch.library.opcheck(torch.ops.remanence.integer_linear.default, args)
    for grid in (False, ops.NARROW):
        torch.library.opcheck(torch.ops.remanence.quantize_per_token.default, (x.detach(), 8, grid, 0.9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_bits": 9}, "bits: 9, expected 2 to 8"),
        ({"grid": 3}, r"grid: 3 is not one of 0 \(asymmetric\), 1 \(symmetric\), 2 \(narrow\)"),
        ({"clip": 0.0}, r"clip: 0\.0, expected above 0"),
        ({"x": torch.ones(2, 64, dtype=torch.int64)}, r"x: torch\.int64"),
        ({"x": torch.ones(2, 50)}, "packed: shape"),
        ({"x_scale": torch.ones(1)}, "x_scale: goes with x_zero"),
        ({"x_scale": torch.ones(2), "x_zero": torch.zeros(1, dtype=torch.int32)}, r"x_scale: shape \[2\]"),
        ({"x_scale": torch.ones(1), "x_zero": torch.zeros(1)}, r"x_zero: torch\.float32 is not torch\.int32"),
    ],
)
def test_bad_input(change, message):
    x, codes, scale, _, bias = sample(2, 6, 64, 4)
    given = {"x": x, "packed": ops.pack(codes, 4), "scale": scale, "bias": bias, "bits": 4, "x_bits": 8}
    with pytest.raises(ValueError, match=message):
        ops.integer_linear(**given | change)
    with pytest.raises(ValueError, match=r"x: torch\.uint8"):
        ops.quantize_per_token(codes, 8)
