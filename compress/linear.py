"""A linear layer that holds packed integer weights, and rounds its input where asked; its forward is one torch op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..backends import ascend
from ..kernels import ops
from ..kernels.ops import dequantize, pack, unpack
from .hadamard import OnlineHadamard
from .joint import Joint, join, siblings
from .kronecker import Kronecker
from .rtn import QTensor
from .spec import ActivationSpec, QuantSpec

if TYPE_CHECKING:
    from ..kernels.ascend.routes import Inputs
    from ..kernels.ascend.weights import AscendWeight

Model = TypeVar("Model", bound=nn.Module)
_STORED = ("packed", "scale", "zero")


class QuantLinear(nn.Module):
    """y = x @ W.T + bias with W = (code - zero) * scale.

    packed  [N, 4*ceil(K*bits/32)] uint8, the stored layout (see kernels/reference.py)
    scale   [N, K/G], the dtype it is stored in
    zero    uint8 [N, K/G]; None in symmetric formats: 2^(bits-1)
    blocks  instead of these three, once `prepack_` was called: the run-time layout of this machine's kernels. The three
            are then copies, worked out when asked for; to set one brings the stored layout back. A state_dict has them
            and nothing else
    laid    the same on an Ascend NPU, from the first call on: as its operators read it for the dtype of x
    bias    [N] or None, the model's dtype
    activation  how x is rounded; None: it is not
    x_scale, x_zero   float32 [1] and int32 [1], of a static activation; else None
    transform   of x, before anything else: the weight stands behind it; None: there is none
    siblings    the layers that may share its input, itself among them, and `joint`: the weights of all, where they fit
    replaces    class name of the layer it stands for; stock readers can only unpack into "Linear"
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    blocks: Tensor | None
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
        self.siblings: tuple[QuantLinear, ...] = ()
        self.joint: Joint | None = None
        self.laid: AscendWeight | None = None
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
        """x [..., K] -> [..., N] in the dtype of x and on its device; weights that are on another are copied for the
        call."""
        if x.shape[-1:] != (self.in_features,):  # the op knows no more than how many words a row of codes fills
            raise ValueError(f"x: shape {list(x.shape)} is not [..., {self.in_features}]")
        if not x.is_cpu and x.device.type == ascend.NAME and self._here(x.device):
            return self._on_npu(x)
        if self.transform is not None:
            x = self.transform(x)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._multiply(x)
        # Without a gradient torch would still look for one, in Python: a third of what a call costs beside the kernel.
        with torch._C._AutoDispatchBelowAutograd():
            if self.joint is not None and x.numel() == self.in_features and x.is_cpu:
                y = self.joint.multiply(self, x)
                if y is not None:
                    return y
            return self._multiply(x)

    def product(self, x: Tensor, blocks: Tensor, n: int) -> Tensor:
        """x times n rows of weights in the run-time layout, of this layer's form."""
        held, a = self._buffers, self.activation  # held: a buffer as an attribute takes torch a microsecond to find
        weight = (blocks, held["bias"], n, *self.form)
        if a is None:
            return torch.ops.remanence.prepacked_linear(x, *weight)
        grid = (held["x_scale"], held["x_zero"])
        return torch.ops.remanence.prepacked_integer_linear(x, *grid, *weight, a.bits, a.grid, a.clip)

    def _here(self, device: torch.device) -> bool:
        """Whether the weight lies there: it may serve a device from another."""
        if self.laid is not None:
            return self.laid.device == device
        held = self._buffers["packed"] if self.blocks is None else self.blocks
        return held is not None and held.device == device

    def _on_npu(self, x: Tensor) -> Tensor:
        from ..kernels.ascend import products

        if self.laid is None or self.laid.layer.dtype != x.dtype:
            self.laid = products.lay(self.packed, self.scale, self.zero, self.on_ascend(x.dtype), x.device)
            self._buffers.update(dict.fromkeys(_STORED))
        held = self._buffers
        x_scale, x_zero = held["x_scale"], held["x_zero"]
        static = None if x_scale is None or x_zero is None else (x_scale, x_zero)
        return products.linear(x, self.laid, held["bias"], static, self.transform)

    def on_ascend(self, dtype: torch.dtype) -> Any:
        """What kernels/ascend/routes.py is to be asked about this layer, for x in `dtype`."""
        from ..kernels.ascend.routes import Layer

        k, spec = self.in_features, self.spec
        inputs = None if self.activation is None else _inputs(self.activation, self.transform)
        return Layer(self.out_features, k, spec.bits, spec.group_size or k, spec.symmetric, dtype, inputs)

    def _multiply(self, x: Tensor) -> Tensor:
        blocks, a = self._buffers.get("blocks"), self.activation
        if blocks is not None and x.is_cpu:
            return self.product(x, blocks, self.out_features)
        self.unprepack_()
        stored = (self.packed, self.scale, self.zero, self.bias)
        grid = (self.x_scale, self.x_zero)
        if self.packed.device != x.device:  # offloaded: packed, the weight is soon brought to where it is multiplied
            stored, grid = _brought(stored, x.device), _brought(grid, x.device)
        if a is None:
            return torch.ops.remanence.w4a16_linear(x, *stored, self.spec.bits)
        return torch.ops.remanence.integer_linear(x, *grid, *stored, self.spec.bits, a.bits, a.grid, a.clip)

    def prepack_(self) -> QuantLinear:
        """Lay the weight out for the kernels of its device, where they have a layout of their own: on a CPU."""
        packed, scale, zero = (self._buffers[name] for name in _STORED)
        if packed is None or scale is None or scale.dtype not in ops.SCALE_TYPES:
            return self
        if packed.device.type == "cpu" and ops.available_isas():
            self.form = (scale.shape[1], self.spec.bits, ops.SCALE_TYPES[scale.dtype], zero is not None)
            self._lay(ops.prepack(packed, scale, zero, self.spec.bits, self.in_features))
            self._buffers.update(dict.fromkeys(_STORED))
            self.join_()
        return self

    def _lay(self, blocks: Tensor | None) -> None:
        """`blocks` as a buffer that no state_dict has. None is none at all: accelerate asks each for its device."""
        if blocks is None:
            del self._buffers["blocks"]
            self._non_persistent_buffers_set.discard("blocks")
        else:
            self._buffers["blocks"] = blocks
            self._non_persistent_buffers_set.add("blocks")

    def join_(self) -> None:
        """With its siblings, once all are laid out."""
        joint = join(self.siblings) if self.siblings else None
        for member in self.siblings:
            member.joint = joint

    def unprepack_(self) -> QuantLinear:
        """The stored layout again."""
        if self._laid_out():
            stored = self._stored()
            if self.blocks is not None:
                self._lay(None)
            self.laid = None
            self.packed, self.scale, self.zero = stored
            for member in self.siblings:
                member.joint = None
        return self

    def _laid_out(self) -> bool:
        """The stored layout is not kept."""
        return self._buffers.get("blocks") is not None or self.__dict__.get("laid") is not None

    def _stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """packed, scale, zero, of `blocks` or `laid`."""
        if self.laid is not None:
            return self.laid.stored()
        assert self.blocks is not None
        n, form = self.out_features, self.form
        packed, scale, zero = torch.ops.remanence.unprepack(self.blocks, n, self.in_features, *form)
        return packed, scale, zero if form[-1] else None

    def __getattr__(self, name: str) -> Any:
        if name == "blocks":
            return self._buffers.get(name)
        if name in _STORED and self._laid_out():
            return self._stored()[_STORED.index(name)]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        stale = name in _STORED or (name in ("activation", "transform") and self.__dict__.get("laid") is not None)
        if stale and self._laid_out():
            self.unprepack_()  # else the run-time layout would go on as it was
        super().__setattr__(name, value)

    def _apply(self, *args: Any, **kwargs: Any) -> QuantLinear:
        """As for any module, but the static grid keeps its dtype: `model.to(dtype)` is about the model's numbers."""
        x_scale, prepacked = self.x_scale, self._laid_out()
        self.unprepack_()
        super()._apply(*args, **kwargs)
        if x_scale is not None and self.x_scale is not None and self.x_scale.dtype != x_scale.dtype:
            self.x_scale = x_scale.to(self.x_scale.device)
        return self.prepack_() if prepacked else self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._laid_out():
            stored = zip(_STORED, self._stored(), strict=True)
            destination.update({f"{prefix}{name}": tensor for name, tensor in stored if tensor is not None})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        prepacked = self._laid_out()
        self.unprepack_()
        super()._load_from_state_dict(*args, **kwargs)
        if prepacked:
            self.prepack_()

    def codes(self) -> Tensor:
        """[N, K] uint8."""
        return unpack(self.packed, self.spec.bits, self.in_features)

    def dequantized(self) -> Tensor:
        """[N, K] float32."""
        if self.blocks is not None:
            return torch.ops.remanence.dequantize_prepacked(
                self.blocks, self.out_features, self.in_features, *self.form
            )
        return dequantize(self.packed, self.scale, self.zero, self.spec.bits, self.in_features)

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"{self.in_features}, {self.out_features}, bits={spec.bits}, group_size={spec.group_size}"
            + ("" if spec.symmetric else ", asymmetric")
            + ("" if self.activation is None else f", activation={self.activation}")
        )


def _inputs(activation: ActivationSpec, transform: nn.Module | None) -> Inputs:
    from ..kernels.ascend.routes import Inputs

    kind, factors = "", cast(tuple[int, ...], ())
    if isinstance(transform, Kronecker):
        kind, factors = "kronecker", (len(transform.left), len(transform.right))
    elif isinstance(transform, OnlineHadamard):
        kind, factors = "hadamard", (len(transform.signs),)
    return Inputs(activation.bits, activation.dynamic, activation.grid, activation.clip, kind, factors)


def _brought(tensors: tuple[Tensor | None, ...], device: torch.device) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors)


def prepack_(model: Model) -> Model:
    """Lay every packed layer out for the kernels of its device, in place, one after another; those that share their
    input as one."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepack_()
    for group in siblings(model, QuantLinear):
        for member in group:
            member.siblings = group
        group[0].join_()
    return model
