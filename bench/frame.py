"""The frame of every benchmark: `remanence bench NAME` gives {name, environment, rows, checks}.

A benchmark is a module with `run(seed) -> (rows, checks)`. A row is one measurement with what is needed to repeat it;
a check is {what, limit, value, ok}, a figure that must hold. Peers are measured in the same run.
"""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from itertools import groupby
from typing import Any

BENCHES = {
    "kernels": ("kernels", "the kernels beside their peers: one linear layer, a whole model, a GPU"),
    "unlearning": ("unlearning", "every training method on real TOFU rows: forgets, keeps, survives 4 bits, costs"),
    "ptq": (
        "ptq",
        "our quantizers beside GPTQModel's and llm-compressor's; what each brings back, by calibration data",
    ),
    "w4a4": ("w4a4", "activations and the KV cache in few bits: what each scheme costs, and what it brings back"),
    "ascend-ptq": (
        "ascend_ptq",
        "the Ascend study's AWQ, GPTQ, SmoothQuant, FlatQuant on a model that reasons: accuracy, layers by draw",
    ),
    "ascend": ("ascend", "the Ascend backend, as deep as this machine can look: each layer of it is a check"),
    "mixed": ("mixed", "a width for every layer, by every measure of sensitivity, beside one width for all"),
    "perp": ("perp", "pruned models retrained: what each group gives back, what it costs, what it brings back"),
    "early-exit": (
        "early_exit",
        "leaving early: beside frozen states, quality by depth and policy, seconds and joules with a KV cache, leaks",
    ),
    "roofline": (
        "roofline_points",
        "the roofline beside closed forms, saved files, the clock of this CPU, and LLM-Viewer's counts",
    ),
    "evaluation": ("evaluation", "TOFU's whole evaluation in batches beside the same work one example at a time"),
    "streaming": ("streaming", "a model twice as large as its memory: compressed, killed, resumed, and as predicted"),
    "startup": ("startup", "seconds until `--help` and `import remanence` are done"),
}


def run(name: str, seed: int, **options: object) -> dict[str, Any]:
    """Rows and checks of one benchmark; ValueError for a name that is not in BENCHES, or an option that is not its."""
    if name not in BENCHES:
        raise ValueError(f"bench: {name!r} is not one of {', '.join(BENCHES)}")
    module, _ = BENCHES[name]
    measure = import_module(f".{module}", __package__).run
    for option in options.keys() - signature(measure).parameters.keys():
        raise ValueError(f"{option.replace('_', '-')}: the benchmark {name} has no such option")
    rows, checks = measure(seed, **options)
    return {"rows": rows, "checks": checks}


def show(result: dict[str, Any]) -> None:
    """Print rows and checks as tables; rows that begin with another column start another."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    tables = [list(rows) for _, rows in groupby(result["rows"], lambda row: next(iter(row)))]
    titles = [result["name"], *[None] * len(tables)]
    for title, rows in (*zip(titles, tables, strict=False), ("checks", result["checks"])):
        if not rows:
            continue
        table = Table(title=title, title_justify="left")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(_text(row.get(column)) for column in columns))
        console.print(table)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; rows with other columns start another."""
    lines: list[str] = []
    columns: list[str] = []
    for row in rows:
        if list(row) != columns:
            columns = list(row)
            lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines.append("| " + " | ".join(_text(row[column]) for column in columns) + " |")
    return "\n".join(lines[1:])


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
