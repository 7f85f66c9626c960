"""What an op is given, checked before anything is computed: a kernel trusts its addresses.

Each function takes the arguments of the op it is named for, and raises ValueError: the argument, what it is, what it
should be.
"""

import torch

from .reference import ASYMMETRIC, NARROW, SYMMETRIC, packed_width, prepacked_bytes

BITS = (2, 3, 4, 8)
SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # ScaleType in csrc/rows.h
FLOATS = tuple(SCALE_TYPES)
GRIDS = {ASYMMETRIC: "asymmetric", SYMMETRIC: "symmetric", NARROW: "narrow"}
_UINT8 = (torch.uint8,)


def check_tensor(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: {tensor.dtype} is not {expected}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: shape {list(tensor.shape)} is not {list(shape)}")


def check_devices(args: tuple) -> None:
    devices = {arg.device for arg in args if isinstance(arg, torch.Tensor)}
    if len(devices) > 1:
        raise ValueError(f"device: tensors on {' and '.join(sorted(map(str, devices)))}; expected all on one")


def scale_type(dtype: torch.dtype) -> int:
    """ScaleType in csrc/rows.h."""
    if dtype not in SCALE_TYPES:
        raise ValueError(f"scale_dtype: {dtype} is not {' or '.join(map(str, SCALE_TYPES))}")
    return SCALE_TYPES[dtype]


def check_pack(codes: torch.Tensor, bits: int) -> None:
    check_bits(bits)
    if codes.dim() != 2:
        raise ValueError(f"codes: shape {list(codes.shape)} is not [N, K]")
    check_tensor("codes", codes, _UINT8, codes.shape)


def check_range(codes: torch.Tensor, bits: int) -> None:
    largest = int(codes.max()) if codes.numel() else 0
    if largest >= 2**bits:
        raise ValueError(f"codes: {largest} is above {2**bits - 1}, the largest of {bits} bits")


def check_unpack(packed: torch.Tensor, bits: int, k: int) -> None:
    check_bits(bits)
    if k < 0:
        raise ValueError(f"k: {k} is negative")
    if packed.dim() != 2:
        raise ValueError(f"packed: shape {list(packed.shape)} is not [N, {packed_width(k, bits)}]")
    check_tensor("packed", packed, _UINT8, (packed.shape[0], packed_width(k, bits)))


def check_dequantize(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, k: int) -> None:
    check_unpack(packed, bits, k)
    if scale.dim() != 2:
        raise ValueError(f"scale: shape {list(scale.shape)} is not [{packed.shape[0]}, groups]")
    groups = scale.shape[1]
    check_tensor("scale", scale, FLOATS, (packed.shape[0], groups))
    if k == 0 or groups == 0 or k % groups:
        raise ValueError(f"scale: {k} input features do not divide into {groups} groups")
    if zero is not None:
        check_tensor("zero", zero, _UINT8, scale.shape)


def check_w4a16_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> None:
    if x.dim() == 0:
        raise ValueError("x: shape [] is not [..., K]")
    check_tensor("x", x, FLOATS, x.shape)
    check_dequantize(packed, scale, zero, bits, x.shape[-1])
    if bias is not None:
        check_tensor("bias", bias, FLOATS, (packed.shape[0],))


def check_bits(bits):
    if bits not in BITS:
        raise ValueError(f"bits: {bits} is not one of {', '.join(map(str, BITS))}")


def check_quantize_per_token(x, bits, grid, clip):
    if x.dtype not in FLOATS or not x.dim() or not x.shape[-1]:
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, expected float32, float16 or bfloat16 [..., K]")
    check_grid(bits, grid, clip)


def check_grid(bits, grid, clip):
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: {bits}, expected 2 to 8 for activations")
    if grid not in GRIDS:
        raise ValueError(f"grid: {grid} is not one of {', '.join(f'{key} ({name})' for key, name in GRIDS.items())}")
    if not 0 < clip <= 1:
        raise ValueError(f"clip: {clip}, expected above 0 and at most 1")


def check_integer_linear(x, x_scale, x_zero, packed, scale, zero, bias, bits, x_bits, grid, clip):
    check_w4a16_linear(x, packed, scale, zero, bias, bits)
    check_grids(x_scale, x_zero, x_bits, grid, clip)


def check_grids(x_scale, x_zero, x_bits, grid, clip):
    check_grid(x_bits, grid, clip)
    if (x_scale is None) != (x_zero is None):
        raise ValueError("x_scale: goes with x_zero; expected both or neither")
    if x_scale is not None:
        check_tensor("x_scale", x_scale, (torch.float32,), (1,))
        check_tensor("x_zero", x_zero, (torch.int32,), (1,))


def check_gptq_block(running, upper, scale, zero, group, kept, push, bits):
    check_bits(bits)
    for name, tensor in (("running", running), ("scale", scale)):
        if tensor.dim() != 2:
            raise ValueError(f"{name}: shape {list(tensor.shape)} is not [N, {'B' if name == 'running' else 'G'}]")
    n, width = running.shape
    check_tensor("running", running, (torch.float32,), running.shape)
    check_tensor("upper", upper, (torch.float32,), (width, width))
    check_tensor("scale", scale, FLOATS, (n, scale.shape[1]))
    check_tensor("group", group, (torch.int64,), (width,))
    if zero is not None:
        check_tensor("zero", zero, _UINT8, scale.shape)
    if kept is not None:
        check_tensor("kept", kept, (torch.bool,), running.shape)
    if push is not None:
        check_tensor("push", push, (torch.float32,), (width, width))


def check_clip_error(w, scale, zero, bits):
    check_bits(bits)
    for name, tensor in (("w", w), ("scale", scale)):
        if tensor.dim() != 2:
            raise ValueError(f"{name}: shape {list(tensor.shape)} is not [M, {'G' if name == 'w' else 'S'}]")
    check_tensor("w", w, (torch.float32,), w.shape)
    check_tensor("scale", scale, (torch.float32,), (w.shape[0], scale.shape[1]))
    if zero is not None:
        check_tensor("zero", zero, _UINT8, scale.shape)


def check_groups(group, scale):
    low, high = (int(group.min()), int(group.max())) if group.numel() else (0, 0)
    if group.numel() and not 0 <= low <= high < scale.shape[1]:
        raise ValueError(f"group: entries {low} to {high}, but scale has {scale.shape[1]} columns")


check_prepack = check_dequantize


def check_unprepack(blocks, n, k, groups, bits, scale_type, zero):
    """That `blocks` has the size that the numbers say."""
    check_bits(bits)
    if scale_type not in SCALE_TYPES.values():
        raise ValueError(f"scale_type: {scale_type} is not one of {', '.join(map(str, SCALE_TYPES.values()))}")
    if k <= 0 or groups <= 0 or k % groups:
        raise ValueError(f"groups: {k} input features do not divide into {groups} groups")
    if n < 0:
        raise ValueError(f"n: {n} is negative")
    check_tensor("blocks", blocks, _UINT8, (prepacked_bytes(n, k, groups, bits, scale_type, zero),))


check_dequantize_prepacked = check_unprepack


def check_prepacked_linear(x, blocks, bias, n, groups, bits, scale_type, zero):
    if x.dim() == 0:
        raise ValueError("x: shape [] is not [..., K]")
    check_tensor("x", x, FLOATS, x.shape)
    check_unprepack(blocks, n, x.shape[-1], groups, bits, scale_type, zero)
    if bias is not None:
        check_tensor("bias", bias, FLOATS, (n,))


def check_prepacked_integer_linear(
    x, x_scale, x_zero, blocks, bias, n, groups, bits, scale_type, zero, x_bits, grid, clip
):
    check_prepacked_linear(x, blocks, bias, n, groups, bits, scale_type, zero)
    check_grids(x_scale, x_zero, x_bits, grid, clip)


def check_sparse24_linear(x, compressed, bitmask, bias):
    k = x.shape[-1] if x.dim() else 0
    if x.dtype not in FLOATS or k == 0 or k % 4:
        raise ValueError(
            f"x: {x.dtype} {list(x.shape)}, expected float32, float16 or bfloat16 [..., K], K a multiple of 4"
        )
    if compressed.dim() != 2:
        raise ValueError(f"compressed: shape {list(compressed.shape)} is not [N, {k // 2}]")
    n = compressed.shape[0]
    check_tensor("compressed", compressed, FLOATS, (n, k // 2))
    check_tensor("bitmask", bitmask, _UINT8, (n, (k + 7) // 8))
    if bias is not None:
        check_tensor("bias", bias, FLOATS, (n,))


def check_hadamard(x):
    n = x.shape[-1] if x.dim() else 0
    if x.dtype not in (*FLOATS, torch.float64) or n < 1 or n & (n - 1):
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, expected floating point numbers [..., a power of two]")
