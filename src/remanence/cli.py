"""The command line. Verbs here, work elsewhere; torch loads only inside a verb that needs it.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 error, 2 usage (an unknown name, missing or
unusable input), 3 `--fail-on` fired, 4 done in part (some cells failed), 130 interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import __version__
from .errors import ERROR, INTERRUPTED, OK, PARTIAL, USAGE, VERDICT, ControlError, UsageError

if TYPE_CHECKING:
    from .config import AuditConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A model was made to forget: does the forgetting survive compression?",
    epilog="Exit codes: 0 done, 1 error, 2 usage (unknown name, missing or unusable input), 3 --fail-on fired, "
    "4 some cells failed, 130 interrupted.",
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
# A word of --fail-on beside the verdicts: the model had not forgotten in the first place.
UNFORGOTTEN = "unforgotten"
Seed = Annotated[int, typer.Option(help="Decides data, training and intervals.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
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
    from .config import default_cache
    from .report import VERDICTS

    wanted = _names("fail-on", fail_on) or ()
    for verdict in wanted:
        if verdict not in (*VERDICTS, UNFORGOTTEN):
            raise UsageError(f"fail-on: {verdict!r} is not one of {', '.join((*VERDICTS, UNFORGOTTEN))}")
    axes = {"scalability": scalability, "sustainability": sustainability}
    chosen = [(name, requests) for name, requests in axes.items() if requests is not None]
    if len(chosen) == 2:
        raise UsageError("scalability: beside sustainability; an audit goes along one of them")
    config = _audit_config(
        model=model,
        arch=arch,
        data=data or _default_data(model, retain),
        data_dir=data_dir,
        forget=forget,
        retain=retain,
        people=people,
        oracle=oracle,
        unlearned=_pairs(unlearned or []),
        # With a model already unlearned, that is what is audited.
        methods=() if unlearned and methods is None else _names("methods", methods),
        recipes=_names("recipes", recipes),
        calibration=tuple(calibration or ()),
        text=text,
        pressures=_names("pressures", pressures),
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
    from .corpus import load_corpus
    from .progress import Bars, Lines

    for name, place in (("out", out), ("cache", cache)):
        _writable(name, place)
    corpus = _usage(load_corpus, config)  # what is wrong with the data is said before torch loads
    if axis:
        from .unlearn.data import requests

        _usage(requests, corpus.forget, axis[1])
    _there(None if config.model == "demo" else config.model, config.oracle, *config.unlearned.values())
    _say("loading torch and transformers ...")
    from .axes import runs
    from .engine import audit as run

    _quiet()
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
    _say(f"{time.monotonic() - start:.1f} s")
    _judge_audit(documents, fail_on)


def _write_audit(out: Path, document: dict[str, Any], items: dict[str, Any]) -> None:
    from .compress.files import write_json, write_text
    from .report import html

    write_json(out / "audit.json", document)
    write_json(out / "items.json", items)
    write_text(out / "report.html", html(document))
    _say(f"report: {out / 'report.html'}   data: {out / 'audit.json'}")


def _show_audit(documents: list[dict[str, Any]], axis: str | None, out: Path, as_json: bool) -> None:
    from .report import show_axis, terminal

    shown = documents[0]
    if axis:
        from .axes import axis_document
        from .compress.files import write_json

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
    from .report import broken_controls

    if broken := [text for document in documents for text in broken_controls(document)]:
        raise ControlError(f"control failed, so no verdict here can be trusted: {'; '.join(broken)}")
    cells = [cell for document in documents for cell in document["cells"]]
    audited = [cell for cell in cells if cell["control"] is None]
    if any(cell["verdict"] in fail_on or (cell.get("unforgotten") and UNFORGOTTEN in fail_on) for cell in audited):
        raise typer.Exit(VERDICT)
    if any("error" in cell for cell in cells):
        raise typer.Exit(PARTIAL)


@app.command()
def unlearn(
    model: Annotated[str | None, typer.Option(help="The target: a model directory or hub id.")] = None,
    method: Annotated[str | None, typer.Option(help="See --list.")] = None,
    forget: Annotated[str | None, typer.Option(help="A file of rows to forget; forgetNN with --data tofu.")] = None,
    out: Annotated[Path | None, typer.Option(help="The new model directory.")] = None,
    retain: Annotated[str | None, typer.Option(help="A file of rows to keep.")] = None,
    data: Annotated[str | None, typer.Option(help="tofu, muse-news, muse-books, or a file with all rows.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="TOFU's or MUSE's files (default: from the hub).")] = None,
    idk: Annotated[Path | None, typer.Option(help="A file of refusals, one a line (default: our own).")] = None,
    subject: Annotated[list[str] | None, typer.Option(help="icu: a name to know nothing about; repeatable.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: the paper's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of updates.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE, any setting of --list --json.")] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU or NPU where there is one) or cpu.")] = "auto",
    parallel: Annotated[
        str, typer.Option(help="Under torchrun: ddp, or fsdp for models larger than a device.")
    ] = "ddp",
    processes: Annotated[
        int | None, typer.Option(help="How many you started; a run with another number stops.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Updates between checkpoints (default: a quarter).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this --out.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Show every method: paper, needs, settings.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make a model forget a set of questions or texts, and write it."""
    from .forget import Order, forget_to, listing

    if show:
        print(json.dumps(listing(), indent=1) if as_json else _methods_table(listing()))
        return
    needed = {"model": model, "method": method, "forget": forget, "out": out}
    for name, value in needed.items():
        if value is None:
            raise UsageError(f"{name}: missing; give --{name}")
    options = {"learning_rate": learning_rate, "steps": steps}
    asked = {**_settings(set_ or []), **{key: value for key, value in options.items() if value is not None}}
    order = _usage(
        Order,
        model=model,
        method=method,
        forget=forget,
        retain=retain,
        data=data,
        data_dir=data_dir,
        idk=idk,
        subjects=tuple(subject or ()),
        asked=asked,
        seed=seed,
        device=device,
        parallel=parallel,
        processes=processes,
        save_every=save_every,
        resume=resume,
    )
    assert out is not None
    _new(out)
    _quiet()
    record = forget_to(order, out, _say)
    if record is not None:  # the first process speaks for all
        _done({**record, "out": str(out)}, as_json)


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="A model directory or hub id.")],
    recipe: Annotated[str, typer.Option(help="e.g. gptq-w4a16-g128, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="The new checkpoint directory.")],
    calibration: Annotated[
        str | None, typer.Option(help="e.g. retain:64,forget:32,text:128,length:512 (sequences, tokens).")
    ] = None,
    retain: Annotated[str | None, typer.Option(help="A file of rows to keep, for calibration.")] = None,
    forget: Annotated[str | None, typer.Option(help="A file of rows; forgetNN with --data.")] = None,
    data: Annotated[str | None, typer.Option(help="tofu or people: retain and forget rows of that data.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="TOFU's files (default: from the hub).")] = None,
    text: Annotated[str | None, typer.Option(help="A file of running text, for calibration.")] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU or NPU where there is one) or cpu.")] = "auto",
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Store 2:4 layers without their zeros, for load_model alone.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would take, and do no more.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last block done for this --out.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compress a model, block by block, and write a checkpoint that transformers loads."""
    from .compressing import Order, show_layers
    from .compressing import compress as run

    order = _usage(
        Order,
        model=model,
        recipe=recipe,
        calibration=calibration,
        retain=retain,
        forget=forget,
        data=data,
        data_dir=data_dir,
        text=text,
        seed=seed,
        device=device,
        sparse=sparse,
    )
    _new(out)
    from .progress import run_with_bar

    _quiet()
    made = run_with_bar(f"compress {recipe}", lambda progress: run(order, out, resume, plan, progress, _say), as_json)
    if not as_json:
        if "layers" in made:
            show_layers(made["layers"], sys.stdout)
        # Said already, in words.
        made = {key: value for key, value in made.items() if key not in ("layers", "plan", "actual")}
    _done(made, as_json)


@app.command()
def allocate(
    model: Annotated[str, typer.Option(help="A model directory or hub id.")],
    recipe: Annotated[str, typer.Option(help="A quantizer, e.g. gptq-w4a16-g64, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="The new recipe file, .yaml.")],
    budget: Annotated[float | None, typer.Option(help="For all layers that the recipe quantizes, e.g. 4.0.")] = None,
    unit: Annotated[
        str, typer.Option(help="Of the budget: bits (average of codes), stored-bits (with scales), bytes, seconds.")
    ] = "bits",
    measure: Annotated[str, typer.Option(help="Of sensitivity: tdmpq, cmpq, pmpq, hessian, error, kl, ...")] = "tdmpq",
    rule: Annotated[str, typer.Option(help="milp (the best choice within the budget) or threshold.")] = "milp",
    widths: Annotated[str | None, typer.Option(help="To choose from, comma-separated, e.g. 2,3,4,8,16.")] = None,
    target: Annotated[str, typer.Option(help="What will run it: remanence, transformers or vllm.")] = "remanence",
    fuse: Annotated[bool, typer.Option(help="One width for q, k, v and for gate, up, which engines join.")] = True,
    calibration: Annotated[
        str | None, typer.Option(help="What is measured on: retain:64,forget:32,text:128,length:512.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="Other such data: how much hangs on the choice; repeatable.")
    ] = None,
    retain: Annotated[str | None, typer.Option(help="A file of rows to keep.")] = None,
    forget: Annotated[str | None, typer.Option(help="A file of rows; forgetNN with --data.")] = None,
    data: Annotated[str | None, typer.Option(help="tofu or people: retain and forget rows of that data.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="TOFU's files (default: from the hub).")] = None,
    text: Annotated[str | None, typer.Option(help="A file of running text.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose a width for every layer, by how sensitive it is and within a budget, and write the recipe."""
    from .allocating import Order, show_allocation
    from .allocating import allocate as run

    chosen = _names("widths", widths)
    if chosen is not None and not all(width.isdecimal() for width in chosen):
        raise UsageError(f"widths: {widths!r} is not a list of numbers, e.g. 2,3,4,8,16")
    order = _usage(
        Order,
        model=model,
        recipe=recipe,
        measure=measure,
        budget=budget,
        unit=unit,
        rule=rule,
        widths=None if chosen is None else tuple(map(int, chosen)),
        target=target,
        fuse=fuse,
        calibration=calibration,
        compare=tuple(compare or ()),
        retain=retain,
        forget=forget,
        data=data,
        data_dir=data_dir,
        text=text,
        seed=seed,
    )
    _writable("out", out.parent)
    from .progress import run_with_bar

    _quiet()
    made = run_with_bar(f"allocate {recipe}", lambda progress: run(order, out, progress, _say), as_json)
    if as_json:
        print(json.dumps(made, indent=1))
    else:
        show_allocation(made, sys.stdout)
        _say(f"recipe: {made['out']}")


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="audit.json, or the directory it is in.")],
    html_out: Annotated[Path | None, typer.Option("--html", help="Write the page here.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Show an audit again: the table, and the page with --html."""
    from .compress.files import write_text
    from .report import html, markdown, read, terminal

    document = read(source)
    if html_out is not None:
        write_text(html_out, html(document))
        _say(f"report: {html_out}")
    if as_json:
        print(json.dumps(document, indent=1, ensure_ascii=False))
    elif as_markdown:
        print(markdown(document), end="")
    else:
        terminal(document, sys.stdout)


@app.command()
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
    from .compress.files import write_json

    if out is not None:
        _writable("out", out)
    if data in ("muse-news", "muse-books"):
        given = {"retain": retain, "people": people, "target": target, "pressures": pressures, "tasks": tasks}
        for name, value in (given | {"templates": templates, "perplexity": perplexity}).items():
            if value is not None:
                raise UsageError(f"{name}: goes with questions to forget and to keep, not with --data {data}")
        _there(model, oracle)
        from .evaluate import evaluate_muse

        _quiet()
        document, items = evaluate_muse(model, oracle, data, data_dir)
    else:
        from .corpus import load_corpus

        config = _audit_config(
            model=model,
            data=data,
            data_dir=data_dir,
            forget=forget,
            retain=retain,
            people=people,
            pressures=_names("pressures", pressures),
            templates=templates,
            perplexity=perplexity,
            seed=seed,
        )
        corpus = _usage(load_corpus, config)
        _there(model, target, oracle)
        from .bench.cell import Measures
        from .evaluate import Tasks
        from .evaluate import evaluate as run

        _quiet()
        measures = Measures(oracle, config.pressures, templates, perplexity, seed=seed)
        wanted = Tasks(_names("tasks", tasks) or (), include_path, limit)
        document, items = run(model, target, corpus, measures, wanted)
    if out is not None:
        write_json(out / "evaluation.json", document)
        write_json(out / "items.json", items)
    if as_json:
        print(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        from .report import show_evaluation

        show_evaluation(document, sys.stdout)


@app.command()
def logs(
    source: Annotated[Path, typer.Argument(help="A directory with evaluation logs of TOFU or open-unlearning.")],
    oracle: Annotated[Path | None, typer.Option(help="The same of a model retrained without the forget set.")] = None,
    as_json: Json = False,
) -> None:
    """Read evaluation logs of other tools: model utility under every truth ratio, forget quality."""
    from .bench.logs import read_logs
    from .bench.logs import report as aggregate

    found = _usage(aggregate, _usage(read_logs, source), _usage(read_logs, oracle) if oracle else None)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        from .report import show_logs

        show_logs(found, sys.stdout)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine and installation can do."""
    from .doctor import diagnose, show

    found = diagnose()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="A benchmark; without one, their names.")] = "",
    methods: Annotated[
        str | None, typer.Option(help="unlearning, ptq, w4a4: these methods only, comma-separated; mixed: measures.")
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(help="unlearning, evaluation: TOFU's files (default: the hub's); others: WikiText-2's."),
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(
            help="ptq: of quality, layers, recovery; w4a4: of quality, recovery; perp: of quality, cost, recovery; "
            "mixed: of quality, sources."
        ),
    ] = None,
    peers: Annotated[bool, typer.Option(help="ptq: beside others' tools, in environments of their own.")] = True,
    gib: Annotated[float | None, typer.Option(help="streaming: size of the model's weights.")] = None,
    limit_gib: Annotated[float | None, typer.Option(help="streaming: of the memory it may take.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run a benchmark: rows with their peers measured side by side, and checks that must hold."""
    from .bench.frame import BENCHES, markdown, run, show

    if not name and as_json:
        print(json.dumps({key: text for key, (_, text) in BENCHES.items()}, indent=1))
        return
    if not name:
        print("\n".join(f"{key}: {text}" for key, (_, text) in BENCHES.items()))
        return
    if name not in BENCHES:
        raise UsageError(f"bench: {name!r} is not one of {', '.join(BENCHES)}")
    from .unlearn.catalog import method_named

    chosen = _names("methods", methods)
    for method in (chosen or ()) if name == "unlearning" else ():
        _usage(method_named, method)
    asked: dict[str, object] = {
        "data_dir": data_dir,
        "methods": chosen,
        "parts": _names("parts", parts),
        "gib": gib,
        "limit_gib": limit_gib,
    }
    if not peers:
        asked["peers"] = False
    options = {key: value for key, value in asked.items() if value is not None}
    from .engine import environment

    _quiet()
    result = {"name": name, "environment": environment(), **_usage(run, name, seed, **options)}
    if as_json:
        print(json.dumps(result, indent=1))
    elif as_markdown:
        print(markdown(result["rows"]) + "\n\n" + markdown(result["checks"]))
    else:
        show(result)
    if not all(check["ok"] for check in result["checks"]):
        raise typer.Exit(ERROR)


def main() -> None:
    """Entry point: every error that a person can cause is one line on stderr."""
    # Threads that wait for each other spin for milliseconds by default: beside any other busy process a run of small
    # models becomes twenty times slower. A short spin costs nothing when the machine is free.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        _interrupted()
    except (UsageError, FileNotFoundError) as error:
        _fail(_text(error), USAGE)
    except (ValueError, OSError, ArithmeticError, RuntimeError, ImportError) as error:
        # Typer's own exceptions are told by their names: it carries its own copy of click or not, by version.
        if type(error).__name__ == "Abort":
            _interrupted()
        _fail(_text(error), ERROR)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _fail(_text(ValueError(error.format_message())), USAGE)
    if code == INTERRUPTED:  # newer typers turn an interrupt into its exit code themselves
        _interrupted()
    sys.exit(code if isinstance(code, int) else OK)


def _interrupted() -> NoReturn:
    kept = {
        "audit": "finished stages are kept, the same command goes on from there",
        "compress": "with --resume the same command goes on from the last part that is done",
        "unlearn": "no model was written; with --resume the same command goes on from the last checkpoint",
    }
    _fail(f"interrupted; {kept.get(''.join(sys.argv[1:2]), 'nothing was written')}", INTERRUPTED)


def _text(error: Exception) -> str:
    """The error's own words, on one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


def _fail(text: str, code: int) -> NoReturn:
    print(f"remanence: {text}", file=sys.stderr)
    sys.exit(code)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _quiet() -> None:
    """No bars and retries of other libraries between our lines; their errors come as ours."""
    import logging as standard

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    standard.getLogger("huggingface_hub").setLevel(standard.ERROR)


def _done(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print("\n".join(f"{key}: {value}" for key, value in result.items()))


def _default_data(model: str, retain: str | None) -> str | None:
    """The generated people for a demo model; nothing but forget and retain files otherwise."""
    return "people" if model == "demo" and retain is None else None


def _names(option: str, text: str | None) -> tuple[str, ...] | None:
    """The names in a comma-separated list; None when the option was not given."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UsageError(f"{option}: empty; give names, comma-separated, or leave the option out")
    return names


def _pairs(texts: list[str]) -> dict[str, str]:
    """NAME=DIR options as a mapping."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path:
            raise UsageError(f"unlearned: {text!r} is not of the form NAME=DIR")
        if name in pairs:
            raise UsageError(f"unlearned: the name {name!r} is given twice")
        pairs[name] = path
    return pairs


def _settings(texts: list[str]) -> dict[str, object]:
    """NAME=VALUE options as a mapping; values read as JSON where they are JSON, as text elsewhere."""
    values: dict[str, object] = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not name or not given:
            raise UsageError(f"set: {text!r} is not of the form NAME=VALUE")
        try:
            values[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            values[name.replace("-", "_")] = value
    return values


def _methods_table(methods: dict[str, dict[str, Any]]) -> str:
    """--list for people."""
    import io

    from rich.console import Console
    from rich.table import Table

    table = Table("method", "what it is", "paper", "needs", "defaults", show_lines=False)
    for name, entry in methods.items():
        defaults = ", ".join(f"{key} {value}" for key, value in entry["settings"].items())
        table.add_row(name, f"{entry['title']} ({entry['kind']})", entry["paper"], ", ".join(entry["needs"]), defaults)
    text = io.StringIO()
    Console(file=text, width=160 if not sys.stdout.isatty() else None).print(table)
    return text.getvalue().rstrip()


def _usage(call: Any, *args: Any, **kwargs: Any) -> Any:
    """`call`, whose ValueError is about what was asked for."""
    try:
        return call(*args, **kwargs)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _new(out: Path) -> None:
    """`out` can become a new directory, or UsageError."""
    _writable("out", out)
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"out: {out} exists and is not empty; choose another place")


def _there(*models: str | None) -> None:
    """The models given are directories, or can be hub ids; FileNotFoundError before torch loads."""
    from .compress.places import base_directory, local_model

    for model in models:
        if model is not None:
            local_model(base_directory(model))


def _writable(option: str, place: Path) -> None:
    """`place` is, or can become, a directory to write in, or UsageError; nothing is left behind by asking."""
    existing = place.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(f"{option}: {existing} is a file; a directory is needed")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UsageError(f"{option}: cannot write to {existing}: {error.strerror}") from None


def _audit_config(**values: Any) -> AuditConfig:
    from pydantic import ValidationError

    from .config import AuditConfig

    try:
        return AuditConfig(**{key: value for key, value in values.items() if value is not None or key == "data"})
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            text = problem["msg"].removeprefix("Value error, ")
            where = ".".join(map(str, problem["loc"]))
            lines.append(text if problem["type"] == "value_error" else f"{where}: {problem['input']!r}: {text}")
        raise UsageError("; ".join(lines)) from None
