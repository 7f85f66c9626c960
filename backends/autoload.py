"""An installed torch-npu that cannot be loaded must not take torch with it.

torch loads torch-npu when it is imported itself (its entry point `torch.backends`). Where CANN is not installed, or its
set_env.sh was not sourced, that ends `import torch` with an error, and transformers and accelerate, which try to import
torch-npu wherever its wheel is, go down too. After `import remanence` it is loaded here, right behind torch; where that
fails it is as if it were not installed, in this process and (for torch alone) in those that it starts, and `failure`
says why.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder

from .on_import import after_import

PACKAGE = "torch_npu"
SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"

_failed: list[str] = []


def guard() -> None:
    """Loads nothing unless torch is there already. Twice is once."""
    if PACKAGE in sys.modules or PathFinder.find_spec(PACKAGE) is None:
        return
    if "torch" in sys.modules:  # its own loading was switched off
        load()
        return
    if os.environ.get(SWITCH) == "0":
        _check_cann()
        return
    os.environ[SWITCH] = "0"
    after_import("torch", _load_backends)


def _load_backends(_: object) -> None:
    """What torch would have done: torch-npu first, and then the backends of others."""
    if load() is None:
        os.environ[SWITCH] = "1"  # torch's default
    from importlib.metadata import entry_points

    for point in entry_points(group="torch.backends"):
        if point.module != PACKAGE:
            point.load()()


def _check_cann() -> None:
    """It is not to be loaded, but other libraries would: without CANN it is hidden from them."""
    import ctypes

    try:
        ctypes.CDLL("libhccl.so")
    except OSError as error:
        _hide(f"ImportError: {error}")


def load() -> str | None:
    """Import torch-npu; None, or the reason why it cannot be, with which it is hidden from every other library."""
    if _failed:
        return _failed[0]
    try:
        __import__(PACKAGE)
        if not hasattr(sys.modules["torch"], "npu"):
            raise ImportError("its files are not complete")
    except Exception as error:  # torch-npu raises ImportError, RuntimeError, OSError and plain Exception
        said = str(error).strip().splitlines()
        _hide(f"{type(error).__name__}: {said[0] if said else 'no reason given'}")
        return _failed[0]
    return None


def _hide(reason: str) -> None:
    for name in [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]:
        del sys.modules[name]
    sys.modules[PACKAGE] = None  # type: ignore[assignment]  # importlib finds no such package then
    _failed.append(reason)


def failure() -> str | None:
    """Why an installed torch-npu was not loaded; None: it was, or nobody tried."""
    return _failed[0] if _failed else None
