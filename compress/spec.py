"""What the numbers of a compressed model mean, and on which data they are chosen: small, frozen, hashable descriptions.

Formats of weights, activations and the KV cache, rotations, the gate, pruning, retraining, calibration. A method's own
knobs are in knobs.py, and recipe.py puts all of it together under one name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (4, 8)
KV_BITS = (8, 4, 2)
ROTATIONS = ("hadamard", "orthogonal", "learned")
KEY_SCALES = ("channel", "token")
PRUNERS = ("magnitude", "random", "wanda", "sparsegpt")
# By so many of so many adjacent inputs that stay.
PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}
# Which weights are compared, by pruner: its authors' choice first.
SCOPES = {
    "magnitude": ("layer", "row", "global"),
    "random": ("layer", "row", "global"),
    "wanda": ("row", "layer"),
    "sparsegpt": ("layer",),
}
ADAPTERS = ("mask_lora", "scale_lora", "lora")
GROUPS = ("bias", "norm", "head", "embeddings", *ADAPTERS, "all")
SOURCES = ("retain", "forget", "text")
ORDERS = ("unlearn-prune", "prune-unlearn")
DECAYS = ("linear", "cosine", "constant")
Tile = tuple[int, int]


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
    """How a layer's input becomes integers of `bits` bits, on the grids of compressed-tensors, or a narrow one.

    symmetric    zero is code 0 and the largest |x| is half the range; else from the least to the largest x, 0 included
    dynamic      one scale per token, made as it comes; False: one per layer, from the calibration data
    clip         share of the range that is kept
    search       find the layer's clip on the calibration data, from 1 down to 0.5, by the squared error of its output
    fallback     a layer whose output is off by more than this relative squared error, for its input's rounding alone on
                 the calibration data, keeps 8 bits; None: none does
    narrow       as many codes below zero as above, the largest |x| on the last of them (TensorFlow's narrow_range), as
                 vLLM's CUDA kernels and npu_dynamic_quant round a token
    """

    bits: int
    symmetric: bool = True
    dynamic: bool = True
    clip: float = 1.0
    search: bool = False
    fallback: float | None = None
    narrow: bool = False

    def __post_init__(self) -> None:
        if self.bits not in ACTIVATION_BITS:
            raise ValueError(
                f"activation bits: {self.bits} is not one of {', '.join(map(str, ACTIVATION_BITS))}, or 16"
            )
        if not 0 < self.clip <= 1:
            raise ValueError(f"a_clip: {self.clip} is not above 0 and at most 1")
        if self.fallback is not None and not 0 < self.fallback < math.inf:
            raise ValueError(f"a_fallback: {self.fallback} is not a number above 0")
        if self.fallback is not None and self.bits == 8:
            raise ValueError(f"a_fallback: {self.fallback} is given, and inputs have 8 bits already")
        if self.search and self.clip != 1:
            raise ValueError(f"a_clip: {self.clip} is given, and a_search would find another")
        if self.narrow and not (self.symmetric and self.dynamic):
            raise ValueError("a_narrow: goes with a symmetric grid per token, not with a_symmetric or a_dynamic=false")

    @property
    def grid(self) -> int:
        """Of a row, by its number in kernels/reference.py, whose import would take torch."""
        return 2 if self.narrow else int(self.symmetric)

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
            fitting = min(
                (size for size in range(8, channels + 8, 8) if size >= channels or channels % size == 0),
                key=lambda size: abs(size - self.group_size),
            )
            raise ValueError(
                f"kv group_size: the {channels} channels of a head do not divide into groups of {width}; "
                f"{fitting} would do"
            )
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
        if not 1 <= self.limit < math.inf:
            raise ValueError(f"g_limit: {self.limit} is not a number from 1 on")
        if self.action not in ("keep", "abort"):
            raise ValueError(f"g_action: {self.action!r} is not one of keep, abort")


@dataclass(frozen=True)
class PruneSpec:
    """Which weights of a layer become zero.

    sparsity   their share, in whole percent from 0.1 to 0.9
    method     magnitude: those with the smallest |w|; random; wanda: the smallest |w| times the norm of their input;
               sparsegpt: those whose loss the others make up for best, which they do
    pattern    2:4 or 4:8: two of every four adjacent inputs stay, or four of eight; sparsity is 0.5 then
    scope      the weights that are compared: of a row (output), of the layer, or of the whole model (global); None: as
               the method's authors have it, the layer, or the row for wanda
    seed       of random
    order      in an audit: prune-unlearn has the methods unlearn the pruned model, whose zeros they keep
    """

    sparsity: float = 0.5
    method: str = "magnitude"
    pattern: str | None = None
    scope: str | None = None
    seed: int = 0
    order: str = ORDERS[0]

    def __post_init__(self) -> None:
        if not 0.1 <= self.sparsity <= 0.9 or self.sparsity != self.percent / 100:
            raise ValueError(f"sparsity: {self.sparsity} is not a whole percentage from 0.1 to 0.9")
        if self.method not in PRUNERS:
            raise ValueError(f"prune method: {self.method!r} is not one of {', '.join(PRUNERS)}")
        if self.pattern is not None and self.pattern not in PATTERNS:
            raise ValueError(f"pattern: {self.pattern!r} is not one of {', '.join(PATTERNS)}")
        if self.pattern is not None and self.sparsity != 0.5:
            raise ValueError(f"sparsity: {self.sparsity} does not go with the pattern {self.pattern}, which is 0.5")
        if self.scope is not None and self.pattern is not None:
            raise ValueError(f"scope: {self.scope!r} does not go with the pattern {self.pattern}")
        if self.scope is not None and self.scope not in SCOPES[self.method]:
            raise ValueError(
                f"scope: {self.scope!r} does not go with {self.method}; {' or '.join(SCOPES[self.method])}"
            )
        if self.order not in ORDERS:
            raise ValueError(f"order: {self.order!r} is not one of {', '.join(ORDERS)}")
        if self.seed < 0 or (self.seed and self.method != "random"):
            raise ValueError(f"seed: {self.seed} does not go with {self.method}; random takes one from 0 on")

    @property
    def percent(self) -> int:
        return round(100 * self.sparsity)

    @property
    def compared(self) -> str:
        """row, layer or global."""
        return self.scope or SCOPES[self.method][0]

    @property
    def calibrated(self) -> bool:
        """Whether it looks at data."""
        return self.method in ("wanda", "sparsegpt")


@dataclass(frozen=True)
class Retrain:
    """What of a pruned model is trained again; masks stay (PERP, arXiv 2312.15230).

    groups    joined by |: bias, norm, head, embeddings; an adapter on every pruned layer, merged into it afterwards:
              mask_lora (W + M * BA), scale_lora (W * BA), lora (W + BA, masked when it is merged); all: every parameter
    by        loss: of the next token; block: block by block, to the outputs of the dense model (reconstruction);
              sublayer: that, but a block's attention first, by itself
    source    of the data: text, or rows that were to be retained, or to be forgotten
    sequences, length   of it: how many (None: all rows, or 128 pieces of text), with as many tokens at most
    steps, batch        of each step so many sequences
    learning_rate       of AdamW, warmed up over the first share `warmup` of the steps, then falling as `decay` says
    rank, alpha         of adapters, which are scaled by alpha / rank (scale_lora is not)
    """

    groups: str = "bias|norm|mask_lora"
    by: str = "loss"
    source: str = "text"
    sequences: int | None = None
    length: int = 2048
    steps: int = 100
    batch: int = 8
    learning_rate: float = 5e-4
    warmup: float = 0.1
    decay: str = "linear"
    rank: int = 16
    alpha: float = 32.0
    seed: int = 0

    def __post_init__(self) -> None:
        for group in self.parts:
            if group not in GROUPS:
                raise ValueError(f"t_groups: {group!r} is not one of {', '.join(GROUPS)}")
        if len(set(self.parts)) < len(self.parts) or len(set(self.parts) & set(ADAPTERS)) > 1:
            raise ValueError(f"t_groups: {self.groups!r}; expected each group once, and one adapter at most")
        if "all" in self.parts and len(self.parts) > 1:
            raise ValueError(f"t_groups: {self.groups!r}; all has the others in it")
        for name, allowed in (("by", ("loss", "block", "sublayer")), ("source", SOURCES), ("decay", DECAYS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"t_{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.by != "loss" and {"head", "embeddings"} & set(self.parts):
            raise ValueError(f"t_groups: {self.groups!r}; by {self.by} there is no head and there are no embeddings")
        for name in ("sequences", "steps", "batch", "rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"t_{name}: {getattr(self, name)} is below 1")
        if self.length < 2:
            raise ValueError(f"t_length: {self.length} is below 2 tokens")
        if not (self.learning_rate > 0 and self.alpha > 0):
            raise ValueError(f"t_learning_rate, t_alpha: {self.learning_rate}, {self.alpha} are not both above 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"t_warmup: {self.warmup} is not a share from 0 to below 1")
        if self.seed < 0:
            raise ValueError(f"t_seed: {self.seed} is negative")

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.groups.split("|"))


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

    @property
    def sources(self) -> set[str]:
        """Those that it takes any sequences of."""
        return {source for source in SOURCES if getattr(self, source)}

    def __str__(self) -> str:
        return self.name


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


def names(pattern: str, name: str) -> bool:
    """Whether a pattern means the module of this full name: the name, or what it is inside of, or its last part; or
    `re:` and a regular expression that matches all of the name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.startswith(f"{pattern}.") or name.rpartition(".")[2] == pattern
