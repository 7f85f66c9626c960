"""`remanence allocate`: how sensitive every layer is, which width it gets for that, and a recipe that says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import takewhile
from math import floor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .compress.places import local_model
from .compress.recipe import Recipe
from .compress.recipe_file import read_recipe
from .compress.spec import BITS, Calibration, parse_calibration
from .corpus import check_sources, rows_by_source
from .errors import UsageError
from .unlearn.data import QA, running_text

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .compress.sensitivity import Sensitivity
    from .compress.widths import Target

# bits: an average over weights, of codes alone (16 counts as the model's dtype does); stored-bits: with scales, zero
# points and padding; bytes: of these layers in the file; seconds: of these layers for one token, on this machine.
UNITS = ("bits", "stored-bits", "bytes", "seconds")
RULES = ("milp", "threshold")
# CPTQuant's own.
CLUSTERS = (16, 8, 4)
# Sequences that are measured on where nothing is asked for; some measures run backwards, which takes its time.
_SEQUENCES = 32
_ROWS = 40


@dataclass(frozen=True)
class Order:
    """For which model and recipe widths are chosen, by what, and within which budget; checked without torch.

    recipe        a quantizer's short name or YAML file: its groups, its scales; its own width is what the most get
    measure       of sensitivity (sensitivity.py)
    budget        in `unit`, of all layers that the recipe quantizes; None with the threshold rule, which has none
    widths        to choose from; None: all that the target runs, or 16, 8 and 4 with the threshold rule
    fuse          layers that engines join have one width
    calibration   of what it is measured on; None: the recipe's own, or so many rows to retain, or windows of the text
    compare       other such data, with which all is done again, to say how much hangs on the choice
    retain, forget, data, data_dir, text   as `remanence compress` has them
    Raises ValueError or FileNotFoundError that names the option.
    """

    model: str
    recipe: str
    measure: str = "tdmpq"
    budget: float | None = None
    unit: str = "bits"
    rule: str = "milp"
    widths: tuple[int, ...] | None = None
    target: str = "remanence"
    fuse: bool = True
    calibration: str | None = None
    compare: tuple[str, ...] = ()
    retain: str | None = None
    forget: str | None = None
    data: str | None = None
    data_dir: str | None = None
    text: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("unit", UNITS), ("rule", RULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.rule == "milp" and self.budget is None:
            raise ValueError("budget: missing; e.g. 4.0")
        if self.rule == "threshold" and self.budget is not None:
            raise ValueError(f"budget: {self.budget} does not go with the threshold rule, which knows none")
        if self.budget is not None and not 0 < self.budget < float("inf"):
            raise ValueError(f"budget: {self.budget} is not above 0 and finite")
        if self.widths is not None and (len(set(self.widths)) < 2 or not set(self.widths) <= {*BITS, 16}):
            raise ValueError(f"widths: {self.widths}; expected two at least of {', '.join(map(str, (*BITS, 16)))}")
        if self.data is not None and self.retain is not None:
            raise ValueError(f"retain: {self.retain} beside data: {self.data}, which has such rows; give one of them")
        if self.data is None and self.data_dir is not None:
            raise ValueError(f"data_dir: {self.data_dir} goes with --data tofu")
        if self.compare and self.measure == "random":
            raise ValueError("compare: random looks at no data")
        self.parsed()
        self.asked()
        asked = [self.asked(), *map(parse_calibration, self.compare)]
        if len(set(asked)) < len(asked):
            raise ValueError(f"compare: {', '.join(self.compare)}; expected other data than is measured on, each once")
        self._check_there(asked)
        local_model(self.model)

    def _check_there(self, asked: Sequence[Calibration | None]) -> None:
        """ValueError where it is to be measured on data of a kind that is not given."""
        files = {"retain": self.retain, "forget": self.forget, "text": self.text}
        for calibration in filter(None, asked):
            check_sources(calibration.sources, calibration, self.data, **files)
        if asked[0] is None and self.measure != "random" and not (self.retain or self.data or self.text):
            raise ValueError(f"calibration: {self.measure} needs data; give --text FILE, --retain FILE, or --data")

    def parsed(self) -> Recipe:
        recipe = read_recipe(self.recipe)
        if recipe.spec is None:
            raise UsageError(f"recipe: {self.recipe!r} has no integer weights; e.g. gptq-w4a16-g64")
        if recipe.widths:
            raise UsageError(f"recipe: {self.recipe!r} has widths already; give it without")
        return recipe

    def asked(self) -> Calibration | None:
        """What it is measured on, as far as it was said."""
        return self.parsed().calibration if self.calibration is None else parse_calibration(self.calibration)

    def rows(self) -> dict[str, Sequence[QA]]:
        """Rows by source."""
        return rows_by_source(self.data, self.data_dir, self.retain, self.forget, self.seed)


def allocate(
    order: Order,
    out: Path,
    progress: Callable[[int, int, str], None] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Carry out `order` into the new file `out`; what it returns is what `--json` prints.

    progress   is told of parts done, parts in all, and what is being done;  say: of what a person should know
    Raises UsageError, ValueError or FileNotFoundError for what cannot be, FileExistsError when `out` is there.
    """
    from .compress.allocate import total
    from .compress.checkpoint import has_experts, load_model, load_tokenizer, local_directory, skeleton
    from .compress.experts import unfuse_experts_
    from .compress.files import write_text
    from .compress.recipe_file import to_yaml
    from .compress.sensitivity import MEASURES, sensitivities
    from .compress.walk import fitting_linears
    from .compress.widths import DENSE_WIDTH, TARGETS, code_bits, fused, mixed, sizes, weights

    _vacant(out)
    for name, value, known in (("measure", order.measure, MEASURES), ("target", order.target, tuple(TARGETS))):
        if value not in known:
            raise UsageError(f"{name}: {value!r} is not one of {', '.join(known)}")
    recipe, target = order.parsed(), TARGETS[order.target]
    widths = _widths(order, recipe, target)
    directory = local_directory(order.model)
    skeleton(directory)  # refuses what is quantized already
    data = {} if order.measure == "random" else _data(order, directory, load_tokenizer(directory))
    model = load_model(directory)
    unfuse_experts_(model)
    if has_experts(model) and not target.mixture:
        raise UsageError(f"target: {order.target} reads experts of one width only; {target.why}")
    stored = sizes(model, recipe, widths)
    tied = fused(model, recipe, target.experts) if order.fuse else ()
    start = time.perf_counter()
    assert recipe.spec is not None
    narrow = sorted({*widths, recipe.spec.bits} - {DENSE_WIDTH})
    looks: dict[str, Sensitivity] = {}
    for name, batches in (data or {"": []}).items():
        looks[name] = found = sensitivities(model, order.measure, batches, recipe, narrow, order.seed, progress)
        if found.unseen:
            say(f"{len(found.unseen)} layers were reached by no token of {name}, first {found.unseen[0]}: not measured")
    measured_s = time.perf_counter() - start
    chosen_by = _choose(order, model, recipe, looks, widths, tied, say)
    (found, *_), ((chosen, used), *_) = looks.values(), chosen_by.values()
    made = mixed(recipe, chosen)
    bits, count = code_bits(model, recipe, widths), weights(model, recipe)
    _vacant(out)
    write_text(out, to_yaml(made))
    return {
        "recipe": made.name,
        "out": str(out),
        "measure": order.measure,
        "rule": order.rule,
        "target": order.target,
        "layers": [_layer(name, width, found, stored[name][width]) for name, width in chosen.items()],
        "cost": sum(found.costs[name][width] for name, width in chosen.items()),
        "average_bits": total(chosen, bits) / count,
        "average_stored_bits": 8 * total(chosen, stored) / count,
        "bytes": total(chosen, stored),
        "dense_bytes": sum(module.weight.nbytes for _, module in fitting_linears(model, recipe)),
        "unit": None if order.rule == "threshold" else order.unit,
        "allowed": order.budget,
        "used": used,
        "measured_s": measured_s,
        "data": next(iter(data), None),
        "compared": _compared(looks, {name: widths for name, (widths, _) in chosen_by.items()}),
    }


def _compared(looks: Mapping[str, Sensitivity], widths: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """Every two kinds of data, and how far what was measured on them agrees."""
    from .compress.agreement import agreements

    pairs = agreements({name: found.scores for name, found in looks.items()}, widths)
    return [{"data": list(pair), **asdict(agreement)} for pair, agreement in pairs.items()]


def _layer(name: str, width: int, found: Sensitivity, size: int) -> dict[str, Any]:
    scored = {"score": found.scores[name], "noise": found.noise.get(name), "cost": found.costs[name][width]}
    return {"name": name, **scored, "width": width, "bytes": size}


def _vacant(out: Path) -> None:
    if out.suffix not in (".yaml", ".yml"):
        raise UsageError(f"out: {out} does not end in .yaml or .yml, by which a recipe file is known")
    if out.exists():
        raise UsageError(f"out: {out} is there already; choose another place")


def _widths(order: Order, recipe: Recipe, target: Target) -> tuple[int, ...]:
    """What there is to choose from."""
    default = CLUSTERS if order.rule == "threshold" else target.widths
    widths = default if order.widths is None else tuple(sorted(set(order.widths)))
    for width in widths:
        if width not in target.widths:
            raise UsageError(f"widths: {width} is not run by {order.target}, which has {_listed(target.widths)}")
    if target.fused and not order.fuse:
        raise UsageError(f"fuse: {order.target} joins layers that share an input; they have one width there")
    if not target.asymmetric and recipe.spec is not None and not recipe.spec.symmetric:
        raise UsageError(f"target: {order.target} reads no asymmetric file of several widths; {target.why}")
    return widths


def _listed(widths: Collection[int]) -> str:
    return ", ".join(map(str, widths))


def _choose(
    order: Order,
    model: PreTrainedModel,
    recipe: Recipe,
    looks: Mapping[str, Sensitivity],
    widths: Sequence[int],
    tied: Sequence[Sequence[str]],
    say: Callable[[str], None],
) -> dict[str, tuple[dict[str, int], float | None]]:
    """By look: widths of all layers, and how much of the budget they take, as the order counts it."""
    from .compress import allocate as rules

    if order.rule == "threshold":
        return {name: (rules.together(rules.threshold(of.scores, widths), tied), None) for name, of in looks.items()}
    taken, per_unit = _budget(order.unit, model, recipe, widths, say)
    # As it was written: 4.35 times 100 is 435.
    room = floor(Fraction(str(order.budget)) * Fraction(per_unit))
    found: dict[str, tuple[dict[str, int], float | None]] = {}
    for name, of in looks.items():
        chosen = rules.allocate(of.costs, taken, room, tied, widths, order.unit, per_unit)
        found[name] = chosen, rules.total(chosen, taken) / per_unit
    return found


def _budget(
    unit: str, model: PreTrainedModel, recipe: Recipe, widths: Sequence[int], say: Callable[[str], None]
) -> tuple[Mapping[str, Mapping[int, int]], float]:
    """(what every layer takes at each width, in whole numbers; how many of them make one of the order's unit)."""
    from .compress.decode_time import decode_seconds, nanoseconds
    from .compress.widths import code_bits, sizes, weights

    if unit == "bits":
        return code_bits(model, recipe, widths), weights(model, recipe)
    if unit == "seconds":
        timings = decode_seconds(model, recipe, widths)
        spread = max(of.spread for row in timings.values() for of in row.values())
        say(f"decode times: interquartile ranges of at most {spread:.0%} of the median")
        return nanoseconds(timings), 1e9
    stored = sizes(model, recipe, widths)
    if unit == "bytes":
        return stored, 1
    bits = {name: {width: 8 * size for width, size in row.items()} for name, row in stored.items()}
    return bits, weights(model, recipe)


def _data(order: Order, directory: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Tensor]]:
    """What it is measured on, and what that is to be compared with, by name."""
    from transformers import AutoConfig

    from .compress.checkpoint import longest
    from .unlearn.calibration import calibration_batches, default_calibration
    from .unlearn.encode import Encoder

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    encoder = Encoder(tokenizer, longest(config))
    rows = order.rows()
    text = None if order.text is None else running_text(order.text)
    calibration = order.asked() or default_calibration(rows, text, encoder, _SEQUENCES)
    asked = {found.name: found for found in (calibration, *map(parse_calibration, order.compare))}
    return {name: calibration_batches(found, encoder, rows, text, order.seed) for name, found in asked.items()}


def show_allocation(made: dict[str, Any], file: IO[str]) -> None:
    """The table of layers, of many the most sensitive ones, and what they take together."""
    from rich.console import Console
    from rich.table import Table

    layers = made["layers"]
    shown = sorted(layers, key=lambda layer: -layer["score"])[:_ROWS] if len(layers) > _ROWS else layers
    title = f"layers: the {_ROWS} most sensitive of {len(layers)}" if len(layers) > _ROWS else "layers"
    heads = [layer["name"].split(".")[:-1] for layer in shown]
    shared = ".".join(same[0] for same in takewhile(lambda parts: len(set(parts)) == 1, zip(*heads)))
    table = Table(title=f"{title}, in {shared}" if shared else title, title_justify="left")
    noisy = any(layer["noise"] is not None for layer in shown)
    for name in ("layer", f"score ({made['measure']})", *(["noise"] if noisy else []), "width", "bytes"):
        table.add_column(name, justify="left" if name == "layer" else "right", overflow="fold")
    for layer in shown:
        noise = [] if not noisy else ["" if layer["noise"] is None else f"{layer['noise']:.1e}"]
        name = layer["name"].removeprefix(f"{shared}.")
        table.add_row(name, f"{layer['score']:.3e}", *noise, str(layer["width"]), f"{layer['bytes']:,}")
    console = Console(file=file)
    console.print(table)
    if made["compared"]:
        console.print(_comparison(made["compared"]))
    console.print(
        f"{made['bytes']:,} bytes in these layers ({made['dense_bytes']:,} dense), {made['average_bits']:.4f} bits a "
        f"weight, {made['average_stored_bits']:.4f} with scales and zero points",
        highlight=False,
        soft_wrap=True,
    )
    if made["unit"] is not None:
        console.print(
            f"budget: {made['used']:.9g} of {made['allowed']:.9g} {made['unit']} used", highlight=False, soft_wrap=True
        )


def _comparison(pairs: Sequence[Mapping[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title="how much hangs on the data", title_justify="left")
    for name in ("measured on", "and on"):
        table.add_column(name, overflow="fold")
    for name in ("rank correlation of scores", "layers of another width"):
        table.add_column(name, justify="right")
    for pair in pairs:
        rank = pair["rank_correlation"]
        table.add_row(*pair["data"], "" if rank is None else f"{rank:.3f}", f"{pair['other_width']:.0%}")
    return table
