"""The walk: run a model without weights on torch's meta device, and count what every op would do.

A dispatch mode sees each op with the shapes of what it is given; hooks tell in which module it runs. Attention is taken
out of the model's hands (transformers lets it be exchanged by name) and counted in closed form from its queries, keys
and values: as a fused kernel works, causal, within its window, with as many heads of keys as there are. No architecture
is known by name. What a product takes and gives, its weights, and keys and values are the *ideal* bytes; what every op
reads and writes by itself are the *eager* ones.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...compress.experts import fused_experts
from .counts import GATHERS, PRODUCTS, name_of, touches
from .work import Attention, Kind, Part, Phase, Step, Uncounted, met

NAME = "remanence_walk"
# Share of the keys and values seen, below which a cache keeps something else.
_LATENT = 0.9
# A value that a model reads out of a tensor: on the meta device there is none.
_READ = "_local_scalar_dense"


def walk(
    model: PreTrainedModel, batch: int, prompt: int, context: int | None = None, tokens: int = 1
) -> tuple[Step, Step]:
    """The pass over a prompt, and a later one that decodes: (prefill, decode).

    model     on the meta device (skeleton, or meta_copy)
    prompt    tokens of each of `batch` sequences, all of the same length; the head sees the last of them alone, where
              the model's forward can be told so
    context   tokens in the cache before the second pass; None: the prompt's
    tokens    new ones of each sequence in the second pass; more than one is how drafted tokens are verified

    Raises ValueError for numbers below 1, a context shorter than the prompt, and a model that does something for which
    values are needed, by the op and the module.
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
        if context > prompt:
            _, cache = _pass(model, "prefill", batch, context - prompt, prompt, cache)
        decode, _ = _pass(model, "decode", batch, tokens, context, cache)
    return prefill, decode


def _pass(model: PreTrainedModel, phase: Phase, batch: int, tokens: int, context: int, cache: Any) -> tuple[Step, Any]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # an adapter's takes anything
    takes = inspect.signature(inner.forward).parameters
    given: dict[str, Any] = {"input_ids": torch.zeros(batch, tokens, dtype=torch.long, device="meta")}
    if "logits_to_keep" in takes:
        given["logits_to_keep"] = 1 if phase == "prefill" else 0
    if cache is not None:
        given["past_key_values" if "past_key_values" in takes else "cache_params"] = cache
    recorder = _Recorder(model, batch, [given["input_ids"], *_held(cache)])
    with recorder.watching(), recorder:
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
    return recorder.step(phase, tokens, context, held), cache


@dataclass
class _Tally:
    """A part in the making; its fields are Part's."""

    kind: Kind
    compute: str
    kept: str
    flops: float = 0.0
    weight_bytes: float = 0.0
    kv_read: float = 0.0
    kv_written: float = 0.0
    activation_bytes: float = 0.0
    rows: int = 0
    touched: float = 0.0
    eager_bytes: float = 0.0
    ops: int = 0
    experts: int = 0
    chosen: int = 0


class _Recorder(TorchDispatchMode):
    """Counts one pass. Storages are told apart by the address of their descriptor: a view shares its tensor's."""

    def __init__(self, model: PreTrainedModel, batch: int, given: list[Tensor]) -> None:
        super().__init__()
        self.model, self.batch = model, batch
        self.given = {_storage(tensor) for tensor in given}
        self.last = self.where = ""
        self.stack: list[tuple[str, nn.Module]] = []
        self.tallies: dict[str, _Tally] = {}
        self.attention: dict[str, Attention] = {}
        self.uncounted: dict[str, list[str]] = {}
        self.assumed: dict[str, None] = {}
        self.experts = fused_experts(model)
        self.routed: dict[str, float] = {}  # share of a module's experts that its tokens meet
        self.parameters = {_storage(parameter) for parameter in model.parameters()}
        self.buffers = {_storage(buffer) for buffer in model.buffers()}
        self.read: set[int] = set()  # weights that were read as a whole
        self.fetched: set[int] = set()  # weights of experts, as they were put together for their tokens
        self.made: set[int] = set()
        self.live = self.peak = 0
        self.alive: dict[int, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know in which module an op runs."""
        handles: list[Any] = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._leaving, always_call=True))
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.stack.append((name, module))
            if name in self.experts:
                chosen = keywords.get("top_k_index", args[1] if len(args) > 1 else None)
                if isinstance(chosen, Tensor) and chosen.dim() == 2:
                    tally = self.tally()
                    tally.experts, tally.chosen = self.experts[name], chosen.shape[1]
                    self.routed[name] = met(tally.experts, tally.chosen, chosen.shape[0])

        return hook

    def _leaving(self, *_: Any) -> None:
        self.stack.pop()

    def place_name(self) -> str:
        """Of the module that is running; "": the model itself."""
        return self.stack[-1][0] if self.stack else ""

    def place(self) -> str:
        return self.place_name() or "the model itself"

    def tally(self) -> _Tally:
        """Of the module that is running."""
        name, module = self.stack[-1] if self.stack else ("", self.model)
        if name not in self.tallies:
            dtype = next((p.dtype for p in module.parameters(recurse=False)), self.model.dtype)
            self.tallies[name] = _Tally(self._kind(name, module), _number(dtype), _number(dtype))
        return self.tallies[name]

    def _kind(self, name: str, module: nn.Module) -> Kind:
        if name in self.experts:
            return "experts"
        if isinstance(module, nn.Linear | Conv1D):
            return "linear"
        return "embedding" if isinstance(module, nn.Embedding) else "other"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = self.last = name_of(func)
        self.where = self.place()
        if name == _READ:
            self.assumed.setdefault(f"{self.place()}: a value that only a real run would know is taken for 0")
            return 0
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        sources = {_storage(tensor) for tensor in inputs}
        if not func._schema.is_mutable and all(_storage(tensor) in sources for tensor in outputs):
            self._free(name, inputs, outputs)
            return out
        gathered = args[GATHERS[name]] if name in GATHERS else None
        if gathered is not None and self.place_name() in self.routed and self._is_weight(gathered):
            # Put together for the walk alone: served, a kernel reads each expert's weights where they lie.
            self.fetched.add(_storage(outputs[0]))
            weakref.finalize(outputs[0].untyped_storage(), self.fetched.discard, _storage(outputs[0]))
            self._meet(gathered)
            return out
        for tensor in outputs:
            self._born(tensor, sources)
        self._count(func, name, args, kwargs, inputs, outputs)
        return out

    def _free(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """A view, or an op without a tensor as its result: nothing moves, unless its work is one of values."""
        if not outputs and inputs and name not in ("sym_size", "sym_numel", "size", "_assert_async"):
            self._unknown(name)

    def _unknown(self, name: str) -> None:
        self.uncounted.setdefault(name, []).append(self.place())

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        tally = self.tally()
        tally.ops += 1
        gathered = args[GATHERS[name]] if name in GATHERS else None
        eager = sum(map(_bytes, outputs))
        for tensor in inputs:
            if tensor is gathered:
                eager += _bytes(outputs[0])
            elif _storage(tensor) in self.fetched:
                continue
            else:
                eager += self._whole(tensor, tally) if self._is_weight(tensor) else _bytes(tensor)
        if tally.kind == "embedding" and gathered is not None:
            tally.activation_bytes += _bytes(outputs[0])
        tally.eager_bytes += eager
        if name in PRODUCTS:
            tally.flops += PRODUCTS[name](*args, **kwargs)
            tally.rows += outputs[0].numel() // outputs[0].shape[-1]
            moved = [t for t in inputs if not self._is_weight(t) and _storage(t) not in self.fetched]
            tally.activation_bytes += sum(map(_bytes, (*moved, *outputs)))
            if tally.kind == "other":
                tally.compute = _number(inputs[-1].dtype)
            return
        tally.touched += max((tensor.numel() for tensor in (*inputs, *outputs)), default=0)
        if not touches(func):
            self._unknown(name)

    def _is_weight(self, tensor: Tensor) -> bool:
        """A parameter, or what else was there before the pass and is no buffer: an adapter that a hook brings."""
        key = _storage(tensor)
        return key in self.parameters or not (key in self.buffers or key in self.made or key in self.given)

    def _whole(self, tensor: Tensor, tally: _Tally) -> float:
        if _storage(tensor) not in self.read:
            self.read.add(_storage(tensor))
            tally.weight_bytes += _bytes(tensor)
        return _bytes(tensor)

    def _meet(self, tensor: Tensor) -> None:
        """Read the weights of those experts that the tokens meet."""
        tally, size = self.tally(), self.routed[self.place_name()] * _bytes(tensor)
        tally.weight_bytes += size
        tally.eager_bytes += size

    def _born(self, tensor: Tensor, sources: set[int]) -> None:
        key = _storage(tensor)
        if key in sources or key in self.alive:
            return
        storage = tensor.untyped_storage()
        self.made.add(key)
        self.alive[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        # Its address may belong to another storage from now on.
        self.made.discard(key)
        self.live -= self.alive.pop(key, 0)

    def _forget(self, tensor: Tensor) -> None:
        """It is no activation, but stays (in a cache), or is none at all."""
        self.live -= self.alive.pop(_storage(tensor), 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, causal: bool) -> Tensor:
        """q [B, H, T, D], k [B, H', S, D], v [B, H', S, D'] -> [B, T, H, D'], as one fused kernel does it."""
        B, H, T, D = q.shape
        S, width = k.shape[2], v.shape[3]
        tally, name = self.tally(), self.place_name()
        tally.kind, tally.compute = "attention", _number(q.dtype)
        out = q.new_empty(B, T, H, width)
        pairs = B * H * _pairs(T, S, window, causal)
        token = B * (k.shape[1] * D * k.itemsize + v.shape[1] * width * v.itemsize)
        read = token * (S if window is None else min(S, window + T - 1))
        tally.flops += 2 * pairs * (D + width)
        tally.touched += pairs
        tally.kv_read += read
        tally.kv_written += token * min(T, S)
        tally.activation_bytes += _bytes(q) + _bytes(out)
        tally.eager_bytes += _bytes(q) + read
        for kept in (k, v):
            self._forget(kept)
        self.attention[name] = Attention(name, H * D, k.shape[1] * D, v.shape[1] * width, width, k.itemsize, window)
        return out

    def step(self, phase: Phase, tokens: int, context: int, cached: int) -> Step:
        parts = tuple(Part(name, **vars(tally)) for name, tally in self.tallies.items() if tally.ops)
        unknown = tuple(Uncounted(op, len(where), tuple(dict.fromkeys(where))) for op, where in self.uncounted.items())
        kept = tuple(self.attention.values())
        return Step(phase, self.batch, tokens, context, parts, kept, cached, self.peak, unknown, tuple(self.assumed))


def _with_latents(step: Step, share: float) -> Step:
    """Of a model whose cache keeps less than its attention sees (DeepSeek's latents, from which each pass makes keys
    and values anew): bytes as the cache has them."""
    parts = tuple(
        replace(part, kv_read=share * part.kv_read, kv_written=share * part.kv_written) for part in step.parts
    )
    said = f"the cache keeps {share:.0%} of the keys and values that attention sees: bytes are of what it keeps"
    return replace(step, parts=parts, attention=(), assumed=(*step.assumed, said))


def _number(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """Of its numbers, each place in memory once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _pairs(T: int, S: int, window: int | None, causal: bool) -> int:
    """Keys that the last T of S positions see, added up."""
    if not causal:
        return T * S
    first = S - T + 1  # keys that the first query sees without a window
    if window is None or window >= S:
        return T * (first + S) // 2
    growing = max(0, min(T, window - first))  # queries that do not fill the window yet
    return growing * (2 * first + growing - 1) // 2 + (T - growing) * window


def _held(cache: Any) -> list[Tensor]:
    """Every tensor that a cache keeps, whatever its class."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()

    def look(value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            found[_storage(value)] = value
        elif depth and id(value) not in seen:
            seen.add(id(value))
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
            for each in vars(value).values() if inner is None and hasattr(value, "__dict__") else inner or ():
                look(each, depth - 1)

    look(cache, 5)
    return list(found.values())


# Which recorder an exchanged attention tells; transformers calls it by name.
_ACTIVE: ContextVar[_Recorder] = ContextVar("recorder")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,  # noqa: ARG001, given by transformers
    **given: Any,
) -> tuple[Tensor, None]:
    """One of transformers' attention functions. The mask is None: no values are there to be hidden."""
    window = given.get("sliding_window") or getattr(module, "sliding_window", None)
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = window if isinstance(window, int) and causal else None
    return _ACTIVE.get().attend(query, key, value, window, bool(causal)), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@contextmanager
def _intercepted(model: PreTrainedModel) -> Iterator[None]:
    """With attention that tells, where the model lets it be exchanged, and with experts that meta tensors can go
    through."""
    attention, experts = model.config._attn_implementation, getattr(model.config, "_experts_implementation", None)
    try:
        model.set_attn_implementation(NAME)
    except ValueError:  # an attention of its own: its products are counted as they come
        model.set_attn_implementation(attention)
    if experts is not None:
        model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        if experts is not None:
            model.set_experts_implementation(experts)
