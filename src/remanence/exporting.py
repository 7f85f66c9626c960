"""`remanence export`: a compressed checkpoint in the layout of another engine, read back before it is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compress.places import local_model
from .errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# By how much, relatively, a weight may be off whose scale was divided on the way: two roundings to float32.
_DIVIDED = 2.0**-22


@dataclass(frozen=True)
class Format:
    """How models get into one layout, and out again; all that is loaded for it is loaded when it is called.

    plan      of a model: has `types` of layers by name and `notes`; refuses a model that the layout cannot hold
    write     (plan, model, tokenizer, existing empty directory)
    compare   (plan, model, directory) -> largest difference of a number in the model and as it is read from there
    """

    plan: Callable[[PreTrainedModel], Any]
    write: Callable[[Any, PreTrainedModel, PreTrainedTokenizerBase, Path], None]
    compare: Callable[[Any, PreTrainedModel, Path], float]


def export(model: str, format: str, out: Path, verify: bool = True) -> dict[str, Any]:
    """Write the compressed checkpoint `model` to the new directory `out`; what it returns is what `--json` prints.

    Raises UsageError for a model that the format cannot hold, ValueError or FileNotFoundError for one that cannot be
    read, or is read back as something else, OSError when the disk is full; nothing is left at `out` then.
    """
    from .compress.checkpoint import load_model, load_tokenizer, weight_bytes
    from .compress.files import atomic_dir

    chosen = FORMATS[check_format(format)]
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    try:
        plan = chosen.plan(loaded)
    except ValueError as refusal:
        raise UsageError(str(refusal)) from None
    with atomic_dir(out) as work:
        chosen.write(plan, loaded, tokenizer, work)
        compared = {"max_abs_weight_difference": chosen.compare(plan, loaded, work)} if verify else {}
    return {
        "out": str(out),
        "format": format,
        "types": dict(Counter(plan.types.values())),
        "size_bytes": weight_bytes(out),
        "fp16_bytes": 2 * _parameters(loaded),
        **compared,
        "notes": plan.notes,
    }


def check_order(model: str, format: str) -> None:
    """ValueError or FileNotFoundError for what cannot be exported, as far as can be told without torch."""
    check_format(format)
    local_model(model)


def check_format(format: str) -> str:
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} is not one of {', '.join(FORMATS)}")
    return format


def _parameters(model: PreTrainedModel) -> int:
    """Numbers in the dense model; a tied head counts once."""
    from .compress.linear import QuantLinear

    packed = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    biases = sum(layer.bias.numel() for layer in packed if layer.bias is not None)
    weights = sum(layer.in_features * layer.out_features for layer in packed)
    return weights + biases + sum(parameter.numel() for parameter in model.parameters())


def _plan_modelslim(model: PreTrainedModel) -> Any:
    from .compress.formats.modelslim import plan

    return plan(model)


def _write_modelslim(plan: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, work: Path) -> None:
    from .compress.formats.modelslim import write

    write(plan, model, tokenizer, work)


def _compare_modelslim(plan: Any, model: PreTrainedModel, directory: Path) -> float:
    """Through a reader that knows neither our writer nor our layers."""
    from .compress.formats.modelslim_reader import FLOAT, entries

    missing = {f"{name}.weight" for name in plan.types} | {name for name, _ in model.named_parameters()}
    largest = 0.0
    for name, entry in entries(directory):
        missing.discard(name)
        parent, _, part = name.rpartition(".")
        module, by = model.get_submodule(parent), plan.divisors.get(parent)
        if entry.type != plan.types.get(parent, FLOAT) and part != "bias":
            raise ValueError(f"{name}: read back as {entry.type}; expected {plan.types.get(parent, FLOAT)}")
        compare = _float_difference if entry.type == FLOAT else _layer_difference
        largest = max(largest, compare(name, module, by, entry))
    if missing:
        raise ValueError(f"{min(missing)}: is not there when it is read back")
    return largest


def _float_difference(name: str, module: Any, by: Any, entry: Any) -> float:
    from .compress.diagonal import divided

    held = getattr(module, name.rpartition(".")[2]).detach()
    return _off(name, entry.weight, (held if by is None else divided(held, by)).float(), 0.0)


def _layer_difference(name: str, layer: Any, by: Any, entry: Any) -> float:
    if entry.left is not None:
        same = entry.left.equal(layer.transform.left) and entry.right.equal(layer.transform.right)
        if not same or abs(entry.clip - layer.activation.clip) > 2.0**-24:  # a float32 in the file
            raise ValueError(f"{name}: read back with another map or clip; expected the same one")
    if by is None:
        return _off(name, entry.weight, layer.dequantized(), 0.0)
    return _off(name, entry.weight, layer.dequantized() / by[:, None], _DIVIDED)


def _off(name: str, found: Tensor, expected: Tensor, relative: float) -> float:
    """Largest |difference|; ValueError for one beyond that part of a number."""
    off = (found - expected).abs()
    if bool((off > relative * expected.abs()).any()):
        raise ValueError(f"{name}: read back off by up to {float(off.max()):g}; expected the same numbers")
    return float(off.max())


FORMATS = {"modelslim": Format(_plan_modelslim, _write_modelslim, _compare_modelslim)}
