"""The audit's document: cells with verdicts, the state of the controls, examples. Schema `remanence.audit/1`.

cells[]     method, recipe, control ("baseline", "negative", "positive" or null: audited), verdict, reason
            forget, retain                 mean probability of the true answers
            recovered_share, known_share   {value, low, high} with 95% intervals (bench/verdict.py); `of`: between what
            kept_share                     retain probability over the target's, {value, low, high}
            forget_rouge, retain_rouge     mean ROUGE-L recall;  forget_verbatim: share of answers given word for word
            forget_truth_ratio             mean min(R, 1/R);  model_utility: harmonic mean (bench/forgetting.py)
            forget_quality                 KS test against the oracle under the same recipe, or null
            update_survival                {changed, norm} at the weights (bench/survival.py)
            size_bytes, size_vs_fp16       of the weight files;  peak_memory_bytes: while decoding
            times                          what the clock measured
controls    baseline, negative, positive: {ok, detail}
examples    questions of the forget set with the answers of every cell
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from ..unlearn.data import Corpus
from .cell import CellScores
from .forgetting import (
    Scores,
    forget_quality,
    forget_truth_ratio,
    mean,
    model_utility,
    verbatim,
)
from .statistics import bootstrap_mean
from .verdict import Evidence, judge

EXAMPLES = 5


def build_document(corpus: Corpus, cells: list[CellScores], positive_recipe: str, seed: int) -> dict[str, Any]:
    """`cells` must hold the target under every recipe and every model under "dense"."""
    by_name = {(cell.model, cell.recipe.name): cell for cell in cells}
    rows = [_cell(corpus, cell, by_name, seed) for cell in cells]
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
        "examples": _examples(corpus, cells),
    }


def _cell(corpus: Corpus, cell: CellScores, by_name: dict[tuple[str, str], CellScores], seed: int) -> dict[str, Any]:
    head = {"method": cell.model, "recipe": cell.recipe.name, "control": cell.control}
    target, dense = by_name["target", cell.recipe.name], by_name[cell.model, "dense"]
    oracle = by_name.get(("oracle", cell.recipe.name))
    error = cell.error or target.error or dense.error or (oracle.error if oracle else None)
    if error:
        return {**head, "verdict": "undecided", "reason": error, "error": error}
    forget, retain = cell.scores("forget"), cell.scores("retain")
    target_dense = by_name["target", "dense"]
    judgement = judge(
        Evidence(
            compressed=forget.probability,
            unlearned=dense.scores("forget").probability,
            baseline=target.scores("forget").probability,
            target=target_dense.scores("forget").probability,
            # Against itself the oracle could not fail; as a control it is judged by what compression gave back.
            oracle=oracle.scores("forget").probability if oracle and cell.model != "oracle" else None,
            retain=retain.probability,
            retain_target=target_dense.scores("retain").probability,
        ),
        seed,
    )
    ratios = _ratios(forget)
    measured = cell.measured
    return {
        **head,
        "verdict": judgement.verdict,
        "reason": judgement.reason,
        "forget": mean(forget.probability),
        "forget_interval": asdict(bootstrap_mean(forget.probability, seed)),
        "retain": mean(retain.probability),
        "recovered_share": {**asdict(judgement.recovered), "of": judgement.recovered_of},
        "known_share": asdict(judgement.known) if judgement.known else None,
        "kept_share": asdict(judgement.kept),
        "forget_rouge": mean(forget.rouge),
        "forget_verbatim": verbatim(forget.answers, [row.answer for row in corpus.forget]),
        "forget_truth_ratio": forget_truth_ratio(ratios) if ratios else None,
        "retain_rouge": mean(retain.rouge),
        "model_utility": model_utility(cell.utility()),
        "forget_quality": _quality(ratios, _ratios(oracle.scores("forget"))) if oracle else None,
        "update_survival": measured["update_survival"],
        "size_bytes": measured["size_bytes"],
        "size_vs_fp16": measured["size_bytes"] / (2 * measured["parameters"]),
        "peak_memory_bytes": measured["decode"]["peak_memory_bytes"],
        "times": {
            "decode_tokens_per_s": measured["decode"]["tokens_per_s"],
            "decode_spread": measured["decode"]["spread"],
            "measured_s": measured["measured_s"],
        },
    }


def _ratios(scores: Scores) -> list[float]:
    return [r for r in scores.truth_ratio if r is not None]


def _quality(ratios: list[float], oracle: list[float]) -> dict[str, Any] | None:
    if not ratios or not oracle:
        return None
    quality = asdict(forget_quality(ratios, oracle))
    if math.isinf(quality["log10_p"]):
        quality["log10_p"] = None  # below the smallest float; JSON has no infinity
    return quality


def _controls(rows: list[dict[str, Any]], positive_recipe: str) -> dict[str, Any]:
    """Whether every control came out as it must; an audit with a failed control proves nothing."""
    # A cell that failed says nothing about a control, but for the cells on which the positive control rests.
    verdicts = {(row["method"], row["recipe"]): row["verdict"] for row in rows if "error" not in row}
    recipes = [recipe for method, recipe in verdicts if method == "target"]
    baseline = [verdicts["target", recipe] for recipe in recipes]
    bucketed = verdicts.get(("bucketed", "dense"), "failed"), verdicts.get(("bucketed", positive_recipe), "failed")
    controls = {
        "baseline": {
            "ok": verdicts.get(("target", "dense")) == "returned" and not {"held", "undecided"} & set(baseline),
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
