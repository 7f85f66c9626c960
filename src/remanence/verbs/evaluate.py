"""`remanence evaluate`, and what shows what was measured: `report`, `logs`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .shared import Json, Seed, audit_config, names, quiet, say, there, usage, writable


def evaluate(
    model: Annotated[str, typer.Argument(help="A model directory or hub id, compressed or not.")],
    forget: Annotated[str, typer.Option(help="A file of rows; forgetNN with --data tofu or people.")] = "forget10",
    retain: Annotated[str | None, typer.Option(help="A file of rows that should be known.")] = None,
    data: Annotated[str | None, typer.Option(help="tofu, people, muse-news, muse-books, or a file.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="TOFU's or MUSE's files (default: from the hub).")] = None,
    people: Annotated[int | None, typer.Option("--people", "--authors", help="Of so many people or authors.")] = None,
    target: Annotated[str | None, typer.Option(help="The model before it forgot.")] = None,
    oracle: Annotated[str | None, typer.Option(help="A model retrained without the forget set.")] = None,
    pressures: Annotated[str | None, typer.Option(help="Recovery pressures, comma-separated, or 'all'.")] = None,
    templates: Annotated[str | None, typer.Option(help="Your own texts for the pressures of asking (JSON).")] = None,
    perplexity: Annotated[str | None, typer.Option(help="A text, a directory with WikiText-2, or 'wikitext'.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Of lm-evaluation-harness, comma-separated.")] = None,
    include_path: Annotated[str | None, typer.Option(help="Task definitions of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task.")] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write evaluation.json and items.json here.")] = None,
    as_json: Json = False,
) -> None:
    """Measure one model: forgetting, utility, memorisation, privacy, distance to the oracle, recovery."""
    from ..compress.files import write_json

    if out is not None:
        writable("out", out)
    if data in ("muse-news", "muse-books"):
        given = {"retain": retain, "people": people, "target": target, "pressures": pressures, "tasks": tasks}
        for name, value in (given | {"templates": templates, "perplexity": perplexity}).items():
            if value is not None:
                raise UsageError(f"{name}: goes with questions to forget and to keep, not with --data {data}")
        there(model, oracle)
        from ..evaluate import evaluate_muse
        from ..machine import device_for_run

        quiet()
        device_for_run("cpu", say)
        document, items = evaluate_muse(model, oracle, data, data_dir)
    else:
        from ..corpus import load_corpus

        config = audit_config(
            model=model,
            data=data,
            data_dir=data_dir,
            forget=forget,
            retain=retain,
            people=people,
            pressures=names("pressures", pressures),
            templates=templates,
            perplexity=perplexity,
            seed=seed,
        )
        corpus = usage(load_corpus, config)
        there(model, target, oracle)
        from ..bench.cell import Measures
        from ..evaluate import Tasks
        from ..evaluate import evaluate as run
        from ..machine import device_for_run

        quiet()
        device_for_run("cpu", say)
        measures = Measures(oracle, config.pressures, templates, perplexity, seed=seed)
        wanted = Tasks(names("tasks", tasks) or (), include_path, limit)
        document, items = run(model, target, corpus, measures, wanted)
    if out is not None:
        write_json(out / "evaluation.json", document)
        write_json(out / "items.json", items)
    if as_json:
        print(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        from ..report import show_evaluation

        show_evaluation(document, sys.stdout)


def report(
    source: Annotated[Path, typer.Argument(help="audit.json, or the directory it is in.")],
    html_out: Annotated[Path | None, typer.Option("--html", help="Write the page here.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Show an audit again: the table, and the page with --html."""
    from ..compress.files import write_text
    from ..report import html, markdown, read, terminal

    document = read(source)
    if html_out is not None:
        write_text(html_out, html(document))
        say(f"report: {html_out}")
    if as_json:
        print(json.dumps(document, indent=1, ensure_ascii=False))
    elif as_markdown:
        print(markdown(document), end="")
    else:
        terminal(document, sys.stdout)


def logs(
    source: Annotated[Path, typer.Argument(help="A directory with evaluation logs of TOFU or open-unlearning.")],
    oracle: Annotated[Path | None, typer.Option(help="The same of a model retrained without the forget set.")] = None,
    as_json: Json = False,
) -> None:
    """Read evaluation logs of other tools: model utility under every truth ratio, forget quality."""
    from ..bench.logs import read_logs
    from ..bench.logs import report as aggregate

    found = usage(aggregate, usage(read_logs, source), usage(read_logs, oracle) if oracle else None)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        from ..report import show_logs

        show_logs(found, sys.stdout)
