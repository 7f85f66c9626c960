"""Random layers through every route of an Ascend product, on torch-npu's operators in plain torch, beside the CPU's own
kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..compress.hadamard import OnlineHadamard, randomized
from ..compress.kronecker import Kronecker, factors
from ..kernels import ops
from ..kernels.ascend import products
from ..kernels.ascend.routes import EXPANDED, FUSED, Inputs, Layer
from . import ascend_reference

# N, K and the group: sides that no operator was made for, a group as wide as the layer, groups that no product takes.
SHAPES = (
    (1, 64, 32),
    (63, 96, 96),
    (65, 40, 40),
    (24, 128, 64),
    (17, 256, 128),
    (64, 256, 256),
    (8, 24, 24),
    (33, 192, 192),
    (5, 48, 48),
    (7, 96, 48),
)
INPUTS = (
    None,
    Inputs(8),
    Inputs(8, grid=ops.NARROW),
    Inputs(8, grid=ops.ASYMMETRIC),
    Inputs(8, dynamic=False),
    Inputs(8, dynamic=False, grid=ops.ASYMMETRIC),
    Inputs(4),
    Inputs(4, grid=ops.NARROW),
    Inputs(4, grid=ops.NARROW, clip=0.9),
    Inputs(4, dynamic=False),
    Inputs(4, grid=ops.NARROW, transform="kronecker"),
    Inputs(8, grid=ops.NARROW, transform="hadamard"),
)
# Norm of the difference, of the norm: rounding of the result; operators that turn x in 16 bits move codes besides.
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
TURNED = {8: 0.02, 4: 0.15}
ROWS = 5


def cases(seed: int, product: str, every: int = 1) -> Iterator[dict[str, Any]]:
    """{"layer", "route" or "refusal", "off", "limit", "exact"}: exact says that the weight came back bit for bit.

    every   of so many, one is taken
    """
    ascend_reference.install()
    generator = torch.Generator().manual_seed(seed)
    choices = itertools.product((2, 3, 4, 8), SHAPES, (True, False), LIMITS, INPUTS)
    for bits, (n, k, group), symmetric, dtype, inputs in itertools.islice(choices, None, None, every):
        transform = None if inputs is None else _transform(inputs.transform, k, generator)
        layer = Layer(n, k, bits, group, symmetric, dtype, _with_factors(inputs, k))
        yield _one(layer, product, transform, generator)


def _with_factors(inputs: Inputs | None, k: int) -> Inputs | None:
    if inputs is None or not inputs.transform:
        return inputs
    sizes = factors(k) if inputs.transform == "kronecker" else (k,)
    return replace(inputs, factors=sizes)


def _transform(kind: str, k: int, generator: torch.Generator) -> nn.Module | None:
    if kind == "kronecker":
        left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in factors(k))
        return Kronecker(left, right, torch.rand(k, generator=generator) + 0.5)
    return OnlineHadamard(*randomized(k, generator)) if kind == "hadamard" else None


def _one(layer: Layer, product: str, transform: nn.Module | None, generator: torch.Generator) -> dict[str, Any]:
    n, k, dtype, inputs = layer.n, layer.k, layer.dtype, layer.inputs
    codes = torch.randint(0, 2**layer.bits, (n, k), dtype=torch.uint8, generator=generator)
    packed, shape = ops.pack(codes, layer.bits), (n, k // layer.group)
    kinds = list(LIMITS)
    scale_dtype, bias_dtype = (kinds[int(i)] for i in torch.randint(0, len(kinds), (2,), generator=generator))
    scale = (torch.rand(shape, generator=generator) * 0.02 + 1e-3).to(scale_dtype)
    zero = torch.randint(0, 2**layer.bits, shape, dtype=torch.uint8, generator=generator)
    stored = packed, scale, None if layer.symmetric else zero
    x = torch.randn(ROWS, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(bias_dtype)
    static = None
    if inputs is not None and not inputs.dynamic:
        shift = 3 if inputs.grid == ops.ASYMMETRIC else 0
        static = torch.tensor([0.03]), torch.tensor([shift], dtype=torch.int32)
    with ascend_reference.on(product) as chip:
        try:
            weight = products.lay(*stored, layer, x.device, chip)
        except ValueError as refusal:
            return {"layer": layer, "refusal": str(refusal)}
        found = products.linear(x, weight, bias, static, transform)
    wanted = _on_cpu(x if transform is None else transform(x), stored, bias, layer, static)
    off = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    turned = weight.route.rounding in FUSED
    assert inputs is not None or not turned
    same = (a is b or torch.equal(a, b) for a, b in zip(weight.stored(), stored, strict=True))  # type: ignore[arg-type]
    limit = TURNED[inputs.bits] if turned and inputs is not None else LIMITS[dtype]
    return {"layer": layer, "route": weight.route, "off": off, "limit": limit, "exact": all(same)}


def _on_cpu(x: Any, stored: tuple[Any, Any, Any], bias: Any, layer: Layer, static: Any) -> torch.Tensor:
    inputs = layer.inputs
    if inputs is None:
        return ops.w4a16_linear(x, *stored, bias, layer.bits)
    grid = static or (None, None)
    rounding = inputs.bits, inputs.grid, inputs.clip
    return ops.integer_linear(x, *stored, bias, layer.bits, *rounding, *grid)


def summary(found: list[dict[str, Any]], product: str) -> list[dict[str, Any]]:
    """Rows by operator and what rounds its inputs."""
    made: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for case in found:
        if "route" in case:
            way = case["route"]
            operator = "expanded, then torch's product" if way.operator == EXPANDED else way.operator
            made.setdefault((operator, way.held, way.rounding or "none"), []).append(case)
    rows = [
        {
            "product": product,
            "operator": operator,
            "weights": held,
            "inputs rounded by": rounding,
            "layers": len(cases_),
            "worst": max(case["off"] for case in cases_),
            "beyond the limit": sum(case["off"] > case["limit"] or not case["exact"] for case in cases_),
        }
        for (operator, held, rounding), cases_ in sorted(made.items())
    ]
    refused = sum("refusal" in case for case in found)
    return [*rows, {"product": product, "operator": "refused", "layers": refused}]
