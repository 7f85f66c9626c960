"""Weights in the CPU's run-time layout: the same bytes as the reference lays out, the same numbers as without; every op
as torch's compiler and autograd see it; the layer that keeps its weight that way.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from remanence.compress.knobs import RTN
from remanence.compress.linear import QuantLinear, prepack_
from remanence.compress.rtn import rtn
from remanence.compress.spec import ActivationSpec, QuantSpec
from remanence.kernels import ops, reference
from torch import nn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N, K, groups: blocks of 64 rows and what remains; groups of 1, 3, 7, 43, 32, 64, 128 features and whole rows.
SHAPES = [
    (1, 1, 1),
    (63, 43, 43),
    (64, 63, 21),
    (65, 63, 9),
    (130, 86, 2),
    (65, 96, 3),
    (64, 128, 2),
    (3, 256, 2),
    (130, 515, 1),
]

needs_cpu = pytest.mark.skipif(not ops.available_isas(), reason="the native kernels are not built")


def weight(n, k, bits, groups=1, dtype=torch.float32, asymmetric=False):
    generator = torch.Generator().manual_seed(n + k + bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = (0.01 + torch.rand(n, groups, generator=generator)).to(dtype)
    zero = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator) if asymmetric else None
    return reference.pack(codes, bits), scale, zero


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def same(a, b):
    """Bit for bit, NaN or not."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_layout_is_the_references_byte_for_byte(asymmetric, dtype, bits):
    for n, k, groups in SHAPES:
        stored = weight(n, k, bits, groups, dtype, asymmetric)
        blocks = ops.prepack(*stored, bits, k)
        assert torch.equal(blocks, reference.prepack(*stored, bits, k)), (n, k, groups)
        form = (n, k, groups, bits, ops.SCALE_TYPES[dtype], asymmetric)
        for unprepack in (torch.ops.remanence.unprepack, reference.unprepack):
            packed, scale, zero = unprepack(blocks, *form)
            assert torch.equal(packed, stored[0])
            assert same(scale, stored[1])
            assert torch.equal(zero, stored[2] if asymmetric else torch.empty(0, groups, dtype=torch.uint8))
        found = torch.ops.remanence.dequantize_prepacked(blocks, *form)
        assert torch.equal(found, reference.dequantize(*stored, bits, k))
        assert torch.equal(found, reference.dequantize_prepacked(blocks, *form))


@pytest.mark.parametrize("bits", ops.BITS)
def test_bytes_of_a_layout_written_out_by_hand(bits):
    """Code after code into the word and bit that blocks.h names, in Python numbers."""
    n, k, groups = 66, 40, 2
    packed, scale, _ = weight(n, k, bits, groups)
    codes = reference.unpack(packed, bits, k).tolist()
    step = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    lines = 3 if bits == 3 else 1
    steps = -(-(k // groups) // step)
    blocks = ops.prepack(packed, scale, None, bits, k).reshape(2, -1)  # 66 rows
    words = groups * steps * lines * 256
    expected = [bytearray(words), bytearray(words)]
    for row in range(n):
        for feature in range(k):
            g, at = divmod(feature, k // groups)
            s, c = divmod(at, step)
            first = (g * steps + s) * lines
            pieces = [(0, c // 4 * bits, codes[row][feature])]  # line, bit of the byte, what stands there
            if bits == 3:
                code = codes[row][feature]
                pieces = [(c // 16, c % 16 // 4 * 2, code & 3), (2, c // 4, code >> 2)]
            for line, bit, piece in pieces:
                expected[row // 64][((first + line) * 64 + row % 64) * 4 + c % 4] |= piece << bit
    for block, bytes_ in zip(blocks, expected, strict=True):
        assert block[:words].numpy().tobytes() == bytes_


def test_special_scales_come_back_with_their_bits():
    scale = torch.tensor([[torch.nan, torch.inf], [-0.0, 1e-45], [-torch.inf, 3e38]])
    packed, _, zero = weight(3, 64, 4, 2, asymmetric=True)
    found = ops.unprepack(ops.prepack(packed, scale, zero), 3, 64, 2, 4, torch.float32, True)
    assert same(found[1], scale)
    assert torch.equal(found[0], packed)
    assert torch.equal(found[2], zero)
    assert ops.unprepack(ops.prepack(packed, scale), 3, 64, 2, 4, torch.float32, False)[2] is None


def test_a_weight_without_rows_has_no_blocks():
    packed, scale = torch.empty(0, 32, dtype=torch.uint8), torch.empty(0, 2)
    blocks = ops.prepack(packed, scale)
    assert blocks.numel() == 0
    assert ops.prepacked_linear(torch.ones(3, 64), blocks, None, 0, 2, 4, torch.float32, False).shape == (3, 0)
    found = ops.unprepack(blocks, 0, 64, 2, 4, torch.float32, False)
    assert (found[0].shape, found[1].shape) == (packed.shape, scale.shape)


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "groups", "asymmetric"), [(65, 63, 9, True), (130, 86, 2, False)])
def test_products_have_the_bits_of_the_stored_layout(n, k, groups, asymmetric, dtype, bits):
    for scale_dtype in DTYPES:
        stored = weight(n, k, bits, groups, scale_dtype, asymmetric)
        blocks = ops.prepack(*stored, bits, k)
        form = (n, groups, bits, scale_dtype, asymmetric)
        bias = torch.linspace(-1, 1, n)
        for m in (0, 1, 5, 6, 18):
            x = rows(m, k, dtype=dtype)
            y = ops.prepacked_linear(x, blocks, bias, *form)
            assert same(y, ops.w4a16_linear(x, *stored, bias, bits))
            for x_bits, rounding in ((8, True), (4, False), (4, ops.NARROW)):
                y = ops.prepacked_integer_linear(x, None, None, blocks, bias, *form, x_bits, rounding, 0.9)
                assert same(y, ops.integer_linear(x, *stored, bias, bits, x_bits, rounding, 0.9))
            grid = torch.tensor([0.05]), torch.tensor([3], dtype=torch.int32)
            y = ops.prepacked_integer_linear(x, *grid, blocks, None, *form)
            assert same(y, ops.integer_linear(x, *stored, None, bits, x_scale=grid[0], x_zero=grid[1]))


def test_widths_fixed_in_the_name_are_those():
    x = rows(7, 96)
    for name, bits, x_bits in (("w8a8_linear", 8, 8), ("w4a8_linear", 4, 8), ("w4a4_linear", 4, 4)):
        stored = weight(65, 96, bits, 3, torch.float32, True)
        for grid in (ops.ASYMMETRIC, ops.NARROW):
            y = getattr(ops, name)(x, *stored, grid=grid, clip=0.8)
            assert same(y, ops.integer_linear(x, *stored, None, bits, x_bits, grid, 0.8))


def test_products_take_strided_x_and_slices_of_blocks():
    stored = weight(65, 96, 4, 3)
    blocks = ops.prepack(*stored)
    wide = torch.cat([torch.full((256,), 255, dtype=torch.uint8), blocks])
    x = rows(96, 7).T
    y = ops.prepacked_linear(x, wide[256:], None, 65, 3, 4, torch.float32, False)
    assert same(y, ops.prepacked_linear(x.contiguous(), blocks, None, 65, 3, 4, torch.float32, False))
    doubled = blocks.repeat_interleave(2)[::2]
    assert same(y, ops.prepacked_linear(x, doubled, None, 65, 3, 4, torch.float32, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["float", "integer"])
def test_gradients_are_those_of_the_dense_layer(kind, dtype):
    """To x as if it were not rounded, and to the bias; of the stored layout, too."""
    stored = weight(33, 63, 4, 7, asymmetric=True)
    blocks = ops.prepack(*stored, 4, 63)
    w = reference.dequantize(*stored, 4, 63).double()
    form = (33, 7, 4, torch.float32, True)
    linears = {
        "float": [
            lambda x, bias: ops.prepacked_linear(x, blocks, bias, *form),
            lambda x, bias: ops.w4a16_linear(x, *stored, bias),
        ],
        "integer": [
            lambda x, bias: ops.prepacked_integer_linear(x, None, None, blocks, bias, *form),
            lambda x, bias: ops.integer_linear(x, *stored, bias, 4),
            lambda x, bias: ops.w4a8_linear(x, *stored, bias),
            lambda x, bias: ops.w4a4_linear(x, *stored, bias),
        ],
    }[kind]
    # As in test_ops.py: some tens of roundings of float32, and one to bfloat16.
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 2**-8 + 4e-6}[dtype]
    for linear in linears:
        x, bias = rows(2, 5, 63, dtype=dtype).requires_grad_(), torch.zeros(33, dtype=dtype, requires_grad=True)
        grad = rows(2, 5, 33, dtype=dtype)
        linear(x, bias).backward(grad)
        exact_x = x.detach().double().requires_grad_()
        exact_bias = bias.detach().double().requires_grad_()
        F.linear(exact_x, w, exact_bias).backward(grad.double())
        for found, exact in ((x.grad, exact_x.grad), (bias.grad, exact_bias.grad)):
            assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max()
        alone = torch.zeros(33, dtype=dtype, requires_grad=True)
        linear(x.detach(), alone).backward(grad)
        assert torch.equal(alone.grad, bias.grad)
        assert not linear(x.detach(), None).requires_grad


def test_gradients_of_hadamard_are_its_transpose():
    x = rows(3, 64).requires_grad_()
    grad = rows(3, 64)
    ops.hadamard(x).backward(grad)
    assert torch.equal(x.grad, ops.hadamard(grad))


def op_samples():
    """Arguments of every op of this package."""
    stored = weight(5, 48, 3, 3, asymmetric=True)
    plain = weight(5, 48, 3, 3, torch.bfloat16)
    x, bias = rows(2, 3, 48), torch.zeros(5)
    blocks, plain_blocks = reference.prepack(*stored, 3, 48), reference.prepack(*plain, 3, 48)
    form, plain_form = (5, 3, 3, 0, True), (5, 3, 3, 2, False)
    grid = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    kept = torch.full((5, 6), 0b10010110, dtype=torch.uint8)
    learned = x.clone().requires_grad_(), bias.clone().requires_grad_()
    samples = [
        ("pack", reference.unpack(stored[0], 3, 48), 3),
        ("unpack", stored[0], 3, 48),
        ("dequantize", *stored, 3, 48),
        ("prepack", *stored, 3, 48),
        ("prepack", *plain, 3, 48),
        ("unprepack", blocks, 5, 48, 3, 3, 0, True),
        ("unprepack", plain_blocks, 5, 48, 3, 3, 2, False),
        ("dequantize_prepacked", blocks, 5, 48, 3, 3, 0, True),
        ("w4a16_linear", x, *stored, bias, 3),
        ("prepacked_linear", x, blocks, bias, *form),
        ("prepacked_linear", learned[0], plain_blocks, learned[1], *plain_form),
        ("quantize_per_token", x, 8, False, 0.9),
        ("quantize_per_token", x, 4, ops.NARROW, 0.9),
        ("integer_linear", x, *grid, *stored, bias, 3, 8, False, 1.0),
        ("prepacked_integer_linear", x.bfloat16(), None, None, blocks, None, *form, 4, ops.NARROW, 1.0),
        ("prepacked_integer_linear", learned[0], *grid, plain_blocks, learned[1], *plain_form, 8, False, 0.9),
        ("sparse24_linear", x, rows(5, 24), kept, bias),
        ("sparse24_linear", learned[0], rows(5, 24, dtype=torch.bfloat16), kept, learned[1]),
        ("hadamard", x[..., :32]),
        ("hadamard", learned[0][..., :32].detach().clone().requires_grad_()),
        ("gptq_block", rows(5, 8), torch.eye(8), torch.ones(5, 2), None, torch.arange(8) // 4, None, None, 3),
        ("clip_error", rows(5, 8), torch.ones(5, 3), None, 4),
    ]
    for name, bits in (("w8a8_linear", 8), ("w4a8_linear", 4), ("w4a4_linear", 4)):
        samples.append((name, learned[0], *weight(5, 48, bits, 3), learned[1], None, None, False, 0.9))
        samples.append((name, x.half(), *weight(5, 48, bits, 3), None, *grid, True, 1.0))
    return samples


# The CPU kernel differs by instruction set, the registration does not: once is enough.
ONCE = pytest.mark.parametrize("isa", ops.available_isas()[-1:], indirect=True)


def test_samples_are_of_every_op():
    schemas = {schema.partition("(")[0] for schema in ops._SCHEMAS} | set(ops._FIXED)
    assert {name for name, *_ in op_samples()} == schemas


@ONCE
@pytest.mark.parametrize("sample", range(len(op_samples())), ids=lambda i: op_samples()[i][0])
def test_opcheck(sample):
    name, *args = op_samples()[sample]
    torch.library.opcheck(getattr(torch.ops.remanence, name).default, tuple(args))


@ONCE
@pytest.mark.slow
@pytest.mark.parametrize("sample", range(len(op_samples())), ids=lambda i: op_samples()[i][0])
def test_compiled_whole_it_gives_the_same(sample):
    name, *args = op_samples()[sample]
    args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
    op = getattr(torch.ops.remanence, name)
    torch._dynamo.reset()  # its limit is on one function, and here it is a new one each time
    compiled = torch.compile(lambda *given: op(*given), fullgraph=True)(*args)
    eager = op(*args)
    for a, b in zip(*(found if isinstance(found, tuple) else (found,) for found in (compiled, eager)), strict=True):
        assert torch.equal(a, b)


B = torch.zeros(64 * 32 + 64 * 2 * 4, dtype=torch.uint8)  # 4 rows, 64 features, 2 groups, 4 bits, float32
X = torch.ones(3, 64)
PACKED, SCALE = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2)


def linear(x=X, blocks=B, bias=None, n=4, groups=2, bits=4, scale_type=0, zero=False):
    return torch.ops.remanence.prepacked_linear(x, blocks, bias, n, groups, bits, scale_type, zero)


def integer(x_scale=None, x_zero=None, x_bits=8, grid=1, clip=1.0, blocks=B, x=X):
    form = (4, 2, 4, 0, False, x_bits, grid, clip)
    return torch.ops.remanence.prepacked_integer_linear(x, x_scale, x_zero, blocks, None, *form)


def unprepack(blocks=B, n=4, k=64, groups=2, bits=4, scale_type=0, zero=False):
    return torch.ops.remanence.unprepack(blocks, n, k, groups, bits, scale_type, zero)


MISTAKES = [
    (lambda: linear(blocks=B[1:]), r"blocks: shape \[2559\] is not \[2560\]"),
    (lambda: linear(blocks=B[None]), r"blocks: shape \[1, 2560\] is not \[2560\]"),
    (lambda: linear(blocks=B.char()), r"blocks: torch.int8 is not torch.uint8"),
    (lambda: linear(n=65), r"blocks: shape \[2560\] is not \[5120\]"),
    (lambda: linear(n=-1), r"n: -1 is negative"),
    (lambda: linear(zero=True), r"blocks: shape \[2560\] is not \[2688\]"),
    (lambda: linear(scale_type=1), r"blocks: shape \[2560\] is not \[2304\]"),
    (lambda: linear(scale_type=3), r"scale_type: 3 is not one of 0, 1, 2"),
    (lambda: linear(bits=8), r"blocks: shape \[2560\] is not \[4608\]"),
    (lambda: linear(bits=5), r"bits: 5 is not one of 2, 3, 4, 8"),
    (lambda: linear(groups=5), r"groups: 64 input features do not divide into 5 groups"),
    (lambda: linear(groups=0), r"groups: 64 input features do not divide into 0 groups"),
    (lambda: linear(X[:, :32]), r"blocks: shape \[2560\] is not \[1536\]"),
    (lambda: linear(X[:, :0]), r"groups: 0 input features do not divide into 2 groups"),
    (lambda: linear(X.double()), r"x: torch.float64 is not torch.float32 or"),
    (lambda: linear(torch.tensor(1.0)), r"x: shape \[\] is not \[..., K\]"),
    (lambda: linear(bias=torch.ones(3)), r"bias: shape \[3\] is not \[4\]"),
    (lambda: linear(X.to("meta"), B[1:].to("meta")), r"blocks: shape \[2559\]"),
    (lambda: integer(blocks=B[1:]), r"blocks: shape \[2559\] is not \[2560\]"),
    (lambda: integer(x_bits=9), r"bits: 9, expected 2 to 8"),
    (lambda: integer(grid=-1), r"grid: -1 is not one of 0 \(asymmetric\), 1 \(symmetric\), 2 \(narrow\)"),
    (lambda: integer(clip=0.0), r"clip: 0\.0, expected above 0"),
    (lambda: integer(torch.ones(1)), r"x_scale: goes with x_zero"),
    (lambda: integer(torch.ones(2), torch.zeros(1, dtype=torch.int32)), r"x_scale: shape \[2\] is not \[1\]"),
    (lambda: unprepack(B[1:]), r"blocks: shape \[2559\] is not \[2560\]"),
    (lambda: unprepack(k=-64), r"groups: -64 input features do not divide"),
    (lambda: unprepack(n=-1), r"n: -1 is negative"),
    (lambda: torch.ops.remanence.dequantize_prepacked(B[1:], 4, 64, 2, 4, 0, False), r"blocks: shape \[2559\]"),
    (lambda: ops.prepack(PACKED, SCALE, None, 4, 65), r"packed: shape \[4, 32\] is not \[4, 36\]"),
    (lambda: ops.prepack(PACKED, SCALE[:3]), r"scale: shape \[3, 2\] is not \[4, 2\]"),
    (lambda: ops.prepack(PACKED, SCALE, SCALE), r"zero: torch.float32 is not torch.uint8"),
    (lambda: ops.w4a4_linear(X, PACKED, SCALE, clip=2.0), r"clip: 2\.0, expected above 0"),
    (lambda: ops.w4a4_linear(X, PACKED, SCALE, grid=3), r"grid: 3 is not one of"),
    (lambda: ops.w8a8_linear(X, PACKED, SCALE), r"packed: shape \[4, 32\] is not \[4, 64\]"),
    (lambda: ops.hadamard(torch.ones(3, 48)), r"x: torch.float32 \[3, 48\], expected .* a power of two"),
    (lambda: ops.hadamard(torch.ones(4).int()), r"x: torch.int32 \[4\], expected"),
    (lambda: ops.quantize_per_token(torch.ones(3, 0), 8), r"x: torch.float32 \[3, 0\], expected"),
]


@ONCE
@pytest.mark.parametrize("mistake", range(len(MISTAKES)), ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()


# The layer that keeps its weight so.


def layer(symmetric=False, activation=None, bias=True, n=66, k=96, dtype=torch.bfloat16, bits=4):
    q = rtn(rows(n, k), QuantSpec(bits, 32, symmetric), dtype, RTN())
    return QuantLinear.from_qtensor(q, torch.linspace(-1, 1, n) if bias else None, activation)


ACTIVATIONS = [None, ActivationSpec(8), ActivationSpec(4, symmetric=False)]


@needs_cpu
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_prepacked_layer_is_the_stored_one_to_all_who_ask(symmetric, activation):
    stored = layer(symmetric, activation)
    laid = copy.deepcopy(stored).prepack_()
    assert laid.blocks is not None
    assert laid._buffers["packed"] is None
    for m in (1, 9):
        for dtype in DTYPES:
            x = rows(m, 96, dtype=dtype)
            assert same(laid(x), stored(x))
    before, after = stored.state_dict(), laid.state_dict()
    assert before.keys() == after.keys()
    assert all(same(before[key], after[key]) for key in before)
    assert torch.equal(laid.packed, stored.packed)
    assert same(laid.scale, stored.scale)
    assert (laid.zero is None) == symmetric
    assert torch.equal(laid.codes(), stored.codes())
    assert torch.equal(laid.dequantized(), stored.dequantized())
    assert laid.prepack_() is laid, "once is enough"
    again = laid.unprepack_()
    assert again.blocks is None
    assert all(same(before[key], value) for key, value in again.state_dict().items())


@needs_cpu
def test_a_prepacked_layer_takes_another_state():
    laid = layer().prepack_()
    other = layer()
    other.scale.mul_(2)
    other.zero.copy_(15 - other.zero)
    for assign in (False, True):
        target = copy.deepcopy(laid)
        target.load_state_dict(other.state_dict(), assign=assign)
        assert target.blocks is not None
        x = rows(3, 96)
        assert same(target(x), other(x))
        assert not torch.equal(target(x), laid(x))


@needs_cpu
def test_copies_and_moves_of_a_prepacked_layer():
    stored, x = layer(dtype=torch.float32), rows(3, 96)
    laid = copy.deepcopy(stored).prepack_()
    copied = copy.deepcopy(laid)
    copied.blocks.zero_()
    assert same(laid(x), stored(x)), "a copy has memory of its own"
    for dtype in (torch.bfloat16, torch.float16):
        moved, expected = copy.deepcopy(laid).to(dtype), copy.deepcopy(stored).to(dtype)
        assert moved.blocks is not None
        assert moved.scale.dtype == dtype
        assert same(moved(x.to(dtype)), expected(x.to(dtype)))
        assert same(moved.scale, expected.scale)
    meta = copy.deepcopy(laid).to("meta")
    assert meta.blocks is None
    assert meta(x.to("meta")).shape == (3, 66)
    filled = meta.to_empty(device="cpu")
    filled.load_state_dict(stored.state_dict())
    assert same(filled.prepack_()(x), stored(x))
    with torch.no_grad():
        shared = copy.deepcopy(laid).share_memory()
    assert same(shared(x), stored(x))


@needs_cpu
def test_a_static_grid_stays_with_a_prepacked_layer():
    static = torch.tensor([0.03]), torch.tensor([2], dtype=torch.int32)
    activation = ActivationSpec(8, symmetric=False, dynamic=False)
    stored = QuantLinear.from_qtensor(
        rtn(rows(66, 96), QuantSpec(8, 32), torch.float32, RTN()), None, activation, static
    )
    laid = copy.deepcopy(stored).prepack_()
    assert same(laid(rows(3, 96)), stored(rows(3, 96)))
    half = laid.to(torch.bfloat16)
    assert half.x_scale.dtype == torch.float32
    assert half.x_zero.dtype == torch.int32
    x = rows(3, 96).bfloat16()
    assert same(half(x), copy.deepcopy(stored).to(torch.bfloat16)(x))


@needs_cpu
def test_a_model_is_saved_the_same_before_and_after(tmp_path):
    model = nn.Sequential(layer(), nn.ReLU(), layer(symmetric=True, n=5, k=64, bias=False))
    torch.save(model.state_dict(), tmp_path / "before.pt")
    assert prepack_(model) is model
    assert all(part.blocks is not None for part in (model[0], model[2]))
    torch.save(model.state_dict(), tmp_path / "after.pt")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("before.pt", "after.pt"))
    assert before.keys() == after.keys()
    assert all(same(before[key], after[key]) for key in before)
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert same(whole[0](rows(2, 96)), model[0](rows(2, 96)))


@needs_cpu
def test_a_prepacked_layer_passes_gradients_on():
    stored, laid = layer(), layer().prepack_()
    grads = []
    for each in (stored, laid):
        x = rows(3, 96).requires_grad_()
        each(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@needs_cpu
@ONCE
@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_compiled_layer_gives_the_same_numbers(activation):
    """In one graph, for every number of rows, and with gradients; stored and prepacked."""
    for each in (layer(activation=activation), layer(activation=activation).prepack_()):
        torch._dynamo.reset()
        compiled = torch.compile(each, fullgraph=True, dynamic=True)
        for m in (1, 2, 9, 30):
            assert same(compiled(rows(m, 96)), each(rows(m, 96)))
        for run in (compiled, each):
            x = rows(5, 96).requires_grad_()
            run(x).sum().backward()
            torch.testing.assert_close(x.grad, each.dequantized().sum(0).expand(5, 96))


@needs_cpu
@ONCE
@pytest.mark.slow
def test_a_model_generates_the_same_tokens_compiled_or_not(untrained):
    """Greedy tokens of a small Llama: stored and prepacked, as it is and compiled."""
    model = untrained("llama")
    for name, module in [*model.model.layers.named_modules()]:
        if isinstance(module, nn.Linear):
            q = rtn(module.weight, QuantSpec(4, 16, symmetric=False), torch.bfloat16, RTN("minmax"))
            model.model.layers.set_submodule(name, QuantLinear.from_qtensor(q, None))
    prompt = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompt)

    def tokens():
        return model.generate(prompt, attention_mask=mask, max_new_tokens=24, do_sample=False)

    expected = tokens()
    assert len(expected[0, 7:].unique()) > 3, "answers of some variety"
    eager = model.forward
    for change in (lambda: None, lambda: prepack_(model)):
        change()
        model.forward = eager
        assert torch.equal(tokens(), expected)
        model.forward = torch.compile(eager, dynamic=True)
        assert torch.equal(tokens(), expected)
