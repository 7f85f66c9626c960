"""What may stand in front of a quantized layer's rounding while the model runs, and how files hold it.

A file has the tensors under `<layer>.transform.<name>`; which transform it is follows from the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from .hadamard import OnlineHadamard
from .kronecker import Kronecker

_KINDS: dict[tuple[str, ...], type[Kronecker] | type[OnlineHadamard]] = {
    ("left", "right", "scale"): Kronecker,
    ("core", "signs"): OnlineHadamard,
}


def transform_names(layer: str, keys: Iterable[str]) -> list[str]:
    """Which of the tensors called `keys` are of the transform of the layer called `layer`."""
    return [key for key in keys if key.startswith(f"{layer}.transform.")]


def transform_from(layer: str, tensors: Mapping[str, Tensor]) -> nn.Module | None:
    """The transform of the layer called `layer`, of tensors under their names in the file; None: it has none.

    ValueError for names that are no transform's.
    """
    found = {key.rpartition(".")[2]: tensors[key] for key in transform_names(layer, tensors)}
    if not found:
        return None
    for names, kind in _KINDS.items():
        if found.keys() == set(names):
            return kind(*(found[name] for name in names))
    raise ValueError(f"{layer}.transform: has {', '.join(sorted(found))}, which is no transform that we know")
