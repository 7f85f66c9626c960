"""Every path through the products, by numbers of rows and kinds of number: not finite, huge, tiny, long, empty.

One tile holds 5 or 6 rows of x, one chunk 240; the 8-bit bfloat16 product changes its way above 16 rows.
"""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from remanence.kernels import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [0, 1, 4, 5, 6, 9, 17, 65, 241]
# As in test_ops.py. bfloat16 with 128 (at 8 bits 2176) added to the codes loses some bits of 2^-24, not of 2^-9.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-11 + 4e-6, torch.bfloat16: 2**-8 + 1e-4}


def weight(n, k, bits, groups=1, dtype=torch.float32, asymmetric=False, seed=0):
    """codes, (packed, scale, zero), w float64 [N, K]."""
    generator = torch.Generator().manual_seed(seed + n + k)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = (0.01 + torch.rand(n, groups, generator=generator)).to(dtype)
    zero = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator) if asymmetric else None
    return codes, (reference.pack(codes, bits), scale, zero), dense(codes, scale, zero, bits)


def dense(codes, scale, zero, bits):
    repeats = codes.shape[1] // scale.shape[1]
    middle = 2 ** (bits - 1) if zero is None else zero.double().repeat_interleave(repeats, 1)
    return (codes.double() - middle) * scale.double().repeat_interleave(repeats, 1)


def rows(m, k, dtype=torch.float32, seed=1):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(a, b):
    """Bit for bit, NaN or not."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


def assert_close(y, exact, dtype):
    """Each row within the tolerance of its largest number."""
    off = (y.double() - exact).abs().amax(-1)
    assert (off <= TOLERANCE[dtype] * exact.abs().amax(-1)).all(), float((off / exact.abs().amax(-1)).max())


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "groups", "asymmetric"), [(65, 129, 3, True), (63, 86, 2, False)])
def test_every_number_of_rows(n, k, groups, asymmetric, dtype, bits):
    _, stored, w = weight(n, k, bits, groups, torch.bfloat16, asymmetric)
    bias = torch.linspace(-1, 1, n)
    for m in ROWS:
        x = rows(m, k, dtype)
        y = ops.w4a16_linear(x, *stored, bias, bits)
        assert y.shape == (m, n)
        assert y.dtype == dtype
        assert_close(y, F.linear(x.double(), w, bias.double()), dtype)


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x_bits", "grid", "asymmetric"), [(8, True, True), (4, False, False), (4, ops.NARROW, True)])
def test_every_number_of_rows_in_integers(x_bits, grid, asymmetric, dtype, bits):
    _, stored, w = weight(65, 129, bits, 3, torch.float16, asymmetric)
    for m in ROWS:
        x = rows(m, 129, dtype)
        codes, scale, zero = reference.quantize_per_token(x, x_bits, grid, 0.9)
        y = ops.integer_linear(x, *stored, None, bits, x_bits, grid, 0.9)
        assert y.shape == (m, 65)
        assert_close(y, ((codes - zero).double() * scale.double()) @ w.T, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("m", [1, 7, 18])
def test_what_is_not_finite_stays_in_its_rows(m, bits, dtype):
    """NaN and infinities where a product of the dense weight has them, and every other row as it is without."""
    codes, stored, w = weight(65, 126, bits, 2, torch.float32, True)
    codes[3, 5] = stored[2][3, 0]  # weighs nothing: 0 * inf is NaN
    stored = (reference.pack(codes, bits), *stored[1:])
    x = rows(m, 126, dtype)
    before = ops.w4a16_linear(x, *stored, None, bits)
    bad = {0: torch.inf, min(3, m - 1): torch.nan, m - 1: -torch.inf}
    for i, value in bad.items():
        x[i, 5] = value
    y = ops.w4a16_linear(x, *stored, None, bits)
    good = [i for i in range(m) if i not in bad]
    assert same(y[good], before[good])
    w = dense(codes, *stored[1:], bits)
    exact = x.double() @ w.T
    plain = reference.w4a16_linear(x, *stored, None, bits)
    for i in bad:
        assert not exact[i].isfinite().any()
        torch.testing.assert_close(y[i].double(), exact[i], equal_nan=True)
        torch.testing.assert_close(y[i], plain[i], equal_nan=True)
        assert y[i, 3].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 7])
def test_infinities_of_both_signs_are_no_number(m, dtype):
    codes = torch.full((3, 64), 12, dtype=torch.uint8)
    x = torch.ones(m, 64, dtype=dtype)
    x[-1, 2], x[-1, 50] = torch.inf, -torch.inf
    y = ops.w4a16_linear(x, reference.pack(codes, 4), torch.ones(3, 1))
    assert y[-1].isnan().all()
    assert (y[:-1] == 256).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("integer", [False, True])
def test_a_scale_that_is_not_finite_is_seen_in_its_column(value, integer):
    _, (packed, scale, zero), _ = weight(65, 128, 4, 2, torch.float32, True)
    x = rows(7, 128)
    linear = ops.w4a8_linear if integer else ops.w4a16_linear
    before = linear(x, packed, scale, zero)
    scale[64, 1] = value
    y = linear(x, packed, scale, zero)
    assert not y[:, 64].isfinite().any()
    assert same(y[:, :64], before[:, :64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("of_x", "of_scale"),
    # The last two: what bfloat16 products take for zero, and what overflows before the codes' offset is taken off.
    [(1e30, 1.0), (1.0, 1e33), (1e-30, 1e30), (1e30, 1e-37), (1e-39, 1e30), (1e36, 1e-4), (1e37, 1e-6)],
)
def test_huge_and_tiny(of_x, of_scale, bits, dtype):
    codes, (packed, scale, zero), _ = weight(65, 126, bits, 2, torch.float32, True)
    scale = scale * of_scale
    for m in (1, 6, 17):
        x = (rows(m, 126) * of_x).to(dtype)
        y = ops.w4a16_linear(x, packed, scale, zero, None, bits)
        assert_close(y, x.double() @ dense(codes, scale, zero, bits).T, dtype)
        y = ops.integer_linear(x, packed, scale, zero, None, bits)
        assert_close(y, reference.integer_linear(x, None, None, packed, scale, zero, None, bits, 8, True, 1.0), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_and_zero_scales(dtype):
    codes, (packed, _, zero), _ = weight(65, 128, 4, 2, dtype, True)
    least = torch.finfo(dtype).smallest_normal
    scale = torch.linspace(0.01, 0.9, 130, dtype=torch.float64).mul(least).to(dtype).reshape(65, 2)
    scale[7] = 0
    scale[8, 0] = 0
    assert (scale[:7] > 0).all()
    for m in (1, 7):
        x = rows(m, 128) * 1e30 if dtype != torch.float16 else rows(m, 128)
        y = ops.w4a16_linear(x, packed, scale, zero)
        assert_close(y, x.double() @ dense(codes, scale, zero, 4).T, torch.float32)
        assert (y[:, 7] == 0).all()
        assert (ops.w4a8_linear(x, packed, scale, zero)[:, 7] == 0).all()


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_equal_values(bits, dtype):
    """Where every code of a group is its zero point, exact zeros; one above it, the sum of x: small integers here."""
    groups = torch.arange(2).repeat(65, 1)
    zero = torch.full((65, 2), 2**bits - 2, dtype=torch.uint8)
    codes = (zero + groups).repeat_interleave(66, 1).byte()
    for m in (1, 6, 17):
        x = torch.randint(-3, 4, (m, 132), generator=torch.Generator().manual_seed(m)).to(dtype)
        y = ops.w4a16_linear(x, reference.pack(codes, bits), torch.ones(65, 2, dtype=dtype), zero, None, bits)
        assert torch.equal(y, x[:, 66:].sum(1, keepdim=True).expand(m, 65))


def test_x_of_any_strides():
    """Slices, expanded rows, a transposed matrix, leading axes of length zero; the same bits as from a copy."""
    _, stored, _ = weight(65, 96, 4, 3, torch.float32, True)
    wide = rows(14, 192)
    views = [wide[:, 1:97], wide[::2, ::2], rows(96, 7).T, wide[:1, :96].expand(9, 96), wide[:, :96].view(2, 7, 96)]
    views += [wide[:0, :96], wide[:, :96].reshape(2, 7, 96)[:, :0], wide[0, :96]]
    for x in views:
        for linear in (ops.w4a16_linear, ops.w4a8_linear):
            y = linear(x, *stored)
            assert y.shape == (*x.shape[:-1], 65)
            assert same(y, linear(x.clone(memory_format=torch.contiguous_format), *stored))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias_of_another_dtype(dtype, bias_dtype):
    _, stored, w = weight(65, 64, 4)
    bias = (torch.arange(130) / 7).to(bias_dtype)[::2]
    x = rows(5, 64, dtype)
    assert_close(ops.w4a16_linear(x, *stored, bias), F.linear(x.double(), w, bias.double()), dtype)
    codes, scale, _ = reference.quantize_per_token(x, 8, True, 1.0)
    exact = F.linear(codes.double() * scale.double(), w, bias.double())
    assert_close(ops.w4a8_linear(x, *stored, bias), exact, dtype)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_longer_than_a_run(bits):
    """Sums of 32768 features and more: the integers of all products, exactly."""
    k = 2 * 32768 + 36
    codes, (packed, _, _), _ = weight(2, k, bits)
    zero = torch.tensor([[0], [2**bits - 1]], dtype=torch.uint8)
    one, shift = torch.ones(1), torch.tensor([-128], dtype=torch.int32)
    x = torch.randint(-128, 128, (18, k), generator=torch.Generator().manual_seed(0)).float() + 128
    x[0] = 255  # the largest sums there are
    w = codes.double() - zero
    for m in (1, 18):
        y = ops.integer_linear(x[:m], packed, torch.ones(2, 1), zero, None, bits, 8, False, 1.0, one, shift)
        # Exact integers of each run, added in float32: three roundings, and those of the row of ones.
        torch.testing.assert_close(y.double(), x[:m].double() @ w.T, rtol=1e-6, atol=0)
        for dtype in (torch.float32, torch.bfloat16):
            y = ops.w4a16_linear((x[:m] - 128).to(dtype), packed, torch.ones(2, 1), zero, None, bits)
            # 65 thousand products: the roundings of as many sums in float32, from 255 * 128 * K down.
            exact = (x[:m].double() - 128) @ w.T
            assert (y.double() - exact).abs().max() <= 2**-9 * exact.abs().max() + 2e-6 * (x - 128).norm() * w.norm()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_long_rows_of_one_sign_keep_their_digits(bits):
    """After a ReLU, with one scale a row: what the sum of x times any offset of the codes is, is not in the result."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(1, 2**bits, (64, 14336), dtype=torch.uint8, generator=generator)  # around the middle
    packed, scale = reference.pack(codes, bits), torch.ones(64, 1)
    x = rows(32, 14336, torch.bfloat16).abs()
    exact = x.double() @ dense(codes, scale, None, bits).T
    for m in (1, 32):
        off = ops.w4a16_linear(x[:m], packed, scale, bits=bits).double() - exact[:m]
        unavoidable = exact[:m].bfloat16().double() - exact[:m]
        assert off.norm() <= 1.25 * unavoidable.norm()  # a quarter more than the one rounding to bfloat16
        wide = ops.w4a16_linear(x[:m].float(), packed, scale, bits=bits).double()
        assert (wide - exact[:m]).norm() <= 1e-5 * exact[:m].norm()


# Rows rounded to integers.


SPECIAL = {
    "ordinary": lambda x: x,
    "ties": lambda x: (2 * x).round() / 2,  # with a scale of 1 half of them lie between two codes
    "one sign": lambda x: x.abs(),
    "the other": lambda x: -x.abs(),
    "zeros": lambda x: x * 0,
    "negative zeros": lambda x: x.abs() * -0.0,
    "not a number": lambda x: x.index_fill(1, torch.tensor([2, 60]), torch.nan),
    "infinite": lambda x: x.index_fill(1, torch.tensor([2, 60]), torch.inf),
    "negative infinite": lambda x: x.index_fill(1, torch.tensor([64]), -torch.inf),
    "all infinite": lambda x: x * torch.inf,
    "tiny": lambda x: x * 1e-44,
    "huge": lambda x: x.sign() * 3e38,
    "both ends": lambda x: x.index_fill(1, torch.tensor([1, 62]), 9.0).index_fill(1, torch.tensor([0, 63]), -9.0),
}


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("grid", [True, False, ops.NARROW])
def test_rounded_rows_have_the_bits_of_the_reference(special, grid):
    for bits in (2, 3, 4, 5, 8):
        for k in (1, 15, 65, 128):
            for dtype in DTYPES if k == 65 else DTYPES[:1]:
                x = rows(6, max(k, 65), seed=bits)
                x[:, 3] = 2.0**bits / 2 - 0.5  # scale 1 where it is the largest
                x = SPECIAL[special](x)[:, :k].to(dtype)
                for clip in (1.0, 0.7):
                    found = ops.quantize_per_token(x, bits, grid, clip)
                    for a, b in zip(found, reference.quantize_per_token(x, bits, grid, clip), strict=True):
                        assert a.dtype == b.dtype
                        assert torch.equal(a, b) or (a.is_floating_point() and a.isnan().equal(b.isnan()))
                        assert torch.equal(a.nan_to_num(-7), b.nan_to_num(-7))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_given_grid_has_the_bits_of_the_reference(symmetric):
    """As a product with the unit matrix: y is the rounded x."""
    scale, zero = torch.tensor([0.37]), torch.tensor([0 if symmetric else 5], dtype=torch.int32)
    codes = (torch.eye(65) + 8).byte()
    for special in ("ordinary", "ties", "infinite", "zeros", "huge"):
        x = SPECIAL[special](rows(6, 65) * 3)
        y = ops.w4a4_linear(x, reference.pack(codes, 4), torch.ones(65, 1), x_scale=scale, x_zero=zero)
        exact = (reference.quantize_with(x, scale, zero, 4) - zero) * scale
        assert torch.equal(y, exact), special


def test_a_given_grid_does_not_hide_what_is_no_number():
    x = rows(3, 65)
    x[1, 64] = torch.nan
    stored = (reference.pack((torch.eye(65) + 8).byte(), 4), torch.ones(65, 1))
    grid = {"x_scale": torch.tensor([0.5]), "x_zero": torch.tensor([0], dtype=torch.int32)}
    for y in (ops.w4a8_linear(x, *stored, **grid), ops.w4a8_linear(x.bfloat16(), *stored, **grid)):
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


# Hadamard transforms.


def sylvester(n):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    return h


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 4, 64, 512])
def test_hadamard_is_sylvesters_matrix_and_its_own_inverse(n, dtype):
    for m in (0, 1, 17):
        x = rows(m, n, dtype)
        y = ops.hadamard(x)
        exact = x.double() @ sylvester(n) / n**0.5
        # log2(n) sums in float32 each, and one rounding of y.
        rounding = {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype] + 12 * 2**-24
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= rounding * (exact.abs() + (n + 1) ** 0.5)).all()
        assert same(y, reference.hadamard(x)), "every sum is of the same two numbers"
        again = ops.hadamard(y)
        assert ((again.double() - x.double()).abs() <= 2 * rounding * (x.abs().double() + n**0.5)).all()
    strided = rows(n, 3).T
    assert same(ops.hadamard(strided), ops.hadamard(strided.contiguous()))


def test_hadamard_passes_on_what_is_not_finite_in_its_row():
    x = rows(3, 64)
    before = ops.hadamard(x)
    x[1, 5] = torch.inf
    y = ops.hadamard(x)
    assert not y[1].isfinite().any()
    assert same(y[[0, 2]], before[[0, 2]])


# Threads.


def calls():
    """Every op, at sizes above which the loops have threads."""
    codes, (packed, scale, zero), _ = weight(131, 512, 4, 4, torch.float32, True)
    _, (packed8, scale8, _), _ = weight(131, 512, 8, 4)
    blocks = ops.prepack(packed, scale, zero)
    form = (131, 4, 4, torch.float32, True)
    x, many = rows(9, 512), rows(250, 512)
    given = {
        "pack": lambda: ops.pack(codes, 4),
        "unpack": lambda: ops.unpack(packed, 4, 512),
        "dequantize": lambda: ops.dequantize(packed, scale, zero, 4, 512),
        "prepack": lambda: ops.prepack(packed, scale, zero),
        "unprepack": lambda: torch.cat([part.flatten().float() for part in ops.unprepack(blocks, 131, 512, *form[1:])]),
        "dequantize_prepacked": lambda: torch.ops.remanence.dequantize_prepacked(blocks, 131, 512, 4, 4, 0, True),
        "quantize_per_token": lambda: torch.cat([part.float() for part in ops.quantize_per_token(many, 8, False)], 1),
        "hadamard": lambda: ops.hadamard(many),
        "not finite": lambda: ops.w4a16_linear(x.log(), packed, scale, zero),
    }
    for name, some in (("few", x), ("many", many)):
        given |= {
            f"{name}, w4a16_linear": lambda x=some: ops.w4a16_linear(x, packed, scale, zero),
            f"{name}, bfloat16": lambda x=some: ops.w4a16_linear(x.bfloat16(), packed, scale, zero),
            f"{name}, 8 bits": lambda x=some: ops.w4a16_linear(x.bfloat16(), packed8, scale8, bits=8),
            f"{name}, prepacked_linear": lambda x=some: ops.prepacked_linear(x, blocks, None, *form),
            f"{name}, w8a8_linear": lambda x=some: ops.w8a8_linear(x, packed8, scale8, grid=ops.ASYMMETRIC),
            f"{name}, w4a4_linear": lambda x=some: ops.w4a4_linear(x, packed, scale, zero),
            f"{name}, prepacked_integer_linear": lambda x=some: ops.prepacked_integer_linear(
                x, None, None, blocks, None, *form
            ),
        }
    return given


@pytest.fixture
def set_threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", calls())
def test_neither_threads_nor_repeats_change_a_bit(name, isa, set_threads):
    if isa == "none":
        pytest.skip("torch's own products, which may hang on the number of threads")
    call = calls()[name]
    first = call()
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        for _ in range(5):
            assert same(call(), first), threads


@pytest.mark.parametrize("isa", ops.available_isas()[-1:], indirect=True)
def test_python_goes_on_while_a_kernel_runs():
    """No thread is made to give way here: the other one moves only where the kernel lets go of the GIL."""
    kernels = pytest.importorskip("remanence.kernels._C")
    x, y = torch.ones(512, 4096), torch.empty(512, 4096)
    started, done, count = threading.Event(), threading.Event(), 0

    def counting():
        nonlocal count
        while not done.is_set():
            count += 1
            time.sleep(0)  # gives way
            started.set()

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=counting)
    sys.setswitchinterval(1000)  # seconds
    try:
        thread.start()
        started.wait()
        before = count
        for _ in range(100):  # some ten milliseconds each; one is enough on a machine that is not busy
            kernels.hadamard(x.data_ptr(), 0, y.data_ptr(), 512, 4096, 1)
            if count > before:
                break
        moved = count - before
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert moved > 0


@pytest.mark.parametrize("isa", ops.available_isas()[-1:], indirect=True)
@pytest.mark.parametrize("first", ["torch", "remanence.kernels.ops"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_serves_torch_and_the_kernels(first):
    code = f"""
import {first}, torch, remanence.kernels.ops as ops
torch.set_num_threads(2)
codes = torch.zeros(256, 512, dtype=torch.uint8)
ops.w4a16_linear(torch.ones(9, 512), ops.pack(codes, 4), torch.ones(256, 1))
torch.ones(512, 512) @ torch.ones(512, 512)
print(*{{line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line or "iomp" in line}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, done.stdout
