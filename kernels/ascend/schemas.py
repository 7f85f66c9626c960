"""The schemas of torch-npu's operators that we call, as one release has them, and what became of them in another."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

_FILE = Path(__file__).with_name("schemas.json")


@cache
def _kept() -> tuple[str, dict[str, str]]:
    told = json.loads(_FILE.read_text())
    return told["release"], told["schemas"]


def release() -> str:
    """Of torch-npu, whose schemas are kept."""
    return _kept()[0]


def schemas() -> dict[str, str]:
    """By the operator's name, as `torch.library.Library.define` takes it."""
    return dict(_kept()[1])


def loaded(name: str) -> str | None:
    """Of the operator as it is registered now; None: it is not."""
    packet = getattr(torch.ops.npu, name, None)
    return None if packet is None else str(packet.default._schema).removeprefix("npu::")


def drift() -> dict[str, str]:
    """Operators that the loaded torch-npu has otherwise than we know them, and how: empty where all is as it was.

    Arguments that were appended, with a default, change nothing for a caller; those and all else are told apart.
    """
    return {name: change for name, known in schemas().items() if (change := compare(known, loaded(name)))}


def compare(known: str, found: str | None) -> str:
    """In words; "" for the same."""
    if found is None:
        return "is not there"
    before, after = torch._C.parse_schema(known), torch._C.parse_schema(found)
    old, new = ({argument.name: argument for argument in schema.arguments} for schema in (before, after))
    gone = [name for name in old if name not in new]
    changed = [name for name in old if name in new and _form(old[name]) != _form(new[name])]
    positional = [[a.name for a in schema.arguments if not a.kwarg_only] for schema in (before, after)]
    said = [f"lacks {name}" for name in gone] + [f"has another {name}: {_form(new[name])}" for name in changed]
    if not gone and positional[1][: len(positional[0])] != positional[0]:
        said.append(f"has its arguments in another order: {', '.join(positional[1])}")
    if [str(value.type) for value in before.returns] != [str(value.type) for value in after.returns]:
        said.append(f"returns {', '.join(str(value.type) for value in after.returns)}")
    added = [name for name in new if name not in old]
    needed = [name for name in added if not new[name].has_default_value()]
    said += [f"asks for {name}" for name in needed]
    if not said and added:
        return f"has {', '.join(added)} besides, which may stay away"
    return "; ".join(said)


def _form(argument: torch._C.Argument) -> str:
    default = f"={argument.default_value}" if argument.has_default_value() else ""
    return f"{argument.type}{default}{', by name alone' if argument.kwarg_only else ''}"
