"""Tasks of EleutherAI's lm-evaluation-harness, run by the harness itself on a model that is in memory."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task; stderr is None where the harness gives none (a group, a single document)."""

    value: float
    stderr: float | None
    documents: int | None


def harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 8,
    include_path: Path | str | None = None,
) -> dict[str, dict[str, HarnessScore]]:
    """Scores by task (or group) and metric; a metric with a filter of its own is named `metric,filter`.

    tasks          names of tasks, groups or tags; * stands for anything. Their data come from the hub, mostly
    limit          of documents per task, the first ones; None: all
    include_path   directory with task definitions (YAML) of one's own
    Model, tokenizer and the random state are left as they were. Raises ModuleNotFoundError without the harness,
    ValueError for a task that it does not know.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tasks: lm-evaluation-harness is not installed ({error.name} is missing); pip install 'remanence[eval]'"
        ) from None
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include-path: {include_path}: no such directory")
    if not tasks:
        raise ValueError("tasks: none; at least one is needed")
    manager = _manager(TaskManager, tasks, include_path)
    names = _known(manager, tasks)
    with _undisturbed(model):
        wrapped = HFLM(pretrained=model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found: Any = simple_evaluate(model=wrapped, tasks=names, task_manager=manager, limit=limit, log_samples=False)
    return {task: _scores(metrics, found["n-samples"].get(task)) for task, metrics in found["results"].items()}


def _manager(managers: Any, tasks: Sequence[str], include_path: Path | str | None) -> Any:
    """An index of tasks. That of the harness's own takes many seconds to read; where one's own tasks are all that is
    asked for it is left out, unless they have groups, which may hold any task."""
    if include_path is None:
        return managers()
    own = managers(include_path=str(include_path), include_defaults=False)
    if not own.all_groups and all(own.match_tasks([task]) for task in tasks):
        return own
    return managers(include_path=str(include_path))


def _known(manager: Any, tasks: Sequence[str]) -> list[str]:
    """The names that `tasks` stand for."""
    found = {task: manager.match_tasks([task]) for task in tasks}
    unknown = [task for task, names in found.items() if not names]
    if unknown:
        raise ValueError(
            f"tasks: lm-evaluation-harness does not know {', '.join(map(repr, unknown))}; `lm-eval ls tasks` lists "
            "those it knows, and include-path names a directory with others"
        )
    return list(dict.fromkeys(name for names in found.values() for name in names))


def _scores(metrics: dict[str, Any], documents: dict[str, int] | None) -> dict[str, HarnessScore]:
    """From keys such as `acc,none` and `acc_stderr,none`."""
    scores = {}
    for key, value in metrics.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{filtered}")
        scores[metric if filtered == "none" else key] = HarnessScore(
            float(value),
            float(error) if isinstance(error, int | float) else None,
            None if documents is None else documents["effective"],
        )
    return scores


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """The harness seeds every generator, puts the model in eval mode and ties its weights: here it does so for its
    own run only, and does not tie, as a head that was changed alone would be lost."""
    training, python, numpy_state = model.training, random.getstate(), np.random.get_state()
    device = model.device
    accelerator = "cuda" if device.type == "cpu" else device.type
    devices = [] if device.type == "cpu" else [device.index or 0]
    whole: Any = model
    whole.tie_weights = lambda *_, **__: None
    try:
        with torch.random.fork_rng(devices=devices, device_type=accelerator):
            yield
    finally:
        del whole.tie_weights
        random.setstate(python)
        np.random.set_state(numpy_state)
        model.train(training)
