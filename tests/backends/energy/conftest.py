"""Libraries that stand for a driver's: compiled here, loaded through ctypes as the real ones are."""

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """compiled("nvml_stand_in", "-DX") -> path of a new library, whose state no other test has."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler, which the libraries that stand for a driver's are made with")

    def make(name, *flags):
        library = tmp_path_factory.mktemp(name) / f"{name}.so"
        source = Path(__file__).with_name(f"{name}.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", *flags, "-o", library, source], check=True)
        return str(library)

    return make
