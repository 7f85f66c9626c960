"""The audit's document: cells with verdicts, the state of the controls, examples. Schema `remanence.audit/2`.

cells[]     method, recipe, control ("baseline", "negative", "positive" or null: audited), verdict, reason
            unforgotten                    whether it had not forgotten before compression (bench/verdict.py)
            recovered_share, known_share   {value, low, high} with 95% intervals (bench/verdict.py); `of`: between what
            p_returned, p_held             after Holm's correction over the recipes of the method
            kept_share                     retain probability over the target's, {value, low, high}
            and the figures of bench/figures.py, held against the oracle under the same recipe
            update_survival                at the weights (bench/survival.py); null where these are not numbers
            size_bytes, size_vs_fp16       of the weight files;  peak_memory_bytes: while decoding
            times                          what the clock measured
survival    by method: does the weights' prediction order recipes as the recovered share does (Spearman)?
quality     UQS over all cells (bench/uqs.py): weights of the metrics and scores of the cells, or null
controls    baseline, negative, positive: {ok, detail}
examples    questions of the forget set with the answers of every cell
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..unlearn.data import Corpus
from .cell import CellScores
from .figures import figures
from .survival import WeightSurvival, predicted_order
from .uqs import quality, stability
from .verdict import Evidence, Judgement, judge

EXAMPLES = 5
# What UQS weighs: a metric of a cell, and whether more of it is better.
_UNIFIED = {
    "forget": False,
    "retain": True,
    "forget_rouge": False,
    "retain_rouge": True,
    "extraction_strength": False,
    "exact_memorisation": False,
    "truth_ratio": True,
    "model_utility": True,
}


def build_document(corpus: Corpus, cells: list[CellScores], positive_recipe: str, seed: int) -> dict[str, Any]:
    """`cells` must hold the target under every recipe and every model under "dense"."""
    by_name = {(cell.model, cell.recipe.name): cell for cell in cells}
    judged = _judged(cells, by_name, seed)
    rows = [_cell(corpus, cell, by_name, judged, seed) for cell in cells]
    return {
        "data": {
            "name": corpus.name,
            "sha256": corpus.digest(),
            "forget": len(corpus.forget),
            "retain": len(corpus.retain),
            "holdout": len(corpus.holdout),
            "utility_sets": {name: len(items.rows) for name, items in corpus.utility.items()},
        },
        "controls": _controls(rows, positive_recipe),
        "cells": rows,
        "survival": _agreement(rows),
        "quality": _unified(rows, seed),
        "examples": _examples(corpus, cells),
    }


def _error(cell: CellScores, by_name: dict[tuple[str, str], CellScores]) -> str | None:
    """Why a cell cannot be judged: its own failure, or that of what it is held against."""
    against = [by_name["target", cell.recipe.name], by_name[cell.model, cell.recipe.before.name]]
    oracle = by_name.get(("oracle", cell.recipe.name))
    return next((c.error for c in (cell, *against, *([oracle] if oracle else [])) if c.error), None)


def _judged(
    cells: list[CellScores], by_name: dict[tuple[str, str], CellScores], seed: int
) -> dict[tuple[str, str], Judgement]:
    """Verdicts by method and recipe; the recipes of a method are judged together."""
    found = {}
    for method in dict.fromkeys(cell.model for cell in cells):
        family = [cell for cell in cells if cell.model == method and not _error(cell, by_name)]
        evidence = [_evidence(cell, by_name) for cell in family]
        for cell, judgement in zip(family, judge(evidence, seed), strict=True):
            found[method, cell.recipe.name] = judgement
    return found


def _evidence(cell: CellScores, by_name: dict[tuple[str, str], CellScores]) -> Evidence:
    def knows(name: str, recipe: str, of: str = "forget") -> list[float]:
        return by_name[name, recipe].scores(of).items.probability

    recipe, before = cell.recipe.name, cell.recipe.before.name
    # Against itself the oracle could not fail; as a control it is judged by what compression gave back.
    with_oracle = ("oracle", recipe) in by_name and cell.model != "oracle"
    return Evidence(
        compressed=knows(cell.model, recipe),
        unlearned=knows(cell.model, before),
        baseline=knows("target", recipe),
        target=knows("target", before),
        oracle=knows("oracle", recipe) if with_oracle else None,
        oracle_dense=knows("oracle", before) if with_oracle and not by_name["oracle", before].error else None,
        retain=knows(cell.model, recipe, "retain"),
        retain_target=knows("target", "dense", "retain"),
        collapsed=tuple(cell.measured["flags"]),
    )


def _cell(
    corpus: Corpus,
    cell: CellScores,
    by_name: dict[tuple[str, str], CellScores],
    judged: dict[tuple[str, str], Judgement],
    seed: int,
) -> dict[str, Any]:
    head = {"method": cell.model, "recipe": cell.recipe.name, "control": cell.control}
    if error := _error(cell, by_name):
        return {**head, "verdict": "undecided", "reason": error, "error": error}
    oracle = by_name.get(("oracle", cell.recipe.name))
    judgement = judged[cell.model, cell.recipe.name]
    measured = cell.measured
    return {
        **head,
        **judgement.as_json(),
        **figures(corpus, measured, oracle.measured if oracle else None, seed),
        "update_survival": (measured["update_survival"] or {}).get("total"),
        "size_bytes": measured["size_bytes"],
        "size_vs_fp16": measured["size_bytes"] / (2 * measured["parameters"]),
        "peak_memory_bytes": measured["decode"]["peak_memory_bytes"],
        "times": {
            "decode_tokens_per_s": measured["decode"]["tokens_per_s"],
            "decode_spread": measured["decode"]["spread"],
            "measured_s": measured["measured_s"],
        },
    }


def _agreement(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By method, over its compressed cells whose share is of what compression gave back."""
    found = {}
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] not in ("target", "oracle")):
        cells = {row["recipe"]: row for row in rows if row["method"] == method and "error" not in row}
        compressed = {
            name: row
            for name, row in cells.items()
            if name != "dense" and row["recovered_share"]["of"] == "unlearned..baseline"
        }
        predicted = {
            name: WeightSurvival(**row["update_survival"]).predicted_recovery
            for name, row in compressed.items()
            if row["update_survival"]
        }
        measured = {name: row["recovered_share"]["value"] for name, row in compressed.items()}
        found[method] = asdict(predicted_order(predicted, measured))
    return found


def _unified(rows: list[dict[str, Any]], seed: int) -> dict[str, Any] | None:
    """Over the cells whose distance to the oracle is known, but the oracle's own."""
    known = [row for row in rows if row.get("distance") and row["method"] != "oracle" and row["truth_ratio"]]
    metrics = {name: [_unified_metric(row, name) for row in known] for name in _UNIFIED}
    try:
        found = quality(metrics, [row["distance"]["js"] for row in known], _UNIFIED)
    except ValueError:
        return None
    return {
        "weight": found.weight,
        "rho": found.rho,
        "stability": asdict(stability(found, seed=seed)),
        "score": [
            {"method": row["method"], "recipe": row["recipe"], "score": score}
            for row, score in zip(known, found.score, strict=True)
        ],
    }


def _unified_metric(row: dict[str, Any], name: str) -> float:
    if name in row["memorisation"]:
        return row["memorisation"][name]["value"]
    return row[name]["geometric"] if name in ("truth_ratio", "model_utility") else row[name]


def _controls(rows: list[dict[str, Any]], positive_recipe: str) -> dict[str, Any]:
    """Whether every control came out as it must; an audit with a failed control proves nothing."""
    # A cell that failed says nothing about a control, but for the cells on which the positive control rests.
    sound = {(row["method"], row["recipe"]): row for row in rows if "error" not in row}
    verdicts = {name: row["verdict"] for name, row in sound.items()}
    recipes = [recipe for method, recipe in verdicts if method == "target"]
    baseline = [_baseline(sound["target", recipe]) for recipe in recipes]
    bucketed = verdicts.get(("bucketed", "dense"), "failed"), verdicts.get(("bucketed", positive_recipe), "failed")
    controls = {
        "baseline": {
            "ok": baseline[:1] == ["not forgotten"] and set(baseline) <= {"not forgotten", "damaged"},
            "detail": f"target as its own unlearned model: {', '.join(baseline)}",
        },
        "positive": {
            "ok": bucketed == ("held", "returned"),
            "detail": f"bucketed: {bucketed[0]} when dense, {bucketed[1]} under {positive_recipe}",
        },
    }
    if any(row["method"] == "oracle" for row in rows):
        negative = [verdicts["oracle", recipe] for recipe in recipes if ("oracle", recipe) in verdicts]
        # Where the recipe damages the target itself, there is nothing an oracle could be told from.
        judged = {verdicts.get(("oracle", r)) for r, base in zip(recipes, baseline, strict=True) if base != "damaged"}
        controls["negative"] = {
            "ok": judged == {"held"} and "returned" not in negative,
            "detail": f"oracle as its own unlearned model: {', '.join(negative)}",
        }
    return controls


def _baseline(row: dict[str, Any]) -> str:
    """What became of the target as its own unlearned model; it must be seen to have forgotten nothing."""
    return "not forgotten" if row["unforgotten"] and row["verdict"] == "undecided" else row["verdict"]


def _examples(corpus: Corpus, cells: list[CellScores]) -> list[dict[str, Any]]:
    """A few questions of the forget set, from different people, with every cell's answer."""
    step = max(1, len(corpus.forget) // EXAMPLES)
    return [
        {
            "question": corpus.forget[i].question,
            "truth": corpus.forget[i].answer,
            "answers": [
                {"method": c.model, "recipe": c.recipe.name, "answer": c.scores("forget").answers[i]}
                for c in cells
                if not c.error
            ],
        }
        for i in range(0, len(corpus.forget), step)
    ][:EXAMPLES]
