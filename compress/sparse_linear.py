"""2:4 sparse layers (Mishra et al. 2021, arXiv 2104.08378). On the GPU: tensor cores that leave out two of every four
products, through torch's semi-structured sparse tensors. On the CPU: the stored layout (formats/sparse24.py) is what is
read for every token, 9/16 of the bytes of a dense weight of 16 bits, and is expanded in registers.

The weight takes K/2 values and 2 bits for each of them instead of K values. The numbers are those of the dense layer,
up to the order of its sums. For inference: there is no gradient of a weight, and on the GPU none through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels import ops
from .block import Linear
from .formats.sparse24 import DTYPES, compress24, decompress24, is_24
from .walk import replace, weight_of

# Ampere, the first with sparse tensor cores.
_CAPABILITY = (8, 0)
# At float32 the hardware's pattern is another one, one of every two.
_DEVICE_DTYPES = (torch.float16, torch.bfloat16)


class Sparse24Linear(nn.Module):
    """y = x @ W.T + bias with a 2:4 weight [N, K], which a subclass holds; in a state_dict it is the dense one, as the
    layer that it stands for has it.

    bias      [N] or None
    replaces  class name of that layer
    """

    bias: Tensor | None

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None, replaces: str) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.replaces = replaces
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def dense(self) -> Tensor:
        """W [N, K], exact."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: ARG002
        weight = self.dense()
        destination[f"{prefix}weight"] = weight.T.contiguous() if self.replaces == "Conv1D" else weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias.detach()

    def _load_from_state_dict(self, *_: Any) -> None:
        raise ValueError("state_dict: a 2:4 sparse layer takes no weights; load them into the dense model first")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, 2:4"


class SemiStructuredLinear(Sparse24Linear):
    """For GPUs: `weight` [N, K] is torch's semi-structured tensor."""

    def __init__(self, weight: Tensor, bias: Tensor | None, replaces: str = "Linear") -> None:
        N, K = weight.shape
        super().__init__(N, K, bias, replaces)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
        shape = (*x.shape[:-1], self.out_features)
        if not x.numel():  # an expert without tokens; the libraries take no empty matrix
            return x.new_empty(shape)
        y = F.linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return y.contiguous().view(shape)  # some versions of torch return the transpose of what a library computed

    def dense(self) -> Tensor:
        weight: Any = self.weight  # every value is multiplied by one 1
        return weight.detach().to_dense()


class BitmaskLinear(Sparse24Linear):
    """For CPUs: `compressed` [N, K/2] and `bitmask` uint8 [N, ceil(K/8)] as `compress24` makes them."""

    compressed: Tensor
    bitmask: Tensor

    def __init__(self, parts: Mapping[str, Tensor], bias: Tensor | None, replaces: str = "Linear") -> None:
        N, K = parts["shape"].flatten().tolist()
        super().__init__(N, K, bias, replaces)
        self.register_buffer("compressed", parts["compressed"])
        self.register_buffer("bitmask", parts["bitmask"])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x."""
        return ops.sparse24_linear(x, self.compressed, self.bitmask, self.bias)

    def dense(self) -> Tensor:
        shape = torch.tensor([[self.out_features], [self.in_features]])
        return decompress24({"compressed": self.compressed, "bitmask": self.bitmask, "shape": shape})


@dataclass(frozen=True)
class Kernel:
    """What multiplies with 2:4 weights.

    pack      weight [N, K] on its device -> what `layer` is made of
    multiples of N and of K that it takes, in one of `dtypes`
    """

    layer: Callable[[Any, Tensor | None, str], Sparse24Linear]
    pack: Callable[[Tensor], Any]
    multiples: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]


def _library(tensor: Any, multiples: tuple[int, int]) -> Kernel:
    return Kernel(SemiStructuredLinear, tensor.from_dense, multiples, _DEVICE_DTYPES)


KERNELS = {
    "cusparselt": _library(torch.sparse.SparseSemiStructuredTensorCUSPARSELT, (16, 16)),
    "cutlass": _library(torch.sparse.SparseSemiStructuredTensorCUTLASS, (32, 64)),
    "bitmask": Kernel(BitmaskLinear, compress24, (1, 4), DTYPES),
}


def layers_24(model: nn.Module) -> dict[str, Linear]:
    """The linear layers whose weights are 2:4 along their inputs, by name. One that has a second place in the model (a
    head that is also the embedding) is left out: there its weight is needed whole."""
    places: dict[int, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            raise ValueError(f"{name}: is not in memory; 2:4 layers are found in models that are loaded whole")
        places[id(parameter)] = places.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module.weight.dtype in DTYPES
        and places.get(id(module.weight)) == 1
        and is_24(weight_of(module))
    }


@torch.no_grad()
def semi_structured_(model: nn.Module) -> list[str]:
    """Have every 2:4 layer of a model on a GPU or CPU multiply sparse, in place; the names of these layers.

    Raises ValueError, before anything is replaced, for a model without such a layer, and for a device, dtype or shape
    that the sparse product is not to be had for.
    """
    kernels = _kernels(model)
    for name, kernel in kernels.items():
        swap_(model, [name], KERNELS[kernel])
    return list(kernels)


def _kernels(model: nn.Module) -> dict[str, str]:
    """Of every 2:4 layer the key in KERNELS. Names alone: a layer kept here would keep its dense weight."""
    layers = layers_24(model)
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no 2:4 layer; prune it first, e.g. by wanda-2:4")
    devices = {module.weight.device for module in layers.values()}
    kernels = {device: kernel_of(device) for device in devices}
    for name, module in layers.items():
        check_layer(name, weight_of(module), kernels[module.weight.device])
    for device, kernel in kernels.items():
        if device.type == "cuda":
            _try(device, kernel)
    return {name: kernels[module.weight.device] for name, module in layers.items()}


def kernel_of(device: torch.device) -> str:
    """The key in KERNELS of what this device multiplies with; ValueError where there is nothing."""
    wanted = "expected a CPU, or an NVIDIA GPU of compute capability 8.0 or newer"
    if device.type == "cpu":
        return "bitmask"
    if device.type != "cuda":
        raise ValueError(f"device: {device} has no 2:4 sparse product; {wanted}")
    capability = torch.cuda.get_device_capability(device)
    where = f"{device} ({torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]})"
    if capability < _CAPABILITY:
        raise ValueError(f"device: {where} has no 2:4 sparse product; {wanted}")
    if torch.backends.cusparselt.is_available():
        return "cusparselt"
    if capability[0] == 8:  # torch builds CUTLASS's kernels for no other
        return "cutlass"
    raise ValueError(f"device: {where} needs cuSPARSELt, which this build of torch {torch.__version__} lacks")


def check_layer(name: str, weight: Tensor, kernel: str) -> None:
    """ValueError when weight [N, K] of the layer called `name` has a dtype or shape that KERNELS[kernel] lacks."""
    if weight.dtype not in KERNELS[kernel].dtypes:
        raise ValueError(f"{name}: dtype {weight.dtype}; the 2:4 sparse product takes float16 and bfloat16")
    N, K = weight.shape
    rows, columns = KERNELS[kernel].multiples
    if N % rows or K % columns:
        raise ValueError(
            f"{name}: {N} outputs and {K} inputs; {kernel} takes multiples of {rows} outputs and {columns} inputs"
        )


def swap_(model: nn.Module, names: Sequence[str], kernel: Kernel) -> None:
    """Put the kernel's layer in the place of each linear layer of these names."""
    for name in names:
        dense: Any = model.get_submodule(name)
        weight = kernel.pack(weight_of(dense).detach().contiguous())
        layer = kernel.layer(weight, dense.bias, type(dense).__name__)
        replace(model, name, layer.train(dense.training))
        if hasattr(dense, "_hf_hook"):  # moves the input to the layer's device, in models spread over several
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(layer, dense._hf_hook)


def _try(device: torch.device, kernel: str) -> None:
    """Multiply once and compare: whether a library runs on a GPU that is newer than itself, it says only then."""
    size = 128
    place = torch.arange(size, device=device)
    small = torch.arange(size * size, device=device).view(size, size) % 7 - 3
    weight = small.masked_fill((place + place[:, None]) % 4 >= 2, 0).half()
    x = (small.T % 5).half()
    try:
        y = F.linear(x, KERNELS[kernel].pack(weight))
    except (RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device: {kernel} does not run on {device} ({torch.cuda.get_device_name(device)}): {reason}"
        ) from None
    # Small integers: every sum is exact in float16.
    if not torch.equal(y, F.linear(x, weight)):
        raise ValueError(f"device: {kernel} multiplies wrongly on {device} ({torch.cuda.get_device_name(device)})")
