"""What the Ascend study compresses and judges: a model with its problems, held-out text and draws of calibration data.

The model that is trained here writes solutions of chains.py; outlier channels are put in (as in w4a4.py), so that its
layers' inputs are as large language models have them. Any other causal language model comes with its own texts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from ..compress.checkpoint import load_model, load_tokenizer, max_length
from ..unlearn.data import read_rows
from ..unlearn.demo import DemoConfig
from ..unlearn.encode import IGNORE, Encoder
from ..unlearn.layers import device_of, forward
from .chains import Chain, Lesson, draw, first_wrong, trained_solver, word_tokenizer
from .generation import continuations
from .ptq_quality import windows
from .texts import texts
from .tokens import by_length
from .w4a4 import with_outliers_

# Steps of the problems that are solved, and of the chains that are calibrated on.
LENGTHS, CALIBRATED = (4, 8, 12), (4, 6, 9, 12)
PROBLEMS, SEQUENCES = 32, 32  # of each length; of calibration data
# How much larger the outlier channels are. With w4a4.py's 30 a plain 4-bit recipe leaves no step right, whatever the
# length; with 10 it shows how errors add up along a chain.
OUTLIER = 10.0
# Of other models' texts, and of what they answer, in tokens.
LENGTH, HELD_OUT, NEW = 512, 32, 512
BATCH = 8
_STEP = 4  # words


@dataclass(frozen=True)
class Problem:
    """group: what its row of the table is called; chain: its steps, where they are known."""

    question: str
    answer: str
    group: str
    chain: Chain | None = None


@dataclass(frozen=True)
class Subject:
    """held_out: token ids and labels that perplexity and KL are over; calibration: the batches of a draw's number."""

    model: PreTrainedModel
    encoder: Encoder
    held_out: Sequence[tuple[list[int], list[int]]]
    problems: Sequence[Problem]
    calibration: Callable[[int], list[Tensor]]


def own(seed: int, shape: DemoConfig, course: Sequence[Lesson], each: int = PROBLEMS) -> Subject:
    """The model that is trained here, with `each` held-out problems of each length."""
    chains = draw(LENGTHS, each * len(LENGTHS), random.Random(f"problems {seed}"))
    tokenizer = word_tokenizer()
    encoder = Encoder(tokenizer, shape.max_length)
    held_out = {problem.question for problem in chains}
    model = trained_solver(tokenizer, shape, course, seed, held_out)

    def calibration(number: int) -> list[Tensor]:
        generator = random.Random(f"calibration {seed} {number}")
        count = SEQUENCES // len(CALIBRATED)
        of_length = [draw((length,), count, generator, held_out) for length in CALIBRATED]
        whole = [encoder.batch([(a.question, a.answer) for a in alike]).input_ids for alike in of_length]
        return [part for ids in whole for part in ids.split(BATCH)]

    return Subject(
        with_outliers_(model, calibration(0), seed, OUTLIER),
        encoder,
        [encoder.pair(problem.question, problem.answer) for problem in chains],
        [Problem(a.question, a.answer, f"{len(a.steps)} steps", a) for a in chains],
        calibration,
    )


def given(model: str, data_dir: str | None, problems: str | None) -> Subject:
    """Any causal language model: perplexity on texts, and exact answers to a file of problems, if there is one."""
    network, tokenizer = load_model(model), load_tokenizer(model)
    longest = max_length(network)
    learned, held_out = texts(data_dir)
    length = min(longest, LENGTH)
    judged = torch.cat(windows(tokenizer, held_out, length, HELD_OUT, 0)).tolist()
    rows = [] if problems is None else read_rows(problems)
    return Subject(
        network,
        Encoder(tokenizer, longest),
        [(ids, ids) for ids in judged],
        [Problem(row.question, row.answer, "problems") for row in rows],
        lambda number: windows(tokenizer, learned, length, SEQUENCES, number),
    )


@torch.no_grad()
def closeness(model: PreTrainedModel, dense: PreTrainedModel, subject: Subject) -> dict[str, float]:
    """Perplexity of what is held out, and KL per token from the dense model's predictions to the compressed one's."""
    lost = nll = tokens = 0.0
    for chosen in by_length([len(ids) for ids, _ in subject.held_out], BATCH):
        batch = subject.encoder.collate([subject.held_out[i] for i in chosen], device_of(model))
        targets = batch.labels[:, 1:]
        at = targets != IGNORE
        ours, theirs = (forward(of, batch)[:, :-1][at].float().log_softmax(-1) for of in (model, dense))
        lost += float(kl_div(ours, theirs, reduction="sum", log_target=True))
        nll -= float(ours.gather(1, targets[at][:, None]).sum())
        tokens += int(at.sum())
    return {"perplexity": float(torch.tensor(nll / tokens).exp()), "kl": lost / tokens}


def solved(model: PreTrainedModel, subject: Subject) -> dict[str, Any]:
    """Share of exact answers in each group; of chains: the share with a wrong step, and the first one's mean number."""
    if not subject.problems:
        return {}
    prompts = [subject.encoder.prompt_ids(problem.question) for problem in subject.problems]
    # A chain's solution may be as long as the longest there is, and a step more.
    known = all(problem.chain for problem in subject.problems)
    most = max(len(problem.answer.split()) for problem in subject.problems) + _STEP if known else NEW
    said = continuations(model, subject.encoder, prompts, most)
    return scores(said, subject.problems)


def scores(said: Sequence[str], problems: Sequence[Problem]) -> dict[str, Any]:
    """As `solved`, of what was said."""
    row: dict[str, Any] = {}
    for group in dict.fromkeys(problem.group for problem in problems):
        exact = [final(text) == final(p.answer) for text, p in zip(said, problems, strict=True) if p.group == group]
        row[group] = sum(exact) / len(exact)
    if chains := [(text, p.chain) for text, p in zip(said, problems, strict=True) if p.chain]:
        wrong = [number for text, chain in chains if (number := first_wrong(text, chain)) is not None]
        row |= {"wrong": len(wrong) / len(chains), "at_step": sum(wrong) / len(wrong) if wrong else None}
    return row


def final(text: str) -> str | None:
    """What an answer ends in: what stands behind the last "answer:" or "####" (as GSM8K has it), else its last number;
    None where there is neither."""
    marked = re.findall(r"(?:answer:|####)\s*(\S+)", text, re.IGNORECASE)
    found = marked or re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "").rstrip(".") if found else None
