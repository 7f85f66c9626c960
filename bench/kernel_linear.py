"""One linear layer on a CPU: ours and its peers in turns, each window of timing between two probes of the machine.

A shared machine changes its pace within seconds, so a time alone says nothing: a row gives the share of the read
bandwidth that was measured beside it, and of the arithmetic that the same instructions gave from registers.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels import limits, ops
from .kernel_contenders import Contender, contenders, copies, weight_bytes

SIZES = ((2048, 2048), (4096, 4096), (11008, 4096), (2560, 10240))  # N, K
ROWS = (1, 4, 16, 64, 256)  # M
DECODE_ONLY = ("kernel",)  # contenders that are timed at M = 1 alone
ROUNDS = 5
WINDOW_S = 0.05
PROBE_BYTES = 256 << 20
PROBES = 3  # in a row, of which the median counts: what interrupts a window interrupts them as well
SLICE_S = 3e-3  # of the scheduler: longer calls may be interrupted once in each
FAST = 35e9  # bytes a second for each thread, above which reading the weights is not all that counts

# Largest error in the norm: rounding x to 8 bits costs up to a percent; bfloat16 has 8 bits, and peers round scales.
ERROR = {"A8": 2e-2, "A16": 4e-3}


@dataclass(frozen=True)
class Pace:
    """Of the machine at a time: bytes a second read, operations a second by the kind of numbers."""

    bandwidth: float
    peaks: dict[str, float]

    @classmethod
    def probe(cls) -> Pace:
        peaks = [limits.peaks(repeats=1) for _ in range(PROBES)]
        return cls(
            statistics.median(limits.read_bandwidth(PROBE_BYTES, repeats=1) for _ in range(PROBES)),
            {kind: statistics.median(found[kind] for found in peaks) for kind in peaks[0]},
        )

    def mean(self, other: Pace) -> Pace:
        peaks = {kind: (rate + other.peaks[kind]) / 2 for kind, rate in self.peaks.items()}
        return Pace((self.bandwidth + other.bandwidth) / 2, peaks)


@dataclass
class Timed:
    """Windows of one contender: seconds a call (the median of each), and the pace beside it."""

    seconds: list[float] = field(default_factory=list)
    pace: list[Pace] = field(default_factory=list)


def measure(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, checks) of all sizes."""
    rows: list[dict[str, Any]] = []
    found, missing = contenders()
    for n, k in SIZES:
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * k**-0.5
        held = copies(found, weight)
        for m in ROWS:
            names = [name for name in found if m == 1 or not any(word in name for word in DECODE_ONLY)]
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed + 1))
            rows += _compare({name: found[name] for name in names}, held, weight, x)
    rows += [{"kernel": line.partition(":")[0], "missing": line} for line in missing]
    return rows, checks(rows)


def _compare(
    found: dict[str, Contender], held: dict[str, list[Any]], weight: Tensor, x: Tensor
) -> list[dict[str, Any]]:
    inputs = {name: x.to(contender.dtype) for name, contender in found.items()}
    timed = _in_turns(found, held, inputs)
    rows = []
    for name, contender in found.items():
        copy, windows = held[name][0], timed[name]
        median = statistics.median(windows.seconds)
        size, operations = weight_bytes(contender, copy, weight), 2 * len(x) * weight.numel()
        beside = list(zip(windows.seconds, windows.pace, strict=True))
        kind = _arithmetic(name, contender, windows.pace[0].peaks)
        row: dict[str, Any] = {
            "kernel": name,
            "shape": f"M={len(x)} N={len(weight)} K={weight.shape[1]}",
            "bits": contender.bits,
            "isa": ops.isa() if contender.ours else "",
            "threads": torch.get_num_threads(),
            "windows": len(windows.seconds),
            "median_us": median * 1e6,
            "spread": (max(windows.seconds) - min(windows.seconds)) / median,
            "weights_gb_s": size / median / 1e9,
            "bandwidth_gb_s": statistics.median(pace.bandwidth for pace in windows.pace) / 1e9,
            "share_of_bandwidth": statistics.median(size / s / pace.bandwidth for s, pace in beside),
            "gflop_s": operations / median / 1e9,
            "arithmetic": kind,
            "peak_gops": statistics.median(pace.peaks[kind] for pace in windows.pace) / 1e9,
            "share_of_peak": statistics.median(operations / s / pace.peaks[kind] for s, pace in beside),
            "error": _error(contender, copy, weight, inputs[name]),
        }
        if contender.ours:
            row |= _ratios(timed, found, name)
        rows.append(row)
    return rows


def _in_turns(found: dict[str, Contender], held: dict[str, list[Any]], inputs: dict[str, Tensor]) -> dict[str, Timed]:
    timed = {name: Timed() for name in found}
    with torch.no_grad():
        for name, contender in found.items():
            for copy in held[name][:3]:
                contender.call(inputs[name], copy)
        before = Pace.probe()
        for _ in range(ROUNDS):
            for name, contender in found.items():
                seconds = _window(contender, held[name], inputs[name])
                after = Pace.probe()
                timed[name].seconds.append(seconds)
                timed[name].pace.append(before.mean(after))
                before = after
    return timed


def _window(contender: Contender, held: list[Any], x: Tensor) -> float:
    """Median seconds of a call; calls that the scheduler interrupted are left out, where enough remain."""
    clean, all_calls = [], []
    end = time.perf_counter() + WINDOW_S
    turn = 0
    while time.perf_counter() < end or turn < 1:
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        begin = time.perf_counter()
        contender.call(x, held[turn % len(held)])
        took = time.perf_counter() - begin
        all_calls.append(took)
        if resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches <= took // SLICE_S:
            clean.append(took)
        turn += 1
    return statistics.median(clean if len(clean) >= 3 else all_calls)


def _arithmetic(name: str, contender: Contender, peaks: dict[str, float]) -> str:
    """The kind of numbers that it multiplies."""
    if "A8" in name or name == "torch int8":
        return "int8"
    return "bfloat16" if contender.dtype == torch.bfloat16 and "bfloat16" in peaks else "float32"


def _error(contender: Contender, copy: Any, weight: Tensor, x: Tensor) -> float:
    dense = weight if contender.dense is None else contender.dense(copy)
    exact = x[:4].double() @ dense.double().T
    y = contender.call(x, copy)[:4].double()
    return float((y - exact).norm() / exact.norm())


def _ratios(timed: dict[str, Timed], found: dict[str, Contender], name: str) -> dict[str, float]:
    """Each peer's time over ours, the median over rounds: in a round they ran side by side."""
    mine = timed[name].seconds
    return {
        f"times_{peer}": statistics.median(a / b for a, b in zip(timed[peer].seconds, mine, strict=True))
        for peer, contender in found.items()
        if not contender.ours
    }


def checks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures that must hold. Arithmetic is asked for as a share of what this CPU's instructions give: 1100, 900
    and 1500 GFLOP/s on the machine the figures were set on, whose peaks are 2295 (int8) and 1146 (bfloat16)."""
    found = []
    for n, k in SIZES:
        at = {m: {row["kernel"]: row for row in rows if row.get("shape") == f"M={m} N={n} K={k}"} for m in ROWS}
        fast = at[1]["W4A16"]["bandwidth_gb_s"] * 1e9 >= FAST * torch.get_num_threads()
        where = f"N={n} K={k}"

        def add(what: str, value: float, limit: float, where: str = where) -> None:
            found.append({"what": f"{where} {what}", "limit": f">= {limit}", "value": value, "ok": value >= limit})

        for name, limit in (("W4A8", 0.90), ("W4A16", 0.78 if fast else 0.95)):
            add(f"M=1 {name}: share of the bandwidth", at[1][f"{name} kernel"]["share_of_bandwidth"], limit)
            add(f"M=1 {name}: times the best 4-bit peer", _best_peer(at[1][name], rows), 1.4 if fast else 1.15)
            add(f"M=16 {name}: times the best 4-bit peer", _best_peer(at[16][name], rows), 1.5)
        add("M=16 W4A8: share of the int8 peak", at[16]["W4A8"]["share_of_peak"], 0.48)
        add("M=256 W4A8: share of the int8 peak", at[256]["W4A8"]["share_of_peak"], 0.65)
        if at[16]["W4A16"]["arithmetic"] == "bfloat16":
            add("M=16 W4A16: share of the bfloat16 peak", at[16]["W4A16"]["share_of_peak"], 0.785)
            if "oneDNN bf16" in at[256]:
                add("M=256 W4A16: times oneDNN's bfloat16", at[256]["W4A16"]["times_oneDNN bf16"], 1.0)
        if "W4A8 kernel avx2" in at[1]:
            narrow, wide = at[1]["W4A8 kernel avx2"]["median_us"], at[1]["W4A8 kernel"]["median_us"]
            add("M=1 W4A8: AVX-512's time over AVX2's", wide / narrow, 1 / 1.1)
        row = at[1].get("W4A16 kernel avx2") or (at[1]["W4A16 kernel"] if ops.isa() == "avx2" else None)
        if row is not None:  # twice the prototype's 11 GB/s, or all that the memory gives
            add("M=1 W4A16, AVX2: GB/s", row["weights_gb_s"], min(22.0, 0.95 * row["bandwidth_gb_s"]))
    for row in rows:
        if "A8" in row["kernel"] or "A16" in row["kernel"]:
            limit = ERROR["A8" if "A8" in row["kernel"] else "A16"]
            if row["error"] > limit:
                found.append({"what": f"{row['kernel']} {row['shape']}: error", "limit": f"<= {limit}",
                              "value": row["error"], "ok": False})  # fmt: skip
    return found


def _best_peer(row: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """How many times faster than the fastest peer with 4-bit weights; infinitely, if there is none here."""
    peers = {other["kernel"] for other in rows if other.get("bits") == 4 and not other["isa"]}
    return min((row[f"times_{peer}"] for peer in peers), default=math.inf)
