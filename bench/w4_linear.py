"""The 4-bit linear beside its peers, in one run: decode (M = 1, 16) and prefill (M = 256) shapes.

Peers: F.linear on the dequantised weight in float32 and bfloat16, and torch's own int4 kernel for CPUs where
this torch has it. Contenders take turns, and the cache is swept before each call: in a model, the weights of
every other layer pass through it between two calls of the same one.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..kernels import ops

BITS, GROUP_SIZE = 4, 64
SIZES = ((2048, 2048), (4096, 4096))  # N, K
REPEATS = {1: 30, 16: 20, 256: 7}  # by M: rows of x
SWEEP_BYTES = 64 << 20  # twice the last-level cache of the machine it was written on

# Largest error over the largest |y|: some tens of float32 roundings; one rounding of the output to bfloat16.
LIMITS = {torch.float32: 4e-6, torch.bfloat16: 2**-8 + 4e-6}

Contenders = dict[str, Callable[[], torch.Tensor]]


def run(seed: int = 0) -> tuple[list[dict], list[dict]]:
    """(rows, checks). A row is one contender at one shape; a check compares one of ours with float64.

    `spread` is the interquartile range over the median. `ratio_to_<peer>` is our time over the peer's: below
    1 we are faster; quote it only where `best_s` is near `median_s`: on a machine that is busy otherwise they
    part. `max_relative_error` is the largest error over the largest |y|, against float64.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict] = []
    for n, k in SIZES:
        codes = torch.randint(0, 2**BITS, (n, k), dtype=torch.uint8, generator=generator)
        scale = (0.5 + torch.rand(n, k // GROUP_SIZE, generator=generator)).div(k**0.5).to(torch.bfloat16)
        packed = ops.pack(codes, BITS)
        w = ops.dequantize(packed, scale, None, BITS, k)
        peer_weights = (w, w.bfloat16(), _aten_weight(codes, scale))
        for m, repeats in REPEATS.items():
            x = torch.randn(m, k, generator=generator)
            rows += _compare(_contenders(x, packed, scale, *peer_weights), x, w, repeats)
    checks = [
        {
            "what": f"{row['kernel']} {row['shape']}: max relative error against float64",
            "limit": LIMITS[row["dtype"]],
            "value": row["max_relative_error"],
            "ok": row["max_relative_error"] <= LIMITS[row["dtype"]],
        }
        for row in rows
        if row["kernel"].startswith("remanence")
    ]
    return [row | {"dtype": str(row["dtype"]).removeprefix("torch.")} for row in rows], checks


def _contenders(x, packed, scale, w, w_bf16, aten_weight) -> Contenders:
    x_bf16 = x.bfloat16()
    contenders: Contenders = {
        "remanence_fp32": lambda: ops.w4a16_linear(x, packed, scale, bits=BITS),
        "remanence_bf16": lambda: ops.w4a16_linear(x_bf16, packed, scale, bits=BITS),
        "linear_fp32": lambda: F.linear(x, w),
        "linear_bf16": lambda: F.linear(x_bf16, w_bf16),
    }
    if aten_weight is not None:
        mm = torch.ops.aten._weight_int4pack_mm_for_cpu
        contenders["aten_int4pack"] = lambda: mm(x_bf16, aten_weight[0], GROUP_SIZE, aten_weight[1])
    return contenders


def _aten_weight(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Torch's own layout: packed, and [K/G, N, 2] of scale and offset (0). None: not in this torch."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    return packed, torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()


def _compare(contenders: Contenders, x: torch.Tensor, w: torch.Tensor, repeats: int) -> list[dict]:
    seconds = _time_in_turns(contenders, repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    exact = x.double() @ w.double().T
    exact_bf16 = x.bfloat16().double() @ w.double().T
    rows = []
    for name, call in contenders.items():
        y = call()
        target = exact if y.dtype == torch.float32 else exact_bf16
        quartiles = statistics.quantiles(seconds[name], n=4)
        row = {
            "kernel": name,
            "shape": f"M={len(x)} N={len(w)} K={w.shape[1]}",
            "bits": BITS,
            "group_size": GROUP_SIZE,
            "dtype": y.dtype,
            "isa": ops.isa(),
            "threads": torch.get_num_threads(),
            "repeats": repeats,
            "best_s": min(seconds[name]),
            "median_s": median[name],
            "spread": (quartiles[2] - quartiles[0]) / median[name],
            "max_relative_error": float((y.double() - target).abs().max() / target.abs().max()),
        }
        if name.startswith("remanence"):
            peers = [peer for peer in contenders if not peer.startswith("remanence")]
            row |= {f"ratio_to_{peer}": median[name] / median[peer] for peer in peers}
        rows.append(row)
    return rows


def _time_in_turns(contenders: Contenders, repeats: int) -> dict[str, list[float]]:
    sweep = torch.zeros(SWEEP_BYTES // 4)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 2):  # two rounds of warm-up
        for name, call in contenders.items():
            sweep.add_(1)
            begin = time.perf_counter()
            call()
            elapsed = time.perf_counter() - begin
            if repeat >= 2:
                seconds[name].append(elapsed)
    return seconds
