"""The figures of one measured model, as JSON: what bench/cell.py measured per item, aggregated, with intervals.

forget, retain          mean probability of the true answers; forget_interval: {value, low, high}
forget_rouge, retain_rouge    mean ROUGE-L recall;  forget_verbatim: share of answers given word for word
truth_ratio, model_utility    by variant (bench/tofu.py), the truth ratio of the forget set
components              the numbers that model utility is made of (geometric)
forget_quality          KS test against the oracle, or null
memorisation            of the forget set: extraction_strength, exact_memorisation: {value, low, high}; score: over
                        these, paraphrase and truth ratio (1: nothing is left), or null without paraphrases
privacy                 AUC by attack, forget against holdout: {value, low, high}; null without holdout
muse                    verbmem_f, knowmem_f, knowmem_r, and privleak against the oracle; note: why the first are null
health, flags           of the forget answers; signs of a collapse in the answers to what should be known
                        (bench/health.py)
forget_flags            signs that the forget set's truth ratios mean nothing (bench/tofu.py)
distance                to the oracle as it is, uncompressed (bench/distance.py), means, or null
perplexity              {value, low, high}, with window and stride in tokens, or null
pressures               by pressure and variant (bench/pressures): mean, gain, and the gain beyond the oracle's, as
                        {value, low, high}; of early exit, `leak`: the layer that knows most
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from ..unlearn.data import Corpus
from .forgetting import Scores, verbatim
from .memorisation import memorisation_score
from .pressures.apply import read
from .pressures.early_exit import leak
from .pressures.pressed import Pressed
from .pressures.relearn import relearn_advantage
from .privacy import auc, auc_interval, privleak
from .statistics import bootstrap_mean
from .tofu import VARIANTS, collapsed, components, forget_quality, forget_truth_ratio, mean, model_utility


def figures(corpus: Corpus, measured: dict[str, Any], oracle: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    """Of what `cell.measure` gave, and gave of the oracle (under the same recipe)."""
    sets = {name: Scores.from_json(value) for name, value in measured["sets"].items()}
    reference = {name: Scores.from_json(value) for name, value in oracle["sets"].items()} if oracle else {}
    forget, retain = sets["forget"], sets["retain"]
    utility = {name: sets[name].items for name in corpus.utility}
    compared = any(forget.items.wrong_nll)
    return {
        "forget": mean(forget.items.probability),
        "forget_interval": asdict(bootstrap_mean(forget.items.probability, seed)),
        "retain": mean(retain.items.probability),
        "forget_rouge": mean(forget.items.rouge),
        "forget_verbatim": verbatim(forget.answers, [row.answer for row in corpus.forget]),
        "truth_ratio": {v: forget_truth_ratio(forget.items, v) for v in VARIANTS} if compared else None,
        "retain_rouge": mean(retain.items.rouge),
        "model_utility": {v: model_utility(utility, v) for v in VARIANTS},
        "components": components(utility),
        "forget_quality": _quality(forget, reference["forget"]) if reference else None,
        "memorisation": _memorisation(corpus, forget, seed),
        "privacy": _privacy(sets) if "holdout" in sets else None,
        "muse": _muse(measured["muse"], sets, reference),
        "health": {key: value for key, value in measured["health"].items() if not key.endswith("_items")},
        "flags": measured["flags"],
        "forget_flags": collapsed(forget.items),
        "distance": (measured["distance"] or {}).get("means"),
        "perplexity": _perplexity(measured["perplexity"]),
        "pressures": _pressures(measured["pressures"], oracle["pressures"] if oracle else {}, seed),
    }


def _quality(forget: Scores, oracle: Scores) -> dict[str, Any] | None:
    ratios, reference = forget.items.truth_ratio(), oracle.items.truth_ratio()
    return asdict(forget_quality(ratios, reference)) if ratios and reference else None


def _memorisation(corpus: Corpus, forget: Scores, seed: int) -> dict[str, Any]:
    found = {
        name: bootstrap_mean(getattr(forget, name), seed) for name in ("extraction_strength", "exact_memorisation")
    }
    score = None
    if all(row.paraphrased_answer for row in corpus.forget) and all(forget.items.wrong_nll):
        paraphrase = mean([math.exp(-nll) for nll in forget.items.base_nll])
        strength, exact = (interval.value for interval in found.values())
        score = memorisation_score(strength, exact, paraphrase, forget_truth_ratio(forget.items, "prob"))
    return {**{name: asdict(interval) for name, interval in found.items()}, "score": score}


def _privacy(sets: dict[str, Scores]) -> dict[str, Any]:
    members, others = sets["forget"].attacks, sets["holdout"].attacks
    return {name: asdict(auc_interval(members[name], others[name])) for name in members}


def _muse(found: dict[str, Any], sets: dict[str, Scores], oracle: dict[str, Scores]) -> dict[str, Any]:
    leak = None
    if "holdout" in sets and "holdout" in oracle:
        ours, theirs = (auc(s["forget"].attacks["min_k"], s["holdout"].attacks["min_k"]) for s in (sets, oracle))
        leak = privleak(ours, theirs) if theirs < 1 else None
    axes = {name: found[name] for name in ("verbmem_f", "knowmem_f", "knowmem_r")}
    return {**axes, "privleak": leak, "note": found.get("error")}


def _perplexity(found: dict[str, Any] | None) -> dict[str, Any] | None:
    return (
        None if found is None else {**found["interval"], **{key: found[key] for key in ("window", "stride", "finite")}}
    )


def _pressures(found: dict[str, Any], oracle: dict[str, Any], seed: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, pressed in found.items():
        if isinstance(pressed, str):
            rows[name] = {"error": pressed}
            continue
        ours = read(pressed)
        theirs = read(oracle[name]) if isinstance(oracle.get(name), list) else []
        rows[name] = [_pressure(found, theirs[i] if i < len(theirs) else None, seed) for i, found in enumerate(ours)]
        if name == "early-exit":
            rows[name][0]["leak"] = asdict(leak(ours[0], seed))
    return rows


def _pressure(pressed: Pressed, oracle: Pressed | None, seed: int) -> dict[str, Any]:
    alike = oracle is not None and len(oracle.before) == len(pressed.before)
    beyond = relearn_advantage(pressed, oracle, seed) if oracle is not None and alike else {}
    return {
        "name": pressed.name,
        "measure": pressed.measure,
        "before": mean(pressed.before),
        "variants": {
            variant: {
                "mean": mean(pressed.after[variant]),
                "gain": asdict(gain),
                "beyond_oracle": asdict(beyond[variant]) if variant in beyond else None,
                "reference": variant in pressed.references,
            }
            for variant, gain in pressed.gained(seed).items()
        },
        "worst": pressed.worst,
        "skipped": pressed.skipped,
        "notes": pressed.notes,
    }
