"""GPTQ on single layers of a 7B model's shapes: seconds and memory, ours and the peers', each in an own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..backends.memory import peak_rss, reset_peak, rss
from ..compress.gptq import gptq
from ..compress.hessian import Hessian
from ..compress.spec import QuantSpec
from .peers import LayerJob, run_layer
from .ptq_peers import activations

SHAPES = ((4096, 4096), (11008, 4096))  # N, K
SEQUENCES, TOKENS = 128, 512
BITS, GROUP_SIZE = 4, 128


def run(
    seed: int,
    place: Path,
    cache: Path,
    peers: Sequence[str],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    sequences: int = SEQUENCES,
) -> tuple[list[dict], list[dict]]:
    """(rows, checks). A row is one maker on one shape.

    hessian_s, solve_s, seconds   accumulation over all tokens, the rest, both
    peak_mib         resident memory beyond what the process had before the layer
    relative_error   tr((W-Q)H(W-Q)^T) / tr(WHW^T), each with its own H of the same rows
    """
    rows: list[dict] = []
    checks: list[dict] = []
    for N, K in shapes:
        weight, inputs = place / f"weight-{N}-{K}.npy", place / f"inputs-{K}.npy"
        np.save(weight, activations.weight(N, K, seed))
        if not inputs.exists():
            activations.write(inputs, K, sequences, TOKENS, seed)
        threads = torch.get_num_threads()
        found = []
        for maker in ("remanence", *peers):
            job = LayerJob(weight, inputs, BITS, GROUP_SIZE, place / f"{maker}-{N}-{K}", threads=threads)
            result = _ours(job) if maker == "remanence" else run_layer(maker, job, cache).result
            found.append(_row(f"{N}x{K}", maker, result))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        checks += _checks(found)
        rows += found
        weight.unlink()
    return rows, checks


def _row(shape: str, maker: str, result: dict[str, Any]) -> dict[str, Any]:
    head = {"layer": shape, "by": maker}
    if "reason" in result:
        return head | {"reason": result["reason"]}
    hessian, solve = result["seconds"]["hessian"], result["seconds"]["solve"]
    times = {"hessian_s": hessian, "solve_s": solve, "seconds": hessian + solve}
    return head | times | {"peak_mib": result["peak_rss"] / 2**20, "relative_error": result["relative_error"]}


def _checks(rows: Sequence[dict[str, Any]]) -> list[dict]:
    ours, theirs = rows[0], [row for row in rows[1:] if "seconds" in row]
    checks = []
    for measure, word in (("seconds", "faster"), ("peak_mib", "smaller"), ("relative_error", "more exact")):
        if theirs:
            limit = min(row[measure] for row in theirs)
            what = f"{ours['layer']}: {measure} at most the {word} peer's"
            checks.append({"what": what, "limit": limit, "value": ours[measure], "ok": ours[measure] <= limit})
    return checks


def _ours(job: LayerJob) -> dict[str, Any]:
    order = {"weight": str(job.weight), "inputs": str(job.activations), "threads": job.threads}
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    command = [sys.executable, "-m", __name__, json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"layer: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(weight: str, inputs: str, threads: int) -> dict[str, Any]:
    """One layer, in this process."""
    torch.set_num_threads(threads)
    W = torch.from_numpy(np.load(weight))
    reset_peak()
    before = rss()
    seconds = {"hessian": 0.0, "solve": 0.0}
    hessian = Hessian(W.shape[1])
    for chunk in activations.read(inputs):
        x = torch.from_numpy(chunk)
        start = time.perf_counter()
        hessian.add(x)
        seconds["hessian"] += time.perf_counter() - start
    del x, chunk
    start = time.perf_counter()
    H = hessian.matrix()
    q, damp = gptq(W, H, QuantSpec(BITS, GROUP_SIZE), torch.float16)
    seconds["solve"] = time.perf_counter() - start
    peak = peak_rss() - before
    H, off = H.double(), q.dequantize().sub_(W)
    energy = [sum(float((part @ H * part).sum()) for part in M.double().split(1024)) for M in (off, W)]
    return {"seconds": seconds, "peak_rss": peak, "relative_error": energy[0] / energy[1], "damp": damp}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
