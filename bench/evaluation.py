"""TOFU's whole evaluation (forget01, a slice of retain, real authors, world facts; generation included) in batches,
beside the same work one example at a time: how much faster, and are the results the same? Two things make it so:
batches, and that an answer which the scores show to be known by heart is not decoded again.

The peer is plain: for every row one forward pass for each of its answers and one `generate`, batch 1, no padding, the
same limit on new tokens. Both run in turns on one model in one process.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from ..unlearn.data import QA, EvalSet
from ..unlearn.demo import DemoConfig, demo_tokenizer, train_demo
from ..unlearn.encode import Encoder
from ..unlearn.losses import answer_nll
from ..unlearn.tofu import tofu_corpus
from .forgetting import evaluate, rouge_recall
from .generation import ANSWER_TOKENS, room
from .tofu import Items

AUTHORS, FORGET = 20, "forget01"  # 18 of TOFU's authors are kept, its last two forgotten
REPEATS = 3
FASTER = 5.0
# float32 sums in another order; the NLLs of one answer are up to some tens of nats.
TOLERANCE = 1e-4


def run(seed: int = 0, data_dir: str | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, checks), a row per set and one for all: median seconds each way, their ratio, the largest difference of an
    NLL per token, and how many generated answers differ."""
    corpus = tofu_corpus(data_dir, FORGET, AUTHORS)
    config = DemoConfig()
    tokenizer = demo_tokenizer(corpus, config)
    model, _ = train_demo(corpus, config, tokenizer, seed, with_forget=True)
    model.eval()
    encoder = Encoder(tokenizer, config.max_length)
    sets = {"forget": EvalSet(corpus.forget), **corpus.utility}
    rows: list[dict[str, Any]] = []
    for name, items in sets.items():
        seconds: dict[str, list[float]] = {"batched": [], "one": []}
        for _ in range(REPEATS):
            start = time.perf_counter()
            found = evaluate(model, encoder, items)
            seconds["batched"].append(time.perf_counter() - start)
            start = time.perf_counter()
            plain, said = one_by_one(model, encoder, items)
            seconds["one"].append(time.perf_counter() - start)
        rows.append(
            {
                "set": name,
                "rows": len(items.rows),
                "batched_s": statistics.median(seconds["batched"]),
                "one_at_a_time_s": statistics.median(seconds["one"]),
                "times_as_fast": statistics.median(seconds["one"]) / statistics.median(seconds["batched"]),
                "spread": max((max(s) - min(s)) / statistics.median(s) for s in seconds.values()),
                "max_nll_difference": _difference(found.items, plain),
                "answers_that_differ": sum(a != b for a, b in zip(found.answers, said, strict=True)),
            }
        )
    rows.append(_all(rows))
    return rows, _checks(rows[-1])


def one_by_one(model: Any, encoder: Encoder, items: EvalSet) -> tuple[Items, list[str]]:
    """Items and greedy answers, every forward pass with one sequence."""
    limit = room(encoder, [encoder.prompt_ids(row.question) for row in items.rows], ANSWER_TOKENS)
    nll, base, wrong, said = [], [], [], []
    for row in items.rows:
        nll.append(_nll(model, encoder, row.question, row.answer))
        base.append(_nll(model, encoder, row.question, row.paraphrased_answer) if row.paraphrased_answer else nll[-1])
        wrong.append([_nll(model, encoder, row.question, answer) for answer in row.perturbed_answers])
        said.append(_generate(model, encoder, row, limit))
    return Items(nll, base, wrong, rouge_recall(said, [r.answer for r in items.rows]), items.choices), said


def _nll(model: Any, encoder: Encoder, question: str, answer: str) -> float:
    batch = encoder.batch([(question, answer)])
    with torch.no_grad():
        total, count = answer_nll(model(input_ids=batch.input_ids).logits, batch.labels)
    return float(total[0]) / int(count[0])


def _generate(model: Any, encoder: Encoder, row: QA, limit: int) -> str:
    ids = torch.tensor([encoder.prompt_ids(row.question)])
    end = encoder.tokenizer.eos_token_id
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=encoder.tokenizer.pad_token_id,
    )
    (text,) = encoder.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()


def _difference(found: Items, plain: Items) -> float:
    def flat(items: Items) -> list[float]:
        return [*items.nll, *items.base_nll, *(nll for wrong in items.wrong_nll for nll in wrong)]

    return max(abs(a - b) for a, b in zip(flat(found), flat(plain), strict=True))


def _all(rows: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(row[key] for row in rows) for key in ("rows", "batched_s", "one_at_a_time_s")}
    return {
        "set": "all",
        **sums,
        "times_as_fast": sums["one_at_a_time_s"] / sums["batched_s"],
        "spread": max(row["spread"] for row in rows),
        "max_nll_difference": max(row["max_nll_difference"] for row in rows),
        "answers_that_differ": sum(row["answers_that_differ"] for row in rows),
    }


def _checks(total: dict[str, Any]) -> list[dict[str, Any]]:
    faster, apart, differ = total["times_as_fast"], total["max_nll_difference"], total["answers_that_differ"]
    return [
        {"what": "times as fast as one example at a time", "limit": FASTER, "value": faster, "ok": faster >= FASTER},
        {"what": "largest NLL difference", "limit": TOLERANCE, "value": apart, "ok": apart <= TOLERANCE},
        {"what": "generated answers that differ", "limit": 0, "value": differ, "ok": differ == 0},
    ]
