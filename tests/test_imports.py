"""The folders import in one direction, and the package stays light and importable wherever it is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["backends", "kernels", "compress", "unlearn", "bench", "remanence"]
FOLDERS = {name: ROOT / ("src/remanence" if name == "remanence" else name) for name in ORDER}


def imported_folders(path: Path, home: str) -> set[str]:
    """Folders of this package that the file imports, seen from its own place in the package."""
    inside = path.relative_to(FOLDERS[home]).parts[:-1]
    package = ["remanence", *([] if home == "remanence" else [home]), *inside]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")]
            names = [".".join([*module, alias.name]).replace("..", ".") for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "remanence":
                found.add(parts[1] if len(parts) > 1 and parts[1] in ORDER else "remanence")
    return found - {home}


def wrong_imports(files: dict[str, list[Path]]) -> list[str]:
    """Imports of a higher folder from a lower one."""
    return [
        f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name} imports remanence.{other}"
        for home, paths in files.items()
        for path in paths
        for other in imported_folders(path, home)
        if ORDER.index(other) > ORDER.index(home)
    ]


def test_no_folder_imports_a_higher_one():
    files = {home: sorted(folder.rglob("*.py")) for home, folder in FOLDERS.items()}
    assert all(files.values())
    assert wrong_imports(files) == []


@pytest.mark.parametrize(
    "line",
    [
        "from ..bench.verdict import judge",
        "from remanence.unlearn import data",
        "import remanence.bench.cell",
        "from .. import unlearn",
        "def f():\n    from ..config import AuditConfig",
    ],
)
def test_an_upward_import_is_noticed(line, tmp_path, monkeypatch):
    monkeypatch.setitem(FOLDERS, "compress", tmp_path)
    (tmp_path / "planted.py").write_text(line + "\n")
    assert len(wrong_imports({"compress": [tmp_path / "planted.py"]})) == 1


# What is about NVIDIA's GPUs by its nature: everything else asks a tensor or a Device where it is.
ABOUT_CUDA = {
    "backends/cuda.py",
    "backends/device.py",
    "backends/energy/probes.py",
    "kernels/registry.py",
    "kernels/ops.py",
    "compress/sparse_linear.py",  # torch's own 2:4 tensors
    "bench/kernels.py",
    "bench/gpu_linear.py",
    "bench/gpu_peers.py",
    "bench/ascend_dry_run.py",  # refuses a torch for CUDA
    "bench/harness.py",  # hides the GPU from lm-eval on a CPU
    "remanence/doctor.py",
    "remanence/machine.py",
}


def test_no_other_file_names_cuda():
    literal = re.compile(r"""["']cuda(:\d+)?["']|torch\.cuda|\.cuda\(""")
    found = {
        f"{home}/{path.relative_to(folder)}"
        for home, folder in FOLDERS.items()
        for path in folder.rglob("*.py")
        if "triton" not in path.parts and literal.search(path.read_text())
    }
    assert found - ABOUT_CUDA == set()


def test_kernels_has_no_init():
    """As a regular package on the path it would hide Hugging Face's `kernels` from transformers."""
    assert not (ROOT / "kernels/__init__.py").exists()


def run(code: str, cwd: Path, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=env or None)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("where", ["root", "elsewhere", "kernels"])
def test_imports_from_any_directory(where, tmp_path):
    cwd = {"root": ROOT, "elsewhere": tmp_path, "kernels": ROOT / "kernels"}[where]
    code = "import remanence, remanence.kernels.reference as r; print(remanence.__version__, r.__name__)"
    assert run(code, cwd) == "0.1.0 remanence.kernels.reference"


def test_import_loads_neither_torch_nor_transformers(tmp_path):
    heavy = ("torch", "transformers", "pydantic", "scipy")
    code = f"import sys, remanence.cli; print([m for m in {heavy} if m in sys.modules])"
    assert run(code, tmp_path) == "[]"


# A verb's options have their defaults from a configuration, which is pydantic's.
@pytest.mark.parametrize(("verb", "light"), [([], ["pydantic"]), (["audit"], [])], ids=["all", "verb"])
def test_help_loads_nothing_heavy(verb, light, tmp_path):
    """It is to stand there at once: `remanence bench startup` has the seconds."""
    heavy = ["torch", "transformers", "numpy", "scipy", *light]
    code = (
        f"import sys, remanence.cli; sys.argv = {['remanence', *verb, '--help']}\n"
        "try: remanence.cli.main()\n"
        f"finally: print([m for m in {heavy} if m in sys.modules])"
    )
    told, _, loaded = run(code, tmp_path).rpartition("\n")
    assert "Usage: remanence" in told
    assert loaded == "[]"


def test_public_names_resolve():
    import remanence

    assert all(getattr(remanence, name) is not None for name in remanence.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = remanence.nonsense


def test_no_pickle_and_no_remote_code():
    """Trust no file: nothing here may unpickle, or run code that came with a model."""
    sources = [path for folder in FOLDERS.values() for path in folder.rglob("*.py")]
    banned = ("import pickle", "import dill", "import joblib", "torch.load(", "torch.save(", "trust_remote_code=True")
    found = [f"{path}: {word}" for path in sources for word in banned if word in path.read_text()]
    assert found == []


def test_readme_is_finished_and_names_commands_that_exist():
    text = (ROOT / "README.md").read_text()
    assert not re.findall(r"@[A-Z_]+@", text)
    verbs = set(re.findall(r"^remanence (\w+)", text, flags=re.M))
    assert verbs >= {"audit", "compress", "doctor", "bench"}
    from remanence.cli import app

    groups = {group.name: group.typer_instance for group in app.registered_groups}
    assert verbs <= {command.callback.__name__ for command in app.registered_commands} | groups.keys()
    for name, group in groups.items():
        inside = {command.callback.__name__ for command in group.registered_commands}
        assert set(re.findall(rf"^remanence {name} (\w+)", text, flags=re.M)) == inside


def test_names_kept_apart_from_their_tables_agree_with_them():
    """They stand in light modules, so that a name can be checked without loading torch."""
    from remanence.compress import knobs, sequential, walk
    from remanence.unlearn.catalog import METHODS
    from remanence.unlearn.inference.builders import BUILDERS
    from remanence.unlearn.objectives import OBJECTIVES

    objectives = {"training": set(OBJECTIVES), "inference": set(BUILDERS), "weights": {"rocr"}}
    assert {kind: {m.objective for m in METHODS.values() if m.kind == kind} for kind in objectives} == objectives
    assert set(knobs.METHODS) == {*walk.DATA_FREE, *sequential.SOLVERS, "bnb"}
    assert set(knobs.CALIBRATED) == set(sequential.SOLVERS)


def test_names_are_checked_without_torch(tmp_path):
    """An order for `remanence unlearn`, an audit's configuration and the list of methods."""
    code = (
        "import sys, remanence.config, remanence.forget as f;"
        "remanence.config.AuditConfig(); f.Order('m', 'npo', 'rows', asked={'beta': 0.2}); f.listing();"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert run(code, tmp_path) == "[]"
