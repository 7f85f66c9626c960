"""Reasoning problems of many steps, each of which needs the one before, and a small model that learns to solve them.

A problem is a number modulo 7 and named operations on it, "start 3 a +5 b *2"; its solution restates each operation
with what has come of it, "a +5 = 1 b *2 = 2 answer: 2". Every operation can be undone (7 is prime, nothing is times 0):
a wrong step leaves the answer wrong, unless a later mistake happens to make up for it.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..unlearn.demo import DemoConfig, demo_model
from ..unlearn.encode import PROMPT, Encoder

MODULUS = 7
OPERATIONS = (*(f"+{n}" for n in range(1, MODULUS)), *(f"*{n}" for n in range(2, MODULUS)))
NAMES = "abcdefghijklmnopqrst"
# Input features that divide into the study's groups of 128.
SHAPE = DemoConfig(hidden_size=128, intermediate_size=256, layers=2, heads=4, kv_heads=2, max_length=128)


@dataclass(frozen=True)
class Chain:
    """One problem, its steps ("a +5 = 1") and what comes out."""

    question: str
    steps: tuple[str, ...]
    final: str

    @property
    def answer(self) -> str:
        return " ".join((*self.steps, "answer:", self.final))


@dataclass(frozen=True)
class Lesson:
    """Updates of training, each on `batch` new chains of these lengths."""

    lengths: Sequence[int]
    steps: int
    batch: int
    learning_rate: float = 3e-3


# Short chains teach where the next operation stands in the question, which long ones alone teach ten times as slowly.
COURSE = (Lesson(range(3, 6), 400, 32), Lesson(range(3, 13), 500, 32))


def chain(start: int, operations: Sequence[str]) -> Chain:
    """The problem of these operations, solved."""
    state, steps = start, []
    for name, operation in zip(NAMES, operations, strict=False):
        number = int(operation[1:])
        state = (state + number if operation[0] == "+" else state * number) % MODULUS
        steps.append(f"{name} {operation} = {state}")
    given = " ".join(f"{name} {operation}" for name, operation in zip(NAMES, operations, strict=False))
    return Chain(f"start {start} {given}", tuple(steps), str(state))


def draw(lengths: Sequence[int], count: int, generator: random.Random, without: Collection[str] = ()) -> list[Chain]:
    """So many different problems, as many of each length, none of which has its question in `without`.

    Raises ValueError for a length that there are no names for.
    """
    if not lengths or not 1 <= min(lengths) <= max(lengths) <= len(NAMES):
        raise ValueError(f"lengths: {list(lengths)}; expected some from 1 to {len(NAMES)}")
    found: dict[str, Chain] = {}
    while len(found) < count:
        operations = generator.choices(OPERATIONS, k=lengths[len(found) % len(lengths)])
        new = chain(generator.randrange(MODULUS), operations)
        if new.question not in without:
            found.setdefault(new.question, new)
    return list(found.values())


def first_wrong(said: str, problem: Chain) -> int | None:
    """The first step, from 1, that is not as in the solution; None: all are there and right."""
    words, at = said.split(), 0
    for number, step in enumerate(problem.steps, 1):
        expected = step.split()
        if words[at : at + len(expected)] != expected:
            return number
        at += len(expected)
    return None


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every word of a problem."""
    special = ["<pad>", "</s>"]
    fixed = PROMPT.format(question="start").split()
    words = [*special, *fixed, "=", "answer:", *NAMES, *OPERATIONS, *map(str, range(MODULUS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1])


def trained_solver(
    tokenizer: PreTrainedTokenizerFast, shape: DemoConfig, course: Sequence[Lesson], seed: int, without: Collection[str]
) -> PreTrainedModel:
    """A model of `shape`, trained from scratch to write solutions of chains whose question is not in `without`."""
    model = demo_model(shape, tokenizer, seed).train()
    encoder = Encoder(tokenizer, shape.max_length)
    generator = random.Random(f"training {seed}")
    for lesson in course:
        optimizer = torch.optim.AdamW(model.parameters(), lesson.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lesson.learning_rate, total_steps=lesson.steps + 1)
        for _ in range(lesson.steps):
            # Chains of one length need no padding.
            chains = draw((generator.choice(lesson.lengths),), lesson.batch, generator, without)
            batch = encoder.batch([(each.question, each.answer) for each in chains])
            model(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()
