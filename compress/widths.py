"""What every width of a layer takes, what runs it, and the recipe that gives each layer its own.

Width 16 stands for the model's own dtype. How widths are chosen: allocate.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels.reference import packed_width
from .block import Linear
from .experts import ExpertList
from .formats.compressed_tensors import INTEGER, Scheme
from .recipe import Recipe
from .spec import names
from .walk import features, fitting_linears, storage_dtype, within

DENSE_WIDTH = 16
# Enough to see which layers share their input.
_TOKENS = 16


@dataclass(frozen=True)
class Target:
    """What runs a mixed model.

    widths      that it has kernels or readers for
    fused       it joins layers that share their input into one, which has one width
    experts     it joins all experts of a layer
    asymmetric  it reads several widths in one asymmetric file
    mixture     it reads several widths of a model with experts (see checkpoint.stock_readable)
    why         where this is known from
    """

    widths: tuple[int, ...]
    fused: bool = False
    experts: bool = False
    asymmetric: bool = True
    mixture: bool = True
    why: str = ""


TARGETS = {
    "remanence": Target((2, 3, 4, 8, 16), why="packed kernels of every width, one layer at a time"),
    "transformers": Target(
        (2, 3, 4, 8, 16),
        asymmetric=False,
        mixture=False,
        why="compressed-tensors from 0.19 on unpacks every width, but not zero points of several widths, nor experts",
    ),
    "vllm": Target(
        (4, 8, 16),
        fused=True,
        experts=True,
        why="weight-only kernels for compressed-tensors of 4 and 8 bits; it joins q, k, v, and gate, up, and experts",
    ),
}


def sizes(model: PreTrainedModel, recipe: Recipe, widths: Collection[int]) -> dict[str, dict[int, int]]:
    """Bytes on disk of every layer that `recipe` quantizes, at each width, its bias apart; the model may be on meta.

    Codes with their rows padded to whole words, scales, zero points, the shape, an input's static grid; at 16 the
    weight as it is. ValueError for recipes that write maps too (FlatQuant, online rotation), or search what they write.
    """
    a = recipe.activation
    if recipe.method == "flatquant" or (recipe.rotation is not None and recipe.rotation.online):
        raise ValueError(f"recipe: {recipe} writes maps beside the weights, which are not counted here")
    if recipe.gate is not None and recipe.gate.action == "keep":
        raise ValueError(f"recipe: {recipe}: the gate keeps blocks at 8 bits, whatever is chosen; have it abort")
    if a is not None and a.search:
        raise ValueError(f"recipe: {recipe}: a_search decides what is written, so its bytes are not known before")
    return {
        name: {width: _bytes(recipe, width, module) for width in widths}
        for name, module in fitting_linears(model, recipe)
    }


def _bytes(recipe: Recipe, width: int, module: Linear) -> int:
    weight = module.weight
    K = features(module)
    N = weight.numel() // K
    if width == DENSE_WIDTH:
        return N * K * weight.element_size()
    assert recipe.spec is not None
    spec, a = replace(recipe.spec, bits=width), recipe.activation
    groups = spec.groups(K)
    total = N * groups * storage_dtype(weight).itemsize
    if Scheme(spec, a).format == INTEGER:
        total += N * K + (0 if spec.symmetric else N * groups)
    else:
        total += N * packed_width(K, width) + 2 * torch.int64.itemsize
        total += 0 if spec.symmetric else packed_width(N, width) * groups
    if a is not None and not a.dynamic:
        total += torch.float32.itemsize + (0 if a.symmetric else torch.int8.itemsize)
    return total if a is None or a.clip == 1 else total + torch.float32.itemsize


def code_bits(model: PreTrainedModel, recipe: Recipe, widths: Collection[int]) -> dict[str, dict[int, int]]:
    """Bits of every layer's weights at each width, codes alone: no scales, zero points or padding. At 16 those of the
    model's dtype, which are 32 in a float32 model."""
    return {
        name: {
            width: module.weight.numel() * (8 * module.weight.element_size() if width == DENSE_WIDTH else width)
            for width in widths
        }
        for name, module in fitting_linears(model, recipe)
    }


def weights(model: PreTrainedModel, recipe: Recipe) -> int:
    """Number of weights in the layers that `recipe` quantizes: times an average in bits, a budget for `code_bits`; for
    8 * `sizes`, with scales and all."""
    return sum(module.weight.numel() for _, module in fitting_linears(model, recipe))


@torch.no_grad()
def fused(model: PreTrainedModel, recipe: Recipe, experts: bool = False) -> tuple[tuple[str, ...], ...]:
    """Layers that engines join into one: those of a module that share their input (q, k, v; gate, up), of those that
    `recipe` quantizes; with `experts` all layers of a layer's experts.

    Found in one pass over a few tokens; an expert that none of them reaches is as the others of its kind.
    """
    layers = dict(fitting_linears(model, recipe))
    seen = _inputs(model, layers)
    shared: dict[tuple[str, int, int], list[str]] = {}
    for name, x in seen.items():
        shared.setdefault((name.rpartition(".")[0], x.data_ptr(), x.shape[-1]), []).append(name)
    groups = [group for group in shared.values() if len(group) > 1]
    kinds = {(_kind(group[0].rpartition(".")[0]), tuple(name.rpartition(".")[2] for name in group)) for group in groups}
    for home in dict.fromkeys(name.rpartition(".")[0] for name in layers if name not in seen):
        for kind, leaves in sorted(kinds):
            alike = [f"{home}.{leaf}" for leaf in leaves if f"{home}.{leaf}" in layers]
            if kind == _kind(home) and len(alike) > 1:
                groups.append(alike)
    if experts:
        lists = [name for name, module in model.named_modules() if isinstance(module, ExpertList)]
        groups = [group for group in groups if not within(group[0], lists)]
        groups += [[name for name in layers if within(name, [home])] for home in lists]
    order = {name: at for at, name in enumerate(layers)}
    return tuple(sorted((tuple(sorted(group, key=order.__getitem__)) for group in groups), key=lambda g: order[g[0]]))


def _kind(name: str) -> str:
    """A module's name without numbers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _inputs(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What every layer is given first in one pass; all are kept, so that no two share memory by accident."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001
            if args[0].numel():  # what is empty lies nowhere
                seen.setdefault(name, args[0])

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]
    embedding: Any = model.get_input_embeddings()
    ids = torch.arange(min(_TOKENS, len(embedding.weight)), device=embedding.weight.device)
    training = model.training
    try:
        model.eval()(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return seen


def mixed(recipe: Recipe, chosen: Mapping[str, int]) -> Recipe:
    """The recipe that gives every layer its chosen width: the most frequent one is that of the format, others are in
    `widths`, and layers of 16 in `ignore` (a recipe that prunes does not prune them then).

    Layers are named by their full names, or by a module around them or their last part where that means no layer of
    another width. ValueError when nothing is left to quantize.
    """
    packed = Counter(width for width in chosen.values() if width != DENSE_WIDTH)
    if recipe.spec is None or not packed:
        raise ValueError(f"widths: every layer stays dense, so that {recipe} has nothing to quantize")
    usual = min(packed, key=lambda width: (-packed[width], width))
    spelled = {
        width: _patterns([name for name, at in chosen.items() if at == width], chosen)
        for width in sorted(set(chosen.values()) - {usual})
    }
    dense = spelled.pop(DENSE_WIDTH, ())
    made = replace(
        recipe,
        spec=replace(recipe.spec, bits=usual),
        widths=tuple(spelled.items()),
        ignore=(*recipe.ignore, *dense),
    )
    for name, width in chosen.items():
        ignored = any(names(pattern, name) for pattern in dense)
        assert (DENSE_WIDTH if ignored else made.spec_of(name).bits) == width, name
    return made


def _patterns(wanted: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """Few patterns that mean the layers called `wanted` and no other of those `known`, in their order."""
    meant: dict[str, set[str]] = {}
    for name in known:
        parts = name.split(".")
        for pattern in {parts[-1], *(".".join(parts[:end]) for end in range(1, len(parts) + 1))}:
            meant.setdefault(pattern, set()).add(name)
    whole, left = set(wanted), set(wanted)
    order = {name: at for at, name in enumerate(known)}
    taken: dict[str, int] = {}
    for pattern in sorted(meant, key=lambda pattern: (-len(meant[pattern]), pattern)):
        covered = meant[pattern] & left
        # What would stand for one layer alone is no shorter way of saying it.
        if meant[pattern] <= whole and (len(covered) > 1 or pattern in covered):
            taken[pattern] = min(order[name] for name in covered)
            left -= covered
    return tuple(sorted(taken, key=taken.__getitem__))
