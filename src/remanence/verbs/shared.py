"""What verbs share: options, how they speak, what is wrong with what they were given."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError

if TYPE_CHECKING:
    from ..config import AuditConfig

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Seed = Annotated[int, typer.Option(help="Decides data, training and intervals.")]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def quiet() -> None:
    """No bars and retries of other libraries between our lines; their errors come as ours."""
    import logging as standard

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    standard.getLogger("huggingface_hub").setLevel(standard.ERROR)


def done(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print("\n".join(f"{key}: {value}" for key, value in result.items()))


def names(option: str, text: str | None) -> tuple[str, ...] | None:
    """The names in a comma-separated list; None when the option was not given."""
    if text is None:
        return None
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise UsageError(f"{option}: empty; give names, comma-separated, or leave the option out")
    return found


def usage(call: Any, *args: Any, **kwargs: Any) -> Any:
    """`call`, whose ValueError is about what was asked for."""
    try:
        return call(*args, **kwargs)
    except ValueError as error:
        raise UsageError(str(error)) from None


def new(out: Path) -> None:
    """`out` can become a new directory, or UsageError."""
    writable("out", out)
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"out: {out} exists and is not empty; choose another place")


def there(*models: str | None) -> None:
    """The models given are directories, or can be hub ids; FileNotFoundError before torch loads."""
    from ..compress.places import base_directory, local_model

    for model in models:
        if model is not None:
            local_model(base_directory(model))


def writable(option: str, place: Path) -> None:
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


def default_data(model: str, retain: str | None) -> str | None:
    """The generated people for a demo model; nothing but forget and retain files otherwise."""
    return "people" if model == "demo" and retain is None else None


def audit_config(**values: Any) -> AuditConfig:
    from pydantic import ValidationError

    from ..config import AuditConfig

    try:
        return AuditConfig(**{key: value for key, value in values.items() if value is not None or key == "data"})
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            text = problem["msg"].removeprefix("Value error, ")
            where = ".".join(map(str, problem["loc"]))
            lines.append(text if problem["type"] == "value_error" else f"{where}: {problem['input']!r}: {text}")
        raise UsageError("; ".join(lines)) from None


def pairs(texts: list[str]) -> dict[str, str]:
    """NAME=DIR options as a mapping."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path:
            raise UsageError(f"unlearned: {text!r} is not of the form NAME=DIR")
        if name in found:
            raise UsageError(f"unlearned: the name {name!r} is given twice")
        found[name] = path
    return found
