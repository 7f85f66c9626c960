"""Which way a layer takes on which product, and the words where there is none."""

import pytest
import torch
from remanence.backends.ascend_products import PRODUCTS
from remanence.kernels.ascend.routes import EXPANDED, INTEGER, WEIGHT_ONLY, Inputs, Layer, route

A2, A3, DUO = PRODUCTS["910B4"], PRODUCTS["910C"], PRODUCTS["310P"]


@pytest.mark.parametrize("product", [A2, A3], ids=lambda product: product.name)
@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Layer(4096, 4096), (WEIGHT_ONLY, "int4", "n", False, 128)),
        (Layer(4096, 4096, group=4096), (WEIGHT_ONLY, "int4", "k", False, 0)),
        (Layer(4096, 4100, group=4100), (WEIGHT_ONLY, "int4", "n", False, 0)),
        (Layer(1, 64, group=64), (WEIGHT_ONLY, "int4", "n", False, 0)),
        (Layer(4096, 4096, group=256), (WEIGHT_ONLY, "int4", "n", False, 256)),
        (Layer(4096, 4096, 8, 4096), (WEIGHT_ONLY, "int8", "n", False, 0)),
        (Layer(8, 1, group=1), (WEIGHT_ONLY, "int8", "n", False, 0)),
        (Layer(4096, 4096, 3, 64), (WEIGHT_ONLY, "int4", "n", False, 64)),
        (Layer(4096, 4096, dtype=torch.float32), (EXPANDED, "int8", "n", False, 0)),
        (Layer(4096, 4096, 8, 4096, inputs=Inputs()), (INTEGER, "int8", "n", True, 0)),
        (Layer(4096, 4090, 8, 4090, inputs=Inputs()), (INTEGER, "int8", "n", False, 0)),
        (Layer(4096, 4096, 4, 4096, inputs=Inputs(4)), (INTEGER, "int4", "k", False, 0)),
        (Layer(4096, 4100, 4, 4100, inputs=Inputs(4)), (INTEGER, "int8", "n", False, 0)),
        (Layer(4096, 4096, 4, 4096, inputs=Inputs(8)), (INTEGER, "int8", "n", True, 0)),
    ],
    ids=str,
)
def test_the_way_of_a_layer(product, layer, expected):
    way = route(layer, product)
    assert (way.operator, way.held, way.along, way.nz, way.group) == expected
    assert way.parts == (layer.n,)


@pytest.mark.parametrize(
    ("inputs", "rounding"),
    [
        (Inputs(4, grid=2), "npu_dynamic_quant"),
        (Inputs(4, grid=2, transform="kronecker", factors=(64, 64)), "npu_kronecker_quant"),
        (Inputs(4, grid=2, clip=0.9, transform="kronecker", factors=(64, 64)), "npu_kronecker_quant"),
        (Inputs(4, grid=2, transform="kronecker", factors=(1024, 4)), "npu_dynamic_quant"),
        (Inputs(4, grid=2, transform="hadamard", factors=(4096,)), "npu_dynamic_quant"),
        (Inputs(4, grid=2, clip=0.9), "torch"),
        (Inputs(4, grid=1), "torch"),
        (Inputs(3, grid=2), "torch"),
        (Inputs(6, grid=2), "torch"),
        (Inputs(4, grid=1, transform="kronecker", factors=(64, 64)), "torch"),
        (Inputs(8, dynamic=False), "npu_quantize"),
        (Inputs(4, dynamic=False), "torch"),
    ],
    ids=str,
)
def test_what_rounds_inputs(inputs, rounding):
    assert route(Layer(4096, 4096, 4, 4096, inputs=inputs), A2).rounding == rounding


def test_a_small_rotation_is_fused():
    inputs = Inputs(8, grid=2, transform="hadamard", factors=(512,))
    assert route(Layer(256, 512, 8, 512, inputs=inputs), A2).rounding == "npu_rotate_quant"
    assert route(Layer(256, 64, 8, 64, inputs=Inputs(8, grid=2, transform="hadamard", factors=(64,))), A2).rounding == (
        "npu_dynamic_quant"
    )


@pytest.mark.parametrize("n", [65528, 65529, 65535, 65536, 128256, 151936, 262144])
def test_a_vocabulary_is_split(n):
    way = route(Layer(n, 4096), A2)
    assert sum(way.parts) == n
    assert all(-(-part // 8) * 8 <= 65535 for part in way.parts)  # int4 is padded to eights
    assert len(way.parts) == -(-n // 65528)
    assert all(part % 64 == 0 for part in way.parts[:-1])
    assert bool(way.notes) == (len(way.parts) > 1)


@pytest.mark.parametrize(
    ("layer", "product", "layout", "words"),
    [
        (
            Layer(4096, 4096, group=256),
            A2,
            "nz",
            r"group_size: 256 is not supported here: 64 or 128 .*or the layout nd",
        ),
        (Layer(4100, 4096, group=128), A2, "nz", "out_features: 4100 is not a multiple of 64"),
        (Layer(4096, 4090, group=4090), A3, "nz", "4096 x 4090 are not multiples of 16 x 64"),
        (Layer(24, 4096, group=4096), A3, "nz", "24 x 4096 are not multiples of 16 x 64"),
        (Layer(64, 48, group=16), A3, "auto", "group_size: 16 is not supported on 910C: one scale per channel$"),
        (
            Layer(64, 96, group=48),
            A2,
            "auto",
            "group_size: 48 is not supported on 910B4: 32, or one scale per channel$",
        ),
        (
            Layer(64, 4096, group=16),
            A3,
            "auto",
            "group_size: 16 is not supported on 910C: 32, 64, 128, 256, or one scale",
        ),
        (Layer(64, 4096, group=24), A3, "auto", "do not divide into groups of 24"),
        (Layer(64, 70000, group=70000), A2, "auto", "in_features: 70000 is not supported on 910B4: 1 to 65535"),
        (
            Layer(64, 64, dtype=torch.bfloat16, group=64),
            DUO,
            "auto",
            "dtype: bfloat16 is not supported on 310P: float16",
        ),
        (Layer(64, 64, dtype=torch.float64, group=64), A2, "auto", r"dtype: torch\.float64 is not supported"),
        (Layer(64, 64, 8, 64, inputs=Inputs()), DUO, "auto", r"activation: a scale per token .* 310P: static scales"),
        (Layer(64, 64, 8, 32, inputs=Inputs(dynamic=False)), DUO, "auto", "group_size: 32 with rounded inputs"),
        (Layer(64, 64, 8, 64, False, inputs=Inputs(dynamic=False)), DUO, "auto", "zero points with rounded inputs"),
        (Layer(64, 64, 8, 64, True, torch.float32, Inputs(dynamic=False)), DUO, "auto", "float32 with rounded inputs"),
        (Layer(64, 64, 4, 64, inputs=Inputs(4)), A2, "nz", r"layout: nz is for int8 weights.*64 x 64 held as int4"),
        (Layer(64, 64, dtype=torch.float32, group=64), A2, "nz", "layout: nz goes with float16 or bfloat16"),
    ],
    ids=str,
)
def test_no_way_and_what_would_do(layer, product, layout, words):
    with pytest.raises(ValueError, match=words):
        route(layer, product, layout)


def test_nz_where_it_is_asked_for_and_can_be():
    assert "graph mode" in route(Layer(4096, 4096, group=128), A2, "nz").notes[0]
    assert route(Layer(4096, 4096, group=128), A2, "nz").nz
    assert route(Layer(4096, 4096, group=4096), A2, "nz").along == "k"
    assert not route(Layer(4096, 4096, 8, 4096, inputs=Inputs()), A2, "nd").nz


def test_what_is_done_otherwise_than_asked_is_noted():
    assert "no 4-bit weights: codes of 4 bits are held as int8" in route(Layer(64, 128, group=64), DUO).notes[0]
    assert "2 products a call" in route(Layer(64, 128, 8, 64, inputs=Inputs()), A2).notes[0]
    assert "expanded for every call" in route(Layer(64, 128, group=64, dtype=torch.float32), A2).notes[0]
