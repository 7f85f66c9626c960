"""The real torch-npu on a machine without an NPU: small quantized models go through its C++ down to the kernels, whose
names are noted, and which do nothing (ascend_stub.py).

What this shows: that torch-npu takes every call, on which chip it launches which kernels, that nothing is sent back to
the CPU, and that int4 is packed as its own packer packs it. Numbers are whatever was in memory.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

from . import ascend_stub
from .ascend_models import FLATQUANT, compressed

PHASE, FALLEN = "[phase]", "fall back to run on the CPU"
# By chip: recipes of the models that are run. The 310P has neither int4 nor a scale per token.
RECIPES = {
    "Ascend910B4": (
        "rtn-w4a16-g64",
        "rtn-w4a16",
        "rtn-w8a16-asym",
        "rtn-w8a8",
        "rtn-w8a8+a_narrow=true",
        "rtn-w4a4",
        "rtn-w4a4+a_narrow=true",
        "rtn-w4a4+a_narrow=true+r_kind=hadamard+r_online=true",
        FLATQUANT,
    ),
    "Ascend310P3": ("rtn-w4a16-g64", "rtn-w4a16", "rtn-w8a16-asym", "smoothquant-w8a8+a_dynamic=false"),
}
# How often the kernels of a recipe have to be launched, of the packed layers of a model; others may be besides.
_WEIGHT_ONLY = r"WeightQuantBatchMatmul\w*"
LAUNCHED = {
    "rtn-w4a16-g64": {_WEIGHT_ONLY: 1.0},
    "rtn-w4a16": {_WEIGHT_ONLY: 1.0},
    "rtn-w8a16-asym": {_WEIGHT_ONLY: 1.0},
    "rtn-w8a8": {r"QuantMatmulWeightNz": 1.0},
    "rtn-w8a8+a_narrow=true": {r"QuantMatmulWeightNz": 1.0, r"DynamicQuant\w*": 1.0},
    "rtn-w4a4": {r"QuantMatmulV\d": 1.0},
    "rtn-w4a4+a_narrow=true": {r"QuantMatmulV\d": 1.0, r"DynamicQuant\w*": 1.0},
    "rtn-w4a4+a_narrow=true+r_kind=hadamard+r_online=true": {r"QuantMatmulV\d": 1.0, r"RotateQuant": 1 / 7},
    FLATQUANT: {r"QuantMatmulV\d": 1.0, r"FlatQuant\w*": 1.0},
    "smoothquant-w8a8+a_dynamic=false": {r"QuantMatmulV\d": 1.0},
}


def missing() -> str | None:
    """What this machine lacks for it, but for the wheel; None: nothing."""
    if torch.version.cuda is not None:
        return "torch-npu refuses a torch that is built for CUDA"
    return ascend_stub.missing()


def prepare(cache: Path) -> tuple[Path, Path]:
    """(folder with the package torch_npu, folder with CANN's stand-ins), made below `cache` where they are not there.

    Raises RuntimeError where the wheel cannot be had.
    """
    release = torch.__version__.partition("+")[0]
    site = _installed() or cache / f"torch-npu-{release}"
    if not (site / "torch_npu").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
        done = subprocess.run([*pip, f"torch-npu=={release}", "pyyaml"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"torch-npu {release} cannot be had: {done.stderr.strip().splitlines()[-1]}")
    stub = cache / f"cann-stub-{release}"
    if not (stub / "libacl_tdt_channel.so").is_file():
        ascend_stub.build(site / "torch_npu", Path(torch.__file__).parent, stub)
    return site, stub


def _installed() -> Path | None:
    """The folder of a wheel that is installed here, loadable or not."""
    spec = PathFinder.find_spec("torch_npu")
    return Path(spec.origin).parents[1] if spec is not None and spec.origin else None


def run(chip: str, cache: Path) -> dict[str, Any]:
    """What a process with that chip found: `facts`, and for every model the kernels that it launched.

    Raises RuntimeError with the last words of a process that failed.
    """
    site, stub = prepare(cache)
    paths = [str(site), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "LD_LIBRARY_PATH": str(stub),
        "STUB_CHIP": chip,
        "STUB_TRACE": "1",
        "TASK_QUEUE_ENABLE": "0",  # a kernel is launched by the call that asks for it, between the marks of its phase
    }
    # Chosen for this process, as a broken torch-npu is hidden in it.
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    environment.pop("ASCEND_HOME_PATH", None)
    command = [sys.executable, "-m", "remanence.bench.ascend_dry_run", chip]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{chip}: the dry run failed: {' | '.join(done.stderr.strip().splitlines()[-6:])}")
    facts = json.loads(done.stdout.splitlines()[-1])
    kernels = launched(done.stderr)
    for model in facts["models"]:
        model["kernels"] = kernels.get(model["phase"], {})
    return facts | {"fallen": fallen(done.stderr)}


def launched(text: str) -> dict[str, dict[str, int]]:
    """Phase -> kernel -> how often, from what the stand-ins wrote."""
    found: dict[str, Counter[str]] = {}
    phase = ""
    for line in text.splitlines():
        if line.startswith(PHASE):
            phase = line.removeprefix(PHASE).strip()
        elif (kernel := re.match(r"\[aclnn\] aclnn(\w+)", line)) and not kernel[1].endswith("GetWorkspaceSize"):
            found.setdefault(phase, Counter())[kernel[1]] += 1
    return {name: dict(counts) for name, counts in found.items()}


def fallen(text: str) -> list[str]:
    """Operators that torch-npu gave back to the CPU."""
    return sorted({found[1] for found in re.finditer(rf"operator '(\S+)'[^\n]*{FALLEN}", text)})


def short_of(model: dict[str, Any]) -> list[str]:
    """Kernels of the model's recipe that were launched less often than its layers ask for."""
    lacking = []
    for pattern, share in LAUNCHED[model["recipe"]].items():
        wanted = round(share * model["layers"]) * model["passes"]
        made = sum(count for kernel, count in model["kernels"].items() if re.fullmatch(pattern, kernel))
        if made < wanted:
            lacking.append(f"{pattern}: {made} of {wanted}")
    return lacking


def main(chip: str) -> None:
    """In the process with the stand-ins: everything, and one line of JSON at the end."""
    models = []
    _phase("device")
    facts = _device_facts() | {"packing": _packing(), "refused": _refused()}
    dtypes = (torch.float16, torch.bfloat16) if "910" in chip else (torch.float16,)
    for recipe in RECIPES[chip]:
        for name in ("llama", "opt"):
            for dtype in dtypes[: 1 if name == "opt" else None]:
                models.append(_run_model(name, recipe, dtype))
    _phase("done")
    print(json.dumps(facts | {"models": models}))


def _phase(name: str) -> None:
    print(f"{PHASE} {name}", file=sys.stderr, flush=True)


def _device_facts() -> dict[str, Any]:
    from ..backends.ascend import refusal
    from ..backends.device import device
    from ..kernels.ascend.schemas import drift

    if reason := refusal(0):
        raise RuntimeError(reason[0])
    npu = device("npu:0")
    with npu.timed() as timer, npu.peak_memory() as memory:
        held = torch.ones(2**20, dtype=torch.uint8, device=npu.torch_device)
    npu.synchronize()
    del held
    there = torch.arange(12, dtype=torch.float32)
    return {
        "info": npu.info(),
        "free": npu.free_memory(),
        "peak": memory.peak_bytes,
        "seconds": timer.seconds,
        "round_trip": torch.equal(there.to(npu.torch_device).cpu(), there),
        "drift": drift(),
    }


def _packing() -> int:
    """Words that torch-npu's own packer, which runs on the host, packs otherwise than we do."""
    from ..kernels.ascend.weights import pack_int4

    generator, unlike = torch.Generator().manual_seed(0), 0
    for shape in ((1, 8), (3, 40), (64, 64), (65, 136), (128, 8)):
        values = torch.randint(-8, 8, shape, generator=generator)
        theirs = torch.ops.npu.npu_convert_weight_to_int4pack(values.to(torch.int32).to("npu"), 0).cpu()
        unlike += int((theirs != pack_int4(values)).sum())
    return unlike


def _refused() -> dict[str, str]:
    """What torch-npu's C++ says to calls that our routes refuse: its words, or "" where it lets them pass."""
    x, w = torch.zeros(4, 96, dtype=torch.float16).to("npu"), torch.zeros(96, 64, dtype=torch.int8).to("npu")
    cases = {"group 48": (48, 2), "group as wide as the layer": (96, 1)}
    said = {}
    for what, (group, rows) in cases.items():
        scale = torch.ones(rows, 64, dtype=torch.float16).to("npu")
        try:
            torch.ops.npu.npu_weight_quant_batchmatmul(x, w, scale, antiquant_group_size=group)
            said[what] = ""
        except RuntimeError as error:
            said[what] = str(error).splitlines()[0]
    return said


def _run_model(name: str, recipe: str, dtype: torch.dtype) -> dict[str, Any]:
    """Prefill of two rows, then a token with the cache."""
    from ..compress.linear import QuantLinear

    model = compressed(name, recipe, dtype)
    layers = sum(isinstance(module, QuantLinear) for module in model.modules())
    model.to("npu")
    ids = torch.arange(14).reshape(2, 7).to("npu")
    phase = f"{name} {recipe} {str(dtype).removeprefix('torch.')}"
    with torch.no_grad():
        model(ids)  # lays the weights out
        _phase(phase)
        first = model(ids, use_cache=True)
        second = model(ids[:, :1], past_key_values=first.past_key_values)
    _phase("between")
    shapes = [list(out.logits.shape) for out in (first, second)]
    return {"phase": phase, "model": name, "recipe": recipe, "layers": layers, "passes": 2, "shapes": shapes}


if __name__ == "__main__":
    main(sys.argv[1])
