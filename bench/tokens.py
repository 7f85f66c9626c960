"""One teacher-forced pass over given answers: what probability, memorisation and membership measures are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..unlearn.encode import IGNORE, Batch, Encoder
from ..unlearn.layers import device_of, forward
from .tofu import FLOOR

# Positions x vocabulary of one log-softmax in float32: 64 MiB, whatever the batch.
CHUNK = 1 << 24


@dataclass(frozen=True)
class Answer:
    """The supervised tokens of one answer, end of sequence included, each predicted from the true ones before it.

    log_p        [n] float32: log-probability of each token in nats, tofu.FLOOR at least
    greedy       [n] bool: whether it is the likeliest token (the first of them, where several are)
    mean, deviation   [n] float32: of the log-probability of a token drawn from the model there (Min-K%++)
    finite       whether the model's logits were numbers; where they are not, they count as equal ones, so that
                 a broken model knows nothing
    """

    log_p: Tensor
    greedy: Tensor
    mean: Tensor
    deviation: Tensor
    finite: bool

    @property
    def nll(self) -> float:
        """NLL/token in nats."""
        return -float(self.log_p.double().mean())

    @property
    def probability(self) -> float:
        """exp(-NLL/token)."""
        return math.exp(-self.nll)


# Opened around the pass over a batch: what serves the model otherwise than as a whole.
Around = Callable[[Batch], AbstractContextManager[object]]


def answers(
    network: nn.Module,
    encoder: Encoder,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 64,
    around: Around | None = None,
) -> list[Answer]:
    """Score each (question, answer), in the order given; without a question: each text.

    A row's result does not depend on the batch but for float32 rounding (1e-4 nats at most on models of this size).
    Raises ValueError for a pair longer than the model takes.
    """

    def logits(batch: Batch, at: Tensor) -> list[Tensor]:
        with nullcontext() if around is None else around(batch):
            return [forward(network, batch)[:, :-1][at]]

    return next(iter(several_answers(network, encoder, pairs, batch_size, logits)), [])


def several_answers(
    network: nn.Module,
    encoder: Encoder,
    pairs: Sequence[tuple[str, str]],
    batch_size: int,
    logits: Callable[[Batch, Tensor], Iterable[Tensor]],
) -> list[list[Answer]]:
    """As `answers`, in several ways at once; nothing for no pairs.

    logits   batch, at [B, T - 1] bool -> for each way logits [n, V] at the positions `at`, which predict an answer's
             tokens; one way's are there at a time
    """
    encoded = [encoder.pair(question, answer) for question, answer in pairs]
    found: list[list[Answer | None]] = []
    with torch.no_grad():
        for chosen in by_length([len(ids) for ids, _ in encoded], batch_size):
            batch = encoder.collate([encoded[i] for i in chosen], device_of(network))
            wanted = batch.labels[:, 1:]
            at = wanted != IGNORE
            lengths = at.sum(1).tolist()
            for number, z in enumerate(logits(batch, at)):
                if number == len(found):
                    found.append([None] * len(pairs))
                columns = _columns(z, wanted[at])
                rows = zip(chosen, *(column.split(lengths) for column in columns), strict=True)
                for i, log_p, greedy, mean, deviation, finite in rows:
                    found[number][i] = Answer(log_p, greedy, mean, deviation, bool(finite.all()))
    return [[answer for answer in way if answer is not None] for way in found]


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Item numbers in batches of like length, which waste the least padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _columns(logits: Tensor, tokens: Tensor) -> list[Tensor]:
    """What Answers are made of, [n] each on the CPU, from logits [n, V] and tokens [n]."""
    size = max(1, CHUNK // logits.shape[1])
    parts = [_part(z, y) for z, y in zip(logits.split(size), tokens.split(size), strict=True)]
    return [torch.cat(column).cpu() for column in zip(*parts, strict=True)]


def _part(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    log_p, finite = log_probabilities(z)
    p = log_p.exp()
    # A token without probability has no part in the mean (0 x -inf).
    known = torch.where(p > 0, log_p, torch.zeros_like(log_p))
    mean = (p * known).sum(1)
    variance = (p * (known - mean[:, None]).square()).sum(1)
    taken = log_p.gather(1, y[:, None])[:, 0].clamp(min=FLOOR)
    # Not argmax: where all logits are equal it may pick any of them.
    greedy = (z.gather(1, y[:, None])[:, 0] == z.amax(1)) & ~_ties(z, y)
    return taken, greedy & finite, mean, variance.sqrt(), finite


def log_probabilities(z: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax in float32 of logits [n, V], and which rows [n] are numbers (-inf forbids a token and is one).
    Rows that are not count as equal logits: who knows nothing finds every token equally likely."""
    z = z.float()
    # The largest logit is NaN or infinite where any is, and -inf where all are.
    finite = z.amax(1).isfinite()
    return (z if finite.all() else torch.where(finite[:, None], z, 0.0)).log_softmax(1), finite


def _ties(z: Tensor, y: Tensor) -> Tensor:
    """Whether a token before the wanted one is just as likely."""
    before = torch.arange(z.shape[1], device=z.device) < y[:, None]
    return ((z == z.amax(1, keepdim=True)) & before).any(1)
