"""The linear layers that are timed against each other on a CPU: ours, and what others offer for the same weights.

A contender takes a weight [N, K] and gives copies of it in its own form, more than the last-level cache holds, and a
call x, copy -> y. Copies rotate: in a model the weights of all other layers pass through the cache between two calls.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import _C, ops
from ..kernels.cpu import in_large_pages
from . import kernel_ggml as ggml

GROUP_SIZE = 128
_BNB_GROUP = 64  # bitsandbytes has a scale for each 64 weights
_ROTATE = 320 << 20  # bytes: ten times the last-level cache of the machine this was written on

Call = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Contender:
    """
    make    weight float32 [N, K] -> one copy in its own form
    call    x [M, K], copy -> y [M, N]
    dtype   of x
    bits    of a weight: 16 for a dense one
    ours    whether it is one of ours
    dense   the copy -> the weights that it stands for, float32 [N, K]; None: those it was made of, nearly
    """

    make: Callable[[Tensor], Any]
    call: Call
    dtype: torch.dtype
    bits: int
    ours: bool = False
    dense: Callable[[Any], Tensor] | None = None


@dataclass(frozen=True)
class Ours:
    """A weight in the run-time layout, and what the ops take with it."""

    blocks: Tensor
    n: int
    k: int
    bits: int

    @property
    def groups(self) -> int:
        return self.k // GROUP_SIZE


def quantized(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """codes uint8 [N, K], scale bfloat16 [N, K/128]: symmetric round-to-nearest."""
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    scale = (groups.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).bfloat16()
    codes = (groups / scale.float()[..., None]).round() + 2 ** (bits - 1)
    return codes.clamp(0, 2**bits - 1).to(torch.uint8).flatten(1), scale


def _ours(weight: Tensor, bits: int) -> Ours:
    codes, scale = quantized(weight, bits)
    n, k = weight.shape
    return Ours(ops.prepack(ops.pack(codes, bits), scale, None, bits, k), n, k, bits)


def four_bits(weight: Tensor) -> Ours:
    return _ours(weight, 4)


def eight_bits(weight: Tensor) -> Ours:
    return _ours(weight, 8)


def _dense(w: Ours) -> Tensor:
    return torch.ops.remanence.dequantize_prepacked(w.blocks, w.n, w.k, w.groups, w.bits, 2, False)


def _weight_only(x: Tensor, w: Ours) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():  # as QuantLinear calls it
        return torch.ops.remanence.prepacked_linear(x, w.blocks, None, w.n, w.groups, w.bits, 2, False)


def _integer(x: Tensor, w: Ours) -> Tensor:
    form = (w.n, w.groups, w.bits, 2, False)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.remanence.prepacked_integer_linear(x, None, None, w.blocks, None, *form, 8, True, 1.0)


def _kernel(x: Tensor, w: Ours, integer: bool) -> Tensor:
    """Without torch's dispatcher and our checks, as the peers that are libraries in C are called."""
    y = x.new_empty(len(x), w.n)
    size = (len(x), w.n, x.shape[1], w.groups, w.bits)
    start = (x.data_ptr(), ops.SCALE_TYPES[x.dtype], w.blocks.data_ptr(), 0, 0, 2, 0, 0, 0, y.data_ptr(), *size)
    threads = torch.get_num_threads()
    if integer:
        _C.integer_linear(*start, 8, ops.SYMMETRIC, 1.0, 0, 0, threads)
    else:
        _C.linear(*start, threads)
    return y


def _onednn(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), 1)


def _aten(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = quantized(weight, 4)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    return packed, torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()


def _fbgemm(weight: Tensor) -> Any:
    scale = float(weight.abs().max() / 127)
    return torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(weight, scale, 0, torch.qint8), None)


def _bitsandbytes(weight: Tensor) -> Any:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, compress_statistics=False
    )
    layer.weight = bnb.nn.Params4bit(
        weight.bfloat16(), requires_grad=False, quant_type="nf4", compress_statistics=False, blocksize=_BNB_GROUP
    )
    layer = layer.to("cpu").eval()
    layer(torch.zeros(1, weight.shape[1], dtype=torch.bfloat16))  # its first call lays the weight out
    return layer


def _in_ggml(kind: int) -> Callable[[Tensor], ggml.Weight]:
    return lambda weight: ggml.Weight(weight, kind)


def _torchao(weight: Tensor) -> Any:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
    quantize_(layer, PrototypeInt4WeightOnlyConfig(group_size=GROUP_SIZE, set_inductor_config=False))
    return layer


def _narrow() -> dict[str, Contender]:
    """The kernels as a CPU without AVX-512 runs them."""
    if "avx2" not in ops.available_isas() or ops.isa() == "avx2":
        return {}

    def on_avx2(integer: bool) -> Call:
        def call(x: Tensor, w: Ours) -> Tensor:
            ops.set_isa("avx2")
            try:
                return _kernel(x, w, integer)
            finally:
                ops.set_isa(widest)

        return call

    widest = ops.isa()
    return {
        f"{name} kernel avx2": Contender(four_bits, on_avx2(integer), torch.bfloat16, 4, True, _dense)
        for name, integer in (("W4A16", False), ("W4A8", True))
    }


def contenders() -> tuple[dict[str, Contender], list[str]]:
    """By name; and a line for each peer that is missing here."""
    bf16 = torch.bfloat16
    found = {
        "W4A16": Contender(four_bits, _weight_only, bf16, 4, True, _dense),
        "W4A16 kernel": Contender(four_bits, lambda x, w: _kernel(x, w, False), bf16, 4, True, _dense),
        "W4A16 float32": Contender(four_bits, _weight_only, torch.float32, 4, True, _dense),
        "W4A8": Contender(four_bits, _integer, bf16, 4, True, _dense),
        "W4A8 kernel": Contender(four_bits, lambda x, w: _kernel(x, w, True), bf16, 4, True, _dense),
        **_narrow(),
        "W8A8": Contender(eight_bits, _integer, bf16, 8, True, _dense),
        "torch bf16": Contender(Tensor.bfloat16, F.linear, bf16, 16, dense=Tensor.float),
        "torch int8": Contender(
            _fbgemm, lambda x, w: torch.ops.quantized.linear_dynamic(x, w, False), torch.float32, 8
        ),
    }
    missing = []
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found["oneDNN bf16"] = Contender(
            _onednn, lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), bf16, 16
        )
    else:
        missing.append("oneDNN bf16: this CPU or this torch has no bfloat16 in oneDNN")
    if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        call = torch.ops.aten._weight_int4pack_mm_for_cpu
        found["torch int4"] = Contender(_aten, lambda x, w: call(x, w[0], GROUP_SIZE, w[1]), bf16, 4)
    else:
        missing.append(f"torch int4: torch {torch.__version__} has no int4 product for CPUs")
    if (line := ggml.missing()) is not None:
        missing.append(line)
    else:
        for name, kind in ggml.TYPES.items():
            found[name] = Contender(_in_ggml(kind), lambda x, w: w(x), torch.float32, 4)
    for name, package, make in (
        ("bitsandbytes NF4", "bitsandbytes", _bitsandbytes),
        ("torchao int4", "torchao", _torchao),
    ):
        if not importlib.util.find_spec(package):
            missing.append(f"{name}: {package} is not installed")
        elif (error := _refusal(make)) is not None:
            missing.append(f"{name}: this {package} has no such layer for CPUs: {error}")
        else:
            found[name] = Contender(make, lambda x, w: w(x), bf16, 4)
    return found, missing


def _refusal(make: Callable[[Tensor], Any]) -> str | None:
    """None if a library makes a layer here; else its words. What they offer changes from version to version."""
    try:
        make(torch.ones(GROUP_SIZE, GROUP_SIZE))
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def copies(found: dict[str, Contender], weight: Tensor) -> dict[str, list[Any]]:
    """By contender more of one weight than the cache holds; what is made in the same way is shared."""
    made: dict[Any, list[Any]] = {}
    for contender in found.values():
        if contender.make not in made:
            first = contender.make(weight)
            size = weight_bytes(contender, first, weight)
            more = max(1, -(-_ROTATE // size) - 1)
            made[contender.make] = [first, *(_another(first, contender, weight) for _ in range(more))]
    return {name: made[contender.make] for name, contender in found.items()}


def _another(first: Any, contender: Contender, weight: Tensor) -> Any:
    copy = _copy(first)
    return contender.make(weight) if copy is None else copy


def _copy(first: Any) -> Any:
    """In memory of its own; None for what has to be made anew."""
    if isinstance(first, Tensor) and first.layout == torch.strided:
        return first.clone()
    if isinstance(first, tuple):
        return tuple(map(_copy, first))
    if isinstance(first, Ours):
        return replace(first, blocks=in_large_pages(torch.empty_like(first.blocks)).copy_(first.blocks))
    return first.copy() if isinstance(first, ggml.Weight) else None


def _bytes(copy: Any) -> int:
    if isinstance(copy, Ours):
        return copy.blocks.numel()
    if isinstance(copy, Tensor):
        return copy.numel() * copy.element_size()
    if isinstance(copy, ggml.Weight):
        return copy.bytes
    if isinstance(copy, tuple):
        return sum(_bytes(part) for part in copy)
    return 0


def weight_bytes(contender: Contender, copy: Any, weight: Tensor) -> int:
    """What a call has to read of the weight."""
    return _bytes(copy) or weight.numel() * contender.bits // 8
