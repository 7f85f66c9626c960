"""What the numbers mean (QuantSpec, ActivationSpec, PruneSpec), how they were chosen (Recipe). Small, frozen, hashable.

Short names: `dense` keeps the checkpoint as it is. `<method>-w<bits>a<bits>[-g<group size>][-asym]`, `gptq-w4a16-g128`,
or `rtn-w8a8` for one scale per output channel; `a16` says that activations stay in the model's own dtype and may be
left out when asking (`rtn-w4-g64`). `-plain` at the end: the grid of compressed-tensors without any search, as most
tools round. `bnb-<kind>[-dq]`, e.g. `bnb-nf4`: bitsandbytes' formats. `magnitude-s50` sets that percentage of weights
to 0. What differs from a method's defaults follows: `gptq-w4a16-g128+act_order=static`, `+ignore=lm_head|re:.*gate`,
`smoothquant-w8a8+a_dynamic=false` (`a_` and a field of ActivationSpec), `gptq-w4a4+r_kind=hadamard` (Rotation),
`gptq-w4a4+g_draws=3` (Gate), `dense+kv_bits=4` (KVSpec), and at the end the calibration data:
`@retain:64+forget:32`. A recipe's name is read back as the same recipe; the same can be written as YAML
(recipe_file.py). In a pattern, `%`, `+`, `@` and `|` are written as in a URL (`re:(q%7Ck)_proj`).
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any
from urllib.parse import unquote

BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (4, 8)
KV_BITS = (8, 4, 2)
ROTATIONS = ("hadamard", "orthogonal", "learned")
KEY_SCALES = ("channel", "token")
Tile = tuple[int, int]
SCALES = ("signed-max", "absmax", "minmax")
ACT_ORDERS = ("gar", "static", "none")
BNB_KINDS = ("nf4", "fp4", "int8")
EQUALIZATIONS = ("power", "log")
HEAD = ("lm_head",)


@dataclass(frozen=True)
class QuantSpec:
    """A weight format: integers of `bits` bits, one scale per `group_size` input features.

    group_size None: one scale per output channel. w = (code - zero) * scale, codes 0 .. 2^bits - 1. symmetric: the zero
    point is 2^(bits-1) and not stored; else one integer zero point per group, 0 .. 2^bits - 1.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits: {self.bits} is not one of {', '.join(map(str, BITS))}")
        if self.group_size is not None and (self.group_size < 16 or self.group_size % 8):
            raise ValueError(f"group_size: {self.group_size} is not a multiple of 8, at least 16")

    @property
    def granularity(self) -> str:
        """ "group" or "channel": what shares a scale."""
        return "channel" if self.group_size is None else "group"

    def groups(self, features: int) -> int:
        """Number of groups along `features` input features; ValueError when they do not divide."""
        if self.group_size is None:
            return 1
        if features % self.group_size:
            raise ValueError(f"{features} input features do not divide into groups of {self.group_size}")
        return features // self.group_size


@dataclass(frozen=True)
class ActivationSpec:
    """How a layer's input becomes integers of `bits` bits, on the grid of compressed-tensors.

    symmetric    zero is code 0 and the largest |x| is half the range; else from the least to the largest x, 0 included
    dynamic      one scale per token, made as it comes; False: one per layer, from the calibration data
    clip         share of the range that is kept
    search       find the layer's clip on the calibration data, from 1 down to 0.5, by the squared error of its output
    fallback     a layer whose output is off by more than this relative squared error, for its input's rounding alone on
                 the calibration data, keeps 8 bits; None: none does
    """

    bits: int
    symmetric: bool = True
    dynamic: bool = True
    clip: float = 1.0
    search: bool = False
    fallback: float | None = None

    def __post_init__(self) -> None:
        if self.bits not in ACTIVATION_BITS:
            raise ValueError(
                f"activation bits: {self.bits} is not one of {', '.join(map(str, ACTIVATION_BITS))}, or 16"
            )
        if not 0 < self.clip <= 1:
            raise ValueError(f"a_clip: {self.clip} is not above 0 and at most 1")
        if self.fallback is not None and not self.fallback > 0:
            raise ValueError(f"a_fallback: {self.fallback} is not above 0")
        if self.search and self.clip != 1:
            raise ValueError(f"a_clip: {self.clip} is given, and a_search would find another")

    @property
    def calibrated(self) -> bool:
        """Whether it needs data."""
        return not self.dynamic or self.search or self.fallback is not None


@dataclass(frozen=True)
class KVSpec:
    """How a KV cache is kept.

    bits         8, 4 or 2
    group_size   tokens in a chunk, which becomes integers at once and shares a scale per key channel; also the channels
                 of a token's value that share a scale, where a head has as many, else all of the head's
    residual     newest tokens that stay in full precision, as the query sees it, its own among them
    pre_bias     what the bias of the keys' projection adds is taken out before keys are rounded, and added afterwards
    keys         what of a chunk's keys shares a scale: a channel (KIVI, KVQuant), or, as in values, a token (QuaRot)
    rotate       queries and keys are turned by a Hadamard matrix first (QuaRot's R3), after their positions have turned
                 them: outlier channels of keys are spread, which helps scales per token
    """

    bits: int
    group_size: int = 32
    residual: int = 32
    pre_bias: bool = False
    keys: str = "channel"
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.bits not in KV_BITS:
            raise ValueError(f"kv bits: {self.bits} is not one of {', '.join(map(str, KV_BITS))}")
        if self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"kv group_size: {self.group_size} is not a multiple of 8, at least 8")
        if self.residual < 0:
            raise ValueError(f"kv residual: {self.residual} is negative; expected a number of tokens")
        if self.keys not in KEY_SCALES:
            raise ValueError(f"kv keys: {self.keys!r} is not one of {', '.join(KEY_SCALES)}")

    def key_tile(self, channels: int) -> Tile:
        """Tokens x channels that share a scale in keys; ValueError when `channels` do not divide."""
        return (self.group_size, 1) if self.keys == "channel" else self.value_tile(channels)

    def value_tile(self, channels: int) -> Tile:
        """Tokens x channels that share a scale in values; ValueError when `channels` do not divide."""
        width = min(self.group_size, channels)
        if channels % width:
            raise ValueError(f"kv group_size: the {channels} channels of a head do not divide into groups of {width}")
        return 1, width


@dataclass(frozen=True)
class Rotation:
    """The residual stream and the heads' values are rotated before anything is rounded (rotation.py).

    kind     hadamard: randomized; orthogonal: random; learned: on the calibration data, from a randomized Hadamard
    online   inputs of down_proj and fc2 are rotated too, while the model runs: files that other readers do not find
    seed     of the random matrices
    """

    kind: str = "hadamard"
    online: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ROTATIONS:
            raise ValueError(f"r_kind: {self.kind!r} is not one of {', '.join(ROTATIONS)}")
        if self.seed < 0:
            raise ValueError(f"r_seed: {self.seed} is negative")


@dataclass(frozen=True)
class Gate:
    """A check of every decoder block before it is quantized: it is tried on so many draws of half the calibration data.

    draws    how many
    limit    largest block error of a draw, times the smallest, up to which the block counts as stable
    action   of one that is not: keep its layers at 8 bits, weights and inputs, or abort
    """

    draws: int = 3
    limit: float = 2.0
    action: str = "keep"

    def __post_init__(self) -> None:
        if self.draws < 2:
            raise ValueError(f"g_draws: {self.draws} is below 2")
        if not self.limit >= 1:
            raise ValueError(f"g_limit: {self.limit} is below 1")
        if self.action not in ("keep", "abort"):
            raise ValueError(f"g_action: {self.action!r} is not one of keep, abort")


@dataclass(frozen=True)
class PruneSpec:
    """Unstructured sparsity: the share of every layer's own weights that is zero, in whole percent from 10 to 90."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0.1 <= self.sparsity <= 0.9 or self.sparsity != self.percent / 100:
            raise ValueError(f"sparsity: {self.sparsity} is not a whole percentage from 0.1 to 0.9")

    @property
    def percent(self) -> int:
        return round(100 * self.sparsity)


@dataclass(frozen=True)
class Calibration:
    """Which texts a calibrated method sees: so many sequences of each source, of at most `length` tokens.

    retain, forget   rows of the data that unlearning knows, one sequence a row
    text             windows of running text, as deployments use
    """

    retain: int = 0
    forget: int = 0
    text: int = 0
    length: int = 2048

    def __post_init__(self) -> None:
        for source in ("retain", "forget", "text"):
            if getattr(self, source) < 0:
                raise ValueError(f"calibration: {source}: {getattr(self, source)} is negative")
        if not self.retain + self.forget + self.text:
            raise ValueError("calibration: no sequence at all; expected e.g. retain:64,forget:32,text:128")
        if self.length < 2:
            raise ValueError(f"calibration: length: {self.length} is below 2 tokens")

    @property
    def name(self) -> str:
        return ",".join(f"{f.name}:{getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)

    def __str__(self) -> str:
        return self.name


# The knobs of each method; every default is the field's, or stands with its reason.


@dataclass(frozen=True)
class RTN:
    """scale   signed-max: the largest |w| of a group gets the code -2^(bits-1), so that the scale may be negative (as
               llama.cpp's Q4_0): 13% less squared error than absmax at 4 bits, 40% at 2 bits, in the same file format.
               absmax: max|w| / (2^(bits-1) - 0.5), as compressed-tensors. minmax: the asymmetric grid
    clip       search the range that minimises the sum of |error|^2.4 in each group
    """

    scale: str = "signed-max"
    clip: bool = True


@dataclass(frozen=True)
class GPTQ:
    """act_order   gar: inside each group and groups by their largest (no cost at run time); static: all columns, with
                   groups fixed before; none
    damp          times the Hessian's mean diagonal, added to it; tenfold where that is not enough, and recorded
    block         columns between two updates of the rest
    alpha         share of GPTAQ's correction for what earlier layers changed in the input; 0: plain GPTQ
    sequential    inside a decoder block, later layers see what the earlier ones became
    """

    act_order: str = "gar"
    damp: float = 0.01
    block: int = 128
    alpha: float = 0.0
    sequential: bool = True
    scale: str = "signed-max"
    clip: bool = True


@dataclass(frozen=True)
class AWQ:
    """grid   candidates for the exponent of the activations' share
    duo      the weights' sizes have a share too
    """

    grid: int = 20
    duo: bool = True
    scale: str = "signed-max"
    clip: bool = True


@dataclass(frozen=True)
class SmoothQuant:
    """alpha          share of the difficulty that moves from activations to weights
    equalization   power: as alpha says; log: to the logarithms of the activations' ranges, whatever the weights
    """

    alpha: float = 0.5
    equalization: str = "power"
    scale: str = "signed-max"
    clip: bool = True

    def __post_init__(self) -> None:
        if self.equalization == "log" and self.alpha != SmoothQuant.alpha:
            raise ValueError(f"alpha: {self.alpha} is given, and equalization=log has none")


@dataclass(frozen=True)
class HQQ:
    """p, beta, iterations   of the half-quadratic solver"""

    p: float = 0.7
    beta: float = 10.0
    iterations: int = 20
    scale: str = "signed-max"


@dataclass(frozen=True)
class SignRound:
    """iterations   steps of signed gradient descent per decoder block
    learning_rate   of the first step, falling to zero; None: 1 / iterations
    batch           sequences a step
    """

    iterations: int = 200
    learning_rate: float | None = None
    batch: int = 8
    scale: str = "signed-max"


@dataclass(frozen=True)
class FlatQuant:
    """epochs   over the calibration data, for each decoder block
    learning_rate   of the first step, falling to a thousandth of it
    batch           sequences a step
    seed            of the rotations at the start and of the order of batches
    """

    epochs: int = 15
    learning_rate: float = 5e-3
    batch: int = 4
    seed: int = 0
    scale: str = "signed-max"


@dataclass(frozen=True)
class BnB:
    """kind   nf4, fp4 (blocks of 64 weights) or int8 (LLM.int8, per row)
    double_quant   the blocks' scales in 8 bits themselves (nf4 and fp4)
    """

    kind: str = "nf4"
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.double_quant and self.kind == "int8":
            raise ValueError("double_quant: goes with nf4 and fp4, not with int8")


Options = RTN | GPTQ | AWQ | SmoothQuant | HQQ | SignRound | FlatQuant | BnB
METHODS: dict[str, type[Options]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "awq": AWQ,
    "smoothquant": SmoothQuant,
    "hqq": HQQ,
    "signround": SignRound,
    "flatquant": FlatQuant,
    "bnb": BnB,
}
# What `-plain` stands for in a symmetric format; in an asymmetric one the scale is minmax.
PLAIN: dict[str, object] = {"scale": "absmax", "clip": False}
PLAIN_RTN = RTN(scale="absmax", clip=False)
CALIBRATED = ("gptq", "awq", "smoothquant", "signround", "flatquant")
# Those that move a factor from a layer's input into its weight: it is no longer comparable with another model's.
FOLDING = ("awq", "smoothquant", "flatquant")
PRUNERS = ("magnitude",)

_CHOICES = {"scale": SCALES, "act_order": ACT_ORDERS, "kind": BNB_KINDS, "equalization": EQUALIZATIONS}
_LEAST = dict.fromkeys(("damp", "alpha", "p", "beta", "seed"), 0.0)
_LEAST |= dict.fromkeys(("block", "grid", "iterations", "batch", "epochs"), 1.0)
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
)


@dataclass(frozen=True)
class Recipe:
    """How a model is made smaller: a method, a format, and what stays as it is. spec None: no integer format.

    ignore    modules that stay dense, by full name, last part of it, or `re:` and a regular expression that matches the
              full name; "lm_head" is the output head whatever its name, dense by default as everywhere in the field
    prune     what becomes zero, by `method`; a recipe prunes or quantizes, not both
    options   the method's knobs; None: its defaults
    calibration   the data that a calibrated method sees; None: left to the caller
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

    def __post_init__(self) -> None:
        if self.prune is not None and self.spec is not None:
            raise ValueError(f"prune: {self.prune} beside {self.spec}; a recipe prunes or quantizes, not both")
        if self.calibration is not None and not self.calibrated:
            raise ValueError(f"calibration: {self.method} takes no data; it goes with {', '.join(CALIBRATED)}")
        if self.activation is not None:
            self._check_activation(self.activation)
        if self.rotation is not None:
            self._check_rotation(self.rotation)
        if self.gate is not None and not self.calibrated:
            raise ValueError(f"gate: is about calibration data, and {self.method} takes none")
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
        _check_options(options)
        if self.spec is None:
            return
        if not self.spec.symmetric and options.scale == "signed-max":
            object.__setattr__(self, "options", options := replace(options, scale="minmax"))
        if self.spec.symmetric == (options.scale == "minmax"):
            sort = "symmetric" if self.spec.symmetric else "asymmetric"
            raise ValueError(f"scale: {options.scale} does not go with the {sort} format; asymmetric is minmax")

    def _check_activation(self, activation: ActivationSpec) -> None:
        if self.spec is None:
            raise ValueError(f"activation: {activation} goes with integer weights, not with {self.method}")
        if not activation.dynamic and self.method == "flatquant":
            raise ValueError("a_dynamic: flatquant learns with a grid per token; expected true")
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
        return self.method in CALIBRATED

    @property
    def name(self) -> str:
        knobs = "" if self.options is None else _spell_options(self)
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

    @property
    def _base(self) -> str:
        if self.prune is not None:
            return f"{self.method}-s{self.prune.percent}"
        if self.method == "bnb":
            return f"bnb-{self.options.kind}{'-dq' if self.options.double_quant else ''}"
        if self.spec is None:
            return self.method
        group = "" if self.spec.group_size is None else f"-g{self.spec.group_size}"
        activation = 16 if self.activation is None else self.activation.bits
        return f"{self.method}-w{self.spec.bits}a{activation}{group}{'' if self.spec.symmetric else '-asym'}"

    def __str__(self) -> str:
        return self.name


DENSE = Recipe("dense", None)


def _check_options(options: Options) -> None:
    for name, value in asdict(options).items():
        allowed = _CHOICES.get(name)
        if allowed and value not in allowed:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
        least = _LEAST.get(name)
        if least is not None and not least <= value < math.inf:
            raise ValueError(f"{name}: {value} is {'below' if value < least else 'not a number from'} {least:g}")
    rate = getattr(options, "learning_rate", None)
    if rate is not None and not rate > 0:
        raise ValueError(f"learning_rate: {rate} is not above 0")


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


def _quoted(pattern: str) -> str:
    """A pattern as part of a name, without the characters that part names: `re:a+` is `re:a%2B` there."""
    return "".join(f"%{ord(letter):02X}" if letter in "%+@|" else letter for letter in pattern)


def _spell(given: dict[str, object], implied: dict[str, object]) -> str:
    return "".join(f"+{name}={str(value).lower()}" for name, value in given.items() if value != implied[name])


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
            rounding, turning, gate, keeping = (_part(given, prefix) for prefix in ("a_", "r_", "g_", "kv_"))
            if rounding and recipe.activation is None:
                raise ValueError(f"a_{next(iter(rounding))}: {base} does not round activations; w8a8 or w4a4 does")
            if keeping and "bits" not in keeping:
                raise ValueError(f"kv_{next(iter(keeping))}: without kv_bits")
            options = _parse_options(recipe, given) if given else recipe.options
            return replace(
                recipe,
                ignore=recipe.ignore if ignore is None else tuple(unquote(part) for part in ignore.split("|") if part),
                options=options,
                calibration=parse_calibration(data) if at else None,
                activation=_with(recipe.activation, rounding, "a_") if recipe.activation else None,
                rotation=_with(Rotation(), turning, "r_") if turning else None,
                gate=_with(Gate(), gate, "g_") if gate else None,
                kv=_with(KVSpec(KV_BITS[0]), keeping, "kv_") if keeping else None,
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
    pruner = re.fullmatch(r"([a-z]+)-s(\d+)", base)
    if pruner and pruner[1] in PRUNERS:
        return Recipe(pruner[1], None, prune=PruneSpec(int(pruner[2]) / 100))
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


def make_options(method: str, given: dict[str, object], defaults: Options | None = None) -> Options:
    """The knobs of `method`, the given ones in place of the defaults; ValueError for an unknown one or a wrong type."""
    options = defaults or METHODS[method]()
    for name in given:
        if name not in (known := [field.name for field in fields(options)]):
            raise ValueError(f"{name}: {method} has no such knob; it has {', '.join(known)}")
    return _with(options, given)


PARTS: dict[str, Any] = {"activation": ActivationSpec(8), "rotation": Rotation(), "gate": Gate(), "kv": KVSpec(8)}


def make_part(name: str, given: dict[str, object]) -> Any:
    """The part of a recipe of this name from its fields; ValueError for an unknown or missing one, or a wrong type."""
    first = fields(PARTS[name])[0].name
    if first not in given:
        raise ValueError(f"{name}: {first}: missing")
    return _with(PARTS[name], given, f"{name}: ")


def _with(frozen: Any, given: dict[str, object], prefix: str = "") -> Any:
    """A frozen dataclass with other values; ValueError for an unknown field or a wrong type."""
    kinds = {field.name: str(field.type) for field in fields(frozen)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f"{prefix}{name}: unknown; known are {', '.join(kinds)}")
        optional, kind = "None" in kinds[name], kinds[name].split(" ")[0]
        if optional and value in ("none", None):
            values[name] = None
            continue
        if kind == "float" and type(value) is int:
            value = float(value)
        if type(value).__name__ != kind:
            raise ValueError(f"{prefix}{name}: {value!r} is not {kind}")
        values[name] = value
    return replace(frozen, **values)


def parse_calibration(text: str) -> Calibration:
    """`retain:64,forget:32,text:128[,length:512]` (in recipe names with + for the comma); ValueError names the part."""
    values: dict[str, int] = {}
    known = [field.name for field in fields(Calibration)]
    for part in re.split(r"[,+]", text):
        found = re.fullmatch(r"\s*([a-z]+):(\d+)\s*", part)
        if not found:
            raise ValueError(f"calibration: {part!r} is not of the form source:number, e.g. retain:64")
        if found[1] not in known:
            raise ValueError(f"calibration: {found[1]!r} is not one of {', '.join(known)}")
        if found[1] in values:
            raise ValueError(f"calibration: {found[1]} is there twice")
        values[found[1]] = int(found[2])
    return Calibration(**values)
