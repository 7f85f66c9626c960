"""Does leaving early bring back what was forgotten? Every model under every policy, with the controls of the audit.

What compression is to the audit of compression (bench/verdict.py), the exits are here:
  compressed   the unlearned model, served with exits
  unlearned    the same at full depth;  baseline, negative control: target and oracle, served alike
A model must often be tuned before it can leave early. So that tuning is not taken for the exits, it has an assay of its
own at full depth, beside as many plain steps on the same rows.

`measure_exits` sees one model, `exit_document` compares them:

layers        L
models        by name: control ("baseline", "negative", "positive", null: audited), leak, cells, tuning
  leak        the leak curve (bench/exit_leak.py); null for target and oracle
  cells[]     label, policy, threshold (null: it has none), settings
              verdict, reason, unforgotten, recovered_share, known_share, kept_share, p_returned, p_held, as an audit's
              forget, retain            mean probability of the true answers; forget_interval: {value, low, high}
              forget_rouge, retain_rouge, forget_verbatim, model_utility   null where no answers were written
              rest        the same without each answer's first token, which comes from the prompt, at full depth:
                          {value, low, high}; rest_share: between unlearned and baseline, or null
              mean_depth, retain_depth, histogram   layers per decoded token, of given answers; tokens at each depth
              written_depth             of what the model wrote itself, answers known by heart left out, or null
              energy                    of one token: joules, low, high (95% interval over windows, of an estimate its
                                        range, or null), methods, scopes; null: not asked for, or nothing measures it
  tuning      by control ("exits": with the loss of the exits, "plain"): verdict, reason, recovered_share, forget before
              and after
controls      {name: {ok, detail}}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from ..compress.early_exit.policy import Full, Policy
from ..unlearn.data import QA, Corpus, EvalSet
from ..unlearn.encode import Encoder
from .exit_leak import Curve, curve, leak_curve
from .exit_serving import Exits
from .forgetting import Scores, evaluate, verbatim
from .statistics import TAIL, Draws, Interval, bootstrap_mean, mean_draws, share_draws
from .tofu import VARIANTS, mean, model_utility
from .tokens import Answer, answers
from .verdict import MIN_GAP, Evidence, Words, judge

FULL = "full"
EXITS = Words("leaving early", "policy")
TUNING = Words("tuning", "tuning")
# What a token takes of a model under each policy, by label and as a cell's `energy` has it; None: not known. It sees
# all policies of a model at once, as figures that are to be compared come from windows that take turns.
Meter = Callable[[PreTrainedModel, Sequence[Policy]], Mapping[str, dict[str, Any] | None]]


def swept(policies: Sequence[Policy], thresholds: Mapping[str, Sequence[float]]) -> list[Policy]:
    """Each policy at each of the thresholds that its name has; as it is where it has none."""
    return [
        policy if threshold is None else policy.at(threshold)
        for policy in policies
        for threshold in (thresholds.get(policy.name, (None,)) if policy.graded else (None,))
    ]


def label(policy: Policy) -> str:
    """What a cell is called: the policy, and its threshold, or its exits where it has none."""
    if policy.name == FULL:
        return FULL
    if policy.graded:
        return f"{policy.name} {policy.threshold:g}"
    ends = (policy.exits[0],) if policy.name == "fixed" else (policy.exits[0], policy.exits[-1])
    return f"{policy.name} {'-'.join(map(str, ends))}"


def measure_exits(
    model: PreTrainedModel,
    encoder: Encoder,
    corpus: Corpus,
    policies: Sequence[Policy],
    before: Mapping[str, PreTrainedModel] | None = None,
    generate: bool = True,
    meter: Meter | None = None,
) -> dict[str, Any]:
    """One model at full depth and under every policy, as JSON.

    policies   its own, where they were trained on its states; labels must be those of the other models
    before     "untuned": the model before it was tuned for exits; "plain": with as many plain steps instead
    generate   whether it writes answers, too
    Raises ValueError for a model that cannot leave early, or a policy that does not fit it.
    """
    served = [Full(), *(policy for policy in policies if policy.name != FULL)]
    names = [label(policy) for policy in served]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"policies: {twice!r} is there twice")
    retain = corpus.utility["retain"].rows
    energy = meter(model, served) if meter else dict.fromkeys(names)
    return {
        "curve": {"forget": asdict(curve(model, encoder, corpus.forget)), "retain": _kept(model, encoder, retain)},
        "cells": [
            {**_served(model, encoder, corpus, policy, generate), "energy": energy[name]}
            for name, policy in zip(names, served, strict=True)
        ],
        "before": {
            name: {part: _known(other, encoder, rows) for part, rows in (("forget", corpus.forget), ("retain", retain))}
            for name, other in (before or {}).items()
        },
    }


def _kept(model: PreTrainedModel, encoder: Encoder, rows: Sequence[QA]) -> list[float]:
    return [mean(values) for values in curve(model, encoder, rows).probability]


def _known(model: PreTrainedModel, encoder: Encoder, rows: Sequence[QA]) -> list[float]:
    return [found.probability for found in answers(model, encoder, _pairs(rows))]


def _pairs(rows: Sequence[QA]) -> list[tuple[str, str]]:
    return [(row.question, row.answer) for row in rows]


def _served(model: PreTrainedModel, encoder: Encoder, corpus: Corpus, policy: Policy, generate: bool) -> dict[str, Any]:
    sets = {"forget": EvalSet(corpus.forget), **corpus.utility}
    scores, served = {}, {}
    for name, items in sets.items():
        served[name] = Exits(model, policy)
        scores[name] = evaluate(model, encoder, items, generate=generate, serving=served[name])
    # Of the true answers alone: `evaluate` reads wrong ones, too.
    exits = {"forget": Exits(model, policy), "retain": Exits(model, policy)}
    read = {name: answers(model, encoder, _pairs(sets[name].rows), around=exits[name].reading) for name in exits}
    return {
        "label": label(policy),
        "policy": policy.name,
        "threshold": policy.threshold if policy.graded else None,
        "settings": policy.settings(),
        "written": generate,
        "sets": {name: found.as_json() for name, found in scores.items()},
        "rest": [_rest(answer) for answer in read["forget"]],
        "mean_depth": exits["forget"].mean_depth(),
        "retain_depth": exits["retain"].mean_depth(),
        "written_depth": served["forget"].mean_depth("written"),
        "histogram": exits["forget"].histogram(),
    }


def _rest(answer: Answer) -> float:
    """Probability per token of what follows the first; of a single token, its own."""
    log_p = answer.log_p[1:] if len(answer.log_p) > 1 else answer.log_p
    return math.exp(float(log_p.double().mean()))


def exit_document(
    corpus: Corpus,
    measured: Mapping[str, Mapping[str, Any]],
    seed: int,
    positive: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Verdicts from what measure_exits found: of "target", of "oracle" where there is one, and of what is audited.

    positive   models that a working audit must flag -> label of the cell that must be `returned`
    Raises ValueError without a target, or for a model whose cells are not those of the target.
    """
    if "target" not in measured:
        raise ValueError("measured: without a target there is nothing to hold the models against")
    wanted = [cell["label"] for cell in measured["target"]["cells"]]
    for name, found in measured.items():
        if [cell["label"] for cell in found["cells"]] != wanted:
            raise ValueError(f"{name}: served under other policies than the target")
    roles = {"target": "baseline", "oracle": "negative", **dict.fromkeys(positive or {}, "positive")}
    models = {
        name: {
            "control": roles.get(name),
            "leak": None if name in ("target", "oracle") else _leak(name, measured, seed),
            "cells": _cells(corpus, name, measured, seed),
            "tuning": _tuning(name, measured, seed),
        }
        for name in measured
    }
    return {
        "layers": len(measured["target"]["curve"]["forget"]["probability"]),
        "models": models,
        "controls": _controls(models, positive or {}),
    }


def audit_exits(
    models: Mapping[str, PreTrainedModel],
    encoder: Encoder,
    corpus: Corpus,
    policies: Sequence[Policy] | Mapping[str, Sequence[Policy]],
    seed: int = 0,
    before: Mapping[str, Mapping[str, PreTrainedModel]] | None = None,
    positive: Mapping[str, str] | None = None,
    generate: bool = True,
    meter: Meter | None = None,
) -> dict[str, Any]:
    """Both in one, for models that fit into memory together: "target", "oracle", and what is audited.

    policies   for all models, or each its own by name
    before     by name, as measure_exits takes it
    """
    own = policies if isinstance(policies, Mapping) else dict.fromkeys(models, policies)
    measured = {
        name: measure_exits(model, encoder, corpus, own[name], (before or {}).get(name), generate, meter)
        for name, model in models.items()
    }
    return exit_document(corpus, measured, seed, positive)


def _leak(name: str, measured: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    def of(which: str) -> Curve:
        return Curve(**measured[which]["curve"]["forget"])

    oracle = of("oracle") if "oracle" in measured else None
    return asdict(leak_curve(of("target"), of(name), oracle, seed, measured[name]["curve"]["retain"]))


def _forget(cell: Mapping[str, Any]) -> list[float]:
    return cell["sets"]["forget"]["probability"]


def _cells(corpus: Corpus, name: str, measured: Mapping[str, Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    ours, target = measured[name]["cells"], measured["target"]["cells"]
    # Against itself the oracle could not fail; as a control it is judged by what leaving early gave back.
    oracle = measured["oracle"]["cells"] if "oracle" in measured and name != "oracle" else [None] * len(ours)
    evidence = [
        Evidence(
            compressed=_forget(cell),
            unlearned=_forget(ours[0]),
            baseline=_forget(base),
            target=_forget(target[0]),
            oracle=_forget(never) if never else None,
            oracle_dense=_forget(oracle[0]) if oracle[0] else None,
            retain=cell["sets"]["retain"]["probability"],
            retain_target=target[0]["sets"]["retain"]["probability"],
        )
        for cell, base, never in zip(ours, target, oracle, strict=True)
    ]
    return [
        {
            **{key: cell[key] for key in ("label", "policy", "threshold", "settings")},
            **judgement.as_json(),
            **_figures(corpus, cell, seed),
            "rest": asdict(bootstrap_mean(cell["rest"], seed)),
            "rest_share": _share(cell["rest"], ours[0]["rest"], base["rest"], seed),
            **{key: cell[key] for key in ("mean_depth", "retain_depth", "written_depth", "histogram", "energy")},
        }
        for cell, base, judgement in zip(ours, target, judge(evidence, seed, EXITS), strict=True)
    ]


def _figures(corpus: Corpus, cell: Mapping[str, Any], seed: int) -> dict[str, Any]:
    sets = {name: Scores.from_json(value) for name, value in cell["sets"].items()}
    forget, retain = sets["forget"], sets["retain"]
    utility = {name: sets[name].items for name in corpus.utility}
    wrote = {
        "forget_rouge": mean(forget.items.rouge),
        "forget_verbatim": verbatim(forget.answers, [row.answer for row in corpus.forget]),
        "retain_rouge": mean(retain.items.rouge),
        "model_utility": {variant: model_utility(utility, variant) for variant in VARIANTS},
    }
    return {
        "forget": mean(forget.items.probability),
        "forget_interval": asdict(bootstrap_mean(forget.items.probability, seed)),
        "retain": mean(retain.items.probability),
        # Of answers that were not written nothing is known.
        **(wrote if cell["written"] else dict.fromkeys(wrote)),
    }


def _share(part: Sequence[float], floor: Sequence[float], whole: Sequence[float], seed: int) -> dict[str, float] | None:
    """None where floor and whole are not shown to be apart."""
    gap: Draws = mean_draws([a - b for a, b in zip(whole, floor, strict=True)], seed)
    found: Interval | None = share_draws(part, floor, whole, seed).interval() if gap.p_below(MIN_GAP) <= TAIL else None
    return asdict(found) if found else None


def _tuning(name: str, measured: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """What tuning alone gave back, at full depth."""

    def states(which: str) -> dict[str, dict[str, list[float]]]:
        found = measured[which]
        full = {part: found["cells"][0]["sets"][part]["probability"] for part in ("forget", "retain")}
        return {"exits": full, **found["before"]}

    ours, target = states(name), states("target")
    oracle = states("oracle") if "oracle" in measured and name != "oracle" else None
    if "untuned" not in ours or "untuned" not in target or (oracle and "untuned" not in oracle):
        return {}
    kinds = [kind for kind in ("exits", "plain") if all(kind in found for found in (ours, target, oracle or ours))]
    evidence = [
        Evidence(
            compressed=ours[kind]["forget"],
            unlearned=ours["untuned"]["forget"],
            baseline=target[kind]["forget"],
            target=target["untuned"]["forget"],
            oracle=oracle[kind]["forget"] if oracle else None,
            oracle_dense=oracle["untuned"]["forget"] if oracle else None,
            retain=ours[kind]["retain"],
            retain_target=target["untuned"]["retain"],
        )
        for kind in kinds
    ]
    return {
        kind: {
            **judgement.as_json(),
            "forget_before": mean(ours["untuned"]["forget"]),
            "forget": mean(ours[kind]["forget"]),
            "retain": mean(ours[kind]["retain"]),
        }
        for kind, judgement in zip(kinds, judge(evidence, seed, TUNING), strict=True)
    }


def _controls(models: Mapping[str, Mapping[str, Any]], positive: Mapping[str, str]) -> dict[str, Any]:
    """Whether every control came out as it must; an audit with a failed control proves nothing."""
    baseline = [told(cell) for cell in models["target"]["cells"]]
    controls = {
        "baseline": {
            "ok": baseline[0] == "not forgotten" and set(baseline) <= {"not forgotten", "damaged"},
            "detail": f"target as its own unlearned model: {', '.join(baseline)}",
        }
    }
    if "oracle" in models:
        found = [cell["verdict"] for cell in models["oracle"]["cells"]]
        # Where the policy damages the target itself, there is nothing an oracle could be told from.
        judged = {verdict for verdict, base in zip(found, baseline, strict=True) if base != "damaged"}
        controls["negative"] = {
            "ok": judged == {"held"} and "returned" not in found,
            "detail": f"oracle as its own unlearned model: {', '.join(found)}",
        }
    for name, where in positive.items():
        verdicts = {cell["label"]: cell["verdict"] for cell in models[name]["cells"]}
        full, exits = verdicts[FULL], verdicts.get(where, "not served")
        controls[f"positive: {name}"] = {
            "ok": (full, exits) == ("held", "returned"),
            "detail": f"{full} at full depth, {exits} under {where}",
        }
    return controls


def told(cell: Mapping[str, Any]) -> str:
    """The verdict; "not forgotten" where it stayed open because nothing had been forgotten that could return."""
    return "not forgotten" if cell.get("unforgotten") and cell["verdict"] == "undecided" else cell["verdict"]


def leak_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The leak curves, for a terminal's table."""
    return [
        {
            "leak_of": name,
            "layer": layer["layer"],
            "p_target": layer["target"]["value"],
            "p_unlearned": layer["unlearned"]["value"],
            "p_oracle": layer["oracle"]["value"] if layer["oracle"] else None,
            "leak": _spread(layer["share"]),
            "more_than_last": _spread(layer["excess"]),
            "p_holm": layer["p_excess"],
            "kept": layer["kept"],
        }
        for name, model in document["models"].items()
        if model["leak"]
        for layer in model["leak"]["layers"]
    ]


def verdict_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answer per model and policy, for a terminal's table."""
    return [
        {
            "served": name,
            "policy": cell["label"],
            "mean_depth": cell["mean_depth"],
            "p_forget": cell["forget"],
            "p_retain": cell["retain"],
            "rouge": cell["forget_rouge"],
            "recovered": _spread(cell["recovered_share"]),
            "known": _spread(cell["known_share"]),
            "rest": cell["rest"]["value"],
            "verdict": told(cell),
            "j_per_token": told_energy(cell["energy"]),
        }
        for name, model in document["models"].items()
        for cell in model["cells"]
    ]


def tuning_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What tuning alone gave back, for a terminal's table."""
    return [
        {
            "tuned": name,
            "by": kind,
            "p_before": found["forget_before"],
            "p_after": found["forget"],
            "p_retain": found["retain"],
            "recovered": _spread(found["recovered_share"]),
            "verdict": found["verdict"],
        }
        for name, model in document["models"].items()
        for kind, found in model["tuning"].items()
    ]


def told_energy(found: Mapping[str, Any] | None) -> str | None:
    """Joules of a token, never without how they were come by and of what."""
    if found is None:
        return None
    spread = "" if found["low"] is None else f" [{found['low']:.3g}, {found['high']:.3g}]"
    return f"{found['joules']:.3g}{spread} ({', '.join(found['methods'])}; {' + '.join(found['scopes'])})"


def _spread(found: Mapping[str, Any] | None) -> str | None:
    return None if found is None else f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
