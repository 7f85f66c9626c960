"""The walk: run a model without weights on torch's meta device, and count what every op would do.

Each op is seen with the shapes of what it is given, and its module (recorder.py). Attention is taken out of the model's
hands (transformers lets it be exchanged by name) and counted in closed form from its queries, keys and values: as a
fused kernel works, causal, within its window, with as many heads of keys as there are. No architecture is known by
name. What a product takes and gives, its weights, and keys and values are the *ideal* bytes; what every op reads and
writes by itself are the *eager* ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .recorder import ACTIVE, Recorder, Seen, storage
from .work import Phase, Step

NAME = "remanence_walk"


def walk(
    model: PreTrainedModel, batch: int, prompt: int, context: int | None = None, tokens: int = 1
) -> tuple[Step, Step]:
    """The pass over a prompt, and a later one that decodes: (prefill, decode).

    model     on the meta device (skeleton, or meta_copy)
    prompt    tokens of each of `batch` sequences, all of the same length; the head sees the last of them alone, where
              the model's forward can be told so
    context   tokens in the cache before the second pass; None: the prompt's
    tokens    new ones of each sequence in the second pass; more than one is how drafted tokens are verified

    Raises ValueError for numbers below 1, a context shorter than the prompt, a model that keeps no cache, and one that
    does something for which values are needed, by the op and the module.
    """
    context = prompt if context is None else context
    for name, value, least in (("batch", batch, 1), ("prompt", prompt, 1), ("tokens", tokens, 1)):
        if value < least:
            raise ValueError(f"{name}: {value} is below {least}")
    if context < prompt:
        raise ValueError(f"context: {context} tokens are fewer than the prompt's {prompt}")
    if not all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(f"model: {type(model).__name__} is not on the meta device; expected skeleton() or meta_copy()")
    model.eval()
    with torch.no_grad(), _intercepted(model):
        prefill, cache = _pass(model, "prefill", batch, prompt, 0, None)
        if context > prompt:  # anew: not every recurrent layer takes more than one token after the first pass
            _, cache = _pass(model, "prefill", batch, context, 0, None)
        decode, _ = _pass(model, "decode", batch, tokens, context, cache)
    return prefill, decode


def _pass(model: PreTrainedModel, phase: Phase, batch: int, tokens: int, context: int, cache: Any) -> tuple[Step, Any]:
    network: Any = model
    inner = network.get_base_model() if hasattr(network, "get_base_model") else network  # an adapter takes anything
    takes = inspect.signature(inner.forward).parameters
    given: dict[str, Any] = {"input_ids": torch.zeros(batch, tokens, dtype=torch.long, device="meta")}
    if "logits_to_keep" in takes:
        given["logits_to_keep"] = 1 if phase == "prefill" else 0
    if cache is not None:
        given["past_key_values" if "past_key_values" in takes else "cache_params"] = cache
    recorder = Recorder(model, batch, context, [given["input_ids"], *_held(cache)])
    with recorder.watching(), recorder, _Fused(recorder):
        try:
            output = model(**given, use_cache=True)
        except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
            where = f"{recorder.where or 'the model itself'}, at {recorder.last or 'no op yet'}"
            raise ValueError(
                f"model: {type(model).__name__} cannot be walked without values: {where}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from None
    cache = getattr(output, "past_key_values", None)
    cache = getattr(output, "cache_params", None) if cache is None else cache
    held = sum(tensor.untyped_storage().nbytes() for tensor in _held(cache))
    if not held:
        raise ValueError(
            f"model: {type(model).__name__} keeps no cache to decode with; expected a causal language model"
        )
    step = recorder.step(phase, tokens, held)
    if not step.total("kv_read") and _attends(model):
        said = f"{type(model).__name__} has an attention of its own: every query with every key, which is an activation"
        step = replace(step, assumed=(*step.assumed, said))
    return step, cache


def _held(cache: Any) -> list[Tensor]:
    """Every tensor that a cache keeps, whatever its class."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()

    def look(value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            found[storage(value)] = value
        elif depth and id(value) not in seen:
            seen.add(id(value))
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
            for each in vars(value).values() if inner is None and hasattr(value, "__dict__") else inner or ():
                look(each, depth - 1)

    look(cache, 5)
    return list(found.values())


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,  # noqa: ARG001, given by transformers
    **given: Any,
) -> tuple[Tensor, None]:
    """One of transformers' attention functions. The mask is None: no values are there to be hidden."""
    window = given["sliding_window"] if "sliding_window" in given else getattr(module, "sliding_window", None)
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = window if isinstance(window, int) and causal else None
    return ACTIVE.get().attend(query, key, value, Seen(bool(causal), window, _chunk(module))), None


def _chunk(module: nn.Module) -> int | None:
    """Of a layer that sees its own piece of the text alone (Llama 4)."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or index is None or index >= len(kinds) or kinds[index] != "chunked_attention":
        return None
    return config.attention_chunk_size  # type: ignore[union-attr]


class _Fused(TorchFunctionMode):
    """Counts torch's own attention where a model calls it by itself. On the meta device it would fall to pieces."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | kwargs
        q, k, v = (named[name] for name in ("query", "key", "value"))
        if named.get("attn_mask") is not None and q.shape[2] > 1:
            self.recorder.assume(f"{self.recorder.place()}: its mask is taken for a causal one")
        return self.recorder.attend(q, k, v, Seen()).transpose(1, 2)


def _attends(model: PreTrainedModel) -> bool:
    return any("attention" in type(part).__name__.lower() for part in model.modules())


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@contextmanager
def _intercepted(model: PreTrainedModel) -> Iterator[None]:
    """With attention that tells, where the model lets it be exchanged, and with experts that meta tensors can go
    through."""
    attention, experts = model.config._attn_implementation, getattr(model.config, "_experts_implementation", None)
    validates = Distribution._validate_args
    Distribution.set_default_validate_args(False)  # it looks at values
    try:
        model.set_attn_implementation(NAME)
    except ValueError:  # an attention of its own: its products are counted as they come
        model.set_attn_implementation(attention)
    if experts is not None:
        model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validates)
        model.set_attn_implementation(attention)
        if experts is not None:
            model.set_experts_implementation(experts)
