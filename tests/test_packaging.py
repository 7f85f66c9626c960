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
# Takes the editable install's import hook away.
HOOK = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__];"


def install(folder: Path, **env: str) -> Path:
    """A regular install of the checkout into a directory of its own, below `folder`."""
    pytest.importorskip("scikit_build_core", reason="builds the wheel; comes with the extra `test`")
    source, target = folder / "source", folder / "site"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in files.stdout.split():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, env={**os.environ, **env})
    return target


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory) -> Path:
    """Installed where no compiler can be found."""
    folder = tmp_path_factory.mktemp("without")
    tools = folder / "bin"
    tools.mkdir()
    for tool in ("cmake", "ninja", "make"):
        if place := shutil.which(tool):
            (tools / tool).symlink_to(place)
    return install(folder, PATH=str(tools), CC="/no/cc", CXX="/no/c++")


def python(more: str = "", *, site: list[Path], cwd: Path) -> str:
    """Run USE with `site` before everything else, and without the editable install."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, site))}
    done = subprocess.run([sys.executable, "-c", HOOK + more + USE], cwd=cwd, env=env, capture_output=True, text=True)
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
    if shutil.which(os.environ.get("CXX", "c++")):
        assert list((package / "kernels").glob("_C*.so")), "the native module is missing"
        assert (package / "kernels/_C.pyi").is_file()
    assert not (package / "kernels/csrc").exists(), "C++ sources do not belong in the wheel"
    assert not (installed / "tests").exists()


# A packed layer in every form that a model gives it, beside float64; the errors are those of float32.
FORWARD = """
import torch
from remanence.compress.knobs import RTN
from remanence.compress.linear import QuantLinear
from remanence.compress.rtn import rtn
from remanence.compress.spec import ActivationSpec, QuantSpec
from remanence.kernels import ops
from remanence.kernels.registry import Case, explain
assert ops.isa() == "none" and ops.available_isas() == []
assert explain(Case()).kernel == "reference"
torch.manual_seed(0)
weight, bias, x = torch.randn(24, 64), torch.randn(24), torch.randn(3, 64)
for activation in (None, ActivationSpec(8)):
    layer = QuantLinear.from_qtensor(rtn(weight, QuantSpec(4, 32), torch.float32, RTN()), bias, activation).prepack_()
    a = x.double()
    if activation:
        codes, scale, zero = ops.quantize_per_token(x, 8, activation.symmetric, activation.clip)
        a = (codes.double() - zero) * scale.double()
    exact = a @ layer.dequantized().double().T + bias.double()
    assert (layer(x).double() - exact).abs().max() < 1e-5 * exact.abs().max()
print("computed")
"""


@pytest.mark.slow
def test_without_a_compiler_plain_torch_computes_and_one_line_says_so(without_compiler, tmp_path):
    assert not list((without_compiler / "remanence/kernels").glob("_C*"))
    env = {**os.environ, "PYTHONPATH": str(without_compiler)}
    done = subprocess.run([sys.executable, "-c", HOOK + FORWARD], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "computed\n", done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "plain torch computes instead, slowly. Install a C++ compiler" in done.stderr


@pytest.mark.slow
def test_the_tests_of_kernels_pass_without_native_ones(without_compiler):
    """On the reference alone."""
    env = {**os.environ, "PYTHONPATH": str(without_compiler)}
    code = HOOK + "import pytest, remanence; print(remanence.__file__); sys.exit(pytest.main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        code,
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(ROOT / "tests/kernels"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.startswith(str(without_compiler)), done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
