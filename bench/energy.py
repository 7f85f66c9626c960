"""Joules per token: of any work that makes tokens, and of a language model's prompt and output apart.

A request is measured whole, and a request for one token, which is the pass over the prompt, beside it in the same
round; the difference is what the further tokens took.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..backends.device import Device
from ..backends.energy.meter import LENGTHS, Lengths, Measured, Work, measure
from ..backends.energy.probe import ESTIMATE, Found, Probe
from ..backends.energy.probes import no_counter, probes
from .joules import Cost, cost

CONSTANT = (
    "estimated-tdp is processor time x a constant: it tells nothing that the time does not, and cannot be compared "
    "with what is measured"
)
# A counter's steps of 0.1 s at both ends are 4% of it.
COARSE_S = 5.0


@dataclass(frozen=True)
class Shape:
    """Of a request: sequences in a batch, tokens of the prompt, tokens of the answer."""

    batch: int = 1
    prompt: int = 128
    new: int = 64

    def __post_init__(self) -> None:
        for name, least in {"batch": 1, "prompt": 1, "new": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is below {least}")


SHAPE = Shape()


def token_energy(work: Work, device: Device, **options: Any) -> Cost:
    """What one token takes, of `work`, which does a good second of work or less and returns how many tokens it made.

    options   as `token_energies` has them
    """
    return token_energies({"work": work}, device, **options)["work"]


def token_energies(
    works: Mapping[str, Work], device: Device, found: Found | None = None, lengths: Lengths = LENGTHS
) -> dict[str, Cost]:
    """The same for several, in windows that take turns, so that they can be compared.

    found   the probes; None: those that measure `device`
    """
    measured = measure(device, works, probes(device) if found is None else found, lengths)
    return {name: cost(measured, {name: 1}, units(measured, name)) for name in works}


def generation_energy(
    model: PreTrainedModel,
    device: Device,
    shape: Shape = SHAPE,
    found: Found | None = None,
    lengths: Lengths = LENGTHS,
    seed: int = 0,
) -> dict[str, Any]:
    """JSON values: what a prompt's token, an answer's token and a request take of `model`, which is on `device`.

    Prompts are random tokens, decoding is greedy with a KV cache, and no answer ends early.
    """
    ids = _prompt(model, shape, seed)
    works = {"prompt": lambda: generate(model, ids, 1), "request": lambda: generate(model, ids, shape.new)}
    measured = measure(device, works, probes(device) if found is None else found, lengths)
    tokens = {"prompt_token": shape.prompt, "output_token": shape.new - 1, "request": 1}
    calls = {"prompt_token": {"prompt": 1}, "output_token": {"request": 1, "prompt": -1}, "request": {"request": 1}}
    costs = {
        name: cost(measured, calls[name], [shape.batch * count] * lengths.windows) for name, count in tokens.items()
    }
    return {
        **asdict(shape),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
        "kv_cache": True,
        "device": {"device": device.name, **device.info()},
        "threads": torch.get_num_threads(),
        "tokens_per_s": {name: _rate(costs[f"{name}_token"]) for name in ("prompt", "output")},
        **{name: asdict(each) for name, each in costs.items()},
        **document(measured),
    }


def _rate(each: Cost) -> float | None:
    return 1 / each.seconds.mean if each.seconds.mean > 0 else None


def document(measured: Measured) -> dict[str, Any]:
    """How it was measured, as JSON values."""
    found = measured.found
    estimated = any(probe.method == ESTIMATE for probe in found.probes)
    notes = [] if measured.summed and not estimated else [no_counter(found)]
    if measured.summed and not estimated and measured.lengths.window_s < COARSE_S:
        notes.append(f"windows below {COARSE_S:g} s: the steps of a counter weigh, figures are coarse")
    notes += measured.silences() + ([CONSTANT] if estimated else [])
    return {
        "probes": [_told(measured, probe) for probe in found.probes],
        "missing": [asdict(each) for each in found.missing],
        "lengths": asdict(measured.lengths),
        "windows": {
            name: [{"seconds": w.seconds, "calls": w.calls, "joules": w.joules} for w in windows]
            for name, windows in measured.windows.items()
        },
        "notes": notes,
    }


def _told(measured: Measured, probe: Probe) -> dict[str, Any]:
    return {
        "name": probe.name,
        "scope": probe.scope,
        "method": probe.method,
        "resolution_s": probe.resolution_s,
        "idle_watts": measured.idle_watts(probe.name),
        "before": measured.before[probe.name],
        "after": measured.after[probe.name],
    }


def units(measured: Measured, name: str) -> list[float]:
    """Of each window, for one call."""
    units = [window.units / window.calls for window in measured.windows[name]]
    if not all(units):
        raise ValueError(f"energy: {name}: a window made no token")
    return units


def _prompt(model: PreTrainedModel, shape: Shape, seed: int) -> torch.Tensor:
    """[batch, prompt] random tokens; ValueError where model has no place for them and the answer."""
    config = model.config.get_text_config()
    places = getattr(config, "max_position_embeddings", None)
    if places is not None and shape.prompt + shape.new > places:
        raise ValueError(f"prompt + new: {shape.prompt} + {shape.new} tokens, the model has places for {places}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (shape.batch, shape.prompt), generator=generator)
    return ids.to(model.device)


def generate(model: PreTrainedModel, ids: torch.Tensor, new: int) -> int:
    """Tokens made: exactly `new` after each row of ids [batch, prompt]."""
    network: Any = model  # transformers types generate as what may be a tensor
    with torch.no_grad():
        out = network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=model.config.get_text_config().pad_token_id or 0,
        )
    made = out[:, ids.shape[1] :].numel()
    assert made == ids.shape[0] * new, "an answer ended early"
    return made
