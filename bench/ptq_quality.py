"""Held-out perplexity and block error of every quantizer on one trained model, ours and the peers', in one run."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compress.block import Block, Hidden, block_names, enter
from ..compress.checkpoint import load_model, save_model
from ..compress.recipe import parse_recipe
from ..compress.sequential import compress_
from ..unlearn.demo import DemoConfig, byte_bpe, demo_model
from .peers import ModelJob, run_model, write_calibration
from .perplexity import perplexity

BITS, GROUP_SIZES = (4, 3, 2), (128, 64)
# By name in the table: our recipe's method, the peers' method, whether symmetric.
METHODS = {
    "rtn": ("rtn", "rtn", True),
    "gptq": ("gptq", "gptq", True),
    "awq": ("awq", "awq", True),
    "awq-asym": ("awq", "awq", False),
}
# Every layer's input features divide into groups of 128.
SHAPE = DemoConfig(
    vocab_size=1024, hidden_size=256, intermediate_size=512, layers=2, heads=4, kv_heads=2, max_length=256
)
EPOCHS, BATCH, RATE = 2, 16, 3e-3
SEQUENCES, LENGTH = 64, 256  # of calibration data
LEARNED, HELD_OUT = 500_000, 80_000  # characters
# Where ours counts as equal: what two runs of a peer differ by in the last digits of a perplexity.
EQUAL = 1e-3


def run(
    seed: int,
    place: Path,
    cache: Path,
    peers: Sequence[str],
    learned: str,
    held_out: str,
    methods: Sequence[str] = (),
    bits: Sequence[int] = BITS,
    shape: DemoConfig = SHAPE,
    epochs: int = EPOCHS,
) -> tuple[list[dict], list[dict]]:
    """(rows, checks). A row is one method of one maker at one width and group size.

    perplexity    on held-out text
    block_error   |B'(h) - B(h)|^2 / |B(h) - h|^2 on that text, B a decoder block, B' the quantized one, h what enters
                  it in the dense model; mean over the blocks
    seconds       of quantization alone (a peer's own, without its import)
    """
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"methods: {name!r} is not one of {', '.join(METHODS)}")
    tokenizer = byte_bpe(learned.splitlines(), shape.vocab_size)
    target = place / "model"
    learned = learned[:LEARNED]
    save_model(trained(tokenizer, learned, seed, shape, epochs), tokenizer, target)
    batches = windows(tokenizer, learned, min(LENGTH, shape.max_length), SEQUENCES, seed)
    write_calibration(place / "calibration.safetensors", batches)
    judge = _Judge(target, tokenizer, held_out[:HELD_OUT], shape.max_length)
    rows = [told({"method": "dense", "by": "", **judge.of(load_model(target))})]
    for name in methods or METHODS:
        for width in bits:
            for group_size in GROUP_SIZES:
                cell = {"method": name, "bits": width, "group_size": group_size}
                rows.append(told({**cell, "by": "remanence", **_ours(name, width, group_size, target, batches, judge)}))
                for peer in peers:
                    job = _job(name, width, group_size, place, peer)
                    rows.append(told({**cell, "by": peer, **_theirs(peer, job, cache, judge)}))
    return rows, [check for row in rows if row["by"] == "remanence" for check in _checks(row, rows)]


class _Judge:
    """Measures a model against the dense one on held-out text."""

    def __init__(self, target: Path, tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> None:
        self.dense, self.tokenizer, self.text, self.window = load_model(target), tokenizer, text, window
        self.batches = windows(tokenizer, text, window, 16, 0)

    def of(self, model: PreTrainedModel) -> dict[str, float]:
        found = perplexity(model, self.tokenizer, self.text, self.window, self.window // 2)
        return {"perplexity": found.value, "block_error": self._block_error(model)}

    @torch.no_grad()
    def _block_error(self, model: PreTrainedModel) -> float:
        hidden = Hidden(self.batches, self.dense.config.hidden_size, self.dense.dtype)
        errors = []
        for name, calls in zip(block_names(self.dense), enter(self.dense, self.batches, hidden), strict=True):
            dense, other = (
                Block(name, of.get_submodule(name), {}, of.config, calls, hidden) for of in (self.dense, model)
            )
            off = moved = 0.0
            for i in range(len(hidden)):
                before, after = hidden.read(i), dense.forward(i)
                off += float((other.forward(i) - after).double().square().sum())
                moved += float((after - before).double().square().sum())
                hidden.write(i, after)
            errors.append(off / moved)
        return sum(errors) / len(errors)


def _ours(name: str, bits: int, group_size: int, target: Path, batches: list[Tensor], judge: _Judge) -> dict[str, Any]:
    method, _, symmetric = METHODS[name]
    recipe = parse_recipe(f"{method}-w{bits}a16-g{group_size}{'' if symmetric else '-asym'}")
    start = time.perf_counter()
    model = compress_(load_model(target), recipe, batches)
    seconds = time.perf_counter() - start
    return {**judge.of(model), "seconds": seconds}


def _job(name: str, bits: int, group_size: int, place: Path, peer: str) -> ModelJob:
    _, method, symmetric = METHODS[name]
    out = place / f"{peer}-{name}-{bits}-{group_size}"
    threads = torch.get_num_threads()
    calibration = place / "calibration.safetensors"
    return ModelJob(place / "model", calibration, method, bits, group_size, out, symmetric, threads)


def _theirs(peer: str, job: ModelJob, cache: Path, judge: _Judge) -> dict[str, Any]:
    found = run_model(peer, job, cache)
    if found.weights is None:
        return {"reason": found.reason}
    model = load_model(job.model)
    state = load_file(found.weights)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise RuntimeError(f"{peer}: {asdict(job)}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    gave_up = len(found.result["failures"])
    return {**judge.of(model), "seconds": found.result["seconds"], **({"gave_up": gave_up} if gave_up else {})}


def _checks(ours: dict[str, Any], rows: list[dict]) -> list[dict]:
    """Ours against the best peer of the same cell, by perplexity and by block error."""
    cell = [ours[key] for key in ("method", "bits", "group_size")]
    theirs = [row for row in rows if [row.get(key) for key in ("method", "bits", "group_size")] == cell]
    theirs = [row for row in theirs if row is not ours and "perplexity" in row]
    checks = []
    for measure in ("perplexity", "block_error"):
        if theirs:
            limit = min(row[measure] for row in theirs) * (1 + EQUAL)
            what = f"{cell[0]} w{cell[1]} g{cell[2]}: {measure} at most the best peer's"
            checks.append({"what": what, "limit": limit, "value": ours[measure], "ok": ours[measure] <= limit})
    return checks


def windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int, seed: int) -> list[Tensor]:
    """Windows of the text drawn without overlap, eight to a batch [8, length]."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = ids[: len(ids) // length * length].view(-1, length)
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count]
    return list(windows[drawn].split(8))


def trained(
    tokenizer: PreTrainedTokenizerBase, text: str, seed: int, shape: DemoConfig, epochs: int, gains: float = 0
) -> PreTrainedModel:
    """A language model of `shape`, trained from scratch on the text.

    gains   the norms' weights, the features' scales, start log-normal with this deviation, in place of 1
    """
    model = demo_model(shape, tokenizer, seed).train()
    drawn = torch.Generator().manual_seed(seed)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            weight.data.copy_(torch.randn(weight.shape, generator=drawn).mul(gains).exp())
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = ids[: len(ids) // shape.max_length * shape.max_length].view(-1, shape.max_length)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(windows) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.1)
    for _ in range(epochs):
        for batch in windows[torch.randperm(len(windows), generator=generator)].split(BATCH):
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


def told(row: dict[str, Any]) -> dict[str, Any]:
    """The row, said as soon as it is there: the whole takes its time."""
    said = (f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items())
    print(", ".join(said), file=sys.stderr, flush=True)
    return row
