"""A linear layer that holds packed integer weights; its forward is one torch op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.ops import dequantize, pack, unpack
from .rtn import QTensor
from .spec import QuantSpec


class QuantLinear(nn.Module):
    """y = x @ W.T + bias with W = (code - zero) * scale.

    packed  [N, 4*ceil(K*bits/32)] uint8, the stored layout (see kernels/reference.py)
    scale   [N, K/G], the dtype it is stored in
    zero    uint8 [N, K/G]; None in symmetric formats: 2^(bits-1)
    bias    [N] or None, the model's dtype
    replaces    class name of the layer it stands for; stock readers can only unpack into "Linear"
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        in_features: int,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        zero: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.in_features = in_features
        self.out_features = packed.shape[0]
        self.replaces = "Linear"
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("bias", bias)

    @classmethod
    def from_qtensor(cls, q: QTensor, bias: Tensor | None) -> QuantLinear:
        """Pack the codes of one quantized weight [N, K]."""
        bias = None if bias is None else bias.detach().clone()
        return cls(q.spec, q.codes.shape[1], pack(q.codes, q.spec.bits), q.scale, bias, q.zero)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
        return torch.ops.remanence.w4a16_linear(x, self.packed, self.scale, self.zero, self.bias, self.spec.bits)

    def codes(self) -> Tensor:
        """[N, K] uint8."""
        return unpack(self.packed, self.spec.bits, self.in_features)

    def dequantized(self) -> Tensor:
        """[N, K] float32."""
        return dequantize(self.packed, self.scale, self.zero, self.spec.bits, self.in_features)

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{self.in_features}, {self.out_features}, bits={spec.bits}, group_size={spec.group_size}" + (
            "" if spec.symmetric else ", asymmetric"
        )
