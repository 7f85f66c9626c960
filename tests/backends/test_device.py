"""Devices: which there are, how one is chosen, and that time and memory are what was spent."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from remanence.backends import ascend, cpu, cuda
from remanence.backends.cpu import CpuDevice, cpu_flags
from remanence.backends.cuda import CudaDevice, count
from remanence.backends.device import PEAKS, detect, device, parse_device

MIB = 2**20
here = pytest.mark.parametrize(
    "each", [pytest.param(CpuDevice(), id="cpu"), pytest.param(CudaDevice(0), id="cuda", marks=pytest.mark.gpu)]
)


@pytest.fixture
def no_npu(monkeypatch):
    monkeypatch.setattr(ascend, "installed", lambda: False)


@pytest.fixture
def no_cuda(monkeypatch, no_npu):  # noqa: ARG001
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.fixture
def two_gpus(monkeypatch, no_npu):  # noqa: ARG001
    """As torch answers on a machine with two, of which the first cannot be made to work here."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@here
def test_what_a_device_is(each):
    info = each.info()
    assert json.loads(json.dumps(info)) == info == each.info()
    assert info["name"]
    assert info["memory_bytes"] > 2**28
    assert 0 < each.free_memory() <= info["memory_bytes"]
    assert each.name in [found.name for found in detect()]
    assert each.torch_device == torch.device(each.name)
    assert device(each.name).name == each.name


def test_the_cpu():
    info = CpuDevice().info()
    assert info["cores"] >= 1
    assert info["threads"] == torch.get_num_threads()


@here
def test_time_is_that_of_the_work(each):
    def work(times):
        for _ in range(times):
            torch.mm(x, x, out=y)

    x = torch.ones(1024, 1024, device=each.torch_device)
    y = torch.empty_like(x)
    work(3)
    each.synchronize()
    start = time.perf_counter()
    with each.timed() as timer:
        work(20)
    taken = timer.seconds
    outside = time.perf_counter() - start
    assert outside / 3 < taken <= outside


@here
def test_the_peak_counts_what_is_gone_again(each):
    held = torch.ones(8 * MIB, dtype=torch.uint8, device=each.torch_device)
    for _ in range(2):  # a second block starts anew
        with each.peak_memory(held.nbytes) as memory:
            gone = torch.ones(32 * MIB, dtype=torch.uint8, device=each.torch_device)
            del gone
        assert 40 * MIB <= memory.peak_bytes < 41 * MIB + (0 if each.kind == "cpu" else 2**30)
    with each.peak_memory(held.nbytes) as memory:
        pass
    assert 8 * MIB <= memory.peak_bytes < 40 * MIB + (0 if each.kind == "cpu" else 2**30)


@here
def test_peaks_are_known_with_their_source_or_none(each):
    peaks = each.peaks()
    assert set(peaks) == set(PEAKS)
    for peak in peaks.values():
        assert peak is None or (peak.value > 1e9 and peak.source)


def test_a_cpu_claims_what_can_be_derived():
    peaks = CpuDevice().peaks()
    assert peaks["memory"] is None
    assert all(peak is None or peak.source.startswith("derived: ") for peak in peaks.values())


class Properties:
    """What torch tells of an H200."""

    name, multi_processor_count = "NVIDIA H200", 132
    memory_clock_rate, memory_bus_width = 3_201_000, 6144


def test_peaks_of_a_gpu_by_its_sheet(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    peaks = CudaDevice(0).peaks()
    assert peaks["bfloat16"].value == 989.5e12
    assert "H200" in peaks["bfloat16"].source
    assert peaks["memory"].value == pytest.approx(4.8e12, rel=0.03)  # as the sheet has it


@pytest.mark.parametrize("change", [{"name": "NVIDIA A1000"}, {"multi_processor_count": 16}])
def test_no_peak_is_guessed(monkeypatch, change):
    """Another name, or a slice of the GPU that the sheet is about; and a torch that tells nothing of the memory."""
    told = {"name": Properties.name, "multi_processor_count": Properties.multi_processor_count} | change
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Some", (), told))
    assert set(CudaDevice(0).peaks().values()) == {None}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("auto", ("auto", 0)),
        ("cpu", ("cpu", 0)),
        ("cuda", ("cuda", 0)),
        ("cuda:12", ("cuda", 12)),
        ("npu:3", ("npu", 3)),
    ],
)
def test_names(spec, expected):
    assert parse_device(spec) == expected


@pytest.mark.parametrize("spec", ["tpu", "cpu:0", "npu:", "cuda:", "cuda:-1", "CUDA", "", "auto:1", "cuda:1 "])
def test_no_name(spec):
    with pytest.raises(ValueError, match=r"^device: .* is not one of auto, cpu, cuda, cuda:N, npu, npu:N"):
        parse_device(spec)


@pytest.mark.usefixtures("no_cuda")
def test_auto_says_what_it_took_and_why():
    said = []
    assert device("auto", said.append).name == "cpu"
    assert said == [f"auto took cpu: this torch, {torch.__version__}, is built without CUDA"]
    said.clear()
    assert device("cpu", said.append).name == "cpu"
    assert said == []
    assert [each.name for each in detect()] == ["cpu"]


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("spec", ["cuda", "cuda:1"])
def test_asked_for_and_missing(spec):
    with pytest.raises(ValueError, match=f"^device: '{spec}' cannot be had: this torch.*Here are: cpu. Install"):
        device(spec)


@pytest.mark.usefixtures("two_gpus")
def test_an_index_beyond_what_there_is():
    with pytest.raises(ValueError, match=r"'cuda:2' cannot be had: torch sees 2.*Here are: cpu, cuda:0, cuda:1\. Choo"):
        device("cuda:2")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_does_not_work(monkeypatch):
    """Too old for this torch, say: it is seen, and the first kernel fails."""

    def fail(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with")

    monkeypatch.setattr(torch, "zeros", fail)
    said = []
    assert device("auto", said.append).name == "cpu"
    assert said == ["auto took cpu: cuda:0 does not work: CUDA error: no kernel image is available for execution on "
                    "the device"]  # fmt: skip
    with pytest.raises(ValueError, match="cuda:1 does not work: CUDA error: no kernel image"):
        device("cuda:1")


@pytest.mark.usefixtures("two_gpus")
def test_auto_takes_the_first_gpu(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    said = []
    assert device("auto", said.append).name == "cuda:0"
    assert said == ["auto took cuda:0, the first of 2 that torch sees"]


@pytest.mark.parametrize("driver", [None, "550.54.15"])
def test_no_gpu_with_and_without_a_driver(monkeypatch, driver):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    expected = "no NVIDIA driver is loaded.*Install the driver" if driver is None else "CUDA_VISIBLE_DEVICES"
    with pytest.raises(ValueError, match=expected):
        device("cuda")


def test_what_torch_warns_of_is_the_reason(monkeypatch):
    def warn():
        import warnings

        warnings.warn("CUDA initialization: The NVIDIA driver is too old (found version 11040).", stacklevel=2)
        return False

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", warn)
    monkeypatch.setattr(cuda, "driver", lambda: "470.1")
    with pytest.raises(ValueError, match="driver is too old"):
        device("cuda")


VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"


@pytest.mark.parametrize(("text", "expected"), [(VERSION, "550.54.15"), (OPEN, "570.86.15"), ("?", None)])
def test_the_driver(monkeypatch, text, expected):
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert cuda.driver() == expected


ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp\n"
X86 = "processor\t: 0\nmodel name\t: Some CPU @ 2.60GHz: fast\nflags\t\t: sse2 avx2 avx512_bf16\nflags\t: other\n"


@pytest.mark.parametrize(
    ("text", "flags"), [(ARM, {"fp", "asimd", "asimddp"}), (X86, {"sse2", "avx2", "avx512_bf16"}), ("", set())]
)
def test_flags_of_a_cpu(monkeypatch, text, flags):
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert cpu_flags() == flags
    if text == X86:
        assert cpu._name() == "Some CPU @ 2.60GHz: fast"


def test_importing_asks_nothing_of_cuda():
    code = (
        "import sys, remanence.backends.device as d; assert 'torch' not in sys.modules, 'a name takes no torch'\n"
        "d.parse_device('cuda:1')\n"
        "import torch; torch.cuda._lazy_init = torch.cuda.is_available = None\n"
        "import remanence.backends.cuda as cuda; cuda.CudaDevice(3)\n"
        "print(torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.gpu
def test_every_gpu_that_torch_sees_is_there():
    assert count() == torch.cuda.device_count() > 0
    assert device("auto").name == "cuda:0"
    assert CudaDevice(0).info()["driver"]
    assert CudaDevice(0).peaks()["memory"].value > 1e10
    with pytest.raises(ValueError, match="numbered from 0"):
        device(f"cuda:{count()}")
