"""How a packed linear layer runs on an Ascend product: which operator of torch-npu, in which layout; or why it cannot.

Every rule is of the operators' documentation (op-plugin, docs/zh/custom_APIs/torch_npu) or of a check in their C++.
Most are enforced on the device alone, with errors that name neither the layer nor a remedy: so all stand here too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...backends.ascend_products import Product
from ..reference import ASYMMETRIC, NARROW, SYMMETRIC

WEIGHT_ONLY = "npu_weight_quant_batchmatmul"
INTEGER = "npu_quant_matmul"
EXPANDED = "mm"  # no operator of torch-npu: the weight made float32, and torch's product
MOST = 65535  # features on either side of a product
_WIDEST = 65528  # outputs of one product: int4 is padded to eights
FUSED = ("npu_kronecker_quant", "npu_rotate_quant")  # that turn x and round it
LAYOUTS = ("auto", "nd", "nz")
_NZ_GROUPS = (64, 128)
KRONECKER_TOKENS = 32768  # rows that npu_kronecker_quant takes at once: later releases of CANN take more
_KRONECKER_SIZE = 256  # of its matrices


@dataclass(frozen=True)
class Inputs:
    """How a layer rounds its input.

    dynamic    a scale per token; else one, known beforehand
    grid       as in kernels/reference.py; the fused operators know the narrow one
    clip       share of a token's range that is kept
    transform  in front of it: "", "kronecker" or "hadamard"; factors: sizes of its matrices, or of the one matrix
    """

    bits: int = 8
    dynamic: bool = True
    grid: int = SYMMETRIC
    clip: float = 1.0
    transform: str = ""
    factors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layer:
    """y [..., n] = x [..., k] times n rows of codes of `bits` bits.

    group      input features that share a scale; k: all do
    symmetric  there are no zero points
    dtype      of x
    inputs     None: x is multiplied as it is
    """

    n: int
    k: int
    bits: int = 4
    group: int = 128
    symmetric: bool = True
    dtype: torch.dtype = torch.float16
    inputs: Inputs | None = None


@dataclass(frozen=True)
class Route:
    """operator  that multiplies
    held      "int4" (eight codes in an int32) or "int8"
    along     the axis that int4 codes lie along in memory: "n", or "k" of a weight that is then transposed
    nz        the weight is in the device's own layout FRACTAL_NZ
    parts     rows of the weight in each call, for an operator takes no more than MOST
    group     what the operator is told: 0 where a row has one scale
    rounding  what rounds x: an operator of torch-npu, "torch", or "" where nothing does
    sums      the operator gives integers, which are scaled by torch
    notes     what a person should know
    """

    operator: str
    held: str
    along: str = "n"
    nz: bool = False
    parts: tuple[int, ...] = ()
    group: int = 0
    rounding: str = ""
    sums: bool = False
    notes: tuple[str, ...] = ()


def route(layer: Layer, product: Product, layout: str = "auto") -> Route:
    """The way that a layer takes; ValueError, with what would do instead, where there is none.

    layout   of LAYOUTS: nd, nz where an engine needs that, or auto
    """
    _check(layer, product)
    return _integer(layer, product, layout) if layer.inputs else _weight_only(layer, product, layout)


def _check(layer: Layer, product: Product) -> None:
    if layer.dtype == torch.bfloat16 and not product.bfloat16:
        raise ValueError(f"dtype: bfloat16 is not supported on {product.name}: float16")
    if layer.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype: {layer.dtype} is not supported on {product.name}: float16 or bfloat16")
    if not 1 <= layer.k <= MOST:
        raise ValueError(f"in_features: {layer.k} is not supported on {product.name}: 1 to {MOST}")
    if layer.n < 1:
        raise ValueError(f"out_features: {layer.n} is not supported on {product.name}: 1 or more")
    if layer.group < 1 or layer.k % layer.group:
        raise ValueError(f"group_size: {layer.k} input features do not divide into groups of {layer.group}")


def _weight_only(layer: Layer, product: Product, layout: str) -> Route:
    parts, notes = _parts(layer.n)
    if layer.dtype == torch.float32:
        if layout == "nz":
            raise ValueError("layout: nz goes with float16 or bfloat16 inputs, these are float32")
        note = "float32 inputs: the weight is expanded for every call; cast the model to 16 bits"
        return Route(EXPANDED, "int8", parts=parts, notes=(*notes, note))
    group = 0 if layer.group == layer.k else layer.group
    if group % 32:
        raise ValueError(f"group_size: {group} is not supported on {product.name}: {_groups(layer.k)}")
    if layout == "nz":
        notes = (*notes, "nz is for graph mode (torchair); by itself the operator takes nd")
    if layer.bits == 8 or not product.int4 or layer.k == 1:  # of one int4 input torch-npu takes eight for one output
        if layer.bits < 8:
            why = f"{product.name} has no 4-bit weights" if not product.int4 else "one input"
            notes = (*notes, f"{why}: codes of {layer.bits} bits are held as int8")
        return Route(WEIGHT_ONLY, "int8", nz=layout == "nz", parts=parts, group=group, notes=notes)
    if layer.bits < 4:
        notes = (*notes, f"codes of {layer.bits} bits are held as int4")
    if layout == "nz":
        _check_nz(layer, product, group)
    # Along k is what the documentation advises for one scale per channel; of the tiniest weights it is refused.
    along = "k" if not group and layer.k % 8 == 0 and layer.k > 8 and layer.n > 1 else "n"
    return Route(WEIGHT_ONLY, "int4", along, layout == "nz", parts, group, notes=notes)


def _check_nz(layer: Layer, product: Product, group: int) -> None:
    where = f"in the layout nz on {product.name}"
    if group and group not in _NZ_GROUPS:
        raise ValueError(f"group_size: {group} is not supported here: 64 or 128 ({where}), or the layout nd")
    if group and layer.n % 64:
        raise ValueError(f"out_features: {layer.n} is not a multiple of 64, which groups need {where}; nd would do")
    if not group and (layer.k % 64 or layer.n % 16):
        raise ValueError(
            f"in_features: {layer.n} x {layer.k} are not multiples of 16 x 64, which int4 needs {where}; nd would do"
        )


def _groups(k: int) -> str:
    """The widths that a product takes for k features, the common ones, in words."""
    fitting = [str(width) for width in (32, 64, 128, 256) if k % width == 0 and width < k]
    return ", ".join([*fitting, "or one scale per channel"]) if fitting else "one scale per channel"


def _integer(layer: Layer, product: Product, layout: str) -> Route:
    inputs = layer.inputs
    assert inputs is not None
    if inputs.dynamic and not product.per_token:
        raise ValueError(
            f"activation: a scale per token is not supported on {product.name}: static scales (a_dynamic=false)"
        )
    one_scale = layer.group == layer.k
    plain = (
        layer.symmetric
        and one_scale
        and layer.dtype != torch.float32
        and (inputs.grid != ASYMMETRIC or not inputs.dynamic)
    )
    if not plain and not product.sums:
        raise ValueError(_without_sums(layer, product))
    parts, notes = _parts(layer.n)
    if not one_scale:
        notes = (*notes, f"groups of {layer.group}: {layer.k // layer.group} products a call; one scale per channel")
    int4 = plain and layer.bits <= 4 and inputs.bits == 4 and inputs.dynamic and product.int4 and layer.k % 8 == 0
    if layer.bits <= 4 and not int4:
        notes = (*notes, f"codes of {layer.bits} bits are held as int8")
    # int4 cannot be NZ; on the 310P a weight has to be transposed first, which nobody has seen to work here.
    fits = not int4 and plain and product.int4 and layer.n % 32 == 0 and layer.k % 32 == 0 and len(parts) == 1
    if layout == "nz" and not fits:
        raise ValueError(
            f"layout: nz is for int8 weights with one scale per channel, both sides multiples of 32, at most {MOST}, "
            f"on A2 and A3; here are {layer.n} x {layer.k} held as {'int4' if int4 else 'int8'} on {product.name}: nd"
        )
    return Route(
        INTEGER,
        "int4" if int4 else "int8",
        "k" if int4 else "n",
        fits and layout != "nd",
        parts,
        rounding=_rounding(layer, inputs, product, int4),
        sums=not plain,
        notes=notes,
    )


def _without_sums(layer: Layer, product: Product) -> str:
    """What a product whose npu_quant_matmul gives float16 alone does not take."""
    if layer.group != layer.k:
        return (
            f"group_size: {layer.group} with rounded inputs is not supported on {product.name}: one scale per channel"
        )
    if not layer.symmetric:
        return f"symmetric: zero points with rounded inputs are not supported on {product.name}: symmetric weights"
    return f"dtype: {layer.dtype} with rounded inputs is not supported on {product.name}: float16"


def _rounding(layer: Layer, inputs: Inputs, product: Product, int4: bool) -> str:
    """The fused operators round on the narrow grid, and no other; npu_quantize rounds on a given one."""
    if not inputs.dynamic:
        return "npu_quantize" if inputs.bits == 8 else "torch"
    if inputs.grid != NARROW or layer.dtype == torch.float32 or not (int4 or inputs.bits == 8):
        return "torch"
    if inputs.transform == "kronecker" and int4 and product.fused and _multiplies(inputs.factors):
        return "npu_kronecker_quant"
    if inputs.clip != 1:
        return "torch"
    if inputs.transform == "hadamard" and product.fused and _rotates(layer.k, inputs.factors):
        return "npu_rotate_quant"
    return "npu_dynamic_quant"


def _multiplies(factors: tuple[int, ...]) -> bool:
    return factors[-1] % 8 == 0 and max(factors) <= _KRONECKER_SIZE


def _rotates(k: int, factors: tuple[int, ...]) -> bool:
    return 128 <= k <= 16000 and k % 8 == 0 and 16 <= factors[0] <= 1024 and k % factors[0] == 0


def _parts(n: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Rows of each call, equal parts but for the last, and multiples of 64; and a note where there are several."""
    count = -(-n // _WIDEST)
    width = -(-n // count)
    width = min(-(-width // 64) * 64, _WIDEST // 64 * 64) if count > 1 else width
    parts = tuple(min(width, n - start) for start in range(0, n, width))
    return parts, (f"{n} output features: {len(parts)} products",) if len(parts) > 1 else ()
