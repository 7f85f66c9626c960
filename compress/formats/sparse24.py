"""2:4 sparse weights on disk, in compressed-tensors' `sparse-24-bitmask`: the kept values, and one bit for each weight.

compressed-tensors up to 0.14 wrote and read it; from 0.15 on it, and with it transformers and vLLM, reads no sparse
format at all. transformers takes such a layer for missing and makes up random weights, so these tensors belong into
files that stock readers do not find; what those are to read is an ordinary checkpoint with its zeros (Mishra et al.
2021, arXiv 2104.08378, has the pattern).

Per linear layer [N, K], in place of its `weight`:
  compressed  [N, K/2] in the weight's dtype, two values of every four adjacent inputs, in their order
  bitmask     uint8 [N, ceil(K/8)], bit k % 8 (lowest first) of byte k // 8: whether input k is among the values
  shape       int64 [2, 1] = (N, K)
Where fewer than two of four are not zero, the first of the zeros fill up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

METHOD = "compressed-tensors"
FORMAT = "sparse-24-bitmask"
STRUCTURE = "2:4"
# The last release of compressed-tensors that knows the format.
LAYOUT_VERSION = "0.14.0"
PARTS = ("compressed", "bitmask", "shape")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_24(weight: Tensor) -> bool:
    """Whether at most two of every four adjacent inputs of weight [N, K] are not zero; False where K is no multiple
    of 4. NaN is not zero, -0.0 is."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool((_in_fours(weight != 0).sum(-1, dtype=torch.uint8) <= 2).all())


def compress24(weight: Tensor) -> dict[str, Tensor]:
    """weight [N, K] float32, float16 or bfloat16 -> the tensors of PARTS, on its device; the inverse of decompress24.

    Exact to the bit, but that a dropped -0.0 comes back as 0.0. Raises ValueError for another shape or dtype, for K
    that is no multiple of 4, and for a weight that is not 2:4 (it names the first four in which more than two stay).
    """
    if weight.dim() != 2:
        raise ValueError(f"weight: {weight.dim()} dimensions; expected [N, K]")
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight: dtype {weight.dtype}; expected {_listed(DTYPES)}")
    N, K = weight.shape
    _check_inputs(K)
    nonzero = _in_fours(weight.detach() != 0)  # [N, K/4, 4]
    count = nonzero.sum(-1, keepdim=True, dtype=torch.uint8)
    if (count > 2).any():
        row, four = (count[..., 0] > 2).nonzero()[0].tolist()
        raise ValueError(
            f"weight: is not 2:4: {int(count[row, four])} of inputs {4 * four} to {4 * four + 3} of row {row} are not "
            "zero; expected two at most"
        )
    filler = ~nonzero & ((~nonzero).cumsum(-1, dtype=torch.uint8) <= 2 - count)
    kept = (nonzero | filler).view(N, K)
    values = weight.detach().masked_select(kept).view(N, K // 2)
    return {"compressed": values, "bitmask": _to_bits(kept), "shape": torch.tensor([[N], [K]], device=weight.device)}


def decompress24(parts: Mapping[str, Tensor]) -> Tensor:
    """The weight [N, K] that `compress24` made `parts` of, in the dtype of its values; compressed-tensors' `shape` [2]
    is read too. Raises ValueError that names the part which is missing, misshapen or contradicts the others."""
    missing = [part for part in PARTS if part not in parts]
    if missing:
        raise ValueError(f"{missing[0]}: missing from the checkpoint")
    values, bitmask, shape = (parts[part] for part in PARTS)
    if shape.dtype != torch.int64 or tuple(shape.shape) not in ((2, 1), (2,)):
        raise ValueError(f"shape: {shape.dtype} {tuple(shape.shape)}; expected torch.int64 (2, 1)")
    N, K = shape.flatten().tolist()
    if N < 0 or K < 0:
        raise ValueError(f"shape: ({N}, {K}); expected no negative number")
    try:
        _check_inputs(K)
    except ValueError as error:
        raise ValueError(f"shape: {error}") from None
    if values.dtype not in DTYPES:
        raise ValueError(f"compressed: dtype {values.dtype}; expected {_listed(DTYPES)}")
    if tuple(values.shape) != (N, K // 2):
        raise ValueError(f"compressed: shape {tuple(values.shape)}; expected {(N, K // 2)} for a weight {(N, K)}")
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != (N, -(-K // 8)):
        raise ValueError(
            f"bitmask: {bitmask.dtype} {tuple(bitmask.shape)}; expected torch.uint8 {(N, -(-K // 8))} for a weight "
            f"{(N, K)}"
        )
    bits = _from_bits(bitmask)  # [N, 8 * ceil(K/8)]
    kept = bits[:, :K]
    if bits[:, K:].any():
        raise ValueError(f"bitmask: has bits set beyond the {K} inputs of a row")
    if (_in_fours(kept).sum(-1, dtype=torch.uint8) != 2).any():
        raise ValueError("bitmask: does not mark two of every four adjacent inputs")
    return values.new_zeros(N, K).masked_scatter_(kept, values)


def pack_state(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The file's tensors for weight [N, K] of the layer called `name`, its bias apart; ValueError names the layer."""
    try:
        return {f"{name}.{part}": tensor for part, tensor in compress24(weight).items()}
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def layers_in(names: Iterable[str]) -> list[str]:
    """Names of the sparse layers that tensors of these names belong to, in their order."""
    ends = tuple(f".{part}" for part in PARTS)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith(ends)))


def unpack_weight(name: str, state: dict[str, Tensor]) -> Tensor:
    """The weight [N, K] of the layer called `name`; takes its tensors out of `state`. ValueError names the tensor."""
    parts = {part: state.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in state}
    try:
        weight = decompress24(parts)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None
    if f"{name}.weight" in state:
        raise ValueError(f"{name}.weight: in the checkpoint beside its {PARTS[0]} values; expected one of the two")
    return weight


def to_config(layers: Sequence[str], dense: Sequence[str] = ()) -> dict[str, Any]:
    """The `quantization_config` entry of config.json.

    layers   names of the linear layers that are stored sparse;  dense: names of the others
    """
    return {
        "quant_method": METHOD,
        "format": "dense",
        "quantization_status": "compressed",
        "ignore": [],
        "sparsity_config": {
            "format": FORMAT,
            "sparsity_structure": STRUCTURE,
            "targets": list(layers),
            "ignore": list(dense),
        },
        "transform_config": {},
        "version": LAYOUT_VERSION,
    }


def is_config(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` says that layers are stored sparse, in whatever format."""
    sparsity = config.get("sparsity_config")
    return bool(sparsity) and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense")


def check_config(config: Mapping[str, Any], layers: Sequence[str]) -> None:
    """ValueError for the first thing in a `quantization_config` that we do not read, or that does not go with the
    sparse `layers` found in the file."""
    _demand("quant_method", config.get("quant_method"), METHOD)
    _demand("format", config.get("format", "dense"), "dense")
    for field in ("config_groups", "kv_cache_scheme", "transform_config"):
        if config.get(field):
            raise ValueError(f"quantization_config.{field}: does not go with {FORMAT} here; expected none")
    sparsity = config.get("sparsity_config")
    if not isinstance(sparsity, dict):
        raise ValueError("quantization_config.sparsity_config: expected an object")
    _demand("sparsity_config.format", sparsity.get("format"), FORMAT)
    _demand("sparsity_config.sparsity_structure", sparsity.get("sparsity_structure", STRUCTURE), STRUCTURE)
    share = sparsity.get("global_sparsity")
    if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1):
        raise ValueError(f"quantization_config.sparsity_config.global_sparsity: {share!r} is not a share from 0 to 1")
    targets, ignored = _names("targets", sparsity), _names("ignore", sparsity)
    for name in layers:
        if targets is not None and not _among(name, targets):
            raise ValueError(f"quantization_config.sparsity_config.targets: {name} is sparse in the file and not named")
        if ignored is not None and _among(name, ignored):
            raise ValueError(f"quantization_config.sparsity_config.ignore: {name} is named, and sparse in the file")
    for target in targets or ():
        if "." in target and not target.startswith("re:") and target not in layers:
            raise ValueError(f"quantization_config.sparsity_config.targets: {target} is not sparse in the file")


def _names(field: str, sparsity: Mapping[str, Any]) -> list[str] | None:
    found = sparsity.get(field)
    if found is not None and (not isinstance(found, list) or not all(isinstance(name, str) for name in found)):
        raise ValueError(f"quantization_config.sparsity_config.{field}: {found!r} is not a list of names")
    return found


def _among(name: str, patterns: Sequence[str]) -> bool:
    """Whether a linear layer's name is meant; "Linear" means all of them."""
    return any(
        re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern in ("Linear", name)
        for pattern in patterns
    )


def _demand(field: str, value: object, expected: str) -> None:
    if value != expected:
        raise ValueError(f"quantization_config.{field}: {value!r} is not supported here; expected {expected!r}")


def _check_inputs(K: int) -> None:
    if K % 4:
        raise ValueError(f"{K} input features do not divide into fours; {STRUCTURE} needs a multiple of 4")


def _in_fours(x: Tensor) -> Tensor:
    """[N, K] -> [N, K/4, 4]."""
    return x.reshape(x.shape[0], x.shape[1] // 4, 4)


def _to_bits(kept: Tensor) -> Tensor:
    """bool [N, K] -> uint8 [N, ceil(K/8)], lowest bit first."""
    N, K = kept.shape
    whole = torch.nn.functional.pad(kept.to(torch.uint8), (0, -K % 8)).view(N, -(-K // 8), 8)
    return (whole << _places(kept.device)).sum(-1, dtype=torch.uint8)


def _from_bits(bitmask: Tensor) -> Tensor:
    """uint8 [N, B] -> bool [N, 8 B]."""
    return ((bitmask[:, :, None] >> _places(bitmask.device)) & 1).bool().flatten(1)


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _listed(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
