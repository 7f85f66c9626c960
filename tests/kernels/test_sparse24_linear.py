"""The product with 2:4 weights in their stored layout: against float64 on every instruction set, for few rows of x (the
native kernels) and for many (torch's product with tiles of the weight); as torch's compiler and autograd see it.
"""

import pytest
import torch
import torch.nn.functional as F
from remanence.compress.formats.sparse24 import compress24
from remanence.kernels import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N: blocks of 16 rows, in pairs; K: vectors of 4, 8 and 16 features, and what remains.
SHAPES = [(1, 4), (63, 12), (65, 20), (1, 60), (65, 260), (64, 64), (2, 8)]
ROWS = [0, 1, 2, 3, 5, 17, 300]  # tiles hold 4; above 16 torch multiplies
ROUNDING = {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of one number, relative
# K sums in float32, relative to the sum of magnitudes: 2^-24 for each of the longest chain, here under 70.
SUMS = 70 * 2**-24

needs_cpu = pytest.mark.skipif(not ops.available_isas(), reason="the native kernels are not built")
# The CPU kernel differs by instruction set, the registration does not: once is enough.
ONCE = pytest.mark.parametrize("isa", ops.available_isas()[-1:] or ["none"], indirect=True)


def randn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(n, k, dtype=torch.float32, seed=0):
    """(compressed, bitmask), w [N, K] with two of every four in a random place."""
    generator = torch.Generator().manual_seed(seed + n + k)
    kept = torch.rand(n, k // 4, 4, generator=generator).argsort(-1) < 2
    w = torch.randn(n, k, generator=generator).masked_fill(~kept.view(n, k), 0).to(dtype)
    parts = compress24(w)
    return (parts["compressed"], parts["bitmask"]), w


def assert_close(y, x, w, bias=None):
    x, w = x.double(), w.double()
    exact = F.linear(x, w, None if bias is None else bias.double())
    magnitude = x.abs() @ w.abs().T + (0 if bias is None else bias.double().abs())
    assert y.shape == exact.shape
    limit = ROUNDING[y.dtype] * exact.abs() + (1 + ROUNDING[y.dtype]) * SUMS * magnitude
    assert ((y.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, stored):
    for n, k in SHAPES:
        parts, w = weight(n, k, stored)
        for m in ROWS:
            x = randn(m, k, dtype=dtype)
            for bias in (None, randn(n, dtype=dtype, seed=2), randn(n, seed=3)):
                y = ops.sparse24_linear(x, *parts, bias)
                assert y.dtype == dtype
                assert_close(y, x, w, bias)


@needs_cpu
def test_in_bfloat16_where_the_processor_multiplies_it(monkeypatch):
    """Told to be such a one: torch then gets the tiles in bfloat16."""
    cpu, seen = ops.cpu, []

    def linear(x, w, bias):
        seen.append((x.dtype, w.dtype, tuple(w.shape)))
        return F.linear(x.float(), w.float(), bias.float()).to(x.dtype)

    monkeypatch.setattr(cpu._C, "isa", lambda: "avx512_bf16")
    monkeypatch.setattr(cpu, "F", type("F", (), {"linear": staticmethod(linear)}))
    parts, w = weight(300, 20, torch.bfloat16)
    for bias_dtype, used in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        x, bias = randn(17, 20, dtype=torch.bfloat16), randn(300, dtype=bias_dtype)
        assert_close(ops.sparse24_linear(x, *parts, bias), x, w, bias)
        assert seen == [(used, used, (256, 20)), (used, used, (44, 20))]
        seen.clear()


@pytest.mark.parametrize("m", [3, 40])
def test_leading_axes_and_strides(m):
    (compressed, bitmask), w = weight(65, 60)
    x = randn(60, m).T
    y = ops.sparse24_linear(x, compressed, bitmask)
    assert_close(y, x, w)
    twice = x.contiguous().expand(2, m, 60)
    assert_close(ops.sparse24_linear(twice, compressed, bitmask), twice, w)
    apart = compressed.repeat_interleave(2, 1)[:, ::2], bitmask.repeat_interleave(2, 0)[::2]
    assert torch.equal(ops.sparse24_linear(x, *apart), y)
    bias = randn(65, 2)[:, 0]
    assert torch.equal(ops.sparse24_linear(x, *apart, bias), ops.sparse24_linear(x, *apart, bias.clone()))
    assert_close(ops.sparse24_linear(x[0], compressed, bitmask), x[0], w)


def test_a_weight_without_rows():
    for m in (3, 30):
        y = ops.sparse24_linear(randn(m, 8), torch.empty(0, 4), torch.empty(0, 1, dtype=torch.uint8))
        assert y.shape == (m, 0)


@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_gives_what_a_dense_weight_gives(dtype, m):
    """0 * inf is no number: at a feature that was dropped, too."""
    parts, w = weight(65, 60, dtype)
    for special in (torch.nan, torch.inf, -torch.inf):
        for feature in (0, 30, 57):
            x = randn(m, 60, dtype=dtype)
            x[1, feature] = special
            y, dense = ops.sparse24_linear(x, *parts), F.linear(x.float(), w.float())
            assert torch.equal(y.isnan(), dense.isnan())
            assert torch.equal(y.isinf(), dense.isinf())
            assert y[0].isfinite().all()
            assert not y[1].isfinite().any()
    compressed, bitmask = parts[0].clone(), parts[1]
    compressed[5, 7] = torch.nan
    y = ops.sparse24_linear(randn(m, 60, dtype=dtype), compressed, bitmask)
    assert torch.equal(y.isnan().any(0).nonzero(), torch.tensor([[5]]))


@pytest.mark.parametrize("m", [1, 20])
def test_a_wrong_bitmask_spoils_its_rows_alone(m):
    """Nothing beyond the row is read: the values around the tensor are NaN."""
    n, k = 34, 28
    (compressed, bitmask), w = weight(n, k)
    around = torch.full((3, n, k // 2), torch.nan)
    around[1] = compressed
    wrong = torch.randint(0, 256, bitmask.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wrong[::2] = bitmask[::2]
    wrong[1], wrong[n - 1] = 255, 0
    x = randn(m, k)
    y = ops.sparse24_linear(x, around[1], wrong)
    assert_close(y[:, ::2], x, w[::2])
    assert y.isfinite().all()
    assert not y[:, n - 1].any()
    beyond = bitmask.clone()
    beyond[:, -1] |= 0xF0  # K is 28
    assert torch.equal(ops.sparse24_linear(x, around[1], beyond), ops.sparse24_linear(x, compressed, bitmask))


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype):
    """Up to the 16 rows that our kernels multiply; at a size above which the loops have threads."""
    parts, _ = weight(131, 512, dtype)
    for m in (1, 15):
        x = randn(m, 512, dtype=dtype)
        first = ops.sparse24_linear(x, *parts)
        try:
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                for _ in range(3):
                    assert torch.equal(ops.sparse24_linear(x, *parts), first)
        finally:
            torch.set_num_threads(1)


def test_the_reference_expands_what_was_compressed():
    for dtype in DTYPES:
        for n, k in SHAPES:
            parts, w = weight(n, k, dtype)
            assert torch.equal(reference.expand24(*parts, k), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [5, 20])
def test_gradients_are_those_of_the_dense_layer(m, dtype):
    parts, w = weight(33, 60, dtype)
    x, bias = randn(2, m, 60, dtype=dtype).requires_grad_(), torch.zeros(33, dtype=dtype, requires_grad=True)
    grad = randn(2, m, 33, dtype=dtype)
    ops.sparse24_linear(x, *parts, bias).backward(grad)
    assert_close(x.grad, grad, w.T)
    torch.testing.assert_close(bias.grad, grad.float().sum((0, 1)).to(dtype))
    assert not ops.sparse24_linear(x.detach(), *parts).requires_grad
    learned = parts[0].clone().requires_grad_()
    ops.sparse24_linear(x, learned, parts[1]).sum().backward()
    assert learned.grad is None


@ONCE
def test_compiled_whole_it_gives_the_same():
    """Traced for any number of rows, with gradients; test_prepacked.py has it through torch's own compiler."""
    parts, _ = weight(33, 60)
    bias = randn(33)
    torch._dynamo.reset()
    compiled = torch.compile(ops.sparse24_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (2, 9, 30):
        x, same = (randn(m, 60).requires_grad_() for _ in range(2))
        y, expected = compiled(x, *parts, bias), ops.sparse24_linear(same, *parts, bias)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, same.grad)


def test_autocast_changes_no_bit():
    parts, _ = weight(33, 60)
    for m in (2, 30):
        x = randn(m, 60)
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.sparse24_linear(x, *parts)
        assert torch.equal(y, ops.sparse24_linear(x, *parts))


X, VALUES, BITS = torch.ones(3, 12), torch.ones(4, 6), torch.full((4, 2), 0x55, dtype=torch.uint8)


@ONCE
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.double(), VALUES, BITS), r"x: torch.float64 \[3, 12\], expected float32, float16 or bfloat16 \[..., K\]"),
        ((torch.tensor(1.0), VALUES, BITS), r"x: torch.float32 \[\], expected .* K a multiple of 4"),
        ((X[:, :10], VALUES, BITS), r"x: torch.float32 \[3, 10\], expected .* K a multiple of 4"),
        ((X[:, :0], VALUES, BITS), r"x: torch.float32 \[3, 0\], expected .* K a multiple of 4"),
        ((X[:, :8], VALUES, BITS), r"compressed: shape \[4, 6\] is not \[4, 4\]"),
        ((X, VALUES[0], BITS), r"compressed: shape \[6\] is not \[N, 6\]"),
        ((X, VALUES.int(), BITS), r"compressed: torch.int32 is not torch.float32 or"),
        ((X, VALUES, BITS[:3]), r"bitmask: shape \[3, 2\] is not \[4, 2\]"),
        ((X, VALUES, BITS[:, :1]), r"bitmask: shape \[4, 1\] is not \[4, 2\]"),
        ((X, VALUES, BITS.bool()), r"bitmask: torch.bool is not torch.uint8"),
        ((X, VALUES, BITS, torch.ones(3)), r"bias: shape \[3\] is not \[4\]"),
        ((X, VALUES, BITS, torch.ones(4).double()), r"bias: torch.float64 is not torch.float32 or"),
        ((X.to("meta"), VALUES.to("meta"), BITS[:3].to("meta")), r"bitmask: shape \[3, 2\]"),
    ],
    ids=str,
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.sparse24_linear(*arguments)
