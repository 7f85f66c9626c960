"""`remanence exit audit`: models served with exits, under every policy, and whether what was forgotten comes back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .compress.places import local_model
from .config import AuditConfig
from .corpus import load_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .bench.exit_audit import Meter
    from .compress.early_exit.policy import Policy
    from .unlearn.data import Corpus
    from .unlearn.encode import Encoder

SCHEMA = "remanence.exits/1"
# What the demo is unlearned by.
METHODS = ("npo", "rmu")
# Policies that are asked for where none are named, and the thresholds of those that have one.
POLICIES = ("fixed", "schedule", "saturation", "confidence", "probe")
THRESHOLDS: dict[str, tuple[float, ...]] = {
    "saturation": (0.9, 0.95),
    "confidence": (0.5, 0.9),
    "probe": (0.5, 0.9),
    "agent": (0.6, 0.9),
}
# Of a schedule: tokens until the first exit is reached.
_HORIZON = 8


@dataclass(frozen=True)
class Order:
    """What is to be audited; checked without torch.

    config       data, seed, and models: "demo" trains target and oracle, and unlearns by NPO and RMU
    exits        depths; None: three, evenly spaced
    policies, thresholds   by name; thresholds for all that have one, in place of THRESHOLDS
    tune_steps   0: models are served as they are; above: they are tuned for exits on rows to keep, besides
    control      whether the positive control is made: the target, unlearned in its last layers alone
    energy       joules of a token, all policies of a model in turns
    estimate     by time x a constant, where no counter is
    """

    config: AuditConfig
    exits: tuple[int, ...] | None = None
    policies: tuple[str, ...] = POLICIES
    thresholds: tuple[float, ...] | None = None
    tune_steps: int = 0
    tune_learning_rate: float = 3e-4
    control: bool = True
    energy: bool = False
    estimate: bool = False
    models: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        known = (*POLICIES, "agent")
        for name in self.policies:
            if name not in known:
                raise ValueError(f"policies: {name!r} is not one of {', '.join(known)}")
        if not all(0 <= threshold <= 1 for threshold in self.thresholds or ()):
            raise ValueError(f"thresholds: {self.thresholds}: expected numbers between 0 and 1")
        if self.tune_steps < 0:
            raise ValueError(f"tune-steps: {self.tune_steps}: expected at least 0")
        if self.estimate and not self.energy:
            raise ValueError("estimate: goes with --energy")
        if self.config.model != "demo" and not self.config.unlearned:
            raise ValueError("unlearned: missing; give --unlearned NAME=DIR, the model to audit")
        if self.config.model == "demo" and (self.config.oracle or self.config.unlearned):
            raise ValueError("target: missing; an oracle or unlearned models go with --target DIR")
        found = {} if self.config.model == "demo" else {"target": self.config.model, **self.config.unlearned}
        found |= {"oracle": self.config.oracle} if self.config.oracle else {}
        for path in found.values():
            local_model(path)
        object.__setattr__(self, "models", found)


def audit_exits(order: Order, say: Callable[[str], None]) -> dict[str, Any]:
    """What exits.json holds: schema, environment, config, data, command, and `audits` by state ("as given", "tuned"),
    each as bench/exit_audit.py has it, with `tuned`.

    Raises ValueError for models that cannot leave early or differ in depth or width.
    """
    from .bench.exit_audit import exit_document
    from .bench.exit_recovery import LAST, POSITIVE, SHAPE, last_layers, made
    from .compress.early_exit.policy import evenly
    from .machine import environment
    from .unlearn.layers import decoder_layers

    corpus = load_corpus(order.config)
    if order.config.model == "demo":
        encoder, models = made(order.config.seed, corpus, SHAPE, METHODS)
    else:
        encoder, models = _given(order)
    layers = len(decoder_layers(models["target"]))
    exits = order.exits or evenly(layers, min(3, layers - 1))
    below = max((depth for depth in exits if depth <= layers - LAST), default=None)
    if below is None and order.control:
        say(f"no positive control: no exit lies below the last {LAST} layers, which it is unlearned in")
    if below is None or not order.control:
        models.pop(POSITIVE, None)
    elif POSITIVE not in models:
        say("positive control: the target, unlearned in its last layers")
        models[POSITIVE] = last_layers(models["target"], encoder, corpus, layers - LAST, order.config.seed)
    positive = {POSITIVE: f"fixed {below}"} if POSITIVE in models else {}
    run = _Run(order, encoder, corpus, exits, below if positive else None, say)
    measured, tuned = {}, {}
    for name, model in models.items():
        measured[name] = run.measure(name, model)
        if order.tune_steps:
            tuned[name] = run.tuned(name, model)
    audits = {"as given": {"tuned": False, **exit_document(corpus, measured, order.config.seed, positive)}}
    if tuned:
        audits["tuned"] = {"tuned": True, **exit_document(corpus, tuned, order.config.seed, positive)}
    config = {key: value for key, value in asdict(order).items() if key not in ("config", "models")}
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "config": {"target": order.config.model, **config, "exits": list(exits), "seed": order.config.seed},
        "models": order.models,
        "data": {"name": corpus.name, "forget": len(corpus.forget), "digest": corpus.digest()},
        # Notes on how joules were measured, or why not; empty where they were not asked for.
        "energy": run.notes,
        "audits": audits,
    }


def _given(order: Order) -> tuple[Encoder, dict[str, PreTrainedModel]]:
    from .compress.checkpoint import load_model, load_tokenizer, max_length
    from .unlearn.encode import Encoder

    models: dict[str, Any] = {name: load_model(path).eval() for name, path in order.models.items()}
    shape = _shape(models["target"])
    for name, model in models.items():
        if _shape(model) != shape:
            raise ValueError(f"{name}: {_shape(model)} (layers, width), the target has {shape}; all must be alike")
    return Encoder(load_tokenizer(order.models["target"]), max_length(models["target"])), models


def _shape(model: Any) -> tuple[int, int]:
    config = model.config.get_text_config()
    return config.num_hidden_layers, config.hidden_size


class _Run:
    """What the models of one audit share."""

    def __init__(
        self,
        order: Order,
        encoder: Encoder,
        corpus: Corpus,
        exits: tuple[int, ...],
        control: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.order, self.encoder, self.corpus, self.exits, self.say = order, encoder, corpus, exits, say
        self.control = control  # the depth that the positive control is served at
        self.notes: list[str] = []

    def measure(self, name: str, model: PreTrainedModel, before: dict[str, Any] | None = None) -> dict[str, Any]:
        """One model under the policies, those that learn having learned from it."""
        from .bench.exit_audit import measure_exits

        self.say(f"{name}: {'tuned, ' if before else ''}served with exits")
        policies = self.policies(model)
        return measure_exits(model, self.encoder, self.corpus, policies, before, meter=self.meter())

    def tuned(self, name: str, model: PreTrainedModel) -> dict[str, Any]:
        """Tuned for exits on rows to keep, and what as many plain steps do."""
        from .unlearn.exit_tuning import ExitTuning, tune_

        found = {}
        pairs = [(row.question, row.answer) for row in self.corpus.retain]
        for kind in ("geometric", "plain"):
            self.say(f"{name}: {self.order.tune_steps} {'steps for exits' if kind == 'geometric' else 'plain steps'}")
            tuning = ExitTuning(
                self.exits,
                kind,
                steps=self.order.tune_steps,
                learning_rate=self.order.tune_learning_rate,
                batch_size=32,
            )
            found[kind] = copy.deepcopy(model)
            tune_(found[kind], self.encoder, pairs, tuning, self.order.config.seed)
        return self.measure(name, found["geometric"], {"untuned": model, "plain": found["plain"]})

    def policies(self, model: PreTrainedModel) -> list[Policy]:
        """Heads, probes and agents see rows to keep alone."""
        from .bench.exit_audit import swept
        from .compress.early_exit.policy import Confidence, Fixed, Saturation, Schedule

        thresholds = dict.fromkeys(THRESHOLDS, self.order.thresholds) if self.order.thresholds else THRESHOLDS
        found: list[Policy] = []
        if self.control is not None and "fixed" not in self.order.policies:
            found.append(Fixed(exits=(self.control,)))
        for name in self.order.policies:
            if name == "fixed":
                found += [Fixed(exits=(depth,)) for depth in self.exits]
            elif name == "schedule":
                found.append(Schedule(exits=self.exits[-2:], horizon=_HORIZON))
            elif name == "saturation":
                found += swept([Saturation(exits=self.exits)], thresholds)
            elif name == "confidence":
                found += swept([Confidence(exits=self.exits)], thresholds)
            else:
                found += swept([self._learned(name, model)], thresholds)
        return found

    def _learned(self, name: str, model: PreTrainedModel) -> Policy:
        from .compress.early_exit.states import collect
        from .unlearn.encode import pad_id

        prompts = [self.encoder.prompt_ids(row.question) for row in self.corpus.retain]
        tokenizer = self.encoder.tokenizer
        states = collect(model, prompts, self.exits, pad_id(tokenizer), tokenizer.eos_token_id)
        if name == "probe":
            from .compress.early_exit.probe import fit_probe

            return fit_probe(states, self.order.config.seed)[0]
        from .compress.early_exit.agent import AgentTraining, train_agent

        return train_agent(states, AgentTraining(seed=self.order.config.seed)).agent

    def meter(self) -> Meter | None:
        """What a generated token takes, of questions to forget; None where that was not asked for, or nothing measures
        it. All policies of a model take turns."""
        if not self.order.energy:
            return None
        from .backends.device import device
        from .backends.energy.probes import no_counter, probes, summed
        from .bench.exit_audit import label
        from .bench.exit_energy import exit_energy, told
        from .bench.exit_speed import Served
        from .compress.decoding import left_padded
        from .unlearn.encode import pad_id

        machine = device("cpu")
        counters = probes(machine, self.order.estimate)
        if not summed(counters, machine):
            self.notes = [no_counter(counters)]
            return None
        asked = [self.encoder.prompt_ids(row.question) for row in self.corpus.forget[:8]]
        ids, mask = left_padded(asked, pad_id(self.encoder.tokenizer))

        def joules(model: PreTrainedModel, policies: Sequence[Policy]) -> dict[str, dict[str, Any] | None]:
            ways = {label(policy): Served(policy) for policy in policies}
            found = exit_energy(model, machine, ids, mask, list(ways.values()), _HORIZON, counters)
            self.notes = list(dict.fromkeys([*self.notes, *found["notes"]]))
            return {name: told(found["tokens"][way.name]) for name, way in ways.items()}

        return joules


def verdicts(document: dict[str, Any]) -> Sequence[str]:
    """Of the models under audit, in any state."""
    return [
        cell["verdict"]
        for audit in document["audits"].values()
        for model in audit["models"].values()
        if model["control"] is None
        for cell in model["cells"]
    ]
