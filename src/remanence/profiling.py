"""`remanence profile`: what a model asks of a device, what the device gives at most, and what it gave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .backends.device import parse_device
from .backends.sheets import Sheet, sheet_named
from .bench.roofline.load import Early, Load
from .compress.files import read_json, write_json, write_text
from .compress.places import base_directory, local_model
from .compress.recipe import Recipe
from .compress.recipe_file import read_recipe
from .config import default_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .backends.device import Device
    from .bench.roofline.bones import Bones

# Of the memory that is free, what a model that is to be measured may take.
_ROOM = 0.9


@dataclass(frozen=True)
class Order:
    """What is to be profiled, checked before torch loads.

    model      directory (of a dense model its config is enough for the analytic part) or hub id
    recipe     by which it would be compressed; None: as it is
    device     "cpu", "cuda:N", "npu:N", "auto": is measured; or a name of backends/sheets.py: is not
    measure    False: floors alone, on a device that is here too
    again      measure the device's ceilings anew
    Raises ValueError or FileNotFoundError that names the option.
    """

    model: str
    recipe: str | None = None
    load: Load = field(default_factory=Load)
    device: str = "auto"
    measure: bool = True
    again: bool = False
    early: Early = field(default_factory=Early)
    seed: int = 0

    def __post_init__(self) -> None:
        local_model(base_directory(self.model))
        if self.sheet is not None and self.again:
            raise ValueError(f"remeasure: {self.device} is a name; there is nothing here to be measured")
        self.parsed()

    @property
    def sheet(self) -> Sheet | None:
        """Of a device that is named; None: it is to be here."""
        try:
            parse_device(self.device)
        except ValueError:
            return _sheet(self.device)
        return None

    def parsed(self) -> Recipe | None:
        return None if self.recipe is None else read_recipe(self.recipe)


def _sheet(name: str) -> Sheet:
    try:
        return sheet_named(name)
    except ValueError as error:
        raise ValueError(f"{error}; nor cpu, cuda:N, npu:N or auto, devices that are here") from None


def parse_exits(text: str) -> dict[int, int]:
    """Tokens by depth: "4:30,8:70", or a file that `remanence exit generate --json` wrote, of which those of its policy
    are taken. ValueError for anything else."""
    if not Path(text).is_file():
        pairs = [part.partition(":")[::2] for part in text.split(",")]
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"exits: {text!r} has a depth twice")
        return _histogram(text, dict(pairs))
    rows = read_json(text).get("rows")
    found = [row["histogram"] for row in rows if "histogram" in row][1:] if isinstance(rows, list) else []
    if not found:
        raise ValueError(f"exits: {text} has no tokens by depth under a policy, as `exit generate --json` would say")
    return _histogram(text, found[0])


def _histogram(text: str, found: dict[str, Any]) -> dict[int, int]:
    try:
        return {int(depth): int(count) for depth, count in found.items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"exits: {text!r} is not of the form DEPTH:TOKENS,..., e.g. 4:30,8:70") from None


def parse_draft(text: str) -> tuple[int, int, float]:
    """LAYERS:LENGTH:ACCEPT, e.g. 8:4:0.8; ValueError for anything else."""
    parts = text.split(":")
    try:
        layers, length, accept = (kind(part) for kind, part in zip((int, int, float), parts, strict=True))
    except ValueError:
        raise ValueError(f"draft: {text!r} is not of the form LAYERS:LENGTH:ACCEPT, e.g. 8:4:0.8") from None
    return layers, length, accept


@dataclass(frozen=True)
class Prepared:
    """here: the device, where it is one; bones: of the model, as it would be compressed."""

    order: Order
    here: Device | None
    bones: Bones


def prepare(order: Order, say: Callable[[str], None] = print) -> Prepared:
    """Look for the device, and at the model. ValueError or FileNotFoundError where one is not there, cannot be read, or
    does not go with the recipe, the load or the exits."""
    from .backends.device import device
    from .bench.roofline.bones import Bones

    here = None if order.sheet is not None else device(order.device, say)
    bones = Bones.of(order.model, order.parsed())
    bones.check(order.load, order.early)
    return Prepared(order, here, bones)


def profile(prepared: Prepared, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The document of `remanence profile --json`. ValueError where the device is too busy for its ceilings to be
    measured, and where the model does what only a real run could."""
    from .bench.roofline.ceilings import ceilings_of
    from .bench.roofline.profile import add_measured
    from .bench.roofline.profile import profile as analytic
    from .machine import environment

    order, here = prepared.order, prepared.here
    if here is None:
        sheet = order.sheet
        assert sheet is not None
        ceilings = sheet.ceilings()
    else:
        ceilings = ceilings_of(here, default_cache(), order.again, say)
    document = analytic(prepared.bones, ceilings, order.load, order.early)
    document["device"] |= {"name": order.device, "kind": "sheet"}
    if here is not None:
        document["device"] |= {"name": here.name, "kind": here.kind}
        why_not = _unmeasured(order, here, document)
        if why_not:
            document["notes"].append(f"not measured: {why_not}")
        else:
            weights = document["weights"]["resident_bytes"]
            for measured in _measured(order, here, say):
                add_measured(document, measured, weights, ceilings.cache_bytes)
    return {**document, "environment": environment()}


def _unmeasured(order: Order, here: Device, document: dict[str, Any]) -> str | None:
    """Why nothing is measured; None: it can be."""
    if not order.measure:
        return "as asked"
    directory, recipe = local_model(base_directory(order.model)), order.parsed()
    if directory is not None and not any(directory.glob("*.safetensors")):
        return f"{directory} holds a config, and no weights"
    if recipe is not None and (recipe.calibrated or recipe.retrain is not None):
        return f"{recipe} looks at data; profile what `remanence compress` makes of it"
    dense = document["parameters"] * _itemsize(document["dtype"])
    needed = max(row["memory_bytes"] for row in document["serving"]) + (dense if recipe is not None else 0)
    free = here.free_memory()
    if needed > _ROOM * free:
        return f"it takes {needed / 2**30:.1f} GiB, and {here.name} has {free / 2**30:.1f} GiB free"
    return None


def _itemsize(dtype: str) -> int:
    import torch

    return getattr(torch, dtype).itemsize


def _measured(order: Order, here: Device, say: Callable[[str], None]) -> list[Any]:
    from .bench.roofline.measure import measure

    model = _loaded(order, here)
    found = []
    prompt, new = order.load.prompt, order.load.new
    for batch in order.load.batches:
        say(f"measuring batch {batch}: {prompt} tokens, then {new} more, on {here.name}")
        found.append(measure(model, here, batch, prompt, new, seed=order.seed))
    return found


def _loaded(order: Order, here: Device) -> PreTrainedModel:
    """The model on its device, compressed where asked."""
    from .compress.checkpoint import load_model
    from .compress.kv_attach import attach_kv_
    from .compress.linear import prepack_
    from .compress.sequential import compress_
    from .compress.sparse_linear import KERNELS, kernel_of, layers_24, swap_
    from .unlearn.adapters import with_adapter

    model, recipe = load_model(base_directory(order.model)), order.parsed()
    if recipe is not None and replace(recipe, kv=None).compresses:
        compress_(model, recipe)
    model = model.to(here.torch_device)  # type: ignore[arg-type]
    if recipe is not None and recipe.prune is not None and recipe.spec is None and recipe.prune.pattern == "2:4":
        swap_(model, list(layers_24(model)), KERNELS[kernel_of(here.torch_device)])
    prepack_(model)
    with_adapter(model, order.model)
    if recipe is not None and recipe.kv is not None:
        attach_kv_(model, recipe.kv)
    return model


def write(document: dict[str, Any], out: Path, say: Callable[[str], None] = print) -> None:
    """profile.json, profile.csv, and both pictures as SVG and, where that can be drawn here, PNG, in the directory
    `out`; each whole or not at all."""
    from .picture_files import check_place
    from .profile_plots import roofline_plot, save_plot, sweep_plot
    from .profile_show import csv_text

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "profile.json", document)
    write_text(out / "profile.csv", csv_text(document))
    kinds = [".svg", ".png"]
    try:
        check_place(out / "roofline.png")
    except (ValueError, ModuleNotFoundError) as error:
        say(f"out: no PNG: {error}")
        kinds.remove(".png")
    for name, draw in (("roofline", roofline_plot), ("sweep", sweep_plot)):
        for kind in kinds:
            save_plot(out / f"{name}{kind}", draw(document))
    say(f"out: {out}")
