"""How long a person waits before anything happens: fresh processes, peers beside ours."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

REPEATS = 5
HELP_LIMIT_S = 0.5

_COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import remanence": ["-c", "import remanence"],
    "remanence --help": ["-m", "remanence", "--help"],
    "remanence audit --help": ["-m", "remanence", "audit", "--help"],
    "import torch": ["-c", "import torch"],
}


def run(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # noqa: ARG001 (nothing is random here)
    """Rows: median seconds of a fresh process per command. Checks: both helps under half a second."""
    seconds: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    for _ in range(REPEATS + 1):
        for name, arguments in _COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    # The first round fills the file cache and is left out.
    rows: list[dict[str, Any]] = [
        {
            "command": name,
            "median_s": statistics.median(values[1:]),
            "best_s": min(values[1:]),
            "spread_s": max(values[1:]) - min(values[1:]),
            "repeats": REPEATS,
        }
        for name, values in seconds.items()
    ]
    checks = [
        {
            "what": f"{row['command']}, median seconds",
            "limit": HELP_LIMIT_S,
            "value": row["median_s"],
            "ok": row["median_s"] < HELP_LIMIT_S,
        }
        for row in rows
        if row["command"].endswith("--help")
    ]
    return rows, checks
