"""What a run needs and took: counted as the system counts it, predicted in words that say what is meant."""

import os
import platform
import resource
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
from remanence.compress.footprint import (
    Machine,
    Prediction,
    available_memory,
    measure_machine,
    peak_rss,
    reset_peak,
    rss,
    steady_heap,
    trim_heap,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="Linux's own counters"),
]
MIB = 2**20


def test_a_peak_is_seen_after_it_is_gone():
    before = rss()
    x = torch.ones(2**26, dtype=torch.uint8)
    assert rss() - before == pytest.approx(64 * MIB, abs=8 * MIB)
    del x
    assert rss() - before < 8 * MIB
    assert peak_rss() - before > 56 * MIB
    if not reset_peak():
        pytest.skip("this system does not let a process reset its peak")
    assert peak_rss() - before < 16 * MIB
    y = torch.ones(2**25, dtype=torch.uint8)
    assert peak_rss() - before == pytest.approx(32 * MIB, abs=16 * MIB)
    del y


def test_what_the_system_says_elsewhere(monkeypatch):
    """Without /proc: the peak that getrusage knows, which is at least what we have."""
    here = rss()
    monkeypatch.setattr(footprint, "_fields", lambda _: {})
    assert peak_rss() == rss() >= 0.9 * here
    assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_reset_without_effect_is_said(monkeypatch):
    x = torch.ones(2**26, dtype=torch.uint8)
    del x
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *_: 1)
        assert peak_rss() - rss() > 32 * MIB
        assert reset_peak() is False


def test_a_refused_reset_is_said(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert reset_peak() is False


def test_a_limit_of_addresses_is_what_is_left():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    assert available_memory() > 300 * MIB
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 200 * MIB, hard))
        assert available_memory() == pytest.approx(200 * MIB, abs=8 * MIB)
        x = torch.empty(2**26, dtype=torch.uint8)  # taken, though not touched
        assert available_memory() == pytest.approx(136 * MIB, abs=8 * MIB)
        with pytest.raises(RuntimeError):
            torch.empty(available_memory() + 512 * MIB, dtype=torch.uint8)
        del x
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# As real systems have them: version 1 beside an empty version 2 with several controllers; version 2 alone; a container
# whose mount shows its own group as the top; systemd's slices, the outer one the tighter.
STAT = "cache 5\ninactive_file 30\nactive_file 20\ntotal_inactive_file 300\ntotal_active_file 200\n"
CGROUPS = {
    "version 1": (
        "9:name=systemd:/\n4:memory:/jobs/a\n2:cpu,cpuacct:/\n0::/\n",
        "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
        "36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n",
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "999\n",
            "sys/fs/cgroup/memory/memory.stat": STAT,
            "sys/fs/cgroup/memory/jobs/a/memory.limit_in_bytes": "5000\n",
            "sys/fs/cgroup/memory/jobs/a/memory.usage_in_bytes": "3000\n",
            "sys/fs/cgroup/memory/jobs/a/memory.stat": STAT,
        },
        [5000 - 3000 + 500],
    ),
    "version 2": (
        "0::/user.slice/run.scope\n",
        "25 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 25 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n",
        {
            "sys/fs/cgroup/user.slice/memory.max": "4000\n",
            "sys/fs/cgroup/user.slice/memory.current": "3500\n",
            "sys/fs/cgroup/user.slice/memory.stat": STAT,
            "sys/fs/cgroup/user.slice/run.scope/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/run.scope/memory.current": "100\n",
            "sys/fs/cgroup/user.slice/run.scope/memory.stat": STAT,
        },
        [4000 - 3500 + 50],
    ),
    "both levels": (
        "0::/a/b\n",
        "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        {
            f"sys/fs/cgroup/{group}/memory.{name}": text
            for group, limit in (("a", "9000"), ("a/b", "7000"))
            for name, text in (("max", limit), ("current", "1000"), ("stat", STAT))
        },
        [7000 - 1000 + 50, 9000 - 1000 + 50],
    ),
    "container": (
        "4:memory:/docker/abc\n",
        "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "8000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n",
            "sys/fs/cgroup/memory/memory.stat": STAT,
        },
        [8000 - 1000 + 500],
    ),
    "group in a container": (
        "4:memory:/docker/abc/job\n",
        "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
        {
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "7000\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000\n",
            "sys/fs/cgroup/memory/job/memory.stat": STAT,
        },
        [7000 - 1000 + 500],
    ),
    "namespace": (
        "0::/\n",
        "30 25 0:26 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        {
            "sys/fs/cgroup/memory.max": "8000\n",
            "sys/fs/cgroup/memory.current": "1000\n",
            "sys/fs/cgroup/memory.stat": STAT,
        },
        [8000 - 1000 + 50],
    ),
    "none": ("0::/\n", "25 1 8:1 / / rw - ext4 /dev/sda1 rw\n", {}, []),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_the_rooms_that_cgroups_leave(case, tmp_path):
    own, mounts, files, rooms = CGROUPS[case]
    for name, text in ({"proc/self/cgroup": own, "proc/self/mountinfo": mounts} | files).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert footprint._cgroup_rooms(tmp_path) == rooms


def test_the_least_of_all_limits_counts(monkeypatch):
    monkeypatch.setattr(footprint, "_cgroup_rooms", lambda: [5 * MIB, 3 * MIB])
    assert available_memory() == 3 * MIB
    monkeypatch.setattr(footprint, "_cgroup_rooms", lambda: [-7])
    assert available_memory() == 0


def in_own_cgroup(limit):
    """A group of cgroup 1 with a limit, below ours; or a skip with the reason."""
    top = Path("/sys/fs/cgroup/memory")
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"), None)
    group = top / (own or "").strip("/") / f"remanence-test-{os.getpid()}"
    try:
        if own is None:
            pytest.skip("no cgroup 1 here")
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    return group


def test_a_real_cgroup_with_a_limit():
    group = in_own_cgroup(300 * MIB)
    try:
        child = os.fork()
        if not child:
            (group / "cgroup.procs").write_text(str(os.getpid()))
            empty = available_memory()
            x = torch.ones(2**26, dtype=torch.uint8)
            full = available_memory()
            del x
            good = 280 * MIB < empty <= 300 * MIB and abs(empty - full - 64 * MIB) < 8 * MIB
            os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        group.rmdir()


HEAP = """
import os, random, sys, torch
from remanence.compress import footprint
torch.set_num_threads(1)

def blocks():
    chance, kept = random.Random(0), []
    rss, size = footprint.rss(), footprint._status("VmSize")
    for _ in range(8):
        weights = [torch.ones(chance.choice([1, 2, 3, 5, 8]) * 2**20, dtype=torch.uint8) for _ in range(12)]
        kept += [torch.ones(75_000), *(torch.ones(chance.randint(10, 5000)) for _ in range(50))]
        del weights
    print(footprint.rss() - rss, footprint._status("VmSize") - size)
    return kept

if not os.fork():
    assert footprint.steady_heap()
    kept = blocks()
    sys.stdout.flush()
    os._exit(0)
os.wait()
before = footprint.rss()
kept = blocks()
assert footprint.trim_heap()
print(footprint.rss() - before)
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
