"""`remanence exit ...` on the command line."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ERROR, VERDICT, UsageError
from .shared import Json, Seed, audit_config, default_data, done, names, new, pairs, quiet, say, usage, writable

exit_app = typer.Typer(
    no_args_is_help=True,
    help="Leave a model before its last layer: tune it for exits, choose when, serve it, audit what leaks.",
)
Model = Annotated[str, typer.Argument(help="A model directory or hub id.")]
Out = Annotated[Path, typer.Option(help="The new directory.")]
Text = Annotated[str | None, typer.Option(help="A file of running text.")]
Retain = Annotated[str | None, typer.Option(help="A file of rows to keep.")]
Data = Annotated[str | None, typer.Option(help="tofu or people: the retain rows of that data.")]
DataDir = Annotated[str | None, typer.Option(help="TOFU's files (default: from the hub).")]
Exits = Annotated[str | None, typer.Option(help="Depths to leave at, e.g. 4,8,12 (default: four, evenly spaced).")]
_SYNC = "row: each by itself; batch: all rows at once."


@exit_app.command()
def tune(
    model: Model,
    out: Out,
    text: Text = None,
    retain: Retain = None,
    data: Data = None,
    data_dir: DataDir = None,
    exits: Exits = None,
    weights: Annotated[
        str, typer.Option(help="Of the losses: geometric (GREEN-CODE's), calm, uniform, or plain, the control.")
    ] = "geometric",
    steps: Annotated[int, typer.Option(help="Number of updates.")] = 500,
    learning_rate: Annotated[float, typer.Option(help="Falls linearly to zero.")] = 1e-5,
    batch_size: Annotated[int, typer.Option(help="Rows of an update.")] = 16,
    micro_batch: Annotated[int | None, typer.Option(help="Rows of a pass (default: all).")] = None,
    lora_rank: Annotated[int, typer.Option(help="Above 0: LoRA, merged at the end.")] = 0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a model to answer at its exits, too, by its one head."""
    from ..exiting import Source, check_model, depths
    from ..exiting import tune as run

    source = usage(Source, text, retain, data, data_dir, seed)
    at = usage(depths, exits)
    check_model(model)
    new(out)
    from ..progress import run_with_bar

    quiet()
    settings = {"weights": weights, "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size}
    settings |= {"micro_batch": micro_batch, "lora_rank": lora_rank}
    made = run_with_bar("tune for exits", lambda progress: run(model, source, at, settings, out, progress), as_json)
    if as_json:
        print(json.dumps(made, indent=1))
        return
    _table(made["depths"], f"loss in nats per token, {made['held_out_tokens']} tokens held out")
    say(f"model: {made['out']}")


@exit_app.command()
def policy(
    model: Model,
    out: Out,
    policy: Annotated[
        str, typer.Option(help="probe, agent, saturation, confidence, schedule, fixed or full.")
    ] = "probe",
    exits: Exits = None,
    threshold: Annotated[float | None, typer.Option(help="Leave at this score; above 1: never.")] = None,
    decay: Annotated[float | None, typer.Option(help="CALM's threshold that falls with the position.")] = None,
    horizon: Annotated[int | None, typer.Option(help="Tokens over which it, or a schedule, falls.")] = None,
    temperature: Annotated[float | None, typer.Option(help="agent: of its two actions.")] = None,
    calibrate: Annotated[
        str | None, typer.Option(help="DELTA,EPSILON: choose the threshold with CALM's guarantee.")
    ] = None,
    exit_sync: Annotated[str, typer.Option(help=_SYNC)] = "row",
    text: Text = None,
    retain: Retain = None,
    data: Data = None,
    data_dir: DataDir = None,
    prompts: Annotated[int, typer.Option(min=2, help="Texts to learn and calibrate from.")] = 512,
    new_tokens: Annotated[int, typer.Option("--new", min=2, help="Tokens after each of them.")] = 15,
    ppo_steps: Annotated[int | None, typer.Option(help="agent: steps of PPO (default: the paper's 500,000).")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write a model with a policy of when to leave beside it, learned and calibrated where it needs to be."""
    from ..exiting import Source, Wanted, check_model, depths, make_policy

    given = any(value is not None for value in (text, retain, data, data_dir))
    source = usage(Source, text, retain, data, data_dir, seed) if given else None
    asked = {"threshold": threshold, "decay": decay, "horizon": horizon, "temperature": temperature}
    settings = {key: value for key, value in asked.items() if value is not None}
    if exit_sync not in ("row", "batch"):
        raise UsageError(f"exit-sync: {exit_sync!r} is not one of row, batch")
    if ppo_steps is not None and policy != "agent":
        raise UsageError(f"ppo-steps: {policy} is not trained by PPO")
    training = None if ppo_steps is None else {"steps": ppo_steps}
    wanted = Wanted(policy, usage(depths, exits), settings, prompts, new_tokens, usage(_pair, calibrate), training)
    check_model(model)
    new(out)
    from ..progress import run_with_bar

    quiet()
    made = run_with_bar(
        f"policy {policy}", lambda progress: make_policy(model, source, wanted, exit_sync, out, progress), as_json
    )
    if as_json:
        print(json.dumps(made, indent=1))
        return
    if made.get("exits_fitted"):
        _table(made["exits_fitted"], "the probe, by exit, on texts held out")
    if made.get("calibration"):
        _table(made["calibration"]["tested"], f"thresholds tested on {made['calibration']['texts']} texts")
    done({key: made[key] for key in ("policy", "exits", "threshold", "exit_sync", "out")}, False)


def _pair(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        delta, epsilon = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"calibrate: {text!r} is not DELTA,EPSILON, e.g. 0.1,0.05") from None
    return delta, epsilon


@exit_app.command()
def truncate(
    model: Model,
    depth: Annotated[int, typer.Option(help="Layers to keep.")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Write a model's first layers as an ordinary checkpoint, for engines that know no exits."""
    from ..exiting import check_model
    from ..exiting import truncate as run

    check_model(model)
    new(out)
    quiet()
    done(run(model, depth, out), as_json)


@exit_app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="What to go on from; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one a line.")] = None,
    new_tokens: Annotated[int, typer.Option("--new", min=2, help="Tokens after each.")] = 64,
    threshold: Annotated[float | None, typer.Option(help="In place of the stored one.")] = None,
    exit_sync: Annotated[str | None, typer.Option(help=_SYNC)] = None,
    draft: Annotated[
        int | None, typer.Option(help="Besides: so many layers draft, the rest verify; no token changes, but for ties.")
    ] = None,
    drafts: Annotated[int | None, typer.Option(min=1, help="With --draft: tokens at a time (default: 4).")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Rounds in which every way has its turn.")] = 3,
    energy: Annotated[bool, typer.Option("--energy", help="Joules for a token, too, where a counter is.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="With --energy: without a counter, time x a constant, labelled as that.")
    ] = False,
    window: Annotated[
        float | None, typer.Option(help="With --energy: seconds of a window at least (default: 5).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer prompts at full depth and with exits, in one run: texts, depths, tokens a second."""
    from ..exiting import Asked, Energy, check_model
    from ..exiting import generate as run

    if exit_sync not in (None, "row", "batch"):
        raise UsageError(f"exit-sync: {exit_sync!r} is not one of row, batch")
    asked = [*(prompt or [])]
    if prompts is not None:
        if not prompts.is_file():
            raise UsageError(f"prompts: {prompts}: no such file")
        asked += [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not asked:
        raise UsageError("prompt: missing; give --prompt TEXT or --prompts FILE")
    if (estimate or window is not None) and not energy:
        raise UsageError("estimate, window: go with --energy")
    check_model(model)
    quiet()
    order = Asked(asked, new_tokens, threshold, exit_sync, draft, drafts, repeats)
    made: dict[str, Any] = run(model, order, Energy(estimate, window or 5.0) if energy else None)
    if as_json:
        print(json.dumps(made, indent=1, ensure_ascii=False))
        return
    for row in made["texts"]:
        for name, text in row.items():
            print(f"{name}: {text}")
        print()
    _table([_short(row) for row in made["rows"]], f"batch {made['rows'][0]['batch']}, in turns in one run")
    if energy:
        from ..bench.exit_energy import rows

        _table(rows(made["energy"]), "joules for a token, in windows that take turns")
        for note in made["energy"]["notes"]:
            say(note)


@exit_app.command()
def audit(
    target: Annotated[str, typer.Option(help="A model directory, or demo: all models are made here.")] = "demo",
    unlearned: Annotated[list[str] | None, typer.Option(help="NAME=DIR, a model to audit; repeatable.")] = None,
    oracle: Annotated[str | None, typer.Option(help="A model retrained without the forget set.")] = None,
    data: Annotated[str | None, typer.Option(help="people, tofu, or a file with all rows.")] = None,
    data_dir: DataDir = None,
    forget: Annotated[str | None, typer.Option(help="forgetNN, or a file of rows.")] = None,
    retain: Retain = None,
    people: Annotated[int | None, typer.Option(help="How many people there are in the data.")] = None,
    exits: Exits = None,
    policies: Annotated[
        str | None, typer.Option(help="Of fixed, schedule, saturation, confidence, probe, agent (default: all but it).")
    ] = None,
    thresholds: Annotated[str | None, typer.Option(help="For all policies that have one, e.g. 0.5,0.9.")] = None,
    tune_steps: Annotated[
        int, typer.Option(help="Above 0: audit them tuned for exits, too; beside as many plain steps.")
    ] = 0,
    tune_learning_rate: Annotated[float, typer.Option(help="Of the tuning.")] = 3e-4,
    control: Annotated[bool, typer.Option(help="Make the positive control, unlearned in its last layers.")] = True,
    energy: Annotated[bool, typer.Option("--energy", help="Joules for a token, where a counter is.")] = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="With --energy: by time, labelled as that.")] = False,
    out: Annotated[Path, typer.Option(help="Where exits.json and exits.html go.")] = Path("remanence-exits"),
    fail_on: Annotated[str | None, typer.Option(help="Verdicts that give exit code 3, comma-separated.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Does leaving early bring back what was forgotten? Leak curves, and a verdict per policy."""
    from ..exit_auditing import METHODS, POLICIES, Order
    from ..exiting import depths
    from ..report import VERDICTS

    wanted = names("fail-on", fail_on) or ()
    for verdict in wanted:
        if verdict not in VERDICTS:
            raise UsageError(f"fail-on: {verdict!r} is not one of {', '.join(VERDICTS)}")
    demo = target == "demo"
    config = audit_config(
        model=target,
        data=data or default_data(target, retain),
        data_dir=data_dir,
        forget=forget or ("forget20" if demo else None),
        retain=retain,
        people=people or (40 if demo and data in (None, "people") else None),
        oracle=oracle,
        unlearned=pairs(unlearned or []),
        methods=METHODS if demo else (),
        seed=seed,
    )
    order = usage(
        Order,
        config,
        usage(depths, exits),
        names("policies", policies) or POLICIES,
        usage(_numbers, thresholds),
        tune_steps,
        tune_learning_rate,
        control,
        energy,
        estimate,
    )
    writable("out", out)
    _audited(order, out, wanted, as_json)


def _audited(order: Any, out: Path, fail_on: tuple[str, ...], as_json: bool) -> None:
    from ..compress.files import write_json, write_text
    from ..exit_auditing import audit_exits, verdicts
    from ..machine import device_for_run

    quiet()
    device_for_run("cpu", say)
    document = {**audit_exits(order, say), "command": shlex.join(["remanence", *sys.argv[1:]])}
    from ..exit_page import failed, headline, html

    write_json(out / "exits.json", document)
    write_text(out / "exits.html", html(document))
    if as_json:
        print(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        _show_audit(document)
        print(headline(document))
    for note in document["energy"]:
        say(note)
    say(f"report: {out / 'exits.html'}")
    if any(failed(state, found) for state, found in document["audits"].items()):
        raise typer.Exit(ERROR)
    if set(fail_on) & set(verdicts(document)):
        raise typer.Exit(VERDICT)


def _show_audit(document: dict[str, Any]) -> None:
    from ..bench.exit_audit import leak_rows, tuning_rows, verdict_rows

    for state, found in document["audits"].items():
        # What fits into a terminal; all of it is in exits.json.
        rows = [{k: v for k, v in row.items() if k not in _LEFT_OUT} for row in leak_rows(found)]
        _table(rows, f"leak curves, {state}")
        _table([{k: v for k, v in row.items() if k not in _LEFT_OUT} for row in verdict_rows(found)], state)
        if tuning_rows(found):
            _table(tuning_rows(found), "tuning alone, at full depth")


_LEFT_OUT = ("more_than_last", "kept", "rouge", "rest", "known", "j_per_token")


def _numbers(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"thresholds: {text!r} is not a list of numbers, e.g. 0.5,0.9") from None


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """What fits into a terminal."""
    way = f"{row['way']}, by {row['exit_sync']}" if row["exit_sync"] else row["way"]
    columns = {"depth": "mean_depth", "effective": "effective_depth", "accepted": "acceptance", "same": "agreement"}
    columns |= {"tokens/s": "tokens_per_s", "speed-up": "speedup"}
    return {"way": way, **{title: row[name] for title, name in columns.items()}}


def _table(rows: list[dict[str, Any]], title: str) -> None:
    from ..bench.frame import show

    sys.stdout.flush()
    show({"name": title, "rows": rows, "checks": []})
