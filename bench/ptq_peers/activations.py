"""Synthetic calibration rows for timing one layer: the same numbers for every quantizer, in chunks from a file.

Rows x = s * (z A + e): a few strong common directions (z A, falling off as i^-1/2), noise e of its own per channel, and
channel sizes s that differ by orders of magnitude, as those of trained language models do (Dettmers et al. 2022, arXiv
2208.07339). numpy only: the scripts beside this file run where remanence is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np


def rows(features: int, sequences: int, tokens: int, seed: int) -> Iterator[np.ndarray]:
    """`sequences` chunks [tokens, features] float32."""
    random = np.random.default_rng(seed)
    rank = max(1, features // 8)
    strength = np.arange(1, rank + 1, dtype=np.float32) ** -0.5
    A = strength[:, None] * random.standard_normal((rank, features), dtype=np.float32)  # [rank, features]
    s = np.exp(random.standard_normal(features, dtype=np.float32))
    for _ in range(sequences):
        z = random.standard_normal((tokens, rank), dtype=np.float32)
        e = random.standard_normal((tokens, features), dtype=np.float32)
        yield s * (z @ A + e)


def weight(out_features: int, features: int, seed: int) -> np.ndarray:
    """[out_features, features] float32, normal, of variance 1 / features."""
    random = np.random.default_rng(seed)
    return random.standard_normal((out_features, features), dtype=np.float32) * np.float32(features**-0.5)


def write(path: Path | str, features: int, sequences: int = 128, tokens: int = 512, seed: int = 0) -> None:
    """Those rows as one .npy file [sequences, tokens, features] float32; one chunk in memory at a time."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (sequences, tokens, features)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in rows(features, sequences, tokens, seed):
            chunk.astype("<f4", copy=False).tofile(file)


def read(path: Path | str) -> Iterator[np.ndarray]:
    """The chunks [tokens, features] of a file from `write`, one by one: a memory map would count as memory used."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        (sequences, tokens, features), _, dtype = np.lib.format.read_array_header_1_0(file)
        for _ in range(sequences):
            yield np.fromfile(file, dtype, tokens * features).reshape(tokens, features)
