"""A content-addressed store of finished stages: the same work is never done twice, half-done work never seen.

A stage's key is the sha256 of everything that decides its result. A directory in the store is complete or absent; one
whose files no longer match their recorded sums is discarded and made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .compress.files import atomic_dir, read_json, write_json

_MANIFEST = "manifest.json"


def digest(value: object) -> str:
    """sha256 of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def directory_digest(path: Path) -> str:
    """sha256 over names and contents of every file of a model directory (not of the manifest a store adds)."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != _MANIFEST)
    return digest({str(p.relative_to(path)): file_digest(p) for p in files})


class Store:
    """root/<first two of key>/<key>/ holds a stage's files and its manifest."""

    def __init__(self, root: Path | str, warn: Callable[[str], None]) -> None:
        self.root = Path(root)
        self._warn = warn
        self._sweep()

    def key(self, stage: str, inputs: dict[str, Any]) -> str:
        return digest({"stage": stage, **inputs})

    def find(self, key: str) -> Path | None:
        """The finished directory of `key`, or None; a damaged one is deleted with a warning."""
        path = self._path(key)
        if not path.is_dir():
            return None
        if self._intact(path):
            return path
        self._warn(f"cache entry {key[:12]} is damaged and will be made again")
        shutil.rmtree(path)
        return None

    def make(self, key: str, stage: str, inputs: dict[str, Any], build: Callable[[Path], None]) -> Path:
        """Run `build` on an empty directory and keep it under `key`; nothing is kept when it raises."""
        path = self._path(key)
        try:
            with atomic_dir(path) as work:
                build(work)
                files = {str(p.relative_to(work)): file_digest(p) for p in sorted(work.rglob("*")) if p.is_file()}
                write_json(work / _MANIFEST, {"stage": stage, "key": key, "inputs": inputs, "files": files})
        except OSError as error:
            # Another run made the same thing meanwhile; both are equal, and the first one stays.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or self.find(key) is None:
                raise
        return path

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / key

    def _intact(self, path: Path) -> bool:
        try:
            files = read_json(path / _MANIFEST)["files"]
            assert isinstance(files, dict)
            return all(file_digest(path / name) == value for name, value in files.items())
        except (OSError, ValueError, KeyError, AssertionError):
            return False

    def _sweep(self) -> None:
        """Remove what killed processes left behind; the name of a work directory ends in its process's number."""
        for work in self.root.glob("*/.*.tmp-*"):
            pid = work.name.rpartition("-")[2].partition("_")[0]
            if pid.isdigit() and not _alive(int(pid)):
                shutil.rmtree(work, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
