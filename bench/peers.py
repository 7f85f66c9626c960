"""The field's own quantizers beside ours: GPTQModel and llm-compressor, each in an environment of its own.

Their requirements exclude each other and ours, so nothing of theirs is imported here. `environment` builds a virtual
environment once per set of pins; a job goes to a script of `ptq_peers/` under that environment's interpreter as a JSON
file, and comes back as dense weights and a result. Both run on CPU torch of one version, offline, with as many threads
as the job says.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

TORCH = "torch==2.13.0"
# Torch's own index has builds without the gigabytes for GPUs. Where it is out of reach, pip takes the others.
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
_SCRIPTS = Path(__file__).parent / "ptq_peers"
_STAMP = "installed.txt"


@dataclass(frozen=True)
class Peer:
    """How to have a peer: a script of `ptq_peers/`, and what pip installs beside TORCH.

    bare        installed without its dependencies: its own pins exclude TORCH (and it runs on TORCH all the same)
    variables   environment variables it needs
    """

    script: str
    requirements: tuple[str, ...]
    bare: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


PEERS = {
    "gptqmodel": Peer(
        "run_gptqmodel.py",
        (
            "transformers==5.23.0",
            "accelerate==1.15.0",
            "safetensors==0.8.0",
            "datasets==5.2.0",
            "defuser==0.0.28",
            "device-smi==0.5.7",
            "logbar==0.4.15",
            "ninja==1.13.2",
            "pillow>=12.3.0",
            "pypcre==0.6.4",
            "requests>=2.34.2",
            "setuptools>=84.2.1,<85",  # builds it, and its kernels on first use
            "threadpoolctl==3.8.0",
            "tokenicer==0.0.14",
            "torchao==0.18.0",
        ),
        bare=("gptqmodel==7.7.0",),
        variables={"GPTQMODEL_CPU_WORKERS": "2"},  # its own choice on two cores, one, locks up
    ),
    "llmcompressor": Peer(
        "run_llmcompressor.py",
        (
            "llmcompressor==0.14.0.1",
            "compressed-tensors==0.19.0",
            "transformers==5.17.0",
            "accelerate==1.15.0",
            "safetensors==0.8.0",
        ),
    ),
}


@dataclass(frozen=True)
class ModelJob:
    """Quantize a whole model.

    model           directory of a dense float32 checkpoint with its tokenizer
    calibration     a file from `write_calibration`
    method          "rtn", "gptq" or "awq", each at the peer's defaults
    group_size      None: one scale per output channel
    out             directory for what comes back; made, emptied of an earlier result
    """

    model: Path
    calibration: Path
    method: str
    bits: int
    group_size: int | None
    out: Path
    symmetric: bool = True
    threads: int = 1


@dataclass(frozen=True)
class LayerJob:
    """Quantize one nn.Linear by GPTQ, timed.

    weight          .npy file [N, K] float32
    activations     a file from `ptq_peers.activations.write`, [sequences, tokens, K] float32
    """

    weight: Path
    activations: Path
    bits: int
    group_size: int | None
    out: Path
    symmetric: bool = True
    threads: int = 2
    method: str = "gptq"


@dataclass(frozen=True)
class PeerResult:
    """weights: safetensors file of dense float32 weights, or None where there is no result; `reason` says why.

    result of a model: seconds, peak_rss (bytes beyond what was resident before), peak_exact, settings, quantized (names
    of layers), failures (layers it gave up calibrating), versions, threads; the weights are the model's state dict with
    every quantized weight dequantized, folded scales included. Of a layer: seconds {hessian, solve}, relative_error
    (tr((W-Q)H(W-Q)^T) / tr(WHW^T)) besides; the weights are one tensor, "weight" [N, K].
    """

    weights: Path | None
    result: dict[str, Any]

    @property
    def reason(self) -> str | None:
        return self.result.get("reason")


def write_calibration(path: Path | str, batches: Sequence[Tensor]) -> None:
    """Token ids [B, T] int64 per batch, without padding, in the order in which they are calibrated on."""
    save_file({f"batch.{i}": ids.long().contiguous() for i, ids in enumerate(batches)}, str(path))


def run_model(name: str, job: ModelJob, cache_dir: Path, timeout: float = 3600) -> PeerResult:
    """Quantize a model by the peer of that name; what it cannot do comes back as a `reason`, never as an exception.

    Raises ValueError for an unknown peer, RuntimeError when its environment cannot be built.
    """
    return _run(name, "model", job, cache_dir, timeout)


def run_layer(name: str, job: LayerJob, cache_dir: Path, timeout: float = 3600) -> PeerResult:
    """Quantize one layer by the peer of that name, timed; otherwise as `run_model`."""
    return _run(name, "layer", job, cache_dir, timeout)


def environment(name: str, cache_dir: Path) -> Path:
    """The Python interpreter of a peer's environment below `cache_dir`, which is built if it is not there.

    Raises ValueError for an unknown peer, RuntimeError with pip's last words.
    """
    peer = _peer(name)
    pins = "\n".join((sys.version, TORCH, *peer.requirements, "bare:", *peer.bare))
    home = cache_dir / f"{name}-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
    python = home / "bin" / "python"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with open(cache_dir / f".{home.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be building it
        if (home / _STAMP).is_file():
            return python
        shutil.rmtree(home, ignore_errors=True)
        venv.create(home, with_pip=True)
        if peer.requirements:
            _pip(name, python, "install", "--no-deps", "--extra-index-url", CPU_WHEELS, TORCH)
            _pip(name, python, "install", TORCH, *peer.requirements)
        if peer.bare:
            _pip(name, python, "install", "--no-deps", *peer.bare)
        (home / _STAMP).write_text(_pip(name, python, "freeze"))
    return python


def _peer(name: str) -> Peer:
    if name not in PEERS:
        raise ValueError(f"peer: {name!r} is not one of {', '.join(PEERS)}")
    return PEERS[name]


def _pip(name: str, python: Path, *arguments: str) -> str:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=_variables())
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"{name}: its environment cannot be built: pip {' '.join(arguments)}\n{tail}")
    return done.stdout


def _run(name: str, kind: str, job: ModelJob | LayerJob, cache_dir: Path, timeout: float) -> PeerResult:
    peer = _peer(name)
    python = environment(name, cache_dir)
    out = job.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    result, weights, log = out / "result.json", out / "weights.safetensors", out / "log.txt"
    for old in (result, weights):
        old.unlink(missing_ok=True)
    asked = {key: str(value.resolve()) if isinstance(value, Path) else value for key, value in asdict(job).items()}
    file = out / "job.json"
    file.write_text(json.dumps(asked | {"kind": kind}, indent=1) + "\n")
    threads = str(job.threads)
    more = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""} | peer.variables
    command = [str(python), str(_SCRIPTS / peer.script), str(file)]
    with open(log, "w") as words:
        try:
            code = subprocess.run(
                command, cwd=out, env=_variables() | more, stdout=words, stderr=subprocess.STDOUT, timeout=timeout
            ).returncode
        except subprocess.TimeoutExpired:
            return PeerResult(None, {"reason": f"{name} took longer than {timeout:g} s"})
    if not result.is_file():
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit status {code}"
        return PeerResult(None, {"reason": f"{name} {how}: {_last_error(log.read_text(errors='replace'))}"})
    return PeerResult(weights if weights.is_file() else None, json.loads(result.read_text()))


def _variables() -> dict[str, str]:
    """Ours without what would let our packages into theirs, and offline as far as model hubs go."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _last_error(log: str) -> str:
    """The last exception that was printed, and the line of code above it."""
    lines = ["", "", *log.splitlines()]
    for i in reversed(range(2, len(lines))):
        if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", lines[i]):
            code = lines[i - 1] if lines[i - 1].strip(" ^~") else lines[i - 2]
            return f"{lines[i].strip()}, at `{code.strip()}`" if code.startswith("    ") else lines[i].strip()
    return log.strip()[-200:] or "it said nothing"
