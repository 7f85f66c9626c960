"""Who runs in gpu_linear.py: our kernels, torch's, and those of other packages, each on the same stored weight.

A contender is a weight in the layout it wants, a call, and the product it should give in float64.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels import reference


@dataclass(frozen=True)
class Stored:
    """codes uint8 [N, K], packed, scale bfloat16 [N, K/group]; zero points are the middle."""

    codes: torch.Tensor
    packed: torch.Tensor
    scale: torch.Tensor
    bits: int
    group: int

    @classmethod
    def random(cls, n: int, k: int, bits: int, group: int, device: str = "cuda") -> "Stored":
        """Of 4 or 8 bits, K a whole number of words."""
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device=device)
        packed = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
        # Of a size that float16 holds as exactly as bfloat16.
        scale = ((0.5 + torch.rand(n, k // group, device=device)) / k**0.5).bfloat16()
        return cls(codes, packed, scale, bits, group)

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    def dense(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        centred = self.codes.to(dtype) - 2 ** (self.bits - 1)
        return (centred.reshape(self.n, -1, self.group) * self.scale[..., None].to(dtype)).reshape(self.n, self.k)


@dataclass(frozen=True)
class Contender:
    """call(x, weight) -> y, where x is `rows` of float32 rows, and y should be `exact` of it; `bytes` of the weight."""

    call: Callable[[Any, Any], torch.Tensor]
    weight: Any
    bytes: int
    dtype: torch.dtype
    rows: Callable[[torch.Tensor], Any]
    exact: Callable[[Any], torch.Tensor]
    integer: bool = False


def contenders(stored: Stored, marlin: str | None) -> tuple[dict[str, Contender], list[str]]:
    """By name, and a line for each that is not here."""
    found, missing = {"remanence": _ours(stored), "cublas_bf16": _cublas(stored)}, []
    for name, make in {"tinygemm": _tinygemm, "gemlite": _gemlite, "bnb_nf4": _nf4}.items():
        try:
            found[name] = make(stored)
        except (ImportError, AttributeError, NotImplementedError) as error:
            missing.append(f"{name} does not take part: {error}")
    if marlin is None:
        missing.append("marlin does not take part: no checkout of its repository was given")
    else:
        found["marlin"] = _marlin(stored, marlin)
    return found, missing


def _half(dtype: torch.dtype, call: Callable, weight: Any, size: int, dense: Callable[[], torch.Tensor]) -> Contender:
    return Contender(call, weight, size, dtype, lambda x: x.to(dtype), lambda x: x.double() @ dense().double().T)


def _ours(stored: Stored) -> Contender:
    from ..kernels.triton import launch

    def call(x, weight):
        packed, scale = weight
        return launch.w4a16_linear(x, packed, scale, None, None, stored.bits)

    weight = stored.packed, stored.scale
    return _half(torch.bfloat16, call, weight, sum(t.nbytes for t in weight), stored.dense)


def _cublas(stored: Stored) -> Contender:
    w = stored.dense(torch.float32).bfloat16()
    return _half(torch.bfloat16, F.linear, w, w.nbytes, lambda: w)


def _tinygemm(stored: Stored) -> Contender:
    """torch's own, of bfloat16: the high nibble is the even k, scale and offset [K/G, N, 2]."""
    packed = torch.ops.aten._convert_weight_to_int4pack(stored.codes[:, ::2] << 4 | stored.codes[:, 1::2], 8)
    scale = torch.stack((stored.scale, torch.zeros_like(stored.scale)), -1).transpose(0, 1).contiguous()

    def call(x, weight):
        return torch.ops.aten._weight_int4pack_mm(x, weight[0], stored.group, weight[1])

    return _half(torch.bfloat16, call, (packed, scale), packed.nbytes + scale.nbytes // 2, stored.dense)


def _gemlite(stored: Stored) -> Contender:
    """In float16, where its sums over a split need no detour; it tunes itself at the first call of a shape."""
    gemlite = import_module("gemlite")
    half = gemlite.DType.FP16
    layer = gemlite.GemLiteLinear(stored.bits, stored.group, stored.k, stored.n, half, half)
    scale = stored.scale.half().reshape(-1, 1)
    layer.pack(stored.codes, scale, torch.full_like(scale, 2 ** (stored.bits - 1)), None)
    size = stored.packed.nbytes + stored.scale.nbytes
    return _half(torch.float16, lambda x, layer: layer(x), layer, size, stored.dense)


def _nf4(stored: Stored) -> Contender:
    """Blocks of 64 with a float32 scale each; held against its own weight, as it has no other."""
    bnb = import_module("bitsandbytes")
    w, state = bnb.functional.quantize_4bit(stored.dense(torch.float32).bfloat16(), blocksize=64, quant_type="nf4")

    def call(x, w):
        return bnb.matmul_4bit(x, w.t(), quant_state=state)

    return _half(
        torch.bfloat16, call, w, w.nbytes + state.absmax.nbytes, lambda: bnb.functional.dequantize_4bit(w, state)
    )


def _marlin(stored: Stored, folder: str) -> Contender:
    """In float16, groups of 128; compiled from its checkout."""
    from torch.utils.cpp_extension import load

    sources = [f"{folder}/marlin/{name}" for name in ("marlin_cuda.cpp", "marlin_cuda_kernel.cu")]
    load("marlin_cuda", sources, extra_cuda_cflags=["-O3"])
    sys.path.insert(0, folder)
    linear = torch.nn.Linear(stored.k, stored.n, bias=False, device="cuda", dtype=torch.half)
    linear.weight.data = stored.dense(torch.float32).half()
    layer = import_module("marlin").Layer(stored.k, stored.n, groupsize=stored.group).cuda()
    layer.pack(linear, stored.scale.half())
    size = layer.B.nbytes + layer.s.nbytes
    return _half(torch.float16, lambda x, layer: layer(x), layer, size, stored.dense)


def integer_contenders(stored: Stored, m: int) -> dict[str, Contender]:
    """Weights and rows of eight bits, one scale for a row: ours with and without rounding x, and torch's int8 product
    alone, without scales, which is the most that can be had."""
    from ..kernels.triton import launch, products

    def rounded(x):
        return x.bfloat16()

    def exact(x):
        grid = reference.quantize_per_token(x, 8, True, 1.0)
        return (grid[0].double() * grid[1].double()) @ stored.dense().T

    def whole(x, weight):
        packed, scale = weight
        return launch.integer_linear(x, None, None, packed, scale, None, None, 8, 8, True, 1.0)

    def codes(x):
        return products.Codes(*launch.quantize_per_token(x.bfloat16(), 8, True, 1.0), by_row=True, shifted=False)

    def product(x, weight):
        y = torch.empty(m, stored.n, dtype=torch.bfloat16, device="cuda")
        packed, scale = weight
        products.integer(x, products.Weight(packed, scale, None, None, 8), y)
        return y

    def centred():
        return (stored.codes.to(torch.int16) - 128).to(torch.int8)

    weight, size, bf16 = (stored.packed, stored.scale), stored.packed.nbytes + stored.scale.nbytes, torch.bfloat16
    return {
        "remanence_w8a8": Contender(whole, weight, size, bf16, rounded, exact, True),
        "remanence_w8a8_product": Contender(
            product,
            weight,
            size,
            bf16,
            codes,
            lambda x: (x.codes.double() * x.scale.double()) @ stored.dense().T,
            True,
        ),
        "torch_int_mm": Contender(
            lambda x, w: torch._int_mm(x.codes, w.T),
            centred(),
            stored.codes.nbytes,
            torch.int8,
            codes,
            lambda x: x.codes.double() @ centred().double().T,
            True,
        ),
    }
