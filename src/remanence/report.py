"""An audit's document for people: tables for terminals and READMEs here, the page in page.py."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import IO, Any

from .bench.tofu import VARIANTS
from .compress.files import read_json
from .labels import VERDICTS, interval, label, not_forgotten, number, with_brief_recipes, word
from .page import html

__all__ = ["SCHEMA", "VERDICTS", "broken_controls", "html", "markdown", "read", "terminal"]

SCHEMA = "remanence.audit/2"
_MUSE = ("verbmem_f", "knowmem_f", "knowmem_r", "privleak")
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
    document = with_brief_recipes(document)
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
                number(cell["model_utility"]["geometric"]),
                number(cell["size_vs_fp16"]),
            ]
        verdict = "not forgotten" if not_forgotten(cell) else word(cell)
        lines.append(f"| {name} | {cell['recipe']} | {' | '.join(figures)} | {verdict} |")
    return "\n".join(lines) + "\n"


def terminal(document: dict[str, Any], file: IO[str]) -> None:
    """Print the table of cells and the state of the controls."""
    from rich.console import Console
    from rich.table import Table

    document = with_brief_recipes(document)
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
    for method, found in document["survival"].items():
        if found["rho"] is not None:
            what = f"Spearman {number(found['rho'])} over {found['n']} recipes (p {number(found['p'], 3)})"
            console.print(
                f"{method}: order of recovery as the weights alone predict it, {what}", markup=False, highlight=False
            )
    for name, control in document["controls"].items():
        mark = "[green]ok[/]" if control["ok"] else "[red]FAILED[/]"
        console.print(f"{name} control {mark}: ", end="")
        console.print(control["detail"], markup=False, highlight=False)


def _figures(cell: dict[str, Any]) -> list[str]:
    if "error" in cell:
        return [""] * 8 + [_verdict(cell)]
    quality = cell["forget_quality"] or {}
    return [
        number(cell["forget"], 3),
        interval(cell["recovered_share"]).replace("[", "\\["),
        number(cell["forget_rouge"]),
        number(cell["retain"], 3),
        number(cell["model_utility"]["geometric"]),
        number(quality.get("log10_p"), 1),
        number(cell["size_vs_fp16"]),
        number(cell["times"]["decode_tokens_per_s"], 0),
        _verdict(cell),
    ]


def show_axis(document: dict[str, Any], file: IO[str]) -> None:
    """Print the runs of an axis side by side (axes.py)."""
    from rich.console import Console
    from rich.table import Table

    document = with_brief_recipes(document)
    console = Console(file=file, width=None if file.isatty() else 190)
    table = Table("requests", "rows", "model", "recipe", title=document["axis"], title_justify="left")
    for column in (
        "forget P",
        "recovered [95%]",
        "retain P",
        "utility",
        "verbmem",
        "knowmem f",
        "knowmem r",
        "PrivLeak",
    ):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for run in document["runs"]:
        table.add_section()
        for i, cell in enumerate(run["cells"]):
            head = [str(run["requests"]), str(run["forget_rows"])] if i == 0 else ["", ""]
            muse = cell.get("muse") or {}
            figures = [
                number(cell.get("forget"), 3),
                interval(cell.get("recovered_share")).replace("[", "\\["),
                number(cell.get("retain"), 3),
                number((cell.get("model_utility") or {}).get("geometric")),
                *(number(muse.get(name), 2 if "mem" in name else 0) for name in _MUSE),
            ]
            table.add_row(*head, label(cell["method"], cell["control"]), cell["recipe"], *figures, _verdict(cell))
    console.print(table)


def _verdict(cell: dict[str, Any]) -> str:
    """Coloured; what was never forgotten is said so in place of its open verdict."""
    text = "failed" if "error" in cell else "not forgotten" if not_forgotten(cell) else cell["verdict"]
    return f"[{_COLOURS[cell['verdict']]}]{text}[/]"


def show_logs(found: dict[str, Any], file: IO[str]) -> None:
    """Print what `remanence logs` found (bench/logs.py)."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file, width=None if file.isatty() else 120, highlight=False)
    table = Table("set", "rows", "probability", "ROUGE-L", *(f"truth ratio, {v}" for v in VARIANTS))
    parts = dict(found["components"])
    if "forget" in found:
        parts["forget"] = found["forget"]
    for name, part in parts.items():
        ratios = part.get("truth_ratio", {})
        figures = [part["probability"], part["rouge"], *(ratios.get(v) for v in VARIANTS)]
        table.add_row(name, str(found["items"][name]), *(number(figure, 4) for figure in figures))
    console.print(table)
    for flag in found["flags"]:
        console.print(f"collapsed? {flag}")
    if found["missing"]:
        console.print(f"model utility: not in the log: {', '.join(found['missing'])}")
    else:
        utility = ", ".join(f"{number(value, 4)} ({variant})" for variant, value in found["model_utility"].items())
        console.print(f"model utility: {utility}")
    if quality := found.get("forget_quality"):
        side = {-1: "below the oracle: the truth is still known", 0: "as the oracle's", 1: "above the oracle"}
        console.print(
            f"forget quality: p {quality['p']:.3g}, log10 p {number(quality['log10_p'])}, D {number(quality['d'], 4)}, "
            f"truth ratios {side[quality['sign']]}"
        )
        if found["same_questions"] is False:
            console.print("model and oracle were asked different questions: the test compares unlike sets")
    else:
        console.print("forget quality: needs --oracle")


def show_evaluation(document: dict[str, Any], file: IO[str]) -> None:
    """Print what `remanence evaluate` found: a line for each figure, a column for each model."""
    from rich.console import Console
    from rich.table import Table

    models = [name for name in ("model", "target", "oracle") if name in document]
    console = Console(file=file, width=None if file.isatty() else 120, highlight=False)
    table = Table("measure", *models, title=document["data"]["name"], title_justify="left")
    lines = {name: dict(_lines(document[name])) for name in models}
    for measure in dict.fromkeys(key for found in lines.values() for key in found):
        table.add_row(measure, *(lines[name].get(measure, "").replace("[", "\\[") for name in models))
    console.print(table)


def _lines(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every figure below `value` with its place; intervals on one line."""
    if isinstance(value, dict) and value.keys() == {"value", "low", "high"}:
        yield name, interval(value, 3)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _lines(part, f"{name} {key}".strip().replace("_", " "))
    elif isinstance(value, list) and not any(isinstance(part, dict) for part in value):
        yield name, ", ".join(map(str, value))
    elif isinstance(value, list):
        for part in value:
            yield from _lines({key: v for key, v in part.items() if key != "name"}, name)
    elif isinstance(value, float):
        yield name, number(value, 3) if value == 0 or abs(value) >= 0.0005 else f"{value:.2g}"
    elif value is not None:
        yield name, str(value)
