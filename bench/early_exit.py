"""Early exit: is it right (gold), what it keeps (quality), what it saves (speed, energy), and what it leaks (leak)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..backends.device import device
from ..backends.energy.meter import LENGTHS, Lengths
from ..backends.energy.probes import probes, summed
from ..compress.early_exit.policy import Confidence, Fixed, Full, Policy
from ..compress.early_exit.probe import fit_probe
from . import exit_energy
from .exit_gold import run_gold
from .exit_quality import CONTEXT, Subject, run_quality, subject
from .exit_recovery import run_leak
from .exit_speed import Served, run_large, run_speed

Found = tuple[list[dict[str, Any]], list[dict[str, Any]]]

# Tokens after each prompt, where time and joules are taken.
NEW = 40
# Of the probe: where it is asked to be sure, and where it is not.
SURE, LIKELY = 0.9, 0.6


class _Bench:
    """What parts share: the model that quality, speed and energy are about."""

    def __init__(self, seed: int, data_dir: str | None, lengths: Lengths) -> None:
        self.seed, self.data_dir, self.lengths = seed, data_dir, lengths

    @cached_property
    def subject(self) -> Subject:
        return subject(self.seed, self.data_dir)

    def gold(self) -> Found:
        return run_gold(self.seed)

    def quality(self) -> Found:
        return run_quality(self.subject, self.seed)

    def speed(self) -> Found:
        """Of the tuned model, and of one whose weights come from memory."""
        policies = self.policies()
        model, judge = self.subject.tuned, self.subject.judge
        rows = run_speed(model, self.prompts, policies, self.subject.states.exits[0], NEW)
        whole = judge.likeliest(model)
        read = {Served(policy).name: judge.read(model, policy, whole) for policy in (Full(), *policies.values())}
        for row in rows:
            # Drafts are the whole model's; what rows do that leave together hangs on those beside them.
            of = read.get(row["way"], read[Served(Full()).name])
            row["perplexity"] = None if row["exit_sync"] == "batch" else math.exp(of.nll.mean())
        large = list(run_large(self.seed))
        best = {
            batch: max(
                (row for row in rows if row["batch"] == batch and row["exit_sync"] == "row"), key=lambda r: r["speedup"]
            )
            for batch in (1, 8)
        }
        checks = []
        for batch, row in best.items():
            what = f"batch {batch}: times full depth, KV cache on ({row['way']}, perplexity {row['perplexity']:.2f})"
            checks.append({"what": what, "limit": "> 1", "value": row["speedup"], "ok": row["speedup"] > 1})
        same = min(row["agreement"] for row in rows if row["acceptance"] is not None)
        checks.append({"what": "drafts that are verified: same tokens", "limit": 1.0, "value": same, "ok": same == 1})
        return [{"served": row.pop("way"), **row} for row in rows] + large, checks

    def energy(self) -> Found:
        """Joules, where a counter measures them; else why there are none."""
        machine = device("cpu")
        counters = probes(machine)
        ids, mask = self.prompts(1)
        fixed = Fixed(exits=self.subject.states.exits[1:2])
        ways = [Served(Full()), Served(fixed), Served(Full(), drafting=self.subject.states.exits[0])]
        found = exit_energy.exit_energy(self.subject.tuned, machine, ids, mask, ways, NEW, counters, self.lengths)
        missing = [{"counter": each.probe, "why": each.reason, "remedy": each.remedy} for each in counters.missing]
        told = sum(token["joules"] is not None for token in found["tokens"].values())
        expected = len(ways) if summed(counters, machine) else 0
        what = "ways with joules: all where a counter is, else none"
        check = {"what": what, "limit": expected, "value": told, "ok": told == expected}
        return exit_energy.rows(found) + missing, [check]

    def leak(self) -> Found:
        return run_leak(self.seed)

    def policies(self) -> dict[str, Policy]:
        exits = self.subject.states.exits
        probe, _ = fit_probe(self.subject.states, self.seed)
        return {
            "fixed": Fixed(exits=(exits[len(exits) // 2],)),
            "confidence": Confidence(exits=exits, threshold=SURE),
            "sure": probe.at(SURE),
            "likely": probe.at(LIKELY),
        }

    def prompts(self, batch: int) -> tuple[Tensor, Tensor]:
        """Of the judged text; in a batch of unlike lengths, padded on the left."""
        ids = self.subject.judge.ids[:batch, :CONTEXT].clone()
        mask = (torch.arange(CONTEXT) >= torch.arange(len(ids))[:, None] % 4).long()
        return ids * mask, mask


_PARTS: dict[str, Callable[[_Bench], Found]] = {
    "gold": _Bench.gold,
    "quality": _Bench.quality,
    "speed": _Bench.speed,
    "energy": _Bench.energy,
    "leak": _Bench.leak,
}


def run(
    seed: int, parts: Sequence[str] = tuple(_PARTS), data_dir: str | None = None, lengths: Lengths = LENGTHS
) -> Found:
    """data_dir: of WikiText-2, for the model that quality, speed and energy are about; None: generated people."""
    for part in parts:
        if part not in _PARTS:
            raise ValueError(f"parts: {part!r} is not one of {', '.join(_PARTS)}")
    bench = _Bench(seed, data_dir, lengths)
    rows: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    for part, measure in _PARTS.items():
        if part in parts:
            made, held = measure(bench)
            rows += made
            checks += held
    return rows, checks
