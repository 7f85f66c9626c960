"""Layouts of weights: by an independent packer, at odd sides, and exactly back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from remanence.backends.ascend_products import PRODUCTS
from remanence.bench import ascend_reference
from remanence.kernels import ops
from remanence.kernels.ascend import products
from remanence.kernels.ascend.routes import Inputs, Layer
from remanence.kernels.ascend.weights import pack_int4, unpack_int4

CPU = torch.device("cpu")


def by_numpy(values):
    """As npu_convert_weight_to_int4pack is documented: element i of eight in bits 4 i to 4 i + 3, two's complement."""
    nibbles = (values.numpy().astype(np.int64) & 15).reshape(*values.shape[:-1], -1, 8)
    words = sum(nibbles[..., i] << (4 * i) for i in range(8))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_int4_by_its_definition(rows, words, seed):
    values = torch.randint(-8, 8, (rows, 8 * words), generator=torch.Generator().manual_seed(seed))
    packed = pack_int4(values)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, by_numpy(values))
    assert torch.equal(packed, torch.ops.npu.npu_convert_weight_to_int4pack(values.to(torch.int32)))
    assert torch.equal(unpack_int4(packed), values.to(torch.int8))


def test_every_nibble_at_every_place():
    values = torch.arange(-8, 8).repeat(8, 1).reshape(16, 8)
    assert torch.equal(unpack_int4(pack_int4(values)), values.to(torch.int8))
    one = torch.zeros(1, 8, dtype=torch.int64)
    one[0, 7] = -8
    assert pack_int4(one).tolist() == [[-(2**31)]]


@given(
    n=st.integers(1, 70),
    groups=st.integers(1, 3),
    size=st.sampled_from([16, 32, 40, 64]),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    inputs=st.sampled_from([None, Inputs(8), Inputs(4)]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=80, deadline=None)
def test_what_was_stored_comes_back(n, groups, size, bits, symmetric, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    k = groups * size
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = torch.randn(n, groups, generator=generator).half()
    zero = None if symmetric else torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator)
    layer = Layer(n, k, bits, size, symmetric, torch.float16, inputs)
    if inputs is None and groups > 1 and size % 32:
        with pytest.raises(ValueError, match="group_size"):
            products.lay(ops.pack(codes, bits), scale, zero, layer, CPU, PRODUCTS["910B4"])
        return
    weight = products.lay(ops.pack(codes, bits), scale, zero, layer, CPU, PRODUCTS["910B4"])
    found = weight.stored()
    assert torch.equal(found[0], ops.pack(codes, bits))
    assert torch.equal(found[1], scale)
    assert (found[2] is None) == symmetric
    assert symmetric or torch.equal(found[2], zero)
    assert torch.equal(weight.dense(), ops.dequantize(ops.pack(codes, bits), scale, zero, bits, k))
    assert weight.nbytes == sum(part.numel() * part.element_size() for part in weight.parts)


def test_nz_is_left_before_it_is_read():
    """Whatever a device keeps in its own layout is nothing that a host can read."""
    packed, scale = ops.pack(torch.zeros(64, 128, dtype=torch.uint8), 4), torch.ones(64, 2).half()
    weight = products.lay(packed, scale, None, Layer(64, 128, 4, 64), CPU, PRODUCTS["910B4"], "nz")
    assert ascend_reference.calls == ["npu_format_cast"]
    assert torch.equal(weight.stored()[0], packed)
    assert ascend_reference.calls == ["npu_format_cast"] * 2


def test_half_the_bytes_of_int8():
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    packed, scale = ops.pack(codes, 4), torch.ones(64, 1).half()
    small = products.lay(packed, scale, None, Layer(64, 128, 4, 128), CPU, PRODUCTS["910B4"])
    wide = products.lay(packed, scale, None, Layer(64, 128, 4, 128), CPU, PRODUCTS["310P"])
    assert (small.nbytes, wide.nbytes) == (64 * 128 // 2, 64 * 128)


@pytest.mark.parametrize(("value", "dtype"), [(1e-9, torch.float16), (1.3e-7, torch.float16), (1e6, torch.float16)])
def test_a_scale_that_16_bits_do_not_hold_is_an_error(value, dtype):
    packed, scale = ops.pack(torch.ones(8, 64, dtype=torch.uint8), 4), torch.full((8, 1), value)
    layer = Layer(8, 64, 4, 64, dtype=dtype)
    weight = products.lay(packed, scale, None, layer, CPU, PRODUCTS["910B4"])
    with pytest.raises(ValueError, match=r"scale: .* is not held by torch\.float16; bfloat16 has the range"):
        products.linear(torch.ones(2, 64, dtype=dtype), weight)


def test_a_vocabulary_is_one_product_again(monkeypatch):
    """Split as a layer of 70000 outputs is, with a bias, at every kind of weight."""
    from remanence.kernels.ascend import routes

    monkeypatch.setattr(routes, "_WIDEST", 100)
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(3, 64, generator=generator).half(), torch.randn(205, generator=generator).half()
    for bits, inputs in ((4, None), (8, None), (8, Inputs(8)), (4, Inputs(4)), (8, Inputs(8, dynamic=False, grid=0))):
        codes = torch.randint(0, 2**bits, (205, 64), dtype=torch.uint8, generator=generator)
        scale = (torch.rand(205, 1, generator=generator) * 0.1).half()
        static = (
            None if inputs is None or inputs.dynamic else (torch.tensor([0.02]), torch.tensor([5], dtype=torch.int32))
        )
        layer = Layer(205, 64, bits, 64, inputs=inputs)
        weight = products.lay(ops.pack(codes, bits), scale, None, layer, CPU, PRODUCTS["910B4"])
        assert weight.route.parts == (64, 64, 64, 13)
        ascend_reference.calls.clear()
        found = products.linear(x, weight, bias, static)
        assert sum(call in ("npu_weight_quant_batchmatmul", "npu_quant_matmul") for call in ascend_reference.calls) == 4
        stored = (ops.pack(codes, bits), scale, None, bias)
        if inputs is None:
            wanted = ops.w4a16_linear(x, *stored, bits)
        else:
            wanted = ops.integer_linear(x, *stored, bits, inputs.bits, inputs.grid, 1.0, *(static or (None, None)))
        assert (found.float() - wanted.float()).norm() < 1e-3 * wanted.float().norm()
