"""bitsandbytes' formats: NF4 and FP4 in blocks of 64 weights, double quantized or not (Dettmers et al. 2023, arXiv
2305.14314), and LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339).

The layers are bitsandbytes' own, so that stock transformers reads what is written. One of their habits is turned off:
on CPUs with bfloat16 instructions, the first pass in eval mode rearranges a 4-bit weight for a faster kernel and rounds
the scale of every block to bfloat16, for good; what is saved after that is no longer what was quantized. Without it, a
layer multiplies by exactly the stored numbers, before and after saving, in every shape (that kernel takes multiples of
32).
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from .experts import has_fused_experts
from .files import read_json
from .knobs import BnB
from .recipe import Recipe
from .walk import check_unshared, linears, replace, weight_of

METHOD = "bitsandbytes"
Report = Callable[[str, float, float], None]
# Columns of the input with a larger value than this are multiplied in 16 bits (LLM.int8, section 3.2).
OUTLIER = 6.0
# One tells of a kernel that is not used here, the other, at every call, that LLM.int8 takes its input in float16.
_NOISY = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")


def bnb_(model: PreTrainedModel, recipe: Recipe, report: Report | None = None) -> PreTrainedModel:
    """Replace every linear layer that `recipe` does not ignore by bitsandbytes', quantized on the CPU, in place.

    model.config then says so, and model.save_pretrained writes a directory that transformers loads to the same numbers.
    GPT-2's Conv1D becomes a Linear, as there. `report` is told each layer's name, the relative squared error of its
    weights and seconds. Raises ValueError, before anything is replaced, for layers that cannot be quantized or that a
    reader would not quantize; ModuleNotFoundError that says what to install.
    """
    if not isinstance(recipe.options, BnB):
        raise ValueError(f"recipe: {recipe} is none of bitsandbytes' formats; expected e.g. bnb-nf4")
    library()
    refuse_fused(model, recipe)
    layers = list(linears(model, recipe.ignore))
    config = bnb_config(model, recipe, [name for name, _ in layers])
    check_unshared(model, layers, recipe)
    for name, module in layers:
        largest = float(module.weight.detach().abs().max())
        if not math.isfinite(largest):
            raise ValueError(f"{recipe}: {name}: weight: contains NaN or infinity and cannot be quantized")
        if recipe.options.kind == "int8" and largest > torch.finfo(torch.float16).max:
            raise ValueError(f"{recipe}: {name}: weight: {largest:g} is beyond float16, from which int8 is rounded")
    with torch.no_grad():
        for name, module in layers:
            start = time.perf_counter()
            weight = weight_of(module)
            layer = quantized_layer(weight, module.bias, recipe.options)
            replace(model, name, layer)
            if report is not None:
                off = (dequantized_weight(layer) - weight.float()).square().sum()
                size = weight.float().square().sum()
                report(name, float(off / size) if size else 0.0, time.perf_counter() - start)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    state: Any = model  # attributes by which transformers and peft know a quantized model
    state.is_quantized, state.quantization_method, state.hf_quantizer = True, config.quant_method, quantizer
    quantizer.postprocess_model(model)
    return model


def refuse_fused(model: PreTrainedModel, recipe: Recipe) -> None:
    """ValueError for a model with experts that these formats cannot hold."""
    if has_fused_experts(model):
        raise ValueError(
            f"{recipe}: {type(model).__name__} keeps its experts in fused tensors, which readers of such files leave "
            "dense; take another method, e.g. hqq-w4a16-g64-asym"
        )


def quantized_layer(weight: Tensor, bias: Tensor | None, options: BnB) -> nn.Module:
    """The layer for weight [N, K] and bias [N] or None, frozen, computing in the weight's dtype, on its device."""
    layers = library().nn
    N, K = weight.shape
    layer: Any
    if options.kind == "int8":
        layer = layers.Linear8bitLt(K, N, bias is not None, has_fp16_weights=False, threshold=OUTLIER, device="meta")
        layer.weight = layers.Int8Params(_copied(weight), requires_grad=False, has_fp16_weights=False).to("cpu")
    else:
        kind = {"quant_type": options.kind, "compress_statistics": options.double_quant}
        layer = layers.Linear4bit(K, N, bias is not None, compute_dtype=weight.dtype, device="meta", **kind)
        layer.weight = layers.Params4bit(_copied(weight), requires_grad=False, module=layer, **kind).to("cpu")
    if bias is not None:
        layer.bias = nn.Parameter(_copied(bias), requires_grad=False)
    keep_exact_(layer)
    return layer.to(weight.device).eval()


def dequantized_weight(layer: nn.Module) -> Tensor:
    """What the stored numbers of a bitsandbytes layer stand for: [N, K] float32, on its device.

    Raises ValueError for a layer that a pass on the CPU has rearranged, or that is none of bitsandbytes'.
    """
    bnb = library()
    module: Any = layer
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB  # [N], 127 times the step
        return module.weight.data.float() * (scale.float() / 127)[:, None]
    if not isinstance(layer, bnb.nn.Linear4bit):
        raise ValueError(f"layer: expected a quantized layer of bitsandbytes, got {type(layer).__name__}")
    if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError("layer: rearranged by a pass on the CPU, its scales rounded; load the model with keep_exact_")
    state = copy.copy(module.weight.quant_state)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(module.weight.data, state)


def load_bnb(directory: Path | str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A model from a local directory of bitsandbytes layers, in eval mode: tensors from safetensors, no code from it.

    Raises ValueError for a damaged or incomplete checkpoint, ModuleNotFoundError that says what to install.
    """
    library()
    quantization = read_json(Path(directory) / "config.json").get("quantization_config") or {}
    for key in ("load_in_8bit", "load_in_4bit"):
        if not isinstance(quantization.get(key, False), bool):
            raise ValueError(f"{directory}/config.json: {key}: {quantization[key]!r} is not true or false")
    if bool(quantization.get("load_in_8bit")) == bool(quantization.get("load_in_4bit")):
        raise ValueError(f"{directory}/config.json: quantization_config: expected one of load_in_8bit and load_in_4bit")
    loaded: Any  # a pair, for which transformers has no type
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            directory,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            dtype="auto",
            output_loading_info=True,
            device_map={"": device},
        )
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{directory}: cannot be read: {type(error).__name__}: {text}") from None
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            first = min(map(str, info[problem]))
            raise ValueError(f"{directory}: {problem.replace('_', ' ')} in its weights, first {first}")
    for name, layer in model.named_modules():
        try:
            _check_layer(layer)
        except ValueError as error:
            raise ValueError(f"{directory}: {name}.{error}") from None
    keep_exact_(model)
    # transformers would undo its reading of these layers when saving, and cannot; there is nothing to undo.
    model._weight_conversions = [
        step
        for step in model._weight_conversions or ()
        if not any(hasattr(operation, "hf_quantizer") for operation in getattr(step, "operations", ()))
    ]
    return model.eval()


def keep_exact_(model: nn.Module) -> None:
    """Turn off the CPU kernel that changes 4-bit weights at the first pass (and through which no gradient flows)."""
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def bnb_config(model: PreTrainedModel, recipe: Recipe, quantized: list[str]) -> BitsAndBytesConfig:
    """How transformers is told of a model whose layers named in `quantized` are bitsandbytes' and all others dense.

    Raises ValueError when there is nothing to quantize, or no such description would be understood.
    """
    if not quantized:
        raise ValueError(f"model: {type(model).__name__} has no linear layer to quantize")
    modules = dict(model.named_modules())
    dense = [name for name, _ in linears(model, ()) if name not in set(quantized)]
    for name in quantized:
        if type(modules[name]) not in (nn.Linear, Conv1D):
            kind = type(modules[name]).__name__
            raise ValueError(f"{recipe}: {name}: is a {kind}, which readers of such files leave dense; ignore it")
        # As the least precise of transformers' readers match them (5.3).
        for entry in [*dense, *(model._keep_in_fp32_modules or ())]:
            if re.match(entry, name) or name.endswith(entry):
                raise ValueError(f"{recipe}: {name}: readers would leave it dense with {entry}; ignore both or neither")
    options = recipe.options
    eight = options.kind == "int8"
    weight: Any = modules[quantized[0]].weight
    return BitsAndBytesConfig(
        load_in_8bit=eight,
        load_in_4bit=not eight,
        llm_int8_threshold=OUTLIER,
        llm_int8_skip_modules=dense,
        bnb_4bit_quant_type="fp4" if eight else options.kind,  # for int8 the library's own default, not used
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=weight.dtype,
    )


def library() -> Any:
    """The module bitsandbytes, quieter; ModuleNotFoundError that says what to install."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError("bnb: needs bitsandbytes; pip install remanence[bnb]")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _check_layer(layer: Any) -> None:
    """ValueError unless a bitsandbytes layer holds all that its forward needs; transformers takes a file's word."""
    bnb = library()
    shape = (getattr(layer, "out_features", 0), getattr(layer, "in_features", 0))
    if isinstance(layer, bnb.nn.Linear8bitLt):
        if layer.weight.dtype != torch.int8 or tuple(layer.weight.shape) != shape:
            raise ValueError(f"weight: {layer.weight.dtype} {tuple(layer.weight.shape)}, expected torch.int8 {shape}")
        scale = layer.weight.SCB
        if scale is None or tuple(scale.shape) != shape[:1]:
            raise ValueError(f"SCB: {None if scale is None else tuple(scale.shape)}, expected {shape[:1]}")
    elif isinstance(layer, bnb.nn.Linear4bit):
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            raise ValueError("weight.quant_state: missing from the checkpoint")
        if state.shape is None or tuple(state.shape) != shape:
            raise ValueError(f"weight.quant_state: shape {state.shape}, expected {shape}")
        values = shape[0] * shape[1]
        stored = layer.weight.numel() * layer.weight.element_size()
        if stored != -(-values // 2):
            raise ValueError(f"weight: {stored} bytes, expected {-(-values // 2)} for {shape}")
        blocks = -(-values // state.blocksize)
        if state.absmax.numel() != blocks or (state.nested and state.state2.absmax.numel() != -(-blocks // 256)):
            raise ValueError(f"weight.absmax: {state.absmax.numel()} scales, expected {blocks}")
        # The kernels know the levels by the name of the type; a file with others would mean something else.
        levels = bnb.functional.get_4bit_type(state.quant_type, device=state.code.device)
        if state.code.shape != levels.shape or not torch.equal(state.code.float(), levels.float()):
            raise ValueError(f"weight.quant_map: not the sixteen levels of {state.quant_type}")
