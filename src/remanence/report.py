"""An audit's document for people: tables for terminals and READMEs here, the page in page.py."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import IO, Any

from .compress.files import read_json
from .labels import VERDICTS, interval, label, number, word
from .page import html

__all__ = ["SCHEMA", "VERDICTS", "broken_controls", "html", "markdown", "read", "terminal"]

SCHEMA = "remanence.audit/1"
_COLOURS = {"held": "green", "returned": "red", "damaged": "yellow", "undecided": "blue"}


def read(source: Path | str) -> dict[str, Any]:
    """An audit's document from audit.json or its directory; ValueError for another schema."""
    path = Path(source)
    if path.is_dir():
        path = path / "audit.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `remanence audit --out {path.parent}` writes it")
    document = read_json(path)
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema: {document.get('schema')!r} is not {SCHEMA!r}")
    try:
        html(document)
        markdown(document)
        terminal(document, StringIO())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is incomplete or was edited: {type(error).__name__}: {error}") from None
    return document


def broken_controls(document: dict[str, Any]) -> list[str]:
    """What the failed controls found; empty when the audit can be trusted."""
    return [f"{name}: {c['detail']}" for name, c in document["controls"].items() if not c["ok"]]


def markdown(document: dict[str, Any]) -> str:
    """The cells as a Markdown table, for a README or an issue."""
    lines = [
        "| model | recipe | forget P | recovered share [95%] | word for word | retain P | utility | × fp16 | verdict |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for cell in document["cells"]:
        name = label(cell["method"], cell["control"]).replace("|", "\\|")
        figures = ["", "", "", "", "", ""]
        if "error" not in cell:
            figures = [
                number(cell["forget"], 3),
                interval(cell["recovered_share"]),
                number(cell["forget_verbatim"]),
                number(cell["retain"], 3),
                number(cell["model_utility"]),
                number(cell["size_vs_fp16"]),
            ]
        lines.append(f"| {name} | {cell['recipe']} | {' | '.join(figures)} | {word(cell)} |")
    return "\n".join(lines) + "\n"


def terminal(document: dict[str, Any], file: IO[str]) -> None:
    """Print the table of cells and the state of the controls."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file, width=None if file.isatty() else 150)
    data = document["data"]
    table = Table(title=f"{data['name']}: {data['forget']} rows to forget, {data['retain']} to keep")
    for column in ("model", "recipe"):
        table.add_column(column)
    for column in (
        "forget P",
        "recovered [95%]",
        "ROUGE-L",
        "retain P",
        "utility",
        "log10 FQ",
        "x fp16",
        "tok/s",
    ):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    previous = ""
    for cell in document["cells"]:
        name = label(cell["method"], cell["control"])
        if previous and name != previous:
            table.add_section()
        table.add_row(name if name != previous else "", cell["recipe"], *_figures(cell))
        previous = name
    console.print(table)
    for name, control in document["controls"].items():
        mark = "[green]ok[/]" if control["ok"] else "[red]FAILED[/]"
        console.print(f"{name} control {mark}: ", end="")
        console.print(control["detail"], markup=False, highlight=False)


def _figures(cell: dict[str, Any]) -> list[str]:
    verdict = f"[{_COLOURS[cell['verdict']]}]{cell['verdict']}[/]"
    if "error" in cell:
        return [""] * 8 + [verdict + " (failed)"]
    quality = cell["forget_quality"] or {}
    return [
        number(cell["forget"], 3),
        interval(cell["recovered_share"]).replace("[", "\\["),
        number(cell["forget_rouge"]),
        number(cell["retain"], 3),
        number(cell["model_utility"]),
        number(quality.get("log10_p"), 1),
        number(cell["size_vs_fp16"]),
        number(cell["times"]["decode_tokens_per_s"], 0),
        verdict,
    ]
