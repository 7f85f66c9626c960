"""The knobs of every method, with the field's defaults where no reason stands beside them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

SCALES = ("signed-max", "absmax", "minmax")
ACT_ORDERS = ("gar", "static", "none")
BNB_KINDS = ("nf4", "fp4", "int8")
EQUALIZATIONS = ("power", "log")


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

_CHOICES = {"scale": SCALES, "act_order": ACT_ORDERS, "kind": BNB_KINDS, "equalization": EQUALIZATIONS}
_LEAST = dict.fromkeys(("damp", "alpha", "p", "beta", "seed"), 0.0)
# Shares.
_MOST = {"alpha": 1.0}
_LEAST |= dict.fromkeys(("block", "grid", "iterations", "batch", "epochs"), 1.0)


def check_options(options: Options) -> None:
    for name, value in asdict(options).items():
        allowed = _CHOICES.get(name)
        if allowed and value not in allowed:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
        least = _LEAST.get(name)
        if least is not None and not least <= value < math.inf:
            raise ValueError(f"{name}: {value} is {'below' if value < least else 'not a number from'} {least:g}")
        if name in _MOST and value > _MOST[name]:
            raise ValueError(f"{name}: {value} is above {_MOST[name]:g}")
    rate = getattr(options, "learning_rate", None)
    if rate is not None and not rate > 0:
        raise ValueError(f"learning_rate: {rate} is not above 0")


def make_options(method: str, given: dict[str, object], defaults: Options | None = None) -> Options:
    """The knobs of `method`, the given ones in place of the defaults; ValueError for an unknown one or a wrong type."""
    options = defaults or METHODS[method]()
    for name in given:
        if name not in (known := [field.name for field in fields(options)]):
            raise ValueError(f"{name}: {method} has no such knob; it has {', '.join(known)}")
    return with_fields(options, given)


def with_fields(frozen: Any, given: dict[str, object], prefix: str = "") -> Any:
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
