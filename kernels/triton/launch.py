"""The ops on a GPU, with the arguments of kernels/ops.py, which has checked shapes and dtypes.

Nothing waits for the device, all memory is torch's, and the current stream is used: every function may be captured in a
CUDA graph, once it has run with such sizes outside of one. Two runs give the same bits.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F

import triton

from ..reference import ASYMMETRIC
from . import products
from .configs import machine
from .dequantize import dequantize_kernel
from .hadamard import hadamard_kernel
from .products import Codes, Weight
from .quantize import quantize_kernel, quantize_with_kernel

# Rows of x from which writing the weight out once and cuBLAS is faster: every weight-only kernel published for Hopper
# falls below a 16-bit product between 64 and 128 rows.
DENSE_ROWS = 128
DENSE_BLOCK = {"BLOCK_N": 16, "BLOCK_K": 256}
_HALVES = (torch.float16, torch.bfloat16)


def supports(device: torch.device) -> str | None:
    """None where these kernels run, else why not. There, every op takes all widths, groups, dtypes and shapes."""
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA devices, not on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "bfloat16 on the matrix units needs compute capability 8.0"
    return None


def w4a16_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """x [..., K] @ w.T + bias [N] -> y [..., N] in x's dtype."""
    n, k = packed.shape[0], x.shape[-1]
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    rows = _rows(x)
    kernel = weight_only_kernel(len(rows), k, scale.shape[1], bits, x.dtype)
    if kernel == "dense":
        w = _dequantize(packed, scale, zero, bits, k, x.dtype)
        return F.linear(rows, w, None if bias is None else bias.to(x.dtype)).reshape(y.shape)
    weight = _weight(packed, scale, zero, bias, bits)
    with _on(x.device):
        (products.gemv if kernel == "gemv" else products.gemm)(rows, weight, y)
    return y


def weight_only_kernel(m: int, k: int, groups: int, bits: int, dtype: torch.dtype) -> str:
    """Of `w4a16_linear`: "gemv", "gemm" or "dense" (w written out in the dtype of x, and the product is torch's)."""
    group = k // groups
    if m == 1 and bits != 3 and (groups == 1 or group * bits % 32 == 0):
        return "gemv"
    # float32 would be rounded on the matrix units; groups that 16 does not divide leave too much of a step empty.
    fits = dtype in _HALVES and (groups == 1 or group % 16 == 0)
    return "gemm" if fits and m < DENSE_ROWS else "dense"


def dequantize(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, k: int) -> torch.Tensor:
    """-> w float32 [N, K]."""
    return _dequantize(packed, scale, zero, bits, k, torch.float32)


def quantize_per_token(
    x: torch.Tensor, bits: int, grid: int, clip: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., K] -> codes int8 [..., K], scale float32 [..., 1], zero int32 [..., 1]."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    zero = torch.empty((*x.shape[:-1], 1), dtype=torch.int32, device=x.device)
    if codes.numel():
        rows, k = _rows(x), x.shape[-1]
        constants = quantize_constants(k, bits, grid)
        with _on(x.device):
            quantize_kernel[(len(rows),)](
                rows, codes, scale, zero, k, rows.stride(0), clip, **constants, num_warps=4, enable_fp_fusion=False
            )
    return codes, scale, zero


def integer_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    x_bits: int,
    grid: int,
    clip: float,
) -> torch.Tensor:
    """x [..., K] rounded to integers of x_bits bits, @ w.T + bias [N] -> y [..., N] in x's dtype.

    Codes less an x_zero that is given are taken to be within 255, as on every grid that holds 0.
    """
    y = torch.empty(*x.shape[:-1], packed.shape[0], dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if x_scale is None or x_zero is None:
        codes, x_scale, x_zero = quantize_per_token(x, x_bits, grid, clip)
        a = Codes(codes.reshape(-1, x.shape[-1]), x_scale, x_zero, by_row=True, shifted=grid == ASYMMETRIC)
    else:
        a = Codes(_quantize_with(x, x_scale, x_zero, x_bits), x_scale, x_zero, by_row=False, shifted=True)
    with _on(x.device):
        products.integer(a, _weight(packed, scale, zero, bias, bits), y)
    if not a.by_row:  # else the row's own scale is no number
        y.masked_fill_(x.isnan().any(-1, keepdim=True), torch.nan)
    return y


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., n] -> x @ H / sqrt(n) in x's dtype, H of Sylvester; n a power of two from 2 to 32768, else ValueError."""
    n = x.shape[-1] if x.dim() else 0
    if n & (n - 1) or not 2 <= n <= 32768:
        raise ValueError(f"x: {n}, the size of the last dimension, is not a power of two from 2 to 32768")
    if 4 * n > (shared := machine(x.device).shared_bytes):
        raise ValueError(f"x: rows of {n} take {4 * n} bytes of shared memory, and this device has {shared}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        rows, (constants, warps) = _rows(x), hadamard_constants(n)
        grid = (triton.cdiv(len(rows), constants["ROWS"]),)
        with _on(x.device):
            hadamard_kernel[grid](rows, y, len(rows), rows.stride(0), n**-0.5, **constants, num_warps=warps)
    return y


def quantize_constants(k: int, bits: int, grid: int) -> dict[str, Any]:
    return {"BITS": bits, "GRID": int(grid), "BLOCK": min(triton.next_power_of_2(k), 4096)}


def hadamard_constants(n: int) -> tuple[dict[str, Any], int]:
    """Constants and warps: 32 or 64 numbers a thread of long rows, several short rows at once."""
    rows = max(1, 1024 // n)
    return {"N": n, "LOG_N": n.bit_length() - 1, "ROWS": rows}, min(max(rows * n // 1024, 1), 16)


def _dequantize(packed, scale, zero, bits, k, dtype):
    w = torch.empty(packed.shape[0], k, dtype=dtype, device=packed.device)
    if w.numel():
        weight, n = _weight(packed, scale, zero, None, bits), len(packed)
        grid = triton.cdiv(n, DENSE_BLOCK["BLOCK_N"]), triton.cdiv(k, DENSE_BLOCK["BLOCK_K"])
        with _on(packed.device):
            dequantize_kernel[grid](
                weight.packed, scale, zero, w, n, k, packed.shape[1], *weight.strides(), GROUP=k // scale.shape[1],
                BITS=bits, HAS_ZERO=zero is not None, EVEN=k % DENSE_BLOCK["BLOCK_K"] == 0, **DENSE_BLOCK, num_warps=4,
            )  # fmt: skip
    return w


def _quantize_with(x, x_scale, x_zero, bits):
    """-> codes int8 [M, K]."""
    rows = _rows(x)
    m, k = rows.shape
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    block = min(triton.next_power_of_2(k), 4096)
    with _on(x.device):
        quantize_with_kernel[(m, triton.cdiv(k, block))](
            rows, codes, x_scale, x_zero, k, rows.stride(0), BITS=bits, BLOCK=block, enable_fp_fusion=False
        )
    return codes


def _weight(packed, scale, zero, bias, bits) -> Weight:
    return Weight(packed.contiguous(), scale, zero, None if bias is None else bias.contiguous(), bits)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] -> [M, K] of which rows may lie apart, but not the elements of one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton starts kernels on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
