"""A policy beside a model: early_exit.json says what it is, exit_policy.safetensors holds its weights.

The model's own files stay as they are: an engine that knows nothing of exits loads and runs the whole model.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..block import decoder_list
from ..files import read_json, write_json
from .generation import Sync
from .policy import POLICIES, Agent, Policy

SETTINGS, WEIGHTS = "early_exit.json", "exit_policy.safetensors"
SCHEMA = "remanence.early_exit/1"
_KEYS = {"schema", "policy", "settings", "sync", "layers", "hidden_size", "trained"}


def save_policy(
    policy: Policy, model: PreTrainedModel, directory: Path, sync: Sync = "row", trained: dict[str, Any] | None = None
) -> None:
    """Write both files into an existing directory, that of `model`'s own.

    trained   on what and how, for whoever reads it (JSON)
    Raises ValueError for a policy that does not fit the model.
    """
    layers, hidden = len(decoder_list(model)[2]), model.config.hidden_size
    policy.check_fits(layers, hidden)
    head = {"schema": SCHEMA, "policy": policy.name, "settings": policy.settings()}
    of = {"layers": layers, "hidden_size": hidden}
    save_file({name: t.detach().cpu().contiguous() for name, t in policy.tensors().items()}, directory / WEIGHTS)
    write_json(directory / SETTINGS, {**head, "sync": sync, **of, "trained": trained or {}})


def load_policy(directory: Path | str, model: PreTrainedModel) -> tuple[Policy, Sync]:
    """The policy that lies in a model's directory. Raises FileNotFoundError or ValueError naming the file and the field
    where it is missing, damaged, or of another model."""
    file, weights = Path(directory) / SETTINGS, Path(directory) / WEIGHTS
    found = read_json(file)
    if unknown := sorted(found.keys() ^ _KEYS):
        raise ValueError(f"{file}: {unknown[0]}: {'missing' if unknown[0] in _KEYS else 'unknown'}")
    if found["schema"] != SCHEMA:
        raise ValueError(f"{file}: schema: {found['schema']!r} is not {SCHEMA}")
    if not isinstance(found["policy"], str) or found["policy"] not in POLICIES:
        raise ValueError(f"{file}: policy: {found['policy']!r} is not one of {', '.join(POLICIES)}")
    if found["sync"] not in get_args(Sync):
        raise ValueError(f"{file}: sync: {found['sync']!r} is not one of {', '.join(get_args(Sync))}")
    shape = {"layers": len(decoder_list(model)[2]), "hidden_size": model.config.hidden_size}
    for name, value in shape.items():
        if found[name] != value:
            raise ValueError(f"{file}: {name}: {found[name]!r}; this model has {value}")
    policy = _made(POLICIES[found["policy"]], found["settings"], _tensors(weights), file)
    policy.check_fits(shape["layers"], shape["hidden_size"])
    return policy, found["sync"]


def _tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {SETTINGS} needs it")
    try:
        found = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
    for name, tensor in found.items():
        if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise ValueError(f"{file}: {name}: expected finite float32 numbers")
    return found


def _made(kind: type[Policy], settings: object, tensors: dict[str, Tensor], file: Path) -> Policy:
    known = {f.name for f in fields(kind)} - set(kind.weights)
    if not isinstance(settings, dict) or settings.keys() != known:
        raise ValueError(f"{file}: settings: expected {', '.join(sorted(known))}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    weights = _layers(tensors, file) if kind is Agent else tensors
    if weights.keys() != set(kind.weights):
        raise ValueError(
            f"{file.parent / WEIGHTS}: {', '.join(sorted(weights)) or 'nothing'}; expected "
            f"{', '.join(kind.weights) or 'nothing'} for the policy {kind.name}"
        )
    try:
        return kind(**values, **weights)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: settings: {error}") from None


def _layers(tensors: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """An agent's layers by number."""
    count = len(tensors) // 2
    wanted = {f"layers.{i}.{kind}" for i in range(count) for kind in ("weight", "bias")}
    if not tensors or tensors.keys() != wanted:
        strange = sorted(tensors.keys() ^ wanted)
        raise ValueError(
            f"{file.parent / WEIGHTS}: {strange[0] if strange else 'no layers'}: expected layers.N.weight "
            "and layers.N.bias from 0 on"
        )
    return {"layers": tuple((tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"]) for i in range(count))}


def is_stored(directory: Path | str) -> bool:
    """Whether a model's directory has a policy."""
    return (Path(directory) / SETTINGS).is_file()
