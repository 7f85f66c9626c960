"""What a kernel becomes on machines that are not here: compiled ahead of time, and read from the binary.

`build` compiles for a target without a GPU or a driver; `evidence` counts registers, spilled bytes, shared memory and
the instructions that say how a kernel works: which matrix units it uses, whether codes are converted (I2F, four times
the price of an addition), whether a weight takes the way through shared memory (STS). Counts are static, no times.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..checks import GRIDS
from . import launch, products
from .configs import Config, Machine, Task, default

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MACHINES = {
    "sm_80": Machine("sm_80", "8.0", 108, 163 << 10),
    "sm_90": Machine("sm_90", "9.0", 132, 227 << 10),
    "sm_100": Machine("sm_100", "10.0", 148, 227 << 10),
    "gfx942": Machine("gfx942", "gfx942", 304, 64 << 10),
}

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# The first that occurs is how the kernel multiplies. I stands for integers: IMMA, IGMMA.
_MATRIX = ("UTCIMMA", "UTCHMMA", "UTCQMMA", "IGMMA", "HGMMA", "QGMMA", "IMMA", "HMMA")
_COUNTED = ("I2F", "I2FP", "STS", "LDS", "LDGSTS", "LDG", "BAR", "SHFL", "PRMT", "LOP3")


_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_TYPES = {
    "gemv_kernel": {"q_ptr": "*i32"},
    "integer_kernel": {"a_scale_ptr": "*fp32", "a_ptr": "*i8", "a_zero_ptr": "*i32", "a_sums_ptr": "*i32"},
    "step_sums_kernel": {"a_ptr": "*i8", "a_zero_ptr": "*i32", "sums_ptr": "*i32"},
    "add_splits_kernel": {"part_ptr": "*fp32"},
    "quantize_kernel": {"codes_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*i32", "clip": "fp32"},
    "quantize_with_kernel": {"codes_ptr": "*i8", "scale_ptr": "*fp32", "zero_ptr": "*i32"},
    "hadamard_kernel": {"factor": "fp32"},
}


@dataclass(frozen=True)
class Case:
    """One kernel as launch.py would start it; `what` names it in a table."""

    what: dict[str, Any]
    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int
    dtype: str = "bf16"  # of x, scale, bias and y
    fused: bool = True


def cases(target: str, groups: tuple[int, ...] = (128, 32, 4096), k: int = 4096) -> Iterator[Case]:
    """Every kernel in its default configuration: bits, groups (k itself: one for a row), zero points, buckets of M."""
    on = MACHINES[target]
    for group in groups:
        for task in _products(group, k):
            yield product(task, default(on, task))
        for m in (16, 64, 1024):
            task = Task("integer", 8, group, True, "int8", k, k, m)
            yield product(task, default(on, task), shifted=True)
    for group, odd_k in ((1000, 1000), (100, 1000), (7, 63), (63, 63)):  # steps and bytes that groups do not fill
        for kernel, bits, m in (("gemv", 4, 1), ("gemm", 3, 16), ("gemm", 4, 16), ("integer", 4, 16)):
            task = Task(kernel, bits, group, True, "int8" if kernel == "integer" else "float16", 65, odd_k, m)
            yield product(task, default(on, task), shifted=kernel == "integer")
    yield Case(
        {"kernel": "add_splits"}, products.add_splits_kernel, {"HAS_BIAS": True, "SPLITS": 8, "BLOCK": 1024}, 4, 1
    )
    constants = {"GROUP": 128, "ROW_STEP": 1, "STEPS": 32, "BLOCK_K": 128}
    yield Case({"kernel": "step_sums"}, products.step_sums_kernel, constants, 4, 1)
    for number, grid in GRIDS.items():
        constants = launch.quantize_constants(k, 8, number)
        yield Case({"kernel": "quantize", "grid": grid}, launch.quantize_kernel, constants, 4, 1, fused=False)
    yield Case({"kernel": "quantize_with"}, launch.quantize_with_kernel, {"BITS": 8, "BLOCK": 4096}, 4, 1, fused=False)
    for n in (64, 4096, min(32768, on.shared_bytes // 4)):
        constants, warps = launch.hadamard_constants(n)
        yield Case({"kernel": "hadamard", "n": n}, launch.hadamard_kernel, constants, warps, 1)
    for bits in (2, 3, 4, 8):
        constants = {"GROUP": 128, "BITS": bits, "HAS_ZERO": True, "EVEN": True, **launch.DENSE_BLOCK}
        yield Case({"kernel": "dequantize", "bits": bits}, launch.dequantize_kernel, constants, 4, 1)


def _products(group: int, k: int) -> Iterator[Task]:
    for zero in (False, True):
        for bits in (2, 4, 8):
            yield Task("gemv", bits, group, zero, "bfloat16", k, k, 1)
        for bits in (2, 3, 4, 8):
            for m in (8, 16, 32, 64):
                yield Task("gemm", bits, group, zero, "bfloat16", k, k, m)
        for bits in (4, 8):
            for m in (16, 64, 1024):
                yield Task("integer", bits, group, zero, "int8", k, k, m)


def product(task: Task, config: Config, shifted: bool = False) -> Case:
    """A task of launch.py in a configuration; `shifted`: x has zero points too."""
    constants = {"HAS_BIAS": True, "SPLITS": 1}
    if task.kernel == "gemv":
        kernel, constants = products.gemv_kernel, constants | products.gemv_constants(config, task)
    else:
        kernel, constants = products.gemm_kernel, constants | products.tile_constants(config, task)
    what = {"kernel": task.kernel, "bits": task.bits, "group": task.group, "zero": task.zero, "m": task.m}
    if task.kernel == "integer":
        kernel, constants = products.integer_kernel, constants | {"SHIFTED": shifted, "ROW_STEP": 1}
        what |= {"shifted": shifted}
    return Case(what, kernel, constants, config.warps, config.stages, _SHORT.get(task.dtype, "bf16"))


def row(case: Case, target: str) -> dict:
    """What the case is, and what became of it on `target`."""
    tile = {
        name: case.constants[f"BLOCK_{name.upper()}"] for name in "nmk" if f"BLOCK_{name.upper()}" in case.constants
    }
    return {**case.what, "target": target, "tile": tile, "warps": case.warps, "stages": case.stages} | evidence(
        build(case, target), target
    )


def fits(case: Case, target: str) -> bool:
    """Whether it can be started, and spills nothing: asked of a candidate before time is spent on it."""
    try:
        found = row(case, target)
    except triton.runtime.errors.OutOfResources:
        return False
    return not found["spilled"] and found["shared_bytes"] <= MACHINES[target].shared_bytes


def build(case: Case, target: str):
    """Compiled for `target`, a key of TARGETS. Sizes count as divisible by 16, as those of models are."""
    names = case.kernel.arg_names
    # Stored scales and zero points lie row by row: the launcher makes a constant of a stride of 1.
    constants = case.constants | {name: 1 for name in ("scale_g", "zero_g") if name in names}
    pointers = {"q_ptr": "*u8", "zero_ptr": "*u8"} | _TYPES.get(case.kernel.__name__, {})
    types = {name: pointers.get(name) or (f"*{case.dtype}" if name.endswith("_ptr") else "i32") for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and types[name] != "fp32"
    }
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": case.fused}
    return triton.compile(source, target=TARGETS[target], options=options)


def evidence(compiled, target: str) -> dict:
    """registers, spilled (bytes a thread, or registers on AMD), shared_bytes, mma, and counts of instructions."""
    if target.startswith("gfx"):
        return {"shared_bytes": compiled.metadata.shared} | _of_amdgcn(compiled.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump tells no registers: {usage[-200:]!r}")
    registers, stack, local = map(int, found.groups())
    count = {name: len(re.findall(rf"\b{name}\b", assembly)) for name in (*_MATRIX, *_COUNTED)}
    return {
        "shared_bytes": compiled.metadata.shared,
        "registers": registers,
        "spilled": stack + local,
        "mma": next((name for name in _MATRIX if count[name]), "-"),
        "mma_from_registers": _from_registers(assembly),
        **{name: count[name] for name in _COUNTED},
    }


def _from_registers(assembly: str) -> bool:
    """Whether wgmma takes its first operand from registers: `HGMMA.64x16x16.F32 R24, R4, gdesc[UR8], ...`."""
    return bool(re.search(r"\b[HI]GMMA\.\S+ R\d+, R\d+, gdesc", assembly))


def _of_amdgcn(assembly: str) -> dict:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found.group(1)) if found else 0

    matrix = re.search(r"v_mfma_(\S+)", assembly)
    return {
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "mma": "mfma" if matrix else "-",
        "I2F": len(re.findall(r"v_cvt_f(?:32|16)_[iu]\d+|v_cvt_f32_ubyte", assembly)),
    }


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-300:]}")
    return done.stdout
