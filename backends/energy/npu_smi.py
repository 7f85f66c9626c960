"""An Ascend NPU's power by Huawei's npu-smi, whose words and layouts differ from release to release."""

from __future__ import annotations

import re
import shutil
import subprocess

# "Rated Power Dissipation" of the 310 and "Power Limit" are constants.
_CONSTANT = re.compile(r"rated|limit|max|cap\b|threshold", re.IGNORECASE)
# Watts of one; releases write the unit with the label or behind the value, or not at all.
_UNITS = {"W": 1.0, "0.1W": 0.1, "mW": 1e-3, "": 1.0}


def installed() -> bool:
    return shutil.which("npu-smi") is not None


def chips() -> dict[int, tuple[int, int]]:
    """Chip's number -> (NPU, chip), as `npu-smi info -m` has it; empty where it does not say."""
    return parse_mapping(_info("-m"))


def power(npu: int, chip: int) -> float | None:
    """Watts now."""
    return parse_power(_info("-t", "power", "-i", str(npu), "-c", str(chip)))


def _info(*arguments: str) -> str:
    """What `npu-smi info` prints; nothing where it cannot."""
    tool = shutil.which("npu-smi")
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, "info", *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def parse_mapping(text: str) -> dict[int, tuple[int, int]]:
    """Chip's number -> (NPU, chip), from `npu-smi info -m`: a line each, NPU, chip and number first."""
    rows = re.findall(r"^\s*(\d+)\s+(\d+)\s+(\d+)\s+\S", text, flags=re.MULTILINE)
    return {int(number): (int(npu), int(chip)) for npu, chip, number in rows}


def parse_power(text: str) -> float | None:
    """Watts from `npu-smi info -t power`, whose releases call it Power Dissipation, Real-time Power or Power Usage;
    None where it is in another unit."""
    row = r"^([^\n:]*power[^\n:]*):[ \t]*(\d+(?:\.\d+)?)([^\n]*)"
    rows = re.findall(row, text, flags=re.MULTILINE | re.IGNORECASE)
    told = ((float(value), _watts(what, behind)) for what, value, behind in rows if not _CONSTANT.search(what))
    return next((value * factor for value, factor in told if factor is not None), None)


def _watts(label: str, behind: str) -> float | None:
    """Of one of what is told; None: of another unit, or of two."""
    labelled = re.findall(r"\(([^()]*)\)", label)
    units = {unit for unit in ("".join(text.split()) for text in (*labelled[-1:], behind)) if unit}
    return _UNITS.get(units.pop() if units else "") if len(units) < 2 else None
