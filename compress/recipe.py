"""How a model is made smaller, under one name.

Short names: `dense` keeps the checkpoint as it is. `<method>-w<bits>a<bits>[-g<group size>][-asym]`, `gptq-w4a16-g128`,
or `rtn-w8a8` for one scale per output channel; `a16` says that activations stay in the model's own dtype and may be
left out when asking (`rtn-w4-g64`). `-plain` at the end: the grid of compressed-tensors without any search, as most
tools round. `bnb-<kind>[-dq]`, e.g. `bnb-nf4`: bitsandbytes' formats. `wanda-s50` sets that percentage of weights to 0,
`wanda-2:4` two of every four. What differs from a method's defaults follows: `gptq-w4a16-g128+act_order=static`,
`+ignore=lm_head|re:.*gate`, `+w8=down_proj` (other widths for some layers), `smoothquant-w8a8+a_dynamic=false` (`a_`
and a field of ActivationSpec), `gptq-w4a4+r_kind=hadamard` (Rotation), `gptq-w4a16-g64+p_sparsity=0.5` (PruneSpec),
`wanda-s50+t_groups=bias|norm` (Retrain), `gptq-w4a4+g_draws=3` (Gate), `dense+kv_bits=4` (KVSpec), and at the end the
calibration data: `@retain:64+forget:32`. A recipe's name is read back as the same recipe; the same can be written as
YAML (recipe_file.py). In a pattern, `%`, `+`, `@` and `|` are written as in a URL (`re:(q%7Ck)_proj`).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import MISSING, asdict, dataclass, fields, replace
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

from .knobs import CALIBRATED, METHODS, PLAIN, BnB, Options, check_options, make_options, with_fields
from .spec import (
    BITS,
    KV_BITS,
    ORDERS,
    PATTERNS,
    PRUNERS,
    ActivationSpec,
    Calibration,
    Gate,
    KVSpec,
    PruneSpec,
    QuantSpec,
    Retrain,
    Rotation,
    names,
    parse_calibration,
)

HEAD = ("lm_head",)
_TAKES_DATA = (*CALIBRATED, *(method for method in PRUNERS if PruneSpec(method=method).calibrated))
# Characters of a list of modules that people still read in a name.
_LONGEST = 40
_COMMON = (
    "dense",
    "rtn-w8a16",
    "rtn-w4a16",
    "rtn-w4a16-g64",
    "rtn-w4a16-g64-plain",
    "rtn-w4a16-g128",
    "rtn-w3a16-g64",
    "gptq-w4a16-g128",
    "gptq-w4a16-g64",
    "awq-w4a16-g128",
    "awq-w4a16-g128-asym",
    "hqq-w4a16-g64-asym",
    "signround-w4a16-g128",
    "rtn-w8a8",
    "smoothquant-w8a8",
    "rtn-w4a8-g128",
    "rtn-w4a4",
    "gptq-w4a4",
    "flatquant-w4a4",
    "bnb-nf4",
    "bnb-nf4-dq",
    "bnb-fp4",
    "bnb-int8",
    "magnitude-s30",
    "magnitude-s50",
    "magnitude-s70",
    "wanda-s50",
    "wanda-2:4",
    "sparsegpt-s50",
    "sparsegpt-2:4",
    "random-s50",
)


@dataclass(frozen=True)
class Recipe:
    """How a model is made smaller: a method, a format, and what stays as it is. spec None: no integer format.

    ignore    modules that stay dense, by full name, last part of it, or `re:` and a regular expression that matches the
              full name; "lm_head" is the output head whatever its name, dense by default as everywhere in the field
    widths    other widths than spec's for some layers: (bits, patterns as in `ignore`), narrowest first
    prune     what becomes zero; by `method` where nothing is quantized, else before that
    retrain   what is trained again after pruning, and before quantizing
    options   the method's knobs; None: its defaults
    calibration   the data that a calibrated method or pruner sees; None: left to the caller
    activation   how inputs of quantized layers are rounded too; None: they stay in the model's own dtype
    rotation     what is done to the dense model first
    gate         what is done about blocks whose error depends on which data they were calibrated on; None: nothing
    kv           how the model serves: with keys and values in few bits. No part of a checkpoint (kv_attach.py)
    """

    method: str
    spec: QuantSpec | None
    ignore: tuple[str, ...] = HEAD
    prune: PruneSpec | None = None
    options: Any = None
    calibration: Calibration | None = None
    activation: ActivationSpec | None = None
    rotation: Rotation | None = None
    kv: KVSpec | None = None
    gate: Gate | None = None
    widths: tuple[tuple[int, tuple[str, ...]], ...] = ()
    retrain: Retrain | None = None

    def __post_init__(self) -> None:
        self._check_pruning()
        if self.calibration is not None and not self.calibrated:
            raise ValueError(f"calibration: {self.method} takes no data; it goes with {', '.join(_TAKES_DATA)}")
        if self.widths:
            self._check_widths()
        if self.activation is not None:
            self._check_activation(self.activation)
        if self.rotation is not None:
            self._check_rotation(self.rotation)
        if self.gate is not None:
            self._check_gate(self.gate)
        if self.method not in METHODS:
            if self.options is not None:
                raise ValueError(f"options: {self.method} has none")
            return
        if (self.spec is None) != (self.method == "bnb"):
            raise ValueError(f"spec: {self.spec} does not go with {self.method}")
        if self.options is None:
            object.__setattr__(self, "options", METHODS[self.method]())
        if type(self.options) is not METHODS[self.method]:
            raise ValueError(f"options: {self.options} are not those of {self.method}")
        options: Any = self.options
        check_options(options)
        if self.spec is None:
            return
        if not self.spec.symmetric and options.scale == "signed-max":
            object.__setattr__(self, "options", options := replace(options, scale="minmax"))
        if self.spec.symmetric == (options.scale == "minmax"):
            sort = "symmetric" if self.spec.symmetric else "asymmetric"
            raise ValueError(f"scale: {options.scale} does not go with the {sort} format; asymmetric is minmax")

    def _check_pruning(self) -> None:
        prune = self.prune
        if prune is not None and self.spec is None and self.method != prune.method:
            raise ValueError(
                f"prune: {prune.method} does not go with {self.method}; integer weights may be pruned first"
            )
        if prune is None and self.method in PRUNERS:
            raise ValueError(f"prune: {self.method} without a sparsity")
        if self.retrain is not None and prune is None:
            raise ValueError(f"retrain: goes with pruning, and {self.method} prunes nothing; e.g. wanda-s50")
        if self.retrain is not None and self.retrain.by != "loss" and prune is not None and prune.order != ORDERS[0]:
            raise ValueError(
                f"t_by: {self.retrain.by} learns from the model as it was before pruning, which has not unlearned; "
                f"expected loss with order={prune.order}"
            )
        if prune is not None and self.rotation is not None:
            raise ValueError("rotation: of a pruned model leaves no weight zero; prune or rotate")
        if prune is not None and self.method == "flatquant":
            raise ValueError("prune: flatquant's maps leave no weight zero; prune or map")

    def _check_widths(self) -> None:
        if self.spec is None:
            raise ValueError(f"widths: go with integer weights, not with {self.method}")
        bits = [width for width, _ in self.widths]
        if bits != sorted(set(bits)) or not set(bits) <= set(BITS) - {self.spec.bits}:
            known = ", ".join(str(b) for b in BITS if b != self.spec.bits)
            raise ValueError(f"widths: {bits}; expected some of {known}, each once, narrowest first")
        for width, patterns in self.widths:
            if not patterns:
                raise ValueError(f"w{width}: names no layer")

    def _check_gate(self, gate: Gate) -> None:
        if not self.calibrated:
            raise ValueError(f"gate: is about calibration data, and {self.method} takes none")
        if self.spec is None:
            raise ValueError(f"gate: keeps blocks at 8 bits, and {self.method} quantizes nothing")
        inputs = 8 if self.activation is None else self.activation.bits
        if gate.action == "keep" and self.spec.bits == inputs == 8 and not self.widths:
            raise ValueError("g_action: all layers have 8 bits already; expected abort")

    def _check_activation(self, activation: ActivationSpec) -> None:
        if self.spec is None:
            raise ValueError(f"activation: {activation} goes with integer weights, not with {self.method}")
        if not activation.dynamic and self.method == "flatquant":
            raise ValueError("a_dynamic: flatquant learns with a grid per token; expected true")
        if self.method == "flatquant" and (activation.clip != 1 or activation.search):
            raise ValueError(
                f"a_{'search' if activation.search else 'clip'}: flatquant learns the clip itself; leave it out"
            )
        if activation.calibrated and not self.calibrated:
            wanted = "a_search" if activation.search else "a_dynamic" if not activation.dynamic else "a_fallback"
            raise ValueError(f"{wanted}: needs data, and {self.method} takes none; e.g. smoothquant-w8a8")

    def _check_rotation(self, rotation: Rotation) -> None:
        if self.spec is None:
            raise ValueError(f"rotation: goes with integer weights, not with {self.method}")
        if rotation.online and self.method == "flatquant":
            raise ValueError("r_online: flatquant puts a map of its own in front of every layer")
        if rotation.kind == "learned" and not self.calibrated:
            raise ValueError(f"r_kind: learned needs data, and {self.method} takes none; e.g. gptq-w4a4+r_kind=learned")
        if rotation.kind == "learned" and (self.activation is None or not self.activation.dynamic):
            raise ValueError("r_kind: learned goes with activations that are rounded token by token")

    @property
    def compresses(self) -> bool:
        """Whether it changes any weight."""
        return self.method != "dense"

    @property
    def calibrated(self) -> bool:
        """Whether its method needs data."""
        return self.method in CALIBRATED or (self.prune is not None and self.prune.calibrated)

    @property
    def before(self) -> Recipe:
        """What a model has come through when an audit's methods unlearn it: nothing, or pruning."""
        return DENSE if self.prune is None or self.prune.order == ORDERS[0] else self.pruning

    @property
    def pruning(self) -> Recipe:
        """What it makes zero, and nothing else that it does."""
        assert self.prune is not None
        calibration = self.calibration if self.prune.calibrated else None
        return Recipe(self.prune.method, None, self.ignore, self.prune, calibration=calibration)

    @property
    def at_once(self) -> Recipe:
        """The same for a model that has not been pruned before."""
        return self if self.prune is None else replace(self, prune=replace(self.prune, order=ORDERS[0]))

    def spec_of(self, name: str) -> QuantSpec:
        """The format of the layer of this full name; of several widths that mean it, the narrowest."""
        assert self.spec is not None
        for bits, patterns in self.widths:
            if any(names(pattern, name) for pattern in patterns):
                return replace(self.spec, bits=bits)
        return self.spec

    @property
    def name(self) -> str:
        knobs = "" if self.options is None else _spell_options(self)
        knobs += "".join(f"+w{bits}={'|'.join(map(_quoted, patterns))}" for bits, patterns in self.widths)
        if self.prune is not None:
            knobs += self._spell_pruning(self.prune)
        if self.retrain is not None:
            knobs += _spell_part("t_", self.retrain)
        if self.activation is not None:
            knobs += _spell_part("a_", self.activation, ActivationSpec(self.activation.bits))
        if self.rotation is not None:
            knobs += _spell_part("r_", self.rotation)
        if self.gate is not None:
            knobs += _spell_part("g_", self.gate)
        if self.kv is not None:
            knobs += _spell_part("kv_", self.kv)
        ignored = "" if self.ignore == HEAD else f"+ignore={'|'.join(map(_quoted, self.ignore))}"
        data = "" if self.calibration is None else f"@{self.calibration.name.replace(',', '+')}"
        return f"{self._base}{knobs}{ignored}{data}"

    def _spell_pruning(self, prune: PruneSpec) -> str:
        if self.spec is not None:
            return _spell_part("p_", prune)
        implied = asdict(replace(prune, scope=None, seed=0, order=ORDERS[0]))
        return _spell(asdict(prune), implied)

    @property
    def _base(self) -> str:
        if self.prune is not None and self.spec is None:
            return f"{self.method}-{self.prune.pattern or f's{self.prune.percent}'}"
        if self.method == "bnb":
            return f"bnb-{self.options.kind}{'-dq' if self.options.double_quant else ''}"
        if self.spec is None:
            return self.method
        group = "" if self.spec.group_size is None else f"-g{self.spec.group_size}"
        activation = 16 if self.activation is None else self.activation.bits
        return f"{self.method}-w{self.spec.bits}a{activation}{group}{'' if self.spec.symmetric else '-asym'}"

    def __str__(self) -> str:
        return brief(self.name)


DENSE = Recipe("dense", None)


def _spell_options(recipe: Recipe) -> str:
    """`+knob=value` of all that differs from what the base of the name implies."""
    if recipe.method == "bnb":
        return ""
    implied = asdict(METHODS[recipe.method]())
    if recipe.spec is not None and not recipe.spec.symmetric:
        implied["scale"] = "minmax"
    given = asdict(recipe.options)
    plain = PLAIN if implied["scale"] != "minmax" else PLAIN | {"scale": "minmax"}
    if given.items() >= plain.items():
        return "-plain" + _spell(given, implied | plain)
    return _spell(given, implied)


def _spell_part(prefix: str, part: Any, implied: Any = None) -> str:
    """The fields of a part of a recipe that say something, with a prefix: all but defaults, and the first one."""
    kinds = fields(part)
    given = {f"{prefix}{kind.name}": getattr(part, kind.name) for kind in kinds}
    if implied is not None:
        return _spell(given, {f"{prefix}{kind.name}": getattr(implied, kind.name) for kind in kinds})
    return _spell(
        given, {f"{prefix}{kind.name}": kind.default for kind in kinds[1:]} | {f"{prefix}{kinds[0].name}": None}
    )


def _part(given: dict[str, str], prefix: str) -> dict[str, object]:
    """What is given with this prefix, taken out."""
    return {name.removeprefix(prefix): _value(given.pop(name)) for name in list(given) if name.startswith(prefix)}


def _patterns(text: str) -> tuple[str, ...]:
    return tuple(unquote(part) for part in text.split("|") if part)


def _quoted(pattern: str) -> str:
    """A pattern as part of a name, without the characters that part names: `re:a+` is `re:a%2B` there."""
    return "".join(f"%{ord(letter):02X}" if letter in "%+@|" else letter for letter in pattern)


def _spell(given: dict[str, object], implied: dict[str, object]) -> str:
    return "".join(f"+{name}={str(value).lower()}" for name, value in given.items() if value != implied[name])


def brief(name: str) -> str:
    """A recipe's name as people read it: of a long list of modules, how many patterns it has, and four digits of its
    digest, so that two of them are not taken for one."""

    def shortened(found: re.Match[str]) -> str:
        knob, patterns = found.groups()
        if len(patterns) <= _LONGEST:
            return found[0]
        return f"+{knob}=<{patterns.count('|') + 1}:{sha256(patterns.encode()).hexdigest()[:4]}>"

    return re.sub(r"\+(w\d|ignore)=([^+@]*)", shortened, name)


def parse_recipe(name: str) -> Recipe:
    """A Recipe from its short name; ValueError suggests the nearest one."""
    plain, at, data = name.partition("@")
    base, *knobs = plain.split("+")
    try:
        recipe = _parse_base(base)
        if recipe is not None:
            given = dict(_knob(knob) for knob in knobs)
            if len(given) < len(knobs):
                twice = next(knob for i, knob in enumerate(knobs) if _knob(knob)[0] in {_knob(k)[0] for k in knobs[:i]})
                raise ValueError(f"{_knob(twice)[0]}: is there twice")
            ignore = given.pop("ignore", None)
            widths = tuple((bits, _patterns(given.pop(f"w{bits}"))) for bits in BITS if f"w{bits}" in given)
            rounding, turning, gate, keeping, pruning, again = (
                _part(given, prefix) for prefix in ("a_", "r_", "g_", "kv_", "p_", "t_")
            )
            if pruning and recipe.spec is None:
                raise ValueError(f"p_{next(iter(pruning))}: goes with integer weights; e.g. gptq-w4a16-g64")
            if rounding and recipe.activation is None:
                raise ValueError(f"a_{next(iter(rounding))}: {base} does not round activations; w8a8 or w4a4 does")
            if keeping and "bits" not in keeping:
                raise ValueError(f"kv_{next(iter(keeping))}: without kv_bits")
            prune = with_fields(PruneSpec(), pruning, "p_") if pruning else recipe.prune
            if recipe.prune is not None:
                own = [knob for knob in ("scope", "seed", "order") if knob in given]
                prune = with_fields(recipe.prune, {knob: _value(given.pop(knob)) for knob in own})
            options = _parse_options(recipe, given) if given else recipe.options
            return replace(
                recipe,
                ignore=recipe.ignore if ignore is None else _patterns(ignore),
                options=options,
                calibration=parse_calibration(data) if at else None,
                activation=with_fields(recipe.activation, rounding, "a_") if recipe.activation else None,
                rotation=with_fields(Rotation(), turning, "r_") if turning else None,
                gate=with_fields(Gate(), gate, "g_") if gate else None,
                prune=prune,
                retrain=with_fields(Retrain(), again, "t_") if again else None,
                widths=widths,
                kv=with_fields(KVSpec(KV_BITS[0]), keeping, "kv_") if keeping else None,
            )
    except ValueError as error:
        raise ValueError(f"recipe: {name!r}: {error}") from None
    near = difflib.get_close_matches(base, _COMMON, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"known forms: {', '.join(_COMMON)}"
    raise ValueError(f"recipe: {name!r} is unknown; {hint}")


def _parse_base(base: str) -> Recipe | None:
    if base == "dense":
        return DENSE
    quantizer = re.fullmatch(r"([a-z]+)-w(\d+)(?:a(\d+))?(?:-g(\d+))?(-asym)?(-plain)?", base)
    if quantizer and quantizer[1] in METHODS and quantizer[1] != "bnb":
        spec = QuantSpec(int(quantizer[2]), int(quantizer[4]) if quantizer[4] else None, not quantizer[5])
        options = make_options(quantizer[1], _plain(quantizer[1], spec)) if quantizer[6] else None
        bits = int(quantizer[3] or 16)
        return Recipe(quantizer[1], spec, options=options, activation=None if bits == 16 else ActivationSpec(bits))
    pruner = re.fullmatch(r"([a-z]+)-(?:s(\d+)|(\d+:\d+))", base)
    if pruner and pruner[1] in PRUNERS:
        if pruner[3] is not None and pruner[3] not in PATTERNS:
            raise ValueError(f"pattern: {pruner[3]} is not one of {', '.join(PATTERNS)}")
        prune = PruneSpec(0.5 if pruner[3] else int(pruner[2]) / 100, pruner[1], pruner[3])
        return Recipe(pruner[1], None, prune=prune)
    codebook = re.fullmatch(r"bnb-([a-z0-9]+)(-dq)?", base)
    if codebook:
        return Recipe("bnb", None, options=BnB(codebook[1], bool(codebook[2])))
    return None


def _plain(method: str, spec: QuantSpec) -> dict[str, object]:
    if "clip" not in {field.name for field in fields(METHODS[method])}:
        raise ValueError(f"plain: {method} finds a grid of its own; leave -plain out")
    return PLAIN if spec.symmetric else PLAIN | {"scale": "minmax"}


def _knob(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"{text!r} is not of the form knob=value")
    return name, value


def _parse_options(recipe: Recipe, given: dict[str, str]) -> Options:
    if recipe.options is None or recipe.method == "bnb":
        raise ValueError(f"{next(iter(given))}: {recipe.method} has no such knob")
    return make_options(recipe.method, {name: _value(text) for name, text in given.items()}, recipe.options)


def _value(text: str) -> object:
    if text in ("true", "false", "none"):
        # act_order has a choice of that name; for all other knobs `none` is the absence of a number.
        return {"true": True, "false": False, "none": "none"}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


PARTS: dict[str, Any] = {
    "activation": ActivationSpec(8),
    "rotation": Rotation(),
    "gate": Gate(),
    "kv": KVSpec(8),
    "prune": PruneSpec(),
    "retrain": Retrain(),
}


def make_part(name: str, given: dict[str, object]) -> Any:
    """The part of a recipe of this name from its fields; ValueError for an unknown or missing one, or a wrong type."""
    first = fields(PARTS[name])[0]
    if first.name not in given and first.default is MISSING:
        raise ValueError(f"{name}: {first.name}: missing")
    return with_fields(PARTS[name], given, f"{name}: ")
