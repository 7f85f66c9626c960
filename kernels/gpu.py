"""The Triton kernels (triton/) behind the ops on a GPU, imported at the first call: it takes a package and a driver."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

OPS = ("dequantize", "w4a16_linear", "quantize_per_token", "integer_linear", "hadamard")


def implementation(name: str, reference: Callable) -> Callable:
    """The kernel called `name`, or the reference where the device has none; the reason is logged once."""

    def op(*args: Any) -> Any:
        first = next(arg for arg in args if isinstance(arg, torch.Tensor))
        plain = first.dtype == torch.float64 or why_not(first.device)
        return reference(*args) if plain else getattr(_launch(), name)(*args)

    return op


@cache
def why_not(device: torch.device) -> str | None:
    """None where the kernels run, else why not."""
    launch = _launch()
    reason = "Triton is not installed: pip install remanence[cuda]" if launch is None else launch.supports(device)
    if reason is not None:
        logging.getLogger(__name__).warning("%s: plain torch computes: %s", device, reason)
    return reason


@cache
def _launch() -> Any:
    try:
        from .triton import launch
    except ImportError:
        return None
    return launch
