"""An audit's document as one page of HTML: no script, nothing fetched, every text in it escaped.

The document's schema is in bench/document.py. The look is in templates/, the plots in plots.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .bench.verdict import KEPT, KNOWN, MARGIN
from .labels import (
    GLYPHS,
    VERDICTS,
    Row,
    duration,
    interval,
    listing,
    not_forgotten,
    number,
    role,
    significant,
    with_brief_recipes,
    word,
)
from .plots import USUAL, forest, scatter

# Control characters (but tab and newline), bidirectional overrides, characters without a shape, lone surrogates.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)
_CONTROLS = {
    "baseline": "no baseline was measured",
    "negative": "no oracle was given: the known share is not measured",
    "positive": "no positive control was measured",
}
# Longer answers are folded.
_LONG = 200


def html(document: dict[str, Any]) -> str:
    """The page; `document` as read from audit.json."""
    document = with_brief_recipes(clean(document))
    rows = _rows(document["cells"])
    recipes = list(dict.fromkeys(cell["recipe"] for cell in document["cells"]))
    page = environment().get_template("page.html")
    return page.render(
        document=document,
        headline=headline(rows, document["controls"]),
        controls=[(name, document["controls"].get(name), absent) for name, absent in _CONTROLS.items()],
        groups=[("audited", [r for r in rows if not r.role]), ("controls", [r for r in rows if r.role])],
        recipes=recipes,
        notes=_notes(rows),
        reasons=[(row.title, _reasons(row)) for row in rows],
        forest=forest(rows, recipes),
        scatter=scatter(rows, recipes),
        attacks=list(dict.fromkeys(name for cell in document["cells"] for name in cell.get("privacy") or ())),
        pressed=[(row, lines) for row in rows if (lines := _pressed(row))],
        examples=[_example(example, rows, recipes) for example in document["examples"]],
        constants={"margin": MARGIN, "known": KNOWN, "kept": KEPT, "long": _LONG, "usual": USUAL},
    )


def clean(value: Any) -> Any:
    """The same JSON value without characters that are not seen or that turn the text around them."""
    if isinstance(value, str):
        return _UNSEEN.sub("", value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return value


def environment() -> Environment:
    """What the templates are read in."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(duration=duration, interval=interval, number=number, significant=significant, word=word)
    made.tests["not_forgotten"] = not_forgotten
    made.globals["glyphs"] = GLYPHS
    return made


def _rows(cells: list[dict[str, Any]]) -> list[Row]:
    """Models in the document's order, those that are only audited first."""
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    parts: dict[str, str | None] = {}
    for cell in cells:
        by_name.setdefault(cell["method"], {})[cell["recipe"]] = cell
        parts[cell["method"]] = role(cell["method"], cell["control"])
    rows = [Row(name, parts[name], found) for name, found in by_name.items()]
    return sorted(rows, key=lambda row: row.role is not None)


def headline(rows: list[Row], controls: dict[str, Any]) -> str:
    """What the audit found, in a sentence; a failed control comes first."""
    broken = [name for name, control in controls.items() if not control["ok"]]
    found = _findings([row for row in rows if row.audited])
    if not broken:
        return found
    plural = "controls" if len(broken) > 1 else "control"
    return f"The {listing(broken)} {plural} failed, so this audit proves nothing. Its verdicts: {found}"


def _findings(audited: list[Row]) -> str:
    if not audited:
        return "No method was audited; only the controls were measured."
    rest = [row for row in audited if any(word(cell) != "held" for cell in row.cells.values())]
    held, total = len(audited) - len(rest), len(audited)
    if total == 1:
        return f"{audited[0].name} {'held under every recipe' if held else _clause(rest[0])}."
    if not rest:
        return f"{'Both' if total == 2 else f'All {total}'} audited methods held under every recipe."
    count = f"{held or 'None'} of {total} audited methods held under every recipe"
    if len(rest) <= 3:
        return "; ".join([count, *(f"{row.title} {_clause(row)}" for row in rest)]) + "."
    return f"{count}; {listing(_counts(rest))} under at least one."


def _counts(rows: list[Row]) -> list[str]:
    words = [{word(cell) for cell in row.cells.values()} for row in rows]
    counts = {name: sum(name in found for found in words) for name in (*VERDICTS[1:], "failed")}
    verbs = {"returned": "returned", "damaged": "damaged", "undecided": "undecided", "failed": "failed to run"}
    return [f"{count} {verbs[name]}" for name, count in counts.items() if count]


def _clause(row: Row) -> str:
    """What did not hold, for example: returned under a and b, was damaged under c."""
    verbs = {"returned": "returned", "damaged": "was damaged", "undecided": "stayed undecided", "failed": "failed"}
    parts = []
    for name, verb in verbs.items():
        under = [recipe for recipe, cell in row.cells.items() if word(cell) == name]
        if name == "undecided" and any(not_forgotten(row.cells[recipe]) for recipe in under):
            parts.append("had not forgotten even before compression")
        elif under:
            every = len(under) == len(row.cells) and len(under) > 1
            parts.append(f"{verb} under {'every recipe' if every else listing(under)}")
    return ", ".join(parts)


def _notes(rows: list[Row]) -> list[tuple[str, str]]:
    """(levels, models) for shares that are not taken between unlearned and baseline."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for levels in dict.fromkeys(c["recovered_share"]["of"] for c in row.cells.values() if "error" not in c):
            if levels != USUAL:
                found.setdefault(levels.replace("..", " and "), []).append(row.name)
    return [(levels, listing(names)) for levels, names in found.items()]


def _reasons(row: Row) -> list[tuple[str, str, list[str]]]:
    """(verdict, reason, recipes): like reasons together."""
    found: dict[tuple[str, str], list[str]] = {}
    for recipe, cell in row.cells.items():
        found.setdefault((word(cell), cell["reason"]), []).append(recipe)
    return [(*key, recipes) for key, recipes in found.items()]


def _pressed(row: Row) -> list[dict[str, Any]]:
    """A line for each recipe, pressure, measure and variant; reason: why there are no figures."""
    lines: list[dict[str, Any]] = []
    for recipe, cell in row.cells.items():
        for pressure, found in cell.get("pressures", {}).items():
            head = {"recipe": recipe, "pressure": pressure, "variant": ""}
            if isinstance(found, dict):
                lines.append({**head, "reason": found["error"]})
                continue
            for part in found:
                head["pressure"] = f"{part['name']}, {part['measure']}"
                for variant, figures in part["variants"].items():
                    figures = {"beyond": figures["beyond_oracle"], "before": part["before"], **figures}
                    lines.append({**head, **figures, "variant": variant, "reason": ""})
                lines += [{**head, "variant": v, "reason": f"skipped: {why}"} for v, why in part["skipped"].items()]
    return lines


def _example(example: dict[str, Any], rows: list[Row], recipes: list[str]) -> dict[str, Any]:
    """A question with the answers: target and oracle when dense, every other model under every recipe."""
    given = {(item["method"], item["recipe"]): item["answer"] for item in example["answers"]}
    truth = example["truth"]
    references = [row for row in rows if row.name in ("target", "oracle")]
    lines = [(row, _grouped(row.name, ["dense"], given, truth)) for row in references]
    lines += [(row, _grouped(row.name, recipes, given, truth)) for row in rows if row not in references]
    return {"question": example["question"], "truth": truth, "lines": [pair for pair in lines if pair[1]]}


def _grouped(name: str, recipes: list[str], given: dict[tuple[str, str], str], truth: str) -> list[dict[str, Any]]:
    """Answers of one model, identical ones together."""
    found: dict[str, list[str]] = {}
    for recipe in recipes:
        if (name, recipe) in given:
            found.setdefault(given[name, recipe], []).append(recipe)
    every = len(found) == 1 and len(recipes) > 1
    return [
        {
            "answer": answer,
            "recipes": ["every recipe"] if every else under,
            "true": answer.strip() == truth.strip(),
        }
        for answer, under in found.items()
    ]
