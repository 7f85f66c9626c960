"""Every unlearning method that trains, on one demo model and real TOFU rows: does it forget, does it keep, what does it
cost, and does the forgetting outlive 4-bit round to nearest?

Each method runs in a process of its own, so that its peak of resident memory is its own. A last part compares the
memory of NPO, whose reference is computed once and stored, with that of GradDiff, which needs none, and with NPO beside
a second model, on a model whose weights outweigh its activations.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ..backends.cpu import PeakMemory
from ..backends.memory import peak_rss
from ..compress.checkpoint import load_model, load_tokenizer, max_length, save_model
from ..compress.places import base_directory
from ..compress.recipe import parse_recipe
from ..compress.sequential import quantize_
from ..unlearn.adapters import with_adapter
from ..unlearn.catalog import METHODS, settings
from ..unlearn.data import Corpus, spread
from ..unlearn.demo import DemoConfig, demo_tokenizer, train_demo
from ..unlearn.encode import Batch, Encoder
from ..unlearn.feed import Feed
from ..unlearn.layers import forward
from ..unlearn.likelihood import mean_probability
from ..unlearn.losses import answer_nll, nll, npo
from ..unlearn.methods import unlearn
from ..unlearn.objectives import Run, build
from ..unlearn.tofu import tofu_corpus
from ..unlearn.train import Objective, Schedule, Term, fit
from .forgetting import rouge_recall
from .generation import answer_questions
from .tofu import mean

RECIPE = "rtn-w4a16-g64-plain"
AUTHORS, FORGET = 20, "forget01"  # 18 of TOFU's authors are kept, its last two forgotten
RETAIN_ROWS = 100  # of 360, evenly spread, are scored

# Point by point, what must hold.
FORGETS = ("graddiff", "npo", "simnpo", "rmu", "undial", "loku")  # P(forget) <= 0.2 with P(retain) >= 0.8
SURVIVES = ("quail", "saf", "floor")  # P(forget) rises by 0.05 at most under RECIPE
MEMORY = 1.10  # NPO's peak over GradDiff's


def run(seed: int = 0, data_dir: str | None = None, methods: tuple[str, ...] = ()) -> tuple[list[dict], list[dict]]:
    """(rows, checks). `methods`: only these; all that train, and the memory comparison, when empty.

    p_forget, p_retain: mean probability of the answers; p_forget_w4: the same after round to nearest at 4 bits, groups
    of 64; rouge: mean ROUGE-L recall of greedy answers; seconds: of unlearning alone; peak_rss: of its process.
    """
    corpus = _corpus(data_dir)
    names = methods or tuple(name for name, m in METHODS.items() if m.kind != "inference" and "moe" not in m.needs)
    with tempfile.TemporaryDirectory() as place:
        config = DemoConfig()
        tokenizer = demo_tokenizer(corpus, config)
        model, _ = train_demo(corpus, config, tokenizer, seed, with_forget=True)
        save_model(model, tokenizer, Path(place) / "target")
        rows = [_apart("method", {"name": name, "target": f"{place}/target", "data_dir": data_dir, "seed": seed})
                for name in ("none", *names)]  # fmt: skip
    checks = _checks({row["method"]: row for row in rows})
    if not methods:
        memory = [_apart("memory", {"name": name, "seed": seed}) for name in _MEMORY]
        rows += memory
        checks.append(_memory_check({row["memory of"]: row for row in memory}))
    return rows, checks


def _corpus(data_dir: str | None) -> Corpus:
    return tofu_corpus(data_dir, FORGET, AUTHORS)


def _apart(part: str, order: dict[str, Any]) -> dict[str, Any]:
    """One row, measured in a process of its own, and told as soon as it is there: the whole takes its time."""
    command = [sys.executable, "-m", __name__, part, json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{order['name']}: {done.stderr.strip().splitlines()[-1]}")
    row = json.loads(done.stdout.splitlines()[-1])
    print(", ".join(f"{key} {value:.3g}" if isinstance(value, float) else value for key, value in row.items()),
          file=sys.stderr, flush=True)  # fmt: skip
    return row


def method_row(name: str, target: str, data_dir: str | None, seed: int) -> dict[str, Any]:
    """Unlearn with one method (or not at all: "none") and score."""
    corpus = _corpus(data_dir)
    model, tokenizer = load_model(target), load_tokenizer(target)
    encoder = Encoder(tokenizer, max_length(model))
    with tempfile.TemporaryDirectory() as place:
        written = Path(target)
        start = time.perf_counter()
        if name != "none":
            result = unlearn(model, encoder, corpus.forget, corpus.retain, name, settings(name, demo=True), seed)
        seconds, peak = time.perf_counter() - start, peak_rss()
        if name != "none":
            written = Path(place)
            result.save(written, tokenizer)
        model = with_adapter(load_model(base_directory(written)), written)
        compressed = with_adapter(quantize_(load_model(base_directory(written)), parse_recipe(RECIPE)), written)
    row: dict[str, Any] = {"method": name}
    for part, rows in (("forget", corpus.forget), ("retain", spread(corpus.retain, RETAIN_ROWS))):
        row[f"p_{part}"] = mean_probability(model, encoder, [(r.question, r.answer) for r in rows])
        row[f"rouge_{part}"] = mean(rouge_recall(answer_questions(model, encoder, rows), [r.answer for r in rows]))
    row["p_forget_w4"] = mean_probability(compressed, encoder, [(r.question, r.answer) for r in corpus.forget])
    return row | {"seconds": seconds, "peak_rss_mib": peak / 2**20}


def _checks(rows: Mapping[str, dict[str, Any]]) -> list[dict]:
    checks = []

    def check(what: str, value: float, limit: float, at_most: bool) -> None:
        ok = value <= limit if at_most else value >= limit
        checks.append({"what": what, "limit": f"{'<=' if at_most else '>='} {limit:g}", "value": value, "ok": ok})

    for name in FORGETS:
        if name in rows:
            check(f"{name}: forget probability", rows[name]["p_forget"], 0.2, True)
            check(f"{name}: retain probability", rows[name]["p_retain"], 0.8, False)
    if "bucketed" in rows:
        row = rows["bucketed"]
        check("bucketed: forget probability, full precision", row["p_forget"], 0.05, True)
        check("bucketed: retain probability, full precision", row["p_retain"], 0.9, False)
        check(f"bucketed: forget probability, {RECIPE}", row["p_forget_w4"], 0.9, False)
    for name in SURVIVES:
        if name in rows:
            row = rows[name]
            check(
                f"{name}: forget probability, {RECIPE} - full precision",
                row["p_forget_w4"] - row["p_forget"],
                0.05,
                True,
            )
    return checks


# --- memory: 57 million parameters and eight short answers, so that a second model could not hide

_MEMORY = {"graddiff": "graddiff", "npo, reference stored": "npo", "npo, second model held": "npo"}


def memory_row(name: str, seed: int) -> dict[str, Any]:
    """Peak memory of a few updates on a model of random weights: of its tensors, and of the process."""
    method = METHODS[_MEMORY[name]]
    torch.manual_seed(seed)
    encoder = _toy_encoder()
    shape = LlamaConfig(
        vocab_size=len(encoder.tokenizer), hidden_size=768, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=12, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    pairs = [(f"What is item {i}?", f"It is number {i * 37}.") for i in range(16)]
    config = settings(_MEMORY[name], steps=3, forget_batch=4, retain_batch=4, warmup=0)
    feed = Feed(encoder, {"forget": pairs[:8], "retain": pairs[8:]}, {"forget": 4, "retain": 4}, seed)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    start = time.perf_counter()
    with PeakMemory(sum(storages.values())) as memory:
        if name == "npo, second model held":
            objective = _held(model, deepcopy(model))
        else:
            objective = build(method.objective, Run(model, model, feed, config, seed))
        fit(model, objective, feed, Schedule(config.steps, config.learning_rate), seed=seed)
    return {
        "memory of": name,
        "seconds": time.perf_counter() - start,
        "peak_rss_mib": peak_rss() / 2**20,
        "peak_tensors_mib": memory.peak_bytes / 2**20,
    }


def _held(model: nn.Module, reference: nn.Module) -> Objective:
    """NPO as it is often run: the start model stays in memory and answers at every step."""

    def forget(batches: Mapping[str, Batch]) -> Tensor:
        batch = batches["forget"]
        with torch.no_grad():
            before, _ = answer_nll(forward(reference, batch), batch.labels)
        return npo(answer_nll(forward(model, batch), batch.labels)[0], before)

    def retain(batches: Mapping[str, Batch]) -> Tensor:
        return nll(forward(model, batches["retain"]), batches["retain"].labels)

    return Objective([Term("forget", forget, "forget", "answers"), Term("retain", retain, "retain", "tokens")])


def _toy_encoder() -> Encoder:
    from ..unlearn.people import people_corpus

    config = DemoConfig(vocab_size=512)
    return Encoder(demo_tokenizer(people_corpus(6, "forget20", 0), config), 128)


def _memory_check(rows: Mapping[str, dict[str, Any]]) -> dict:
    graddiff, stored, _ = (rows[name]["peak_tensors_mib"] for name in _MEMORY)
    return {
        "what": "npo with a stored reference: peak memory over graddiff's",
        "limit": f"<= {MEMORY:g}",
        "value": stored / graddiff,
        "ok": stored / graddiff <= MEMORY,
    }


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"method": method_row, "memory": memory_row}

if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]](**json.loads(sys.argv[2]))))
