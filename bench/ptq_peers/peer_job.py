"""What the scripts of this folder share: a job in JSON, tensors in safetensors, a result in JSON, memory from Linux.

They run under another environment's interpreter (`python run_<peer>.py job.json`), with torch, transformers and the
peer installed and nothing of remanence.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, RESULT = "weights.safetensors", "result.json"


class CannotDo(Exception):
    """A cell that this peer has no way to do, in words."""


class Memory:
    """Peak memory of a with-block: `bytes`, the resident set's peak beyond what was resident when the block began.

    `exact`: the kernel let us forget earlier peaks; where it does not, what hides below an earlier peak is not seen.
    """

    def __enter__(self) -> Memory:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.exact = True
        except OSError:
            self.exact = False
        self._before = _status("VmRSS" if self.exact else "VmHWM")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = _status("VmHWM") - self._before


class Seconds:
    """Wall-clock seconds of all its with-blocks together: `total`."""

    total = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.total += time.perf_counter() - self._start


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no {field}; memory is measured on Linux only")


def batches(path: str) -> list[torch.Tensor]:
    """Calibration token ids: [B, T] int64 each, in order."""
    tensors = load_file(path)
    return [tensors[f"batch.{i}"] for i in range(len(tensors))]


def relative_error(W: torch.Tensor, Q: torch.Tensor, H: torch.Tensor) -> float:
    """tr((W-Q) H (W-Q)^T) / tr(W H W^T) in float64; W, Q [N, K], H [K, K]."""
    H = H.double()

    def energy(matrix: torch.Tensor) -> float:
        return sum(float((part @ H * part).sum()) for part in matrix.double().split(1024))

    return energy(W - Q) / energy(W)


def run(jobs: dict[str, Callable[[dict], dict]], packages: tuple[str, ...]) -> None:
    """Do the job in the file named on the command line: `jobs[kind](job)` gives the result, or raises.

    Whatever goes wrong is written as the result's `reason`: a cell that a peer fails is a row of the benchmark too.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    out = Path(job["out"])
    try:
        result = jobs[job["kind"]](job)
    except CannotDo as error:
        result = {"reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"reason": f"{type(error).__name__}: {error}"}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    result |= {"versions": versions, "threads": torch.get_num_threads()}
    (out / RESULT).write_text(json.dumps(result, indent=1, default=str) + "\n")


def save(out: str, weights: dict[str, torch.Tensor]) -> None:
    """float32, each with its own memory, as safetensors demands."""
    save_file({k: v.detach().float().clone().contiguous() for k, v in weights.items()}, str(Path(out) / WEIGHTS))
