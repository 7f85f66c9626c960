"""The ops of this package, as torch sees them: `torch.ops.remanence.*`, with shapes, errors and gradients.

Torch's dispatcher picks the implementation: the native kernels on a CPU, Triton's on a GPU, torch-npu's operators on an
Ascend NPU, the plain reference elsewhere. On a CPU a
weight may be laid out anew for it, once (`prepack`), and is then multiplied at the speed of memory.
Shapes: N output features, K input features, G groups a row (group size K / G), M rows of x (leading axes).
A weight is w = (codes - zero) * scale, codes in 0 .. 2^bits - 1, stored as compressed-tensors stores them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import checks, gpu, npu, reference, shapes
from .checks import BITS, SCALE_TYPES
from .reference import ASYMMETRIC, NARROW, SYMMETRIC, packed_width

try:
    from . import cpu
    from ._C import available_isas, isa, set_isa
except ImportError as error:  # installed where there was no compiler
    from .absent import available_isas, isa, said, set_isa

    cpu = None  # type: ignore[assignment]
    said(error)

__all__ = [
    "ASYMMETRIC",
    "BITS",
    "NARROW",
    "SCALE_TYPES",
    "SYMMETRIC",
    "available_isas",
    "clip_error",
    "dequantize",
    "gptq_block",
    "hadamard",
    "integer_linear",
    "isa",
    "pack",
    "packed_width",
    "prepack",
    "prepacked_integer_linear",
    "prepacked_linear",
    "quantize_per_token",
    "set_isa",
    "sparse24_linear",
    "unpack",
    "unprepack",
    "w4a4_linear",
    "w4a8_linear",
    "w4a16_linear",
    "w8a8_linear",
]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes uint8 [N, K] -> packed uint8 [N, 4 * ceil(K*bits/32)]; ValueError on a code above 2^bits - 1.

    A row is one stream of bits, lowest first: at 4 bits the low nibble is the even k.
    """
    return torch.ops.remanence.pack(codes, bits)


def unpack(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """packed uint8 [N, 4 * ceil(K*bits/32)] -> codes uint8 [N, K]; exactly undoes `pack`."""
    return torch.ops.remanence.unpack(packed, bits, k)


def dequantize(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, k: int) -> torch.Tensor:
    """packed uint8, scale float [N, G], zero uint8 [N, G] or None (2^(bits-1)) -> w float32 [N, K].

    ValueError where a shape or dtype does not fit, or K does not divide into G groups.
    """
    return torch.ops.remanence.dequantize(packed, scale, zero, bits, k)


def w4a16_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bits: int = 4,
) -> torch.Tensor:
    """x [..., K] @ w.T + bias [N] -> y [..., N] in x's dtype (float32, float16 or bfloat16).

    The weight as in `dequantize`, at 2, 3, 4 or 8 bits; all arithmetic in float32. Gradients flow to x and
    bias, never to the weight. ValueError where a shape or dtype does not fit.
    """
    return torch.ops.remanence.w4a16_linear(x, packed, scale, zero, bias, bits)


def prepack(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None, bits: int = 4, k: int | None = None
) -> torch.Tensor:
    """The weight as in `dequantize` -> uint8 [bytes], the CPU's run-time layout: blocks of 64 rows, N padded to whole
    ones and each group to whole 32-bit words (csrc/blocks.h). k: by default as many features as `packed` can hold.
    """
    checks.check_bits(bits)
    if k is None:
        k = packed.shape[-1] * 8 // bits if packed.dim() else 0
    return torch.ops.remanence.prepack(packed, scale, zero, bits, k)


def unprepack(
    blocks: torch.Tensor, n: int, k: int, groups: int, bits: int, scale_dtype: torch.dtype, zero: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Exactly undoes `prepack` -> packed, scale, zero; `zero` says whether there is one."""
    scale_type = checks.scale_type(scale_dtype)
    packed, scale, zeros = torch.ops.remanence.unprepack(blocks, n, k, groups, bits, scale_type, zero)
    return packed, scale, zeros if zero else None


def prepacked_linear(
    x: torch.Tensor,
    blocks: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    groups: int,
    bits: int,
    scale_dtype: torch.dtype,
    zero: bool,
) -> torch.Tensor:
    """`w4a16_linear` with a weight from `prepack`."""
    scale_type = checks.scale_type(scale_dtype)
    return torch.ops.remanence.prepacked_linear(x, blocks, bias, n, groups, bits, scale_type, zero)


def quantize_per_token(
    x: torch.Tensor, bits: int, grid: int = SYMMETRIC, clip: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every row of x [..., K] on a grid of its own: codes int8 [..., K] from -2^(bits-1) to 2^(bits-1) - 1, scale
    float32 [..., 1], zero int32 [..., 1]; x ~ (codes - zero) * scale.

    SYMMETRIC   zero 0, scale = clip * max|x| / ((2^bits - 1) / 2), and -max|x| gets the lowest code. This grid and the
                asymmetric one are compressed-tensors'; as True and False they may be given, too
    ASYMMETRIC  from clip * min(x, 0) to clip * max(x, 0)
    NARROW      zero 0, scale = clip * max|x| / (2^(bits-1) - 1), without the lowest code: as vLLM's CUDA kernels and
                npu_dynamic_quant round
    A row of zeros has scale 1; one that is not finite a scale that is not. ValueError for another dtype or width.
    """
    return torch.ops.remanence.quantize_per_token(x, bits, grid, clip)


def integer_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    x_bits: int = 8,
    grid: int = SYMMETRIC,
    clip: float = 1.0,
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] @ w.T + bias [N] -> y [..., N] in x's dtype, x rounded to integers of `x_bits` bits first.

    Rows of x by `quantize_per_token`, or on the grid of x_scale float32 [1] and x_zero int32 [1]; the weight as in
    `dequantize`. Sums over a group are exact integers, the rest is float32. Gradients pass the rounding of x as if it
    were not there, and flow to the bias. ValueError where a shape or dtype does not fit.
    """
    return torch.ops.remanence.integer_linear(x, x_scale, x_zero, packed, scale, zero, bias, bits, x_bits, grid, clip)


def _fixed(name: str, bits: int, x_bits: int) -> Callable[..., torch.Tensor]:
    def linear(x, packed, scale, zero=None, bias=None, x_scale=None, x_zero=None, grid=SYMMETRIC, clip=1.0):
        return getattr(torch.ops.remanence, name)(x, packed, scale, zero, bias, x_scale, x_zero, grid, clip)

    linear.__name__ = linear.__qualname__ = name
    linear.__doc__ = f"`integer_linear` with weights of {bits} bits and x rounded to {x_bits}."
    return linear


_FIXED = {"w8a8_linear": (8, 8), "w4a8_linear": (4, 8), "w4a4_linear": (4, 4)}  # bits of the weight, of x
w8a8_linear, w4a8_linear, w4a4_linear = (_fixed(name, *bits) for name, bits in _FIXED.items())


def prepacked_integer_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    blocks: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    groups: int,
    bits: int,
    scale_dtype: torch.dtype,
    zero: bool,
    x_bits: int = 8,
    grid: int = SYMMETRIC,
    clip: float = 1.0,
) -> torch.Tensor:
    """`integer_linear` with a weight from `prepack`."""
    scale_type = checks.scale_type(scale_dtype)
    return torch.ops.remanence.prepacked_integer_linear(
        x, x_scale, x_zero, blocks, bias, n, groups, bits, scale_type, zero, x_bits, grid, clip
    )


def sparse24_linear(
    x: torch.Tensor, compressed: torch.Tensor, bitmask: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., K] @ w.T + bias [N] -> y [..., N] in x's dtype (float32, float16 or bfloat16), with sums in float32; w is
    2:4, and stored as compress/formats/sparse24.py stores it.

    compressed  [N, K/2] in one of these dtypes: of every four adjacent inputs the two values that are kept
    bitmask     uint8 [N, ceil(K/8)], bit k % 8 of byte k // 8: whether input k is kept
    What is not finite in x gives what a dense weight with zeros gives. Nothing checks that two of each four are marked:
    where it is not so, a row of w has its values at other places, and nothing beyond the tensors is read.
    Gradients flow to x and bias, never to the weight. ValueError where a shape or dtype does not fit.
    """
    return torch.ops.remanence.sparse24_linear(x, compressed, bitmask, bias)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2^j] times Sylvester's Hadamard matrix over the root of its size, in x's dtype; in float32 or wider.

    Its own inverse. ValueError for another size or dtype.
    """
    return torch.ops.remanence.hadamard(x)


def gptq_block(
    running: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group: torch.Tensor,
    kept: torch.Tensor | None = None,
    push: torch.Tensor | None = None,
    bits: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inner loop of GPTQ: columns i = 0 .. B-1 of `running` float32 [N, B] are rounded one after another to
    w = (code - zero) * scale; e = (running_i - w) / upper_ii, and e * upper[i, j] is taken from every later column j.

    upper  float32 [B, B], of which the upper triangle is read
    scale  [N, G], zero uint8 [N, G] or None as in `dequantize`; group int64 [B]: which of the G a column has
    kept   bool [N, B], False where the weight is to be zero; None: nowhere
    push   float32 [B, B] or None: running_i * push[i, j] is added to every later column j
    -> codes uint8 [N, B], errors e float32 [N, B]. ValueError where a shape, dtype or entry of `group` does not fit.
    """
    return torch.ops.remanence.gptq_block(running, upper, scale, zero, group, kept, push, bits)


def clip_error(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> torch.Tensor:
    """What rounding groups w float32 [M, G] costs on each of S grids: scale float32 [M, S], zero uint8 [M, S] or None
    for 2^(bits-1) -> sum of |(code - zero) * scale - w|^2.4 [M, S] float32, within 1e-5; infinite where the scale is 0.
    """
    return torch.ops.remanence.clip_error(w, scale, zero, bits)


def _pack(codes, bits):
    checks.check_range(codes, bits)
    return reference.pack(codes, bits)


def _gptq_block(running, upper, scale, zero, group, *rest):
    checks.check_groups(group, scale)
    return reference.gptq_block(running, upper, scale, zero, group, *rest)


_SCHEMAS = (
    "pack(Tensor codes, int bits) -> Tensor",
    "unpack(Tensor packed, int bits, SymInt k) -> Tensor",
    "dequantize(Tensor packed, Tensor scale, Tensor? zero, int bits, SymInt k) -> Tensor",
    "prepack(Tensor packed, Tensor scale, Tensor? zero, int bits, SymInt k) -> Tensor",
    "unprepack(Tensor blocks, SymInt n, SymInt k, int groups, int bits, int scale_type, bool zero) "
    "-> (Tensor, Tensor, Tensor)",
    "dequantize_prepacked(Tensor blocks, SymInt n, SymInt k, int groups, int bits, int scale_type, bool zero) "
    "-> Tensor",
    "w4a16_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, int bits) -> Tensor",
    "prepacked_linear(Tensor x, Tensor blocks, Tensor? bias, SymInt n, int groups, int bits, int scale_type, "
    "bool zero) -> Tensor",
    "quantize_per_token(Tensor x, int bits, int grid, float clip) -> (Tensor, Tensor, Tensor)",
    "integer_linear(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor packed, Tensor scale, Tensor? zero, "
    "Tensor? bias, int bits, int x_bits, int grid, float clip) -> Tensor",
    "prepacked_integer_linear(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor blocks, Tensor? bias, SymInt n, "
    "int groups, int bits, int scale_type, bool zero, int x_bits, int grid, float clip) -> Tensor",
    "sparse24_linear(Tensor x, Tensor compressed, Tensor bitmask, Tensor? bias) -> Tensor",
    "hadamard(Tensor x) -> Tensor",
    "gptq_block(Tensor running, Tensor upper, Tensor scale, Tensor? zero, Tensor group, Tensor? kept, Tensor? push, "
    "int bits) -> (Tensor, Tensor)",
    "clip_error(Tensor w, Tensor scale, Tensor? zero, int bits) -> Tensor",
)
_FIXED_ARGUMENTS = (
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, Tensor? x_scale, Tensor? x_zero, "
    "int grid, float clip) -> Tensor"
)
_DEFAULTS: dict[str, Callable] = {
    "pack": _pack,
    "gptq_block": _gptq_block,
}  # where the reference trusts what a check costs time for

_library = torch.library.Library("remanence", "DEF")


def _implement(name: str, key: str, implementation: Callable, check: Callable) -> None:
    """Every implementation checks first: anyone may call the op, and the kernels trust their addresses."""

    def op(*args):
        check(*args)
        return implementation(*args)

    def meta(*args):
        """It is asked as soon as one of the tensors has no content, whatever the others have."""
        checks.check_devices(args)
        return op(*args)

    _library.impl(name, meta if key == "Meta" else op, key)


def _define(schema: str) -> None:
    name = schema.partition("(")[0]
    check = getattr(checks, f"check_{name}")
    _library.define(schema)
    _implement(name, "CompositeExplicitAutograd", _DEFAULTS.get(name) or getattr(reference, name), check)
    _implement(name, "Meta", getattr(shapes, name), check)
    if cpu is not None:
        _implement(name, "CPU", getattr(cpu, name), check)
    if name in gpu.OPS:
        _implement(name, "CUDA", gpu.implementation(name, getattr(reference, name)), check)
    if name in npu.OPS:
        # "npu" is a name that torch does not know before torch-npu is loaded.
        _implement(name, "PrivateUse1", npu.implementation(name, getattr(reference, name)), check)


def _define_fixed(name: str, bits: int, x_bits: int) -> None:
    """`integer_linear` at given widths, under the name by which they are known."""

    def general(implementation: Callable) -> Callable:
        def fixed(x, packed, scale, zero, bias, x_scale, x_zero, grid, clip):
            return implementation(x, x_scale, x_zero, packed, scale, zero, bias, bits, x_bits, grid, clip)

        return fixed

    _library.define(name + _FIXED_ARGUMENTS)
    check = general(checks.check_integer_linear)
    _implement(name, "CompositeExplicitAutograd", general(reference.integer_linear), check)
    _implement(name, "Meta", general(shapes.integer_linear), check)
    if cpu is not None:
        _implement(name, "CPU", general(cpu.integer_linear), check)
    for key, device in (("CUDA", gpu), ("PrivateUse1", npu)):
        _implement(name, key, general(device.implementation("integer_linear", reference.integer_linear)), check)


def _differentiable(name: str, order: Sequence[str], dense: Callable[..., torch.Tensor], **known: int) -> None:
    """Gradients of a linear op whose arguments are called `order`: to x, as if it were not rounded, and to the bias.

    dense   the weight [N, K] of those of its arguments that it names
    known   what is not among the arguments
    """
    wanted = dense.__code__.co_varnames[: dense.__code__.co_argcount]
    to_x, to_bias = order.index("x"), order.index("bias")

    def save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:  # noqa: ARG001, torch passes it by name
        given = dict(zip(order, inputs, strict=True)) | known
        x, bias = given["x"], given["bias"]
        weight = {key: given[key] for key in wanted if key != "k"}
        ctx.save_for_backward(*(value for value in weight.values() if isinstance(value, torch.Tensor)))
        ctx.weight = [(key, None if isinstance(value, torch.Tensor) else (value,)) for key, value in weight.items()]
        ctx.k, ctx.x_dtype, ctx.bias_dtype = x.shape[-1], x.dtype, None if bias is None else bias.dtype

    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # [..., N]
        grads: list[torch.Tensor | None] = [None] * len(order)
        if ctx.needs_input_grad[to_x]:
            saved = iter(ctx.saved_tensors)
            weight = {key: next(saved) if value is None else value[0] for key, value in ctx.weight}
            grads[to_x] = (grad.float() @ dense(**weight, k=ctx.k)).to(ctx.x_dtype)
        if ctx.needs_input_grad[to_bias]:
            grads[to_bias] = grad.float().reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return tuple(grads)

    torch.library.register_autograd(f"remanence::{name}", backward, setup_context=save, lib=_library)


def _dense(packed, scale, zero, bits, k):
    return torch.ops.remanence.dequantize(packed, scale, zero, bits, k)


def _dense_prepacked(blocks, n, groups, bits, scale_type, zero, k):
    return torch.ops.remanence.dequantize_prepacked(blocks, n, k, groups, bits, scale_type, zero)


def _dense_24(compressed, bitmask, k):
    return reference.expand24(compressed, bitmask, k).float()


def _names(schema: str) -> list[str]:
    arguments = schema[schema.index("(") + 1 : schema.index(")")].split(",")
    return [argument.split()[-1] for argument in arguments]


for _schema in _SCHEMAS:
    _define(_schema)
    _name = _schema.partition("(")[0]
    if _name.endswith("linear"):
        _weight = _dense_24 if "bitmask" in _schema else _dense_prepacked if "blocks" in _schema else _dense
        _differentiable(_name, _names(_schema), _weight)
for _name, (_bits, _x_bits) in _FIXED.items():
    _define_fixed(_name, _bits, _x_bits)
    _differentiable(_name, _names(_name + _FIXED_ARGUMENTS), _dense, bits=_bits)
torch.library.register_autograd(
    "remanence::hadamard", lambda _, grad: torch.ops.remanence.hadamard(grad.contiguous()), lib=_library
)
