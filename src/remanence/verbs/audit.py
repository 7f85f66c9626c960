"""`remanence audit` on the command line."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PARTIAL, VERDICT, ControlError, UsageError
from .shared import Json, Seed, audit_config, default_data, names, pairs, quiet, say, there, usage, writable

if TYPE_CHECKING:
    from ..config import AuditConfig

# A word of --fail-on beside the verdicts: the model had not forgotten in the first place.
UNFORGOTTEN = "unforgotten"


def audit(
    model: Annotated[str, typer.Option(help="'demo', a model directory, or a hub id.")] = "demo",
    arch: Annotated[str, typer.Option(help="Shape of the demo model: llama or opt.")] = "llama",
    data: Annotated[str | None, typer.Option(help="'people', 'tofu', or a file with all rows.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="TOFU's files (default: from the hub).")] = None,
    forget: Annotated[str, typer.Option(help="forgetNN (NN percent), or a file of rows.")] = "forget10",
    retain: Annotated[str | None, typer.Option(help="A file of rows to keep.")] = None,
    people: Annotated[
        int | None, typer.Option("--people", "--authors", help="Use this many people or authors.")
    ] = None,
    oracle: Annotated[str | None, typer.Option(help="A model retrained without the forget set.")] = None,
    unlearned: Annotated[list[str] | None, typer.Option(help="NAME=DIR, a model already unlearned.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            "--method",
            help="Comma-separated (default: graddiff, npo and the control; none with --unlearned).",
        ),
    ] = None,
    recipes: Annotated[str | None, typer.Option("--recipes", "--recipe", help="Comma-separated.")] = None,
    calibration: Annotated[
        list[str] | None, typer.Option(help="retain:64,forget:32,text:128; repeat it to compare choices of data.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="A file of running text, for calibration.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the methods that train.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the methods that train.")] = None,
    pressures: Annotated[
        str | None, typer.Option(help="Recovery pressures on every cell, comma-separated; 'all' for all of them.")
    ] = None,
    templates: Annotated[str | None, typer.Option(help="Your own texts for the pressures of asking (JSON).")] = None,
    perplexity: Annotated[str | None, typer.Option(help="A text, a directory with WikiText-2, or 'wikitext'.")] = None,
    scalability: Annotated[
        int | None, typer.Option(min=2, help="Audit N forget sets of growing size, up to the whole.")
    ] = None,
    sustainability: Annotated[
        int | None, typer.Option(min=2, help="Audit after each of N requests, made one after another.")
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Where audit.json and report.html go.")] = Path("remanence-audit"),
    cache: Annotated[Path | None, typer.Option(help="Finished stages (default: user cache).")] = None,
    fail_on: Annotated[str | None, typer.Option(help="Verdicts that give exit code 3, comma-separated.")] = None,
    as_json: Json = False,
) -> None:
    """Unlearn, compress, reload, measure: does the forgotten knowledge come back?"""
    from ..config import default_cache
    from ..report import VERDICTS

    wanted = names("fail-on", fail_on) or ()
    for verdict in wanted:
        if verdict not in (*VERDICTS, UNFORGOTTEN):
            raise UsageError(f"fail-on: {verdict!r} is not one of {', '.join((*VERDICTS, UNFORGOTTEN))}")
    axes = {"scalability": scalability, "sustainability": sustainability}
    chosen = [(name, requests) for name, requests in axes.items() if requests is not None]
    if len(chosen) == 2:
        raise UsageError("scalability: beside sustainability; an audit goes along one of them")
    config = audit_config(
        model=model,
        arch=arch,
        data=data or default_data(model, retain),
        data_dir=data_dir,
        forget=forget,
        retain=retain,
        people=people,
        oracle=oracle,
        unlearned=pairs(unlearned or []),
        # With a model already unlearned, that is what is audited.
        methods=() if unlearned and methods is None else names("methods", methods),
        recipes=names("recipes", recipes),
        calibration=tuple(calibration or ()),
        text=text,
        pressures=names("pressures", pressures),
        templates=templates,
        perplexity=perplexity,
        sequential=sustainability is not None,
        requests=scalability or sustainability,
        learning_rate=learning_rate,
        steps=steps,
        seed=seed,
    )
    _audit(config, chosen[0] if chosen else None, out, cache or default_cache(), wanted, as_json)


def _audit(
    config: AuditConfig, axis: tuple[str, int] | None, out: Path, cache: Path, fail_on: tuple[str, ...], as_json: bool
) -> None:
    from ..corpus import load_corpus
    from ..progress import Bars, Lines

    for name, place in (("out", out), ("cache", cache)):
        writable(name, place)
    corpus = usage(load_corpus, config)  # what is wrong with the data is said before torch loads
    if axis:
        from ..unlearn.data import requests

        usage(requests, corpus.forget, axis[1])
    there(None if config.model == "demo" else config.model, config.oracle, *config.unlearned.values())
    say("loading torch and transformers ...")
    from ..axes import runs
    from ..engine import audit as run
    from ..machine import device_for_run

    quiet()
    device_for_run("cpu", say)
    start = time.monotonic()
    with Bars() if sys.stderr.isatty() else nullcontext(Lines()) as reporter:
        if axis:
            documents = []
            for made, document, items in runs(config, *axis, cache, reporter):
                _write_audit(out / f"request-{made}", document, items)
                documents.append(document)
        else:
            result = run(config, cache, reporter)
            documents = [result.document]
            _write_audit(out, result.document, result.items)
    _show_audit(documents, axis[0] if axis else None, out, as_json)
    say(f"{time.monotonic() - start:.1f} s")
    _judge_audit(documents, fail_on)


def _write_audit(out: Path, document: dict[str, Any], items: dict[str, Any]) -> None:
    from ..compress.files import write_json, write_text
    from ..report import html

    write_json(out / "audit.json", document)
    write_json(out / "items.json", items)
    write_text(out / "report.html", html(document))
    say(f"report: {out / 'report.html'}   data: {out / 'audit.json'}")


def _show_audit(documents: list[dict[str, Any]], axis: str | None, out: Path, as_json: bool) -> None:
    from ..report import show_axis, terminal

    shown = documents[0]
    if axis:
        from ..axes import axis_document
        from ..compress.files import write_json

        shown = axis_document(axis, documents)
        write_json(out / "axis.json", shown)
    if as_json:
        print(json.dumps(shown, indent=1, ensure_ascii=False))
    elif axis:
        show_axis(shown, sys.stdout)
    else:
        terminal(shown, sys.stdout)


def _judge_audit(documents: list[dict[str, Any]], fail_on: tuple[str, ...]) -> None:
    """The exit code; a failed control comes first."""
    from ..report import broken_controls

    if broken := [text for document in documents for text in broken_controls(document)]:
        raise ControlError(f"control failed, so no verdict here can be trusted: {'; '.join(broken)}")
    cells = [cell for document in documents for cell in document["cells"]]
    audited = [cell for cell in cells if cell["control"] is None]
    if any(cell["verdict"] in fail_on or (cell.get("unforgotten") and UNFORGOTTEN in fail_on) for cell in audited):
        raise typer.Exit(VERDICT)
    if any("error" in cell for cell in cells):
        raise typer.Exit(PARTIAL)
