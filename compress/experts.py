"""Experts one by one: a mixture of experts as the linear layers that it is made of.

transformers keeps the experts of a layer in two tensors, gate and up of all of them [E, 2I, H] and down [E, H, I]: fast
to run, but nothing that walks over linear layers sees them. `unfuse_experts_` takes them apart; the result routes as
before, and an expert's layers are called with the rows of its own tokens only, so that hooks on them see just these. On
disk the experts have mostly been apart all along: `checkpoint_names` and `source_keys` say under which names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .linear import QuantLinear

# Below this number of rows a Hessian says more about the sample than about the layer, however narrow the layer is.
MIN_TOKENS = 32

# What decides about tokens: `gate` or `router` itself or the layers inside, and Qwen's weight for the shared expert.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


@dataclass(frozen=True)
class Source:
    """Where a tensor of the model lies in a file.

    key          the tensor in the file
    expert       None: all of it. Else the model's tensor is part of file tensor [E, ...] at this index,
    features     namely these of its output features (None: all),
    transposed   of a matrix that is stored as [in, out]
    """

    key: str
    expert: int | None = None
    features: range | None = None
    transposed: bool = False

    def take(self, stored: Tensor) -> Tensor:
        """The model's tensor, a view of `stored`: the tensor called `key`, or its part [expert], as it was read."""
        if self.transposed and stored.dim() == 2:
            stored = stored.T
        if self.features is None:
            return stored
        return stored[self.features.start : self.features.stop : self.features.step]


class ExpertList(nn.Module):
    """Experts as children "0", "1", ..., each with linear layers gate_proj (unless it has no gate), up_proj, down_proj.

    Stands in for the fused module it is made from: the same call, attributes and activation. Weights are copies with
    memory of their own, so that each can be replaced and freed; the fused tensors are let go one after the other.
    """

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: nn.Module
    post_expert_norm: nn.Module

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        _check(fused)
        for name, value in vars(fused).items():
            if name not in self.__dict__:  # num_experts, config, limits of the activation, ...
                setattr(self, name, value)
        self.source: Any = type(fused)  # whose _apply_gate is ours
        self.interleaved = _interleaved(fused)
        down = fused.down_proj
        assert isinstance(down, nn.Parameter)
        self.count = len(down)
        for expert in range(self.count):
            self.add_module(str(expert), nn.ModuleDict())
        for name, child in fused.named_children():  # the activation, a norm after the experts
            self.add_module(name, child)
        with torch.no_grad():
            for tensor, members in self.fused_tensors().items():
                self._take_apart(fused, tensor, members)
        self.train(fused.training)

    def fused_tensors(self) -> dict[str, tuple[str, ...]]:
        """Fused tensor -> the layers whose output features it holds, in this order."""
        if self.has_gate:
            return {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        return {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}

    def features(self, member: str, members: tuple[str, ...], each: int) -> range:
        """Where the `each` output features of `member` are among those of all `members`."""
        i, count = members.index(member), len(members)
        return range(i, count * each, count) if self.interleaved else range(i * each, (i + 1) * each)

    def _take_apart(self, fused: nn.Module, tensor: str, members: tuple[str, ...]) -> None:
        weight = fused.get_parameter(tensor)
        bias = fused.get_parameter(f"{tensor}_bias") if self.has_bias else None
        each = weight.shape[2 if self.is_transposed else 1] // len(members)
        for expert in range(self.count):
            layers = self.get_submodule(str(expert))
            for member in members:
                source = Source(tensor, expert, self.features(member, members, each), self.is_transposed)
                part = source.take(weight[expert])  # [out, in]
                layer = nn.Linear(part.shape[1], part.shape[0], bias is not None, device="meta")
                layer.weight = nn.Parameter(part.contiguous().clone(), weight.requires_grad)
                if bias is not None:
                    layer.bias = nn.Parameter(source.take(bias[expert]).contiguous().clone(), bias.requires_grad)
                layers.add_module(member, layer)
        fused.register_parameter(tensor, None)
        if bias is not None:
            fused.register_parameter(f"{tensor}_bias", None)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [n, H], top_k_index [n, k] (numbers beyond the last expert: no expert), top_k_weights [n, k]
        -> [n, H]: for every token the sum of its experts' outputs, weighted, in float32 or better."""
        wide = torch.promote_types(torch.promote_types(hidden_states.dtype, top_k_weights.dtype), torch.float32)
        total = torch.zeros_like(hidden_states, dtype=wide)
        for expert in top_k_index.unique().tolist():
            if expert >= self.count:
                continue
            tokens, slots = (top_k_index == expert).nonzero(as_tuple=True)
            out = self._run(expert, hidden_states[tokens]) * top_k_weights[tokens, slots, None]
            total.index_add_(0, tokens, out.to(wide))
        return total.to(hidden_states.dtype)

    def _run(self, expert: int, rows: Tensor) -> Tensor:
        layers = self.get_submodule(str(expert))
        up = layers.get_submodule("up_proj")(rows)
        if self.has_gate:
            gate = layers.get_submodule("gate_proj")(rows)
            both = torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)
            inner = self.source._apply_gate(self, both)
        else:
            inner = self.act_fn(up)
        out = layers.get_submodule("down_proj")(inner)
        return self.post_expert_norm(out) if getattr(self, "has_post_expert_norm", False) else out


def has_fused_experts(module: nn.Module) -> bool:
    """Whether experts are in there that no walk over linear layers sees."""
    return any(_is_fused(part) for part in module.modules())


def fused_experts(module: nn.Module) -> dict[str, int]:
    """Name of every fused experts module in there -> how many experts it has."""
    return {
        name: max(part.parameters(recurse=False), key=Tensor.dim).shape[0]
        for name, part in module.named_modules()
        if _is_fused(part)
    }


def unfuse_experts_(model: nn.Module) -> list[str]:
    """Replace every fused experts module by an ExpertList, in place, also on the meta device. Returns their names.

    At its peak it takes one fused tensor more than the model. Raises ValueError, before anything is changed, for
    experts in a form that we do not know.
    """
    found = [(name, part) for name, part in model.named_modules(remove_duplicate=False) if _is_fused(part)]
    for name, part in found:
        try:
            _check(part)
        except ValueError as error:
            raise ValueError(f"{name or type(model).__name__}: {error}") from None
        if not name:
            raise ValueError(f"model: {type(model).__name__} is the experts alone, with nothing to replace them in")
    made: dict[nn.Module, ExpertList] = {}
    for name, part in found:
        if part not in made:
            made[part] = ExpertList(part)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made[part])
    return [name for name, _ in found]


def starved(tokens: int, features: int) -> bool:
    """Whether a layer saw too few tokens to be calibrated: fewer than 32, or than an eighth of its input features.

    X^T X of `tokens` rows has at most that rank: in most directions such a Hessian is nothing but its damping, and
    a solver moves errors to where these few tokens do not look. Rounding to nearest has no such bias; the layer, most
    often that of an expert, is rounded so, and named in the report.
    """
    return tokens < max(MIN_TOKENS, features // 8)


def routers(model: nn.Module) -> list[str]:
    """Names of the linear layers that send tokens to experts, or weigh a shared expert against them.

    They are as good as free to keep dense, and an error in them sends tokens elsewhere. None in a model without
    experts; none either where the router is no nn.Linear, which is what transformers mostly does.
    """
    names = [name for name, _ in model.named_modules()]
    if not has_fused_experts(model) and not any("experts" in name.split(".") for name in names):
        return []
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ROUTERS.intersection(name.split("."))
    ]


def checkpoint_names(model: PreTrainedModel) -> dict[str, str]:
    """Tensor of the model, its experts apart -> its name in a checkpoint of the usual layout, one tensor per expert.

    A QuantLinear counts as the nn.Linear it replaced: what is packed goes under "<name without .weight>.weight_packed".
    Raises ValueError where the usual layout is more than a renaming.
    """
    return {name: source.key if source.expert is None else name for name, source in _on_disk(model).items()}


def apart_on_disk(model: PreTrainedModel) -> bool:
    """Whether the usual checkpoint of this model keeps its experts one by one; so it is too for a model without any.

    Only then does transformers find packed experts; it takes GPT-OSS's, for one, for missing, and makes up random ones.
    """
    return all(source.expert is None for source in _on_disk(model).values())


def fused_on_disk(model: PreTrainedModel) -> dict[str, Source]:
    """Of the tensors of experts that the usual checkpoint of this model keeps fused: where there."""
    if not any(isinstance(module, ExpertList) for module in model.modules()):
        return {}
    return {name: source for name, source in _on_disk(model).items() if source.expert is not None}


def fuse(state: Mapping[str, Tensor], parts: Mapping[str, Source]) -> dict[str, Tensor]:
    """The state with those of its tensors that `parts` has put together as it says; all experts of a fused tensor are
    there, or none."""
    found = {name: tensor for name, tensor in state.items() if name not in parts}
    fused: dict[str, list[str]] = {}
    for name in state:
        if name in parts:
            fused.setdefault(parts[name].key, []).append(name)
    for key, names in fused.items():
        sources = [parts[name] for name in names]
        count = 1 + max(cast(int, source.expert) for source in sources)
        outputs = max(cast(range, source.features).stop for source in sources)
        shape = [outputs, *state[names[0]].shape[1:]]
        whole = state[names[0]].new_empty(count, *(reversed(shape) if sources[0].transposed else shape))
        for name, source in zip(names, sources, strict=True):
            source.take(whole[cast(int, source.expert)]).copy_(state[name])
        found[key] = whole
    return found


def source_keys(model: PreTrainedModel, keys: Collection[str]) -> dict[str, Source]:
    """Tensor of the model, its experts apart -> where it is in a dense checkpoint that holds tensors called `keys`.

    Experts may be one by one there, under the usual names or the model's own, or fused. A tensor that the checkpoint
    does not hold (a tied head) is not in the answer. Raises ValueError as `checkpoint_names`.
    """
    held = set(keys)
    usual = _on_disk(model)
    fused = dict(_members(model))
    found: dict[str, Source] = {}
    for name, source in usual.items():
        for candidate in (source, fused.get(name), Source(name)):
            if candidate is not None and candidate.key in held:
                found[name] = candidate
                break
    return found


def _is_fused(module: nn.Module) -> bool:
    kind = type(module).__name__
    sizes = [p.dim() for p in module.parameters(recurse=False)]
    return bool(sizes) and (("Expert" in kind and max(sizes) >= 2) or ("moe" in kind.lower() and max(sizes) == 3))


def _check(fused: nn.Module) -> None:
    """ValueError unless `fused` keeps to the common interface of transformers' experts (use_experts_implementation)."""
    kind = type(fused).__name__
    own = {name: p.dim() for name, p in fused.named_parameters(recurse=False)}
    if not hasattr(fused, "has_gate"):
        raise ValueError(
            f"{kind} keeps its experts in a form of its own ({', '.join(own)}), not in the one common to transformers' "
            "experts; it cannot be taken apart into linear layers"
        )
    if getattr(fused, "_is_expert_parallel", False):
        raise ValueError(f"{kind} is split over devices by experts; load the model on one device")
    if "forward" in vars(fused):
        raise ValueError(f"{kind} has its forward replaced (by accelerate's device_map?); load the model without")
    weights = ["gate_up_proj" if fused.has_gate else "up_proj", "down_proj"]
    expected = dict.fromkeys(weights, 3) | (dict.fromkeys((f"{w}_bias" for w in weights), 2) if fused.has_bias else {})
    if own != expected:
        raise ValueError(f"{kind} has parameters (dimensions) {own}, expected {expected}")


def _interleaved(fused: nn.Module) -> bool:
    """Whether gate and up take turns, feature by feature: GPT-OSS. transformers 5.3 has no attribute that says so."""
    return not getattr(fused, "is_concatenated", not type(fused).__name__.startswith("GptOss"))


def _members(model: nn.Module, each: int | None = None) -> Iterator[tuple[str, Source]]:
    """Every tensor of every expert by name, and where it is in the fused tensor; as if a layer had `each` outputs."""
    for prefix, experts in model.named_modules():
        if not isinstance(experts, ExpertList):
            continue
        for tensor, members in experts.fused_tensors().items():
            for expert in range(experts.count):
                for member in members:
                    name = f"{prefix}.{expert}.{member}"
                    outputs = each or cast(int, model.get_submodule(name).out_features)
                    features = experts.features(member, members, outputs)
                    yield f"{name}.weight", Source(f"{prefix}.{tensor}", expert, features, experts.is_transposed)
                    if experts.has_bias:
                        yield f"{name}.bias", Source(f"{prefix}.{tensor}_bias", expert, features)


def _probes(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that the model would have with its experts fused: small ones of the same form, no number twice.

    An expert's layers get 2 output and 3 input features here, enough to see whether something is turned around.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, ExpertList):
            for tensor, members in module.fused_tensors().items():
                E, N, K = module.count, 2 * len(members), 3
                shapes[f"{prefix}.{tensor}"] = (E, K, N) if module.is_transposed else (E, N, K)
                if module.has_bias:
                    shapes[f"{prefix}.{tensor}_bias"] = (E, N)
    apart = {name for name, _ in _members(model, 2)}
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        packed = isinstance(model.get_submodule(owner), QuantLinear) and leaf != "bias"
        name = f"{owner}.weight" if packed else key
        if name not in apart:  # two along every side: cut or turned in any direction, it is another tensor
            shapes[name] = (2,) * tensor.dim()
    probes, start = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        probes[name] = torch.arange(start, start + size).view(shape)
        start += size
    return probes


def _print(probe: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(probe.shape), tuple(probe.flatten().tolist())


def _on_disk(model: PreTrainedModel) -> dict[str, Source]:
    """Where transformers puts every tensor when it saves this model with its experts fused.

    There is no list of that; so probes go the way of save_pretrained, and are recognized where they come out.
    """
    # Not for users of transformers; imported here, so that all but checkpoints of experts outlives its renaming.
    from transformers.core_model_loading import revert_weight_conversion

    probes, members = _probes(model), dict(_members(model))
    fused = {source.key for source in members.values()}
    plain = set(probes) - fused
    single = {_print(probes[name]): name for name in plain}
    single |= {_print(s.take(probes[s.key][s.expert])): name for name, s in _members(model, 2)}
    whole = {_print(probes[name]): name for name in fused}
    # What a checkpoint was read from says how it would be written back; asked for is the usual layout.
    read_as = model.__dict__.pop("_weight_conversions", None)
    try:
        written = revert_weight_conversion(model, probes)
    except Exception as error:
        raise ValueError(f"model: how files keep a {type(model).__name__} is not understood ({error})") from None
    finally:
        if read_as is not None:
            model._weight_conversions = read_as
    found: dict[str, Source] = {}
    for key, probe in written.items():
        mark = _print(probe)
        if mark in single:
            found[single[mark]] = Source(key)
        elif mark in whole:
            parts = {name: source for name, source in members.items() if source.key == whole[mark]}
            found |= {name: replace(source, key=key) for name, source in parts.items()}
    lost = sorted({*members, *plain} - set(found))
    if lost:
        raise ValueError(
            f"model: files keep {lost[0]} of a {type(model).__name__} in another form than the model, which is not "
            f"understood ({len(lost)} such tensors)"
        )
    return found
