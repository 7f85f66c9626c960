"""`remanence doctor`: what is there and why, in whatever state the installation is; and the line of every run."""

import json
import os
import subprocess
import sys

import pytest
import torch
from remanence.backends.ceilings import Ceilings, Rate
from remanence.backends.cpu import CpuDevice
from remanence.backends.cuda import CudaDevice
from remanence.backends.device import Peak
from remanence.bench.roofline.ceilings import ceilings_of
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


def test_what_the_cpu_says_of_itself_stands_beside_what_is_measured(capsys, monkeypatch):
    peak = Peak(144e9, "derived: 2 cores x 2.25 GHz")
    monkeypatch.setattr(CpuDevice, "peaks", lambda _: {"float32": peak, "bfloat16": peak, "int8": None, "memory": None})
    monkeypatch.setattr("remanence.doctor.peaks", lambda: {"float32": 207e9, "int8": 4e11})
    monkeypatch.setattr("remanence.doctor.read_bandwidth", lambda: 3e10)
    monkeypatch.setattr("remanence.doctor.cache_bytes", lambda _: 32 * 2**20)
    found = diagnose()
    show(found)
    lines = capsys.readouterr().out.splitlines()
    now = f"measured now, {torch.get_num_threads()} threads"
    for line in (
        f"  peak   float32: 0.207 T operations/s ({now}; 0.144 T operations/s derived: 2 cores x 2.25 GHz)",
        "  peak   bfloat16: 0.144 T operations/s (derived: 2 cores x 2.25 GHz)",
        f"  peak   int8: 0.4 T operations/s ({now})",
        f"  peak   memory: 30 GB/s ({now})",
        "  cache  last level: 32 MiB",
    ):
        assert line in lines
    assert found["devices"]["cpu"]["peaks"]["float32"]["value"] == 207e9


def test_ceilings_that_are_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("REMANENCE_CACHE", str(tmp_path))
    cpu = CpuDevice()
    measured = Ceilings(cpu.info()["name"], Rate(1e10, "measured: copy", spread=0.1), {})
    monkeypatch.setattr("remanence.bench.roofline.ceilings.measure_ceilings", lambda *_: measured)
    show(diagnose())
    assert "roofline ceilings: not measured yet" in capsys.readouterr().out
    ceilings_of(cpu, tmp_path)
    (path,) = (tmp_path / "ceilings").iterdir()
    show(diagnose())
    assert f"kept in {path}" in capsys.readouterr().out
    assert diagnose()["devices"]["cpu"]["ceilings"]["measured"].startswith("20")
    path.write_text("{")
    show(diagnose())
    assert f"roofline ceilings: {path}: not used: " in capsys.readouterr().out


def test_what_is_missing_has_its_remedy(capsys):
    found = diagnose()
    found["kernel_isas"], found["optional"] = [], dict.fromkeys(found["optional"])
    show(found)
    text = capsys.readouterr().out
    assert "native   not built: plain torch computes. Install a C++ compiler and install remanence again" in text
    for extra in ("train", "rl", "eval", "ct", "gptq", "bnb", "cuda", "ascend"):
        assert f"missing: pip install remanence[{extra}]" in text


class Properties:
    """What torch tells of a GPU."""

    name, multi_processor_count, major, minor, total_memory = "NVIDIA H200", 132, 9, 0, 141 * 2**30
    memory_clock_rate, memory_bus_width, L2_cache_size = 3_201_000, 6144, 50 * 2**20


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
    assert "cache  last level: 50 MiB" in text
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
