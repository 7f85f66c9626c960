"""Early-exit tuning: a model learns to say the next token at several of its layers, by its own final norm and head.

    L = sum over exits e of w_e CE(head(norm(h_e))) + w_L CE(head(norm(h_L)))

One head for all exits, as GREEN-CODE has it (arXiv 2501.11006, section III) and CALM (arXiv 2207.07061, section 3.4);
they differ in the weights. Without this an exit before the last tenth of the layers says next to nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..compress.block import first
from ..compress.early_exit.anatomy import Anatomy, anatomy
from ..compress.linear import QuantLinear
from .adapters import merged, with_lora
from .data import QA
from .encode import IGNORE, Batch, Encoder
from .feed import Feed
from .layers import device_of
from .train import Objective, Progress, Schedule, Term, fit

WEIGHTS = ("geometric", "calm", "uniform", "plain")


@dataclass(frozen=True)
class ExitTuning:
    """exits       depths below the whole model's at which it is to learn to answer, ascending
    weights        "geometric", GREEN-CODE's; "calm"; "uniform"; "plain": the last layer's loss alone, a control that
                   tells what the exits cost from what more training does
    steps          updates; the learning rate falls linearly to zero after a twentieth of them
    learning_rate  the paper's for 3B parameters; adapters and small models bear ten to a hundred times more
    batch_size     rows of an update; micro_batch: rows of a pass (None: all)
    lora_rank      0: every parameter trains. Above: LoRA on every linear layer but the head, merged at the end; norms,
                   head and embeddings stay as they were
    length         running text is cut into pieces of at most so many tokens (the paper's)
    held_out       share of the rows on which the model is judged before and after, and which it is not trained on
    ratio, shallow, deep   of "geometric", see exit_weights
    """

    exits: tuple[int, ...]
    weights: str = "geometric"
    steps: int = 500
    learning_rate: float = 1e-5
    batch_size: int = 16
    micro_batch: int | None = None
    lora_rank: int = 0
    length: int = 256
    held_out: float = 0.1
    ratio: float = 0.9
    shallow: float = 0.7
    deep: float = 0.2

    def __post_init__(self) -> None:
        _check_exits(self.exits)
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights: {self.weights!r} is not one of {', '.join(WEIGHTS)}")
        whole: dict[str, Any] = {"steps": (self.steps, 1), "batch_size": (self.batch_size, 1)}
        whole |= {"lora_rank": (self.lora_rank, 0), "length": (self.length, 2)}
        whole |= {} if self.micro_batch is None else {"micro_batch": (self.micro_batch, 1)}
        for name, (value, least) in whole.items():
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: {value!r}: expected a whole number of at least {least}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate: {self.learning_rate}: expected a number between 0 and 1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: {self.held_out}: expected a share between 0 and 1")
        _check_geometric(self.ratio, self.shallow, self.deep)


@dataclass(frozen=True)
class ExitReport:
    """depths       the exits, then the whole model's
    weights         of the loss at each
    before, after   nats per token at each depth, on the rows held out
    tokens          that were held out
    history         what every update saw (`unlearn.train.fit`)
    """

    depths: tuple[int, ...]
    weights: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    tokens: int
    history: tuple[dict[str, float], ...]
    seconds: float

    @property
    def full_depth(self) -> tuple[float, float]:
        """Nats per token of the whole model, before and after: what tuning cost it, or gave."""
        return self.before[-1], self.after[-1]


def exit_weights(
    kind: str,
    exits: Sequence[int],
    layers: int,
    ratio: float = 0.9,
    shallow: float = 0.7,
    deep: float = 0.2,
) -> tuple[float, ...]:
    """One weight for each exit, then the whole model's; they add up to 1.

    geometric   GREEN-CODE's: exits up to half of the layers share `shallow`, those above share `deep`, in either group
                each weighs `ratio` times the one before it, and the whole model has the rest. A half without exits
                leaves its weight to the other's: the whole model's share does not depend on where the exits are
    calm        proportional to the depth, the whole model's included: deeper weighs more
    uniform     1 / (exits + 1)
    plain       0, and 1 for the whole model
    Raises ValueError naming `weights`, `exits`, `ratio`, `shallow` or `deep`.
    """
    _check_exits(exits)
    if exits[-1] >= layers:
        raise ValueError(f"exits: {exits[-1]} is not below {layers}, the model's layers")
    if kind == "geometric":
        _check_geometric(ratio, shallow, deep)
        halves = [[e for e in exits if 2 * e <= layers], [e for e in exits if 2 * e > layers]]
        shares = [shallow, deep] if all(halves) else [shallow + deep] * 2
        grouped = [_falling(len(half), share, ratio) for half, share in zip(halves, shares, strict=True)]
        return (*grouped[0], *grouped[1], 1 - (shallow + deep))
    count = len(exits) + 1
    if kind == "calm":
        return tuple(depth / (sum(exits) + layers) for depth in (*exits, layers))
    if kind == "uniform":
        return (1 / count,) * count
    if kind == "plain":
        return (*[0.0] * (count - 1), 1.0)
    raise ValueError(f"weights: {kind!r} is not one of {', '.join(WEIGHTS)}")


def _falling(count: int, share: float, ratio: float) -> list[float]:
    terms = [ratio**i for i in range(count)]
    return [share * term / sum(terms) for term in terms]


def _check_exits(exits: Sequence[int]) -> None:
    if not exits:
        raise ValueError("exits: none; at least one is needed")
    if list(exits) != sorted(set(exits)) or not all(type(e) is int and e > 0 for e in exits):
        raise ValueError(f"exits: {list(exits)}: expected depths from 1, ascending")


def _check_geometric(ratio: float, shallow: float, deep: float) -> None:
    if not ratio > 0:
        raise ValueError(f"ratio: {ratio}: expected a number above 0")
    for name, value in (("shallow", shallow), ("deep", deep)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: {value}: expected a share between 0 and 1")
    if shallow + deep > 1:
        raise ValueError(f"shallow: {shallow} and deep: {deep} are more than 1 together")


def tune_(
    model: PreTrainedModel,
    encoder: Encoder,
    pairs: Sequence[tuple[str, str]],
    tuning: ExitTuning,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExitReport:
    """Train `model` in place to answer at its exits, too.

    pairs   (question, answer), of which the answer is supervised, or ("", running text), of which all is, as in the
            paper. The share held out is drawn by the seed
    Raises ValueError for a model that cannot leave early, is not float32 or float64 (steps this small are lost in 16
    bits), or is quantized; for exits that it does not have; for fewer than two rows. Diverged as `fit`. Whatever is
    raised, the model is whole: with adapters its weights are as before, else as far as they were trained.
    """
    body = anatomy(model)
    weights = exit_weights(tuning.weights, tuning.exits, body.depth, tuning.ratio, tuning.shallow, tuning.deep)
    _check_trainable(model)
    depths = (*tuning.exits, body.depth)
    learned, judged = _split(encoder, pairs, tuning, seed)
    before, tokens = exit_losses(model, encoder, judged, depths)
    feed = Feed(encoder, {"text": learned}, {"text": min(tuning.batch_size, len(learned))}, seed)
    schedule = Schedule(tuning.steps, tuning.learning_rate, warmup=tuning.steps // 20, weight_decay=0.01)
    torch.manual_seed(seed)  # of which adapters are drawn
    with _training(model, tuning.lora_rank) as network:

        def loss(given: Mapping[str, Batch]) -> Tensor:
            return weighted_loss(network, body, given["text"], depths, weights)

        begin = time.perf_counter()
        history = fit(
            network,
            Objective([Term("exits", loss, "text", "tokens")]),
            feed,
            schedule,
            seed=seed,
            micro_batch=tuning.micro_batch,
            progress=progress,
        )
        seconds = time.perf_counter() - begin
    after, _ = exit_losses(model, encoder, judged, depths)
    return ExitReport(depths, weights, before, after, tokens, tuple(history), seconds)


@contextmanager
def _training(model: PreTrainedModel, lora_rank: int) -> Iterator[nn.Module]:
    """Inside the block what trains: the model, or one with adapters. They are merged at the end, and taken out unmerged
    where the block raised; either way names, what requires gradients, and the mode (eval) are as before."""
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    adapted: Any = with_lora(model, lora_rank, 2 * lora_rank) if lora_rank else None
    if adapted is None:
        model.requires_grad_(True)
    done = False
    try:
        yield adapted or model
        done = True
    finally:
        if adapted is not None:
            if done:
                merged(adapted)
            else:
                adapted.unload()
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(trains[name])


def _check_trainable(model: PreTrainedModel) -> None:
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError("model: is quantized; tune it first, and compress what was tuned")
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"model: is {model.dtype}, in which steps this small are lost; load it in float32")


def _split(
    encoder: Encoder, pairs: Sequence[tuple[str, str]], tuning: ExitTuning, seed: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(to learn from, held out); running text in pieces."""
    rows = encoder.windows([QA(question, answer) for question, answer in pairs], tuning.length)
    if len(rows) < 2:
        raise ValueError(f"pairs: {len(rows)} row; one to learn from and one to hold out are needed")
    whole = [(row.question, row.answer) for row in rows]
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(whole) - 1, max(1, round(tuning.held_out * len(whole))))
    return [whole[i] for i in sorted(order[count:])], [whole[i] for i in sorted(order[:count])]


def weighted_loss(
    network: nn.Module, body: Anatomy, batch: Batch, depths: Sequence[int], weights: Sequence[float]
) -> Tensor:
    """sum w_e CE_e, each a mean over the batch's supervised tokens; a scalar that has a gradient. Logits [n, V] of one
    depth are there at a time, also on the way back, where the head is run again."""
    wanted = [(depth, weight) for depth, weight in zip(depths, weights, strict=True) if weight]
    total: Any = 0.0
    with _states(body, [depth for depth, _ in wanted]) as states:
        _run(network, batch)
        targets = _targets(batch)
        for depth, weight in wanted:
            state = _predicting(states[depth], batch)
            total = total + weight * checkpoint(_nll, body.logits, state, targets, "mean", use_reentrant=False)
    return total


@torch.no_grad()
def exit_losses(
    model: PreTrainedModel,
    encoder: Encoder,
    pairs: Sequence[tuple[str, str]],
    depths: Sequence[int],
    batch_size: int = 16,
) -> tuple[tuple[float, ...], int]:
    """Nats per supervised token at each depth (layers run, from 1), and the number of those tokens. Every position is
    read at full depth: it is each exit's own loss, not that of a text generated through it."""
    body = anatomy(model)
    sums, tokens = [0.0] * len(depths), 0
    for start in range(0, len(pairs), batch_size):
        batch = encoder.batch(pairs[start : start + batch_size], device_of(model))
        targets = _targets(batch)
        with _states(body, depths) as states:
            _run(model, batch)
            for i, depth in enumerate(depths):
                sums[i] += float(_nll(body.logits, _predicting(states[depth], batch), targets, "sum"))
        tokens += len(targets)
    return tuple(value / tokens for value in sums), tokens


def _run(network: nn.Module, batch: Batch) -> None:
    # The states are what is wanted: the head sees one position.
    network(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)


@contextmanager
def _states(body: Anatomy, depths: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside the block a pass leaves the states [B, T, d] behind each depth."""
    kept: dict[int, Tensor] = {}

    def keep(depth: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:  # noqa: ARG001
            kept[depth] = first(output)

        return hook

    handles = [body.layers[depth - 1].register_forward_hook(keep(depth)) for depth in depths]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _predicting(state: Tensor, batch: Batch) -> Tensor:
    """[B, T, d] -> [n, d]: of the positions that predict a supervised token."""
    return state[:, :-1][batch.labels[:, 1:] != IGNORE]


def _targets(batch: Batch) -> Tensor:
    shifted = batch.labels[:, 1:]
    return shifted[shifted != IGNORE]


def _nll(logits: Callable[[Tensor], Tensor], state: Tensor, targets: Tensor, reduction: str) -> Tensor:
    z = logits(state)
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    if reduction == "sum":
        return cross_entropy(z, targets, reduction="none").double().sum()
    return cross_entropy(z, targets)
