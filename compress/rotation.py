"""Rotations fused into ordinary weights (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; R1 and R2 in the words of
SpinQuant, arXiv 2405.16406).

The residual stream x is replaced by Q x with an orthogonal Q, which spreads large channels over all: what writes to it
is multiplied by Q from the left (embeddings, output projections), what reads it by Q^T from the right. In between stand
norms. RMSNorm without its gain commutes with every Q; LayerNorm without gain and bias with those that keep the mean,
Q 1 = 1, which is where this departs from QuaRot: there LayerNorm becomes RMSNorm, and the model one that no stock
reader has. Gains g and biases b of a norm go into the linear layers W, c behind it:

    W (g x^ + b) + c = (W diag(g) Q^T) (Q x^) + (W b + c)

or, where one of these layers has no bias, b / g stays in the norm as Q (b / g). The values of all heads of a layer are
rotated by another matrix, which its output projection takes back. The result is a stock model with the same outputs.

What reads and writes the stream is found from one traced pass, whatever the model is called, and nothing is believed:
the model is left as it was unless its logits stay the same.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .block import Block, Hidden, decoder_list, enter, first
from .experts import unfuse_experts_
from .hadamard import KINDS, OnlineHadamard, apply_hadamard, mean_preserving, orthogonal, randomized
from .linear import QuantLinear
from .smooth import pairs
from .spec import Rotation
from .walk import weight_of

# The key of the rotation of the residual stream; the others have the names of output projections.
STREAM = ""
# Largest difference of logits in float32, of the largest logit.
SAME = 1e-4
# Random tokens that are run to find out what is connected, and to compare.
_SEQUENCES, _LENGTH = 2, 16


@dataclass(frozen=True, eq=False)
class Rotated:
    """What became of a model.

    rotations    orthogonal matrices float64 by name: "" of the residual stream [d, d], others of the heads [size, size]
                 in front of the output projection of that name
    keeps_mean   the stream's keeps the mean over channels: there is a LayerNorm
    difference   of the logits of random tokens, largest, of the largest logit; in float32 whatever the model's dtype
    notes        what was left out, and why
    before, after   KL in nats of the quantized model with the random rotation, and with the one learned from there
    """

    rotation: Rotation
    rotations: dict[str, Tensor]
    keeps_mean: bool
    difference: float
    notes: tuple[str, ...] = ()
    before: float | None = None
    after: float | None = None

    def told(self) -> str:
        """What a person should know, in a line."""
        loss = [] if self.after is None else [f"KL {self.before:.4g} -> {self.after:.4g} nats by learning"]
        return "; ".join([*loss, *self.notes])


@dataclass(frozen=True, eq=False)
class Axis:
    """Which rotation acts along one axis of a tensor: on all channels, or on each of rows [heads, size] int64."""

    key: str
    rows: Tensor | None = None

    def turn(self, x: Tensor, dim: int, rotations: Mapping[str, Tensor]) -> Tensor:
        """The rotation times dimension `dim` of x, in the dtype of x."""
        moved, R = x.movedim(dim, -1), rotations[self.key].to(x)
        if self.rows is None:
            return (moved @ R.T).movedim(-1, dim)
        rows = self.rows.to(x.device)
        return moved.index_copy(-1, rows.flatten(), (moved[..., rows] @ R.T).flatten(-2)).movedim(-1, dim)


@dataclass(frozen=True, eq=False)
class Turn:
    """How one parameter follows: left · W · right^T for a matrix W [out, in], left · w for a vector.

    read         the parameter with what norms leave to it, float64
    transposed   it is stored as [in, out]
    """

    read: Callable[[], Tensor]
    left: Axis | None = None
    right: Axis | None = None
    transposed: bool = False

    def apply(self, base: Tensor, rotations: Mapping[str, Tensor]) -> Tensor:
        """`base`, as from read(), rotated; in its dtype, differentiable."""
        if self.left is not None:
            base = self.left.turn(base, 0, rotations)
        return base if self.right is None else self.right.turn(base, -1, rotations)

    def stored(self, turned: Tensor) -> Tensor:
        return turned.T.contiguous() if self.transposed else turned


@dataclass(frozen=True, eq=False)
class Plan:
    """All that rotating a model takes, but the rotations.

    reference    the model in float32 (float64): itself, or a copy
    ids, logits  tokens to compare on [2, 16], and what the model makes of them
    turns        by name of the parameter
    sizes        of the rotations, by key
    """

    reference: PreTrainedModel
    ids: Tensor
    logits: Tensor
    turns: dict[str, Turn]
    sizes: dict[str, int]
    keeps_mean: bool
    notes: tuple[str, ...]

    def start(self, kind: str, seed: int) -> dict[str, Tensor]:
        """Random rotations, free of conditions: that of a stream that has to keep its mean is [d-1, d-1]."""
        generator = torch.Generator().manual_seed(seed)
        return {
            key: orthogonal(size - (key == STREAM and self.keeps_mean), kind, generator)
            for key, size in self.sizes.items()
        }

    def complete(self, free: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rotations as they act."""
        acting = dict(free)
        if self.keeps_mean:
            acting[STREAM] = mean_preserving(free[STREAM])
        return acting


@torch.no_grad()
def rotate_(model: PreTrainedModel, rotation: Rotation, seed: int = 0) -> Rotated:
    """Rotate the residual stream and the heads' values of a model, in place; a head that was tied no longer is.

    Computed in float64, compared in float32; in 16 bits the model is off by what rounding its new weights costs. It
    takes the rotated weights in float32 beside the model, and a float32 copy of a model in 16 bits. Experts come apart
    (experts.py). What rotation.online asks for is another step: online_rotations.
    Raises ValueError, with all weights as they were, for a model that cannot be rotated.
    """
    if rotation.kind not in KINDS:
        raise ValueError(f"rotation: {rotation.kind!r} needs calibration data; see learn_rotation_")
    plan = plan_rotation(model)
    rotations = plan.complete(plan.start(rotation.kind, seed))
    return Rotated(rotation, rotations, plan.keeps_mean, install_(model, plan, rotations), plan.notes)


@torch.no_grad()
def plan_rotation(model: PreTrainedModel) -> Plan:
    """Find what reads and writes the residual stream. Raises ValueError where no rotation would go through."""
    found = _look(model)
    turns = _turns(found.reference, found.stream, found.heads)
    _check_unshared(found.reference, turns)
    sizes = {STREAM: found.stream.width} | {key: heads.size for key, heads in found.heads.items()}
    return Plan(found.reference, found.ids, found.logits, turns, sizes, found.stream.keeps_mean, tuple(found.notes))


@torch.no_grad()
def install_(model: PreTrainedModel, plan: Plan, rotations: Mapping[str, Tensor]) -> float:
    """Put the rotated parameters into the model, if its logits stay the same; their difference (see Rotated)."""
    new = {}
    for name, turn in plan.turns.items():
        new[name] = turn.stored(turn.apply(turn.read(), rotations)).to(plan.reference.dtype)
    with evaluated(plan.reference):
        now = logits(plan.reference, plan.ids, new)
    difference = float((now - plan.logits).abs().max() / plan.logits.abs().max())
    if not difference <= SAME:
        raise _refused(
            model,
            f"its logits change by {difference:.1e} of the largest (at most {SAME:g}): something reads or writes the "
            "residual stream in a way that is not understood",
        )
    _untie_(model)
    for name, tensor in new.items():
        model.get_parameter(name).copy_(tensor)
    return difference


def logits(model: PreTrainedModel, ids: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """[B, T, V] of token ids [B, T], with `weights` in place of the parameters of these names."""
    call = {"input_ids": ids, "use_cache": False}
    return functional_call(model, dict(weights or {}), (), call, tie_weights=False).logits


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Without dropout."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _refused(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"model: {type(model).__name__} cannot be rotated: {reason}")


def _untie_(model: PreTrainedModel) -> None:
    """Give the head a weight of its own, which the rotated model needs, and say so in the config."""
    head: Any = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return
    own = cast(nn.Parameter, head.weight)
    head.weight = nn.Parameter(own.detach().clone(), own.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    # Made when the model was; what is in there is neither saved nor expected in a checkpoint.
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _check_unshared(model: PreTrainedModel, turns: Mapping[str, Turn]) -> None:
    """ValueError for a weight in two places, but for the embedding's, which the head may share."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for parameter_id, names in places.items():
        allowed = 2 if tied and parameter_id == id(embedding) else 1
        if len(names) > allowed and any(name in turns for name in names):
            raise _refused(model, f"{names[0]} and {names[-1]} are one weight")


# What stands where on the residual stream


@dataclass(eq=False)
class _Norm:
    """gain, bias float64 [d]; neutral: the value of a weight that has no effect (0 in Gemma)."""

    module: nn.Module
    gain: Tensor
    bias: Tensor
    neutral: float
    readers: list[str] = field(default_factory=list)


@dataclass(eq=False)
class _Stream:
    """By name: modules with a matrix that read the stream (through a norm, or None: as it is) or write to it,
    embeddings, norms, norms that a writer's output goes through, and what entered each decoder layer [B, T, d]."""

    width: int
    keeps_mean: bool = False
    readers: dict[str, str | None] = field(default_factory=dict)
    writers: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    norms: dict[str, _Norm] = field(default_factory=dict)
    after: dict[str, _Norm] = field(default_factory=dict)
    entered: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Found:
    reference: PreTrainedModel
    ids: Tensor
    logits: Tensor
    stream: _Stream
    heads: dict[str, _Heads]
    notes: list[str]


@dataclass(frozen=True, eq=False)
class _Event:
    """Something ran: what it was given, and what it made (None: no single tensor).

    version, made   counts of writes to the memory of x and of what it made: another count, another tensor
    alone           it was given nothing else
    """

    name: str
    module: nn.Module | None
    x: Tensor
    out: Tensor | None
    version: int
    made: int
    alone: bool


def _look(model: PreTrainedModel) -> _Found:
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise _refused(model, "it is quantized already")
    unfuse_experts_(model)
    wide = model.dtype in (torch.float32, torch.float64)
    reference: Any = model if wide else copy.deepcopy(model).float()
    embedding: Any = reference.get_input_embeddings()
    longest = getattr(reference.config.get_text_config(), "max_position_embeddings", None) or _LENGTH
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, embedding.num_embeddings, (_SEQUENCES, min(_LENGTH, longest)), generator=generator)
    ids = ids.to(embedding.weight.device)
    with evaluated(reference):
        made = logits(reference, ids)
        if not bool(torch.isfinite(made).all()):
            raise _refused(model, "its logits are not finite")
        stream = _survey(reference, ids)
        heads, notes = _heads(reference, ids, stream)
    return _Found(reference, ids, made, stream, heads, notes)


def _survey(model: PreTrainedModel, ids: Tensor) -> _Stream:
    events = _events(model, ids)
    stream = _Stream(next(event.x.shape[-1] for event in events if event.module is None))
    made: dict[int, tuple[str, str, int]] = {}  # memory -> role of what is in there, what made it, version
    rows: dict[bytes, str] = {}  # row of a norm's output -> its name: experts are given copies of some
    for event in events:
        role, source, version = made.get(_memory(event.x), ("", "", 0))
        if version != event.version:
            role = ""
        if event.module is None:
            stream.entered.setdefault(event.name, event.x)
            made[_memory(event.x)] = "stream", event.name, event.version
            continue
        if isinstance(event.module, nn.Embedding):
            if event.module.weight.shape[1] == stream.width:
                stream.embeddings.append(event.name)
                role = "stream"
        elif _is_matrix(event.module):
            if not role and event.x.shape[-1] == stream.width:
                source = _source(event.x, rows)
                role = "norm" if source else ""
            role = _enlist(stream, event, role, source)
        elif role != "inner" and _is_norm(event, stream.width):
            norm = _norm(model, event, stream)
            if role == "writer":
                _check_flat(model, event.name, norm)
                stream.after[event.name] = norm
            else:
                role, stream.norms[event.name] = "norm", norm
                rows |= dict.fromkeys(_rows(event.out), event.name)
        elif role == "norm":
            continue  # what something else makes of a norm's output is no norm's output
        if role and event.out is not None:
            made[_memory(event.out)] = role, event.name, event.made
    _enlist_siblings(model, stream, {event.name for event in events})
    for name, norm in stream.norms.items():
        if not norm.readers:
            raise _refused(model, f"no linear layer reads what {name} puts out; a norm on the residual stream itself?")
    return stream


def _events(model: PreTrainedModel, ids: Tensor) -> list[_Event]:
    """What ran, in order: every module without parts, and (as module None) what enters and leaves the decoder layers.

    All tensors are held, so that no memory is used twice."""
    layers = {id(layer) for layer in decoder_list(model)[2]}
    events: list[_Event] = []
    handles = []

    def note(name: str, module: nn.Module | None, x: Any, out: Any = None, alone: bool = True) -> None:
        if isinstance(x, Tensor):
            kept = out if isinstance(out, Tensor) else None
            events.append(_Event(name, module, x, kept, x._version, 0 if kept is None else kept._version, alone))

    def ran(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            x = out if isinstance(module, nn.Embedding) else _first_tensor(args, kwargs)
            note(name, module, x, out, len(args) + len(kwargs) == 1)

        return hook

    def enters(name: str) -> Any:
        return lambda module, args, kwargs: note(name, None, _first_tensor(args, kwargs))  # noqa: ARG005

    def leaves(name: str) -> Any:
        return lambda module, args, out: note(name, None, first(out))  # noqa: ARG005

    for name, module in model.named_modules():
        if id(module) in layers:
            handles.append(module.register_forward_pre_hook(enters(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leaves(name)))
        elif not list(module.children()):
            handles.append(module.register_forward_hook(ran(name), with_kwargs=True))
    try:
        logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return events


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _rows(x: Tensor | None) -> list[bytes]:
    assert x is not None
    return [row.tobytes() for row in x.reshape(-1, x.shape[-1]).cpu().numpy()]


def _source(x: Tensor, rows: Mapping[bytes, str]) -> str:
    """The norm that the first and the last row of x come from, or ""."""
    found = {rows.get(row, "") for row in _rows(x.reshape(-1, x.shape[-1])[[0, -1]])} if x.numel() else {""}
    return found.pop() if len(found) == 1 else ""


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _enlist(stream: _Stream, event: _Event, role: str, source: str) -> str:
    """Note what a module with a matrix is to the stream; the role of what it puts out."""
    module: Any = event.module
    if role in ("norm", "stream"):
        stream.readers[event.name] = source if role == "norm" else None
        if role == "norm" and event.name not in stream.norms[source].readers:
            stream.norms[source].readers.append(event.name)
        return "inner"
    if module.weight.shape[1 if isinstance(module, Conv1D) else 0] == stream.width:
        stream.writers.append(event.name)
        return "writer"
    return "inner"


def _enlist_siblings(model: nn.Module, stream: _Stream, ran: set[str]) -> None:
    """Experts that no token went to read and write what the others of their layer do. Raises ValueError for anything
    else that did not run and is as wide as the stream: nobody could tell what it is."""

    def pattern(name: str) -> str:
        layer = next((layer for layer in stream.entered if name.startswith(f"{layer}.")), name)
        return layer + re.sub(r"\.\d+\.", ".*.", name.removeprefix(layer))

    reading = {pattern(name): norm for name, norm in stream.readers.items()}
    writing = {pattern(name) for name in stream.writers}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name in ran or not isinstance(weight, nn.Parameter) or weight.dim() != 2 or stream.width not in weight.shape:
            continue
        if pattern(name) in reading:
            norm = stream.readers[name] = reading[pattern(name)]
            if norm is not None:
                stream.norms[norm].readers.append(name)
        elif pattern(name) in writing:
            stream.writers.append(name)
        else:
            raise _refused(model, f"{name} does not run on plain tokens")


def _is_norm(event: _Event, width: int) -> bool:
    """Whether it makes rows [d] into rows [d] that do not depend on their scale."""
    module, x, out = event.module, event.x, event.out
    if module is None or out is None or not event.alone or not x.is_floating_point():
        return False
    if x.shape != out.shape or x.shape[-1] != width or any(p.dim() != 1 for p in module.parameters()):
        return False
    once, again = module(_noise(x)), module(16 * _noise(x))
    return bool((once - again).norm() <= 1e-3 * once.norm())


def _noise(x: Tensor) -> Tensor:
    """Ten random rows [1, 10, d], with a mean."""
    return (1 + torch.randn(1, 10, x.shape[-1], generator=torch.Generator().manual_seed(0))).to(x)


def _norm(model: nn.Module, event: _Event, stream: _Stream) -> _Norm:
    """Gain and bias of a norm, found out by setting its weight; and whether the rest commutes with rotations."""
    module: Any = event.module
    own = dict(module.named_parameters())
    if not set(own) <= {"weight", "bias"}:
        raise _refused(model, f"{event.name} has the parameters {', '.join(own)}, expected weight and bias alone")

    def neutral(x: Tensor, value: float) -> Tensor:
        values = {"weight": value, "bias": 0.0}
        return functional_call(module, {k: torch.full_like(p, values[k]) for k, p in own.items()}, (x,))

    x, at = _noise(event.x), 1.0
    if "weight" in own:
        # The weight that makes nothing of x is one below that which does nothing: 1 in most, 0 where it is 1 + w.
        nothing = next((value for value in (0.0, -1.0) if not bool(neutral(x, value).any())), None)
        if nothing is None:
            raise _refused(model, f"{event.name}: {type(module).__name__} has no weight per channel that multiplies")
        at = nothing + 1
    hat, v = neutral(x, at), torch.randn(stream.width, generator=torch.Generator().manual_seed(1)).to(x)
    for keeps_mean in (False, True):
        v = v - v.mean() if keeps_mean else v
        if bool((neutral(_reflected(x, v), at) - _reflected(hat, v)).norm() <= 1e-3 * hat.norm()):
            stream.keeps_mean |= keeps_mean
            break
    else:
        raise _refused(model, f"{event.name}: {type(module).__name__} does not commute with any rotation")
    d = torch.zeros(stream.width, dtype=torch.float64, device=x.device)
    gain = own["weight"].double() + (1 - at) if "weight" in own else d + 1
    return _Norm(module, gain, own["bias"].double() if "bias" in own else d, at)


def _reflected(x: Tensor, v: Tensor) -> Tensor:
    """x [..., d] times the reflection I - 2 v v^T / |v|^2."""
    return x - 2 * (x @ v)[..., None] * v / v.square().sum()


def _check_flat(model: nn.Module, name: str, norm: _Norm) -> None:
    """ValueError for a norm behind what writes to the stream whose gain is not one number for all channels."""
    low, high = float(norm.gain.min()), float(norm.gain.max())
    if high - low > 1e-6 * max(abs(low), abs(high)):
        raise _refused(
            model,
            f"{name} is a norm between a layer and the residual stream, with gains from {low:g} to {high:g}: they go "
            "with channels, which a rotation mixes, and there is no weight behind it to take them",
        )


# Heads: values and output projection


@dataclass(frozen=True, eq=False)
class _Heads:
    """values: the module whose output rows [heads, size] are rotated; columns [heads', size] of the output projection
    take it back."""

    values: str
    rows: Tensor
    columns: Tensor

    @property
    def size(self) -> int:
        return self.rows.shape[1]


def _heads(model: PreTrainedModel, ids: Tensor, stream: _Stream) -> tuple[dict[str, _Heads], list[str]]:
    """By name of the output projection; and why a layer has none."""
    names = {id(module): name for name, module in model.named_modules()}
    layers = decoder_list(model)[2]
    try:
        calls = enter(model, [ids], None)
    except ValueError as error:
        return {}, [f"heads are not rotated: {error}"]
    found: dict[str, _Heads] = {}
    notes = []
    for layer, call in zip(layers, calls, strict=True):
        name = names[id(layer)]
        hidden = Hidden([ids], stream.width, model.dtype)
        hidden.write(0, stream.entered[name])
        mine = _heads_of(Block(name, layer, {}, model.config, call, hidden), stream)
        if not mine:
            notes.append(f"{name}: heads are not rotated: no layers for values and output that allow it were found")
        found |= mine
    return found, notes


def _heads_of(block: Block, stream: _Stream) -> dict[str, _Heads]:
    """Values and output projections that have channel-wise operations alone between them (smooth.py), and let a
    rotation of every head through."""
    count = getattr(block.config.get_text_config(), "num_attention_heads", None)
    before, found = block.forward(0), {}
    for pair in pairs(block):
        reader, width = next(iter(pair.fed)), len(pair.rows)
        # Experts see few tokens or none, with weights as small as can be: the block's output would hardly tell.
        expert = re.search(r"\.\d+\.", reader)
        into_stream = pair.form == "linear" and f"{block.name}.{reader}" in stream.writers
        if expert or not into_stream or not count or width % count or width == count:
            continue
        columns, rows = torch.arange(width).view(count, -1), pair.rows.view(count, -1)
        if not torch.equal(rows[:, :1] + columns[:1], rows):
            continue  # not head by head
        heads = _Heads(f"{block.name}.{pair.previous}", rows[:, :1].unique()[:, None] + columns[:1], columns)
        after = _with_turned_heads(block, pair.module, pair.fed[reader], heads)
        if bool((after - before).norm() <= SAME * before.norm()):
            found[f"{block.name}.{reader}"] = heads
    return found


def _with_turned_heads(block: Block, values: nn.Module, reader: nn.Module, heads: _Heads) -> Tensor:
    R = orthogonal(heads.size, "orthogonal", torch.Generator().manual_seed(0))
    there, back = Axis("there", heads.rows), Axis("back", heads.columns)
    both = {"there": R, "back": R}
    handles = [
        values.register_forward_hook(lambda module, args, output: there.turn(output, -1, both)),  # noqa: ARG005
        reader.register_forward_pre_hook(
            lambda module, args: (back.turn(args[0], -1, {"back": R.T}), *args[1:])  # noqa: ARG005
        ),
    ]
    try:
        return block.forward(0)
    finally:
        for handle in handles:
            handle.remove()


# What this means for every parameter


def _turns(model: PreTrainedModel, stream: _Stream, heads: Mapping[str, _Heads]) -> dict[str, Turn]:
    left = {name: Axis(STREAM) for name in stream.writers}
    right = {name: Axis(STREAM) for name in stream.readers}
    for key, found in heads.items():
        left[found.values] = Axis(key, found.rows)
        right[key] = Axis(key, found.columns)
    turns = {f"{name}.weight": _plain(model, f"{name}.weight", right=Axis(STREAM)) for name in stream.embeddings}
    gains: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}
    for name, norm in stream.norms.items():
        absorbed = all(getattr(model.get_submodule(reader), "bias", None) is not None for reader in norm.readers)
        gains |= dict.fromkeys(norm.readers, norm.gain)
        if absorbed:
            shifts |= dict.fromkeys(norm.readers, norm.bias)
        turns |= _norm_turns(model, name, norm, absorbed)
    for name, norm in stream.after.items():
        if getattr(norm.module, "bias", None) is not None:
            turns[f"{name}.bias"] = _plain(model, f"{name}.bias", left=Axis(STREAM))
    for name in dict.fromkeys([*left, *right]):
        module: Any = model.get_submodule(name)
        read = _matrix(module, gains.get(name))
        turns[f"{name}.weight"] = Turn(read, left.get(name), right.get(name), isinstance(module, Conv1D))
        if getattr(module, "bias", None) is not None:
            turns[f"{name}.bias"] = Turn(_bias(module, shifts.get(name)), left.get(name))
    return turns


def _plain(model: nn.Module, name: str, left: Axis | None = None, right: Axis | None = None) -> Turn:
    parameter = model.get_parameter(name)
    return Turn(lambda: parameter.detach().double(), left, right)


def _matrix(module: Any, gain: Tensor | None) -> Callable[[], Tensor]:
    def read() -> Tensor:
        W = weight_of(module).detach().double()
        return W if gain is None else W * gain.to(W)

    return read


def _bias(module: Any, shift: Tensor | None) -> Callable[[], Tensor]:
    def read() -> Tensor:
        c = module.bias.detach().double()
        return c if shift is None else c + weight_of(module).detach().double() @ shift.to(c)

    return read


def _norm_turns(model: nn.Module, name: str, norm: _Norm, absorbed: bool) -> dict[str, Turn]:
    """The norm without its gain; without its bias too where the layers behind it take it."""
    turns = {}
    if getattr(norm.module, "weight", None) is not None:
        turns[f"{name}.weight"] = Turn(lambda: torch.full_like(norm.gain, norm.neutral))
    if getattr(norm.module, "bias", None) is not None:
        lost = (norm.gain == 0) & (norm.bias != 0)
        if not absorbed and bool(lost.any()):
            raise _refused(
                model,
                f"{name} has gain 0 and bias {float(norm.bias[lost][0]):g} in channel {int(lost.nonzero()[0])}, and "
                "not all layers behind it have a bias to take that",
            )
        kept = torch.where(norm.bias == 0, norm.bias, norm.bias / norm.gain)
        kept = torch.zeros_like(kept) if absorbed else kept
        turns[f"{name}.bias"] = Turn(lambda: kept, left=Axis(STREAM))
    return turns


# While the model runs


@torch.no_grad()
def online_layers(model: PreTrainedModel) -> list[str]:
    """Names of what writes to the residual stream from an MLP (down_proj, fc2). Layers behind attention are left out,
    as rotate_ has their heads; where no heads could be established they are in it. Raises ValueError as rotate_."""
    found = _look(model)
    inside = tuple(f"{layer}." for layer in found.stream.entered)
    return [name for name in found.stream.writers if name not in found.heads and name.startswith(inside)]


@torch.no_grad()
def online_rotations(model: PreTrainedModel, names: Sequence[str], seed: int = 0) -> dict[str, nn.Module]:
    """R4: a randomized Hadamard on the input of the layers of these names (see online_layers).

    Their weights are rotated, in place, in float64: the model is the same again once every transform in the answer is
    applied to the input of the layer of that name.
    """
    generator = torch.Generator().manual_seed(seed)
    transforms: dict[str, nn.Module] = {}
    for name in names:
        module: Any = model.get_submodule(name)
        W = weight_of(module).double()
        core, signs = randomized(W.shape[1], generator)
        turned = apply_hadamard(W, core.to(W), signs.to(W))
        module.weight.copy_(turned.T if isinstance(module, Conv1D) else turned)
        transforms[name] = OnlineHadamard(core, signs).to(W.device)
    return transforms


def hang_(model: PreTrainedModel, names: Sequence[str], seed: int = 0) -> None:
    """As online_rotations, with every transform hung on its layer: it runs in front of it, and goes with what replaces
    it."""
    for name, transform in online_rotations(model, names, seed).items():
        module = model.get_submodule(name)
        module.transform = transform
        module.register_forward_pre_hook(_transformed)


def _transformed(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.transform(args[0]), *args[1:])
