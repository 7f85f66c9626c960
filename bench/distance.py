"""Distance to the oracle (the model that never saw the forget set): of the predictions, and of what lies before them.

Teacher-forced on given answers: both models predict each token from the true ones before it. Distances between
distributions are in nats per token, means over an answer's tokens (end of sequence included). "Activation distance" has
two meanings: the L2 distance of the softmax outputs (Golatkar et al. 2021, arXiv 2012.13431), here `output`, and that
of hidden states, here `hidden`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..unlearn.encode import IGNORE, Encoder
from ..unlearn.layers import decoder_layers, device_of, forward, unwrapped
from .tofu import mean
from .tokens import FLOOR, by_length, log_probabilities

# Positions x vocabulary at a time; some ten tensors of that size are alive, of 16 MiB each.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Distance:
    """One entry per item in every list.

    oracle_to_model   KL(oracle || model): large where the model misses what the oracle would say
    model_to_oracle   KL(model || oracle): large where the model says what the oracle would not
    js        Jensen-Shannon divergence, in 0..log 2
    output    L2 distance of the softmax outputs, in 0..sqrt 2
    hidden    by decoder layer: |h - h_oracle| / |h_oracle| of its output; None where layers do not correspond
    no_hidden         why not
    finite, oracle_finite   whether the logits were numbers. Where they are not they count as equal ones, and hidden
                      states that are not count as 0, so that a broken model is far from the oracle and not undefined
    """

    oracle_to_model: list[float]
    model_to_oracle: list[float]
    js: list[float]
    output: list[float]
    hidden: list[list[float]] | None
    no_hidden: str
    finite: bool
    oracle_finite: bool

    def by_layer(self) -> list[float] | None:
        """`hidden` of each layer, mean over items."""
        return None if self.hidden is None else [mean(layer) for layer in zip(*self.hidden, strict=True)]

    def means(self) -> dict[str, float]:
        """Means over items; of `hidden` over layers too."""
        found = {name: mean(getattr(self, name)) for name in ("oracle_to_model", "model_to_oracle", "js", "output")}
        layers = self.by_layer()
        return found if layers is None else {**found, "hidden": mean(layers)}


def distance(
    model: nn.Module, oracle: nn.Module, encoder: Encoder, pairs: Sequence[tuple[str, str]], batch_size: int = 16
) -> Distance:
    """Distance of `model` from `oracle` on each (question, answer), in the order given; without a question: the text.

    Both models share the encoder's tokenizer. Raises ValueError without pairs, or for different vocabularies.
    """
    if not pairs:
        raise ValueError("pairs: none; at least one is needed")
    layers, reason = _layers(model, oracle)
    encoded = [encoder.pair(question, answer) for question, answer in pairs]
    predictions: dict[int, Tensor] = {}
    hidden: dict[int, Tensor] = {}
    with _still(model, oracle):
        for chosen in by_length([len(ids) for ids, _ in encoded], batch_size):
            rows = [encoded[i] for i in chosen]
            # The position before a supervised token predicts it.
            at = encoder.collate(rows).labels[:, 1:] != IGNORE
            logits, states = _observed(model, layers[0], encoder, rows, at)
            oracle_logits, oracle_states = _observed(oracle, layers[1], encoder, rows, at)
            lengths = at.sum(1).tolist()
            found = _divergences(logits, oracle_logits)
            predictions.update(zip(chosen, found.split(lengths), strict=True))
            if layers[0]:
                relative = torch.stack([_relative(a, b) for a, b in zip(states, oracle_states, strict=True)], 1)
                hidden.update(zip(chosen, relative.split(lengths), strict=True))
    columns = torch.stack([predictions[i].mean(0) for i in range(len(pairs))]).T.tolist()
    forward_kl, reverse_kl, js, output, finite, oracle_finite = columns
    layered = [hidden[i].mean(0).tolist() for i in range(len(pairs))] if layers[0] else None
    # Shares of positions whose logits are numbers.
    sound, oracle_sound = min(finite) == 1, min(oracle_finite) == 1
    return Distance(forward_kl, reverse_kl, js, output, layered, reason, sound, oracle_sound)


def _layers(model: nn.Module, oracle: nn.Module) -> tuple[tuple[list[nn.Module], list[nn.Module]], str]:
    """The decoder layers of both, or none and the reason."""
    try:
        found = list(decoder_layers(model)), list(decoder_layers(oracle))
    except ValueError as error:
        return ([], []), str(error)
    configs: list[Any] = [unwrapped(model).config, unwrapped(oracle).config]
    widths = [config.get_text_config().hidden_size for config in configs]
    if len(found[0]) != len(found[1]):
        return ([], []), f"the model has {len(found[0])} decoder layers, the oracle {len(found[1])}"
    if widths[0] != widths[1]:
        return ([], []), f"the model is {widths[0]} wide, the oracle {widths[1]}"
    return found, ""


def _observed(
    network: nn.Module,
    layers: list[nn.Module],
    encoder: Encoder,
    rows: list[tuple[list[int], list[int]]],
    at: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Logits [n, V], and the hidden states [n, d] after each of `layers`, at the n positions `at` [B, T-1]."""
    batch = encoder.collate(rows, device_of(network))
    with _outputs(layers, at) as states:
        logits = forward(network, batch)[:, :-1]
    return logits[at.to(logits.device)], states


@contextmanager
def _outputs(layers: list[nn.Module], at: Tensor) -> Iterator[list[Tensor]]:
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:  # noqa: ARG001
        states = output[0] if isinstance(output, tuple) else output
        kept.append(states[:, :-1][at.to(states.device)])

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _divergences(logits: Tensor, oracle: Tensor) -> Tensor:
    """[n, 6] float64 on the CPU: the two KL, JS, L2, and whether the logits [n, V] of each were numbers."""
    if logits.shape[1] != oracle.shape[1]:
        raise ValueError(
            f"model and oracle: vocabularies of {logits.shape[1]} and {oracle.shape[1]} tokens; they must be the same"
        )
    size = max(1, _CHUNK // logits.shape[1])
    parts = [_part(z, o.to(z.device)) for z, o in zip(logits.split(size), oracle.split(size), strict=True)]
    return torch.cat(parts)


def _part(z: Tensor, o: Tensor) -> Tensor:
    (log_p, finite), (log_o, oracle_finite) = log_probabilities(z), log_probabilities(o)
    p, q = log_p.exp(), log_o.exp()
    log_mean = torch.logaddexp(log_p, log_o) - math.log(2)
    columns = [
        _kl(q, log_o, log_p.clamp(min=FLOOR)),
        _kl(p, log_p, log_o.clamp(min=FLOOR)),
        # In float64, as the float32 next to log 2 lies above it.
        ((_kl(q, log_o, log_mean) + _kl(p, log_p, log_mean)) / 2).cpu().double().clamp(max=math.log(2)),
        (p - q).norm(dim=1),
        finite,
        oracle_finite,
    ]
    return torch.stack([column.cpu().double() for column in columns], 1)


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [n]. A token that p never says has no part in it; rounding may leave it below 0."""
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(1).clamp(min=0)


def _relative(states: Tensor, oracle: Tensor) -> Tensor:
    """|h - h_oracle| / |h_oracle| [n] float64 on the CPU; where the oracle's is 0: 0 if so is the other, else 1."""
    h, o = (torch.nan_to_num(s.float(), 0.0, 0.0, 0.0) for s in (states, oracle.to(states.device)))
    gap, size = (h - o).norm(dim=1).cpu().double(), o.norm(dim=1).cpu().double()
    return torch.where(size > 0, gap / size, (gap > 0).double())


@contextmanager
def _still(*networks: nn.Module) -> Iterator[None]:
    """No gradient and no dropout inside the block."""
    before = [(network, network.training) for network in networks]
    for network in networks:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for network, training in before:
            network.train(training)
