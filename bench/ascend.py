"""What this machine can show of the Ascend backend, layer by layer: each part is a check.

operators   random layers along every route, on torch-npu's operators in plain torch, beside the CPU's kernels
device      small models on an emulated npu:0, `generate` included, beside the CPU
schemas     every call of an operator of torch-npu in this package, beside its schema
wheel       the real torch-npu over CANN libraries that do nothing: which kernels small models launch
On a machine with an NPU the kernels' own numbers are not looked at here: see the README.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..kernels.ascend import products
from ..kernels.ascend.routes import FUSED
from .ascend_layers import LIMITS, TURNED, cases, summary

Result = tuple[list[dict[str, Any]], list[dict[str, Any]]]
CHIPS = ("910B4", "910C", "310P")  # the other 910B take what the 910B4 takes
# Norm of the difference of logits, of their norm. In float32 the emulated device is the CPU to the last bits; in 16
# bits an output may be rounded to the number beside, and behind it an input to the code beside.
SAME = 1e-5
NEAR = {"a16": 0.02, "a8": 0.05}


def run(seed: int = 0, parts: Sequence[str] = ()) -> Result:
    """(rows, checks) of the parts asked for; all when empty. ValueError for one that is not in PARTS."""
    rows: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    for part in parts or PARTS:
        if part not in PARTS:
            raise ValueError(f"parts: {part!r} is not one of {', '.join(PARTS)}")
        more, others = PARTS[part](seed)
        rows += more
        checks += others
    return rows, checks


def _check(what: str, limit: Any, value: Any, ok: bool) -> dict[str, Any]:
    return {"what": what, "limit": limit, "value": value, "ok": ok}


def _not_run(part: str, reason: str) -> Result:
    """A part that this machine has not what it takes for: said, and nothing that failed."""
    return [], [_check(f"{part}: not run: {reason}", "", "not run", True)]


def operators(seed: int) -> Result:
    logging.getLogger(products.__name__).setLevel(logging.ERROR)  # each note once would be forty lines
    rows, checks = [], []
    for product in CHIPS:
        found = list(cases(seed, product))
        rows += summary(found, product)
        made = [case for case in found if "route" in case]
        beyond = sum(case["off"] > case["limit"] or not case["exact"] for case in made)
        what = f"operators: of {len(made)} layers on {product}, unlike the CPU's"
        checks.append(_check(what, 0, beyond, bool(made) and not beyond))
    return rows, checks


def device(_seed: int) -> Result:
    from .ascend_emulated import missing

    if reason := missing():
        return _not_run("device", reason)
    command = [sys.executable, "-m", f"{__package__}.ascend_models"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1]
        return [], [_check("device: models run on the emulated npu:0", "", said, False)]
    rows = json.loads(done.stdout.splitlines()[-1])
    return [_told(row) for row in rows], device_checks(rows)


def _told(row: dict[str, Any]) -> dict[str, Any]:
    operators_ = ", ".join(f"{name} {count}" for name, count in row["operators"].items())
    shown = ("model", "recipe", "dtype", "off", "layer_off", "tokens")
    return {key: row[key] for key in shown} | {"operators": operators_}


def device_checks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of what ascend_models.beside_the_cpu found."""
    wide = [row for row in rows if row["dtype"] == "float32"]
    checks = [
        _at_most("device: logits in float32, off by", wide, SAME),
        _none("device: tokens generated in float32 otherwise than on the CPU", sum(row["tokens"] for row in wide)),
        _none("device: models that are another one once back on the CPU", sum(not row["same"] for row in rows)),
    ]
    for inputs, limit in NEAR.items():
        of = [row for row in rows if row["dtype"] != "float32" and _inputs(row["recipe"]) == inputs]
        checks.append(_at_most(f"device: logits in 16 bits, {inputs}, off by", of, limit))
    turned = [row for row in rows if _turned(row)]
    for dtype, limit in {str(dtype).removeprefix("torch."): limit for dtype, limit in LIMITS.items()}.items():
        of = [row for row in rows if row["dtype"] == dtype and row not in turned]
        checks.append(
            _at_most(f"device: a layer's output in {dtype}, given the same input, off by", of, limit, "layer_off")
        )
    what = "device: a layer's output, its input turned in 16 bits and rounded to 4, off by"
    return [*checks, _at_most(what, turned, TURNED[4], "layer_off")]


def _inputs(recipe: str) -> str:
    return next(part for part in ("a16", "a8", "a4") if re.search(rf"w\d{part}", recipe))


def _turned(row: dict[str, Any]) -> bool:
    return any(operator in row["operators"] for operator in FUSED)


def _at_most(what: str, rows: Sequence[dict[str, Any]], limit: float, key: str = "off") -> dict[str, Any]:
    worst = max((row[key] for row in rows), default=float("nan"))
    return _check(what, limit, worst, worst <= limit)


def _none(what: str, count: int) -> dict[str, Any]:
    return _check(what, 0, count, not count)


def schemas(_seed: int) -> Result:
    from .ascend_calls import calls, wrong

    found = calls(Path(__file__).resolve().parents[1])
    problems = [problem for call in found if (problem := wrong(call))]
    rows = [{"operator": call.operator, "called in": call.place} for call in found]
    return rows, [_check(f"schemas: of {len(found)} calls, unlike the operator's", 0, len(problems), not problems)]


def wheel(_seed: int) -> Result:
    from . import ascend_dry_run as dry

    if reason := dry.missing():
        return _not_run("wheel", reason)
    rows: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    for chip in dry.RECIPES:
        try:
            found = dry.run(chip, cache())
        except RuntimeError as error:
            if "cannot be had" in str(error):
                return _not_run("wheel", str(error))
            return rows, [*checks, _check(f"wheel: {error}", "", "failed", False)]
        rows += [{"chip": chip, "model": model["phase"], "kernels": _kernels(model)} for model in found["models"]]
        checks += wheel_checks(chip, found)
    return rows, checks


def cache() -> Path:
    """Where wheel and stand-ins are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "remanence" / "ascend"


def _kernels(model: dict[str, Any]) -> str:
    """Those that multiply or round; the rest is torch's own."""
    told = ("Quant", "Quantize")
    return ", ".join(
        f"{name} {count}" for name, count in model["kernels"].items() if any(word in name for word in told)
    )


def wheel_checks(chip: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of what ascend_dry_run.run found."""
    from .ascend_dry_run import short_of

    short = [f"{model['phase']}: {lack}" for model in found["models"] for lack in short_of(model)]
    return [
        _check(f"wheel: {chip}: models that launch fewer kernels than layers", 0, "; ".join(short) or 0, not short),
        _none(f"wheel: {chip}: operators that went back to the CPU", len(found["fallen"])),
        _none(f"wheel: {chip}: words of int4 packed otherwise than by torch-npu", found["packing"]),
        _none(f"wheel: {chip}: operators whose schema is another", len(found["drift"])),
        _none(
            f"wheel: {chip}: groups that we refuse and it takes", sum(not said for said in found["refused"].values())
        ),
        _check(f"wheel: {chip}: known as", chip, found["info"]["name"], found["info"]["product"] is not None),
    ]


PARTS: dict[str, Callable[[int], Result]] = {
    "operators": operators,
    "device": device,
    "schemas": schemas,
    "wheel": wheel,
}
