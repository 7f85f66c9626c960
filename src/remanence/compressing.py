"""`remanence compress`: what it will take is said first, then every layer as it is done, then what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .compress.places import local_model
from .compress.recipe_file import read_recipe
from .compress.spec import Calibration, Recipe, parse_calibration
from .config import AuditConfig
from .corpus import load_corpus
from .errors import UsageError
from .unlearn.data import QA, read_rows, running_text

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

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"device: {self.device!r} is not one of auto, cpu")
        recipe = self.parsed()
        if not recipe.calibrated:
            for name in ("retain", "forget", "data", "text"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: {recipe} looks at no data; leave it out")
        local_model(self.model)

    def parsed(self) -> Recipe:
        """The recipe with its calibration data settled as far as it was asked for."""
        recipe = read_recipe(self.recipe)
        if not recipe.compresses:
            raise UsageError(f"recipe: {self.recipe!r} compresses nothing")
        if self.calibration is not None:
            recipe = replace(recipe, calibration=parse_calibration(self.calibration))
        return recipe

    def rows(self) -> dict[str, Sequence[QA]]:
        """Rows by source."""
        if self.data is not None:
            asked: dict[str, Any] = {"forget": self.forget} if self.forget else {}
            corpus = load_corpus(AuditConfig(data=self.data, data_dir=self.data_dir, seed=self.seed, **asked))
            return {"retain": corpus.retain, "forget": corpus.forget}
        return {name: read_rows(path) for name, path in (("retain", self.retain), ("forget", self.forget)) if path}


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
    from .compress.checkpoint import load_tokenizer, local_directory
    from .compress.footprint import Prediction, measure_machine, peak_rss, reset_peak
    from .compress.plan import plan
    from .compress.stream import Job, compress_streamed, compress_whole, unfinished

    recipe = order.parsed()
    directory = local_directory(order.model)
    if recipe.method == "bnb":
        if plan_only:
            raise UsageError(
                f"plan: {recipe} is written by bitsandbytes, with the whole model in memory; not predicted"
            )
        return compress_whole(directory, recipe, out)
    tokenizer = load_tokenizer(directory)
    recipe, batches = _data(order, recipe, directory, tokenizer)
    job = Job(directory, recipe, batches, _device(order.device))
    out.parent.mkdir(parents=True, exist_ok=True)
    predicted = plan(job, measure_machine(out.parent, job.model.dtype))
    say(f"{recipe} on {job.parameters:,} parameters: {predicted.text()}")
    if plan_only:
        return {"recipe": recipe.name, "plan": asdict(predicted)}
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
) -> tuple[Recipe, list[Tensor]]:
    """The recipe with its calibration settled, and the batches; none for a recipe that needs none."""
    if not recipe.calibrated:
        return recipe, []
    from transformers import AutoConfig

    from .compress.checkpoint import longest
    from .unlearn.calibration import DEFAULT, calibration_batches, default_calibration
    from .unlearn.encode import Encoder

    rows = order.rows()
    text = None if order.text is None else running_text(order.text)
    calibration = recipe.calibration
    if calibration is None:
        if rows.get("retain"):
            calibration = default_calibration(rows["retain"])
        elif text is not None:
            calibration = Calibration(text=DEFAULT)
        else:
            raise UsageError(f"calibration: {recipe} needs data; give --text FILE, --retain FILE, or --data")
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    encoder = Encoder(tokenizer, longest(config))
    return replace(recipe, calibration=calibration), calibration_batches(calibration, encoder, rows, text, order.seed)


def _device(asked: str) -> str:
    """The accelerator where there is one."""
    import torch

    if asked == "cpu" or not torch.accelerator.is_available():
        return "cpu"
    return str(torch.accelerator.current_accelerator())


def show_layers(layers: Sequence[dict[str, Any]], file: IO[str]) -> None:
    """The table of what became of every layer; of many the ones with the largest errors."""
    from rich.console import Console
    from rich.table import Table

    shown = sorted(layers, key=lambda layer: -(layer["error"] or 0))[:_ROWS] if len(layers) > _ROWS else layers
    title = f"layers: the {_ROWS} of {len(layers)} with the largest error" if len(layers) > _ROWS else "layers"
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "layer": lambda layer: layer["name"],
        "relative error": lambda layer: "" if layer["error"] is None else f"{layer['error']:.2e} of {layer['of']}",
        "damp": lambda layer: "" if layer["damp"] is None else f"{layer['damp']:g}",
        "seconds": lambda layer: f"{layer['seconds']:.2f}",
        "note": lambda layer: layer["note"],
    }
    table = Table(title=title, title_justify="left")
    filled = {name: text for name, text in columns.items() if any(text(layer) for layer in shown)}
    for name in filled:
        table.add_column(name, justify="left" if name in ("layer", "note") else "right", overflow="fold")
    for layer in shown:
        table.add_row(*(text(layer) for text in filled.values()))
    Console(file=file).print(table)
