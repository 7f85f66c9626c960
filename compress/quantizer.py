"""transformers' quantizer hooks for our checkpoints (see integration.py, which registers them).

Before the weights are read, every packed layer of the file gets a place with the file's own names, on the meta device;
transformers then reads the file as any other: shards, devices, prefixes and its report are its own. Afterwards each
place becomes a QuantLinear over the same memory. There is never a dense copy of a packed weight.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import has_experts
from .formats import compressed_tensors as ct
from .formats import sparse24
from .integration import MARK, METHOD, read_mark
from .linear import QuantLinear, prepack_
from .transforms import transform_from, transform_names
from .walk import dequantize_, replace

_OWN_STEM = "remanence"
_DTYPES = {
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of one of our files: kept as it is, so that it is saved as it was read."""

    def __init__(self, **given: Any) -> None:
        self.quant_method: Any = METHOD
        self.given = given
        if sparse24.is_config(given):
            raise ValueError(
                "quantization_config.sparsity_config: from_pretrained does not read layers that are stored sparse; "
                "remanence.load_model does"
            )
        self.schemes = ct.Schemes(given)
        self.recipe = read_mark(given)
        self.weights = given[MARK].get("weights") if isinstance(given[MARK], dict) else None
        if self.weights not in (None, _OWN_STEM):
            raise ValueError(f"quantization_config.{MARK}.weights: {self.weights!r} is not {_OWN_STEM!r}")

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.given)


class Stored(nn.Module):
    """The place of one packed layer while its tensors are read: buffers as the file names them."""

    def __init__(self, tensors: dict[str, Tensor], replaces: str) -> None:
        super().__init__()
        self.replaces = replaces
        self.transform: nn.Module | None = None
        # Some models initialise weights of their children by name (GPT-2's c_proj.weight): this is one that needs none.
        weight: Any = tensors.get("weight", torch.empty(0))
        weight._is_hf_initialized = True
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        if "weight" not in tensors:
            self.weight = weight


class PackedQuantizer(HfQuantizer):
    """Layers of our files become QuantLinear, for inference; `model.dequantize()` makes them dense, to be trained."""

    requires_calibration = True
    quantization_config: PackedConfig

    def validate_environment(self, *_args: Any, device_map: Any = None, **_kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map: packed layers cannot be offloaded to disk; leave it out or name devices")

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the model's config before its files are looked up: names them where they are ours alone."""
        if self.quantization_config.weights is not None:
            single = f"{self.quantization_config.weights}.safetensors"
            index = cached_file(
                config.name_or_path,
                f"{single}.index.json",
                revision=getattr(config, "_commit_hash", None),
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            config.transformers_weights = single if index is None else f"{single}.index.json"
        return config

    update_tp_plan = update_attn_implementation  # the same place in transformers 5.3

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        header = _header(checkpoint_files)
        modules = dict(model.named_modules())
        for key in ct.layers_in(header):
            name = _place(key, model, modules)
            dense = modules[name]
            names = self.quantization_config.schemes.of(name).parts(f"{key}.input_clip" in header)
            if dense.bias is not None:
                names.append("bias")
            elif f"{key}.bias" in header:
                raise ValueError(f"{key}.bias: in the checkpoint, but the model's layer has none")
            tensors = {}
            for part in names:
                if f"{key}.{part}" not in header:
                    raise ValueError(f"{key}.{part}: missing from the checkpoint")
                shape, dtype = header[f"{key}.{part}"]
                # What is packed keeps its dtype; a bias follows the model, whose dtype the caller may choose.
                tensors[part] = torch.empty(shape, dtype=dense.bias.dtype if part == "bias" else dtype, device="meta")
            stored = Stored(tensors, type(dense).__name__)
            empty = {}
            for part in transform_names(key, header):
                shape, dtype = header[part]
                empty[part] = torch.empty(shape, dtype=dtype, device="meta")
            stored.transform = transform_from(key, empty)
            replace(model, name, stored)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights  # of the file that was read, not of one that may be written
        for name, stored in [(name, module) for name, module in model.named_modules() if isinstance(module, Stored)]:
            tensors = {f"{name}.{part}": tensor for part, tensor in stored.named_buffers(recurse=False)}
            if any(tensor.is_meta for tensor in tensors.values()):
                raise ValueError(f"device_map: {name} was offloaded; packed layers have to fit the devices")
            layer = ct.unpack_layer(name, tensors, self.quantization_config.schemes.of(name))
            layer.replaces, layer.transform = stored.replaces, stored.transform
            replace(model, name, layer.train(model.training))
            if hasattr(stored, "_hf_hook"):  # moves the input to the layer's device, in models spread over several
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(layer, stored._hf_hook)
        return prepack_(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What save_pretrained writes: the layout that was read. ValueError where stock readers would go wrong."""
        packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        why = [
            f"{name}: a packed {layer.replaces} cannot be read by others"
            for name, layer in packed.items()
            if layer.replaces != "Linear"
        ]
        if has_experts(model):
            why.append("experts that were taken apart have other names in files")
        if self.quantization_config.weights is not None:
            why.append("others would read its layers and run them otherwise")
        if why:
            raise ValueError(f"{why[0]}; write the model with remanence.compress.checkpoint.save_model")
        state = {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[0] not in packed}
        for name, layer in packed.items():
            state.update(ct.pack_state(name, layer))
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dense: Any = dequantize_(model)
        if isinstance(dtype, str):  # a config's, after a save
            dtype = getattr(torch, dtype)
        return dense if dtype is None else dense.to(dtype)


def _header(files: Sequence[str] | None) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of every tensor in the checkpoint's files, without reading the tensors."""
    if not files or any(Path(file).suffix != ".safetensors" for file in files):
        raise ValueError("from_pretrained: packed checkpoints are read from their .safetensors files only")
    header = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                entry = tensors.get_slice(key)
                header[key] = (entry.get_shape(), _DTYPES.get(entry.get_dtype(), torch.uint8))
    return header


def _place(key: str, model: PreTrainedModel, modules: dict[str, nn.Module]) -> str:
    """Name of the module that the file calls `key`; a model with or without its head is read from either."""
    prefix = f"{model.base_model_prefix}."
    for name in (key, key.removeprefix(prefix), prefix + key):
        if isinstance(modules.get(name), nn.Linear | Conv1D):
            return name
    raise ValueError(f"{key} is packed in the file but is no linear layer of {type(model).__name__}")
