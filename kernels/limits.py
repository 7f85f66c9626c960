"""What this CPU gives at best, measured now with the instructions of the kernels in use: what they are held against."""

import torch

from . import ops

_READ_BYTES = 256 << 20  # more than a last-level cache
_KINDS = {"float32": 0, "int8": 1, "bfloat16": 2}  # Arithmetic in csrc/probe.h


def read_bandwidth(size: int = _READ_BYTES, repeats: int = 3) -> float:
    """Bytes a second that torch's threads read together, the best of `repeats`."""
    from ._C import read_bandwidth

    return read_bandwidth(size, torch.get_num_threads(), repeats)


def peaks(repeats: int = 9) -> dict[str, float]:
    """Operations a second (a product and a sum are two) by the kind of numbers; a kind that has none is left out.

    Empty where the native kernels are not built.
    """
    if not ops.available_isas():
        return {}
    from ._C import peak

    found = {name: peak(kind, torch.get_num_threads(), repeats) for name, kind in _KINDS.items()}
    return {name: rate for name, rate in found.items() if rate}
