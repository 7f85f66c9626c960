"""What a person sees while an audit runs: bars with an estimate on a terminal, plain lines in a log. On stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

Result = TypeVar("Result")


class Reporter(Protocol):
    """Where an audit tells what it does."""

    def plan(self, stages: int) -> None: ...
    def stage(self, label: str, cached: bool) -> AbstractContextManager[None]: ...
    def progress(self, done: int, total: int, text: str = "") -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """Says nothing."""

    def plan(self, stages: int) -> None:
        pass

    @contextmanager
    def stage(self, label: str, cached: bool) -> Iterator[None]:  # noqa: ARG002
        yield

    def progress(self, done: int, total: int, text: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Lines(Silent):
    """One line per stage, with its seconds: for logs."""

    def __init__(self) -> None:
        self.total, self.done = 1, 0

    def plan(self, stages: int) -> None:
        self.total, self.done = stages, 0

    @contextmanager
    def stage(self, label: str, cached: bool) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.done += 1
        spent = "cached" if cached else f"{time.monotonic() - start:.1f} s"
        print(f"[{self.done}/{self.total}] {label}: {spent}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Bars(Silent):
    """A bar for the whole audit and one for the stage in progress, each with its estimate; use as a context."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._all = self._bars.add_task("all", total=1, text="")
        self._one = self._bars.add_task("", total=None, visible=False, text="")

    def plan(self, stages: int) -> None:
        self._bars.update(self._all, total=stages, completed=0)

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextmanager
    def stage(self, label: str, cached: bool) -> Iterator[None]:
        self._bars.reset(self._one, description=label, total=None, visible=not cached, text="")
        yield
        self._bars.update(self._one, visible=False)
        self._bars.advance(self._all)

    def progress(self, done: int, total: int, text: str = "") -> None:
        self._bars.update(self._one, completed=done, total=total, text=text)

    def note(self, text: str) -> None:
        self._bars.console.print(text, markup=False)


def run_with_bar(label: str, work: Callable[[Callable[[int, int, str], None]], Result], silent: bool = False) -> Result:
    """`work(progress)` under one bar on a terminal, with one closing line in a log, or without a word."""
    if silent:
        return work(Silent().progress)
    if sys.stderr.isatty():
        with Bars() as bars, bars.stage(label, cached=False):
            return work(bars.progress)
    with Lines().stage(label, cached=False):
        return work(Silent().progress)
