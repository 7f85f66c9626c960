"""Recipes as YAML: the same description as a short name, one field a line.

method: gptq
bits: 4
group_size: 128          # left out: one scale per output channel
symmetric: true
options: {act_order: static, damp: 0.05}
ignore: [lm_head, "re:.*router"]
calibration: retain:64,forget:32
activation: {bits: 8}    # left out: activations stay in the model's own dtype
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from .knobs import METHODS, make_options
from .recipe import HEAD, PARTS, Recipe, make_part, parse_recipe
from .spec import PRUNERS, QuantSpec, parse_calibration

_FIELDS = (
    "method",
    "bits",
    "group_size",
    "symmetric",
    "widths",
    "options",
    "ignore",
    "calibration",
    *PARTS,
)


class _Strict(yaml.SafeLoader):
    """Refuses a field that is there twice, of which the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise ValueError(f"{key}: is there twice")
        return super().construct_mapping(node, deep)


def read_recipe(text: str) -> Recipe:
    """A recipe from its short name, or from the YAML file that `text` names (it ends in .yaml or .yml).

    Raises ValueError that names file and field, FileNotFoundError for a file that is not there.
    """
    if not text.endswith((".yaml", ".yml")):
        return parse_recipe(text)
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    try:
        return from_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_yaml(text: str) -> Recipe:
    """A recipe from YAML; ValueError names the field that is unknown, missing or wrong."""
    try:
        given = yaml.load(text, _Strict)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ValueError("not a recipe: expected fields, e.g. `method: gptq` and `bits: 4`")
    for key in given:
        if key not in _FIELDS:
            raise ValueError(f"{key}: no field of a recipe; it has {', '.join(_FIELDS)}")
    method = _typed(given, "method", str, None)
    if method is None:
        raise ValueError("method: missing")
    known = {"dense", *METHODS, *PRUNERS}
    if method not in known:
        raise ValueError(f"method: {method!r} is not one of {', '.join(sorted(known))}")
    bits = _typed(given, "bits", int, None)
    if (method in METHODS and method != "bnb") != (bits is not None):
        raise ValueError(f"bits: {bits} does not go with {method}")
    spec = None if bits is None else QuantSpec(bits, _typed(given, "group_size", int, None), _symmetric(given))
    options = _typed(given, "options", dict, None)
    if options is not None and method not in METHODS:
        raise ValueError(f"options: {method} has none")
    calibration = _typed(given, "calibration", str, None)
    parts = {name: _typed(given, name, dict, None) for name in PARTS}
    if method in PRUNERS and parts["prune"] is not None:
        parts["prune"] = {"method": method, **parts["prune"]}
    return Recipe(
        method,
        spec,
        ignore=_ignore(given),
        widths=_widths(given),
        options=None if options is None else make_options(method, _with_scale(options, spec)),
        calibration=None if calibration is None else parse_calibration(calibration),
        **{name: make_part(name, part) for name, part in parts.items() if part is not None},
    )


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every knob spelled out; `from_yaml` gives it back."""
    values: dict[str, Any] = {"method": recipe.method}
    if recipe.spec is not None:
        values |= {"bits": recipe.spec.bits, "group_size": recipe.spec.group_size, "symmetric": recipe.spec.symmetric}
    if recipe.widths:
        values["widths"] = {bits: list(patterns) for bits, patterns in recipe.widths}
    if recipe.options is not None:
        values["options"] = {field.name: getattr(recipe.options, field.name) for field in fields(recipe.options)}
    values["ignore"] = list(recipe.ignore)
    if recipe.calibration is not None:
        values["calibration"] = recipe.calibration.name
    values |= {name: asdict(part) for name in PARTS if (part := getattr(recipe, name)) is not None}
    return yaml.safe_dump(values, sort_keys=False)


def _typed(given: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = given.get(key, default)
    if value is None or type(value) is kind:
        return value
    raise ValueError(f"{key}: {value!r} is not {kind.__name__}")


def _symmetric(given: dict[str, Any]) -> bool:
    value = _typed(given, "symmetric", bool, True)
    return True if value is None else value


def _with_scale(options: dict[str, Any], spec: QuantSpec | None) -> dict[str, Any]:
    """Knobs for an asymmetric format have its scale where none is given."""
    return options if spec is None or spec.symmetric or "scale" in options else options | {"scale": "minmax"}


def _widths(given: dict[str, Any]) -> tuple[tuple[int, tuple[str, ...]], ...]:
    value = _typed(given, "widths", dict, {})
    for bits, patterns in value.items():
        listed = isinstance(patterns, list) and all(isinstance(entry, str) for entry in patterns)
        if type(bits) is not int or not listed:
            raise ValueError(f"widths: {bits!r}: {patterns!r}; expected a width and a list of module names")
    return tuple((bits, tuple(patterns)) for bits, patterns in sorted(value.items()))


def _ignore(given: dict[str, Any]) -> tuple[str, ...]:
    value = given.get("ignore", list(HEAD))
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"ignore: {value!r} is not a list of module names")
    return tuple(value)
