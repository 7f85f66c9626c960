"""Leaving early: quality against mean depth, for every policy, on one model that was tuned for exits.

A language model is trained here, then tuned (and, as a control, trained on as long without exits). Probe and agents
learn from its rollouts on text that nothing else sees, and every policy reads held-out text at several thresholds. What
an agent trained by reinforcement has over a classifier of the same states is asked at equal depth, on the same texts;
what CALM's guarantee leaves of either, at thresholds calibrated on texts of their own.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compress.early_exit.agent import AgentTraining, Reward, Trained, returns, train_agent
from ..compress.early_exit.anatomy import anatomy
from ..compress.early_exit.calibrate import calibrated
from ..compress.early_exit.cost import costs
from ..compress.early_exit.parallel import scored
from ..compress.early_exit.policy import NEVER, Confidence, Fixed, Full, Policy, Saturation, Schedule
from ..compress.early_exit.probe import ExitFit, fit_probe
from ..compress.early_exit.states import States, collect, contexts
from ..unlearn.demo import DemoConfig, byte_bpe
from ..unlearn.encode import Encoder, pad_id
from ..unlearn.exit_tuning import ExitTuning, exit_losses, tune_
from ..unlearn.people import people_corpus
from .ptq_quality import told, trained
from .statistics import Draws, bootstrap_mean, resamples
from .texts import texts

# A judged text and a few tokens to spare: short rows are many updates.
SHAPE = DemoConfig(
    vocab_size=1024, hidden_size=128, intermediate_size=256, layers=12, heads=4, kv_heads=2, max_length=80
)
EXITS = (2, 4, 6, 8, 10)
# Characters to learn from, to collect states on, to judge on, to calibrate on. The last are some 180 windows: with a
# mean loss of 1.5 % delta .05 can just be promised.
LEARNED, SEEN, JUDGED, CALIBRATED = 120_000, 60_000, 24_000, 40_000
_PEOPLE = 700
EPOCHS = 8
TUNING = ExitTuning(EXITS, steps=160, learning_rate=1e-3, batch_size=8, length=64)
# Tokens of a judged text, and how many of them are its prompt.
WINDOW, CONTEXT = 64, 24
# Of the scores at all exits: where thresholds are put.
QUANTILES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
# What is promised of the mean share of other tokens: at most DELTAS, but for a risk of EPSILON.
DELTAS, EPSILON = (0.05, 0.1), 0.05
# Of the scores, too: where thresholds are tested. Each step up keeps six tenths of the scores that were enough before.
TESTED = tuple(1 - 0.6**i for i in range(12))
# Depths at which curves are compared.
GRID = 9
# 500,000 decisions in the paper; fewer, at a rate for as few, on standardised states, in ours. An agent that is behind
# the probe here may be short of them: with 200,000 at this rate one came up to it, in minutes for the probe's seconds.
STEPS = 40_000
AGENTS = {
    "agent": AgentTraining(steps=STEPS, learning_rate=1e-3, standardised=True),
    "agent, penalties scaled": AgentTraining(
        reward=Reward(scaling="negative"), steps=STEPS, learning_rate=1e-3, standardised=True
    ),
    "agent, raw states, the paper's rate": AgentTraining(steps=STEPS),
    "agent, five times the decisions": AgentTraining(steps=5 * STEPS, learning_rate=1e-3, standardised=True),
}
SEEDS = {"agent": (420, 421, 422)}  # the others: their own

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """A model tuned for exits, with what it came from and what it is judged on.

    models        "as trained", "trained on (control)" and "tuned for exits"
    calibration   reads text that nothing else sees
    states        of the tuned one, on text that nothing else sees
    """

    models: dict[str, PreTrainedModel]
    encoder: Encoder
    judge: Judge
    calibration: Judge
    states: States

    @property
    def tuned(self) -> PreTrainedModel:
        return self.models["tuned for exits"]


def subject(
    seed: int,
    data_dir: str | None = None,
    shape: DemoConfig = SHAPE,
    epochs: int = EPOCHS,
    tuning: ExitTuning = TUNING,
    characters: tuple[int, int, int, int] = (LEARNED, SEEN, JUDGED, CALIBRATED),
) -> Subject:
    """Trained here. data_dir: of WikiText-2; None: about generated people."""
    learned, seen, judged, calibration = _texts(data_dir, characters)
    tokenizer = byte_bpe(learned.splitlines(), shape.vocab_size)
    encoder = Encoder(tokenizer, shape.max_length)
    models = {"as trained": trained(tokenizer, learned, seed, shape, epochs)}
    for name, kind in (("trained on (control)", "plain"), ("tuned for exits", tuning.weights)):
        models[name] = copy.deepcopy(models["as trained"])
        tune_(models[name], encoder, [("", learned)], replace(tuning, weights=kind), seed)
    states = _states(models["tuned for exits"], tokenizer, seen, tuning.exits, seed)
    return Subject(models, encoder, Judge(tokenizer, judged), Judge(tokenizer, calibration), states)


def run_quality(
    of: Subject, seed: int, agents: dict[str, AgentTraining] | None = None
) -> tuple[list[dict], list[dict]]:
    """(rows, checks). Five tables, by their first columns:

    model     before tuning, after it, and the control: nats per token at every exit and at full depth on the judged
              text, and how much more than before at full depth, with its interval (pairs of texts)
    exit      what the probe's classifier of it knows, on episodes kept aside
    policy    at one threshold: mean depth of decoded tokens, and effective depth, checks and keys included; agreement
              with the whole model's likeliest token, with its interval; nats per token and perplexity of the true text.
              All read one text, whose prompt is at full depth
    compared  agreement less the probe's at equal depth: curves are interpolated, and averaged over the depths that
              both have; with its interval (pairs of texts; an agent's own luck is in the seeds)
    calibrated   at the threshold that CALM's calibration takes (none: nobody leaves): the mean share of tokens that are
              not the whole model's, on the texts that were calibrated on and on the judged ones, with its interval
    """
    made = _Policies(of.tuned, of.states, agents or AGENTS, seed)
    rows = [*_tuning(of, seed), *made.fits()]
    curves = {name: of.judge.curve(of.tuned, policies) for name, policies in made.all()}
    rows += [row for name, curve in curves.items() for row in curve.rows(name, of.judge.seed)]
    compared = [told(against(name, curves[name], curves["probe"], seed)) for name in curves if name != "probe"]
    rows += [*compared, *calibrations(of, made, seed)]
    return rows, checks(rows, made, of.tuned, of.judge)


def _texts(data_dir: str | None, characters: tuple[int, int, int, int]) -> tuple[str, str, str, str]:
    """To learn from, to collect states on, to judge on, to calibrate on; they have nothing in common."""
    first, second, third, fourth = characters
    if data_dir is not None:
        learned, held_out = texts(data_dir)
        return learned[:first], *_cut(held_out, second, third, fourth)
    corpus = people_corpus(_PEOPLE, "forget10", 0)
    text, more = ("\n".join(f"{row.question} {row.answer}" for row in rows) for rows in (corpus.retain, corpus.forget))
    # More people first: the atlas at the end of the others' text is another kind.
    calibration = more + "\n" + text[first + second + third :]
    return *_cut(text, first, second, third), calibration[:fourth]


def _cut(text: str, first: int, second: int, third: int) -> tuple[str, str, str]:
    """Side by side."""
    return text[:first], text[first : first + second], text[first + second : first + second + third]


def windows(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """[N, WINDOW] token ids, side by side."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


@dataclass(frozen=True)
class Read:
    """One policy on every judged text: means over its decoded tokens, [N] float64; effective: over all of them."""

    policy: Policy
    effective: float
    depth: Array
    agreement: Array
    nll: Array


@dataclass(frozen=True)
class Curve:
    """A policy's readings, shallow to deep; the last is the whole model's, which every policy comes to."""

    reads: tuple[Read, ...]

    @property
    def depth(self) -> Array:
        """[k, N]"""
        return np.stack([read.depth for read in self.reads])

    @property
    def agreement(self) -> Array:
        return np.stack([read.agreement for read in self.reads])

    def rows(self, name: str, seed: int) -> Iterator[dict[str, Any]]:
        for read in self.reads:
            found, nll = bootstrap_mean(read.agreement.tolist(), seed), float(read.nll.mean())
            graded = read.policy.graded
            yield told(
                {
                    "policy": name,
                    "threshold": read.policy.threshold if graded else None,
                    "exits": " ".join(map(str, read.policy.exits)),
                    "mean_depth": float(read.depth.mean()),
                    "effective": read.effective,
                    "agreement": found.value,
                    "low": found.low,
                    "high": found.high,
                    "nll": nll,
                    "perplexity": float(np.exp(nll)),
                }
            )


class Judge:
    """Reads the judged text's windows under a policy, in one pass each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, seed: int = 0) -> None:
        self.ids, self.seed = windows(tokenizer, text), seed
        if len(self.ids) < 2:
            raise ValueError(f"text: {len(self.ids)} windows of {WINDOW} tokens to judge on; at least 2 are needed")

    @torch.no_grad()
    def likeliest(self, model: PreTrainedModel) -> Tensor:
        """[N, k] int64: the whole model's tokens."""
        return torch.cat([model(ids).logits[:, CONTEXT:-1].argmax(-1) for ids in self.ids.split(32)])

    @torch.no_grad()
    def read(self, model: PreTrainedModel, policy: Policy, whole: Tensor) -> Read:
        """whole   [N, k], what `likeliest` says of the model"""
        columns, counts = [], Counter[int]()
        for start in range(0, len(self.ids), 32):
            ids = self.ids[start : start + 32]
            decoding = torch.zeros_like(ids, dtype=torch.bool)
            # The first token comes from the prompt's last; nothing follows the text's last.
            decoding[:, CONTEXT:-1] = True
            with scored(model, policy, decoding) as passed:
                logits = model(ids).logits[:, CONTEXT:-1]
            same = logits.argmax(-1) == whole[start : start + 32]
            nll = cross_entropy(logits.transpose(1, 2), ids[:, CONTEXT + 1 :], reduction="none")
            depth = passed.depths[:, CONTEXT:-1]
            counts.update(depth.flatten().tolist())
            columns.append(torch.stack([x.double().mean(1) for x in (depth, same, nll)]))
        effective = costs(model, (CONTEXT + WINDOW) // 2).effective_depth(counts, policy)
        return Read(policy, effective, *torch.cat(columns, 1).numpy())

    def nll(self, model: PreTrainedModel) -> Array:
        """[N], of the whole model."""
        return self.read(model, Full(), self.likeliest(model)).nll

    def curve(self, model: PreTrainedModel, policies: Sequence[Policy]) -> Curve:
        whole = self.likeliest(model)
        reads = [self.read(model, policy, whole) for policy in (*policies, Full())]
        return Curve(tuple(sorted(reads, key=lambda read: read.depth.mean())))


def _tuning(of: Subject, seed: int) -> Iterator[dict[str, Any]]:
    """A row for the model, for the control and for what was tuned."""
    depths = (*of.states.exits, of.states.layers)
    pieces = [("", str(of.encoder.tokenizer.decode(ids))) for ids in of.judge.ids]
    before = of.judge.nll(of.models["as trained"])
    for name, made in of.models.items():
        losses, _ = exit_losses(made, of.encoder, pieces, depths)
        more = bootstrap_mean((of.judge.nll(made) - before).tolist(), seed)
        row: dict[str, Any] = {"model": name, **{f"nll_{depth}": loss for depth, loss in zip(depths, losses)}}
        row |= {"more": more.value, "low": more.low, "high": more.high}
        yield told(row)


def _states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, exits: tuple[int, ...], seed: int
) -> States:
    prompts = contexts(windows(tokenizer, text).tolist(), seed)
    # Running text has no end.
    return collect(model, prompts, exits, pad_id(tokenizer))


class _Policies:
    """Every policy, by name, at several thresholds. Agents learn from the tokens that the probe has for learning and
    for choosing its penalty; what neither has seen says how much they know."""

    def __init__(self, model: PreTrainedModel, states: States, agents: dict[str, AgentTraining], seed: int) -> None:
        self.body, self.states, self.seed = anatomy(model), states, seed
        self.kept, self.learned = states.split((0.15,), seed)
        self.probe, self._fits = fit_probe(self.learned, seed)
        self.agents: dict[str, tuple[AgentTraining, Trained]] = {}
        for name, training in agents.items():
            for number in SEEDS.get(name, (training.seed,)):
                own = replace(training, seed=number)
                label = name if name not in SEEDS else f"{name} {number}"
                self.agents[label] = own, train_agent(self.learned, own)

    def all(self) -> Iterator[tuple[str, list[Policy]]]:
        exits = self.states.exits
        yield "fixed", [Fixed(exits=(depth,)) for depth in exits]
        horizon = WINDOW - CONTEXT - 1
        parts = [exits[:end] for end in range(2, len(exits) + 1)] + [exits[i:] for i in range(1, len(exits) - 1)]
        yield "schedule", [Schedule(exits=part, horizon=horizon) for part in parts]
        for name, policy in self.graded().items():
            yield name, [policy.at(threshold) for threshold in self.thresholds(policy, QUANTILES)]

    def graded(self) -> dict[str, Policy]:
        """Those that a threshold chooses for, the agents last."""
        exits = self.states.exits
        found: dict[str, Policy] = {"saturation": Saturation(exits=exits), "confidence": Confidence(exits=exits)}
        return found | {"probe": self.probe} | {name: trained.agent for name, (_, trained) in self.agents.items()}

    @torch.no_grad()
    def thresholds(self, policy: Policy, quantiles: Sequence[float]) -> list[float]:
        """Quantiles of its scores; what an agent would rather not leave at has none."""
        steps = [self.learned.step(e, self.body.logits) for e in range(len(self.states.exits))]
        scores = torch.cat([policy.score(step) for step in steps]).double().numpy()
        scores = scores[scores > 0]
        found = np.quantile(scores, quantiles) if len(scores) else np.array([])
        return sorted({float(min(1.0, max(0.0, threshold))) for threshold in found})

    def fits(self) -> list[dict]:
        return [told(_fit_row(fit)) for fit in self._fits]

    def over_chance(self, name: str) -> tuple[float, float]:
        """(mean return of a token, that of a coin at every exit), on tokens kept aside."""
        training, found = self.agents[name]
        kept, E = self.kept, len(self.states.exits)
        coins = torch.rand(len(kept), E + 1, generator=torch.Generator().manual_seed(self.seed)) < 0.5
        coins[:, -1] = True
        theirs = kept.leaving(found.agent, self.body.logits)
        value, chance = (returns(kept, leaving, training.reward).mean() for leaving in (theirs, coins.int().argmax(1)))
        return float(value), float(chance)

    def best(self, name: str) -> float:
        return float(returns(self.kept, self.kept.first_agreement, self.agents[name][0].reward).mean())


def _fit_row(fit: ExitFit) -> dict[str, Any]:
    return {
        "exit": fit.depth,
        "tokens": fit.tokens,
        "agreement": fit.agreement,
        "accuracy": fit.accuracy,
        "auc": fit.auc,
        "penalty": fit.penalty,
    }


def against(name: str, ours: Curve, theirs: Curve, seed: int) -> dict[str, Any]:
    """Agreement less theirs at equal depth, averaged over GRID depths of those that both curves have."""
    means = [curve.depth.mean(1) for curve in (ours, theirs)]
    low, high = max(mean.min() for mean in means), min(mean.max() for mean in means)
    row = {"compared": name, "with": "probe", "from_depth": float(low), "to_depth": float(high)}
    if not low < high:
        return {**row, "difference": None, "low": None, "high": None}
    grid = np.linspace(low, high, GRID)
    items = ours.depth.shape[1]
    draws = np.array([_difference(ours, theirs, grid, index) for index in resamples(items, seed)])
    found = Draws(_difference(ours, theirs, grid, np.arange(items)), draws, items).interval()
    return {**row, "difference": found.value, "low": found.low, "high": found.high}


def _difference(ours: Curve, theirs: Curve, grid: Array, index: NDArray[np.int64]) -> float:
    """Of the texts of these numbers."""
    at = [
        _interpolated(curve.depth[:, index].mean(1), curve.agreement[:, index].mean(1), grid)
        for curve in (ours, theirs)
    ]
    return float((at[0] - at[1]).mean())


def _interpolated(depth: Array, agreement: Array, grid: Array) -> Array:
    order = np.argsort(depth, kind="stable")
    return np.interp(grid, depth[order], agreement[order])


def calibrations(of: Subject, made: _Policies, seed: int) -> Iterator[dict[str, Any]]:
    """Of saturation, confidence, probe and the first agent, a row for each delta."""
    model, whole = of.tuned, of.judge.likeliest(of.tuned)
    for name, policy in islice(made.graded().items(), 4):
        losses = _losses(of.calibration, model, policy)
        # Of other texts than those of the calibration; who would never leave has none.
        thresholds = made.thresholds(policy, TESTED) or [NEVER]
        for delta in DELTAS:
            chosen, found = calibrated(policy, losses, delta, EPSILON, thresholds)
            read = of.judge.read(model, chosen, whole)
            loss = bootstrap_mean((1 - read.agreement).tolist(), seed)
            yield told(
                {
                    "calibrated": name,
                    "delta": delta,
                    "epsilon": EPSILON,
                    "threshold": chosen.threshold if chosen.threshold <= 1 else None,
                    "texts": found.texts,
                    "loss_calibration": next((t.loss for t in found.tested if t.threshold == found.threshold), 0.0),
                    "loss_judged": loss.value,
                    "low": loss.low,
                    "high": loss.high,
                    "mean_depth": float(read.depth.mean()),
                    "effective": read.effective,
                }
            )


def _losses(texts: Judge, model: PreTrainedModel, policy: Policy) -> Callable[[Policy], list[float]]:
    """For `calibrated`: the share of each text's tokens that are not the whole model's; each threshold is read once."""
    whole = texts.likeliest(model)

    @cache
    def at(threshold: float) -> list[float]:
        return (1 - texts.read(model, policy.at(threshold), whole).agreement).tolist()

    return lambda other: at(other.threshold)


def series(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float, float, float]]]:
    """For a plot: (mean depth, agreement, low, high) of every policy's readings, shallow to deep."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in rows:
        if "policy" in row:
            found.setdefault(row["policy"], []).append((row["mean_depth"], row["agreement"], row["low"], row["high"]))
    return found


def checks(rows: Sequence[dict], made: _Policies, model: PreTrainedModel, judge: Judge) -> list[dict]:
    """What must hold on any seed. Whether an agent beats the probe is a finding, not a check."""
    models = {row["model"]: row for row in rows if "model" in row}
    shallow = f"nll_{made.states.exits[0]}"
    before, after = (models[name][shallow] for name in ("as trained", "tuned for exits"))
    found = [
        {"what": "nats per token at the first exit, below those before tuning", "limit": before, "value": after}
        | {"ok": after < before}
    ]
    never = judge.read(model, made.probe.at(NEVER), judge.likeliest(model))
    same = float(never.agreement.mean())
    found.append({"what": "agreement of a policy that never leaves", "limit": 1.0, "value": same, "ok": same == 1.0})
    known = [fit.auc for fit in made._fits if fit.auc is not None]
    if known:
        mean = float(np.mean(known))
        found.append({"what": "the probe's mean AUC", "limit": "> 0.5", "value": mean, "ok": mean > 0.5})
    for name in made.agents:
        value, chance = made.over_chance(name)
        what = f"{name}: mean return above a coin's (the best: {made.best(name):.3f})"
        found.append({"what": what, "limit": chance, "value": value, "ok": value > chance})
    for row in rows:
        if "calibrated" in row:
            what = f"{row['calibrated']}, calibrated: judged loss, the interval's lower end, not above delta"
            found.append({"what": what, "limit": row["delta"], "value": row["low"], "ok": row["low"] <= row["delta"]})
    return found
