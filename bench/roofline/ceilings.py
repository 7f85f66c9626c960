"""The ceilings of the device that is here, measured once and kept: what decides a figure is the name of its file."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...backends.ceilings import Ceilings, ceilings_from_json
from ...backends.device import Device
from ...compress.files import read_json, write_json
from ...kernels.ops import isa
from .measured import measure_ceilings

_log = logging.getLogger(__name__)
_SCHEMA = 3  # counts up when a figure comes to mean something else


class Kept(NamedTuple):
    """measured: when, ISO 8601 in UTC."""

    ceilings: Ceilings
    measured: str
    path: Path


def ceilings_of(
    device: Device, cache_dir: Path, again: bool = False, say: Callable[[str], None] = _log.info
) -> Ceilings:
    """Those kept under `cache_dir`, else measured now and kept; again: measured in any case.

    `say` is told which, and what is wrong with a file that is not used. ValueError as from
    `measure_ceilings`; nothing is kept then.
    """
    if not again and (kept := kept_ceilings(device, cache_dir, say)) is not None:
        say(f"ceilings of {device.name}: measured {kept.measured}, kept in {kept.path}")
        return kept.ceilings
    say(f"ceilings of {device.name}: measuring now; anything else that runs meanwhile makes them lower")
    ceilings = measure_ceilings(device, say)
    identity, path = _place(device, cache_dir)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        write_json(path, {"identity": identity, "measured": now, "ceilings": ceilings.as_json()})
    except OSError as error:
        say(f"ceilings of {device.name}: not kept: {error}")
    return ceilings


def kept_ceilings(device: Device, cache_dir: Path, say: Callable[[str], None] = _log.info) -> Kept | None:
    """Of this device under this software; None where there are none, or `say` is told what is wrong with the file."""
    identity, path = _place(device, cache_dir)
    if not path.exists():
        return None
    try:
        told = read_json(path)
        if set(told) != {"identity", "measured", "ceilings"}:
            raise ValueError("not a file of ceilings")
        if told["identity"] != identity:
            raise ValueError("it is about another device, or other software")
        return Kept(ceilings_from_json(told["ceilings"]), str(datetime.fromisoformat(told["measured"])), path)
    except (ValueError, TypeError, OSError) as error:
        say(f"{path}: not used: {error}")
        return None


def _place(device: Device, cache_dir: Path) -> tuple[dict[str, Any], Path]:
    """What decides the figures (of the device its name, driver, toolkit and threads; torch; the kernels), and the file
    for it."""
    identity = {
        "schema": _SCHEMA,
        "kind": device.kind,
        "device": device.info(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": isa(),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return identity, cache_dir / "ceilings" / f"{device.kind}-{key}.json"
