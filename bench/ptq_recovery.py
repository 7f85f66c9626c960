"""What each quantizer brings back of what a model forgot, by the data it was calibrated on: the demo model, three ways.

NPO and GradDiff, and `bucketed`, the positive control, that plain round to nearest undoes whole.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..compress.kv_attach import attach_kv_, check_rounded
from ..compress.recipe import Recipe, parse_recipe
from ..compress.sequential import compress_
from ..compress.spec import Calibration
from ..unlearn.calibration import calibration_batches
from ..unlearn.catalog import settings
from ..unlearn.data import QA, Corpus
from ..unlearn.demo import DemoConfig, demo_tokenizer, train_demo
from ..unlearn.encode import Encoder
from ..unlearn.methods import unlearn
from ..unlearn.people import people_corpus
from .tokens import answers
from .verdict import Evidence, judge

METHODS = ("graddiff", "npo", "bucketed")
CALIBRATED = ("gptq-w4a16-g64", "awq-w4a16-g64", "signround-w4a16-g64", "gptq-w3a16-g64")
DATA_FREE = ("rtn-w4a16-g64-plain", "rtn-w4a16-g64", "hqq-w4a16-g64-asym", "bnb-nf4", "rtn-w3a16-g64")
PEOPLE, FORGET = 80, "forget10"


def run(
    seed: int,
    text: str | None,
    corpus: Corpus | None = None,
    methods: Sequence[str] = METHODS,
    calibrated: Sequence[str] = CALIBRATED,
    data_free: Sequence[str] = DATA_FREE,
    config: DemoConfig | None = None,
    sources: Sequence[str] | None = None,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict]:
    """Rows: one unlearned model under one recipe, calibrated on one source.

    p_dense, p_forget   mean probability of the forgotten answers before and after compression
    recovered           (compressed - unlearned) / (target compressed alike - unlearned), with its 95% interval
    verdict             of all of a method's recipes judged together
    text                what the source "text" is drawn from; None: without it
    sources             of "retain", "forget", "retain+forget", "text"; None: all
    tuned               settings of some methods, in place of those for demo models
    """
    corpus, config = corpus or people_corpus(PEOPLE, FORGET, seed), config or DemoConfig()
    tokenizer = demo_tokenizer(corpus, config)
    encoder = Encoder(tokenizer, config.max_length)
    target, _ = train_demo(corpus, config, tokenizer, seed, with_forget=True)
    oracle, _ = train_demo(corpus, config, tokenizer, seed, with_forget=False)
    order = [(parse_recipe(name), "") for name in data_free]
    found_sources = _sources(corpus, text)
    chosen = {name: found_sources[name] for name in sources or found_sources}
    order += [(parse_recipe(name), source) for name in calibrated for source in chosen]
    rows = {"retain": corpus.retain, "forget": corpus.forget}
    batches = {name: calibration_batches(wanted, encoder, rows, text, seed) for name, wanted in chosen.items()}
    known = _Known(encoder, corpus, order, batches)
    targets, oracles = known.under_every(target), known.under_every(oracle)
    found = []
    for method in methods:
        model = copy.deepcopy(target)
        unlearn(
            model,
            encoder,
            corpus.forget,
            corpus.retain,
            method,
            settings(method, demo=True, **(tuned or {}).get(method, {})),
            seed,
        )
        dense, compressed = known.of(model), known.under_every(model)
        evidence = [
            Evidence(ours[0], dense[0], base[0], known.of(target)[0], never[0], ours[1], known.of(target)[1])
            for ours, base, never in zip(compressed, targets, oracles, strict=True)
        ]
        for (recipe, source), ours, judged in zip(order, compressed, judge(evidence, seed), strict=True):
            row = {
                "unlearned_by": method,
                "recipe": recipe.name,
                "calibration": source,
                "p_dense": _mean(dense[0]),
                "p_forget": _mean(ours[0]),
                "p_retain": _mean(ours[1]),
                "recovered": judged.recovered.value,
                "low": judged.recovered.low,
                "high": judged.recovered.high,
                "verdict": judged.verdict,
            }
            print(row, file=sys.stderr, flush=True)
            found.append(row)
    return found


def _sources(corpus: Corpus, text: str | None) -> dict[str, Calibration]:
    """What is kept, what was forgotten, both, text from elsewhere: of each as many sequences as are to be forgotten."""
    count = len(corpus.forget)
    sources = {
        "retain": Calibration(retain=count),
        "forget": Calibration(forget=count),
        "retain+forget": Calibration(retain=count - count // 2, forget=count // 2),
    }
    return sources | ({"text": Calibration(text=count, length=64)} if text is not None else {})


Scores = tuple[list[float], list[float]]


class _Known:
    """Probabilities of the forgotten and of the kept answers, of a model and under every recipe."""

    def __init__(
        self, encoder: Encoder, corpus: Corpus, order: list[tuple[Recipe, str]], batches: dict[str, list[Tensor]]
    ) -> None:
        self.encoder, self.order, self.batches = encoder, order, batches
        self.rows: tuple[Sequence[QA], Sequence[QA]] = (corpus.forget, corpus.utility["retain"].rows)

    def of(self, model: PreTrainedModel) -> Scores:
        forget, retain = (
            [found.probability for found in answers(model, self.encoder, [(r.question, r.answer) for r in rows], 64)]
            for rows in self.rows
        )
        return forget, retain

    def under_every(self, model: PreTrainedModel) -> list[Scores]:
        return [
            self._served(compress_(copy.deepcopy(model), recipe, self.batches.get(source, ())), recipe)
            for recipe, source in self.order
        ]

    def _served(self, model: PreTrainedModel, recipe: Recipe) -> Scores:
        if recipe.kv is None:
            return self.of(model)
        attach_kv_(model, recipe.kv)
        found = self.of(model)
        check_rounded(model)
        return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
