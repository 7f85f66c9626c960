"""Does leaving early bring back what was forgotten? The demo models, deep enough for exits to mean something.

Target and oracle; the target unlearned by NPO and by RMU; and the positive control, unlearned by NPO in its last layers
alone, so that an exit below them says all that the target says there. Each as it is, and tuned for exits on kept rows,
beside as many plain steps on the same rows.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ..compress.decoding import left_padded
from ..compress.early_exit.draft import draft_and_verify
from ..compress.early_exit.policy import Confidence, Fixed, Policy, Saturation, Schedule
from ..unlearn.catalog import settings
from ..unlearn.data import QA, Corpus, EvalSet
from ..unlearn.demo import DemoConfig, demo_tokenizer, train_demo
from ..unlearn.encode import Encoder, pad_id
from ..unlearn.exit_tuning import ExitTuning, tune_
from ..unlearn.layers import decoder_layers
from ..unlearn.methods import unlearn
from ..unlearn.people import people_corpus
from .exit_audit import exit_document, leak_rows, measure_exits, swept, tuning_rows, verdict_rows
from .w4a4 import TUNED

METHODS = ("npo", "rmu")
POSITIVE = "last-layers"
PEOPLE, FORGET = 40, "forget20"
SHAPE = DemoConfig(layers=8, hidden_size=128, intermediate_size=320, max_length=128)
EXITS = (2, 4, 6)
THRESHOLDS = {"saturation": (0.9, 0.95), "confidence": (0.5, 0.9)}
# Of the positive control: so many of the last layers, in which NPO takes all. Faster than the whole model's, as a
# quarter of the weights does all of it.
LAST = 2
LATE = {"steps": 80, "learning_rate": 1e-3, "gamma": 0.3}
TUNING = ExitTuning(exits=EXITS, steps=50, learning_rate=3e-4, batch_size=32)
# Draft-and-verify: tokens of an answer, and questions.
NEW, ASKED = 16, 10


def run_leak(
    seed: int = 0,
    corpus: Corpus | None = None,
    config: DemoConfig = SHAPE,
    methods: Sequence[str] = METHODS,
    tuning: ExitTuning = TUNING,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, checks): leak curves and verdicts of the models as they are, then tuned; what tuning alone gave back.

    Raises RuntimeError where a demo model does not learn its answers.
    """
    corpus = corpus or people_corpus(PEOPLE, FORGET, seed)
    encoder, models = made(seed, corpus, config, methods)
    return audited(models, encoder, _short(corpus), policies(tuning.exits), tuning, seed)


def _short(corpus: Corpus) -> Corpus:
    """What the tables need: the true answers to the forgotten and to kept rows. Wrong ones are most of the time."""
    forget, kept = (
        tuple(QA(row.question, row.answer, person=row.person) for row in rows)
        for rows in (corpus.forget, corpus.utility["retain"].rows)
    )
    return replace(corpus, forget=forget, utility={"retain": EvalSet(kept)})


def policies(exits: Sequence[int]) -> list[Policy]:
    exits = tuple(exits)
    graded: list[Policy] = [Saturation(exits=exits), Confidence(exits=exits)]
    schedule = Schedule(exits=exits[-2:], horizon=8)
    return [*(Fixed(exits=(depth,)) for depth in exits), schedule, *swept(graded, THRESHOLDS)]


def made(
    seed: int, corpus: Corpus, config: DemoConfig, methods: Sequence[str]
) -> tuple[Encoder, dict[str, PreTrainedModel]]:
    """Target, oracle, the target unlearned by each method, and the positive control."""
    tokenizer = demo_tokenizer(corpus, config)
    encoder = Encoder(tokenizer, config.max_length)
    models = {}
    for name in ("target", "oracle"):
        models[name], _ = train_demo(corpus, config, tokenizer, seed, with_forget=name == "target")
        _told(f"{name} trained")
    for method in methods:
        config_ = settings(method, demo=True, **TUNED.get(method, {}))
        models[method] = copy.deepcopy(models["target"])
        unlearn(models[method], encoder, corpus.forget, corpus.retain, method, config_, seed)
        _told(f"unlearned by {method}")
    models[POSITIVE] = last_layers(models["target"], encoder, corpus, config.layers - LAST, seed)
    _told(f"unlearned in its last {LAST} layers")
    return encoder, {name: model.eval() for name, model in models.items()}


def last_layers(
    target: PreTrainedModel, encoder: Encoder, corpus: Corpus, below: int, seed: int, **more: Any
) -> PreTrainedModel:
    """A copy of the target, unlearned by NPO in the decoder layers above the first `below` alone: whatever leaves there
    or before is the target's."""
    model = copy.deepcopy(target)
    model.requires_grad_(False)
    for layer in decoder_layers(model)[below:]:
        layer.requires_grad_(True)
    config = settings("npo", demo=True, **{**LATE, **more})
    unlearn(model, encoder, corpus.forget, corpus.retain, "npo", config, seed)
    return model.requires_grad_(True).eval()


def audited(
    models: Mapping[str, PreTrainedModel],
    encoder: Encoder,
    corpus: Corpus,
    served: Sequence[Policy],
    tuning: ExitTuning,
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """As run_leak, of models that are there: "target", "oracle", POSITIVE, and what is audited."""
    # The deepest exit that the positive control's layers leave as it was.
    depth = len(decoder_layers(models["target"])) - LAST
    below = max(e for e in tuning.exits if e <= depth)
    positive = {POSITIVE: f"fixed {below}"}
    measured, tuned = {}, {}
    for name, model in models.items():
        measured[name] = measure_exits(model, encoder, corpus, served)
        _told(f"{name} measured")
        exits, plain = (_tuned(model, encoder, corpus.retain, tuning, kind, seed) for kind in (tuning.weights, "plain"))
        tuned[name] = measure_exits(exits, encoder, corpus, served, {"untuned": model, "plain": plain}, generate=False)
        _told(f"{name} tuned and measured")
    documents = {
        "no": exit_document(corpus, measured, seed, positive),
        "yes": exit_document(corpus, tuned, seed, positive),
    }
    rows: list[dict[str, Any]] = []
    for make in (leak_rows, verdict_rows, tuning_rows):
        for label, document in documents.items():
            rows += [{**row, "exits_tuned": label} for row in make(document)]
    drafted = {
        name: differing(model, encoder, corpus.forget[:ASKED], below)
        for name, model in models.items()
        if name not in ("target", "oracle")
    }
    return rows, _checks(documents, drafted)


def _tuned(
    model: PreTrainedModel, encoder: Encoder, rows: Sequence[QA], tuning: ExitTuning, weights: str, seed: int
) -> PreTrainedModel:
    found = copy.deepcopy(model)
    tune_(found, encoder, [(row.question, row.answer) for row in rows], replace(tuning, weights=weights), seed)
    return found


def differing(model: PreTrainedModel, encoder: Encoder, rows: Sequence[QA], depth: int) -> int:
    """Answers that draft-and-verify (the first `depth` layers draft) gives unlike the whole model."""
    pad, end = pad_id(encoder.tokenizer), encoder.tokenizer.eos_token_id
    ids, mask = left_padded([encoder.prompt_ids(row.question) for row in rows], pad)
    more: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": end, "pad_token_id": pad}
    network: Any = model
    whole = network.generate(input_ids=ids, attention_mask=mask, do_sample=False, **more)
    drafted = draft_and_verify(model, ids, mask, depth, **more).sequences
    if whole.shape != drafted.shape:
        return len(rows)
    return int((whole != drafted).any(1).sum())


def _checks(documents: Mapping[str, Any], drafted: Mapping[str, int]) -> list[dict[str, Any]]:
    """Every control of both audits; and that draft-and-verify, the safe mode, is the whole model's answer."""
    checks = []
    for tuned, document in documents.items():
        # Tuning alone may bring back what was forgotten; then the positive control had not forgotten, which is no fault
        # of the audit, and is said in its rows.
        for name, control in document["controls"].items():
            if tuned == "no" or not name.startswith("positive"):
                state = "tuned for exits" if tuned == "yes" else "as it is"
                what = f"{name}, {state}: {control['detail']}"
                checks.append({"what": what, "limit": True, "value": control["ok"], "ok": control["ok"]})
    for name, count in drafted.items():
        what = f"{name}: draft-and-verify answers unlike the whole model's"
        checks.append({"what": what, "limit": 0, "value": count, "ok": count == 0})
    return checks


def _told(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {what}", file=sys.stderr, flush=True)
