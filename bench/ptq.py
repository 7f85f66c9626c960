"""Our quantizers beside GPTQModel's and llm-compressor's, in one run: quality, time and memory of a layer, recovery.

Three tables: held-out perplexity and block error on one trained model (ptq_quality.py), seconds and memory of GPTQ on
layers of a 7B model's shapes (ptq_layers.py), and what each quantizer brings back of what a model forgot, by
calibration data (ptq_recovery.py, no peers). The peers run in environments of their own, which the first run builds.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from . import ptq_layers, ptq_quality, ptq_recovery
from .peers import PEERS
from .texts import texts

PARTS = ("quality", "layers", "recovery")


def run(
    seed: int = 0,
    peers: bool = True,
    data_dir: str | None = None,
    methods: tuple[str, ...] = (),
    parts: tuple[str, ...] = PARTS,
) -> tuple[list[dict], list[dict]]:
    """(rows, checks).

    peers      False: ours alone, and no check against anybody
    data_dir   a directory with WikiText-2's valid.txt (to train and to calibrate) and test.txt (held out); None: the
               generated people's texts
    methods    of "rtn", "gptq", "awq", "awq-asym"; all when empty
    parts      of PARTS
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts: {part!r} is not one of {', '.join(PARTS)}")
    names = tuple(PEERS) if peers else ()
    cache = Path(os.environ.get("REMANENCE_CACHE") or Path.home() / ".cache" / "remanence") / "peers"
    learned, held_out = texts(data_dir)
    rows: list[dict] = []
    checks: list[dict] = []
    with tempfile.TemporaryDirectory() as place:
        if "quality" in parts:
            found = ptq_quality.run(seed, Path(place), cache, names, learned, held_out, methods)
            rows, checks = rows + found[0], checks + found[1]
        if "layers" in parts:
            found = ptq_layers.run(seed, Path(place), cache, names)
            rows, checks = rows + found[0], checks + found[1]
        if "recovery" in parts:
            rows += ptq_recovery.run(seed, learned if data_dir else None)
    return rows, checks
