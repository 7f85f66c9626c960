"""The numbers of a quantized KV cache: chunks of keys or values as packed integers, one scale per tile.

KIVI (arXiv 2402.02750, section 3.2) and KVQuant (arXiv 2401.18079, section 3.1): keys have channels that are large for
all tokens, so a scale per channel, over a chunk of tokens, keeps them apart; values have none, so a scale per token,
over a group of channels. Both asymmetric: x = low + code * scale, low the smallest of its tile, code 0 .. 2^bits - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.ops import pack, unpack
from .spec import Tile


@dataclass(frozen=True, eq=False)
class Codes:
    """C chunks of g tokens x D channels of B rows and H heads.

    packed       [B, H, C, 4 * ceil(g * D * bits / 32)] uint8, a chunk as one stream of bits, token by token
    scale, low   [B, H, C, tiles] in the model's own dtype
    """

    packed: Tensor
    scale: Tensor
    low: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same change to all three."""
        return Codes(change(self.packed), change(self.scale), change(self.low))

    def followed_by(self, other: Codes) -> Codes:
        """Along the chunks."""
        pairs = ((self.packed, other.packed), (self.scale, other.scale), (self.low, other.low))
        return Codes(*(torch.cat(pair, dim=2) for pair in pairs))

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in (self.packed, self.scale, self.low))


def encode_chunks(x: Tensor, bits: int, tile: Tile, dtype: torch.dtype) -> Codes:
    """x [B, H, C, g, D] float -> Codes with scales in `dtype`; at least float32 on the way.

    Both numbers of a tile are rounded to `dtype` before the codes are made, so that the codes fit what is stored. A
    tile of equal values has scale 1 and codes 0.
    """
    B, H, C, g, D = x.shape
    tokens, channels = tile
    tiles = x.to(torch.promote_types(x.dtype, torch.float32))
    tiles = tiles.reshape(B, H, C, g // tokens, tokens, D // channels, channels)
    top = 2**bits - 1
    low = tiles.amin((4, 6), keepdim=True).to(dtype)
    scale = ((tiles.amax((4, 6), keepdim=True) - low.to(tiles)) / top).to(dtype)
    scale = scale.masked_fill(scale <= 0, 1.0)
    codes = ((tiles - low.to(tiles)) / scale.to(tiles)).round().clamp(0, top).to(torch.uint8)
    packed = pack(codes.reshape(B * H * C, g * D), bits).view(B, H, C, -1)
    return Codes(packed, scale.reshape(B, H, C, -1), low.reshape(B, H, C, -1))


def decode_chunks(codes: Codes, bits: int, tile: Tile, shape: tuple[int, int]) -> Tensor:
    """Codes of chunks of `shape` (g, D) -> [B, H, C * g, D] in the scales' dtype, at least float32."""
    B, H, C, W = codes.packed.shape
    (g, D), (tokens, channels) = shape, tile
    dtype = torch.promote_types(codes.scale.dtype, torch.float32)
    per_tile = (B, H, C, g // tokens, 1, D // channels, 1)
    whole = unpack(codes.packed.reshape(B * H * C, W), bits, g * D).to(dtype)
    tiles = whole.view(B, H, C, g // tokens, tokens, D // channels, channels)
    x = tiles * codes.scale.to(dtype).view(per_tile) + codes.low.to(dtype).view(per_tile)
    return x.view(B, H, C * g, D)
