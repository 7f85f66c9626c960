"""Memory as the system counts it: what this process has, had at most, and can still take."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # bytes; cgroup v1 writes "no limit" as the largest multiple of a page


def rss() -> int:
    """Bytes of memory that this process has now; elsewhere than on Linux, as `peak_rss`."""
    return _status("VmRSS") or _max_rss()


def peak_rss() -> int:
    """Most bytes of memory that this process ever had, or had since `reset_peak`."""
    return _status("VmHWM") or _max_rss()


def reset_peak() -> bool:
    """Let `peak_rss` start again from now; False where the system does not allow it (the old peak remains)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    # Some sandboxes take the order and do nothing.
    return peak_rss() - rss() < 2**24


def total_memory() -> int:
    """Bytes of memory that there are for this process: the machine's, or the least limit of its cgroups."""
    return min([_physical(), *(group.limit for group in _cgroups())])


def available_memory() -> int:
    """Bytes that this process can still take: the least of free memory, cgroup limits and limits of the process.

    File pages that a cgroup would give back when pressed count as free, as the system counts them in MemAvailable.
    """
    free = _fields(Path("/proc/meminfo")).get("MemAvailable")
    if free is None:
        free = _physical() - rss()
    return max(0, min([free, *(group.room for group in _cgroups()), *_limit_rooms()]))


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _status(field: str) -> int | None:
    return _fields(Path("/proc/self/status")).get(field)


def _fields(path: Path) -> dict[str, int]:
    """Sizes in bytes from a file of lines like `VmRSS:  1712 kB`; empty where there is no such file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def _max_rss() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _limit_rooms() -> list[int]:
    """What the limits of the process leave: of its address space, and of its data."""
    try:
        import resource
    except ImportError:
        return []
    rooms = []
    for limit, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, used = resource.getrlimit(limit)[0], _status(field)
        if soft != resource.RLIM_INFINITY and used is not None:
            rooms.append(soft - used)
    return rooms


# Version: controller in /proc/self/cgroup, file of the limit, of the use, and fields of memory.stat with file pages.
_CGROUPS: dict[str, tuple[str, str, str, tuple[str, str]]] = {
    "cgroup2": ("", "memory.max", "memory.current", ("inactive_file", "active_file")),
    "cgroup": (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


@dataclass(frozen=True)
class _Group:
    """Bytes: what a cgroup may have, and what is left of it (file pages that it would give back are)."""

    limit: int
    room: int


def _cgroups(root: Path = Path("/")) -> list[_Group]:
    """Every limited cgroup that this process is in, from its own one up to the top that can be seen."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (root / "proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for mount in mounts:
        kind = mount[mount.index("-") + 1]
        if kind not in _CGROUPS:
            continue
        controller, limit, use, cached = _CGROUPS[kind]
        own = [path for _, controllers, path in groups if controller in controllers.split(",")]
        if not own:
            continue
        # In a container the mount may show the process's own group as its top.
        base, top = mount[3], root / mount[4].lstrip("/")
        inside = own[0].removeprefix(base) if own[0].startswith(base.rstrip("/") + "/") else ""
        folder = top / inside.strip("/")
        for place in [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]:
            if (group := _group(place, limit, use, cached)) is not None:
                found.append(group)
    return found


def _group(place: Path, limit_file: str, use_file: str, cached: tuple[str, str]) -> _Group | None:
    """None without a limit."""
    try:
        text = (place / limit_file).read_text().strip()
        if text == "max" or int(text) >= _UNLIMITED:
            return None
        stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        pages = sum(int(stat.get(name, 0)) for name in cached)
        return _Group(int(text), int(text) - int((place / use_file).read_text()) + pages)
    except (OSError, ValueError):  # the top of cgroup 2 has no such files
        return None
