"""What a run needs and took: counted as the system counts it, predicted in words that say what is meant."""

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from remanence.compress import footprint
from remanence.compress.footprint import Machine, Prediction, measure_machine, steady_heap, trim_heap

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="Linux's own counters"),
]
MIB = 2**20


HEAP = """
import os, random, sys, torch
from remanence.backends import memory
from remanence.compress import footprint
torch.set_num_threads(1)

def blocks():
    chance, kept = random.Random(0), []
    rss, size = memory.rss(), memory._status("VmSize")
    for _ in range(8):
        weights = [torch.ones(chance.choice([1, 2, 3, 5, 8]) * 2**20, dtype=torch.uint8) for _ in range(12)]
        kept += [torch.ones(75_000), *(torch.ones(chance.randint(10, 5000)) for _ in range(50))]
        del weights
    print(memory.rss() - rss, memory._status("VmSize") - size)
    return kept

if not os.fork():
    assert footprint.steady_heap()
    kept = blocks()
    sys.stdout.flush()
    os._exit(0)
os.wait()
before = memory.rss()
kept = blocks()
assert footprint.trim_heap()
print(memory.rss() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_weights_are_free_with_a_steady_heap_or_a_trimmed_one():
    """Small tensors live on between large ones that are freed, as in a run block by block."""
    done = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steady, steady_addresses, plain, addresses, trimmed = map(int, done.stdout.split())
    assert max(trimmed, steady, steady_addresses) < 12 * MIB  # what lives on is 7 MiB
    assert min(plain, addresses) > 36 * MIB


def test_no_glibc_no_promise(monkeypatch):
    class Other:
        def __init__(self, _):
            pass

    monkeypatch.setattr(footprint.ctypes, "CDLL", Other)
    assert steady_heap() is False
    assert trim_heap() is False


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("speed")
    start, cpu = time.perf_counter(), time.process_time()
    measured = measure_machine(directory, torch.bfloat16)
    taken = min(time.perf_counter() - start, 2 * (time.process_time() - cpu))  # others may have had the processor
    torch.set_num_threads(threads)
    return measured, directory, taken


def test_a_machine_is_measured_quickly_and_leaves_no_file(machine):
    measured, directory, taken = machine
    assert not list(directory.iterdir())
    assert all(value > 0 for value in asdict(measured).values())
    assert measured.threads == 1
    assert taken < 4  # two on an idle machine


def test_the_measured_rates_foretell_other_sizes(tmp_path):
    """Within a factor of 3. Other processes may take the processor at any time: one of five tries must be right."""
    from remanence.compress.knobs import RTN
    from remanence.compress.rtn import rtn
    from remanence.compress.shards import ShardWriter
    from remanence.compress.spec import QuantSpec

    x, w = torch.randn(700, 1152), torch.randn(900, 1152)
    y = torch.ones(48 * MIB, dtype=torch.uint8)
    z = y.clone()
    spec = QuantSpec(4, 128)
    work = {
        "gemm_float32": (2 * 700 * 1152 * 900, lambda: x @ w.T),
        "copy": (y.nbytes, lambda: z.copy_(y)),
        "quantize": (w.numel(), lambda: rtn(w, spec, torch.float16, RTN(clip=False))),
        "clip": (50 * 1152, lambda: rtn(w[:50], spec, torch.float16, RTN(clip=True))),
        "write": (y.nbytes, lambda: ShardWriter(Path(tempfile.mkdtemp(dir=tmp_path))).write(0, {"y": y})),
    }
    left = dict(work)
    for _ in range(5):
        measured = measure_machine(tmp_path)
        for what, (amount, function) in list(left.items()):
            times = []
            for _ in range(5):
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
            if 1 / 3 < statistics.median(times) * getattr(measured, what) / amount < 3:
                del left[what]
        if not left:
            break
    assert not left


def test_the_rates_are_amounts_per_second(monkeypatch, tmp_path):
    """With a clock of which every reading is half a second after the one before."""
    clock = iter(range(10**9))
    monkeypatch.setattr(footprint.time, "perf_counter", lambda: next(clock) / 2)
    expected = {
        "gemm_float32": 2 * 256 * 2048 * 2048,
        "gemm": 2 * 256 * 2048 * 2048,
        "copy": 2**25,
        "read": 36 * 2**20,
        "write": 36 * 2**20,
        "quantize": 1024 * 2048,
        "clip": 64 * 2048,
    }
    measured = asdict(measure_machine(tmp_path, torch.bfloat16))
    assert {name: measured[name] / 2 for name in expected} == expected


def test_the_median_of_calls_after_the_first(monkeypatch):
    readings = iter([0, 10, 10, 13, 13, 14, 14, 19])
    monkeypatch.setattr(footprint.time, "perf_counter", lambda: next(readings))
    calls = []
    assert footprint._seconds(lambda: calls.append(1), 21) == 4  # of 10, 3, 1, 5; another 5 would not fit
    assert len(calls) == 5


def test_a_prediction_in_words():
    said = Prediction(peak_memory=3 * 2**30, disk=50 * MIB, seconds=90)
    assert said.text() == "3.00 GiB of memory at most, 50.0 MiB on disk, 90.0 s"
    assert Prediction(0, 0, 7199).text().endswith("120 min")
    assert Prediction(0, 0, 3 * 3600 + 1).text().endswith("3.0 h")
    took = Prediction(peak_memory=int(2.7 * 2**30), disk=50 * MIB, seconds=135)
    assert said.compared(took) == (
        "memory 2.70 GiB (3.00 GiB predicted, -10%), disk 50.0 MiB (50.0 MiB predicted, +0%), "
        "time 2 min (90.0 s predicted, +50%)"
    )
    assert "(0.0 MiB predicted)" in Prediction(0, 0, 1).compared(took)


def test_machines_are_data():
    measured = Machine(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2)
    with pytest.raises(AttributeError):
        measured.gemm = 2.0
