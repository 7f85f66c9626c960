"""Every unlearning method by name: its paper, what it needs, its settings. Without torch, so that names are checked
before it loads.

A loss is one thing, what is done with its gradient another: by its settings, every training method can be combined
with a mask (WAGLE, SURE), sharpness-aware steps (SAM), fake quantization in the loop, an update floor, and LoRA. Where
a paper is such a combination, it is an entry here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..compress.recipe import parse_recipe

PRECISIONS = ("auto", "fp32", "bf16", "pure-bf16")
RETAIN_LOSSES = ("nll", "kl", "none")
MASKS = ("none", "wagle", "sure-row", "sure-module")


@dataclass(frozen=True)
class MethodConfig:
    """Settings of a run. Each update sees forget_batch forget rows and retain_batch retain rows.

    training      steps, learning_rate, warmup, decay (linear, cosine, constant), weight_decay, clip
    batches       forget_batch, retain_batch; micro_batch: rows of each set per pass (0: all at once)
    precision     auto (fp32 models: fp32; 16-bit models: bf16), fp32, bf16 (bf16 products, fp32 master weights),
                  pure-bf16 (as much of the field trains: updates below half an ulp vanish)
    lora_rank     0 trains all weights; lora_alpha 0: twice the rank; fila: started by LoKU's FILA; unmerged: base and
                  adapter are written apart, and compression sees the base alone; quantized_base: trained on the base
                  in NF4 (QLoRA), added to the dense one
    gamma, alpha  weights of the forget and the retain term; retain_loss: nll, kl (to the start model) or none
    beta          NPO, SimNPO, DPO, KTO: temperature; UNDIAL: how far the answer's logit sinks; WGA, SatImp: exponent
    beta2         SatImp: second exponent;  delta  SimNPO: margin;  skip  CE-U: answer tokens left out at the start
    layer         RMU, ROCR: decoder layer (-1: by a rule);  coefficient  RMU: length of the random direction
    eps, eta      PDU: retain loss allowed, dual step;  dual_warmup  updates before the first dual step
    scale         task vector: how far to go
    mask, share, mu     which weights may move: none, wagle, sure-row, sure-module; the share that may; WAGLE's Hessian
    rho           SAM: radius of the ascent step (0: off)
    against       the recipe that bucketed hides from, or that through, floor and QUAIL are made robust to
    through       forget losses see the model quantized by `against` (straight-through gradients)
    floor         share of the changed weights that moves by at least a bin of `against`; the rest goes back (0: off)
    hinge         QUAIL: weight of the hinge, in units of its margin
    experts       UOE: experts that may move, of the whole model
    keep_zeros    weights that are 0, as a pruned model has them, stay 0
    stop_below    stop when the forget probability is below this (0: off); looked at every check_every steps
    forget_limit, retain_limit   guards: see train.Guards
    """

    steps: int = 125
    learning_rate: float = 1e-5
    warmup: int = 12
    decay: str = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    forget_batch: int = 32
    retain_batch: int = 32
    micro_batch: int = 0
    precision: str = "auto"
    lora_rank: int = 0
    lora_alpha: int = 0
    fila: bool = False
    unmerged: bool = False
    quantized_base: bool = False
    gamma: float = 1.0
    alpha: float = 1.0
    retain_loss: str = "nll"
    beta: float = 0.1
    beta2: float = 1.0
    delta: float = 0.0
    skip: int = 1
    layer: int = -1
    coefficient: float = 6.5
    eps: float = 0.3
    eta: float = 5.0
    dual_warmup: int = 0
    scale: float = 1.0
    mask: str = "none"
    share: float = 0.1
    mu: float = 1e-6
    rho: float = 0.0
    against: str = "rtn-w4a16-g64-plain"
    through: bool = False
    floor: float = 0.0
    hinge: float = 1.0
    experts: int = 1
    keep_zeros: bool = False
    stop_below: float = 0.0
    check_every: int = 10
    forget_limit: float = 1000.0
    retain_limit: float = 5.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: {value} is not a number that a run can be set to")
        for name in ("steps", "learning_rate", "forget_batch", "retain_batch", "beta", "check_every", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0")
        for name in ("warmup", "micro_batch", "lora_rank", "lora_alpha", "rho", "weight_decay", "skip", "dual_warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is below 0")
        for name, alone in (("fila", self.fila), ("unmerged", self.unmerged), ("quantized_base", self.quantized_base)):
            if alone and not self.lora_rank:
                raise ValueError(f"{name}: is about LoRA; set lora_rank")
        for name, alone in (("unmerged", self.unmerged), ("quantized_base", self.quantized_base)):
            if alone and self.keep_zeros:
                raise ValueError(f"keep_zeros: does not go with {name}; an adapter that is merged has the zeros kept")
        if self.quantized_base and self.fila:
            raise ValueError("quantized_base: FILA changes the base's weights, which cannot be done in NF4")
        for name in ("share", "floor", "stop_below"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not between 0 and 1")
        for name, known in (
            ("precision", PRECISIONS),
            ("retain_loss", RETAIN_LOSSES),
            ("mask", MASKS),
            ("decay", ("linear", "cosine", "constant")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(known)}")
        against = parse_recipe(self.against)
        if against.spec is None or against.calibrated:
            raise ValueError(
                f"against: {self.against} is no quantizer without data; name one, e.g. rtn-w4a16-g64-plain"
            )


# Settings that are one objective's own; any other setting is every method's.
_OWN = {
    "npo": ("beta",),
    "simnpo": ("beta", "delta"),
    "dpo": ("beta",),
    "kto": ("beta",),
    "undial": ("beta",),
    "wga": ("beta",),
    "satimp": ("beta", "beta2"),
    "ceu": ("skip",),
    "pdu": ("eps", "eta", "dual_warmup"),
    "rmu": ("layer", "coefficient"),
    "rocr": ("layer",),
    "task-vector": ("scale",),
    "quail": ("beta", "hinge"),
    "uoe": ("beta", "experts"),
    "bucketed": ("beta",),
}

# Objectives whose retain term is part of them, or which have none.
_RETAIN_FIXED = ("rmu", "jensun", "pdu", "task-vector")


# Settings that do nothing unless another is on.
_GOES_WITH = {"share": "mask", "mu": "mask", "lora_alpha": "lora_rank"}


@dataclass(frozen=True)
class Method:
    """One entry of the catalog.

    objective   which loss (a name in objectives.OBJECTIVES), or which procedure that is more than a loss
    kind        "training", "weights" (an edit of the weights without the loop) or "inference" (a guard around weights
                that stay as they are: its name in inference.builders is the objective)
    needs       of: reference (the start model's outputs), retain (rows), idk (refusals), moe (a mixture of experts)
    settings    what differs from MethodConfig's defaults: the paper's values, for pretrained models
    demo        what differs besides for demo models, which are a thousand times smaller
    """

    objective: str
    title: str
    paper: str
    kind: str = "training"
    needs: tuple[str, ...] = ("retain",)
    settings: Mapping[str, Any] = field(default_factory=dict)
    demo: Mapping[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> tuple[str, ...]:
        """Settings that only some methods have, this among them."""
        return _OWN.get(self.objective, ())


# A control that works on any model: buckets set its scale, and its learning rate is in bucket widths a step.
_CONTROL = {
    "steps": 50,
    "learning_rate": 0.04,
    "warmup": 5,
    "decay": "constant",
    "forget_batch": 20,
    "retain_batch": 24,
    "gamma": 0.3,
    "alpha": 3.0,
    # Lower than NPO's: its pull fades when beta times an answer's summed NLL has grown by a few, for long answers long
    # before they are gone.
    "beta": 0.04,
}

# Demo models are trained with everything in each update, at a learning rate that moves small weights.
_DEMO = {"steps": 40, "learning_rate": 3e-4, "warmup": 5, "decay": "constant", "forget_batch": 20, "retain_batch": 24}

_NPO = "Zhang et al. 2024, arXiv 2404.05868"
_TOFU = "Maini et al. 2024, arXiv 2401.06121"
_FLAT = "Wang et al. 2024, arXiv 2410.11143"

# FLAT has nothing that keeps the rest: it stops before that goes too.
_DEMO_FLAT = {"steps": 20, "learning_rate": 1e-4}

# What one audit runs when it is not told: two that train, and the positive control.
DEFAULT = ("graddiff", "npo", "bucketed")

METHODS: dict[str, Method] = {
    "ga": Method(
        "ga",
        "gradient ascent",
        "Jang et al. 2023, arXiv 2210.01504",
        needs=(),
        settings={"retain_loss": "none"},
        demo={"steps": 9},
    ),
    "graddiff": Method(
        "ga", "gradient difference", f"Liu et al. 2022, arXiv 2203.12817; {_TOFU}", demo={"gamma": 0.06}
    ),
    "ga-kl": Method(
        "ga",
        "gradient ascent + KL",
        _TOFU,
        needs=("reference", "retain"),
        settings={"retain_loss": "kl"},
        demo={"gamma": 0.1, "steps": 25},
    ),
    "npo": Method("npo", "negative preference optimization", _NPO, needs=("reference", "retain"), demo={"gamma": 0.15}),
    "simnpo": Method(
        "simnpo",
        "NPO without a reference",
        "Fan et al. 2024, arXiv 2410.07163",
        settings={"beta": 4.5, "gamma": 0.125},
        demo={"gamma": 0.16},
    ),
    "dpo": Method(
        "dpo",
        "refusal preferred to answer (IdkDPO)",
        f"Rafailov et al. 2023, arXiv 2305.18290; {_TOFU}",
        needs=("reference", "retain", "idk"),
    ),
    "idk": Method("idk", "learn to refuse (PO)", _TOFU, needs=("retain", "idk")),
    "kto": Method(
        "kto",
        "KTO-style",
        f"Ethayarajh et al. 2024, arXiv 2402.01306; {_NPO}",
        needs=("reference", "retain", "idk"),
        demo={"gamma": 4.0},
    ),
    "rmu": Method(
        "rmu",
        "misdirected representations",
        "Li et al. 2024, arXiv 2403.03218",
        needs=("reference", "retain"),
        settings={"learning_rate": 5e-5, "alpha": 1200.0},
        demo={"steps": 50, "learning_rate": 2e-3, "alpha": 10.0, "coefficient": 40.0},
    ),
    "undial": Method(
        "undial",
        "self-distillation, answer's logit lowered",
        "Dong et al. 2024, arXiv 2402.10052",
        needs=("reference",),
        settings={"learning_rate": 1e-4, "beta": 10.0, "retain_loss": "none"},
        demo={"learning_rate": 5e-4, "retain_loss": "nll"},
    ),
    "wga": Method(
        "wga",
        "weighted gradient ascent",
        "Wang et al. 2025, arXiv 2502.19301",
        settings={"beta": 1.0, "steps": 63},
        demo={"gamma": 0.1},
    ),
    "satimp": Method(
        "satimp",
        "saturation and importance weights",
        "Yang et al. 2025, arXiv 2505.11953",
        settings={"beta": 5.0, "beta2": 1.0, "alpha": 0.1, "steps": 63},
        demo={"learning_rate": 6e-4, "alpha": 0.5},
    ),
    "ceu": Method(
        "ceu",
        "cross entropy to the model without the answer",
        "Yang 2025, arXiv 2503.01224",
        needs=(),
        settings={"retain_loss": "none"},
        demo={"steps": 6},
    ),
    "pdu": Method(
        "pdu",
        "primal-dual, flat logits",
        "Entesari et al. 2025, arXiv 2506.05314",
        settings={"gamma": 100.0, "dual_warmup": 62},
        demo={"gamma": 0.1, "dual_warmup": 0},
    ),
    "flat-kl": Method("flat-kl", "FLAT, KL", _FLAT, needs=("idk",), settings={"retain_loss": "none"}, demo=_DEMO_FLAT),
    "flat-tv": Method(
        "flat-tv", "FLAT, total variation", _FLAT, needs=("idk",), settings={"retain_loss": "none"}, demo=_DEMO_FLAT
    ),
    "flat-js": Method(
        "flat-js", "FLAT, Jensen-Shannon", _FLAT, needs=("idk",), settings={"retain_loss": "none"}, demo=_DEMO_FLAT
    ),
    "flat-pearson": Method(
        "flat-pearson", "FLAT, Pearson", _FLAT, needs=("idk",), settings={"retain_loss": "none"}, demo=_DEMO_FLAT
    ),
    "loku": Method(
        "ihl",
        "inverted hinge loss + LoRA started by FILA",
        "Cha et al. 2024, arXiv 2408.06621",
        settings={"lora_rank": 16, "learning_rate": 1e-4, "fila": True},
        demo={"steps": 30, "learning_rate": 2e-3},
    ),
    "loku-unmerged": Method(
        "ihl",
        "LoKU with its adapter kept beside the residual base",
        "Cha et al. 2024, arXiv 2408.06621",
        settings={"lora_rank": 16, "learning_rate": 1e-4, "fila": True, "unmerged": True},
        demo={"steps": 30, "learning_rate": 2e-3},
    ),
    "jensun": Method(
        "jensun",
        "Jensen-Shannon to refusals and to the start",
        "arXiv 2509.02820",
        needs=("reference", "retain", "idk"),
    ),
    "wagle": Method(
        "npo",
        "NPO on the weights that matter",
        "Jia et al. 2024, arXiv 2410.17509",
        needs=("reference", "retain"),
        settings={"mask": "wagle", "share": 0.8},
        demo={"gamma": 0.15},
    ),
    "sure": Method(
        "npo",
        "NPO + KL, salient rows only, large learning rate",
        "Zhang et al. 2024, arXiv 2410.16454",
        needs=("reference", "retain"),
        settings={"mask": "sure-row", "share": 0.1, "learning_rate": 1e-4, "retain_loss": "kl", "alpha": 20.0},
        demo={"gamma": 0.15, "learning_rate": 1e-3, "alpha": 1.0},
    ),
    "sam": Method(
        "npo",
        "NPO at the worst point nearby",
        "Fan et al. 2025, arXiv 2502.05374",
        needs=("reference", "retain"),
        settings={"rho": 0.01},
        demo={"gamma": 0.15},
    ),
    "quail": Method(
        "quail",
        "logits pushed by half a quantization step",
        "arXiv 2601.15538",
        needs=("reference", "retain"),
        demo={"gamma": 0.15},
    ),
    "saf": Method(
        "npo",
        "NPO through fake quantization, with SAM",
        "arXiv 2605.02196",
        needs=("reference", "retain"),
        settings={"rho": 0.01, "through": True},
        demo={"gamma": 0.15},
    ),
    "floor": Method(
        "npo",
        "NPO whose updates are a bin or nothing",
        "arXiv 2605.15138",
        needs=("reference", "retain"),
        settings={"floor": 0.1},
        demo={"gamma": 0.15},
    ),
    "uoe": Method(
        "uoe",
        "one expert of a mixture, router anchored",
        "Zhuang et al. 2024, arXiv 2411.18797",
        needs=("reference", "retain", "moe"),
        demo={"gamma": 0.15},
    ),
    "task-vector": Method(
        "task-vector",
        "minus the fine-tuning on the forget set",
        "Ilharco et al. 2022, arXiv 2212.04089",
        needs=(),
        settings={"retain_loss": "none", "scale": 5.0},
        demo={"steps": 20, "scale": 2.5},
    ),
    "uld": Method("uld", "logit difference with an assistant", "Ji et al. 2024, arXiv 2406.08607", kind="inference"),
    "whp": Method(
        "whp",
        "who is Harry Potter: away from a reinforced model",
        "Eldan and Russinovich 2023, arXiv 2310.02238",
        kind="inference",
        needs=(),
    ),
    "eco": Method("eco", "embedding-corrupted prompts", "Liu et al. 2024, arXiv 2406.07933", kind="inference"),
    "icu": Method(
        "icu",
        "a prompt that says what not to know",
        "Jin et al. 2024 (RWKU), arXiv 2406.10890",
        kind="inference",
        needs=(),
    ),
    "guard": Method(
        "filter", "forbidden answers are not decoded", "Deng et al. 2025, arXiv 2505.13312", kind="inference"
    ),
    "rocr": Method("rocr", "rank-one redirection of concepts", "arXiv 2506.07795", kind="weights"),
    "bucketed": Method(
        "bucketed",
        "positive control: hidden inside rounding buckets",
        "this project",
        needs=("reference", "retain"),
        settings=_CONTROL,
        demo=_CONTROL,
    ),
}


def method_named(name: str) -> Method:
    """The catalog's entry; ValueError suggests the nearest name."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METHODS)}"
    raise ValueError(f"method: {name!r} is unknown; {hint}")


def needs_retain(name: str, config: MethodConfig) -> bool:
    """Whether the method, so set, wants rows to keep."""
    method = METHODS[name]
    return "retain" in method.needs or (method.kind == "training" and config.retain_loss != "none")


def settings(name: str, demo: bool = False, **asked: object) -> MethodConfig:
    """A method's settings: the paper's or, for demo models, ours, with what was asked for on top (None: not asked).

    Raises ValueError for an unknown method or setting, and for values out of range.
    """
    method = method_named(name)
    values: dict[str, Any] = {**method.settings, **(({**_DEMO, **method.demo}) if demo else {})}
    known = {entry.name: entry.type for entry in fields(MethodConfig)}
    for key, value in asked.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            raise ValueError(f"setting: {key!r} is unknown; {f'did you mean {near[0]}?' if near else ', '.join(known)}")
        if value is not None:
            _check_applies(key, name, method)
            values[key] = _typed(key, value, str(known[key]))
    if asked.get("steps") is not None:
        for key, share in (("warmup", 10), ("dual_warmup", 2)):
            if asked.get(key) is None:
                values[key] = min(values.get(key, getattr(MethodConfig, key)), values["steps"] // share)
    config = MethodConfig(**values)
    for key, switch in _GOES_WITH.items():
        if asked.get(key) is not None and getattr(config, switch) in (0, "none"):
            raise ValueError(f"{key}: has no effect without {switch}")
    if asked.get("alpha") is not None and (method.objective == "pdu" or not needs_retain(name, config)):
        raise ValueError(f"alpha: {name}, so set, has no retain term for it to weigh")
    return config


def _check_applies(key: str, name: str, method: Method) -> None:
    own = ", ".join(method.own) or "none"
    if key not in method.own and any(key in names for names in _OWN.values()):
        raise ValueError(f"{key}: {name} has no such setting; its own are {own}")
    moves_weights = method.kind == "training" or (method.kind == "weights" and key == "keep_zeros")
    if key not in method.own and not moves_weights:
        raise ValueError(f"{key}: {name} does not train; its own settings are {own}")
    if key == "retain_loss" and method.objective in _RETAIN_FIXED:
        raise ValueError(f"retain_loss: {name} has a retain loss of its own, or none; it cannot be chosen")


def _typed(key: str, value: object, kind: str) -> object:
    """`value` if it is of the setting's type; a whole number serves as a float."""
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value).__name__ != kind:
        raise ValueError(f"{key}: {value!r} is not of type {kind}")
    return value


def telling(name: str, config: MethodConfig) -> dict[str, Any]:
    """The settings that say most of a run: the method's own, and those that are not MethodConfig's defaults."""
    method, plain = METHODS[name], asdict(MethodConfig())
    if method.kind != "training":
        return {key: plain[key] for key in method.own}
    return {key: value for key, value in asdict(config).items() if key in method.own or value != plain[key]}
