"""Evaluation logs that other tools wrote, read into the same items that our own measurements give.

TOFU              a directory with eval_log.json (retain), eval_log_forget.json, eval_real_author_wo_options.json and
                  eval_real_world_wo_options.json, or all of them in eval_log_aggregated.json; values by item number
                  (lists before March 2024)
open-unlearning   TOFU_EVAL.json: metric -> {agg_value, value_by_index}
Aggregates are computed from the items, never taken from the log; what open-unlearning had aggregated stands beside. A
set without generations (ROUGE) serves for forget quality alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..unlearn.data import read_text
from .tofu import Items, summary

# The sets that model utility is made of, and whether a probability is a share among options.
UTILITY = {"retain": False, "real_authors": True, "world_facts": True}
_TOFU = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
_AGGREGATED = "eval_log_aggregated.json"
_OPEN_UNLEARNING = "TOFU_EVAL.json"
_PREFIX = {"retain": "retain", "real_authors": "ra", "world_facts": "wf", "forget": "forget"}


@dataclass(frozen=True)
class Logs:
    """layout: "tofu" or "open-unlearning"; sets: items by set, of those in the log; questions: as far as logged;
    logged: aggregates that the log itself holds."""

    layout: str
    sets: dict[str, Items]
    questions: dict[str, list[str]]
    logged: dict[str, float] = field(default_factory=dict)


def read_logs(source: Path | str) -> Logs:
    """Logs of one model from its directory (or one below it), or from the file itself.

    Raises FileNotFoundError when there are none; ValueError naming file, metric and item for what cannot be read.
    """
    file = _find(Path(source))
    if file.name in (_AGGREGATED, *_TOFU.values()):
        return _tofu(file)
    content = _json(file)
    if "avg_gt_loss" in content:
        raise ValueError(f"{file}: one set of a TOFU log; which, is told by its name: {', '.join(_TOFU.values())}")
    return _open_unlearning(file, content)


def report(model: Logs, oracle: Logs | None) -> dict[str, Any]:
    """Every aggregate of a model's logs, with forget quality against the oracle's, as `remanence logs` prints them."""
    sets = {name: model.sets[name] for name in UTILITY if name in model.sets and model.sets[name].rouge}
    missing = [name for name in UTILITY if name not in sets]
    forget, reference = model.sets.get("forget"), oracle.sets.get("forget") if oracle else None
    if oracle is not None and (forget is None or reference is None):
        raise ValueError(f"{'logs' if forget is None else 'oracle'}: no forget set in it; forget quality needs both")
    found = {
        "layout": model.layout,
        "items": {name: len(items.nll) for name, items in model.sets.items()},
        "missing": missing,
        **summary(sets, forget, reference),
    }
    if missing:
        found["model_utility"] = None
    if oracle is not None:
        questions = model.questions.get("forget"), oracle.questions.get("forget")
        found["same_questions"] = questions[0] == questions[1] if all(questions) else None
    if model.logged:
        found["logged"] = model.logged
    return found


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or directory")
    names = (_OPEN_UNLEARNING, *_TOFU.values(), _AGGREGATED)
    places = sorted({path.parent for name in names for path in source.rglob(name)})
    if source in places:
        places = [source]
    if not places:
        raise FileNotFoundError(f"{source}: no evaluation log; expected {', '.join(names)}")
    if len(places) > 1:
        raise ValueError(f"{source}: logs in {len(places)} directories below it; name one, e.g. {places[0]}")
    return next(places[0] / name for name in names if (places[0] / name).is_file())


def _tofu(file: Path) -> Logs:
    if file.name == _AGGREGATED:
        whole = _json(file)
        found = {name: whole[key] for name, key in _TOFU.items() if key in whole}
        for name, log in found.items():
            if not isinstance(log, dict):
                raise ValueError(f"{file}: {_TOFU[name]}: expected an object of metrics, got {type(log).__name__}")
        if not found:
            raise ValueError(f"{file}: holds none of {', '.join(_TOFU.values())}")
        logs = {name: _Log(f"{file}: {_TOFU[name]}", log) for name, log in found.items()}
    else:
        paths = {name: file.parent / part for name, part in _TOFU.items()}
        logs = {name: _Log(str(path), _json(path)) for name, path in paths.items() if path.is_file()}
    sets, questions = {}, {}
    for name, log in logs.items():
        index = log.index("avg_gt_loss")
        base = "avg_paraphrased_loss" if "avg_paraphrased_loss" in log.content else "avg_gt_loss"
        wrong = "average_perturb_loss"
        sets[name] = Items(
            nll=log.numbers("avg_gt_loss", index),
            base_nll=log.numbers(base, index),
            wrong_nll=log.lists(wrong, index) if wrong in log.content else [[]] * len(index),
            rouge=log.numbers("rougeL_recall", index) if "rougeL_recall" in log.content else [],
            choices=UTILITY.get(name, False),
        )
        if "generated_text" in log.content:
            texts = log.values("generated_text", index)
            questions[name] = [text[0] if isinstance(text, list) and text else str(text) for text in texts]
    return Logs("tofu", sets, questions)


def _open_unlearning(file: Path, content: dict[str, Any]) -> Logs:
    if not any(isinstance(value, dict) and "value_by_index" in value for value in content.values()):
        raise ValueError(f"{file}: neither a TOFU log nor one of open-unlearning (no metric with value_by_index)")
    metrics = {
        name: metric["value_by_index"]
        for name, metric in content.items()
        if isinstance(metric, dict) and isinstance(metric.get("value_by_index"), dict | list)
    }
    log = _Log(str(file), metrics)
    sets, questions = {}, {}
    for name, prefix in _PREFIX.items():
        right, rouge = f"{prefix}_Q_A_Prob", f"{prefix}_Q_A_ROUGE"
        if right not in metrics:
            continue
        index = log.index(right)
        base = f"{prefix}_Q_A_PARA_Prob" if f"{prefix}_Q_A_PARA_Prob" in metrics else right
        wrong = f"{prefix}_Q_A_PERT_Prob"
        sets[name] = Items(
            nll=log.numbers(right, index, "avg_loss"),
            base_nll=log.numbers(base, index, "avg_loss"),
            wrong_nll=log.lists(wrong, index, "avg_loss") if wrong in metrics else [[]] * len(index),
            rouge=log.numbers(rouge, index, "rougeL_recall") if rouge in metrics else [],
            choices=UTILITY.get(name, False),
        )
        texts = log.values(rouge, index) if rouge in metrics else []
        if texts and all(isinstance(text, dict) and "input" in text for text in texts):
            questions[name] = [text["input"] for text in texts]
    if not sets:
        wanted = ", ".join(f"{prefix}_Q_A_Prob" for prefix in _PREFIX.values())
        raise ValueError(f"{file}: no metric of TOFU in it ({wanted})")
    logged = {
        name: float(metric["agg_value"])
        for name, metric in sorted(content.items())
        if isinstance(metric, dict) and isinstance(metric.get("agg_value"), int | float)
    }
    return Logs("open-unlearning", sets, questions, {k: v for k, v in logged.items() if math.isfinite(v)})


@dataclass(frozen=True)
class _Log:
    """One file's metrics: name -> values by item. `where` begins every error."""

    where: str
    content: Mapping[str, Any]

    def index(self, metric: str) -> list[str]:
        """The item numbers of `metric`, in order."""
        values = self._metric(metric)
        if not all(key.isdigit() for key in values):
            raise ValueError(f"{self.where}: {metric}: item {min(values)!r}: expected item numbers")
        return sorted(values, key=int)

    def values(self, metric: str, index: list[str]) -> list[Any]:
        values = self._metric(metric)
        if values.keys() != set(index):
            odd = min(values.keys() ^ set(index))
            raise ValueError(f"{self.where}: {metric}: item {odd} is in one metric and not in another")
        return [values[key] for key in index]

    def numbers(self, metric: str, index: list[str], key: str | None = None) -> list[float]:
        """One number an item; a list of one (open-unlearning's single paraphrase) counts as its number."""
        return [values[0] for values in self._lists(metric, index, key, lambda values: len(values) == 1)]

    def lists(self, metric: str, index: list[str], key: str | None = None) -> list[list[float]]:
        return self._lists(metric, index, key, lambda values: len(values) > 0)

    def _lists(
        self, metric: str, index: list[str], key: str | None, fits: Callable[[list[Any]], bool]
    ) -> list[list[float]]:
        found = []
        for item, value in zip(index, self.values(metric, index), strict=True):
            if key is not None:
                value = value.get(key) if isinstance(value, dict) else None
            values = value if isinstance(value, list) else [value]
            if not fits(values) or not all(_is_number(v) for v in values):
                what = f"{metric}: {key}" if key else metric
                raise ValueError(f"{self.where}: {what}: item {item} is {str(value)[:60]}; expected a number")
            found.append([float(v) for v in values])
        return found

    def _metric(self, metric: str) -> dict[str, Any]:
        values = self.content.get(metric)
        if isinstance(values, list):
            values = {str(i): value for i, value in enumerate(values)}
        if not isinstance(values, dict) or not values:
            raise ValueError(f"{self.where}: {metric}: missing or empty; expected values by item")
        return values


def _is_number(value: object) -> bool:
    """Infinity is one: the loss of a collapsed model."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected an object of metrics, got {type(content).__name__}")
    return content
