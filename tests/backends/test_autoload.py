"""A torch-npu that cannot be loaded, each in a process of its own: torch, transformers and accelerate go on working."""

import os
import subprocess
import sys
from importlib.machinery import PathFinder

import pytest
import torch

USE = """
import sys
import remanence
import torch
from remanence.backends import autoload
from remanence.backends.device import detect
from transformers import LlamaForCausalLM
from accelerate.utils import is_npu_available
print([each.name for each in detect()], is_npu_available(), sys.modules.get("torch_npu"), autoload.failure(), sep="|")
"""
ENTRY = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"


RELEASE = torch.__version__.partition("+")[0]


@pytest.fixture
def site(tmp_path):
    """site(code): a folder with a package torch_npu that runs `code`, installed with its entry point."""

    def make(code):
        (tmp_path / "torch_npu").mkdir()
        (tmp_path / "torch_npu/__init__.py").write_text(f"{code}\ndef _autoload():\n    print('autoloaded')\n")
        (tmp_path / "torch_npu-2.13.0.dist-info").mkdir()
        (tmp_path / "torch_npu-2.13.0.dist-info/METADATA").write_text(
            f"Metadata-Version: 2.1\nName: torch-npu\nVersion: {RELEASE}\n"
        )
        (tmp_path / "torch_npu-2.13.0.dist-info/entry_points.txt").write_text(ENTRY)
        return tmp_path

    return make


def run(site, code, **env):
    whole = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    whole |= {"PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **env}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=whole)


@pytest.mark.parametrize(
    "error",
    [
        "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')",
        "raise Exception('ASCEND_HOME_PATH :  does not exist.')",
        *(
            pytest.param(code, marks=pytest.mark.slow)
            for code in (
                "raise RuntimeError('Two accelerators cannot be used at the same time')",
                "raise OSError('libascend_hal.so: cannot open shared object file')",
                "import torch_npu.none",
            )
        ),
        "# nothing is in it",
    ],
)
def test_a_broken_wheel_is_as_none(site, error):
    place = site(f"import torch\n{error}")
    if "raise" in error:
        assert run(place, "import torch").returncode != 0  # which is what we stand against
    done = run(place, USE)
    assert done.returncode == 0, done.stderr
    devices, available, module, failure = done.stdout.strip().split("|")
    assert devices.startswith("['cpu'")
    assert "npu" not in devices
    assert available == "False"
    assert module == "None"
    assert failure.partition(":")[0] in ("ImportError", "RuntimeError", "OSError", "Exception", "ModuleNotFoundError")


def test_torch_works_in_processes_that_are_started_then(site):
    place = site("raise ImportError('libhccl.so: cannot open shared object file')")
    code = "import remanence, torch, subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', 'import torch']))"
    assert run(place, code).returncode == 0


def test_what_an_uninstall_left_behind(tmp_path):
    (tmp_path / "torch_npu/__pycache__").mkdir(parents=True)
    done = run(tmp_path, USE)
    assert done.returncode == 0, done.stderr
    assert "npu" not in done.stdout.split("|")[0]


def test_the_backends_of_others_are_loaded(site):
    place = site("raise ImportError('libhccl.so: cannot open shared object file')")
    (place / "other_backend.py").write_text("def start():\n    print('started')\n")
    (place / "other-1.0.dist-info").mkdir()
    (place / "other-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (place / "other-1.0.dist-info/entry_points.txt").write_text("[torch.backends]\nother = other_backend:start\n")
    done = run(place, "import remanence, torch")
    assert done.stdout.split() == ["started"], done.stderr


def test_switched_off_by_hand_it_stays_off(site):
    """And where CANN is missing it is hidden, as other libraries try it all the same."""
    place = site("raise SystemExit('imported')")
    code = "import remanence, torch, sys; print(sys.modules.get('torch_npu', 0))"
    done = run(place, code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.stdout.strip() == "None", done.stderr


@pytest.mark.slow
def test_switched_off_by_hand_it_is_hidden_too(site):
    place = site("raise ImportError('libhccl.so: cannot open shared object file')")
    for first in ("", "import torch\n"):
        done = run(place, first + USE, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
        assert done.returncode == 0, done.stderr


def test_a_wheel_that_works_is_loaded_with_torch(site):
    """And processes that are started load it as they would have."""
    place = site("import os, torch\nloaded = True\ntorch.npu = 1\nos.environ['SEEN'] = '1'")
    code = (
        "import remanence, os; assert 'SEEN' not in os.environ; import torch, sys; "
        "print(sys.modules['torch_npu'].loaded, os.environ['SEEN'], os.environ.get('TORCH_DEVICE_BACKEND_AUTOLOAD'))"
    )
    done = run(place, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "1", "1"]


@pytest.mark.skipif(PathFinder.find_spec("torch_npu") is not None, reason="torch-npu is installed here")
def test_without_a_wheel_nothing_is_touched():
    code = "import remanence, os, sys; print('TORCH_DEVICE_BACKEND_AUTOLOAD' in os.environ, 'torch' in sys.modules)"
    done = run("", code)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch-npu refuses such a torch first of all")
def test_doctor_names_the_missing_piece(site):
    place = site("raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')")
    done = run(place, "import sys; sys.argv = ['remanence', 'doctor']; from remanence.cli import main; main()")
    assert done.returncode == 0, done.stderr
    told = next(line for line in done.stdout.splitlines() if line.startswith("npu "))
    assert "libhccl.so is not found" in told
    assert "set_env.sh" in told
