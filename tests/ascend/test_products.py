"""The products behind torch-npu's own schemas, beside the CPU's: every route of every product, odd sides, gradients."""

from collections import Counter

import pytest
import torch
from remanence.backends.ascend_products import PRODUCTS
from remanence.bench import ascend_calls, ascend_layers, ascend_reference
from remanence.kernels import ops
from remanence.kernels.ascend import products, schemas
from remanence.kernels.ascend.routes import EXPANDED, Inputs, Layer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("product", "every"),
    [("910B4", 7), ("310P", 1), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in PRODUCTS)],
)
def test_every_route_equals_the_cpu(product, every):
    found = list(ascend_layers.cases(1, product, every))
    made = [case for case in found if "route" in case]
    assert [case for case in made if case["off"] > case["limit"] or not case["exact"]] == []
    taken = Counter((case["route"].operator, case["route"].rounding) for case in made)
    expected = {(EXPANDED, ""), ("npu_weight_quant_batchmatmul", ""), ("npu_quant_matmul", "npu_quantize")}
    expected.add(("npu_quant_matmul", "torch"))
    if product != "310P":
        expected |= {
            ("npu_quant_matmul", rounding)
            for rounding in ("npu_dynamic_quant", "npu_kronecker_quant", "npu_rotate_quant")
        }
    assert set(taken) == expected
    refused = {case["refusal"].split(":")[0] for case in found if "refusal" in case}
    assert refused == ({"group_size"} if product != "310P" else {"group_size", "dtype", "activation", "symmetric"})


def layer_of(generator, n=24, k=64, bits=4, dtype=torch.float16, inputs=None, group=64):
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(n, k // group, generator=generator) * 0.05 + 0.01).to(dtype)
    stored = ops.pack(codes, bits), scale, None
    weight = products.lay(*stored, Layer(n, k, bits, group, True, dtype, inputs), CPU, PRODUCTS["910B4"])
    return stored, weight


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (0, 64), (2, 0, 64)])
@pytest.mark.parametrize("inputs", [None, Inputs(8), Inputs(4)])
def test_any_number_of_axes_and_of_rows(shape, inputs):
    generator = torch.Generator().manual_seed(0)
    _, weight = layer_of(generator, inputs=inputs)
    x = torch.randn(shape, generator=generator).half()
    found = products.linear(x, weight)
    assert found.shape == (*shape[:-1], 24)
    rows = products.linear(x.reshape(-1, 64), weight)
    assert torch.equal(found.reshape(-1, 24), rows)


def test_a_view_that_is_not_contiguous():
    generator = torch.Generator().manual_seed(0)
    for inputs in (None, Inputs(8), Inputs(4), Inputs(8, grid=0)):
        _, weight = layer_of(generator, inputs=inputs)
        x = torch.randn(64, 5, generator=generator).half()
        assert torch.equal(products.linear(x.T, weight), products.linear(x.T.contiguous(), weight))


@pytest.mark.parametrize("inputs", [None, Inputs(8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_those_of_the_cpus_op(inputs, dtype):
    generator = torch.Generator().manual_seed(0)
    stored, weight = layer_of(generator, dtype=dtype, inputs=inputs)
    x, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((3, 64), (24,)))
    grads = []
    for where in ("npu", "cpu"):
        leaf, own = (tensor.clone().requires_grad_() for tensor in (x, bias))
        if where == "npu":
            y = products.linear(leaf, weight, own)
        elif inputs is None:
            y = ops.w4a16_linear(leaf, *stored, own, 4)
        else:
            y = ops.integer_linear(leaf, *stored, own, 4, 8)
        y.float().square().sum().backward()
        grads.append((leaf.grad, own.grad))
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if dtype == torch.float16 else 1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", ["kronecker", "hadamard"])
@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_gradients_pass_a_transform_that_is_fused_without_them(kind, clip):
    """The operators that turn and round at once have none: the transform goes first then."""
    generator = torch.Generator().manual_seed(0)
    transform = ascend_layers._transform(kind, 128, generator)
    sizes = (8, 16) if kind == "kronecker" else (128,)
    inputs = Inputs(4, grid=ops.NARROW, clip=clip, transform=kind, factors=sizes)
    stored, weight = layer_of(generator, k=128, inputs=inputs, group=128)
    leaf = torch.randn(3, 128, generator=generator).half().requires_grad_()
    found = products.linear(leaf, weight, None, None, transform)
    wanted = ops.integer_linear(transform(leaf), *stored, None, 4, 4, ops.NARROW, clip)
    assert (found.float() - wanted.float()).norm() < 2e-3 * wanted.float().norm()
    found.float().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    with torch.no_grad():  # as it is served: turned in 16 bits
        served = products.linear(leaf, weight, None, None, transform)
    assert (served.float() - wanted.float()).norm() < 0.2 * wanted.float().norm()


@pytest.mark.parametrize("x_bits", range(2, 9))
@pytest.mark.parametrize("grid", [ops.SYMMETRIC, ops.NARROW, ops.ASYMMETRIC])
def test_inputs_of_any_width(x_bits, grid):
    generator = torch.Generator().manual_seed(0)
    stored, weight = layer_of(generator, bits=8, inputs=Inputs(x_bits, grid=grid))
    x = torch.randn(4, 64, generator=generator).half()
    wanted = ops.integer_linear(x, *stored, None, 8, x_bits, grid)
    assert (products.linear(x, weight).float() - wanted.float()).norm() < 1e-3 * wanted.float().norm()


def test_a_scale_is_rounded_as_the_operator_would_cut_it():
    """For float16 products without a scale per token it keeps 19 bits: cut off, every product would be too small."""
    generator = torch.Generator().manual_seed(0)
    _, weight = layer_of(generator, n=64, bits=8, inputs=Inputs(8, dynamic=False))
    grid = torch.tensor([0.0123]), torch.zeros(1, dtype=torch.int32)
    exact = weight.grids(torch.float32)[0][0][0].double() * 0.0123
    ((kept, _),) = weight.fixed(grid[0], None)
    assert not (kept.view(torch.int32) & (2**13 - 1)).any()
    off = kept.double() / exact - 1
    assert off.abs().max() < 2.0**-11
    assert abs(off.mean()) < 2.0**-12


def test_a_static_grid_is_worked_out_once():
    generator = torch.Generator().manual_seed(0)
    _, weight = layer_of(generator, bits=8, inputs=Inputs(8, dynamic=False, grid=0))
    x = torch.randn(3, 64, generator=generator).half()
    grid = torch.tensor([0.02]), torch.tensor([7], dtype=torch.int32)
    first = products.linear(x, weight, None, grid)
    kept = weight.fixed(*grid)
    assert weight.fixed(*grid) is kept
    assert torch.equal(products.linear(x, weight, None, grid), first)
    other = torch.tensor([0.05]), torch.tensor([0], dtype=torch.int32)
    assert not torch.equal(products.linear(x, weight, None, other), first)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("k", [1, 7, 8, 33, 64])
def test_pack_and_unpack_as_the_op(bits, k):
    codes = torch.randint(0, 2**bits, (5, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(products.pack(codes, bits), ops.pack(codes, bits))
    assert torch.equal(products.unpack(ops.pack(codes, bits), bits, k), codes)


def test_a_code_too_large_is_refused_as_by_the_op():
    with pytest.raises(ValueError, match="codes: 16 is above 15"):
        products.pack(torch.full((1, 8), 16, dtype=torch.uint8), 4)


@pytest.mark.parametrize("n", [1, 2, 8, 64, 256])
def test_hadamard_as_the_op(n):
    x = torch.randn(3, 5, n, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(products.hadamard(x), ops.hadamard(x), rtol=1e-5, atol=1e-5)
    assert products.hadamard(x.half()).dtype == torch.float16


# The operators' schemas


def test_every_call_fits_its_schema():
    from pathlib import Path

    found = ascend_calls.calls(Path(__file__).resolve().parents[2])
    assert {call.operator for call in found} == set(schemas.schemas())
    assert [problem for call in found if (problem := ascend_calls.wrong(call))] == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.ops.npu.npu_dynamic_quant(x, kind=1)",
        "torch.ops.npu.npu_dynamic_quant()",
        "torch.ops.npu.npu_dynamic_quant(x, torch.int8)",
        "torch.ops.npu.npu_quant_matmul(a, b)",
        "torch.ops.npu.npu_quant_matmul(a, b, s, scale=s)",
        "torch.ops.npu.npu_none(x)",
    ],
)
def test_a_wrong_call_is_noticed(line):
    (call,) = ascend_calls.calls_in(line, "planted.py")
    assert ascend_calls.wrong(call).startswith("planted.py:1: npu_")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("f(Tensor x, int a=0) -> Tensor", ""),
        (None, "is not there"),
        ("f(Tensor x, int a=0, *, int? b=None) -> Tensor", "has b besides, which may stay away"),
        ("f(Tensor x) -> Tensor", "lacks a"),
        ("f(Tensor x, int a=1) -> Tensor", "has another a: int=1"),
        ("f(Tensor x, float a=0.0) -> Tensor", "has another a: float=0.0"),
        (
            "f(Tensor x, *, int a=0) -> Tensor",
            "has another a: int=0, by name alone; has its arguments in another order: x",
        ),
        ("f(Tensor x, int b, int a=0) -> Tensor", "has its arguments in another order: x, b, a; asks for b"),
        ("f(Tensor x, int a=0) -> (Tensor, Tensor)", "returns Tensor, Tensor"),
    ],
)
def test_drift_in_words(found, said):
    assert schemas.compare("f(Tensor x, int a=0) -> Tensor", found) == said


def test_none_beside_what_is_registered():
    assert schemas.drift() == {}
    assert schemas.loaded("npu_none") is None


# That the stand-ins refuse what the device would


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, w, s: npu.npu_weight_quant_batchmatmul(x.float(), w, s.float()), "x: torch.float32"),
        (lambda x, w, s: npu.npu_weight_quant_batchmatmul(x, w, s, antiquant_group_size=48), "antiquant_group_size"),
        (lambda x, w, s: npu.npu_weight_quant_batchmatmul(x, w, s.float()), "antiquant_scale: torch.float32"),
        (lambda x, w, s: npu.npu_weight_quant_batchmatmul(x, w.T, s), "K of x is 64"),
        (lambda x, w, s: npu.npu_weight_quant_batchmatmul(x[:0], w, s), "not empty"),
        (lambda x, w, s: npu.npu_weight_quant_batchmatmul(x, w, s, bias=s.float()), "bias: torch.float32"),
        (lambda _, w, s: npu.npu_quant_matmul(w.T, w, s, output_dtype=torch.float16), "int8"),
        (lambda x, *_: npu.npu_dynamic_quant(x.float()), "input: torch.float32"),
        (lambda x, *_: npu.npu_dynamic_quant(x[:, :63], dst_type=torch.quint4x2), "multiple of 8"),
        (lambda x, *_: npu.npu_rotate_quant(x, torch.eye(64).half()), "the last axis: 64"),
    ],
)
def test_the_stand_ins_are_strict(call, words):
    x, w, s = torch.zeros(2, 64).half(), torch.zeros(64, 32, dtype=torch.int8), torch.ones(32).half()
    with pytest.raises(RuntimeError, match=words):
        call(x, w, s)


def test_the_310p_is_stricter():
    x, w, s = torch.zeros(2, 64).bfloat16(), torch.zeros(64, 32, dtype=torch.int8), torch.ones(32).bfloat16()
    npu.npu_weight_quant_batchmatmul(x, w, s)
    npu.npu_dynamic_quant(x)
    with ascend_reference.on("310P"):
        for call in (lambda: npu.npu_weight_quant_batchmatmul(x, w, s), lambda: npu.npu_dynamic_quant(x)):
            with pytest.raises(RuntimeError, match="310P"):
                call()


npu = torch.ops.npu


def test_without_an_output_dtype_it_is_int8():
    """The operator's default, which every call of ours has to override."""
    a, w = torch.ones(2, 64, dtype=torch.int8), torch.ones(64, 32, dtype=torch.int8)
    assert npu.npu_quant_matmul(a, w, torch.ones(32)).dtype == torch.int8
    for call in ascend_calls.calls_in((__import__("pathlib").Path(products.__file__)).read_text(), "products.py"):
        assert call.operator != "npu_quant_matmul" or "output_dtype" in call.named
