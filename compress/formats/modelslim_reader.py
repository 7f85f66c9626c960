"""Reads a ModelSlim "ascendV1" directory from its description alone, to say what the numbers in it stand for.

Written against the layout as vllm-ascend reads it, apart from our writer and our layers: where the two agree, it is
about the files. What each type of layer has is in _PARTS; quant_model_description.json says of every tensor which type
it is of, and that is all that is looked at. No file is trusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_DESCRIPTION = "quant_model_description.json"
_INDEX = "quant_model_weights.safetensors.index.json"
_HEADING = ("version", "model_quant_type", "group_size", "metadata", "optional")
FLOAT = "FLOAT"
_WEIGHT = ("weight", "weight_scale", "weight_offset")
_MAP = ("left_trans", "right_trans", "clip_ratio")
_PARTS = {
    "W8A16": _WEIGHT,
    "W8A8_DYNAMIC": _WEIGHT,
    "W4A4_DYNAMIC": _WEIGHT,
    "W4A4_FLATQUANT_DYNAMIC": (*_WEIGHT, *_MAP),
}


@dataclass(frozen=True)
class Entry:
    """A layer, or a tensor of the type FLOAT.

    weight   what the integers stand for, float32 [N, K]; or the tensor, float32
    left [a, a], right [b, b], clip   the map in front of a layer, x' = x (left (x) right), and the share of each
             token's range that is kept; else None
    """

    type: str
    weight: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    clip: float | None = None

    def effective(self) -> Tensor:
        """[N, K] float32: the weight with the map in it, so that x W^T is what the layer gives but for rounding x."""
        if self.left is None or self.right is None:
            return self.weight
        W = self.weight.double().view(len(self.weight), len(self.left), len(self.right))  # [N, a, b]
        return (self.left.double() @ W @ self.right.double().T).flatten(1).float()


def read(directory: Path | str) -> dict[str, Entry]:
    """All entries by the name of their tensor; a layer's is that of its weight.

    Raises ValueError with one line for whatever is wrong: files outside the directory, tensors that are missing, twice
    there, unknown, misshapen or not finite, codes beyond their bits, types that are not known.
    """
    return dict(entries(directory))


def entries(directory: Path | str) -> Iterator[tuple[str, Entry]]:
    """As `read`, one after another: a large model's dense weights need not be there at once."""
    directory = Path(directory)
    description, places = _description(directory), _places(directory)
    _check_complete(directory, description, places)
    for name, kind in description.items():
        layer, _, part = name.rpartition(".")
        if kind == FLOAT and name in places:
            yield name, Entry(FLOAT, _finite(name, _tensor(directory, places, name)).float())
        elif part == "weight" and kind != FLOAT:
            tensors = {each: _tensor(directory, places, f"{layer}.{each}") for each in _PARTS[kind]}
            yield name, _layer(layer, kind, tensors)


def dense_model(directory: Path | str) -> PreTrainedModel:
    """A float32 model of transformers with every weight as it stands in the files, maps folded into those behind."""
    directory = Path(directory)
    # Whatever code the config names for attention: never fetched.
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    state = {name: entry.effective() for name, entry in entries(directory)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    once = {name for name, _ in model.named_parameters()}  # a tied head is not among them
    wrong = [*once.intersection(missing), *unexpected]
    if wrong:
        raise ValueError(f"{directory}: {min(wrong)}: not in both the model of config.json and the files")
    return model.eval()


def _description(directory: Path) -> dict[str, str]:
    """Name of a tensor -> its type."""
    path = directory / _DESCRIPTION
    found = _json(path)
    types = {name: kind for name, kind in found.items() if name not in _HEADING}
    for name, kind in types.items():
        if kind not in (FLOAT, *_PARTS):
            raise ValueError(f"{path}: {name}: {kind!r} is not one of {FLOAT}, {', '.join(_PARTS)}")
    return types


def _places(directory: Path) -> dict[str, Path]:
    """Name of a tensor -> its file, as both the index and the files have it."""
    path = directory / _INDEX
    index = _json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{path}: weight_map: {type(index).__name__}; expected an object with a file for every tensor")
    found: dict[str, Path] = {}
    files = {_inside(directory, path, file) for file in index.values()} | set(directory.glob("*.safetensors"))
    for file in sorted(files):
        for name in _names(file):
            if name in found:
                raise ValueError(f"{file}: {name}: is in {found[name].name} too; expected every tensor once")
            found[name] = file
    for name in sorted(index.keys() | found.keys()):
        listed, there = index.get(name), found[name].name if name in found else None
        if listed != there:
            raise ValueError(f"{path}: {name}: listed in {listed}, there in {there}; expected one place")
    return found


def _inside(directory: Path, index: Path, file: object) -> Path:
    """The file of that name in the directory itself, which no link leads out of."""
    if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
        raise ValueError(f"{index}: {file!r} is not the name of a .safetensors file in the directory")
    path = directory / file
    if not path.is_file() or path.resolve().parent != directory.resolve():
        raise ValueError(f"{index}: {file!r} is not a file in the directory")
    return path


def _check_complete(directory: Path, description: Mapping[str, str], places: Mapping[str, Path]) -> None:
    """Every tensor has a type, every type its tensors, and nothing else is there."""
    path = directory / _DESCRIPTION
    tied = {"lm_head.weight"} if _json(directory / "config.json").get("tie_word_embeddings") else set()
    for name in sorted(places.keys() - description.keys()):
        raise ValueError(f"{path}: {name}: has no type; expected one for every tensor in the files")
    for name in sorted(description.keys() - places.keys() - tied):
        raise ValueError(f"{path}: {name}: is described as {description[name]}, and missing from the files")
    for name, kind in description.items():
        layer, _, part = name.rpartition(".")
        if kind == FLOAT:
            continue
        if part not in _PARTS[kind]:
            raise ValueError(f"{path}: {name}: is no tensor of {kind}, which has {', '.join(_PARTS[kind])}")
        for other in _PARTS[kind]:
            if description.get(f"{layer}.{other}") != kind:
                found = description.get(f"{layer}.{other}", "missing")
                raise ValueError(f"{path}: {layer}.{other}: is {found}; expected {kind}, as {part} is")


def _layer(name: str, kind: str, tensors: Mapping[str, Tensor]) -> Entry:
    q, scale, offset = (tensors[part] for part in _WEIGHT)
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ValueError(f"{name}.weight: {q.dtype} {list(q.shape)}; expected torch.int8 [N, K] for {kind}")
    for part in ("weight_scale", "weight_offset"):
        _expect(f"{name}.{part}", tensors[part], (len(q), 1))
    if kind.startswith("W4") and q.numel() and (q.min() < -8 or q.max() > 7):
        raise ValueError(f"{name}.weight: codes {q.min()} .. {q.max()}; expected -8 .. 7 for {kind}")
    if kind != "W8A16" and offset.any():
        raise ValueError(f"{name}.weight_offset: not zero; expected zeros for {kind}, whose kernel takes none")
    weight = (q.float() + offset) * scale
    return Entry(kind, weight, *_map(name, tensors, q.shape[1])) if "left_trans" in tensors else Entry(kind, weight)


def _map(name: str, tensors: Mapping[str, Tensor], features: int) -> tuple[Tensor, Tensor, float]:
    a, b = _sizes(name, features)
    left = _expect(f"{name}.left_trans", tensors["left_trans"], (a, a))
    right = _expect(f"{name}.right_trans", tensors["right_trans"], (b, b))
    clip = _expect(f"{name}.clip_ratio", tensors["clip_ratio"], (1,)).item()
    if not 0 < clip <= 1:
        raise ValueError(f"{name}.clip_ratio: {clip:g}; expected above 0 and at most 1")
    return left, right, clip


def _sizes(name: str, features: int) -> tuple[int, int]:
    """(m - d, m + d) with m^2 - d^2 = features and m as small as can be, which is how the engine finds them."""
    if features % 4 == 2:
        raise ValueError(f"{name}: {features} inputs are no difference of two squares; expected those with a map")
    m = math.isqrt(features - 1) + 1
    while math.isqrt(m * m - features) ** 2 != m * m - features:
        m += 1
    d = math.isqrt(m * m - features)
    return m - d, m + d


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A finite float32 tensor of that shape."""
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}; expected torch.float32 {list(shape)}")
    return _finite(name, tensor)


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: {tensor.dtype}; expected a floating point dtype for {FLOAT}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: contains NaN or infinity")
    return tensor


def _names(file: Path) -> list[str]:
    """Of the tensors; safetensors itself keeps the last of two with one name."""
    try:
        with safe_open(file, "pt"), file.open("rb") as opened:
            header = opened.read(int.from_bytes(opened.read(8), "little"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
    return [name for name in _object(file, header.decode()) if name != "__metadata__"]


def _tensor(directory: Path, places: Mapping[str, Path], name: str) -> Tensor:
    try:
        with safe_open(places[name], "pt") as opened:
            return opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{directory}: {name}: cannot be read ({error})") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        return _object(path, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None


def _object(path: Path, text: str) -> dict[str, Any]:
    """A JSON object without a key twice, of which a parser would keep the last."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{path}: {key}: is there twice")
            found[key] = value
        return found

    try:
        value = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {type(value).__name__}; expected an object")
    return value
