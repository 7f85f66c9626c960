"""ModelSlim's "ascendV1": what vllm-ascend loads on Huawei's NPUs with `--quantization ascend`.

A Hugging Face directory whose config.json says nothing of quantization, with quant_model_weights-0000x-of-0000y
.safetensors and an index for weights, and quant_model_description.json: every tensor's type, by name. What a type
is in tensors stands in modelslim_layer.py. Biases, norms, embeddings and the head are "FLOAT".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..checkpoint import write_config
from ..diagonal import FEEDERS, divided, divisors
from ..experts import ExpertList, has_fused_experts
from ..files import atomic_dir
from ..linear import QuantLinear
from .modelslim_layer import FLATQUANT, FLOAT, layer_tensors, type_of

DESCRIPTION = "quant_model_description.json"
STEM = "quant_model_weights"
# What the engine joins into one layer, which has one type.
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
# What the engine keeps in the model's dtype.
_CAST = {"W8A16": ("weight_scale",), "W8A8_DYNAMIC": ("weight_scale",), FLATQUANT: ("left_trans", "right_trans")}
_SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Plan:
    """How a model is going to be written; making one is what refuses a model.

    types      of every packed layer, by name
    divisors   of modules' outputs, as diagonal.py has them
    notes      where the engine computes something else than we do, or nobody has tried
    """

    types: dict[str, str]
    divisors: dict[str, Tensor]
    notes: list[str]


def plan(model: PreTrainedModel) -> Plan:
    """ValueError for what the format cannot hold: it names the layer, what it has, and what would do."""
    layers = packed(model)
    if not layers:
        raise ValueError("model: none of its layers is packed; expected one made by `remanence compress`")
    _check_modules(model)
    types = {name: type_of(name, layer) for name, layer in layers.items()}
    _check_joined(model, types)
    found = divisors(model, layers)
    return Plan(types, found, list(_notes(model, layers, types, found)))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path | str) -> Plan:
    """Write model and tokenizer to the new directory `target`.

    Raises as `plan` before anything is written; FileExistsError when there is something at `target`, OSError when the
    disk is full, and nothing is left then.
    """
    made = plan(model)
    with atomic_dir(target) as work:
        write(made, model, tokenizer, work)
    return made


def write(made: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, work: Path) -> None:
    """As `save`, into an existing empty directory that the caller makes permanent."""
    write_config(model, work, None)
    tokenizer.save_pretrained(work)
    names = _write_shards(_tensors(made, model), work)
    usual = Counter(made.types.values()).most_common(1)[0][0]
    heading = {"version": "1.0.0", "model_quant_type": usual, "group_size": 0, "metadata": {}, "optional": {}}
    # The engine asks for a tied head's type too, and some of its models stop where there is none.
    every = dict.fromkeys([*names, *(name for name, _ in model.named_parameters(remove_duplicate=False))])
    description = heading | {name: _described(name, made.types) for name in every}
    (work / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def packed(model: nn.Module) -> dict[str, QuantLinear]:
    """The layers that have a type of their own, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


def _check_modules(model: PreTrainedModel) -> None:
    """What no type stands for, packed or not."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertList):
            raise ValueError(f"{name}: is a mixture of experts; expected linear layers alone")
        if isinstance(module, Conv1D):
            raise ValueError(f"{name}: is a Conv1D; expected an nn.Linear")
        if isinstance(module, nn.Linear) and isinstance(getattr(module, "transform", None), nn.Module):
            kind = type(module.transform).__name__
            raise ValueError(f"{name}: is not quantized, and has a {kind} in front of it; expected none")
        if module is model.get_output_embeddings() and isinstance(module, QuantLinear):
            raise ValueError(f"{name}: has {module.spec.bits}-bit weights, and is the head; expected one left as it is")
    if has_fused_experts(model):
        raise ValueError("model: has a mixture of experts; expected linear layers alone")


def _check_joined(model: PreTrainedModel, types: Mapping[str, str]) -> None:
    """Layers that the engine joins have one type, and one map."""
    for parent, module in model.named_modules():
        children = dict(module.named_children())
        for names in _JOINED:
            there = [name for name in names if isinstance(children.get(name), nn.Linear | QuantLinear)]
            found = {name: types.get(f"{parent}.{name}", FLOAT) for name in there}
            if len(set(found.values())) > 1:
                listed = ", ".join(f"{name} {kind}" for name, kind in found.items())
                raise ValueError(
                    f"{parent}: has {listed}, which the engine joins into one layer; expected one type: give them the "
                    f"same width (`remanence allocate --fuse`), or leave all of them out (ignore={'|'.join(there)})"
                )
            if FLATQUANT in found.values():
                _check_one_map(parent, {name: children[name] for name in there})


def _check_one_map(parent: str, members: Mapping[str, Any]) -> None:
    (first, model), *others = members.items()
    for name, layer in others:
        left = torch.equal(layer.transform.left, model.transform.left)
        right = torch.equal(layer.transform.right, model.transform.right)
        if not (left and right and layer.activation.clip == model.activation.clip):
            raise ValueError(
                f"{parent}: {name} has another map or clip than {first}, and the engine joins them into one layer; "
                f"expected equal ones"
            )


def _notes(
    model: PreTrainedModel, layers: Mapping[str, QuantLinear], types: Mapping[str, str], found: Mapping[str, Tensor]
) -> Iterator[str]:
    wide = [name for name, layer in layers.items() if layer.activation and not layer.activation.narrow]
    if wide:
        yield (
            f"{len(wide)} layers were made for inputs with the largest |x| at half the range (127.5, 7.5); the engine "
            f"has it at 127 or 7, so its outputs differ a little: a_narrow=true makes a model for that grid"
        )
    # The engine has no float32; of a model in it vLLM makes bfloat16 where it can.
    dtype = model.dtype if model.dtype == torch.float16 else torch.bfloat16
    cast = [name for name, layer in layers.items() if not _survives(layer, types[name], found.get(name), dtype)]
    if cast:
        yield f"{len(cast)} layers have scales or maps that the engine rounds to its dtype for this model, {dtype}"
    negative = sum(bool((layer.scale < 0).any()) for layer in layers.values())
    if negative:
        yield f"{negative} layers have negative scales (the largest |w| has the code -2^(bits-1)); not tried on an NPU"
    if found:
        yield f"the diagonals of FlatQuant's maps went into {len(found)} norms and layers in front, in their own dtypes"
    if FLATQUANT in types.values():
        yield "FlatQuant's maps are for whole inputs: the engine computes other sizes where it splits them over NPUs"
    if model.config.model_type not in FEEDERS:
        yield f"{model.config.model_type}: layers' names in the engine were not looked up; known: {', '.join(FEEDERS)}"


def _survives(layer: QuantLinear, kind: str, by: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether what the engine keeps in the model's dtype is the same there."""
    parts = layer_tensors(layer, kind, by) if kind in _CAST else {}
    return all(torch.equal(parts[name].to(dtype).float(), parts[name]) for name in _CAST.get(kind, ()))


def _tensors(made: Plan, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the files under their names, one after another; a tied one once, under its first name."""
    seen: set[int] = set()
    inside = tuple(f"{name}." for name in made.types)
    for name, module in model.named_modules():
        by = made.divisors.get(name)
        if isinstance(module, QuantLinear):
            parts = layer_tensors(module, made.types[name], by).items()
            yield from ((f"{name}.{part}", tensor) for part, tensor in parts)
        elif not name.startswith(inside):
            for part, tensor in _own(module).items():
                if tensor.data_ptr() not in seen:
                    seen.add(tensor.data_ptr())
                    yield f"{name}.{part}".lstrip("."), tensor if by is None else divided(tensor, by)


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers that are the module's and not its parts'."""
    lasting = {
        name: tensor
        for name, tensor in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return {name: tensor.detach() for name, tensor in (dict(module.named_parameters(recurse=False)) | lasting).items()}


def _described(name: str, types: Mapping[str, str]) -> str:
    layer, _, part = name.rpartition(".")
    return FLOAT if part == "bias" else types.get(layer, FLOAT)


def _write_shards(tensors: Iterable[tuple[str, Tensor]], work: Path) -> list[str]:
    """Names of all tensors, which are in files of at most _SHARD_BYTES, but for one that is larger alone."""
    shards: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}

    def flush() -> None:
        shards.append({name: tensor.nbytes for name, tensor in held.items()})
        save_file(held, work / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        if held and sum(part.nbytes for part in held.values()) + tensor.nbytes > _SHARD_BYTES:
            flush()
        held[name] = tensor.detach().cpu().contiguous()
    flush()
    return _number(shards, work)


def _number(shards: list[dict[str, int]], work: Path) -> list[str]:
    """Give the files their names, which say how many there are, and write the index."""
    found: dict[str, str] = {}
    for i, sizes in enumerate(shards, 1):
        file = f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors"
        (work / f"{i}.safetensors").rename(work / file)
        found |= dict.fromkeys(sizes, file)
    size = sum(sum(sizes.values()) for sizes in shards)
    index = {"metadata": {"total_size": size}, "weight_map": found}
    (work / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return list(found)
