"""The outputs of the ops, unwritten: what fake tensors answer, and what the native kernels fill.

Each function takes the arguments of the op it is named for.
"""

import torch

from .reference import packed_width, prepacked_bytes

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # by ScaleType in csrc/rows.h


def pack(codes, bits):
    return codes.new_empty(codes.shape[0], packed_width(codes.shape[1], bits))


def unpack(packed, _bits, k):
    return packed.new_empty(packed.shape[0], k)


def dequantize(packed, _scale, _zero, _bits, k):
    return packed.new_empty(packed.shape[0], k, dtype=torch.float32)


def prepack(packed, scale, zero, bits, k):
    scale_type = SCALE_DTYPES.index(scale.dtype)
    return packed.new_empty(prepacked_bytes(packed.shape[0], k, scale.shape[1], bits, scale_type, zero is not None))


def unprepack(blocks, n, k, groups, bits, scale_type, zero):
    return (
        blocks.new_empty(n, packed_width(k, bits)),
        blocks.new_empty(n, groups, dtype=SCALE_DTYPES[scale_type]),
        blocks.new_empty(n if zero else 0, groups),
    )


def dequantize_prepacked(blocks, n, k, _groups, _bits, _scale_type, _zero):
    return blocks.new_empty(n, k, dtype=torch.float32)


def w4a16_linear(x, packed, _scale, _zero, _bias, _bits):
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def prepacked_linear(x, _blocks, _bias, n, *_):
    return x.new_empty(*x.shape[:-1], n)


def integer_linear(x, _x_scale, _x_zero, packed, *_):
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def prepacked_integer_linear(x, _x_scale, _x_zero, _blocks, _bias, n, *_):
    return x.new_empty(*x.shape[:-1], n)


def quantize_per_token(x, _bits, _grid, _clip):
    row = (*x.shape[:-1], 1)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(row, dtype=torch.float32),
        x.new_empty(row, dtype=torch.int32),
    )


def sparse24_linear(x, compressed, _bitmask, _bias):
    return x.new_empty(*x.shape[:-1], compressed.shape[0])


def hadamard(x):
    return x.new_empty(x.shape)


def gptq_block(running, _upper, _scale, _zero, _group, _kept, _push, _bits):
    return running.new_empty(running.shape, dtype=torch.uint8), running.new_empty(running.shape)


def clip_error(_w, scale, _zero, _bits):
    return scale.new_empty(scale.shape)
