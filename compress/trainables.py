"""What of a pruned model trains: parameters by group, adapters on pruned layers, zeros that stay.

Groups are PERP's (arXiv 2312.15230, section 3), found by structure. A parameter of a 16-bit model trains as a float32
master of it, which is rounded after every step; one that does not train costs neither a gradient nor a state.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .block import Linear
from .masked_adapters import Adapter, new_adapter
from .rtn import finite
from .spec import ADAPTERS, Retrain
from .walk import within

Layers = Mapping[str, tuple[Linear, Tensor]]


def grouped(model: PreTrainedModel, groups: Sequence[str]) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters that train whole, by group and full name, each in the first of `groups` that has it.

    bias        every parameter of that name
    norm        weight and bias of modules with a 1-D weight (LayerNorm, RMSNorm, of heads too)
    head        what the output head is made of
    embeddings  every embedding, of tokens and of positions
    all         every parameter
    Raises ValueError for a head that shares its weight with the embedding, unless both are asked for.
    """
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    asked = {"head", "embeddings"} & set(groups)
    if tied and len(asked) == 1:
        raise ValueError(
            f"t_groups: {asked.pop()}: head and input embedding are one tensor here; ask for head|embeddings, or give "
            "the head weights of its own"
        )
    taken: set[int] = set()
    found: dict[str, dict[str, nn.Parameter]] = {}
    for group in groups:
        found[group] = {}
        for name, parameter in model.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            if id(parameter) not in taken and _in(group, name.rpartition(".")[2], module, head):
                taken.add(id(parameter))
                found[group][name] = parameter
    return found


def _in(group: str, name: str, module: nn.Module, head: nn.Module | None) -> bool:
    """Whether the parameter of this name of `module` itself is part of the group."""
    if group == "bias":
        return name == "bias"
    if group == "norm":
        weight = getattr(module, "weight", None)
        return isinstance(weight, nn.Parameter) and weight.dim() == 1 and name in ("weight", "bias")
    if group == "head":
        return module is head
    if group == "embeddings":
        return isinstance(module, nn.Embedding)
    return group == "all"


def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> Layers:
    """The layer and mask of each name; ValueError for a mask that is not that of a pruned linear layer of `model`."""
    modules = dict(model.named_modules())
    found: dict[str, tuple[Linear, Tensor]] = {}
    owners: dict[int, str] = {}
    for name, mask in masks.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear | Conv1D):
            raise ValueError(f"masks: {name}: no linear layer of {type(model).__name__} has this name")
        kept = _kept(layer)
        if mask.dtype != torch.bool or mask.shape != kept.shape:
            raise ValueError(
                f"masks: {name}: {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}; expected bool "
                f"{list(kept.shape)}, True where a weight is kept"
            )
        wrong = int(kept[~mask.to(kept.device)].count_nonzero())
        if wrong:
            raise ValueError(f"masks: {name}: {wrong} weights that the mask takes away are not 0")
        other = owners.setdefault(id(layer.weight), name)
        if other != name:
            raise ValueError(f"masks: {name}: its weight is also that of {other}; two masks cannot hold for one weight")
        found[name] = layer, mask
    return found


def _kept(layer: Linear) -> Tensor:
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


@dataclass(frozen=True, eq=False)
class Choice:
    """What is to train.

    whole     parameters by group and full name
    layers    pruned layers and their masks [N, K], by full name; those whose weight does not train whole get an adapter
    """

    retrain: Retrain
    whole: Mapping[str, Mapping[str, nn.Parameter]]
    layers: Layers

    def inside(self, places: Sequence[str]) -> Choice:
        """What of it is in these modules."""
        return self._where(lambda name: within(name, places))

    def outside(self, places: Sequence[str]) -> Choice:
        """What of it is not."""
        return self._where(lambda name: not within(name, places))

    def _where(self, wanted: Callable[[str], bool]) -> Choice:
        whole = {
            group: {name: parameter for name, parameter in named.items() if wanted(name)}
            for group, named in self.whole.items()
        }
        return Choice(self.retrain, whole, {name: pair for name, pair in self.layers.items() if wanted(name)})

    @property
    def kind(self) -> str | None:
        """Of the adapters."""
        return next((group for group in self.retrain.parts if group in ADAPTERS), None)

    def adapted(self) -> list[tuple[Linear, Tensor]]:
        full = {id(parameter) for named in self.whole.values() for parameter in named.values()}
        return [pair for pair in self.layers.values() if self.kind and id(pair[0].weight) not in full]

    def groups(self) -> dict[str, int]:
        """How many numbers train, by group."""
        counts = {group: sum(p.numel() for p in named.values()) for group, named in self.whole.items()}
        if self.kind is not None:
            counts[self.kind] = sum(self.retrain.rank * sum(mask.shape) for _, mask in self.adapted())
        return {group: counts[group] for group in self.retrain.parts}

    def trainables(self, generator: torch.Generator) -> Trainables:
        pruned = {id(layer.weight): (layer, mask) for layer, mask in self.layers.values()}
        whole = {}
        for named in self.whole.values():
            for parameter in named.values():
                pair = pruned.get(id(parameter))
                whole[parameter] = _Master(parameter, None if pair is None else _zeros(*pair))
        adapters = []
        if self.kind is not None:
            rank, alpha = self.retrain.rank, self.retrain.alpha
            adapters = [new_adapter(*pair, self.kind, rank, alpha, generator) for pair in self.adapted()]
        return Trainables(whole, adapters)


def _zeros(layer: Linear, mask: Tensor) -> Tensor:
    gone = ~mask.to(layer.weight.device)
    return gone.T if isinstance(layer, Conv1D) else gone


class _Master:
    """What the optimizer moves in the place of a parameter: itself, or a float32 copy of one with 16 bits.

    zeros   of the parameter's shape, True where it stays 0; None: nowhere
    """

    def __init__(self, parameter: nn.Parameter, zeros: Tensor | None) -> None:
        self.zeros = zeros
        self.tensor = parameter
        if parameter.dtype in (torch.float16, torch.bfloat16):
            self.tensor = nn.Parameter(parameter.detach().float())

    def gather(self, parameter: Tensor) -> None:
        """After every backward pass: gradients of 16 bits are added up in float32."""
        assert parameter.grad is not None
        if self.tensor is not parameter:
            grad = parameter.grad.to(self.tensor.dtype)
            self.tensor.grad = grad if self.tensor.grad is None else self.tensor.grad.add_(grad)
            parameter.grad = None
        if self.zeros is not None:
            assert self.tensor.grad is not None
            self.tensor.grad.masked_fill_(self.zeros, 0)

    @torch.no_grad()
    def settle(self, parameter: Tensor) -> None:
        """After every step."""
        if self.zeros is not None:
            self.tensor.masked_fill_(self.zeros, 0)
        if self.tensor is not parameter:
            parameter.copy_(self.tensor)


@dataclass(frozen=True, eq=False)
class Trainables:
    """Parameters that train whole, and adapters."""

    whole: dict[nn.Parameter, _Master]
    adapters: list[Adapter]

    @property
    def masters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        low = [part for adapter in self.adapters for part in (adapter.A, adapter.B)]
        return [master.tensor for master in self.whole.values()] + low

    def tensors(self) -> Iterator[Tensor]:
        """All that is held beside the model."""
        yield from self.masters
        yield from (master.zeros for master in self.whole.values() if master.zeros is not None)
        yield from (adapter.mask for adapter in self.adapters)

    @contextmanager
    def training(self, module: nn.Module) -> Iterator[None]:
        """Inside the block gradients reach what trains, and no other parameter of `module`."""
        flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
        handles = []
        try:
            module.requires_grad_(False)
            for parameter, master in self.whole.items():
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(master.gather))
            for adapter in self.adapters:
                adapter.attach()
            yield
        finally:
            for handle in handles:
                handle.remove()
            for adapter in self.adapters:
                adapter.detach()
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
                parameter.grad = None

    def settle(self) -> None:
        """After every step."""
        for parameter, master in self.whole.items():
            master.settle(parameter)

    def finite(self) -> bool:
        """Whether what was trained, merged, is numbers alone."""
        return all(map(finite, self.whole)) and all(adapter.finite() for adapter in self.adapters)

    def merge_(self) -> None:
        for adapter in self.adapters:
            adapter.merge_()


class Before:
    """Tensors as they were, put back when the block ends with an error. On disk: in memory they would be one more copy
    of all that trains."""

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="remanence-retrain-")
        self._kept: list[Tensor] = []

    def keep(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            save_file({"tensor": tensor.detach().contiguous()}, self._path(len(self._kept)))
            self._kept.append(tensor.detach())

    def _path(self, number: int) -> Path:
        return Path(self._place.name) / f"{number}.safetensors"

    def __enter__(self) -> Before:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, tensor in enumerate(self._kept if kind is not None else ()):
            tensor.copy_(load_file(self._path(number))["tensor"])
        self._place.cleanup()
