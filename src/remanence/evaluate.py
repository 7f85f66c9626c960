"""`remanence evaluate`: every measure of one model, as it is, beside the oracle's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from .bench.cell import Measures, load_served, measure
from .bench.figures import figures
from .bench.harness import harness
from .bench.muse import muse_scores
from .bench.privacy import auc_interval, gradient_norm, reference
from .bench.probes import ChoiceAccuracy, choice_accuracy, knowledge_beside_perplexity
from .bench.tofu import mean
from .bench.tokens import answers
from .unlearn.data import Corpus
from .unlearn.encode import Encoder
from .unlearn.muse import muse_data

SCHEMA = "remanence.evaluation/1"


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-evaluation-harness.

    names        of tasks, on `limit` documents each (None: all)
    include_path    a directory with task definitions of one's own
    """

    names: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = None


def evaluate(
    model: str, target: str | None, corpus: Corpus, measures: Measures, tasks: Tasks
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the figures, per-item values) of the model in directory (or hub id) `model`, adapter and guard included.

    target   the model before it forgot: what was lost of its knowledge is set beside what its perplexity lost
    With measures.oracle, forget quality, PrivLeak, distance and pressures are against it.

    Raises ValueError for a model or text that cannot be measured, ModuleNotFoundError for tasks without lm-eval.
    """
    oracle, seed = measures.oracle, measures.seed
    found: dict[str, Any] = {}
    never_saw = load_served(oracle)[0] if oracle else None
    paths = {"model": model, "target": target, "oracle": oracle}
    for name, path in paths.items():
        if path is not None:
            network, encoder = load_served(path)
            found[name] = {
                **measure(network, encoder, corpus, measures),
                **_beside(network, encoder, corpus, tasks),
                "attacks": _attacks(network, encoder, corpus, never_saw),
            }
    documents = {
        name: figures(corpus, values, found.get("oracle"), seed) | _figures_beside(values, found.get("target"), seed)
        for name, values in found.items()
    }
    data = {"name": corpus.name, "sha256": corpus.digest(), "forget": len(corpus.forget)}
    return {"schema": SCHEMA, "data": data, **documents}, found


def evaluate_muse(
    model: str, oracle: str | None, name: str, directory: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the figures, per-item values) on MUSE's own evaluation sets."""
    data = muse_data(name, directory)
    auc = None
    found = {}
    for who, path in {**({"oracle": oracle} if oracle else {}), "model": model}.items():
        network, encoder = load_served(path)
        found[who] = muse_scores(network, encoder, data, auc)
        auc = found[who]["auc"]
    documents = {who: {key: value for key, value in scores.items() if key != "items"} for who, scores in found.items()}
    return {"schema": SCHEMA, "data": {"name": name}, **documents}, found


def _beside(network: PreTrainedModel, encoder: Encoder, corpus: Corpus, tasks: Tasks) -> dict[str, Any]:
    """Knowledge probes and tasks; null where not asked for or not to be had."""
    compared = [row for items in corpus.utility.values() for row in items.rows if row.perturbed_answers]
    return {
        "probes": asdict(choice_accuracy(network, encoder, compared)) if compared else None,
        "tasks": _tasks(network, encoder, tasks) if tasks.names else None,
    }


def _attacks(
    network: PreTrainedModel, encoder: Encoder, corpus: Corpus, oracle: PreTrainedModel | None
) -> dict[str, dict[str, list[float]]]:
    """Membership scores that take more than one pass of the model: by attack, of forget and holdout rows."""
    sets = {
        name: [(row.question, row.answer) for row in rows]
        for name, rows in (("forget", corpus.forget), ("holdout", corpus.holdout))
    }
    if not corpus.holdout:
        return {}
    found = {"gradient_norm": {name: gradient_norm(network, encoder, pairs) for name, pairs in sets.items()}}
    if oracle is not None:
        found["reference"] = {
            name: [
                reference(*both)
                for both in zip(answers(network, encoder, pairs), answers(oracle, encoder, pairs), strict=True)
            ]
            for name, pairs in sets.items()
        }
    return found


def _figures_beside(values: dict[str, Any], target: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    text, probed = values["perplexity"], values["probes"]
    found: dict[str, Any] = {
        "probes": None,
        "knowledge": None,
        "tasks": values["tasks"],
        "membership": {
            name: asdict(auc_interval(scores["forget"], scores["holdout"]))
            for name, scores in values["attacks"].items()
        },
    }
    if probed is not None:
        probes = ChoiceAccuracy(**probed)
        found["probes"] = {
            "normalised": asdict(probes.interval()),
            "raw": asdict(probes.interval(normalised=False)),
            "chance": mean(probes.chance),
            "rows": len(probes.rows),
        }
        if target is not None and text is not None:
            before = target["perplexity"]["value"], ChoiceAccuracy(**target["probes"])
            found["knowledge"] = asdict(knowledge_beside_perplexity(text["value"], before[0], probes, before[1], seed))
    return found


def _tasks(network: PreTrainedModel, encoder: Encoder, tasks: Tasks) -> dict[str, Any]:
    found = harness(network, encoder.tokenizer, tasks.names, tasks.limit, include_path=tasks.include_path)
    return {task: {metric: asdict(score) for metric, score in metrics.items()} for task, metrics in found.items()}
