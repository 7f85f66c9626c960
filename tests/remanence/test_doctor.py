"""`remanence doctor`: what is there and why, in whatever state the installation is; and the line of every run."""

import json
import os
import subprocess
import sys

import pytest
import torch
from remanence.backends.cuda import CudaDevice
from remanence.kernels import ops

from remanence.doctor import diagnose, show
from remanence.machine import device_for_run, environment

# What stands in for a part that is missing, before anything else is imported.
STATES = {
    "whole": "",
    "native kernels not built": "sys.modules['remanence.kernels._C'] = None",
    "no triton": "sys.modules['triton'] = None",
    "torch with CUDA, no driver": (
        "import torch; torch.version.cuda = '12.8'; torch.cuda.is_available = lambda: False\n"
        "import remanence.backends.cuda as cuda; cuda.driver = lambda: None"
    ),
    "torch with CUDA, a driver too old": (
        "import torch, warnings; torch.version.cuda = '12.8'\n"
        "torch.cuda.is_available = lambda: warnings.warn('The NVIDIA driver is too old (11040).\\nMore.')\n"
        "import remanence.backends.cuda as cuda; cuda.driver = lambda: '470.1'"
    ),
    "torch without CUDA": "import torch; torch.version.cuda = None",
}


def doctor(state, *arguments, env):
    code = f"import sys\n{STATES[state]}\nsys.argv = ['remanence', 'doctor', *sys.argv[1:]]\n"
    code += "from remanence.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_CACHE", str(tmp_path / "not" / "yet"))
    found = diagnose()
    assert json.loads(json.dumps(found)) == found
    assert found["cache"] == str(tmp_path / "not" / "yet")
    assert found["cache_free_bytes"] > 0
    cpu = found["devices"]["cpu"]
    assert cpu["threads"] == torch.get_num_threads()
    assert 0 < cpu["free_bytes"] <= cpu["memory_bytes"]
    assert {choice["kernel"] for choice in cpu["kernels"].values()} == {ops.isa() if ops.cpu else "reference"}
    assert found["kernel_isas"] == ops.available_isas()


def test_in_words(capsys):
    show(diagnose())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("remanence ")
    assert any(line.startswith("cpu ") and " GiB free" in line for line in lines)
    assert any("kernel x in bfloat16: " in line for line in lines)
    assert any(line.startswith("  torch-npu ") and "Ascend NPUs" in line for line in lines)


class Properties:
    """What torch tells of a GPU."""

    name, multi_processor_count, major, minor, total_memory = "NVIDIA H200", 132, 9, 0, 141 * 2**30
    memory_clock_rate, memory_bus_width = 3_201_000, 6144


def test_a_gpu_in_words(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100 * 2**30, 141 * 2**30))
    monkeypatch.setattr("remanence.doctor.detect", lambda: [CudaDevice(0)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("remanence.kernels.gpu.why_not", lambda _: "Triton is not installed")
    show(diagnose())
    text = capsys.readouterr().out
    assert "NVIDIA H200, compute capability 9.0, 141.0 GiB, 100.0 GiB free" in text
    assert "bfloat16: 990 T operations/s (NVIDIA H200 SXM data sheet)" in text
    assert "memory: 4917 GB/s" in text
    assert "kernel x in bfloat16: reference" in text
    assert "triton: Triton is not installed" in text


# The command line at its end; the others, which load torch anew, are slow only in their number.
@pytest.mark.parametrize("state", [*STATES][:2])
def test_the_verb(state, tmp_path):
    done = doctor(state, "--json", env={"REMANENCE_CACHE": str(tmp_path)})
    found = json.loads(done.stdout)
    built = state == "whole" and ops.available_isas()
    assert found["kernel_isa"] == (ops.isa() if built else "none")
    others = found["devices"]["cpu"]["kernels"]["x in float32"]["others"]
    assert others["scalar"] == ("the native kernels are not built" if not built else f"{ops.isa()} is wider")
    assert done.stderr.count("\n") == (0 if built else 1), "one line says that plain torch computes"


@pytest.mark.slow
@pytest.mark.parametrize("state", [*STATES][2:])
def test_half_an_installation(state, tmp_path):
    text = doctor(state, env={"REMANENCE_CACHE": str(tmp_path)}).stdout
    assert f"cpu      {environment()['cpu']['name']}" in text
    if state == "torch without CUDA":
        assert "is built without CUDA. Install a torch with CUDA" in text
    if state == "torch with CUDA, no driver":
        assert "cuda     none: torch sees no NVIDIA GPU: no NVIDIA driver is loaded. Install the driver" in text
    if state == "torch with CUDA, a driver too old":
        assert "cuda     none: The NVIDIA driver is too old (11040). See whether" in text


def test_the_line_of_a_run(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("remanence.backends.ascend.installed", lambda: False)
    said = []
    assert device_for_run("cpu", said.append).name == "cpu"
    assert device_for_run("auto", said.append).name == "cpu"
    asked, auto = said
    assert asked.startswith("device: cpu, ")
    assert "; kernels: " in asked
    assert "auto took" not in asked
    assert f"; auto took cpu: this torch, {torch.__version__}, is built without CUDA; kernels: " in auto
