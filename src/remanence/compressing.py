"""`remanence compress`: what it will take is said first, then every layer as it is done, then what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .backends.device import parse_device
from .compress.places import local_model
from .compress.recipe import Recipe
from .compress.recipe_file import read_recipe
from .compress.spec import parse_calibration
from .corpus import check_sources, rows_by_source
from .errors import UsageError
from .unlearn.data import QA, running_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from .compress.sequential import LayerReport

# Rows of the table at the end that are shown one by one; of larger models the worst ones.
_ROWS = 20


@dataclass(frozen=True)
class Order:
    """What is to be compressed, how, and with which data; checked, and its texts read, without torch.

    recipe        a short name or a YAML file
    calibration   as in `--calibration`; None: 128 rows of the retain set, or 128 windows of the text
    retain, forget   files of rows; with `data` "tofu" or "people", forget is a split of it
    text          a file of running text
    sparse        what is pruned 2:4 is stored without its zeros
    Raises ValueError or FileNotFoundError that names the option.
    """

    model: str
    recipe: str
    calibration: str | None = None
    retain: str | None = None
    forget: str | None = None
    data: str | None = None
    data_dir: str | None = None
    text: str | None = None
    seed: int = 0
    device: str = "auto"
    sparse: bool = False

    def __post_init__(self) -> None:
        parse_device(self.device)
        recipe = self.parsed()
        if recipe.kv is not None:
            raise ValueError("kv: is how a model serves, no part of a checkpoint; an audit measures it")
        if recipe.before.compresses:
            raise ValueError("order: here nothing is unlearned; prune, then remanence unlearn --set keep_zeros=true")
        if not recipe.calibrated and recipe.retrain is None:
            for name in ("retain", "forget", "data", "data_dir", "text"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: {recipe} looks at no data; leave it out")
        self._check_there(recipe)
        if self.data is not None and self.retain is not None:
            raise ValueError(f"retain: {self.retain} beside data: {self.data}, which has such rows; give one of them")
        if self.data is None and self.data_dir is not None:
            raise ValueError(f"data_dir: {self.data_dir} goes with --data tofu")
        if self.text is not None and (self.data or self.retain or self.forget) and recipe.calibration is None:
            raise ValueError("text: beside rows; say how much of each, e.g. --calibration retain:64,text:64")
        local_model(self.model)

    def _check_there(self, recipe: Recipe) -> None:
        """ValueError where the recipe needs data of a kind that is not given."""
        wanted = set() if recipe.calibration is None else recipe.calibration.sources
        if recipe.retrain is not None:
            wanted.add(recipe.retrain.source)
        check_sources(wanted, recipe, self.data, retain=self.retain, forget=self.forget, text=self.text)
        if recipe.calibrated and recipe.calibration is None and not (self.retain or self.data or self.text):
            raise ValueError(f"calibration: {recipe} needs data; give --text FILE, --retain FILE, or --data")

    def parsed(self) -> Recipe:
        """The recipe with its calibration data settled as far as it was asked for."""
        recipe = read_recipe(self.recipe)
        if not recipe.compresses:
            raise UsageError(f"recipe: {self.recipe!r} compresses nothing")
        if self.calibration is not None and recipe.calibration is not None:
            raise UsageError(f"calibration: {self.calibration} beside the recipe's own, {recipe.calibration}")
        if self.calibration is not None:
            recipe = replace(recipe, calibration=parse_calibration(self.calibration))
        return recipe

    def rows(self) -> dict[str, Sequence[QA]]:
        """Rows by source."""
        return rows_by_source(self.data, self.data_dir, self.retain, self.forget, self.seed)


def compress(
    order: Order,
    out: Path,
    resume: bool = False,
    plan_only: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Carry out `order` into the new directory `out`; what it returns is what `--json` prints.

    resume     go on with what a killed run for `out` left
    plan_only  predict memory, disk and time, and do no more
    progress   is told of parts done, parts in all, and what is being done;  say: of what a person should know
    Raises UsageError, ValueError or FileNotFoundError for what cannot be, OSError when the disk is full.
    """
    from .backends.memory import peak_rss, reset_peak
    from .compress.checkpoint import load_tokenizer, local_directory
    from .compress.footprint import Prediction, measure_machine
    from .compress.plan import plan
    from .compress.stream import Job, compress_streamed, compress_whole, unfinished, whole

    recipe = order.parsed()
    directory = local_directory(order.model)
    if whole(recipe) and plan_only:
        raise UsageError(f"plan: {recipe} is made with the whole model in memory; not predicted")
    if whole(recipe) and resume:
        raise UsageError(f"resume: {recipe} is written in one go")
    device = _device(order.device, recipe, say)
    tokenizer = load_tokenizer(directory)
    recipe, batches, retraining = _data(order, recipe, directory, tokenizer)
    if whole(recipe):
        return compress_whole(directory, recipe, out, batches, retraining, order.sparse)
    job = Job(directory, recipe, batches, device, order.sparse)
    place = next(folder for folder in out.absolute().parents if folder.is_dir())
    predicted = plan(job, measure_machine(place, job.model.dtype))
    say(f"{recipe} on {job.parameters:,} parameters: {predicted.text()}")
    if plan_only:
        return {"recipe": recipe.name, "plan": asdict(predicted)}
    out.parent.mkdir(parents=True, exist_ok=True)
    reset_peak()
    start = time.perf_counter()
    told = _Telling(len(job.units), unfinished(out), progress or (lambda _done, _total, _text: None), say)
    made = compress_streamed(job, tokenizer, out, resume, told)
    actual = Prediction(peak_rss(), max(told.disk, made["size_bytes"]), time.perf_counter() - start)
    say(predicted.compared(actual))
    return {**made, "plan": asdict(predicted), "actual": asdict(actual)}


class _Telling:
    """Hears from the run, keeps the most that it had on disk, and tells whoever watches."""

    def __init__(
        self, parts: int, work: Path, progress: Callable[[int, int, str], None], say: Callable[[str], None]
    ) -> None:
        self.parts, self.work, self.progress, self.say = parts, work, progress, say
        self.done, self.disk = -1, 0

    def __call__(self, title: str, layer: LayerReport | None) -> None:
        self.disk = max(self.disk, sum(file.stat().st_size for file in self.work.glob("*") if file.is_file()))
        if layer is None:
            self.done += 1
            self.progress(self.done, self.parts, title)
            return
        error = "" if layer.error is None else f", relative error {layer.error:.2g} of its {layer.of}"
        self.progress(self.done, self.parts, f"{layer.name}{error}")
        if layer.note:
            self.say(f"{layer.name}: {layer.note}")


def _data(
    order: Order, recipe: Recipe, directory: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[Recipe, list[Tensor], list[Tensor]]:
    """The recipe with its calibration settled, the batches, and those for retraining; none where none are needed."""
    if not recipe.calibrated and recipe.retrain is None:
        return recipe, [], []
    from transformers import AutoConfig

    from .compress.checkpoint import longest
    from .unlearn.calibration import calibration_batches, default_calibration, retraining_batches
    from .unlearn.encode import Encoder

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    encoder = Encoder(tokenizer, longest(config))
    rows = order.rows()
    text = None if order.text is None else running_text(order.text)
    again = [] if recipe.retrain is None else retraining_batches(recipe.retrain, encoder, rows, text)
    if not recipe.calibrated:
        return recipe, [], again
    calibration = recipe.calibration or default_calibration(rows, text, encoder)
    batches = calibration_batches(calibration, encoder, rows, text, order.seed)
    return replace(recipe, calibration=calibration), batches, again


def _device(asked: str, recipe: Recipe, say: Callable[[str], None]) -> str:
    """The name of the device that does the work, which `say` is told."""
    from .compress.stream import whole
    from .machine import device_for_run

    if whole(recipe) and asked not in ("auto", "cpu"):
        raise UsageError(f"device: {recipe} is made on the CPU, with the whole model in memory; leave {asked} out")
    try:
        taken = device_for_run("cpu" if whole(recipe) else asked, say)
        if taken.float64:
            return taken.name
        if asked != "auto":
            raise UsageError(
                f"device: {asked} has no float64, in which layers are quantized; cpu: what it makes runs there"
            )
        say(f"layers are quantized in float64, which {taken.name} has not: on the CPU")
        return device_for_run("cpu", say).name
    except ValueError as error:
        raise UsageError(str(error)) from None


def show_layers(layers: Sequence[dict[str, Any]], file: IO[str]) -> None:
    """The table of what became of every layer; of many the ones with the largest errors."""
    from rich.console import Console
    from rich.table import Table

    # What was done to all of the model is no layer, and stands above them.
    whole = [layer for layer in layers if layer["of"] in ("logits", "loss")]
    layers = [layer for layer in layers if layer not in whole]
    worst = sorted(layers, key=lambda layer: -(layer["error"] or 0))[:_ROWS] if len(layers) > _ROWS else layers
    shown = [*whole, *worst]
    title = f"layers: the {_ROWS} of {len(layers)} with the largest error" if len(layers) > _ROWS else "layers"
    # Most names begin alike; what they share is said once.
    heads = [layer["name"].split(".")[:-1] for layer in worst]
    shared = ".".join(same[0] for same in takewhile(lambda parts: len(set(parts)) == 1, zip(*heads)))
    kinds = {layer["of"] for layer in shown if layer["error"] is not None}
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "layer": lambda layer: layer["name"].removeprefix(f"{shared}."),
        f"error of\n{kinds.pop()}" if len(kinds) == 1 else "error": lambda layer: _short(layer["error"]),
        "of": lambda layer: layer["of"] if len(kinds) > 1 and layer["error"] is not None else "",
        "error by\ninput": lambda layer: _short(layer["input_error"]),
        "bits": lambda layer: "" if layer["bits"] is None else f"w{layer['bits']}a{layer['input_bits']}",
        "spread": lambda layer: "" if layer["spread"] is None else f"{layer['spread']:.2f}",
        "damp": lambda layer: "" if layer["damp"] is None else f"{layer['damp']:g}",
        "seconds": lambda layer: f"{layer['seconds']:.2f}",
        "note": lambda layer: layer["note"],
    }
    table = Table(title=f"{title}, in {shared}" if shared else title, title_justify="left")
    filled = {name: text for name, text in columns.items() if any(text(layer) for layer in shown)}
    for name in filled:
        wide = name in ("layer", "note")
        justify: Any = "left" if wide or name == "of" else "right"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=not wide)
    for layer in shown:
        table.add_row(*(text(layer) for text in filled.values()))
    Console(file=file).print(table)


def _short(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"
