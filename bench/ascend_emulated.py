"""A device called npu:0 whose tensors lie in memory and whose numbers are right, in a process of its own.

torch takes a backend written in Python (by a private function of newer releases): a tensor here is a wrapper around one
on the CPU that says it is on npu:0. What runs on it is what runs on an NPU: this package's implementations for
PrivateUse1, and torch-npu's operators (ascend_reference.py), which refuse what the device would refuse. Tensors of two
devices in one call are an error, as they are there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

from . import ascend_reference

CPU, NPU = "cpu", "npu:0"
# Scalars of the CPU go with tensors anywhere, and these bring a tensor from one device to another.
_CROSSING = ("_to_copy", "_copy_from", "copy_")
_libraries: list[torch.library.Library] = []


def missing() -> str | None:
    """Why no such device can be made here; None: it can."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return f"torch {torch.__version__} takes no backend written in Python; 2.13 does"
    name = torch._C._get_privateuse1_backend_name()
    return None if name == "privateuseone" else f"this process has a device {name} already"


def install(chip: str = "Ascend910B4") -> None:
    """Make the device; RuntimeError where it cannot be made. chip: as torch.npu.get_device_name gives it."""
    if reason := missing():
        raise RuntimeError(reason)
    backend_registration._setup_privateuseone_for_python_backend("npu")
    module: Any = torch.npu  # type: ignore[attr-defined]
    type(module).get_device_name = staticmethod(lambda *_: chip)
    ascend_reference.install()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter's wrapper goes with what it holds
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for name, made in _MAKERS.items():
        library.impl(name, made)
    _libraries.append(library)


class NpuTensor(torch.Tensor):
    """held: the tensor on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> NpuTensor:
        where = torch.device(NPU)
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=where
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"NpuTensor({self.held})"

    # Where it lies tells tensors apart; the wrapper itself lies nowhere.
    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:  # which torch refuses of a wrapper
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        if name == "to":  # comes whole where autograd is passed by
            return func.decompose(*args, **kwargs)
        if name not in _CROSSING:
            _check_devices(func, (args, kwargs))
        if func.namespace == "remanence" and torch._C._dispatch_has_kernel_for_dispatch_key(
            func._schema.name, "PrivateUse1"
        ):
            return func._op_dk(torch._C.DispatchKey.PrivateUse1, *args, **kwargs)
        if name == "_to_copy":
            target = torch.device(kwargs.pop("device", None) or NPU).type
            made = func(_held(args[0]), *args[1:], **kwargs)
            return _on_npu(made) if target == "npu" else made
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        made = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if name.endswith("_") and not name.endswith("__") and isinstance(args[0], Tensor):
            return args[0]
        return tree_map(lambda each: _on_npu(each) if isinstance(each, Tensor) else each, made)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, NpuTensor) else value


def _on_npu(held: Tensor) -> NpuTensor:
    return NpuTensor(held)


def _check_devices(func: Any, given: Any) -> None:
    """As every backend: one device, but for numbers that are tensors without an axis."""
    strangers = [
        each
        for each in tree_leaves(given)
        if isinstance(each, Tensor) and not isinstance(each, NpuTensor) and each.dim()
    ]
    if strangers:
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found npu:0 and cpu")


def _empty(size: Any, dtype: torch.dtype | None = None, **_: object) -> Tensor:
    return NpuTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: torch.dtype | None = None, **_: object) -> Tensor:
    return NpuTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, *_: object) -> Tensor:
    _held(target).copy_(_held(source))
    return target


_MAKERS: dict[str, Callable] = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "_copy_from": _copy_from,
}
