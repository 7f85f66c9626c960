"""Where a model is. Without torch, so that a wrong path is told before anything heavy loads."""

from __future__ import annotations

import re
from pathlib import Path


def local_model(path: Path | str) -> Path | None:
    """The model's directory, or None for what can only be a hub id ("org/name").

    Raises FileNotFoundError for a directory that is not there or holds no config.json.
    """
    directory = Path(path)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"{directory}: no config.json in it; not a Hugging Face model directory")
        return directory
    hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path))
    if directory.exists() or directory.parent.exists() or not hub_id:
        raise FileNotFoundError(f"{path}: no such model directory")
    return None


def base_directory(path: Path | str) -> Path | str:
    """Where the weights of the model at `path` are: base/ where an adapter is kept apart, else the path itself."""
    directory = Path(path)
    return directory / "base" if (directory / "adapter").is_dir() and (directory / "base").is_dir() else path
