"""Memory is counted as the system counts it, and every limit on it is seen."""

import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from remanence.backends import memory
from remanence.backends.memory import (
    _cgroups,
    _Group,
    available_memory,
    peak_rss,
    reset_peak,
    rss,
    total_memory,
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
    monkeypatch.setattr(memory, "_fields", lambda _: {})
    assert peak_rss() == rss() >= 0.9 * here
    assert 0 < available_memory() <= total_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
        [_Group(5000, 5000 - 3000 + 500)],
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
        [_Group(4000, 4000 - 3500 + 50)],
    ),
    "both levels": (
        "0::/a/b\n",
        "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        {
            f"sys/fs/cgroup/{group}/memory.{name}": text
            for group, limit in (("a", "9000"), ("a/b", "7000"))
            for name, text in (("max", limit), ("current", "1000"), ("stat", STAT))
        },
        [_Group(7000, 7000 - 1000 + 50), _Group(9000, 9000 - 1000 + 50)],
    ),
    "container": (
        "4:memory:/docker/abc\n",
        "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "8000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n",
            "sys/fs/cgroup/memory/memory.stat": STAT,
        },
        [_Group(8000, 8000 - 1000 + 500)],
    ),
    "group in a container": (
        "4:memory:/docker/abc/job\n",
        "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
        {
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "7000\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000\n",
            "sys/fs/cgroup/memory/job/memory.stat": STAT,
        },
        [_Group(7000, 7000 - 1000 + 500)],
    ),
    "namespace": (
        "0::/\n",
        "30 25 0:26 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        {
            "sys/fs/cgroup/memory.max": "8000\n",
            "sys/fs/cgroup/memory.current": "1000\n",
            "sys/fs/cgroup/memory.stat": STAT,
        },
        [_Group(8000, 8000 - 1000 + 50)],
    ),
    "none": ("0::/\n", "25 1 8:1 / / rw - ext4 /dev/sda1 rw\n", {}, []),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_the_cgroups_that_limit(case, tmp_path):
    own, mounts, files, groups = CGROUPS[case]
    for name, text in ({"proc/self/cgroup": own, "proc/self/mountinfo": mounts} | files).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert _cgroups(tmp_path) == groups


def test_the_least_of_all_limits_counts(monkeypatch):
    monkeypatch.setattr(memory, "_cgroups", lambda: [_Group(9 * MIB, 5 * MIB), _Group(40 * MIB, 3 * MIB)])
    assert total_memory() == 9 * MIB
    assert available_memory() == 3 * MIB
    monkeypatch.setattr(memory, "_cgroups", lambda: [_Group(9, -7)])
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
