"""Every call of an operator of torch-npu in the sources, beside the schema that is kept of it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.ascend.schemas import schemas


@dataclass(frozen=True)
class Call:
    """place: file and line; positional: how many arguments come without a name."""

    operator: str
    place: str
    positional: int
    named: tuple[str, ...]


def calls(root: Path) -> list[Call]:
    """In the Python files of this package's folders below `root`."""
    found = []
    for folder in ("backends", "kernels", "compress", "unlearn", "bench"):
        for path in sorted((root / folder).rglob("*.py")):
            found += calls_in(path.read_text(), str(path.relative_to(root)))
    return found


def calls_in(source: str, name: str) -> list[Call]:
    """torch.ops.npu.OPERATOR(...) in a file called `name`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "torch.ops.npu":
            assert isinstance(node, ast.Call)
            named = tuple(keyword.arg or "**" for keyword in node.keywords)
            found.append(Call(called.attr, f"{name}:{node.lineno}", len(node.args), named))
    return found


def wrong(call: Call) -> str:
    """What of a call the operator's schema does not have; "" where all of it is there."""
    known = schemas().get(call.operator)
    if known is None:
        return f"{call.place}: {call.operator} is not among the schemas that are kept"
    arguments = torch._C.parse_schema(known).arguments
    places = [argument.name for argument in arguments if not argument.kwarg_only]
    given = {*places[: call.positional], *call.named}
    lacking = [
        a.name for a in arguments if not a.has_default_value() and "?" not in str(a.type) and a.name not in given
    ]
    unknown = [name for name in call.named if name not in {argument.name for argument in arguments}]
    if call.positional > len(places) or unknown or lacking or {*places[: call.positional]} & {*call.named}:
        return f"{call.place}: {call.operator} takes {known}"
    return ""
