"""The quantized linears on a GPU beside their peers, in one run: weights of 4 bits by rows of x, integers at many rows.

Times are of CUDA graphs, so that Python does not count, over copies of the weight that the L2 cache cannot hold.
Everyone is held against float64 before being timed; a peer that is not installed is said in one line. Without a GPU,
gpu_aot.py shows what can be known of the kernels.
"""

import statistics
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

from . import gpu_peers
from .gpu_peers import Contender, Stored

BITS, GROUP_SIZE = 4, 128
SIZES = ((4096, 4096), (8192, 8192), (28672, 8192))  # N, K
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 1024)  # M
INTEGER_ROWS = (512, 1024, 4096)
ROTATED_BYTES = 256 << 20
REPEATS = 20
# Largest error over the largest |y|: one rounding of the output and, where a 16-bit weight is written out first, as
# much again from the weight's; float32 sums of 8192 products add less than 1e-5.
LIMITS = {torch.bfloat16: 2**-7 + 1e-5, torch.float16: 2**-10 + 1e-5}
PEER_LIMIT = 0.02  # some sum in float16: wrong is what is farther off than that
INT8_PEAK = {"8.0": 624e12, "9.0": 1979e12}  # dense operations a second by capability, from NVIDIA's data sheets


def run(seed: int = 0, marlin: str | None = None) -> tuple[list[dict], list[dict]]:
    """(rows, checks). A row is one contender at one shape; a check compares its output with float64.

    marlin   the checkout of Marlin's repository to compile, with nvcc; None: not a contender
    `ratio_to_<peer>` is our time over the peer's; `spread` the interquartile range over the median; `bytes_per_s` what
    of the weight is read; `share_of_int8_peak` of the operations that the data sheet gives.
    """
    if not torch.cuda.is_available():
        raise ValueError("gpu-linear measures times on an NVIDIA GPU, and torch sees none; gpu-aot needs none")
    torch.manual_seed(seed)
    rows: list[dict] = []
    for n, k in SIZES:
        stored = Stored.random(n, k, BITS, GROUP_SIZE)
        contenders, missing = gpu_peers.contenders(stored, marlin)
        for line in missing if not rows else ():
            print(line)
        for m in ROWS:
            rows += _compare(contenders, m, stored)
        del contenders, stored
        stored = Stored.random(n, k, 8, k)
        for m in INTEGER_ROWS:
            rows += _compare(gpu_peers.integer_contenders(stored, m), m, stored)
    checks = [
        {
            "what": f"{row['kernel']} {row['shape']}: max relative error against float64",
            "limit": row["limit"],
            "value": row["max_relative_error"],
            "ok": row["max_relative_error"] <= row.pop("limit"),
        }
        for row in rows
    ]
    return rows, checks


def _compare(contenders: dict[str, Contender], m: int, stored: Stored) -> list[dict]:
    from ..kernels.triton.tune import seconds_per_call

    x = torch.randn(m, stored.k, device="cuda")
    rows, median = [], {}
    for name, contender in contenders.items():
        row = _about(stored, m) | {"kernel": name, "dtype": str(contender.dtype).removeprefix("torch.")}
        row |= _error(contender, x)
        row["limit"] = LIMITS[contender.dtype] if name.startswith("remanence") else PEER_LIMIT
        rows.append(row)
        if row["max_relative_error"] > row["limit"]:
            continue  # what is wrong is not timed
        given = contender.rows(x)
        copies = max(1, -(-ROTATED_BYTES // contender.bytes))
        weights = [contender.weight, *(deepcopy(contender.weight) for _ in range(copies - 1))]
        times = seconds_per_call([_bound(contender.call, given, weight) for weight in weights], REPEATS)
        quartiles = statistics.quantiles(times, n=4)
        median[name] = statistics.median(times)
        row |= {
            "copies": copies,
            "repeats": REPEATS,
            "best_s": min(times),
            "median_s": median[name],
            "spread": (quartiles[2] - quartiles[0]) / median[name],
            "bytes_per_s": contender.bytes / median[name],
        }
        peak = INT8_PEAK.get(_capability())
        if contender.integer and peak:
            row["share_of_int8_peak"] = 2 * m * stored.n * stored.k / median[name] / peak
    for row in rows:
        if row["kernel"].startswith("remanence") and "median_s" in row:
            peers = [name for name in median if not name.startswith("remanence")]
            row |= {f"ratio_to_{peer}": row["median_s"] / median[peer] for peer in peers}
    return rows


def _about(stored: Stored, m: int) -> dict[str, Any]:
    return {
        "shape": f"M={m} N={stored.n} K={stored.k}",
        "bits": stored.bits,
        "group_size": stored.group,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def _error(contender: Contender, x: torch.Tensor) -> dict[str, float]:
    given = contender.rows(x)
    exact = contender.exact(given)
    y = contender.call(given, contender.weight)
    return {"max_relative_error": float((y.double() - exact).abs().max() / exact.abs().max())}


def _bound(call: Callable, x: Any, weight: Any) -> Callable[[], object]:
    return lambda: call(x, weight)


def _capability() -> str:
    return ".".join(map(str, torch.cuda.get_device_capability()))
