"""What one of torch's ops computes, from the shapes of what it is given: floating-point operations of products, or
numbers touched by the rest.

A product and its sum are two operations. Ops are told apart by their names in aten; what is neither a product, nor
known to touch each number a few times at most, is uncounted, and the walk lists it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """a [M, K], b [K, N]."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def _bmm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """a [B, M, K], b [B, K, N]."""
    return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]


def _mv(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:  # noqa: ARG001, torch's own signature
    return 2 * a.numel()


def _linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """x [..., K], weight [N, K]."""
    return 2 * x.numel() * weight.shape[0]


def _convolution(x: Tensor, weight: Tensor, *rest: Any, **__: Any) -> int:
    """x [B, C, ...], weight [N, C/groups, ...] (transposed: [C, N/groups, ...]): each tap is a product."""
    _bias, stride, padding, dilation, transposed = rest[:5]
    if transposed:
        return 2 * x.numel() * math.prod(weight.shape[1:])
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=False)
    ]
    return 2 * x.shape[0] * weight.shape[0] * math.prod(sizes) * math.prod(weight.shape[1:])


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """q [B, H, T, D], k [B, H', S, D], v [B, H', S, D']: every query with every key, as no mask is known here."""
    return 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """a [T, K] rows sorted by group, b [E, K, N]: each row meets one group."""
    return 2 * a.numel() * b.shape[-1]


def _after(call: Callable[..., int]) -> Callable[..., int]:
    """Of an op whose first argument is added to a product."""
    return lambda added, *rest, **keywords: call(*rest, **keywords)  # noqa: ARG005


PRODUCTS: dict[str, Callable[..., int]] = {
    "mm": _mm,
    "addmm": _after(_mm),
    "_int_mm": _mm,
    "_scaled_mm": _mm,
    "bmm": _bmm,
    "baddbmm": _after(_bmm),
    "mv": _mv,
    "addmv": _after(_mv),
    "dot": _mv,
    "linear": _linear,
    "convolution": _convolution,
    "_grouped_mm": _grouped,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
}
# Those that fetch rows of a tensor, which is not read as a whole: the position of that tensor among the arguments.
GATHERS = {"embedding": 0, "index": 0, "index_select": 0, "gather": 0}
# Beside ops that torch itself tags as pointwise or reductions: each touches its numbers a few times at most.
_TOUCHES = frozenset(
    """_softmax _log_softmax _to_copy abs_ all amax amin aminmax any arange argmax argmin argsort bincount bucketize cat
    clamp_ clone constant_pad_nd copy copy_ count_nonzero cummax cumprod cumsum diagonal_copy div_ embedding empty
    empty_like empty_strided exp_ eye fill fill_ flip full full_like gather index index_add index_add_ index_copy
    index_copy_ index_fill index_fill_ index_put index_put_ index_select isin lift lift_fresh lift_fresh_copy linspace
    logcumsumexp logsumexp masked_fill masked_fill_ masked_scatter masked_scatter_ max mean median min native_dropout
    native_group_norm native_layer_norm new_empty new_empty_strided new_full new_ones new_zeros norm ones ones_like prod
    rand rand_like randn randn_like repeat repeat_interleave roll rsub scalar_tensor scatter scatter_ scatter_add
    scatter_add_ scatter_reduce select_backward slice_backward slice_scatter select_scatter sort split_with_sizes_copy
    stack std sum topk tril triu tril_ triu_ unfold_copy var var_mean zero_ zeros zeros_like _fused_rms_norm
    polar _local_scalar_dense _assert_async _assert_tensor_metadata where linalg_vector_norm""".split()
)
_TAGS = tuple(getattr(torch.Tag, name) for name in ("pointwise", "reduction") if hasattr(torch.Tag, name))


def number_of(dtype: torch.dtype) -> str:
    """Its kind, as ceilings name it."""
    return str(dtype).removeprefix("torch.")


def name_of(op: Any) -> str:
    """Without its namespace where that is aten, and without its overload."""
    namespace, _, name = op._schema.name.partition("::")
    return name if namespace == "aten" else f"{namespace}::{name}"


def touches(op: Any) -> bool:
    """Whether each number that it is given or gives is touched a few times at most."""
    return name_of(op) in _TOUCHES or any(tag in op.tags for tag in _TAGS)
