"""The products on an Ascend NPU (ascend/) behind the ops, imported at the first call: they take torch-npu."""

from collections.abc import Callable
from typing import Any

import torch

OPS = ("pack", "unpack", "dequantize", "w4a16_linear", "integer_linear", "hadamard")


def implementation(name: str, reference: Callable) -> Callable:
    """What is called `name` in ascend/products.py, or the reference where the device is some other that is no part of
    torch."""

    def op(*args: Any) -> Any:
        if torch._C._get_privateuse1_backend_name() != "npu":
            return reference(*args)
        from .ascend import products

        return getattr(products, name)(*args)

    return op
