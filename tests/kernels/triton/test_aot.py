"""Kernels as binaries, without a GPU: no spills, no conversions, wgmma. Compiled in processes of their own."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

ALL = """
import json
from remanence.bench import gpu_aot
rows, checks = gpu_aot.run(targets=[{target!r}], groups=(128,))
print(json.dumps([len(rows), [check for check in checks if not check["ok"]]]))
"""
ONE = """
import json
from remanence.kernels.triton import aot
from remanence.kernels.triton.configs import Task, default
task = Task("gemm", 4, 128, True, "bfloat16", 4096, 4096, 16)
case = aot.product(task, default(aot.MACHINES["sm_90"], task))
print(json.dumps([aot.row(case, "sm_90"), aot.fits(case, "sm_90"), aot.fits(case, "gfx942")]))
"""
SPILLS = """
import json
from remanence.kernels.triton import aot
from remanence.kernels.triton.configs import Config, Task
task = Task("gemm", 4, 128, False, "bfloat16", 4096, 4096, 64)
print(json.dumps([aot.fits(aot.product(task, Config(128, 64, 128, 4, stages)), "sm_90") for stages in (3, 12)]))
"""


def compiled(code):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_one_kernel_on_hopper():
    row, fits, fits_amd = compiled(ONE)
    assert row["mma"] == "HGMMA"
    assert row["mma_from_registers"]
    assert (row["spilled"], row["I2F"] + row["I2FP"]) == (0, 0)
    assert 0 < row["registers"] <= 255
    assert fits
    assert fits_amd


@pytest.mark.slow
def test_what_spills_or_does_not_fit_is_noticed():
    assert compiled(SPILLS) == [False, False]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_in_its_default_configuration(target):
    rows, failed = compiled(ALL.format(target=target))
    assert rows > 60
    assert failed == []


def test_an_interpreting_process_says_so():
    from remanence.bench import gpu_aot

    if os.environ.get("TRITON_INTERPRET") == "1":
        with pytest.raises(ValueError, match="interpreted in this process"):
            gpu_aot.run()
