"""The audit, top to bottom: references, unlearning, then every model under every recipe, then the verdicts.

Every finished stage lands in the store, so that a run that was stopped goes on where it stood. A cell is measured on
what a user gets: the model is compressed, written as a checkpoint, read back, and only then scored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .bench.cell import CELL_VERSION, CellScores, Measures, measure_cell, prune_to
from .bench.document import build_document
from .compress.checkpoint import load_model, load_tokenizer, max_length, skeleton, write_model
from .compress.files import read_json, write_json
from .compress.places import base_directory
from .compress.recipe import DENSE, Recipe
from .compress.spec import QuantSpec
from .compress.walk import linears, weight_of
from .config import CONTROL, AuditConfig
from .corpus import load_corpus
from .errors import UsageError
from .kernels.ops import isa
from .machine import environment
from .progress import Reporter, Silent
from .report import SCHEMA
from .store import Store, digest, directory_digest, file_digest
from .unlearn.bucketed import control_recipe
from .unlearn.catalog import METHODS, MethodConfig, settings
from .unlearn.data import Corpus, forgetting_first
from .unlearn.demo import DemoConfig, demo_tokenizer, train_demo
from .unlearn.encode import Encoder
from .unlearn.inference.builders import DEMO as DEMO_GUARDS
from .unlearn.methods import Setup, unlearn

# Raise one of these when a change makes earlier results of that stage wrong.
STAGE_VERSIONS = {"demo": 2, "unlearn": 2, "cell": CELL_VERSION}


@dataclass(frozen=True)
class Model:
    """A checkpoint directory (or hub id) under a name; `control` is its part in the assay, None for what is audited."""

    name: str
    path: str
    digest: str
    control: str | None = None


@dataclass(frozen=True)
class AuditResult:
    """document: what audit.json holds (see bench/document.py); items: every score of every item, per cell."""

    document: dict[str, Any]
    items: dict[str, Any]


def audit(config: AuditConfig, cache: Path | str, reporter: Reporter | None = None) -> AuditResult:
    """Run one audit. Same seed, same machine: the same document but for `times`.

    Raises UsageError or FileNotFoundError for input that cannot be used, OSError when the disk is full.
    """
    reporter = reporter or Silent()
    start = time.time()
    with _deterministic():
        run = _Run(config, load_corpus(config), Store(cache, reporter.note), reporter)
        run.check_models()
        models = run.references() + run.given() + run.unlearned()
        cells = run.grid(models)
    document = build_document(run.corpus, cells, run.control_recipe.name, config.seed)
    times = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "wall_s": time.time() - start,
    }
    head = {"schema": SCHEMA, "environment": environment(), "config": config.model_dump(mode="json")}
    return AuditResult(
        {**head, **document, **run.demo(), "times": times},
        {"schema": SCHEMA, "cells": [_items(c) for c in cells]},
    )


def _content(path: str | None) -> str | None:
    """By what a file or directory of the user's is known; a name that is no path by itself."""
    if path is None or not Path(path).exists():
        return path
    return directory_digest(Path(path)) if Path(path).is_dir() else file_digest(Path(path))


# What items.json keeps of every cell.
_ITEMS = ("sets", "health", "muse", "distance", "perplexity", "pressures", "update_survival")


def _items(cell: CellScores) -> dict[str, Any]:
    return {"method": cell.model, "recipe": cell.recipe.name, **{name: cell.measured.get(name) for name in _ITEMS}}


class _Run:
    """One audit in progress: what its stages share. `whole` is the corpus before any request was made."""

    def __init__(self, config: AuditConfig, whole: Corpus, store: Store, reporter: Reporter) -> None:
        self.config, self.whole, self.store, self.reporter = config, whole, store, reporter
        self.made = config.request or config.requests
        self.corpus = forgetting_first(whole, config.requests, self.made)
        self.target: Model
        self.oracle: Model | None = None
        self.control_recipe: Recipe
        self.train_probability: dict[str, Any] = {}  # of the demo models

    def check_models(self) -> None:
        """What is wrong with the user's models is said before any work; settles what the control is built against."""
        paths = {} if self.config.model == "demo" else {"target": self.config.model}
        paths |= {"oracle": self.config.oracle} if self.config.oracle else {}
        paths |= self.config.unlearned
        shapes: dict[str, tuple[int, ...]] = {}
        for name, path in paths.items():
            base = base_directory(path)
            load_tokenizer(base)
            found = {layer: tuple(weight_of(module).shape) for layer, module in linears(skeleton(base), ())}
            if shapes and found != shapes:
                raise UsageError(f"{name}: {path}: its layers are not those of the other models; all must be alike")
            shapes = found
        config = DemoConfig(arch=self.config.arch)
        widths = {shape[1] for shape in shapes.values()} or {config.hidden_size, config.intermediate_size}
        self.control_recipe = control_recipe(widths)
        if self.control_recipe.spec != QuantSpec(4, 64):
            self.reporter.note(f"positive control: {self.control_recipe}, as 64 does not divide every layer's width")
        demo = self.config.model == "demo"
        methods = len({*self.config.methods, CONTROL})
        references = 2 if demo or self.config.oracle else 1
        models = references + methods + len(self.config.unlearned)
        pruned = len({recipe.before for recipe in self._recipes()} - {DENSE})
        unlearnings = methods * (self.made if self.config.sequential else 1) * (1 + pruned) + references * pruned
        self.reporter.plan(unlearnings + (references if demo else 0) + models * len(self._recipes()))

    def given(self) -> list[Model]:
        """The user's models that are already unlearned."""
        return [self._given(name, path, None) for name, path in self.config.unlearned.items()]

    def references(self) -> list[Model]:
        """The target, and the oracle where there is one."""
        if self.config.model == "demo":
            self.target, self.oracle = self._demo("target", "baseline"), self._demo("oracle", "negative")
        else:
            self.target = self._given("target", self.config.model, "baseline")
            if self.config.oracle:
                self.oracle = self._given("oracle", self.config.oracle, "negative")
        return [self.target, *([self.oracle] if self.oracle else [])]

    def unlearned(self) -> list[Model]:
        """Those we unlearn, and the positive control (audited too where asked for)."""
        models = [self._unlearn(method, None) for method in self.config.methods]
        return models if CONTROL in self.config.methods else [*models, self._unlearn(CONTROL, "positive")]

    def grid(self, models: list[Model]) -> list[CellScores]:
        """Every model under every recipe."""
        pairs = [(model, recipe) for model in models for recipe in self._recipes()]
        measures = Measures(
            oracle=self.oracle.path if self.oracle else None,
            pressures=self.config.pressures,
            templates=self.config.templates,
            text=self.config.perplexity,
            calibration_text=self.config.text,
            demo=self.config.model == "demo",
            seed=self.config.seed,
        )
        before: dict[tuple[str, Recipe], Model | str] = {}
        cells = []
        for number, (model, recipe) in enumerate(pairs, 1):
            made, start = (self._before(of, recipe, measures, before) for of in (model, self.target))
            if isinstance(made, str) or isinstance(start, str):
                why = made if isinstance(made, str) else start
                cells.append(CellScores(model.name, model.control, recipe, {"error": why}))
                continue
            inputs = {
                "version": STAGE_VERSIONS["cell"],
                "model": made.digest,
                "target": start.digest,
                "recipe": asdict(recipe),
                "data": self.corpus.digest(),
                "oracle": self.oracle.digest if self.oracle else None,
                "pressures": self.config.pressures,
                "templates": _content(self.config.templates),
                "perplexity": _content(self.config.perplexity),
                "text": _content(self.config.text) if recipe.calibrated or recipe.retrain is not None else None,
                "seed": self.config.seed,
                "torch": torch.__version__,
                "isa": isa(),
            }

            def build(work: Path, model: Model = made, start: Model = start, recipe: Any = recipe) -> None:
                scores = measure_cell(model.path, start.path, recipe, self.corpus, work, measures)
                write_json(work / "scores.json", scores)

            path = self._stage("cell", f"measure {model.name} {recipe} ({number}/{len(pairs)})", inputs, build)
            cells.append(CellScores(model.name, model.control, recipe, read_json(path / "scores.json")))
        return cells

    def _before(
        self, model: Model, recipe: Recipe, measures: Measures, known: dict[tuple[str, Recipe], Model | str]
    ) -> Model | str:
        """`model` as compression finds it: where the recipe prunes first, the pruned one that was unlearned. A model
        that cannot be pruned so: why.

        known   what was made before, by name and pruning
        """
        if not recipe.before.compresses:
            return model
        key = model.name, recipe.before
        if key not in known:
            if model.control in ("baseline", "negative"):
                known[key] = self._pruned(model, recipe, measures)
            else:
                start = self._before(self.target, recipe, measures, known)
                known[key] = start if isinstance(start, str) else self._unlearn(model.name, model.control, start)
        return known[key]

    def _pruned(self, model: Model, recipe: Recipe, measures: Measures) -> Model | str:
        pruning = recipe.before.at_once
        inputs = {
            "version": STAGE_VERSIONS["cell"],
            "target": model.digest,
            "recipe": asdict(pruning),
            "data": self.corpus.digest(),
            "text": _content(self.config.text) if pruning.calibrated else None,
            "seed": self.config.seed,
            "torch": torch.__version__,
        }

        def build(work: Path) -> None:
            prune_to(model.path, pruning, self.corpus, work, measures)

        try:
            path = self._stage("prune", f"prune {model.name} {pruning}", inputs, build)
        except ValueError as error:
            return str(error)
        return replace(model, path=str(path), digest=path.name)

    def demo(self) -> dict[str, Any]:
        """What the demo models learned; empty for given models."""
        return {"train_probability": self.train_probability} if self.train_probability else {}

    def _recipes(self) -> list[Recipe]:
        """As asked, with the recipe that the positive control needs."""
        return list(dict.fromkeys([*self.config.compressions(), self.control_recipe]))

    def _demo(self, name: str, control: str) -> Model:
        config = DemoConfig(arch=self.config.arch)
        inputs = {
            "version": STAGE_VERSIONS["demo"],
            "config": asdict(config),
            "data": self.whole.digest(),
            "seed": self.config.seed,
            "with_forget": name == "target",
            "torch": torch.__version__,
        }

        def build(work: Path) -> None:
            tokenizer = demo_tokenizer(self.whole, config)
            model, known = train_demo(
                self.whole, config, tokenizer, self.config.seed, name == "target", self.reporter.progress
            )
            write_model(model, tokenizer, work)
            write_json(work / "training.json", {"train_probability": known})

        label = f"train {name} ({config.arch}, {self.whole.name})"
        path = self._stage("demo", label, inputs, build)
        self.train_probability[name] = read_json(path / "training.json")["train_probability"]
        return Model(name, str(path), path.name, control)

    def _given(self, name: str, path: str, control: str | None) -> Model:
        """A model of the user's, known by the contents of its directory (a hub id by its name)."""
        known = directory_digest(Path(path)) if Path(path).is_dir() else digest(path)
        return Model(name, str(Path(path).resolve()) if Path(path).is_dir() else path, known, control)

    def _unlearn(self, method: str, control: str | None, pruned: Model | None = None) -> Model:
        """The target without what was asked to be forgotten so far: at once, or request by request.

        pruned   what to begin with in its place, and whose zeros are to be kept
        """
        model = pruned or self.target
        rest = set(self.whole.forget)
        for made in range(1 if self.config.sequential else self.made, self.made + 1):
            so_far = forgetting_first(self.whole, self.config.requests, made)
            corpus = replace(so_far, forget=tuple(row for row in so_far.forget if row in rest))
            rest = set(so_far.retain)
            label = f"unlearn {method}" + (f", request {made} of {self.made}" if self.config.sequential else "")
            config = replace(self._method_config(method), keep_zeros=pruned is not None)
            model = self._unlearned(method, control, model, corpus, config, label + (", pruned" if pruned else ""))
        return model

    def _unlearned(
        self, method: str, control: str | None, start: Model, corpus: Corpus, config: MethodConfig, label: str
    ) -> Model:
        guard = DEMO_GUARDS.get(METHODS[method].objective, {}) if self.config.model == "demo" else {}
        inputs = {
            "version": STAGE_VERSIONS["unlearn"],
            "target": start.digest,
            "method": method,
            "config": asdict(config),
            "guard": {key: repr(value) for key, value in guard.items()},
            "data": corpus.digest(),
            "seed": self.config.seed,
            "torch": torch.__version__,
        }

        def build(work: Path) -> None:
            model, tokenizer = load_model(start.path), load_tokenizer(start.path)
            encoder = Encoder(tokenizer, max_length(model))
            unlearn(
                model,
                encoder,
                corpus.forget,
                corpus.retain,
                method,
                config,
                self.config.seed,
                self.reporter.progress,
                Setup(guard=guard),
            ).save(work, tokenizer)

        path = self._stage("unlearn", label, inputs, build)
        return Model(method, str(path), path.name, control)

    def _method_config(self, method: str) -> MethodConfig:
        """The demo's settings or the paper's, with what the user set (bucketed has a scale of its own)."""
        demo = self.config.model == "demo"
        if method == CONTROL:
            return settings(method, demo, against=self.control_recipe.name)
        asked = {"learning_rate": self.config.learning_rate, "steps": self.config.steps}
        return settings(method, demo, **(asked if METHODS[method].kind == "training" else {}))

    def _stage(self, stage: str, label: str, inputs: dict[str, Any], build: Callable[[Path], None]) -> Path:
        key = self.store.key(stage, inputs)
        found = self.store.find(key)
        with self.reporter.stage(label, cached=found is not None):
            return found or self.store.make(key, stage, inputs, build)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic algorithms inside the block, the caller's setting after it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
