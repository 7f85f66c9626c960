"""Joules for a token at full depth and with exits, the KV cache on for all, in windows that take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..backends.device import Device
from ..backends.energy.meter import LENGTHS, Lengths, measure
from ..backends.energy.probe import ESTIMATE, Found
from .energy import document, units
from .exit_speed import Served, serving
from .joules import cost, ranked


def exit_energy(
    model: PreTrainedModel,
    device: Device,
    ids: Tensor,
    mask: Tensor,
    ways: Sequence[Served],
    new: int,
    found: Found,
    lengths: Lengths = LENGTHS,
) -> dict[str, Any]:
    """JSON values: `tokens` by the name of the way, what one generated token took, the prompt's share included
    (bench.joules.Cost; `joules` is None where nothing measures the device itself), their order where a counter measured
    them all, and how it was done."""

    def work(way: Served) -> Callable[[], int]:
        def done() -> int:
            # Entered anew each time: ways take turns, and each finds the model as it was.
            with serving(model, ids, mask, way, new) as answer:
                answer()
            return len(ids) * new

        return done

    works = {way.name: work(way) for way in ways}
    measured = measure(device, works, found, lengths)
    tokens = {name: cost(measured, {name: 1}, units(measured, name)) for name in works}
    counted = all(token.joules and token.joules.total and not token.estimated for token in tokens.values())
    return {
        "batch": len(ids),
        "new": new,
        "tokens": {name: asdict(token) for name, token in tokens.items()},
        "fewest_first": ranked(tokens) if counted else None,
        **document(measured),
    }


def told(token: dict[str, Any]) -> dict[str, Any] | None:
    """One of `tokens` as a cell of the audit has it: joules, low, high, methods, scopes; None: not measured.

    low, high   95% interval over windows, of an estimate what the truth lies between; None: one window, so none
    """
    joules = token["joules"]
    if joules is None or joules["total"] is None:
        return None
    ends = joules if ESTIMATE in joules["methods"] else joules["total"]
    return {
        "joules": joules["total"]["mean"],
        "low": ends["low"],
        "high": ends["high"],
        "methods": list(joules["methods"]),
        "scopes": list(joules["scopes"]),
    }


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """For a table."""
    made = []
    for name, token in found["tokens"].items():
        joules = token["joules"] or {}
        total, above = joules.get("total") or {}, joules.get("above_idle") or {}
        made.append(
            {
                "energy": name,
                "batch": found["batch"],
                "s_token": token["seconds"]["mean"],
                "J_token": total.get("mean"),
                "low": total.get("low"),
                "high": total.get("high"),
                "above_idle": above.get("mean"),
                "method": ", ".join(joules.get("methods", ())) or "no counter",
            }
        )
    return made
