"""The Triton kernels without a GPU: what each becomes on the machines they are for, read from the binaries.

The other half of gpu_linear.py, which takes the times. Every kernel of the package in the configurations it would be
started with: registers, spilled bytes, shared memory, matrix units, conversions in the inner loop. Nothing is run.
"""

import importlib.util
import os
import time
from collections.abc import Sequence

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
GROUPS = (128, 32, 4096)  # of 4096 input features: the last is one group for all


def run(
    seed: int = 0,  # noqa: ARG001 (nothing is random here)
    targets: Sequence[str] = TARGETS,
    groups: Sequence[int] = GROUPS,
) -> tuple[list[dict], list[dict]]:
    """(rows, checks). About a second a row; one row is one kernel on one target.

    `registers` are of a thread, `spilled` its bytes that do not fit them. `I2F` counts conversions of integers,
    `STS` stores to shared memory; static counts, and on AMD's only the former. `mma` names the matrix instruction:
    HMMA, HGMMA (Hopper's, by warp groups), UTCHMMA (Blackwell's), with I for integers.
    """
    _check_can_compile()
    import triton

    from ..kernels.triton import aot

    rows, checks = [], []
    for target in targets:
        for case in aot.cases(target, tuple(groups)):
            begin = time.perf_counter()
            row = aot.row(case, target)
            rows.append(row | {"triton": triton.__version__, "compile_s": time.perf_counter() - begin})
            checks += _checks(row, aot.MACHINES[target].shared_bytes)
    return rows, checks


def _check_can_compile() -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError("the kernels are compiled by Triton, which is not installed: pip install triton")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("TRITON_INTERPRET is set: kernels are interpreted in this process and cannot be compiled")


def _checks(row: dict, shared_bytes: int) -> list[dict]:
    about = ("bits", "grid", "group", "m", "n")
    name = " ".join([row["target"], row["kernel"], *(f"{field}={row[field]}" for field in about if field in row)])
    name += "".join(f" {field}" for field in ("zero", "shifted") if row.get(field))
    checks = [_at_most(f"{name}: spilled", 0, row["spilled"])]
    checks += [_at_most(f"{name}: shared memory, bytes", shared_bytes, row["shared_bytes"])]
    if row["kernel"] in ("gemv", "gemm"):
        checks += [_at_most(f"{name}: conversions of integers", 0, row["I2F"] + row.get("I2FP", 0))]
    if row["kernel"] == "gemm" and row["target"] == "sm_90":
        from_registers = row["mma"] == "HGMMA" and row["mma_from_registers"]
        checks += [
            {
                "what": f"{name}: wgmma, weight in registers",
                "limit": True,
                "value": from_registers,
                "ok": from_registers,
            }
        ]
    if row["kernel"] in ("gemm", "integer"):
        units = row["mma"] != "-"
        checks += [{"what": f"{name}: on the matrix units", "limit": True, "value": units, "ok": units}]
    return checks


def _at_most(what: str, limit: int, value: int) -> dict:
    return {"what": what, "limit": limit, "value": value, "ok": value <= limit}
