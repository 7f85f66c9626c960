"""A KV cache of 8, 4 or 2 bits that transformers' models serve with (KIVI, arXiv 2402.02750; KVQuant, 2401.18079).

What a query sees, in every way of running a model (token by token, a whole text at once, with a cache or without):

- A row's tokens are numbered from the first that is not padding. Padding is nowhere seen and in no scale.
- Tokens c * group_size .. (c + 1) * group_size - 1 are chunk c. For the query with number t, which sees tokens 0 .. t,
  chunk c is closed when all of it is older than the newest `residual` tokens: (c + 1) * group_size + residual <= t + 1.
- Of closed chunks the query sees keys and values as integers give them back, keys with a scale per channel of the
  chunk, values (and keys, with keys="token") with a scale per token and group of channels; of all other tokens, the
  exact ones. With residual 0 the query whose own token completes a chunk sees that rounded, too.
- With rotate, queries and keys are turned by the same orthogonal matrix before all of this.
- With pre_bias, keys are rounded without what a zero input's key would be at their position (the bias of the keys'
  projection, turned by RoPE), which is added again: exact, as RoPE is linear.

A row's results thus depend on nothing but its own tokens and their positions (rotated keys have other scales elsewhere:
give rows with padding their own `position_ids`, as `generate` does).

    attach_kv_(model, KVSpec(bits=4))         # kv_attach.py; generate() and forward() now serve with such a cache
    model.generate(...)
    cache = KVCache(model)                    # or one to be looked at
    model.generate(..., past_key_values=cache)
    cache.memory_bytes()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .hadamard import apply_hadamard, randomized
from .kv_bias import KeyBias
from .kv_grid import Codes, decode_chunks, encode_chunks
from .kv_rows import Rows, Step, Turn
from .spec import KVSpec, Tile

# On the model and on its attention modules; gone after detach_kv_.
ATTRIBUTE = "_remanence_kv"


@dataclass(eq=False)
class Serving:
    """How a model serves, shared by its attention modules and its caches.

    layers    how many there are
    before    the attention implementation that detach_kv_ restores
    biases    of each layer's keys; None: not taken out
    handles   hooks to be removed
    hadamard  R3 by head size, as apply_hadamard takes it: the same for all models, as nothing of it is stored
    probed    what attach_kv_ saw: by layer, its module, keys, channels of a value, and turn; None outside of it
    waiting   the layer of a cache whose `update` was called, until attention takes its keys and values in
    turn      cos and sin of the columns that the running layer was given
    chunks    how many have been rounded, of the row with most in each pass
    """

    spec: KVSpec
    before: str
    layers: int = 0
    biases: list[KeyBias | None] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    probed: dict[int, tuple[nn.Module, Tensor, int, Turn | None]] | None = None
    waiting: KVLayer | None = None
    turn: Turn | None = None
    chunks: int = 0
    hadamard: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rotated(self, x: Tensor) -> Tensor:
        """Queries, keys, or what biases have become in them [..., D], turned by R3 where the spec says so."""
        if not self.spec.rotate:
            return x
        D = x.shape[-1]
        if D not in self.hadamard:
            self.hadamard[D] = randomized(D, torch.Generator().manual_seed(0))
        core, signs = (part.to(x.device) for part in self.hadamard[D])
        return apply_hadamard(x, core, signs)


def serving_of(module: nn.Module) -> Serving:
    """ValueError where attach_kv_ was not called."""
    serving = getattr(module, ATTRIBUTE, None)
    if not isinstance(serving, Serving):
        raise ValueError(f"{type(module).__name__}: does not serve with a quantized KV cache; call attach_kv_ first")
    return serving


@dataclass(eq=False)
class Kept:
    """Keys, or values, of one layer.

    closed   chunks as integers; None: none yet
    recent   [B, H, L, D] the rest as it came, oldest first; None: nothing yet
    """

    spec: KVSpec
    tile: Callable[[int], Tile]
    closed: Codes | None = None
    recent: Tensor | None = None

    def extend(self, new: Tensor, step: Step, offset: Callable[[Tensor], Tensor] | None) -> Tensor:
        """New ones [B, H, Q, D] -> those that step.seen tells of [B, H, K, D], in their dtype.

        offset: numbers of tokens [B, n] -> what is taken out before rounding [B or 1, H, n or 1, D]. Gradients pass
        rounding as if it were not there, and end at what an earlier pass kept.
        """
        bits, g = self.spec.bits, self.spec.group_size
        exact = step.exact.of(new if self.recent is None else torch.cat([self.recent, new], 2))
        D = exact.shape[3]
        tile = self.tile(D)

        def opened(codes: Codes, shift: Tensor | None) -> Tensor:
            x = decode_chunks(codes, bits, tile, (g, D))
            return (x if shift is None else x + shift).to(exact.dtype)

        shown, chunks = [], self.closed
        if self.closed is not None:
            count = self.closed.packed.shape[2] * g
            shift = None if offset is None else offset(torch.arange(count, device=exact.device).expand(len(exact), -1))
            shown.append(opened(self.closed, shift))
        if step.fresh:
            x = exact[:, :, : step.fresh * g]
            shift = None if offset is None else offset(step.numbers)
            bare = x.detach() if shift is None else x.detach() - shift
            codes = encode_chunks(bare.unflatten(2, (step.fresh, g)), bits, tile, exact.dtype)
            rounded = opened(codes, shift)
            shown.append(x + (rounded - x).detach() if x.requires_grad else rounded)
            chunks = codes if self.closed is None else self.closed.followed_by(codes)
        if chunks is not None and (step.fresh or chunks.packed.shape[2] != step.chunks.order.shape[1]):
            chunks = chunks.each(step.chunks.of)
        self.closed, self.recent = chunks, step.rest.of(exact).detach()
        return torch.cat([*shown, exact], 2)

    def select(self, rows: Tensor) -> None:
        """Becomes these rows [n] int64."""
        if self.closed is not None:
            self.closed = self.closed.each(lambda tensor: tensor[rows.to(tensor.device)])
        if self.recent is not None:
            self.recent = self.recent[rows.to(self.recent.device)]

    @property
    def nbytes(self) -> int:
        recent = 0 if self.recent is None else self.recent.untyped_storage().nbytes()
        return recent + (0 if self.closed is None else self.closed.nbytes)


class KVLayer(CacheLayerMixin):
    """One layer of a cache, or of one pass without a cache.

    `update` only hands on what is new: which keys a query sees depends on the query, so that the layer is extended from
    inside attention.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, serving: Serving, rows: Rows, layer_idx: int) -> None:
        super().__init__()
        self.serving, self.rows = serving, rows
        self.bias = serving.biases[layer_idx] if serving.biases else None
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is set aside."""

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """New keys and values [B, H, Q, D], as they are."""
        if self.serving.waiting is not None:
            raise ValueError(
                "KVCache: the attention that ran did not take it in; it goes with the model it was made for"
            )
        self.serving.waiting = self
        self.columns += key_states.shape[2]
        self.is_initialized = True
        return key_states, value_states

    def extend(self, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """New keys, as they are to be kept, and values [B, H, Q, D] -> those that step.seen tells of [B, H, K, D]."""
        offset = None if self.bias is None else partial(self._offset, self.bias)
        return self.kept[0].extend(key, step, offset), self.kept[1].extend(value, step, None)

    def _offset(self, bias: KeyBias, numbers: Tensor) -> Tensor:
        return self.serving.rotated(bias.at(self.rows.turn, numbers))

    def get_seq_length(self, *args: Any) -> int:  # noqa: ARG002
        """Columns, padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Columns after the next pass, and the first of them; older transformers give its positions [Q] instead."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.columns + new, 0

    def get_max_length(self) -> int:
        """None is set."""
        return -1

    def get_max_cache_shape(self) -> int:
        """As get_max_length, which older transformers call this."""
        return -1

    def offload(self) -> None:
        raise ValueError("KVCache: cannot be offloaded")

    def crop(self, *args: Any) -> None:  # noqa: ARG002
        raise ValueError("KVCache: cannot be cropped: of what is rounded, the exact keys and values are gone")

    def reset(self) -> None:
        """Empty again."""
        spec = self.serving.spec
        self.columns = 0
        self.kept = Kept(spec, spec.key_tile), Kept(spec, spec.value_tile)
        self.is_initialized = False


class KVCache(Cache):
    """What an attached model keeps of a batch; empty at first. Rows that end with padding may go on afterwards."""

    def __init__(self, model: nn.Module) -> None:
        serving = serving_of(model)
        self.serving, self.rows = serving, Rows(serving.spec)
        self.kept_layers = [KVLayer(serving, self.rows, at) for at in range(serving.layers)]
        super().__init__(layers=list(self.kept_layers))

    def memory_bytes(self) -> int:
        """Of all tensors that it keeps: codes, scales, exact tokens, and per row what tells tokens from padding.

        A layer keeps, for its keys and as many for its values, B * H * (C * (packed + 2 * s * tiles) + L * D * s): C
        chunks and L exact tokens in the row with most, D channels in each of H heads, s bytes a number; packed is
        g * D * bits / 8 in whole words of 4, tiles D for keys by channel and g * D / min(g, D) for what is by token.
        Rows keep 8 bytes each, and with pre_bias the cosines and sines of their positions, once for all layers.
        """
        return self.rows.nbytes + sum(part.nbytes for layer in self.kept_layers for part in layer.kept)

    def reset(self) -> None:
        self.rows.clear()
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows.tokens is not None:
            self.batch_select_indices(torch.arange(len(self.rows.tokens)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Becomes these rows [n] int64, in this order, some perhaps more than once."""
        self.rows.select(indices)
        for layer in self.kept_layers:
            for part in layer.kept:
                part.select(indices)
