"""LoRA (Hu et al. 2022, arXiv 2106.09685) through peft, and the two ways to hand on what was learned.

Merged, the result is an ordinary model: W + scaling B A, which is what compression sees. Unmerged, it is a base and an
adapter beside it, and compression sees the base alone. With FILA the two differ by more than rounding: its base is a
residual, from which a part of the forget set's weight is already gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..compress.checkpoint import write_model
from ..compress.files import read_json
from ..compress.linear import QuantLinear
from ..compress.places import base_directory
from ..compress.walk import linears
from .catalog import MethodConfig
from .feed import Feed
from .fila import add_squares_, initialize_, relative_importance
from .layers import device_of, forward
from .losses import nll

if TYPE_CHECKING:
    from peft import PeftModel

# What peft puts around a module's name.
_PREFIX = "base_model.model."
_ENDS = (".lora_A.weight", ".lora_B.weight")

# Options of peft that make an adapter more than scaling B A; ours has none of them.
_MORE = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "modules_to_save")

# Rows of each set that the importance is taken from.
_IMPORTANCE_ROWS = 256


def attach(model: PreTrainedModel, config: MethodConfig, feed: Feed) -> PeftModel:
    """`model` with a LoRA adapter on every linear layer but the head, the only thing that trains; started by FILA where
    the settings say so. Routers and fused experts of a mixture get none.

    Raises ModuleNotFoundError that says what to install, ValueError for a rank that a layer is too narrow for.
    """
    importance = _importance(model, feed) if config.fila else None
    adapted = with_lora(model, config.lora_rank, config.lora_alpha or 2 * config.lora_rank)
    if importance is not None:
        initialize_(adapted, importance)
    return adapted


def with_lora(model: PreTrainedModel, rank: int, alpha: int) -> PeftModel:
    """`model` with an adapter that changes nothing yet; nothing else in it trains from now on.

    Raises ModuleNotFoundError that says what to install.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise ModuleNotFoundError("peft: LoRA needs it; pip install remanence[train]") from None
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        # Not "all-linear", which newer versions of peft take to mean routers and fused experts too.
        target_modules=[name for name, module in linears(model, ()) if module is not model.get_output_embeddings()],
        fan_in_fan_out=any(isinstance(module, Conv1D) for _, module in linears(model, ())),
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return adapted


def _importance(model: PreTrainedModel, feed: Feed) -> dict[str, Tensor]:
    """How much each weight matters for the forget set, relative to the retain set; answer by answer."""
    if "retain" not in feed.encoded:
        raise ValueError("fila: needs retain rows, to tell what matters for the forget set only")
    model.eval()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    head = model.get_output_embeddings()
    named = [(names[id(module.weight)], module.weight) for _, module in linears(model, ()) if module is not head]
    sums: dict[str, dict[str, Tensor]] = {}
    tokens: dict[str, int] = {}
    for name in ("forget", "retain"):
        sums[name], rows = {}, _spread(range(len(feed.encoded[name])), _IMPORTANCE_ROWS)
        tokens[name] = feed.units(name, rows, "tokens")
        for row in rows:
            batch = feed.batch(name, [row], device_of(model))
            # Not .backward(): every process takes all rows, so that all start from the same adapter.
            loss = nll(forward(model, batch), batch.labels)
            found = torch.autograd.grad(loss, [parameter for _, parameter in named])
            gradients = {key: gradient for (key, _), gradient in zip(named, found, strict=True)}
            add_squares_(sums[name], gradients, feed.units(name, [row], "tokens"))
    return {
        name: relative_importance(forget, tokens["forget"], sums["retain"][name], tokens["retain"])
        for name, forget in sums["forget"].items()
    }


def _spread(rows: Sequence[int], most: int) -> list[int]:
    return list(rows) if len(rows) <= most else [rows[i * len(rows) // most] for i in range(most)]


def onto(dense: PreTrainedModel, adapted: nn.Module) -> PeftModel:
    """`dense` with a copy of the adapter that was trained on a quantized copy of it."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config: Any = adapted.peft_config["default"]  # type: ignore[index]
    moved: Any = get_peft_model(dense, config, autocast_adapter_dtype=False)
    set_peft_model_state_dict(moved, get_peft_model_state_dict(adapted))
    return moved


def merged(adapted: nn.Module) -> PreTrainedModel:
    """The ordinary model: every adapter added into its weight."""
    return adapted.merge_and_unload()  # type: ignore[operator]


def save_unmerged(adapted: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write base/ (for FILA: the residual) and adapter/ (as peft has it) into an existing directory.

    The directory itself is no model: nobody can load the base and miss the adapter.
    """
    adapted.peft_config["default"].base_model_name_or_path = "../base"  # type: ignore[index, union-attr]
    adapted.save_pretrained(str(directory / "adapter"), save_embedding_layers=False)  # type: ignore[operator]
    (directory / "base").mkdir()
    write_model(adapted.unload(), tokenizer, directory / "base")  # type: ignore[operator]


def with_adapter(model: PreTrainedModel, path: Path | str) -> PreTrainedModel:
    """`model`, loaded from `base_directory(path)` and quantized or not, with the adapter kept beside it.

    Every adapted layer gives y + scaling B A x, in the dtype of y, as an engine that serves adapters does it.
    Raises FileNotFoundError or ValueError naming the file for an adapter that is damaged, does not fit, or is more than
    plain LoRA.
    """
    directory = Path(path) / "adapter"
    if base_directory(path) == path:
        return model
    tensors, rank, scaling = _read(directory)
    file = directory / "adapter_model.safetensors"
    modules = dict(model.named_modules())
    pairs = []
    for name in sorted({key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in tensors}):
        A, B = (tensors.get(f"{_PREFIX}{name}.lora_{letter}.weight") for letter in "AB")
        if A is None or B is None:
            raise ValueError(f"{file}: {name}: lora_{'A' if A is None else 'B'}.weight is missing")
        N, K = _shape(modules.get(name))
        if A.shape != (rank, K) or B.shape != (N, rank):
            shapes = f"A {list(A.shape)} and B {list(B.shape)}"
            raise ValueError(f"{file}: {name}: {shapes} do not fit rank {rank} and this model, where it is [{N}, {K}]")
        pairs.append((modules[name], A, B))
    for module, A, B in pairs:
        module.register_forward_hook(_added(A.to(model.device), B.to(model.device), scaling))
    return model


def _read(directory: Path) -> tuple[dict[str, Tensor], int, float]:
    """Tensors, rank and scaling of a plain LoRA adapter; ValueError naming the file for anything else."""
    path, file = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type: {config.get('peft_type')!r} is not LORA")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not rank > 0:
        raise ValueError(f"{path}: r: expected a whole number above 0, got {rank!r}")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise ValueError(f"{path}: lora_alpha: expected a number above 0, got {alpha!r}")
    for name in _MORE:
        if config.get(name):
            raise ValueError(f"{path}: {name}: {config[name]!r} is not supported; expected plain LoRA")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; an adapter directory needs it")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
    strange = [key for key in tensors if not key.startswith(_PREFIX) or not key.endswith(_ENDS)]
    if strange or not tensors:
        raise ValueError(f"{file}: expected lora_A.weight and lora_B.weight of layers, got {strange[:1] or 'nothing'}")
    return tensors, rank, alpha / rank


def _shape(layer: nn.Module | None) -> tuple[int, int]:
    """(out features, in features) of a linear layer, quantized or not; zeros for anything else."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear | QuantLinear) else (0, 0)


def _added(A: Tensor, B: Tensor, scaling: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:  # noqa: ARG001
        x = inputs[0].to(A.dtype)
        return y + (scaling * (x @ A.T) @ B.T).to(y.dtype)  # A [r, K], B [N, r]

    return hook
