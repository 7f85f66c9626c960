"""The wheel that users install: complete, importable from anywhere, and unharmed by Hugging Face's `kernels`."""

import os
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


def python(*arguments: str, site: Path, cwd: Path) -> str:
    """Run with `site` before everything else, and without the editable install's import hook."""
    code = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; {USE}"
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, *arguments, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["elsewhere", "checkout"])
@pytest.mark.parametrize("hf_kernels", [False, True], ids=["alone", "beside-hf-kernels"])
def test_regular_install_imports(installed, tmp_path, where, hf_kernels):
    site = installed
    if hf_kernels:
        # As transformers sees it: a regular package `kernels` with a version it accepts.
        site = tmp_path / "site"
        shutil.copytree(installed, site)
        (site / "kernels").mkdir()
        # Any name that transformers takes from it, whatever its version asks for.
        (site / "kernels/__init__.py").write_text(
            "__version__ = '0.18.2'\n"
            "def __getattr__(name):\n"
            "    if name.startswith('__'):\n"
            "        raise AttributeError(name)\n"
            "    return type(name, (), {})\n"
        )
        info = site / "kernels-0.18.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    cwd = ROOT if where == "checkout" else tmp_path
    assert python(site=site, cwd=cwd) == str(site / "remanence/__init__.py")


@pytest.mark.slow
def test_wheel_is_complete_and_lean(installed):
    package = installed / "remanence"
    for file in ("py.typed", "cli.py", "compress/rtn.py", "unlearn/people.py", "bench/verdict.py", "backends/cpu.py"):
        assert (package / file).is_file(), file
    assert list((package / "kernels").glob("_C*.so")), "the native module is missing"
    assert (package / "kernels/_C.pyi").is_file()
    assert not (package / "kernels/csrc").exists(), "C++ sources do not belong in the wheel"
    assert not (installed / "tests").exists()
