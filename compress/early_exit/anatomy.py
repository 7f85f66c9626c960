"""What leaving early has to know of a model: its layers, how one makes keys and values, what stands behind the last.

Both are written down per family of architectures and then compared, on a few tokens, with what the model itself does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..block import decoder_list, first

# Layers of these read one token after another by attention alone, with keys and values of their own.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "opt")
# Tokens of the pass that compares.
_PROBE = 4
# Of the largest value: two orders of adding up in the model's dtype; 16-bit models round logits of some size.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Kwargs = Mapping[str, Any]
# On a layer's forward that is not its own.
_MARK = "early_exit"


@dataclass(frozen=True)
class Anatomy:
    """layers        decoder layers in order
    keys_values   (layer, state [n, 1, d], what the layer is called with) -> keys and values [n, H, 1, D]
    logits        states [..., d] behind the last layer -> [..., V], by final norm and head
    """

    layers: list[nn.Module]
    keys_values: Callable[[nn.Module, Tensor, Kwargs], tuple[Tensor, Tensor]]
    logits: Callable[[Tensor], Tensor]

    @property
    def depth(self) -> int:
        return len(self.layers)


@torch.no_grad()
def anatomy(model: PreTrainedModel) -> Anatomy:
    """Of a causal language model of FAMILIES, dense or packed. Runs it once, on four tokens.

    Raises ValueError for another architecture, a model in training mode, or one that does something else than its
    family's code.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: {type(model).__name__} is around a model; merge it, or give the model inside")
    kind = getattr(model.config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"model: {type(model).__name__} ({kind}) cannot leave early; known: {', '.join(FAMILIES)} (no mixtures of "
            "experts, no state-space layers, no keys shared between layers)"
        )
    if model.training:
        raise ValueError(f"model: {type(model).__name__} is in training mode; call model.eval() first")
    owner, _, layers = decoder_list(model)
    found = Anatomy(list(layers), _opt_keys if kind == "opt" else _rotary_keys, _head(model, owner, kind))
    _check(model, found)
    return found


def _head(model: PreTrainedModel, owner: nn.Module, kind: str) -> Callable[[Tensor], Tensor]:
    """owner: the module that has the list of layers, and what follows it."""
    head: Any = model.get_output_embeddings()
    if kind == "opt":
        steps = [owner.final_layer_norm, owner.project_out]  # either may be None
    else:
        steps = [owner.norm]
    modules: list[Any] = [step for step in steps if step is not None]

    def logits(state: Tensor) -> Tensor:
        for module in modules:
            state = module(state)
        return head(state)

    return logits


def _opt_keys(layer: Any, h: Tensor, kwargs: Kwargs) -> tuple[Tensor, Tensor]:  # noqa: ARG001, positions are in h
    x = layer.self_attn_layer_norm(h) if layer.do_layer_norm_before else h
    attention = layer.self_attn
    return _heads(attention.k_proj(x), attention.head_dim), _heads(attention.v_proj(x), attention.head_dim)


def _rotary_keys(layer: Any, h: Tensor, kwargs: Kwargs) -> tuple[Tensor, Tensor]:
    x, attention = layer.input_layernorm(h), layer.self_attn
    if hasattr(attention, "qkv_proj"):
        k, v = _fused(attention, x)
    else:
        k, v = attention.k_proj(x), attention.v_proj(x)
    k = k.view(*k.shape[:-1], -1, attention.head_dim)
    if hasattr(attention, "k_norm"):
        k = attention.k_norm(k)
    k = k.transpose(1, 2)
    cos, sin = kwargs["position_embeddings"]
    # The family's own way to turn: some turn a part of a head alone. It takes queries, too: none of them here.
    _, k = sys.modules[type(attention).__module__].apply_rotary_pos_emb(k[:, :0], k, cos, sin)
    return k, _heads(v, attention.head_dim)


def _fused(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a projection that makes queries, keys and values, in this order."""
    width = attention.config.num_key_value_heads * attention.head_dim
    projection = attention.qkv_proj
    # A packed weight has no rows to choose from; hooks (adapters) see whole layers.
    if type(projection) is nn.Linear and not projection._forward_hooks:
        bias = None if projection.bias is None else projection.bias[-2 * width :]
        return linear(x, projection.weight[-2 * width :], bias).split(width, -1)
    return projection(x)[..., -2 * width :].split(width, -1)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[n, Q, H D] -> [n, H, Q, D]"""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)


def _check(model: PreTrainedModel, found: Anatomy) -> None:
    """Keys, values and logits of one pass beside those that `found` makes of its states."""
    seen: dict[int, tuple[Tensor, Kwargs]] = {}

    def kept(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
            seen[number] = (args[0] if args else kwargs["hidden_states"]), kwargs

        return hook

    last: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(kept(i), with_kwargs=True) for i, layer in enumerate(found.layers)]
    handles.append(found.layers[-1].register_forward_hook(lambda *call: last.append(first(call[-1]))))
    ids = torch.arange(_PROBE, device=model.device)[None] % model.config.vocab_size
    cache = DynamicCache(config=model.config)
    try:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True).logits
    finally:
        for handle in handles:
            handle.remove()
    for i, layer in enumerate(found.layers):
        there: Any = cache.layers[i]
        for kind, ours, theirs in zip(
            ("keys", "values"), found.keys_values(layer, *seen[i]), (there.keys, there.values), strict=True
        ):
            _same(model, f"{kind} of layer {i}", ours, theirs)
    _same(model, "logits", found.logits(last[0]), logits)


def _same(model: PreTrainedModel, what: str, ours: Tensor, theirs: Tensor) -> None:
    limit = _SAME.get(theirs.dtype, 1e-4) * float(theirs.abs().max())
    if ours.shape != theirs.shape or not float((ours.float() - theirs.float()).abs().max()) <= limit:
        raise ValueError(
            f"model: {type(model).__name__} cannot leave early: its {what} are not those of its architecture "
            f"({model.config.model_type}); something was changed or added in it"
        )


@contextmanager
def wrapped(layers: list[nn.Module], wrap: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside the block layer i is called as wrap(i, its forward); afterwards, also after an error, as before."""
    if any(hasattr(layer.forward, _MARK) for layer in layers):
        raise ValueError("model: leaves early already; one way at a time")
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for i, layer in enumerate(layers):
            instead = wrap(i, layer.forward)
            setattr(instead, _MARK, True)
            layer.forward = instead
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if own is not None:  # as accelerate's hooks leave it
                layer.__dict__["forward"] = own
