"""A profile as people read it: on the terminal, and as rows for a spreadsheet."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import IO, TYPE_CHECKING, Any

from .compress.recipe import brief
from .units import figure, percent, printable, si

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Record = Mapping[str, Any]

# Modules of a phase by name; the others are summed.
MODULES = 8
# Where nobody looks at a terminal: wide enough for the table of phases.
WIDTH = 150

CSV_COLUMNS = {
    "phase": "prefill or decode",
    "batch": "sequences at a time",
    "tokens": "new ones of each sequence in this pass",
    "context": "tokens of each sequence that were in the cache before",
    "module": "its place, * for the number of a layer; `total` is the whole pass, of which modules are parts",
    "count": "modules in that place",
    "kind": "linear, attention, experts, embedding, other",
    "compute": "numbers that its products are computed in",
    "flops": "operations; a product and its sum are two",
    "bytes": "that must be moved at least",
    "weight_bytes": "of those: weights",
    "kv_bytes": "of those: the cache of keys and values",
    "activation_bytes": "of those: inputs and outputs",
    "eager_bytes": "that are moved when every op reads its inputs and writes its outputs",
    "intensity": "operations per byte",
    "bound": "memory or compute: what the floor waits for",
    "floor_s": "seconds below which the device cannot do it",
    "estimate_s": "seconds expected, of what the device was seen to reach",
    "measured_s": "seconds measured",
    "spread": "interquartile range of the measured over their median",
    "attained": "floor over measured",
    "remainder_s": "measured seconds of the pass that lie in no module",
}


def show(profile: Record, file: IO[str] | None = None) -> None:
    """Print a profile; tables are as wide as the terminal, and columns without any value are left out."""
    from rich.console import Console

    file = file or sys.stdout
    console = Console(file=file, width=None if file.isatty() else WIDTH, highlight=False)
    _uncounted(console, profile["uncounted"])
    _device(console, profile["device"])
    _model(console, profile)
    _phases(console, profile["phases"])
    for phase in profile["phases"]:
        _modules(console, phase)
    _serving(console, profile)
    _depth(console, profile)
    _what_if(console, profile["what_if"])
    _listed(console, "assumed", profile["assumed"])
    _listed(console, "notes", profile["notes"])
    _uncounted(console, profile["uncounted"])
    if profile["recommendation"]:
        _say(console, "")
        _say(console, profile["recommendation"], "bold")


def csv_text(profile: Record) -> str:
    """The phases as RFC 4180: for each phase a row of the whole pass, whose module is `total`, and one of each module.

    Columns as in CSV_COLUMNS; seconds, bytes and operations, nothing where a value is not known.
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(CSV_COLUMNS)
    for phase in profile["phases"]:
        here = {key: phase[key] for key in ("phase", "batch", "tokens", "context")}
        for row in ({**phase, "module": "total"}, *({**module, **here} for module in phase["modules"])):
            writer.writerow([_cell(row.get(column)) for column in CSV_COLUMNS])
    return file.getvalue()


def _cell(value: object) -> object:
    """A text that a spreadsheet would compute is made one that it shows."""
    dangerous = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if dangerous else value


def source(rate: Record) -> str:
    """How far a ceiling can be trusted: "measured, spread 1.2 %", "quoted" (by others than the maker) or "sheet"."""
    if rate["measured"]:
        return "measured" if rate["spread"] is None else f"measured, spread {percent(rate['spread'])}"
    return "quoted" if rate["quoted"] else "sheet"


def operations(kind: str) -> str:
    """The unit of a ceiling: what integers do is not floating."""
    return "OP/s" if kind.startswith("int") else "FLOP/s"


def named(phase: Record) -> str:
    """A phase in words: "decode, batch 8, 1 token after 512"."""
    tokens = f"{phase['tokens']} token{'s' if phase['tokens'] != 1 else ''}"
    after = f" after {phase['context']}" if phase["context"] else ""
    return f"{phase['phase']}, batch {phase['batch']}, {tokens}{after}"


def _device(console: Console, device: Record) -> None:
    rates: list[tuple[str, str, Record]] = [("memory", "B/s", device["memory"])]
    rates += [(kind, operations(kind), rate) for kind, rate in device["compute"].items()]
    if device["launch"]:
        rates.append(("a small op", "s", device["launch"]))
    # Kinds of numbers with the same ceiling from the same source stand on one line.
    rows = []
    for (value, certainty, origin), same in groupby(rates, lambda each: _ceiling(*each[1:])):
        rows.append((", ".join(printable(name) for name, *_ in same), value, certainty, printable(origin)))
    facts = [
        f"{si(device['memory_bytes'], 'B')} memory" if device["memory_bytes"] else "",
        f"{si(device['cache_bytes'], 'B')} cache" if device["cache_bytes"] else "",
        f"2:4 weights x {figure(device['sparse24'])}" if (device["sparse24"] or 1) != 1 else "",
        f"{figure(device['watts'])} W" if device["watts"] else "",
        "ceilings are of dense products" if device["dense"] else "",
    ]
    _say(console, " · ".join([printable(device["device"]), *filter(None, facts)]), "bold")
    _print(console, ("ceiling", "!value", "~", "~where it comes from"), rows)


def _ceiling(unit: str, rate: Record) -> tuple[str, str, str]:
    return si(rate["value"], unit), source(rate), rate["source"]


def _model(console: Console, profile: Record) -> None:
    weights, recipe = profile["weights"], profile["recipe"]
    _say(console, "")
    _say(console, f"{profile['model']} {f'as {brief(recipe)}' if recipe else ''}".rstrip(), "bold")
    facts = [
        f"{printable(profile['architecture'])}, {profile['layers']} layers, {profile['dtype']}",
        f"{profile['parameters']:,} parameters",
        f"{si(weights['resident_bytes'], 'B')} of weights ({figure(weights['bits_per_parameter'])} bits per parameter)",
        f"{si(weights['read_bytes'], 'B')} read in a pass",
        f"{si(weights['checkpoint_bytes'], 'B')} on disk" if weights["checkpoint_bytes"] else "",
        f"{si(profile['kv_bytes_per_token'], 'B')} of KV cache per token",
    ]
    _say(console, " · ".join(filter(None, facts)))


def _phases(console: Console, phases: Sequence[Record]) -> None:
    """What each pass does, moves and takes."""
    heads = ("phase", "!batch", "!tokens", "!context", "!FLOP", "!weights", "!KV", "!activations", "?!op by op")
    rows = []
    for phase in phases:
        asked = (phase["phase"], *(str(phase[key]) for key in ("batch", "tokens", "context")))
        moved = (si(phase[key], "B") for key in ("weight_bytes", "kv_bytes", "activation_bytes", "eager_bytes"))
        takes = (si(phase[key], "s") for key in ("floor_s", "estimate_s", "measured_s"))
        reached = (percent(phase["spread"]), percent(phase["attained"]))
        rows.append((*asked, si(phase["flops"]), *moved, figure(phase["intensity"]), _bound(phase), *takes, *reached))
    _say(console, "")
    _say(console, "passes: what each does and moves at least (op by op: when every op reads and writes memory)", "bold")
    times = ("!FLOP/byte", "bound", "!floor", "!estimate", "!measured", "?!spread", "!attained")
    _print(console, (*heads, *times), rows, keys=4)
    for phase in phases:
        if phase["note"]:
            _say(console, f"{named(phase)}: {phase['note']}")


def _bound(phase: Record) -> str:
    """What the floor waits for; with its share where it is not nearly all."""
    memory = phase["memory_share"]
    if memory is None:
        return str(phase["bound"])
    share = memory if phase["bound"] == "memory" else 1 - memory
    return f"{phase['bound']} {100 * share:.0f} %" if share < 0.995 else str(phase["bound"])


def _modules(console: Console, phase: Record) -> None:
    """The modules that take longest, by the clock where it was read, else by the floor."""
    by = "measured_s" if any(module["measured_s"] for module in phase["modules"]) else "floor_s"
    modules = sorted(phase["modules"], key=lambda module: module[by] or 0.0, reverse=True)
    whole = phase[by] or sum(module[by] or 0.0 for module in modules)
    named_ones, others = modules[:MODULES], modules[MODULES:]
    if len(others) == 1:
        named_ones, others = modules, []
    rows: list[tuple[str, ...]] = [
        (
            printable(module["module"]),
            str(module["count"]),
            module["kind"],
            module["compute"] or "",
            si(module["flops"]),
            si(module["bytes"], "B"),
            module["bound"] or "",
            si(module["floor_s"], "s"),
            si(module["measured_s"], "s"),
            percent((module[by] or 0.0) / whole if whole else None),
            percent(module["attained"]),
        )
        for module in named_ones
    ]
    if others:
        sums = {key: sum(each[key] or 0 for each in others) for key in ("count", "flops", "bytes", "floor_s")}
        measured = [each["measured_s"] for each in others if each["measured_s"] is not None]
        took = sum(measured) if measured else None
        part = (took or 0.0) if by == "measured_s" else sums["floor_s"]
        row = (si(sums["flops"]), si(sums["bytes"], "B"), "", si(sums["floor_s"], "s"), si(took, "s"))
        rest = f"{len(others)} others"
        rows.append((rest, str(sums["count"]), "", "", *row, percent(part / whole if whole else None), ""))
    left = phase["remainder_s"]
    if left is not None:
        share = percent(left / whole if whole else None)
        rows.append(("in no module: launches, waiting", *[""] * 7, si(left, "s"), share, ""))
    heads = ("module", "!count", "?kind", "?numbers", "?!FLOP", "?!bytes", "?bound", "!floor", "!measured", "!share")
    _say(console, "")
    _say(console, f"{named(phase)}: shares of the {'measured time' if by == 'measured_s' else 'floor'}", "bold")
    _print(console, (*heads, "!attained"), rows)


def _serving(console: Console, profile: Record) -> None:
    rows = []
    for each in profile["serving"]:
        asked = [str(each[key]) for key in ("batch", "prompt", "new")]
        fits = {True: "yes", False: "NO"}.get(each["fits"], "")
        rows.append((*asked, "at least", *_served(each), si(each["memory_bytes"], "B"), fits, ""))
        if seen := each["measured"]:
            peak = si(seen["peak_memory_bytes"], "B")
            rows.append(("", "", "", "measured", *_served(seen), peak, "", percent(seen["spread"])))
    if rows:
        _say(console, "")
        _say(console, "serving: time to the first token, then for each", "bold")
        heads = ("!batch", "!prompt", "!new", "", "!first token", "!each token", "!tokens/s", "!memory", "fits")
        _print(console, (*heads, "?!spread"), rows, keys=4)
    capacity = profile["capacity"]
    if capacity and capacity["memory_bytes"]:
        _say(console, _capacity(capacity))


def _served(each: Record) -> tuple[str, ...]:
    return (si(each["ttft_s"], "s"), si(each["tpot_s"], "s"), figure(each["tokens_per_s"]))


def _capacity(capacity: Record) -> str:
    batch, context = capacity["largest_batch"], capacity["largest_context"]
    parts = []
    if batch is not None:
        parts.append(f"{batch:,} sequences of {capacity['at_context']:,} tokens")
    if context is not None:
        by = {"positions": "no more: the model's own positions end there", "memory": "memory ends there"}
        why = by.get(capacity["limited_by"], "")
        parts.append(f"{context:,} tokens at batch {capacity['at_batch']}{f' ({why})' if why else ''}")
    held = "; or ".join(parts) or "not even one sequence"
    return f"{si(capacity['memory_bytes'], 'B')} of memory hold {held}"


def _depth(console: Console, profile: Record) -> None:
    exits, draft = profile["exits"], profile["draft"]
    if exits:
        depth = f"after {figure(exits['mean_depth'])} of {exits['layers']} layers on average"
        _say(console, f"leaving {depth}: {si(exits['decode_s'], 's')} a token, x {figure(exits['speedup'])}")
    if draft:
        how = f"{draft['length']} tokens by {draft['layers']} layers, {percent(draft['accept'])} of them accepted"
        _say(console, f"drafting {how}: {si(draft['decode_s'], 's')} a token, x {figure(draft['speedup'])}")


def _what_if(console: Console, rows: Sequence[Record]) -> None:
    if rows:
        _say(console, "")
        _say(console, "what if: the floor under other recipes", "bold")
        figures = [
            (
                brief(row["recipe"]),
                *(si(row[key], "s") for key in ("prefill_s", "decode_s")),
                si(row["resident_bytes"], "B"),
            )
            for row in rows
        ]
        _print(console, ("recipe", "!prefill", "!decode step", "!weights"), figures)


def _uncounted(console: Console, ops: Sequence[Record]) -> None:
    """Before the figures and after them: without these ops they are too low."""
    if not ops:
        return
    _say(console, "")
    _say(console, "NOT COUNTED: nobody here knows what these ops cost; every figure is too low by them", "bold red")
    for op in ops:
        _say(console, f"  {op['op']} x {op['count']} in {', '.join(map(str, op['modules']))}", "red")
    _say(console, "")


def _listed(console: Console, title: str, texts: Iterable[str]) -> None:
    for number, text in enumerate(texts):
        if number == 0:
            _say(console, "")
            _say(console, title, "bold")
        _say(console, f"- {text}")


def _say(console: Console, text: str, style: str = "") -> None:
    """A line as it stands: what looks like markup in a name is a name."""
    from rich.text import Text

    console.print(Text(printable(text), style))


def _print(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]], keys: int = 1) -> None:
    """A table, or more of them below each other, each with the first `keys` columns, where one is too wide.

    heads   ! before one of figures; ? before one that is left out where there is no room (CSV has it); ~ before one of
            sentences, which are wrapped. Columns without any value are left out.
    """
    from rich.cells import cell_len

    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(cell_len(cell) for cell in (head.lstrip("?!~"), *cells)) for head, *cells in zip(heads, *rows)]
    widths = [min(width, 18) if head.startswith("~") else width for head, width in zip(heads, widths)]
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    first = [i for i in kept if i < keys]

    def fits(columns: Sequence[int]) -> bool:
        return sum(widths[i] + 2 for i in columns) - 2 <= console.width

    for i in reversed(kept.copy()):
        if heads[i].startswith("?") and not fits(kept):
            kept.remove(i)
    piece: list[int] = []
    for i in kept[len(first) :]:
        if piece and not fits([*first, *piece, i]):
            console.print(_table(heads, rows, [*first, *piece]))
            piece = []
        piece.append(i)
    if kept:
        console.print(_table(heads, rows, [*first, *piece]))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[int]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    for i in columns:
        side, wraps = "right" if "!" in heads[i][:2] else "left", i == 0 or heads[i].startswith("~")
        table.add_column(heads[i].lstrip("?!~"), justify=side, no_wrap=not wraps, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(row[i]) for i in columns))
    return table
