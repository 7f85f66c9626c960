"""Pruning and retraining a small part of the model (PERP): what it gives back, what it costs, what it brings back.

Three tables. Quality (perp_quality.py): held-out perplexity of one trained model under every pruner, and retrained by
every group of parameters. Cost (perp_cost.py): adapters beside training everything. Recovery (perp_recovery.py): the
demo model after unlearning and pruning, in either order, retrained on text, on kept rows, on the forgotten ones.
"""

from __future__ import annotations

from . import perp_cost, perp_quality, perp_recovery
from .texts import texts

PARTS = ("quality", "cost", "recovery")


def run(
    seed: int = 0,
    data_dir: str | None = None,
    methods: tuple[str, ...] = (),
    parts: tuple[str, ...] = PARTS,
) -> tuple[list[dict], list[dict]]:
    """(rows, checks).

    data_dir   a directory with WikiText-2's valid.txt and test.txt, of which a part is held out; None: the generated
               people's texts
    methods    pruners of the quality table; all when empty
    parts      of PARTS
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts: {part!r} is not one of {', '.join(PARTS)}")
    learned, held_out = texts(data_dir, more=True)
    rows: list[dict] = []
    checks: list[dict] = []
    if "quality" in parts:
        found = perp_quality.run(seed, learned, held_out, methods or perp_quality.PRUNERS)
        rows, checks = rows + found[0], checks + found[1]
    if "cost" in parts:
        found = perp_cost.run(seed)
        rows, checks = rows + found[0], checks + found[1]
    if "recovery" in parts:
        rows += perp_recovery.run(seed, learned if data_dir else None)
    return rows, checks
