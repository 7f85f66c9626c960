"""Every op, on every instruction set of this machine, against float64 and against independent packers."""

import pytest
import torch
import torch.nn.functional as F
from remanence.kernels import ops, reference

SIZES = [(1, 1), (3, 63), (65, 65), (63, 129), (129, 96), (33, 256)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = [0, 1, 3, 17, 65]  # 65 is above the native kernel's limit: dequantise, then F.linear

# Largest error over the largest |y|. float32: sums of at most 256 products in 8 or more partial sums, so some
# tens of roundings of 2^-24 each. Half precisions: also one rounding of y, by half a unit in its last place.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-11 + 4e-6, torch.bfloat16: 2**-8 + 4e-6}


def random_codes(n, k, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)


def random_weight(n, k, bits, groups=1, scale_dtype=torch.float32, asymmetric=False, seed=0):
    """(codes, packed, scale, zero), packed by the reference, whose packing is tested on its own."""
    generator = torch.Generator().manual_seed(seed + 1)
    codes = random_codes(n, k, bits, seed)
    scale = (0.01 + torch.rand(n, groups, generator=generator)).to(scale_dtype)
    zero = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator)
    return codes, reference.pack(codes, bits), scale, zero if asymmetric else None


def dense(codes, scale, zero, bits):
    """w float64 [N, K], written without the code under test."""
    repeats = codes.shape[1] // scale.shape[1]
    middle = 2 ** (bits - 1) if zero is None else zero.double().repeat_interleave(repeats, 1)
    return (codes.double() - middle) * scale.double().repeat_interleave(repeats, 1)


def pack_by_bits(codes, bits):
    """One bit at a time, in Python integers."""
    rows = []
    for row in codes.tolist():
        word = sum(code << (i * bits) for i, code in enumerate(row))
        rows.append(list(word.to_bytes(4 * -(-len(row) * bits // 32), "little")))
    return torch.tensor(rows, dtype=torch.uint8)


def relative_error(y, exact):
    return float((y.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def test_empty_memory_is_poisoned():
    assert torch.zeros(1).new_empty(3).isnan().all()
    assert (torch.zeros(1, dtype=torch.uint8).new_empty(3) == 255).all()


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize(("n", "k"), [*SIZES, (2, 31), (2, 95), (2, 191), (5, 512)])
def test_pack_is_the_bit_stream_and_unpack_undoes_it(n, k, bits):
    codes = random_codes(n, k, bits)
    packed = ops.pack(codes, bits)
    assert torch.equal(packed, pack_by_bits(codes, bits))
    assert torch.equal(packed, reference.pack(codes, bits))
    assert torch.equal(ops.unpack(packed, bits, k), codes)
    assert torch.equal(reference.unpack(packed, bits, k), codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("k", [63, 64, 129])
def test_pack_equals_compressed_tensors(k, bits):
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="compressed-tensors >= 0.19 defines the stored layout (extra `ct`)",
    )
    codes = random_codes(5, k, bits)
    theirs = helpers.pack_to_int32((codes.int() - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(ops.pack(codes, bits).view(torch.int32), theirs)


def test_pack_takes_a_transposed_matrix():
    codes = random_codes(65, 33, 4)
    assert torch.equal(ops.pack(codes.T, 4), pack_by_bits(codes.T, 4))


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("n", "k", "groups"), [(1, 1, 1), (3, 63, 7), (65, 65, 1), (5, 129, 43), (33, 256, 4)])
def test_dequantize_equals_the_reference(n, k, groups, asymmetric, scale_dtype, bits):
    codes, packed, scale, zero = random_weight(n, k, bits, groups, scale_dtype, asymmetric)
    w = ops.dequantize(packed, scale, zero, bits, k)
    # Exact: the difference of two codes is an integer, and the product is rounded once everywhere.
    assert torch.equal(w, reference.dequantize(packed, scale, zero, bits, k))
    assert torch.equal(w, dense(codes, scale, zero, bits).float())


def test_every_float16_scale_is_read_exactly():
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    scale = patterns[patterns.isfinite()][:, None]  # subnormals and both zeros among them
    packed = reference.pack(torch.full((len(scale), 1), 9, dtype=torch.uint8), 4)
    assert torch.equal(ops.dequantize(packed, scale, None, 4, 1), scale.float())


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_linear_equals_float64(n, k, dtype, bits):
    groups = k // 3 if k % 3 == 0 else 1
    asymmetric = n % 2 == 0 or k > 64
    codes, packed, scale, zero = random_weight(n, k, bits, groups, dtype, asymmetric)
    bias = torch.linspace(-1, 1, n).to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(2)).to(dtype)
        y = ops.w4a16_linear(x, packed, scale, zero, bias, bits)
        assert y.shape == (rows, n)
        assert y.dtype == dtype
        if rows:
            exact = F.linear(x.double(), dense(codes, scale, zero, bits), bias.double())
            plain = reference.w4a16_linear(x, packed, scale, zero, bias, bits)
            assert relative_error(y, exact) <= TOLERANCE[dtype], rows
            assert relative_error(plain, exact) <= TOLERANCE[dtype], rows


@pytest.mark.parametrize("rows", [3, 65])
def test_linear_takes_strided_x_and_any_leading_axes(rows):
    codes, packed, scale, _ = random_weight(33, 129, 4)
    w = dense(codes, scale, None, 4)
    generator = torch.Generator().manual_seed(3)
    strided = torch.randn(2, 129, rows, 2, generator=generator)[..., 0].transpose(1, 2)  # [2, rows, 129]
    for x in (strided, strided[0], strided[0, 0], strided[:, :0]):
        y = ops.w4a16_linear(x, packed, scale)
        assert y.shape == (*x.shape[:-1], 33)
        if x.numel():
            assert relative_error(y, x.double() @ w.T) <= TOLERANCE[torch.float32]


def test_linear_takes_slices_of_a_weight():
    codes, packed, scale, zero = random_weight(33, 128, 4, 4, asymmetric=True)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    y = ops.w4a16_linear(x, packed[::2, 32:], scale[::2, 2:], zero[::2, 2:])
    exact = x.double() @ dense(codes, scale, zero, 4)[::2, 64:].T
    assert relative_error(y, exact) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("bits", ops.BITS)
def test_constant_groups(bits):
    """A group of zeros (code = zero, or scale 0) gives exact zeros; one of equal values gives that value."""
    codes = torch.full((3, 96), 2 ** (bits - 1), dtype=torch.uint8)
    codes[1] += 1
    codes[2] += 1
    scale = torch.tensor([0.5, 0.25, 0.0])[:, None].repeat(1, 3)
    packed = ops.pack(codes, bits)
    w = ops.dequantize(packed, scale, None, bits, 96)
    assert torch.equal(w, torch.tensor([0.0, 0.25, 0.0])[:, None].repeat(1, 96))
    y = ops.w4a16_linear(torch.ones(2, 96), packed, scale, bits=bits)
    assert torch.equal(y, torch.tensor([[0.0, 24.0, 0.0]]).repeat(2, 1))


@pytest.mark.parametrize("rows", [1, 17, 65])
def test_threads_do_not_change_a_bit(rows):
    _, packed, scale, zero = random_weight(301, 256, 4, 4, asymmetric=True)
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(5))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.w4a16_linear(x, packed, scale, zero))
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("rows", [3, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dense_layer(dtype, rows):
    codes, packed, scale, zero = random_weight(33, 63, 4, 7, asymmetric=True)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, rows, 63, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(33, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(2, rows, 33, generator=generator).to(dtype)
    ops.w4a16_linear(x, packed, scale, zero, bias).backward(grad)

    exact_x, exact_bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    F.linear(exact_x, dense(codes, scale, zero, 4), exact_bias).backward(grad.double())
    assert relative_error(x.grad, exact_x.grad) <= TOLERANCE[dtype]
    assert relative_error(bias.grad, exact_bias.grad) <= TOLERANCE[dtype]


def test_only_asked_gradients_are_computed():
    _, packed, scale, _ = random_weight(5, 64, 4)
    bias = torch.zeros(5, requires_grad=True)
    ops.w4a16_linear(torch.ones(64), packed, scale, bias=bias).sum().backward()
    assert torch.equal(bias.grad, torch.ones(5))
    assert not ops.w4a16_linear(torch.ones(64), packed, scale).requires_grad


def op_samples():
    codes, packed, scale, zero = random_weight(5, 48, 3, 3, asymmetric=True)
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(7))
    bias = torch.zeros(5)
    return [
        ("pack", (codes, 3)),
        ("unpack", (packed, 3, 48)),
        ("dequantize", (packed, scale, zero, 3, 48)),
        ("dequantize", (packed, scale, None, 3, 48)),
        ("w4a16_linear", (x, packed, scale, zero, bias, 3)),
        ("w4a16_linear", (x.clone().requires_grad_(), packed, scale, None, bias.clone().requires_grad_(), 3)),
        ("w4a16_linear", (x.bfloat16(), packed, scale, zero, None, 3)),
    ]


# The CPU kernel differs by instruction set, the registration does not: once is enough.
@pytest.mark.parametrize("isa", ops.available_isas()[-1:], indirect=True)
@pytest.mark.parametrize("sample", range(len(op_samples())))
def test_opcheck(sample):
    name, args = op_samples()[sample]
    torch.library.opcheck(getattr(torch.ops.remanence, name).default, args)


def test_set_isa_refuses_what_the_machine_lacks(isa):
    with pytest.raises(ValueError, match=r"isa: 'sse9' (is not one of scalar|cannot be had)"):
        ops.set_isa("sse9")
    assert ops.isa() == isa


CODES = torch.zeros(4, 64, dtype=torch.uint8)
PACKED = torch.zeros(4, 32, dtype=torch.uint8)
SCALE = torch.ones(4, 2)
X = torch.ones(3, 64)
MISTAKES = [
    (lambda: ops.pack(CODES, 5), r"bits: 5 is not one of 2, 3, 4, 8"),
    (lambda: ops.pack(CODES.int(), 4), r"codes: torch.int32 is not torch.uint8"),
    (lambda: ops.pack(CODES[0], 4), r"codes: shape \[64\] is not \[N, K\]"),
    (lambda: ops.pack(CODES + 8, 3), r"codes: 8 is above 7, the largest of 3 bits"),
    (lambda: ops.unpack(PACKED, 6, 64), r"bits: 6 is not one of"),
    (lambda: ops.unpack(PACKED, 4, 65), r"packed: shape \[4, 32\] is not \[4, 36\]"),
    (lambda: ops.unpack(PACKED, 4, -1), r"k: -1 is negative"),
    (lambda: ops.unpack(PACKED[0], 4, 64), r"packed: shape \[32\] is not \[N, 32\]"),
    (lambda: ops.unpack(PACKED.int(), 4, 64), r"packed: torch.int32 is not torch.uint8"),
    (lambda: ops.dequantize(PACKED, SCALE[:3], None, 4, 64), r"scale: shape \[3, 2\] is not \[4, 2\]"),
    (lambda: ops.dequantize(PACKED, SCALE[0], None, 4, 64), r"scale: shape \[2\] is not \[4, groups\]"),
    (
        lambda: ops.dequantize(PACKED, SCALE.double(), None, 4, 64),
        r"scale: torch.float64 is not torch.float32",
    ),
    (
        lambda: ops.dequantize(PACKED, torch.ones(4, 5), None, 4, 64),
        r"scale: 64 input features do not divide into 5 groups",
    ),
    (lambda: ops.dequantize(PACKED, SCALE[:, :0], None, 4, 64), r"do not divide into 0 groups"),
    (lambda: ops.dequantize(PACKED, SCALE, PACKED[:, :1], 4, 64), r"zero: shape \[4, 1\] is not \[4, 2\]"),
    (lambda: ops.dequantize(PACKED, SCALE, SCALE, 4, 64), r"zero: torch.float32 is not torch.uint8"),
    (lambda: ops.w4a16_linear(X[:, :32], PACKED, SCALE), r"packed: shape \[4, 32\] is not \[4, 16\]"),
    (lambda: ops.w4a16_linear(X.double(), PACKED, SCALE), r"x: torch.float64 is not torch.float32 or"),
    (lambda: ops.w4a16_linear(torch.tensor(1.0), PACKED, SCALE), r"x: shape \[\] is not \[..., K\]"),
    (lambda: ops.w4a16_linear(X, PACKED, SCALE, bias=torch.ones(3)), r"bias: shape \[3\] is not \[4\]"),
    (lambda: ops.w4a16_linear(X, PACKED, SCALE, bias=CODES[:, 0]), r"bias: torch.uint8 is not"),
    (lambda: ops.w4a16_linear(X.to("meta"), PACKED.to("meta"), SCALE[:3].to("meta")), r"scale: shape"),
]


@pytest.mark.parametrize("mistake", range(len(MISTAKES)), ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("elsewhere", ["x", "packed", "scale", "bias"])
def test_tensors_on_several_devices(elsewhere):
    given = {
        "x": torch.ones(2, 8),
        "packed": torch.zeros(6, 4, dtype=torch.uint8),
        "scale": torch.ones(6, 1),
        "zero": None,
        "bias": torch.ones(6),
    }
    given[elsewhere] = given[elsewhere].to("meta")
    with pytest.raises(ValueError, match="device: tensors on cpu and meta; expected all on one"):
        ops.w4a16_linear(**given)


def test_scales_of_a_dtype_that_there_is_not():
    with pytest.raises(ValueError, match=r"scale_dtype: torch\.float64 is not torch\.float32 or"):
        ops.unprepack(torch.zeros(0, dtype=torch.uint8), 0, 8, 1, 4, torch.float64, False)
    with pytest.raises(ValueError, match="bits: 0 is not one of 2, 3, 4, 8"):
        ops.prepack(torch.zeros(6, 4, dtype=torch.uint8), torch.ones(6, 1), bits=0)
