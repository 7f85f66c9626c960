"""`remanence unlearn`: from model, method and rows to an ordinary checkpoint with its record.

Log and checkpoints of the run lie in OUT.run until the model is written, so that a run that was killed can be resumed
and OUT is whole or absent.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import UsageError
from .store import digest, directory_digest
from .unlearn.catalog import METHODS, MethodConfig, needs_retain, settings, telling
from .unlearn.data import QA, own_corpus, read_rows
from .unlearn.muse import muse_corpus
from .unlearn.refusals import REFUSALS, read_refusals
from .unlearn.tofu import tofu_corpus


def listing() -> dict[str, dict[str, Any]]:
    """Every method: paper, kind, needs, and the settings that are its own."""
    return {
        name: {
            "title": method.title,
            "paper": method.paper,
            "kind": method.kind,
            "needs": list(method.needs),
            "settings": telling(name, settings(name)),
        }
        for name, method in METHODS.items()
    }


@dataclass(frozen=True)
class Order:
    """What is to be forgotten, from what, and how. Raises ValueError for what cannot be.

    asked      settings on top of the method's own
    subjects   names that `icu` tells the model not to know; none: the persons that the forget rows name
    save_every updates between checkpoints; None: a quarter of the run, 0: none
    """

    model: str
    method: str
    forget: str
    retain: str | None = None
    data: str | None = None
    data_dir: str | None = None
    idk: Path | None = None
    subjects: tuple[str, ...] = ()
    asked: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    parallel: str = "ddp"
    processes: int | None = None
    save_every: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        _ = self.settings
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"device: {self.device!r} is not one of auto, cpu")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel: {self.parallel!r} is not one of ddp, fsdp")
        if self.subjects and self.method != "icu":
            raise ValueError(f"subject: {self.method} is given no names; icu is")
        if self.save_every is not None and self.save_every < 0:
            raise ValueError(f"save-every: {self.save_every} is below 0")

    @property
    def settings(self) -> MethodConfig:
        return settings(self.method, **self.asked)

    def rows(self) -> tuple[tuple[QA, ...], tuple[QA, ...]]:
        """Forget and retain rows; without torch, so that what is wrong with them is said at once."""
        if self.data == "tofu":
            corpus = tofu_corpus(self.data_dir, self.forget)
        elif self.data in ("muse-news", "muse-books"):
            corpus = muse_corpus(self.data, self.data_dir, self.forget)
        elif self.data_dir:
            raise ValueError(f"data-dir: goes with --data tofu, muse-news or muse-books, not with --data {self.data}")
        elif self.data is None and self.retain is None and not needs_retain(self.method, self.settings):
            return tuple(read_rows(self.forget)), ()
        else:
            corpus = own_corpus(self.forget, self.retain, self.data)
        return corpus.forget, corpus.retain


def forget_to(order: Order, out: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Carry out `order` and write the directory `out`; returns the record, None in all processes but the first.

    Raises Diverged when a guard stops the run: its last good checkpoint is then in OUT.run.
    """
    try:
        forget, retain = order.rows()
        refusals = read_refusals(order.idk) if order.idk else REFUSALS
    except ValueError as error:
        raise UsageError(str(error)) from None
    config = order.settings
    say("loading torch and transformers ...")
    import torch

    from .compress.checkpoint import load_model, load_nf4, load_tokenizer, max_length, skeleton
    from .compress.files import atomic_dir
    from .machine import environment
    from .progress import run_with_bar
    from .unlearn.encode import Encoder
    from .unlearn.keeper import LOG, Saving
    from .unlearn.methods import Setup, unlearn
    from .unlearn.train import Diverged
    from .unlearn.workers import Workers

    tokenizer = load_tokenizer(order.model)
    wide = skeleton(order.model).config.dtype in (None, torch.float32)
    half = config.precision == "bf16" or (config.precision == "auto" and not wide)
    workers = Workers(order.parallel, order.device, half, order.processes)  # type: ignore[arg-type]
    model = load_nf4(order.model, workers.device) if config.quantized_base else load_model(order.model)
    work = out.with_name(f"{out.name}.run")
    every = max(1, config.steps // 4) if order.save_every is None else order.save_every
    data = {name: digest([asdict(row) for row in rows]) for name, rows in (("forget", forget), ("retain", retain))}
    if "idk" in METHODS[order.method].needs:
        data["idk"] = digest(list(refusals))
    identity = {
        "method": order.method,
        "settings": asdict(config),
        "seed": order.seed,
        "model": directory_digest(Path(order.model)) if Path(order.model).is_dir() else order.model,
        "data": data,
    }
    if workers.first:
        say(f"{order.method}: {METHODS[order.method].title}; {_spelled(telling(order.method, config))}")
        say(f"processes: {workers.world} ({order.parallel}), device: {workers.device}, checkpoints: {work}")
    guard = {"subjects": order.subjects} if order.subjects else {}
    setup = Setup(
        workers,
        Saving(work, every, identity, order.resume),
        refusals,
        guard=guard,
        dense=lambda: load_model(order.model),
    )
    encoder = Encoder(tokenizer, max_length(model))
    try:
        result = run_with_bar(
            f"unlearn {order.method}",
            lambda progress: unlearn(model, encoder, forget, retain, order.method, config, order.seed, progress, setup),
            silent=not workers.first,
        )
    except Diverged as error:
        kept = sorted(work.glob("step-*"))
        last = f"last good checkpoint: {kept[-1]}" if kept else "no checkpoint had been written"
        raise Diverged(f"{error}; {last}") from None
    if workers.first:
        result.record |= {"model": order.model, "data": data, "rows": {"forget": len(forget), "retain": len(retain)}}
        result.record["versions"] = environment()
        with atomic_dir(out) as directory:
            result.save(directory, tokenizer)
            (directory / LOG).write_bytes((work / LOG).read_bytes() if (work / LOG).exists() else b"")
        shutil.rmtree(work, ignore_errors=True)
    workers.close()
    return {key: result.record[key] for key in _TOLD} if workers.first else None


# Of the record, what a person is told at the end.
_TOLD = ("method", "steps_done", "before", "after", "seconds")


def _spelled(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "default settings"
