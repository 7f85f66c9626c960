"""Checkpoints in and out: safetensors only, no code from files, written whole or not at all.

Dense models are ordinary Hugging Face directories. Quantized ones are compressed-tensors directories that stock
transformers loads too. Models whose layers stock readers cannot take (GPT-2's Conv1D, 2:4 layers stored sparse) are
written with their weights in `remanence.safetensors`, so that any other reader stops instead of filling the gaps with
random weights.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from .bnb import keep_exact_, load_bnb
from .experts import (
    ExpertList,
    apart_on_disk,
    checkpoint_names,
    fuse,
    fused_on_disk,
    has_fused_experts,
    unfuse_experts_,
)
from .files import atomic_dir, read_json
from .formats import compressed_tensors as ct
from .formats import sparse24
from .integration import mark, read_mark
from .linear import QuantLinear, prepack_
from .places import local_model
from .recipe import DENSE, Recipe
from .sparse_linear import layers_24
from .spec import QuantSpec
from .transforms import transform_from, transform_names
from .walk import replace, weight_of

OWN_STEM = "remanence"
_DENSE: dict[str, Any] = {"use_safetensors": True, "dtype": "auto", "output_loading_info": True}


def load_model(path: Path | str) -> PreTrainedModel:
    """A causal LM in eval mode, from a local directory or a hub id ("org/name"), dense or compressed-tensors.

    Raises FileNotFoundError for a missing directory, ValueError for a config that names outside code or a
    quantization we do not read.
    """
    directory = local_model(path)
    if directory is None:
        return _complete(path, _from_hub(str(path), AutoModelForCausalLM, **_DENSE))
    config = read_json(directory / "config.json")
    _check_config(directory, config)
    _check_index(directory)
    if config.get("quantization_config"):
        return _load_quantized(directory, config["quantization_config"]).eval()
    loaded: Any  # a pair, for which transformers has no type
    with _readable(directory):
        loaded = AutoModelForCausalLM.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True, **_DENSE
        )
    return _complete(directory, loaded)


def load_nf4(path: Path | str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A dense checkpoint with its linear layers in bitsandbytes' NF4, double quantized, as QLoRA trains adapters on it
    (Dettmers et al. 2023, arXiv 2305.14314). The head and all else keep their dtype.

    Raises ModuleNotFoundError that says what to install; else as `load_model`.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError("quantized_base: needs bitsandbytes; pip install remanence[bnb]")
    dtype = skeleton(path).config.dtype or torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype != torch.float32 else torch.float32,
    )
    options = _DENSE | {"quantization_config": nf4, "device_map": {"": device}}
    directory = local_model(path)
    loaded: Any
    if directory is None:
        loaded = _from_hub(str(path), AutoModelForCausalLM, **options)
    else:
        _check_index(directory)
        with _readable(directory):
            loaded = AutoModelForCausalLM.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True, **options
            )
    model = _complete(path, loaded)
    keep_exact_(model)
    return model


def skeleton(path: Path | str, compressed: bool = False) -> PreTrainedModel:
    """The dense model at `path` without its weights (on the meta device): names and shapes of its layers.

    compressed   take a compressed one too, as it was before

    Raises FileNotFoundError for a missing directory, ValueError for a model that is compressed already, and for a
    config that cannot be read.
    """
    directory = local_model(path)
    if directory is None:
        config = _from_hub(str(path), AutoConfig)
    else:
        _check_config(directory, read_json(directory / "config.json"))
        with _readable(directory):
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    if getattr(config, "quantization_config", None):
        if not compressed:
            raise ValueError(f"{path}: is compressed already; expected a dense model, which is compressed here")
        del config.quantization_config
    if config.is_encoder_decoder:
        raise ValueError(f"{path}: {config.model_type} has an encoder; expected a decoder by itself")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{path}: {config.model_type} is no causal language model by itself; expected one for text")
    dtype = config.dtype or config.get_text_config().dtype
    with torch.device("meta"), _readable(Path(path)):
        return AutoModelForCausalLM.from_config(config, **({} if dtype is None else {"dtype": dtype}))


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; ValueError when there is none or it has no end-of-sequence token."""
    directory = local_model(path)
    if directory is None:
        tokenizer = _from_hub(str(path), AutoTokenizer)
    else:
        if not any(directory.glob("tokenizer*")) and not any(directory.glob("vocab*")):
            raise ValueError(f"{directory}: no tokenizer beside the model; save it with tokenizer.save_pretrained()")
        with _readable(directory):
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: its tokenizer has no end-of-sequence token, so answers would have no end")
    return tokenizer


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: Path | str,
    recipe: Recipe | None = None,
    sparse: bool = False,
) -> None:
    """Write model and tokenizer to the new directory `target`; `recipe` as given to compress_ when it was compressed.

    A pruned model is written as an ordinary one, with its zeros; `sparse`: without those of its 2:4 layers, in files
    that `load_model` reads and no other reader finds.

    Raises FileExistsError when there is something at `target`, OSError when the disk is full, ValueError for `sparse`
    where no layer is 2:4 or one is quantized; nothing is left then.
    """
    with atomic_dir(target) as work:
        write_model(model, tokenizer, work, recipe, sparse)


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
    recipe: Recipe | None = None,
    sparse: bool = False,
) -> None:
    """As save_model, into an existing empty directory that the caller makes permanent."""
    layers = _packed_layers(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and isinstance(getattr(module, "transform", None), nn.Module):
            raise ValueError(f"{name}: is not quantized, and has a transform in front of it that no file would hold")
    if sparse:
        fours = layers_24(model)
        if layers or not fours:
            found = f"{next(iter(layers))} is quantized" if layers else "it has no 2:4 layer"
            raise ValueError(f"sparse: {found}; goes with a model that is pruned 2:4, e.g. by wanda-2:4, and no more")
        state = _stored_state(model, fours)
        write_config(model, work, sparse_config(list(state), dense_linears(model), recipe or DENSE, has_experts(model)))
        _write_shards(state, work, OWN_STEM)
    elif layers or has_experts(model):
        known = getattr(model.config, "quantization_config", None)
        label = recipe or getattr(known, "recipe", None) or DENSE
        quantization = quantization_config(model, label) if layers else None
        write_config(model, work, quantization)
        _write_shards(_stored_state(model), work, _stem(model, layers))
    else:  # dense, pruned, or bitsandbytes'
        model.save_pretrained(work)
    tokenizer.save_pretrained(work)


def _packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


def _stem(model: PreTrainedModel, layers: Mapping[str, QuantLinear]) -> str:
    """Of the names of the weights' files: another one than usual where stock readers are to find nothing."""
    linear = all(layer.replaces == "Linear" for layer in layers.values())
    own = any(
        layer.transform is not None
        or (layer.activation is not None and (layer.activation.clip != 1 or layer.activation.narrow))
        for layer in layers.values()
    )
    rounded = any(layer.activation is not None for layer in layers.values())
    specs = {name: layer.spec for name, layer in layers.items()}
    return "model" if stock_readable(model, linear, own, rounded, specs) else OWN_STEM


def quantization_config(model: PreTrainedModel, recipe: Recipe | str) -> dict[str, Any]:
    """What config.json says of a model with packed layers."""
    layers = _packed_layers(model)
    schemes = {name: ct.scheme_of(layer) for name, layer in layers.items()}
    return ct.to_config(schemes, dense_linears(model)) | mark(recipe, _stem(model, layers), has_experts(model))


def sparse_config(names: Collection[str], linear: Collection[str], recipe: Recipe, experts: bool) -> dict[str, Any]:
    """What config.json says of a model whose 2:4 layers are stored sparse: `names` of the tensors in its files, and of
    its `linear` layers; `experts` as in `mark`."""
    layers = sparse24.layers_in(names)
    dense = [name for name in linear if name not in layers]
    return sparse24.to_config(layers, dense) | mark(recipe, OWN_STEM, experts)


def adopt_(model: PreTrainedModel, recipe: Recipe | str) -> None:
    """Have the model's own `save_pretrained` write packed layers as `save_model` does, or say that it cannot.

    recipe   by which it was compressed, or its name
    """
    from .quantizer import PackedConfig, PackedQuantizer  # which needs more of transformers than a checkpoint does

    model.config.quantization_config = config = PackedConfig(**quantization_config(model, recipe))
    kept: Any = model  # where transformers looks for it
    kept.hf_quantizer = PackedQuantizer(config, pre_quantized=True)


def write_config(model: PreTrainedModel, work: Path, quantization: Mapping[str, Any] | None) -> None:
    """config.json, with `quantization` as its quantization_config, and generation_config.json."""
    config = json.loads(model.config.to_json_string())
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")  # not that of the config it was loaded with
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(work)


def weight_bytes(directory: Path | str) -> int:
    """Bytes of the weight files in a checkpoint directory, what lies in folders beside the model included."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*.safetensors"))


def max_length(model: PreTrainedModel) -> int:
    """Longest sequence in tokens that the model has positions for."""
    return longest(model.config)


def longest(config: PreTrainedConfig) -> int:
    """Longest sequence in tokens that a model of this config has positions for; 2048 where it names no limit."""
    return positions(config) or 2048


def positions(config: PreTrainedConfig) -> int | None:
    """As `longest`; None where the config names no limit, as of recurrent models."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if getattr(text, name, None):
            return int(getattr(text, name))
    return None


def local_directory(path: Path | str) -> Path:
    """The model's directory; what is only on the hub is brought into its cache first: weights, configs, tokenizer."""
    directory = local_model(path)
    if directory is not None:
        return directory
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
    except OSError as error:
        raise _unreachable(str(path), error) from None


def _from_hub(name: str, auto: Any, **kwargs: object) -> Any:
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **kwargs)
    except OSError as error:
        raise _unreachable(name, error) from None


def _unreachable(name: str, error: OSError) -> FileNotFoundError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return FileNotFoundError(f"{name}: no such directory, and not to be had from the hub ({first})")


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """One error for whatever transformers meets in files that are damaged."""
    try:
        yield
    except (FileNotFoundError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{directory}: cannot be read: {type(error).__name__}: {text}") from None


def _complete(path: Path | str, loaded: tuple[PreTrainedModel, dict[str, Any]]) -> PreTrainedModel:
    """The model, if the checkpoint held all of it; transformers fills gaps with random weights."""
    model, info = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        if info.get(problem):
            raise ValueError(
                f"{path}: {problem.replace('_', ' ')} in its weights, first {min(map(str, info[problem]))}"
            )
    return model.eval()


def _check_config(directory: Path, config: object, where: str = "") -> None:
    """Refuse configs that make transformers fetch code: attention or expert kernels named by repository."""
    if isinstance(config, dict):
        for key, value in config.items():
            if "implementation" in key and isinstance(value, str) and "/" in value:
                raise ValueError(f"{directory}/config.json: {where}{key}: {value!r} names outside code; refused")
            _check_config(directory, value, f"{where}{key}.")


def _check_index(directory: Path) -> None:
    """Refuse an index that points outside its directory; transformers would follow it."""
    for index in directory.glob("*.safetensors.index.json"):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index}: weight_map: missing or not an object")
        for shard in set(shards.values()):
            if not isinstance(shard, str) or Path(shard).name != shard or not (directory / shard).is_file():
                raise ValueError(f"{index}: {shard!r} is not a file in this directory")


def _load_quantized(directory: Path, quantization: object) -> PreTrainedModel:
    if not isinstance(quantization, dict):
        raise ValueError(f"{directory}/config.json: quantization_config: expected an object")
    if quantization.get("quant_method") == "bitsandbytes":
        return load_bnb(directory)
    sparse = sparse24.is_config(quantization)
    schemes = None if sparse else ct.Schemes(quantization)
    state = _read_shards(directory)
    if sparse:
        try:
            sparse24.check_config(quantization, sparse24.layers_in(state))
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    del config.quantization_config
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    if has_fused_experts(model):
        unfuse_experts_(model)
        state = in_files(state, {key: name for name, key in file_names(model).items()})
    present: set[int] = set()
    modules = dict(model.named_modules())
    if schemes is None:
        _fill_sparse(directory, state, modules)
    for name in ct.layers_in(state) if schemes is not None else ():
        dense = modules.get(name)
        if not isinstance(dense, nn.Linear | Conv1D):
            raise ValueError(f"{directory}: {name} is packed in the file but is no linear layer of the model")
        try:
            assert schemes is not None
            layer = ct.unpack_layer(name, state, schemes.of(name))
            layer.transform = transform_from(name, state)
            for key in transform_names(name, list(state)):
                del state[key]
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        layer.replaces = type(dense).__name__
        replace(model, name, layer)
        present |= {tensor.data_ptr() for tensor in layer.buffers()}
    present |= {tensor.data_ptr() for tensor in state.values()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    tensors = model.state_dict()
    lost = [key for key in missing if tensors[key].data_ptr() not in present]
    if lost or unexpected:
        raise ValueError(f"{directory}: missing tensors {lost[:3]}, unexpected tensors {list(unexpected)[:3]}")
    if schemes is not None:
        adopt_(prepack_(model), recipe=read_mark(quantization))
    return model


def _fill_sparse(directory: Path, state: dict[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
    """Put dense weights where `state` has sparse ones, each as its module keeps it."""
    for name in sparse24.layers_in(state):
        module = modules.get(name)
        if not isinstance(module, nn.Linear | Conv1D):
            raise ValueError(f"{directory}: {name} is sparse in the file but is no linear layer of the model")
        try:
            weight = sparse24.unpack_weight(name, state)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        expected = tuple(weight_of(module).shape)
        if tuple(weight.shape) != expected:
            raise ValueError(f"{directory}: {name}.shape: {tuple(weight.shape)}; the model's layer is {expected}")
        state[f"{name}.weight"] = weight.T.contiguous() if isinstance(module, Conv1D) else weight


def dense_linears(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that are not quantized: what other readers must leave alone."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _stored_state(model: PreTrainedModel, sparse: Collection[str] = ()) -> dict[str, Tensor]:
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    held = packed_state(model, "", sparse)
    if not sparse and not _packed_layers(model):
        held = fuse(held, fused_on_disk(model))
    for key, tensor in in_files(held, file_names(model)).items():
        if tensor.data_ptr() not in seen:  # a tied head is stored once, under its first name
            seen.add(tensor.data_ptr())
            state[key] = tensor
    return state


def packed_state(model: nn.Module, name: str, sparse: Collection[str] = ()) -> dict[str, Tensor]:
    """What a file holds of the module called `name` ("" for the whole model), quantized layers in the file's layout,
    and so those whose full names are in `sparse`."""
    module = model.get_submodule(name)
    prefix = f"{name}." if name else ""
    packed = {inner: layer for inner, layer in module.named_modules() if isinstance(layer, QuantLinear)}
    state: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        inner = key.rpartition(".")[0]
        full = (prefix + inner).rstrip(".")
        if full in sparse and key.rpartition(".")[2] == "weight":
            layer: Any = module.get_submodule(inner)
            state |= sparse24.pack_state(full, weight_of(layer))
        elif inner not in packed:
            state[prefix + key] = tensor
        elif key.rpartition(".")[2] == "packed":
            state |= ct.pack_state(full, packed[inner])
    return {key: tensor.detach().contiguous() for key, tensor in state.items()}


def has_experts(model: nn.Module) -> bool:
    """Whether there are experts in it that were taken apart."""
    return any(isinstance(module, ExpertList) for module in model.modules())


def file_names(model: PreTrainedModel) -> dict[str, str]:
    """Name in the model -> name in files, of the tensors where they differ: experts have other names there."""
    if not has_experts(model):
        return {}
    return {name: key for name, key in checkpoint_names(model).items() if name != key}


def in_files(state: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The state under its names in files, or back under those in the model where `names` is turned round.

    What stands for a weight (weight_packed, weight_scale, ..., or its sparse parts) goes where the weight would be.
    """
    if not names:
        return state

    def named(key: str) -> str:
        layer, _, leaf = key.rpartition(".")
        if (leaf.startswith("weight_") or leaf in sparse24.PARTS) and f"{layer}.weight" in names:
            return names[f"{layer}.weight"].removesuffix("weight") + leaf
        return names.get(key, key)

    return {named(key): tensor for key, tensor in state.items()}


def stock_readable(
    model: PreTrainedModel, linear: bool, own: bool, rounded: bool, specs: Mapping[str, QuantSpec]
) -> bool:
    """Whether transformers with compressed-tensors would run every layer as we do.

    specs     of the layers that are packed, by name; without any the checkpoint is an ordinary one
    linear    whether they all are nn.Linear, which is all that it knows
    own       inputs do not come as they are and with their whole ranges, but transformed, in shares of ranges, or on
              grids of which it does not know
    rounded   inputs are rounded
    Experts it fuses as it reads, which goes wrong unless all are packed alike, and like the layers around them, on a
    symmetric grid, with inputs that are not rounded; in a usual checkpoint that has them one by one.
    """
    if not specs:
        return True
    if not linear or own:
        return False
    experts = [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, ExpertList)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | QuantLinear)
    ]
    alike = len(set(specs.values())) == 1 and next(iter(specs.values())).symmetric and set(experts) <= specs.keys()
    return not experts or (alike and not rounded and apart_on_disk(model))


def _write_shards(state: dict[str, Tensor], work: Path, stem: str) -> None:
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern=stem + "{suffix}.safetensors", max_shard_size="5GB"
    )
    for file, keys in plan.filename_to_tensors.items():
        save_file({key: state[key] for key in keys}, work / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (work / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _read_shards(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory}: no .safetensors file in it")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    state[key] = tensors.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
    return state
