"""Which kernel multiplies, and why not another: told from what torch's dispatcher and csrc/dispatch.cpp do.

Nothing is decided here. Whether an op has kernels for a device is asked of the dispatcher, which instruction set is in
use of the native library, what an op refuses of its own checks.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..backends.cpu import cpu_flags
from . import checks, gpu, ops
from .reference import packed_width


@dataclass(frozen=True)
class Case:
    """A product y [m, n] = x [m, k] @ w.T with a packed weight.

    device   kind of the device it is on, "cpu", "cuda" or "npu"
    dtype    of x
    bits     of the weight's codes; `group` neighbouring features of a row share a scale
    act      bits that x is rounded to; None: it is multiplied as it is
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    bits: int = 4
    group: int = 128
    act: int | None = None
    n: int = 4096
    k: int = 4096
    m: int = 1

    @property
    def op(self) -> str:
        return "w4a16_linear" if self.act is None else "integer_linear"


@dataclass(frozen=True)
class Choice:
    """kernel: that multiplies; arithmetic: how; others: why not, by kernel, the ones preferred to it first."""

    kernel: str
    arithmetic: str
    others: dict[str, str]


@dataclass(frozen=True)
class Kernel:
    """supports: None, or why this kernel does not multiply a case; floats, bfloats, integers: how it multiplies x in
    float32 and float16, in bfloat16, and rounded to integers."""

    name: str
    supports: Callable[[Case], str | None]
    floats: str
    bfloats: str
    integers: str

    def arithmetic(self, case: Case) -> str:
        if case.act is not None:
            return self.integers
        return self.bfloats if case.dtype == torch.bfloat16 else self.floats


def explain(case: Case) -> Choice:
    """The kernel that multiplies `case`, and why not the others; ValueError, as from the op, where none does."""
    _check(case)
    reasons = {kernel.name: kernel.supports(case) for kernel in KERNELS}
    chosen = next((kernel for kernel in KERNELS if reasons[kernel.name] is None), None)
    if chosen is None:
        raise ValueError(reasons["torch-npu"])
    others = {name: reason or f"{chosen.name} goes before it" for name, reason in reasons.items()}
    del others[chosen.name]
    return Choice(chosen.name, chosen.arithmetic(case), others)


def summary(device: str) -> str:
    """What multiplies on a kind of device, in a few words; with the reason where it is plain torch."""
    try:
        choice = explain(Case(device))
    except ValueError as refusal:
        return f"none for bfloat16: {refusal}"
    if choice.kernel != "reference":
        return choice.kernel
    return f"plain torch ({choice.others['triton' if device == 'cuda' else 'scalar']})"


def _check(case: Case) -> None:
    """By the op's own checks, on tensors without content."""
    checks.check_bits(case.bits)
    if case.group < 1 or case.k % case.group:
        raise ValueError(f"group: {case.k} input features do not divide into groups of {case.group}")
    x = torch.empty(case.m, case.k, dtype=case.dtype, device="meta")
    packed = torch.empty(case.n, packed_width(case.k, case.bits), dtype=torch.uint8, device="meta")
    scale = torch.empty(case.n, case.k // case.group, device="meta")
    if case.act is None:
        checks.check_w4a16_linear(x, packed, scale, None, None, case.bits)
    else:
        checks.check_integer_linear(x, None, None, packed, scale, None, None, case.bits, case.act, True, 1.0)


def _registered(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"remanence::{op}", key)


def _native(isa: str, machines: tuple[str, ...], flags: tuple[str, ...]) -> Callable[[Case], str | None]:
    """For an instruction set of csrc: the machines that it is compiled for, and what it asks of the CPU."""

    def supports(case: Case) -> str | None:
        if case.device != "cpu":
            return "for the CPU"
        if not _registered(case.op, "CPU"):
            return "the native kernels are not built"
        if machines and platform.machine() not in machines:
            return f"for {machines[0]}; this is {platform.machine()}"
        if isa == ops.isa():
            return None
        available = ops.available_isas()
        if isa in available:
            return f"{ops.isa()} is wider" if ops.isa() == available[-1] else f"set_isa chose {ops.isa()}"
        lacking = [flag for flag in flags if flag not in cpu_flags()]
        return f"this CPU lacks {', '.join(lacking)}" if lacking and cpu_flags() else "not in this build, or this CPU"

    return supports


def _triton(case: Case) -> str | None:
    if case.device != "cuda":
        return "for CUDA devices"
    if not _registered(case.op, "CUDA"):
        return f"has no {case.op}"
    return gpu.why_not(torch.device("cuda")) if torch.cuda.is_available() else "torch sees no CUDA device"


def _ascend(case: Case) -> str | None:
    if case.device != "npu":
        return "for Ascend NPUs"
    if not _registered(case.op, "PrivateUse1"):
        return f"has no {case.op}"
    if torch._C._get_privateuse1_backend_name() != "npu":
        return "torch-npu is not loaded"
    from .ascend.products import product_of
    from .ascend.routes import Inputs, Layer, route

    inputs = None if case.act is None else Inputs(case.act)
    layer = Layer(case.n, case.k, case.bits, case.group, True, case.dtype, inputs)
    try:
        route(layer, product_of(torch.device("npu", 0)))
    except ValueError as error:
        return str(error)
    return None


def _reference(case: Case) -> str | None:
    return "an NPU has torch-npu's operators, or none" if case.device == "npu" else None


_X86, _ARM = ("x86_64", "AMD64", "amd64"), ("aarch64", "arm64")
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
_VNNI = (*_AVX512, "avx512_vnni")
_FLOAT = "float32, product and sum in one step (FMA)"
_EXPANDED = "float32, the weight expanded first"

# The first that has nothing against it is taken.
KERNELS = (
    Kernel(
        "avx512_bf16",
        _native("avx512_bf16", _X86, (*_VNNI, "avx512_bf16")),
        _FLOAT,
        "bfloat16 pairs summed in float32; float32 where x is not finite",
        "bytes, four summed in one step (VNNI)",
    ),
    Kernel("avx512_vnni", _native("avx512_vnni", _X86, _VNNI), _FLOAT, _FLOAT, "bytes, four summed in one step (VNNI)"),
    Kernel("avx512", _native("avx512", _X86, _AVX512), _FLOAT, _FLOAT, "bytes, pairs summed in 16 bits"),
    Kernel("avx2", _native("avx2", _X86, _AVX2), _FLOAT, _FLOAT, "bytes, pairs summed in 16 bits"),
    Kernel("neon", _native("neon", _ARM, ("asimddp",)), _FLOAT, _FLOAT, "bytes, four summed in one step"),
    Kernel("scalar", _native("scalar", (), ()), "float32", "float32", "integers, one after another"),
    Kernel(
        "triton",
        _triton,
        "16 bits on the matrix units, summed in float32; float32 through torch's product",
        "bfloat16 on the matrix units, summed in float32",
        "bytes on the matrix units, exact sums of a group",
    ),
    Kernel(
        "torch-npu",
        _ascend,
        "16 bits on the matrix unit; of float32 the weight is expanded first",
        "bfloat16 on the matrix unit",
        "bytes or 4 bits on the matrix unit, exact sums",
    ),
    Kernel(
        "reference",
        _reference,
        "float32, the weight expanded",
        "float32, the weight expanded",
        "exact integers in float64",
    ),
)
