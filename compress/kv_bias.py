"""What the bias of a keys' projection adds to every key: the outliers of Qwen2's (KVQuant, arXiv 2401.18079).

RoPE has turned the bias with the position when keys reach the cache, so that its channels are not constant there. What
it has become is the key of a zero input at that position, whichever layers made it: measured once at the first
positions, turned back at position 0, and kept only where the model's own rotation gives all those measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .kv_rows import Turn

# Of the largest, in units of the dtype's precision: a projection and a rotation, each rounded.
_ROUNDING = 16


@dataclass(frozen=True, eq=False)
class KeyBias:
    """value [H, D] before RoPE, at least float32; rotate: the model's own rotation, None where positions do not turn
    keys."""

    value: Tensor
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None

    def at(self, turn: Turn | None, numbers: Tensor) -> Tensor:
        """cos and sin [B, T, R] of all tokens, numbers [B, n] of some (those above the last stand for it) -> what the
        bias has become in their keys [B, H, n, D], or [1, H, 1, D] where it stays what it is."""
        if self.rotate is None:
            return self.value.to(numbers.device)[None, :, None]
        assert turn is not None
        last = turn[0].shape[1] - 1
        order = numbers.clamp(max=last)[..., None].expand(-1, -1, turn[0].shape[2])
        cos, sin = (part.to(numbers.device).gather(1, order) for part in turn)
        return self.turned(cos, sin)

    def turned(self, cos: Tensor, sin: Tensor) -> Tensor:
        """cos, sin [B, n, R] -> [B, H, n, D]; channels after the first R do not turn."""
        assert self.rotate is not None
        value = self.value.to(cos.device)
        wide = value[None, :, None].expand(len(cos), -1, cos.shape[1], -1)
        R = cos.shape[2]
        first = wide[..., :R]
        turned = self.rotate(first, first, cos.to(value.dtype), sin.to(value.dtype))[1]
        return torch.cat([turned, wide[..., R:]], -1)


def key_bias(module: nn.Module, keys: Tensor, turn: Turn | None) -> KeyBias | None:
    """From keys [1, H, P, D] of a zero input at positions 0 .. P - 1, with their cos and sin [1, P, R]; None: they are
    zero. ValueError where the rotation of the module's own file does not explain them."""
    precision = torch.finfo(keys.dtype).eps
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    if not keys.any():
        return None
    value = keys[0, :, 0].clone()
    within = _ROUNDING * precision * keys.abs().max()
    rotate = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if turn is None:
        found = KeyBias(value, None)
        explained = found.at(None, torch.zeros(1, 1, dtype=torch.int64, device=keys.device)).expand_as(keys)
    elif rotate is not None:
        cos, sin = turn
        value[:, : cos.shape[2]] /= cos[0, 0].to(value)  # position 0 turns nothing, but some scale their keys there
        found = KeyBias(value, rotate)
        explained = found.turned(cos, sin)
    else:
        explained = None
    if explained is None or bool((explained - keys).abs().max() > within):
        raise ValueError(
            f"kv pre_bias: how {type(module).__name__} turns its keys' bias with the position is not known"
        )
    return found
