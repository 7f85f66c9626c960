"""Layers that share their input (q, k, v; gate, up), multiplied together while a model decodes.

With one row of x a product is short, and beginning one costs as much as the smallest layers take: their weights lie
behind each other in the run-time layout, so one call multiplies them all. Which layers are given the same input is not
taken from their names alone: the layer that is asked first computes for all, and each of the others takes its part only
if it is asked with the very same tensor, unchanged. So no model's code has to be replaced.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.reference import BLOCK

if TYPE_CHECKING:
    from .linear import QuantLinear

# By their names in one module: Llama and all that came of it; Mixtral's experts.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


class Joint:
    """One product for all `members`, in their order."""

    def __init__(self, members: Sequence[QuantLinear]) -> None:
        from ..kernels.cpu import in_large_pages  # there, where anything is laid out

        blocks: list[Any] = [member.blocks for member in members]
        self._blocks = torch.cat(blocks, out=in_large_pages(torch.empty(sum(map(len, blocks)), dtype=torch.uint8)))
        self._parts = self._blocks.split([len(part) for part in blocks])
        self._widths = [member.out_features for member in members]
        self._rows = sum(self._widths)
        self._members = tuple(members)
        self._activation = members[0].activation
        self._found: tuple[weakref.ref[Tensor], int, dict[QuantLinear, Tensor]] | None = None
        for member, part in zip(members, self._parts, strict=True):
            member.blocks = part

    def multiply(self, member: QuantLinear, x: Tensor) -> Tensor | None:
        """y of `member` for one row x; None where the members are no longer what was joined."""
        if not all(map(self._unchanged, self._members, self._parts)) or x.is_inference():
            return None  # an inference tensor does not tell whether it was changed
        found = self._found
        if found is not None and found[0]() is x and found[1] == x._version:
            y = found[2].pop(member, None)
            if y is not None:
                return y
        y = member.product(x, self._blocks, self._rows)
        rows = dict(zip(self._members, y.split(self._widths, -1), strict=True))
        mine = rows.pop(member)
        self._found = (weakref.ref(x), x._version, rows)
        return mine

    def _unchanged(self, member: QuantLinear, part: Tensor) -> bool:
        return member._buffers.get("blocks") is part and _plain(member) and member.activation == self._activation

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_found": None}  # what is found is of this process


def _plain(member: QuantLinear) -> bool:
    """Whether nothing but its weight is its own: one product can serve others too."""
    held = member._buffers
    return held["bias"] is None and held["x_scale"] is None and member.transform is None


def join(members: Sequence[QuantLinear]) -> Joint | None:
    """The members' weights as one, of which each `blocks` is a part then; None where they differ in form."""
    first = members[0]
    alike = all(
        member.blocks is not None
        and _plain(member)
        and (member.in_features, member.form, member.activation) == (first.in_features, first.form, first.activation)
        for member in members
    )
    whole = all(member.out_features % BLOCK == 0 for member in members[:-1])  # no padding between two of them
    return Joint(members) if alike and whole else None


def siblings(model: nn.Module, kind: type[QuantLinear]) -> list[tuple[QuantLinear, ...]]:
    """The layers of a model that may share their input, by their names."""
    found = []
    for module in model.modules():
        children: dict[str, Any] = dict(module.named_children())
        for names in _TOGETHER:
            if all(isinstance(children.get(name), kind) for name in names):
                found.append(tuple(children[name] for name in names))
    return found
