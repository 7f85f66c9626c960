"""The kernels without Python (native/main.cpp) under sanitizers, and the ARM ones under an emulator."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels" / "csrc"
DRIVER = Path(__file__).parent / "native" / "main.cpp"

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def isa():
    """The driver goes through the instruction sets itself: once is enough."""


def flags_of_files(processor: str) -> dict[str, list[str]]:
    """What CMakeLists.txt compiles for a processor, and the flags of each file; bind.cpp is Python's."""
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    common = re.findall(r"target_compile_options\(_C PRIVATE (-Wall[^)]*|-ffp[^)]*)\)", text)
    assert common == ["-Wall -Wextra", "-ffp-contract=off"], "CMakeLists.txt has changed: read it again"
    module = re.search(r"nanobind_add_module\(([^)]*)\)", text)
    assert module is not None
    files = {Path(name).name: [] for name in re.findall(r"kernels/csrc/\w+\.cpp", module[1])}
    if processor == "x86_64":
        variables = {}
        for name, value in re.findall(r"set\((avx2|avx512|vnni) ([^)]*)\)", text):
            variables[name] = re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], value)
        for options, names in re.findall(r'add_kernels\("([^"]*)" ([^)]*)\)', text):
            flags = re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], options).replace(";", " ")
            files |= {name: flags.split() for name in names.split()}
        define = "-DREMANENCE_X86"
    else:
        (options,) = re.findall(r'neon\.cpp PROPERTIES COMPILE_OPTIONS "([^"]*)"', text)
        files["neon.cpp"] = options.split(";")
        define = "-DREMANENCE_NEON"
    del files["bind.cpp"]
    assert len(files) >= 7, files
    return {name: [*" ".join(common).split(), define, *flags] for name, flags in files.items()}


def build(compiler: str, processor: str, folder: Path, *more: str) -> Path:
    files = flags_of_files(processor)
    objects = []
    for source, flags in [*((SOURCES / name, flags) for name, flags in files.items()), (DRIVER, files["linear.cpp"])]:
        objects.append(folder / f"{source.stem}.o")
        command = [compiler, "-std=c++17", "-g1", *flags, *more, "-c", str(source), "-o", str(objects[-1])]
        subprocess.run(command, check=True)
    program = folder / "kernels"
    subprocess.run([compiler, *more, *map(str, objects), "-pthread", "-o", str(program)], check=True)
    return program


def passes(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-20000:]
    assert re.fullmatch(r"\d+ checks, 0 failures on scalar.*\n", done.stdout)
    return done.stdout


SANITIZERS = {
    "addresses and undefined behaviour": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    # The thread sanitizer does not see into libgomp, and would report every loop.
    "threads": ["-O1", "-fsanitize=thread", "-DREMANENCE_STD_THREADS"],
}


@pytest.mark.parametrize("kind", SANITIZERS)
def test_clean(kind, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++, which builds with sanitizers, is not installed")
    processor = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    flags = SANITIZERS[kind]
    sanitizer = next(flag for flag in flags if flag.startswith("-fsanitize"))
    (tmp_path / "empty.cpp").write_text("int main() {}")
    linked = ["g++", sanitizer, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
    if subprocess.run(linked, capture_output=True).returncode:
        pytest.skip(f"g++ here has no runtime for {sanitizer}")
    passes(str(build("g++", processor, tmp_path, *flags)))


def test_older_processors_in_an_emulator(tmp_path):
    """A processor without AVX runs the portable kernels and strays into nothing wider; one without AVX-512, AVX2."""
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if platform.machine() not in ("x86_64", "AMD64") or shutil.which("g++") is None or emulator is None:
        pytest.skip("needs an x86-64 machine with g++ and Debian's qemu-user-static")
    program = build("g++", "x86_64", tmp_path, "-O2", "-static", "-DREMANENCE_STD_THREADS")
    assert passes(emulator, "-cpu", "Nehalem", str(program)).endswith("on scalar\n")
    # QEMU knows AVX2 since 7.2.
    assert passes(emulator, "-cpu", "Haswell", str(program)).endswith(("on scalar avx2\n", "on scalar\n"))


def test_neon_in_an_emulator(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("Debian's g++-aarch64-linux-gnu and qemu-user-static, which build and run it, are not installed")
    program = build(compiler, "aarch64", tmp_path, "-O2", "-static", "-DREMANENCE_STD_THREADS")
    assert passes(emulator, str(program)).endswith("on scalar neon\n")
