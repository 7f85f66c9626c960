"""The command line: its verbs, and how it ends. Torch loads only inside a verb that needs it.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 error, 2 usage (an unknown name, missing or
unusable input), 3 `--fail-on` fired, 4 done in part (some cells failed), 130 interrupted.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from . import __version__
from .errors import ERROR, INTERRUPTED, OK, USAGE, UsageError
from .verbs.ascend import preflight
from .verbs.audit import audit
from .verbs.bench import bench, doctor
from .verbs.compress import allocate, compress
from .verbs.energy import energy
from .verbs.evaluate import evaluate, logs, report
from .verbs.exits import exit_app
from .verbs.export import export
from .verbs.profile import profile
from .verbs.unlearn import unlearn

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A model was made to forget: does the forgetting survive compression?",
    epilog="Exit codes: 0 done, 1 error, 2 usage (unknown name, missing or unusable input), 3 --fail-on fired, "
    "4 some cells failed, 130 interrupted.",
)
for _verb in (
    audit,
    unlearn,
    compress,
    allocate,
    export,
    report,
    evaluate,
    logs,
    preflight,
    profile,
    doctor,
    bench,
    energy,
):
    app.command()(_verb)
app.add_typer(exit_app, name="exit")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: every error that a person can cause is one line on stderr."""
    # Threads that wait for each other spin for milliseconds by default: beside any other busy process a run of small
    # models becomes twenty times slower. A short spin costs nothing when the machine is free.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    for stream in (sys.stdout, sys.stderr):  # a terminal without these letters costs letters, not the result
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
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
