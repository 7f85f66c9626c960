"""What counts a pass: a dispatch mode that sees every op with the shapes of what it is given, and hooks that tell in
which module it runs."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...compress.experts import fused_experts
from .counts import GATHERS, PRODUCTS, name_of, number_of, touches
from .work import Attention, Kind, Part, Phase, Step, Uncounted, met

# Share of the keys and values seen, below which a cache keeps something else.
_LATENT = 0.9
# A value that a model reads out of a tensor: on the meta device there is none.
_READ = "_local_scalar_dense"


@dataclass(frozen=True)
class Seen:
    """Which keys a query sees: all of them, or those before it (causal); of these the last `window`, or those of its
    own piece of `chunk` tokens. None: no such bound."""

    causal: bool = True
    window: int | None = None
    chunk: int | None = None

    def pairs(self, T: int, S: int, context: int) -> int:
        """Of queries with keys: the last T of S positions, of which `context` came before them."""
        if not self.causal:
            return T * S
        if self.chunk is not None:
            return sum(min((context + i) % self.chunk + 1, S - T + 1 + i) for i in range(T))
        first = S - T + 1  # keys that the first query sees without a window
        if self.window is None or self.window >= S:
            return T * (first + S) // 2
        growing = max(0, min(T, self.window - first))  # queries that do not fill the window yet
        return growing * (2 * first + growing - 1) // 2 + (T - growing) * self.window

    def reach(self, T: int, S: int, context: int) -> int:
        """Keys that any of these queries sees."""
        if self.chunk is not None:
            return min(S, context % self.chunk + T)
        return S if self.window is None else min(S, self.window + T - 1)


@dataclass
class _Tally:
    """A part in the making: what it is, and its numbers by the names that Part has for them."""

    kind: Kind
    compute: str
    kept: str
    numbers: defaultdict[str, Any] = field(default_factory=lambda: defaultdict(int))


class Recorder(TorchDispatchMode):
    """Counts one pass. Storages are told apart by the address of their descriptor: a view shares its tensor's."""

    def __init__(self, model: PreTrainedModel, batch: int, context: int, given: list[Tensor]) -> None:
        super().__init__()
        self.model, self.batch, self.context = model, batch, context
        self.given = {storage(tensor) for tensor in given}
        self.last = self.where = ""
        self.stack: list[tuple[str, nn.Module]] = []
        self.tallies: dict[str, _Tally] = {}
        self.attention: dict[str, Attention] = {}
        self.uncounted: dict[str, list[str]] = {}
        self.assumed: dict[str, None] = {}
        self.experts = fused_experts(model)
        self.routed: dict[str, float] = {}  # share of a module's experts that its tokens meet
        self.parameters = {storage(parameter) for parameter in model.parameters()}
        self.buffers = {storage(buffer) for buffer in model.buffers()}
        self.read: set[int] = set()  # weights that were read as a whole
        self.beside = 0  # bytes of those that are no parameters
        self.kept: set[int] = set()  # keys that some attention has: layers may share them
        self.fetched: set[int] = set()  # weights of experts, as they were put together for their tokens
        self.made: set[int] = set()
        self.known: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
        self.live = self.peak = 0
        self.alive: dict[int, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know in which module an op runs."""
        handles: list[Any] = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._leaving, always_call=True))
        token = ACTIVE.set(self)
        try:
            yield
        finally:
            ACTIVE.reset(token)
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.stack.append((name, module))
            if name in self.experts:
                chosen = keywords.get("top_k_index", args[1] if len(args) > 1 else None)
                if isinstance(chosen, Tensor) and chosen.dim() == 2:
                    tally = self.tally()
                    tally.numbers["experts"], tally.numbers["chosen"] = self.experts[name], chosen.shape[1]
                    self.routed[name] = met(tally.numbers["experts"], tally.numbers["chosen"], chosen.shape[0])

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
            self.tallies[name] = _Tally(self._kind(name, module), number_of(dtype), number_of(dtype))
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
            self.assume(f"{self.place()}: a value that only a real run would know is taken for 0")
            return 0
        inputs = list(_tensors((*args, *kwargs.values())))
        sources = {storage(tensor) for tensor in inputs}
        out = self._run(func, args, kwargs, sources)
        outputs = list(_tensors(out if isinstance(out, list | tuple) else (out,)))
        if not func._schema.is_mutable and all(storage(tensor) in sources for tensor in outputs):
            self._free(func, inputs, outputs)
            return out
        gathered = args[GATHERS[name]] if name in GATHERS else None
        if gathered is not None and self.place_name() in self.routed and self._is_weight(gathered):
            # Put together for the walk alone: served, a kernel reads each expert's weights where they lie.
            self.fetched.add(storage(outputs[0]))
            weakref.finalize(outputs[0].untyped_storage(), self.fetched.discard, storage(outputs[0]))
            self._meet(gathered)
            return out
        for tensor in outputs:
            self._born(tensor, sources)
        self._count(func, name, args, kwargs, inputs, outputs)
        return out

    def assume(self, text: str) -> None:
        """Tell once."""
        self.assumed.setdefault(text)

    def _run(self, func: Any, args: Any, kwargs: Any, sources: set[int]) -> Any:
        """What the op gives on the meta device. Layers are alike, and torch works a shape out slowly: one that was
        worked out once is made from that."""
        key = (func, _described(args), *((name, _described(value)) for name, value in kwargs.items()))
        if (known := self.known.get(key)) is not None:
            size, stride, dtype = known
            return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        out = func(*args, **kwargs)
        if type(out) is Tensor and not func._schema.is_mutable and storage(out) not in sources:
            self.known[key] = (out.shape, out.stride(), out.dtype)
        return out

    def _free(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """A view, or an op without a tensor as its result: nothing moves, unless its work is one of values."""
        if not outputs and inputs and not touches(func):
            self._unknown(name_of(func))

    def _unknown(self, name: str) -> None:
        self.uncounted.setdefault(name, []).append(self.place())

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        tally = self.tally()
        tally.numbers["ops"] += 1
        gathered = args[GATHERS[name]] if name in GATHERS else None
        eager: float = sum(map(_bytes, outputs))
        for tensor in inputs:
            if tensor is gathered:
                eager += _bytes(outputs[0])
            elif storage(tensor) in self.fetched:
                continue
            else:
                eager += self._whole(tensor, tally) if self._is_weight(tensor) else _bytes(tensor)
        if tally.kind == "embedding" and gathered is not None:
            tally.numbers["activation_bytes"] += _bytes(outputs[0])
        tally.numbers["eager_bytes"] += eager
        if name in PRODUCTS:
            tally.numbers["flops"] += PRODUCTS[name](*args, **kwargs)
            if tally.kind == "linear" and any(storage(tensor) in self.parameters for tensor in inputs):
                tally.numbers["rows"] += outputs[0].numel() // outputs[0].shape[-1]
            moved = [t for t in inputs if not self._is_weight(t) and storage(t) not in self.fetched]
            tally.numbers["activation_bytes"] += sum(map(_bytes, (*moved, *outputs)))
            if tally.kind == "other":
                tally.compute = number_of(inputs[-1].dtype)
            return
        tally.numbers["touched"] += max((tensor.numel() for tensor in (*inputs, *outputs)), default=0)
        if not touches(func):
            self._unknown(name)

    def _is_weight(self, tensor: Tensor) -> bool:
        """A parameter, or what else was there before the pass and is no buffer: an adapter that a hook brings."""
        key = storage(tensor)
        return key in self.parameters or not (key in self.buffers or key in self.made or key in self.given)

    def _whole(self, tensor: Tensor, tally: _Tally) -> float:
        if storage(tensor) not in self.read:
            self.read.add(storage(tensor))
            self.beside += 0 if storage(tensor) in self.parameters else _bytes(tensor)
            tally.numbers["weight_bytes"] += _bytes(tensor)
        return _bytes(tensor)

    def _meet(self, tensor: Tensor) -> None:
        """Read the weights of those experts that the tokens meet."""
        tally, size = self.tally(), self.routed[self.place_name()] * _bytes(tensor)
        tally.numbers["weight_bytes"] += size
        tally.numbers["eager_bytes"] += size

    def _born(self, tensor: Tensor, sources: set[int]) -> None:
        key = storage(tensor)
        if key in sources or key in self.alive:
            return
        memory = tensor.untyped_storage()
        self.made.add(key)
        self.alive[key] = memory.nbytes()
        self.live += memory.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(memory, self._gone, key)

    def _gone(self, key: int) -> None:
        # Its address may belong to another storage from now on.
        self.made.discard(key)
        self.live -= self.alive.pop(key, 0)

    def _forget(self, tensor: Tensor) -> None:
        """It is no activation, but stays (in a cache), or is none at all."""
        self.live -= self.alive.pop(storage(tensor), 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Tensor:
        """q [B, H, T, D], k [B, H', S, D], v [B, H', S, D'] -> [B, T, H, D'], as one fused kernel does it."""
        B, H, T, D = q.shape
        S, width = k.shape[2], v.shape[3]
        tally, name = self.tally(), self.place_name()
        tally.kind, tally.compute = "attention", number_of(q.dtype)
        out = q.new_empty(B, T, H, width)
        pairs = B * H * seen.pairs(T, S, self.context)
        token = B * (k.shape[1] * D * k.itemsize + v.shape[1] * width * v.itemsize)
        read = token * seen.reach(T, S, self.context)
        tally.numbers["flops"] += 2 * pairs * (D + width)
        tally.numbers["touched"] += pairs
        tally.numbers["kv_read"] += read
        tally.numbers["activation_bytes"] += _bytes(q) + _bytes(out)
        tally.numbers["eager_bytes"] += _bytes(q) + read
        if storage(k) not in self.kept:
            self.kept.add(storage(k))
            weakref.finalize(k.untyped_storage(), self.kept.discard, storage(k))  # its address may be another's then
            tally.numbers["kv_written"] += token * min(T, S)
            window = seen.window or seen.chunk
            sizes = (H * D, k.shape[1] * D, v.shape[1] * width, width, k.itemsize)
            self.attention[name] = Attention(name, *sizes, window)
        for each in (k, v):
            self._forget(each)
        return out

    def step(self, phase: Phase, tokens: int, cached: int) -> Step:
        parts = tuple(
            Part(name, tally.kind, tally.compute, tally.kept, **tally.numbers)
            for name, tally in self.tallies.items()
            if tally.numbers["ops"]
        )
        unknown = tuple(Uncounted(op, len(where), tuple(dict.fromkeys(where))) for op, where in self.uncounted.items())
        kept, assumed = tuple(self.attention.values()), tuple(self.assumed)
        step = Step(
            phase, self.batch, tokens, self.context, parts, kept, cached, self.peak, self.beside, unknown, assumed
        )
        expected = step.cache_bytes(self.context + tokens)
        return step if cached >= _LATENT * expected else _with_latents(step, cached / expected)


def _with_latents(step: Step, share: float) -> Step:
    """Of a model whose cache keeps less than its attention sees (DeepSeek's latents, from which each pass makes keys
    and values anew): bytes as the cache has them."""
    parts = tuple(
        replace(part, kv_read=share * part.kv_read, kv_written=share * part.kv_written) for part in step.parts
    )
    said = f"the cache keeps {share:.0%} of the keys and values that attention sees: bytes are of what it keeps"
    return replace(step, parts=parts, attention=(), assumed=(*step.assumed, said))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Among what an op is given or gives."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _described(value: Any) -> Any:
    """What decides the shape that an op gives, and can be looked up: 1, 1.0 and True are different here."""
    if isinstance(value, Tensor):
        return Tensor, value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value


def storage(tensor: Tensor) -> int:
    """Which memory it is in: the same for all views of a tensor."""
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """Of its numbers, each place in memory once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


# Which recorder an exchanged attention tells; transformers calls it by name.
ACTIVE: ContextVar[Recorder] = ContextVar("recorder")
