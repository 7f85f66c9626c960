"""A linear layer that holds packed integer weights, and rounds its input where asked; its forward is one torch op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.ops import dequantize, pack, unpack
from .rtn import QTensor
from .spec import ActivationSpec, QuantSpec


class QuantLinear(nn.Module):
    """y = x @ W.T + bias with W = (code - zero) * scale.

    packed  [N, 4*ceil(K*bits/32)] uint8, the stored layout (see kernels/reference.py)
    scale   [N, K/G], the dtype it is stored in
    zero    uint8 [N, K/G]; None in symmetric formats: 2^(bits-1)
    bias    [N] or None, the model's dtype
    activation  how x is rounded; None: it is not
    x_scale, x_zero   float32 [1] and int32 [1], of a static activation; else None
    transform   of x, before anything else: the weight stands behind it; None: there is none
    replaces    class name of the layer it stands for; stock readers can only unpack into "Linear"
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    x_scale: Tensor | None
    x_zero: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        in_features: int,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        zero: Tensor | None = None,
        activation: ActivationSpec | None = None,
        static: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.in_features = in_features
        self.out_features = packed.shape[0]
        self.replaces = "Linear"
        self.transform: nn.Module | None = None
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("bias", bias)
        if (static is None) != (activation is None or activation.dynamic):
            raise ValueError(f"static: {static} does not go with {activation}")
        self.activation = activation
        self.register_buffer("x_scale", None if static is None else static[0])
        self.register_buffer("x_zero", None if static is None else static[1])

    @classmethod
    def from_qtensor(
        cls,
        q: QTensor,
        bias: Tensor | None,
        activation: ActivationSpec | None = None,
        static: tuple[Tensor, Tensor] | None = None,
    ) -> QuantLinear:
        """Pack the codes of one quantized weight [N, K]."""
        bias = None if bias is None else bias.detach().clone()
        packed = pack(q.codes, q.spec.bits)
        return cls(q.spec, q.codes.shape[1], packed, q.scale, bias, q.zero, activation, static)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
        if self.transform is not None:
            x = self.transform(x)
        weight = (self.packed, self.scale, self.zero, self.bias, self.spec.bits)
        a = self.activation
        if a is None:
            return torch.ops.remanence.w4a16_linear(x, *weight)
        return torch.ops.remanence.integer_linear(x, self.x_scale, self.x_zero, *weight, a.bits, a.symmetric, a.clip)

    def _apply(self, *args: Any, **kwargs: Any) -> QuantLinear:
        """As for any module, but the static grid keeps its dtype: `model.to(dtype)` is about the model's numbers."""
        x_scale = self.x_scale
        super()._apply(*args, **kwargs)
        if x_scale is not None and self.x_scale is not None and self.x_scale.dtype != x_scale.dtype:
            self.x_scale = x_scale.to(self.x_scale.device)
        return self

    def codes(self) -> Tensor:
        """[N, K] uint8."""
        return unpack(self.packed, self.spec.bits, self.in_features)

    def dequantized(self) -> Tensor:
        """[N, K] float32."""
        return dequantize(self.packed, self.scale, self.zero, self.spec.bits, self.in_features)

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"{self.in_features}, {self.out_features}, bits={spec.bits}, group_size={spec.group_size}"
            + ("" if spec.symmetric else ", asymmetric")
            + ("" if self.activation is None else f", activation={self.activation}")
        )
