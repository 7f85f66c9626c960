"""MUSE's last two axes as runs of the audit: forget sets of growing size (scalability), requests one after another
(sustainability) (Shi et al. 2024, arXiv 2407.06460, section 3.3).

The forget set is split into requests by person. Run k of n audits a model that has forgotten the first k: at once from
the target, or request by request, each starting from the model before. What was not yet asked for is kept. Target and
oracle are the same in all runs (an oracle that never saw any of the forget set never saw a part of it).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import AuditConfig
from .engine import audit
from .progress import Reporter

AXES = {"scalability": False, "sustainability": True}
SCHEMA = "remanence.axis/1"
# What is carried from every cell into the table of runs.
_KEPT = (
    *("method", "recipe", "control", "verdict", "reason", "error", "unforgotten", "forget", "retain"),
    *("recovered_share", "kept_share", "model_utility", "muse", "forget_quality"),
)


def runs(
    config: AuditConfig, axis: str, requests: int, cache: Path, reporter: Reporter | None = None
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """(requests made, document, items) of every run along `axis`; as `audit` raises."""
    if axis not in AXES:
        raise ValueError(f"axis: {axis!r} is not one of {', '.join(AXES)}")
    for made in range(1, requests + 1):
        asked = config.model_dump() | {"requests": requests, "request": made, "sequential": AXES[axis]}
        result = audit(AuditConfig(**asked), cache, reporter)
        yield made, result.document, result.items


def axis_document(axis: str, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs side by side: {schema, axis, runs: [{requests, forget_rows, controls, cells}]}."""
    return {
        "schema": SCHEMA,
        "axis": axis,
        "runs": [
            {
                "requests": document["config"]["request"],
                "forget_rows": document["data"]["forget"],
                "controls": {name: control["ok"] for name, control in document["controls"].items()},
                "cells": [{key: cell[key] for key in _KEPT if key in cell} for cell in document["cells"]],
            }
            for document in documents
        ],
    }
