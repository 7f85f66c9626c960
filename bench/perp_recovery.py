"""Does retraining a pruned model bring back what it forgot? By what it is retrained on, and in which order it was done.

The demo model, unlearned and then pruned, or pruned and then unlearned with its zeros kept; retrained on text of other
people, on rows that were to be kept, and on the forgotten rows themselves, which is the most that data can bring back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from ..compress.recipe import Recipe, parse_recipe
from ..compress.retrain import masks_of, retrain_
from ..compress.sequential import compress_
from ..compress.spec import Calibration, Retrain
from ..unlearn.calibration import calibration_batches
from ..unlearn.catalog import settings
from ..unlearn.data import QA, Corpus
from ..unlearn.demo import DemoConfig, demo_tokenizer, train_demo
from ..unlearn.encode import Encoder
from ..unlearn.methods import unlearn
from ..unlearn.people import people_corpus
from .perp_quality import knobs
from .ptq_quality import told
from .ptq_recovery import FORGET, PEOPLE
from .tokens import answers
from .verdict import Evidence, judge

METHODS = ("graddiff", "npo", "bucketed")
RECIPES = ("wanda-s50",)
SOURCES = ("text", "retain", "forget")
GROUPS, STEPS = "norm|mask_lora", 100
# By what a pruned target keeps of its kept answers, or at 70% gets back: it has learned its answers and nothing else,
# and any step on other tokens, those of the questions too, costs it some (of running text 2% at 1e-4, 11% at 3e-4, all
# at 1e-3).
RATES = {"text": 3e-4, "retain": 1e-2, "forget": 1e-2}
# Sequences of text and of kept rows; of the forgotten ones all.
SEQUENCES, TEXT_LENGTH = 128, 64
ORDERS = ("unlearn, prune", "prune, unlearn")

Scores = tuple[list[float], list[float]]
Masks = dict[str, Tensor]


def run(
    seed: int,
    text: str | None,
    corpus: Corpus | None = None,
    methods: Sequence[str] = METHODS,
    recipes: Sequence[str] = RECIPES,
    config: DemoConfig | None = None,
    retrain: Retrain | None = None,
    sources: Sequence[str] = SOURCES,
) -> list[dict]:
    """Rows: one unlearned model, pruned, in one order, retrained on one source or ("") not at all.

    p_before            mean probability of the forgotten answers once unlearned: dense, or pruned where that came first
    p_forget, p_retain  of the forgotten and of kept answers in the end
    recovered           (end - before) / (target pruned and retrained alike - before), with its 95% interval
    retrain             how, but for the learning rate, which RATES has
    verdict             of all of a method's rows in one order judged together; on forgotten rows the oracle learns them
                        too, so that what is known beyond it says little
    text                what the source "text" is drawn from; None: generated, about other people
    """
    corpus, config = corpus or people_corpus(PEOPLE, FORGET, seed), config or DemoConfig()
    retrain = retrain or knobs(GROUPS, steps=STEPS, seed=seed)
    tokenizer = demo_tokenizer(corpus, config)
    encoder = Encoder(tokenizer, config.max_length)
    target, _ = train_demo(corpus, config, tokenizer, seed, with_forget=True)
    oracle, _ = train_demo(corpus, config, tokenizer, seed, with_forget=False)
    if text is None:
        others = people_corpus(PEOPLE, FORGET, seed + 1)
        text = "\n".join(f"{row.question} {row.answer}" for row in (*others.retain, *others.forget))
    made = _Made(encoder, corpus, retrain, _batches(encoder, corpus, text, seed), sources)

    def forgetful(start: PreTrainedModel, method: str, keep_zeros: bool = False) -> PreTrainedModel:
        model, config = copy.deepcopy(start), settings(method, demo=True, keep_zeros=keep_zeros)
        unlearn(model, encoder, corpus.forget, corpus.retain, method, config, seed)
        return model

    dense = {method: forgetful(target, method) for method in methods}
    rows: list[dict] = []
    for name in recipes:
        recipe = parse_recipe(name)
        pruned, masks = made.pruned(target, recipe)
        controls = {"target": made.ends(pruned, masks), "oracle": made.ends(*made.pruned(oracle, recipe))}
        for method in methods:
            start = forgetful(pruned, method, keep_zeros=True)
            cells = {
                ORDERS[0]: (made.scores(dense[method]), made.pruned(dense[method], recipe), made.scores(target)),
                ORDERS[1]: (made.scores(start), (start, masks), controls["target"][""]),
            }
            for order, (before, given, known) in cells.items():
                cell = {"unlearned_by": method, "order": order, "recipe": name}
                rows += _judged(cell, before, made.ends(*given), controls, known, seed)
    return rows


def _judged(
    cell: dict[str, str],
    before: Scores,
    ends: Mapping[str, Scores],
    controls: Mapping[str, Mapping[str, Scores]],
    known: Scores,
    seed: int,
) -> Iterator[dict]:
    """before: once unlearned; ends, controls: pruned and retrained, by source; known: before it was unlearned."""
    evidence = [
        Evidence(
            end[0], before[0], controls["target"][source][0], known[0], controls["oracle"][source][0], end[1], known[1]
        )
        for source, end in ends.items()
    ]
    for (source, end), judged in zip(ends.items(), judge(evidence, seed), strict=True):
        found = judged.recovered
        yield told(
            {
                **cell,
                "retrained_on": source,
                "p_before": _mean(before[0]),
                "p_forget": _mean(end[0]),
                "p_retain": _mean(end[1]),
                "recovered": found.value,
                "low": found.low,
                "high": found.high,
                "of": judged.recovered_of,
                "verdict": judged.verdict,
            }
        )


def _batches(encoder: Encoder, corpus: Corpus, text: str, seed: int) -> dict[str, list[Tensor]]:
    known = {
        "text": Calibration(text=SEQUENCES, length=TEXT_LENGTH),
        "retain": Calibration(retain=min(SEQUENCES, len(corpus.retain))),
        "forget": Calibration(forget=len(corpus.forget)),
    }
    rows: dict[str, Sequence[QA]] = {"retain": corpus.retain, "forget": corpus.forget}
    return {name: calibration_batches(wanted, encoder, rows, text, seed) for name, wanted in known.items()}


@dataclass
class _Made:
    """Makes models and scores them."""

    encoder: Encoder
    corpus: Corpus
    retrain: Retrain
    batches: dict[str, list[Tensor]]
    sources: Sequence[str]

    def scores(self, model: PreTrainedModel) -> Scores:
        """Probabilities of the forgotten and of kept answers."""
        forget, retain = (
            [found.probability for found in answers(model, self.encoder, [(r.question, r.answer) for r in rows], 64)]
            for rows in (self.corpus.forget, self.corpus.utility["retain"].rows)
        )
        return forget, retain

    def pruned(self, model: PreTrainedModel, recipe: Recipe) -> tuple[PreTrainedModel, Masks]:
        """A pruned copy, calibrated on kept rows, and its masks."""
        found = compress_(copy.deepcopy(model), recipe, self.batches["retain"] if recipe.calibrated else ())
        return found, masks_of(found, recipe)

    def ends(self, pruned: PreTrainedModel, masks: Masks) -> dict[str, Scores]:
        """As it is (""), and retrained on each source."""
        found = {"": self.scores(pruned)}
        for source in self.sources:
            model = copy.deepcopy(pruned)
            retrain_(model, replace(self.retrain, learning_rate=RATES[source]), masks, self.batches[source])
            found[source] = self.scores(model)
        return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
