"""Packed weights as torch-npu's operators read them, made once from the stored layout, and exactly made back.

    int8   [K, N], code - 2^(bits-1)
    int4   eight codes in an int32, the first in the lowest bits: along N in [K, N/8], or along K in [N, K/8]
           transposed (bit-equal to npu_convert_weight_to_int4pack, which works on the host too)
    scale  [G, N] in the dtype of x; offset the same, and added to a code before it is scaled: 2^(bits-1) - zero
Made on the host: the device's own operators for bits and bytes are few.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F

from .. import ops
from .routes import Layer, Route

ND, NZ = 2, 29  # FRACTAL_NZ, as npu_format_cast knows them


def _to_nz(weight: torch.Tensor) -> torch.Tensor:
    """In the device's own layout; without being told that it may, torch-npu leaves every tensor as it is."""
    config = getattr(getattr(torch, "npu", None), "config", None)
    if config is not None:
        config.allow_internal_format = True
    return torch.ops.npu.npu_format_cast(weight, NZ)


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """values [..., 8 n], -8 .. 7 -> int32 [..., n], the first of eight in the lowest four bits, two's complement."""
    nibbles = (values.to(torch.int64) & 15).unflatten(-1, (-1, 8))
    words = (nibbles << 4 * torch.arange(8)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_int4(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., n] -> int8 [..., 8 n], -8 .. 7; exactly undoes `pack_int4`."""
    nibbles = (words[..., None] >> 4 * torch.arange(8, dtype=torch.int32)) & 15
    return torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8).flatten(-2)


def _to_19_bits(scale: torch.Tensor) -> torch.Tensor:
    """float32 [n], rounded to what npu_quant_matmul keeps of it for float16 products: it would cut off the 13 lowest
    bits, and make every product a little smaller."""
    bits = scale.cpu().view(torch.int32) + 2**12
    return (bits & ~(2**13 - 1)).view(torch.float32).to(scale.device)


class AscendWeight:
    """The weight [N, K] of a layer on its device, laid out for the layer's route.

    parts     of the weight, each as one call reads it
    scale, zero   as they are stored (compress/linear.py), on the host
    """

    def __init__(
        self,
        packed: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        layer: Layer,
        way: Route,
        device: torch.device,
    ) -> None:
        self.layer, self.route, self.device = layer, way, device
        bits, k = layer.bits, layer.k
        self.scale, self.zero = scale.cpu(), None if zero is None else zero.cpu()
        codes = ops.unpack(packed.cpu(), bits, k).to(torch.int16) - 2 ** (bits - 1)
        self.parts = [self._lay(rows.to(torch.int8)) for rows in codes.split(way.parts)]
        self._grids: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}
        self._sums: list[torch.Tensor] | None = None
        self._zeros: list[torch.Tensor] | None = None
        self._maps: dict[torch.dtype, tuple[torch.Tensor, ...]] = {}
        self._fixed: tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor | None]]] | None = None

    def _lay(self, codes: torch.Tensor) -> torch.Tensor:
        """codes int8 [n, K] -> on the device."""
        way = self.route
        if way.held == "int8":
            laid = codes.T.contiguous().to(self.device)
            return _to_nz(laid) if way.nz else laid
        padded = F.pad(codes, (0, 0, 0, -len(codes) % 8))
        if way.along == "k":
            laid = pack_int4(padded).to(self.device)
            return (_to_nz(laid) if way.nz else laid).t()
        laid = pack_int4(padded.T.contiguous()).to(self.device)
        return _to_nz(laid) if way.nz else laid

    def grids(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """(scale, offset) [G, N] of every part in `dtype`, N as padded; kept for the next call.

        ValueError where `dtype` does not hold a scale.
        """
        if dtype not in self._grids:
            self._grids = {dtype: [self._grid(rows, dtype) for rows in self._rows()]}
        return self._grids[dtype]

    def _rows(self) -> list[slice]:
        starts = torch.tensor((0, *self.route.parts)).cumsum(0).tolist()
        return [slice(start, end) for start, end in itertools.pairwise(starts)]

    def _grid(self, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        scale = self.scale[rows].float()
        held = scale.to(dtype)
        lost = ~((held.float() - scale).abs() <= 2.0**-8 * scale.abs()) & scale.isfinite()
        if lost.any():
            raise ValueError(f"scale: {scale[lost][0]:g} is not held by {dtype}; bfloat16 has the range of float32")
        offset = None if self.zero is None else (2.0 ** (self.layer.bits - 1) - self.zero[rows].float()).to(dtype)
        return self._on_device(held), None if offset is None else self._on_device(offset)

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        """[n, G] -> [G, n], padded as the codes are."""
        pad = -len(values) % 8 if self.route.held == "int4" else 0
        return F.pad(values, (0, 0, 0, pad)).T.contiguous().to(self.device)

    def fixed(self, scale: torch.Tensor, zero: torch.Tensor | None) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Of inputs on a given grid (scale float32 [1], zero int32 [1] or None for 0), by part: float32 [n], the scale
        of their products, and int32 [n], what zero adds to the sums. Kept while it is asked for that grid."""
        if self._fixed is None or self._fixed[0] is not scale:
            shifts = [None] * len(self.parts) if zero is None else [-(zero * sums[0]) for sums in self.sums()]
            grids = [w_scale[0] * scale for w_scale, _ in self.grids(torch.float32)]
            if self.layer.dtype == torch.float16:
                grids = [_to_19_bits(grid) for grid in grids]
            self._fixed = scale, list(zip(grids, shifts, strict=True))
        return self._fixed[1]

    def maps(self, transform: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Of what stands in front of the layer, as the fused operators read it, in `dtype`: left^T, right and the
        float32 scale of a Kronecker product, or the rotation R [K, K] with x' = x R. Kept."""
        if dtype not in self._maps:
            if hasattr(transform, "left"):
                left, right = transform.left.T.contiguous(), transform.right.contiguous()
                self._maps = {dtype: (left.to(dtype), right.to(dtype), transform.scale)}
            else:
                unit = torch.eye(self.layer.k, device=transform.signs.device)
                self._maps = {dtype: (transform(unit).to(dtype),)}
        return self._maps[dtype]

    def zeros(self) -> list[torch.Tensor] | None:
        """By part, int32 [G, n], on the scale of the signed codes, kept; None: there are none."""
        if self.zero is not None and self._zeros is None:
            signed = self.zero.to(torch.int32) - 2 ** (self.layer.bits - 1)
            self._zeros = [part.T.contiguous().to(self.device) for part in signed.split(self.route.parts)]
        return self._zeros

    def sums(self) -> list[torch.Tensor]:
        """Of the signed codes of each group, by part: int32 [G, n]; kept."""
        if self._sums is None:
            groups = self.scale.shape[1]
            sums = self.codes().to(torch.int32).unflatten(1, (groups, -1)).sum(-1, dtype=torch.int32)
            self._sums = [part.T.contiguous().to(self.device) for part in sums.split(self.route.parts)]
        return self._sums

    def codes(self) -> torch.Tensor:
        """int8 [N, K] on the host, signed."""
        return torch.cat([self._read(part, n) for part, n in zip(self.parts, self.route.parts)])

    def _read(self, part: torch.Tensor, n: int) -> torch.Tensor:
        way = self.route
        if way.nz:
            part = torch.ops.npu.npu_format_cast(part, ND)
        if way.held == "int8":
            return part.cpu().T.contiguous()
        if way.along == "k":
            return unpack_int4(part.t().cpu())[:n]
        return unpack_int4(part.cpu())[:, :n].T.contiguous()

    def stored(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """packed, scale, zero as they were given, on the device."""
        codes = (self.codes().to(torch.int16) + 2 ** (self.layer.bits - 1)).to(torch.uint8)
        zero = None if self.zero is None else self.zero.to(self.device)
        return ops.pack(codes, self.layer.bits).to(self.device), self.scale.to(self.device), zero

    def dense(self) -> torch.Tensor:
        """[N, K] float32 on the device."""
        packed, scale, zero = (None if part is None else part.cpu() for part in self.stored())
        assert packed is not None
        assert scale is not None
        return ops.dequantize(packed, scale, zero, self.layer.bits, self.layer.k).to(self.device)

    @property
    def nbytes(self) -> int:
        """On the device, of the codes."""
        return sum(part.numel() * part.element_size() for part in self.parts)
