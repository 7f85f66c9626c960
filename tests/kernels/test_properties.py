"""Products of drawn weights and activations against float64, on every instruction set, stored and prepacked.

The slow ones are 10,500 examples in all.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from remanence.kernels import ops, reference

hypothesis = pytest.importorskip("hypothesis", reason="draws the examples; comes with the extra `test`")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.skipif(not ops.available_isas(), reason="the native kernels are not built")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of one number, relative
SUBNORMAL = {torch.float32: 2**-149, torch.float16: 2**-24, torch.bfloat16: 2**-133}  # and absolute
SPECIAL = ["none", "zeros", "equal", "one sign", "huge", "tiny", "NaN", "infinite"]


@pytest.fixture(autouse=True)
def isa():
    """Drawn with the rest, as any other choice."""
    before = ops.isa()
    yield
    ops.set_isa(before)


@dataclasses.dataclass
class Case:
    isa: str
    bits: int
    n: int
    group_size: int
    groups: int
    m: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    asymmetric: bool
    prepacked: bool
    special: str
    of_scale: float
    seed: int
    # Of x rounded to integers; x_bits None: it is not.
    x_bits: int | None
    row_grid: int
    clip: float
    given: bool

    def randn(self, *shape, seed):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed + seed))

    def weight(self):
        """packed, scale, zero, w float64 [N, K]."""
        generator = torch.Generator().manual_seed(self.seed)
        k = self.group_size * self.groups
        codes = torch.randint(0, 2**self.bits, (self.n, k), dtype=torch.uint8, generator=generator)
        zero = torch.randint(0, 2**self.bits, (self.n, self.groups), dtype=torch.uint8, generator=generator)
        if self.special == "equal":
            codes = (codes[:, :: self.group_size] // 2 + zero // 2).repeat_interleave(self.group_size, 1)
        of_scale = self.of_scale if self.scale_dtype != torch.float16 else 1e-3  # else beyond its range
        scale = (self.randn(self.n, self.groups, seed=1) * of_scale).to(self.scale_dtype)
        if not self.asymmetric:
            zero = None
        middle = 2 ** (self.bits - 1) if zero is None else zero.double().repeat_interleave(self.group_size, 1)
        w = (codes.double() - middle) * scale.double().repeat_interleave(self.group_size, 1)
        return reference.pack(codes, self.bits), scale, zero, w

    def x(self):
        x = self.randn(self.m, self.group_size * self.groups, seed=2)
        if self.special == "zeros":
            x[self.m // 2 : self.m // 2 + 1] = 0
        if self.special == "one sign":
            x = x.abs() + 1
        if self.special == "huge" and self.dtype != torch.float16:
            x = x * 1e30 / max(self.of_scale, 1)
        if self.special == "tiny":
            x = x * 1e-38 / min(self.of_scale, 1)
        if self.special in ("NaN", "infinite") and self.m:
            x[self.m // 2, self.seed % x.shape[1]] = torch.nan if self.special == "NaN" else torch.inf
        return x.to(self.dtype)

    def bias(self):
        return None if self.bias_dtype is None else self.randn(self.n, seed=3).to(self.bias_dtype)

    def grid(self):
        if not self.given:
            return None, None
        return torch.tensor([0.02]), torch.tensor([2 if self.row_grid == ops.ASYMMETRIC else 0], dtype=torch.int32)


def cases(*, rounded):
    activation = {
        "x_bits": st.integers(2, 8) if rounded else st.none(),
        "given": st.booleans() if rounded else st.just(False),
    }
    return st.builds(
        Case,
        isa=st.sampled_from(ops.available_isas()),
        bits=st.sampled_from(ops.BITS),
        n=st.one_of(st.integers(1, 130), st.sampled_from([1, 63, 64, 65, 128, 129])),
        group_size=st.one_of(st.integers(1, 70), st.sampled_from([1, 3, 32, 43, 64, 128, 520])),
        groups=st.integers(1, 4),
        m=st.one_of(st.integers(0, 20), st.sampled_from([1, 5, 6, 17])),
        dtype=st.sampled_from(DTYPES),
        scale_dtype=st.sampled_from(DTYPES),
        bias_dtype=st.sampled_from([None, *DTYPES]),
        asymmetric=st.booleans(),
        prepacked=st.booleans(),
        special=st.sampled_from(SPECIAL),
        of_scale=st.sampled_from([1e-3, 1.0, 1e-30, 1e30]),
        seed=st.integers(0, 2**31 - 10),
        row_grid=st.sampled_from([ops.ASYMMETRIC, ops.SYMMETRIC, ops.NARROW]),
        clip=st.sampled_from([1.0, 0.9, 0.3]),
        **activation,
    )


def product(case, x, packed, scale, zero, bias):
    """The op, and the same on the other layout: the same bits."""
    n, groups = scale.shape
    blocks = ops.prepack(packed, scale, zero, case.bits, x.shape[-1])
    weight = (blocks, bias, n, groups, case.bits, case.scale_dtype, case.asymmetric)
    if case.x_bits is None:
        stored = ops.w4a16_linear(x, packed, scale, zero, bias, case.bits)
        laid = ops.prepacked_linear(x, *weight)
    else:
        rounding = (case.x_bits, case.row_grid, case.clip)
        grid = case.grid()
        stored = ops.integer_linear(x, packed, scale, zero, bias, case.bits, *rounding, *grid)
        laid = ops.prepacked_integer_linear(x, *grid, *weight, *rounding)
    assert torch.equal(stored.nan_to_num(0), laid.nan_to_num(0))
    assert torch.equal(stored.isnan(), laid.isnan())
    return laid if case.prepacked else stored


def check_float(case):
    ops.set_isa(case.isa)
    packed, scale, zero, w = case.weight()
    x, bias = case.x(), case.bias()
    y = product(case, x, packed, scale, zero, bias)
    bad = ~x.isfinite().all(1)
    exact = F.linear(x.double(), w, None if bias is None else bias.double())
    # Where |x| times |scale| stands for each of a row's products: float32 sums of codes up to 255, in bfloat16 with
    # 2176 (below 8 bits 128) added, some 520 of them one after another. Four times the root of that, of 2^-24 each.
    codes = 2176 + 255 if case.dtype == torch.bfloat16 and case.isa == "avx512_bf16" else 255
    codes = min(codes, 130 + 2**case.bits) if case.bits < 8 else codes
    spread = scale.double().abs().repeat_interleave(case.group_size, 1)
    magnitude = codes * (x.double().abs() @ spread.T) + exact.abs()
    assert_within(y[~bad], exact[~bad], magnitude[~bad] * 4 * 24 * 2**-24, case.dtype)
    # A NaN is one in all of its row; an infinity is, or is infinite with the sign of what it meets.
    plain = reference.w4a16_linear(x, packed, scale, zero, bias, case.bits)
    assert torch.equal(y[bad].isnan(), plain[bad].isnan())
    assert torch.equal(y[bad].nan_to_num(0), plain[bad].nan_to_num(0))


def check_integer(case):
    ops.set_isa(case.isa)
    packed, scale, zero, w = case.weight()
    x, bias = case.x(), case.bias()
    codes, x_scale, x_zero = ops.quantize_per_token(x, case.x_bits, case.row_grid, case.clip)
    expected = reference.quantize_per_token(x, case.x_bits, case.row_grid, case.clip)
    for found, other in zip((codes, x_scale, x_zero), expected, strict=True):
        assert torch.equal(found.nan_to_num(-7), other.nan_to_num(-7)), "rounding has no tolerance"
    if case.given:
        x_scale, x_zero = case.grid()
        codes = reference.quantize_with(x, x_scale, x_zero, case.x_bits)
        x_scale = x_scale.masked_fill(x.isnan().any(1, keepdim=True), torch.nan)  # infinities have codes of their own
    y = product(case, x, packed, scale, zero, bias)
    a = (codes.double() - x_zero) * x_scale.double()
    bad = ~a.isfinite().all(1)
    exact = F.linear(a, w, None if bias is None else bias.double())
    # Sums of a group are exact; each of at most four, times its scale, and the zero point's share are float32.
    most = 2.0**case.x_bits * x_scale.double().abs() * case.group_size
    magnitude = 2**case.bits * most * scale.double().abs().sum(1) + exact.abs()
    assert_within(y[~bad], exact[~bad], magnitude[~bad] * 10 * 2**-24, case.dtype)
    assert not y[bad][:, (w != 0).any(1)].isfinite().any()


def assert_within(y, exact, tolerance, dtype):
    """y is `exact` but for `tolerance` and one rounding to its dtype; infinite only beyond the largest of that."""
    largest = torch.finfo(dtype).max
    assert not y.isnan().any()
    allowed = tolerance + ROUNDING[dtype] * exact.abs() + SUBNORMAL[dtype]
    beyond = exact.abs() + allowed > largest
    assert (y.isinf() <= beyond).all()
    found = y.double().clamp(-largest, largest)
    assert ((found - exact.clamp(-largest, largest)).abs() <= allowed).all()


def profile(examples):
    # derandomize: a run tests what the run before did; no database: nothing is left on the disk.
    hidden = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=hidden)


@profile(300)
@given(cases(rounded=False))
def test_products(case):
    check_float(case)


@profile(300)
@given(cases(rounded=True))
def test_integer_products(case):
    check_integer(case)


PACKINGS = {
    "isa": st.sampled_from(ops.available_isas()),
    "bits": st.sampled_from(ops.BITS),
    "n": st.integers(0, 130),
    "k": st.integers(1, 600),
    "seed": st.integers(0, 2**31),
}


@profile(100)
@given(**PACKINGS)
def test_packing_and_laying_out_lose_nothing(isa, bits, n, k, seed):
    check_packing(isa, bits, n, k, seed)


def check_packing(isa, bits, n, k, seed):
    ops.set_isa(isa)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    packed = ops.pack(codes, bits)
    assert torch.equal(packed, reference.pack(codes, bits))
    assert torch.equal(ops.unpack(packed, bits, k), codes)
    groups = next(g for g in (4, 3, 2, 1) if k % g == 0)
    scale = torch.randn(n, groups, generator=generator).half()
    zero = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator)
    found = ops.unprepack(ops.prepack(packed, scale, zero, bits, k), n, k, groups, bits, torch.float16, True)
    assert all(torch.equal(a, b) for a, b in zip(found, (packed, scale, zero), strict=True))


@pytest.mark.slow
@profile(5000)
@given(cases(rounded=False))
def test_products_of_many(case):
    check_float(case)


@pytest.mark.slow
@profile(4500)
@given(cases(rounded=True))
def test_integer_products_of_many(case):
    check_integer(case)


@pytest.mark.slow
@profile(1000)
@given(**PACKINGS)
def test_packing_and_laying_out_many(isa, bits, n, k, seed):
    check_packing(isa, bits, n, k, seed)
