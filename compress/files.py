"""Writing that leaves either the whole result or nothing: everything goes to a temporary sibling and is renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_dir(target: Path | str) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends, and vanishes when it fails.

    Raises FileExistsError when `target` exists and is not an empty directory; OSError(ENOSPC) naming the target and
    the space left when the disk is full.
    """
    target = Path(target).absolute()
    _vacant(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The process number lets a later run tell what a killed one left behind.
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-{os.getpid()}_", dir=target.parent))
    try:
        with publish(work, target):
            yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextmanager
def publish(work: Path, target: Path, keep: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Have the directory `work` become `target` when the block ends; an error removes it, an interruption, or an error
    of one of the kinds `keep`, leaves it."""
    target = target.absolute()  # "." cannot be renamed to
    _vacant(target)
    work.mkdir(parents=True, exist_ok=True)
    try:
        with disk_errors(target, "what is done stays, to be resumed" if keep else "nothing was kept of it"):
            yield
            for path in sorted(work.rglob("*")):
                if path.is_file():
                    _sync(path)
            work.chmod(0o755)
            os.replace(work, target)
            _sync(target.parent)
    except Exception as error:
        if not isinstance(error, keep):
            shutil.rmtree(work, ignore_errors=True)
        raise


def _vacant(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(errno.EEXIST, f"{target}: exists and is not empty; remove it or choose another place")


def write_text(path: Path | str, text: str) -> None:
    """`write_bytes` of text, as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file at once: readers see the old one or the new one, never half of either."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    try:
        with disk_errors(path):
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path | str, value: object) -> None:
    """`write_text` of indented JSON; NaN and infinity are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> dict[str, Any]:
    """A JSON object from a file; ValueError names file and line of what cannot be read."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


@contextmanager
def disk_errors(target: Path, kept: str = "nothing was kept of it") -> Iterator[None]:
    """Name the target and the space left when the disk is full, whichever library noticed it first."""
    try:
        yield
    except Exception as error:
        # safetensors reports a full disk as its own error type, with the system's text inside.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if not full:
            raise
        left = shutil.disk_usage(_existing(target)).free
        message = f"disk full while writing {target} ({left / 2**20:.1f} MiB left); {kept}"
        raise OSError(errno.ENOSPC, message) from error


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
