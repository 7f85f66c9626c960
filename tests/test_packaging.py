"""The wheel that users install: complete, importable from anywhere, and unharmed by Hugging Face's `kernels`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = (
    "import remanence, remanence.kernels.ops as ops, remanence.compress.checkpoint, transformers, torch;"
    "from transformers import AutoModelForCausalLM;"
    "codes = torch.randint(0, 16, (3, 10), dtype=torch.uint8);"
    "assert torch.equal(ops.unpack(ops.pack(codes, 4), 4, 10), codes);"
    "print(remanence.__file__)"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A regular install into a directory of its own."""
    pytest.importorskip("scikit_build_core", reason="builds the wheel; comes with the extra `test`")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in files.stdout.split():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    return target


def python(more: str = "", *, site: list[Path], cwd: Path) -> str:
    """Run USE with `site` before everything else, and without the editable install's import hook."""
    hook = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__];"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, site))}
    done = subprocess.run([sys.executable, "-c", hook + more + USE], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def hf_kernels(tmp_path_factory) -> Path:
    """Hugging Face's `kernels`, under a version that transformers takes (it ignores older ones)."""
    target = tmp_path_factory.mktemp("hf")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), "kernels"]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip("the package `kernels` cannot be fetched here")
    (info,) = target.glob("kernels-*.dist-info")
    metadata = (info / "METADATA").read_text()
    (info / "METADATA").write_text(re.sub(r"^Version: 0\.1[0-7]\..*$", "Version: 0.18.2", metadata, flags=re.M))
    return target


@pytest.mark.slow
@pytest.mark.parametrize("where", ["elsewhere", "checkout"])
def test_regular_install_imports(installed, tmp_path, where):
    cwd = ROOT if where == "checkout" else tmp_path
    assert python(site=[installed], cwd=cwd) == str(installed / "remanence/__init__.py")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["elsewhere", "checkout"])
def test_regular_install_beside_hf_kernels(installed, hf_kernels, tmp_path, where):
    cwd = ROOT if where == "checkout" else tmp_path
    more = "from transformers.utils.import_utils import is_kernels_available as there; assert there(); import kernels;"
    more += f"assert kernels.__file__.startswith({str(hf_kernels)!r});"
    assert python(more, site=[installed, hf_kernels], cwd=cwd) == str(installed / "remanence/__init__.py")


@pytest.mark.slow
def test_editable_install_beside_hf_kernels(hf_kernels, tmp_path):
    """This environment's own install, from the checkout, where ./kernels lies in the current directory."""
    env = {**os.environ, "PYTHONPATH": str(hf_kernels)}
    for cwd in (ROOT, tmp_path):
        done = subprocess.run([sys.executable, "-c", USE], cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_wheel_is_complete_and_lean(installed):
    package = installed / "remanence"
    for file in ("py.typed", "cli.py", "compress/rtn.py", "unlearn/people.py", "bench/verdict.py", "backends/cpu.py"):
        assert (package / file).is_file(), file
    assert list((package / "kernels").glob("_C*.so")), "the native module is missing"
    assert (package / "kernels/_C.pyi").is_file()
    assert not (package / "kernels/csrc").exists(), "C++ sources do not belong in the wheel"
    assert not (installed / "tests").exists()
