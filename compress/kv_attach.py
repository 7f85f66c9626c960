"""A model that serves with a quantized KV cache by itself (kv_cache.py says what that means).

One attention function does prefill, decoding and whole texts at once: it sees what is new, has the layer of the cache
keep it (a layer of its own where there is no cache), and attends to rounded and exact keys side by side, by a mask per
query. A pass over S tokens so holds keys and values twice and a mask [B, 1, S, 2S]; decoding holds one layer's keys and
values in full at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from .kv_bias import key_bias
from .kv_cache import ATTRIBUTE, KVCache, KVLayer, Serving, serving_of
from .kv_rows import Rows
from .spec import KVSpec

# The name of our attention among transformers'.
NAME = "remanence_kv"
# Where `generate` makes its cache: before forward, so that a hook there comes too late.
_PREPARE = "_prepare_cache_for_generation"
# What some models' attention does beyond softmax(q k) v, and we do not.
_MORE = ("softcap", "s_aux", "position_bias", "sliding_window")
# Tokens of the passes that show how a model makes its keys and what it makes of them.
_PROBE = 4
# Of the output, between attentions that add up in different orders; the root of the dtype's precision, if that is more.
_SAME = 1e-4


@torch.no_grad()
def attach_kv_(model: PreTrainedModel, spec: KVSpec) -> None:
    """From now on `generate` and `forward` quantize keys and values, until detach_kv_; what save_pretrained writes
    stays the same. Runs the model three times on four tokens, too few for a chunk: what it says must stay what it was.

    Raises ValueError for a model that serves so already, whose attention is not transformers' own or is more than
    softmax(q k) v over all earlier tokens, whose heads do not divide into the groups, or that has nothing that
    `pre_bias` could take out.
    """
    if hasattr(model, ATTRIBUTE):
        raise ValueError(f"{type(model).__name__}: serves with a quantized KV cache already; call detach_kv_ first")
    _check_layers(model)
    AttentionInterface.register(NAME, quantized_attention)
    AttentionMaskInterface.register(NAME, _whole_mask)
    serving = Serving(spec, before=model.config._attn_implementation)
    with _evaluating(model):
        expected = _short_pass(model)
    setattr(model, ATTRIBUTE, serving)
    try:
        for module in _indexed(model):
            setattr(module, ATTRIBUTE, serving)
            if spec.pre_bias:
                serving.handles.append(module.register_forward_pre_hook(_note_turn, with_kwargs=True))
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ValueError(f"{type(model).__name__}: transformers cannot exchange the attention of this model")
        with _evaluating(model):
            _probe(model, serving)
            _check_same(model, expected, _short_pass(model))
    except BaseException:
        detach_kv_(model)
        raise
    serving.handles.append(model.register_forward_pre_hook(_give_cache, with_kwargs=True))
    setattr(model, _PREPARE, MethodType(_prepare_cache, model))


def detach_kv_(model: PreTrainedModel) -> None:
    """Undoes attach_kv_. ValueError where there is nothing to undo."""
    serving = serving_of(model)
    for handle in serving.handles:
        handle.remove()
    model.__dict__.pop(_PREPARE, None)
    model.set_attn_implementation(serving.before)
    for module in [model, *_indexed(model)]:
        module.__dict__.pop(ATTRIBUTE, None)


def check_rounded(model: PreTrainedModel) -> None:
    """ValueError when nothing that the model has served since attach_kv_ was long enough for a chunk to be rounded: its
    answers were those of a cache in full precision."""
    serving = serving_of(model)
    if not serving.chunks:
        g, residual = serving.spec.group_size, serving.spec.residual
        raise ValueError(
            f"kv: no key or value was rounded: no text has {g + residual} tokens, the first chunk ({g}) and the newest "
            f"that stay exact ({residual}); expected a smaller kv_group_size or kv_residual"
        )


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One of transformers' attention functions: query [B, H', Q, D], key and value [B, H, Q, D] of the Q new columns,
    attention_mask bool [B, 1, Q, S] -> [B, Q, H', D], zeros where a column is padding. H' is a multiple of H.

    Raises ValueError for a mask that hides more than padding and what comes later, and for another model's cache.
    """
    serving = serving_of(module)
    layer, serving.waiting = serving.waiting, None
    index = int(module.layer_idx)  # type: ignore[arg-type]
    more = [name for name in _MORE if kwargs.get(name) is not None]
    if more:
        raise ValueError(
            f"{type(module).__name__}: its attention has {', '.join(more)}, which the KV cache does not know"
        )
    if serving.probed is not None:
        serving.probed[index] = module, key, value.shape[3], serving.turn
    if layer is None:
        layer = KVLayer(serving, Rows(serving.spec), index)
        layer.columns = query.shape[2]
    rows, step = layer.rows, layer.rows.step
    # The first layer of a pass works out what is where.
    if step is None or rows.columns != layer.columns:
        step = rows.advance(_real_columns(attention_mask, query, key, layer), serving.turn)
        serving.chunks += step.fresh
    query, key = serving.rotated(query), serving.rotated(key)
    keys, values = layer.extend(key, value, step)
    if index == serving.layers - 1:
        rows.step = None  # its mask is large
    shared = query.shape[1] // keys.shape[1]
    if shared > 1:
        keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
    out = F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=step.seen.to(query.device),
        dropout_p=dropout,
        scale=scaling,
    )
    out = out.masked_fill(~step.real.to(query.device)[:, None, :, None], 0)
    return out.transpose(1, 2).contiguous(), None


def _real_columns(mask: Tensor | None, query: Tensor, key: Tensor, layer: KVLayer) -> Tensor:
    """Which of the new columns are tokens [B, Q] bool, from the mask that the model made."""
    B, _, Q, _ = query.shape
    columns, tokens = layer.columns, layer.rows.tokens
    if key.shape[2] != Q:
        raise ValueError(
            f"past_key_values: {key.shape[2]} keys for {Q} queries; expected a KVCache of this model, or none"
        )
    if layer.rows.columns != columns - Q:
        raise ValueError("past_key_values: an earlier pass ended before the last layer; start with a new KVCache")
    if mask is None or mask.dtype != torch.bool or mask.shape[1:] != (1, Q, columns):
        found = "none" if mask is None else f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"attention_mask: {found}; expected one entry per token [B, {columns}], 0 for padding")
    mask = mask[:, 0].expand(B, -1, -1)
    known = mask[:, -1]  # the last query sees all that is no padding
    at = torch.arange(columns, device=mask.device)
    if not torch.equal(mask, known[:, None] & (at <= at[columns - Q :, None])):
        raise ValueError("attention_mask: hides more than padding and later tokens; the KV cache knows no other")
    if tokens is not None and not torch.equal(known[:, : columns - Q].sum(1), tokens.to(mask.device)):
        raise ValueError("attention_mask: other columns are padding than when the cache was filled")
    return known[:, columns - Q :]


def _whole_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """As for scaled_dot_product_attention, but written out also where it is nothing but causal."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _indexed(model: nn.Module) -> list[nn.Module]:
    """Modules that know the number of their layer: those that use a cache are among them."""
    return [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]


def _check_layers(model: PreTrainedModel) -> None:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__}: an encoder and a decoder; the KV cache knows decoders only")
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {DynamicLayer.__name__}
    if kinds:
        raise ValueError(
            f"{type(model).__name__}: caches by {', '.join(sorted(kinds))}; the KV cache knows only layers that see "
            "all earlier tokens (no sliding window, no state)"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _short_pass(model: PreTrainedModel) -> Tensor:
    # Tokens that differ: of equal ones attention makes the same whatever its weights.
    ids = torch.arange(_PROBE, device=model.device)[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]


def _check_same(model: PreTrainedModel, expected: Tensor, found: Tensor) -> None:
    off = float((found.float() - expected.float()).norm() / expected.float().norm())
    within = max(_SAME, torch.finfo(expected.dtype).eps ** 0.5)
    if not off <= within:
        raise ValueError(
            f"{type(model).__name__}: its attention is more than softmax(q k) v: before anything is rounded, what "
            f"it says changes by {off:.1e}, above {within:.1e}"
        )


def _probe(model: PreTrainedModel, serving: Serving) -> None:
    """One pass with zeros as the input of every attention: do all layers come to us, with which keys?"""
    serving.probed = {}
    zeroing = [module.register_forward_pre_hook(_zero, with_kwargs=True) for module in _indexed(model)]
    try:
        _short_pass(model)
        probed = serving.probed
    finally:
        serving.probed = None
        for handle in zeroing:
            handle.remove()
    layers = model.config.get_text_config().num_hidden_layers
    missing = sorted(set(range(layers)) - set(probed))
    if missing:
        raise ValueError(f"{type(model).__name__}: layers {missing} have no attention that transformers can exchange")
    for _, keys, channels, _ in probed.values():
        serving.spec.key_tile(keys.shape[3])
        serving.spec.value_tile(channels)
    serving.layers = layers
    if serving.spec.pre_bias:
        seen = [probed[at] for at in range(layers)]
        if any(turn is not None and seen[0][3] is not None and turn[0] is not seen[0][3][0] for *_, turn in seen):
            raise ValueError(f"{type(model).__name__}: kv pre_bias: layers turn keys in different ways")
        serving.biases = [key_bias(module, keys, turn) for module, keys, _, turn in seen]
        if not any(serving.biases):
            raise ValueError(f"kv pre_bias: no key of {type(model).__name__} has a bias; expected pre_bias=False")


def _zero(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ARG001
    if "hidden_states" in kwargs:
        return args, kwargs | {"hidden_states": torch.zeros_like(kwargs["hidden_states"])}
    return (torch.zeros_like(args[0]), *args[1:]), kwargs


def _note_turn(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
    serving_of(module).turn = kwargs.get("position_embeddings")


def _give_cache(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A KVCache where the model would have made a cache of its own."""
    serving = serving_of(model)
    serving.waiting = None  # of a pass that ended with an error
    bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    given = bound.arguments | bound.arguments.get("kwargs", {})
    past, wanted = given.get("past_key_values"), given.get("use_cache")
    if past is not None:
        if not isinstance(past, KVCache) or past.serving is not serving:
            raise ValueError(f"past_key_values: {type(past).__name__}; expected a KVCache of this model, or none")
        return None
    if wanted is None:
        wanted = model.config.get_text_config().use_cache
    if not wanted or model.training:
        return None
    bound.arguments["past_key_values"] = KVCache(model)
    return bound.args, bound.kwargs


def _prepare_cache(
    self: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    wanted = generation_config.use_cache is not False and generation_config.cache_implementation is None
    if wanted and model_kwargs.get("past_key_values") is None:
        model_kwargs["past_key_values"] = KVCache(self)
    return getattr(type(self), _PREPARE)(self, generation_config, model_kwargs, *args, **kwargs)
