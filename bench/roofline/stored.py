"""How the weights of a compressed model are kept, and what kind of numbers multiplies them: layer by layer.

From a recipe, for which the layers that it would make are made without values; from a checkpoint's own files, of which
the headers are read and nothing else; or from a model in memory. Metadata count: scales, zeros, orders, codebooks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...compress.bnb import refuse_fused
from ...compress.checkpoint import file_names
from ...compress.experts import ExpertList, has_fused_experts, unfuse_experts_
from ...compress.files import read_json
from ...compress.formats import compressed_tensors as ct
from ...compress.formats import sparse24
from ...compress.hadamard import OnlineHadamard
from ...compress.knobs import BnB
from ...compress.kronecker import Kronecker, factors
from ...compress.linear import QuantLinear
from ...compress.recipe import Recipe
from ...compress.sparse_linear import Sparse24Linear
from ...compress.spec import ActivationSpec, KVSpec, QuantSpec
from ...compress.walk import features, fitting_linears, linears, prunable_linears, storage_dtype
from ...kernels.reference import packed_width
from .counts import number_of
from .work import Attention, Part, Step

# As safetensors names them.
_ITEMSIZE = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_FLOATS = ("F64", "F32", "F16", "BF16")
_METHODS = (ct.METHOD, "bitsandbytes", "gptq", "awq", "fp8")
# Weights that share a scale in bitsandbytes' 4-bit formats, and scales that share one where they are quantized too.
_BLOCK, _BLOCKS = 64, 256


@dataclass(frozen=True)
class Form:
    """How a linear layer is kept in place of its dense weight.

    bytes     of all that one product reads: codes, scales, zeros, bias
    file_bytes   of its tensors in a checkpoint
    kept      as ceilings name it: "w4a16", "nf4", "bfloat16"
    compute   kind of numbers that multiply; None: its input's
    sparse    2:4, and multiplied as such where the device can
    row_flops   what is done to each row of its input before
    """

    bytes: float
    file_bytes: float
    kept: str
    compute: str | None = None
    sparse: bool = False
    row_flops: float = 0.0


Forms = Mapping[str, Form]


def forms_of_recipe(skeleton: PreTrainedModel, recipe: Recipe) -> dict[str, Form]:
    """What `recipe` would make of the layers of a dense model on the meta device, by name; those of fused experts
    together, under the name of their module. ValueError as `fitting_linears`."""
    model = _apart(skeleton)
    found: dict[str, Form] = {}
    if recipe.method == "bnb":
        refuse_fused(skeleton, recipe)
        found = {name: _bnb(module, recipe.options) for name, module in linears(model, recipe.ignore)}
    elif recipe.spec is not None:
        for name, module in fitting_linears(model, recipe):
            form = _packed(module, recipe.spec_of(name), recipe.activation)
            found[name] = replace(form, row_flops=_before(name, features(module), recipe))
    elif recipe.prune is not None and recipe.prune.pattern == "2:4":
        found = {name: _fours(module) for name, module in prunable_linears(model, recipe)}
    return _together(model, found)


def forms_of_checkpoint(directory: Path, skeleton: PreTrainedModel) -> dict[str, Form]:
    """How the files in `directory` keep the layers of `skeleton`, its dense model on the meta device.

    ValueError for a quantization that we do not know, and for a file that is damaged; FileNotFoundError without files.
    """
    quantization = read_json(directory / "config.json").get("quantization_config")
    if not quantization:
        return {}
    if not isinstance(quantization, dict):
        raise ValueError(f"{directory}/config.json: quantization_config: expected an object")
    try:
        form = _reader(quantization)
    except ValueError as error:
        raise ValueError(f"{directory}/config.json: {error}") from None
    held = _headers(directory)
    model = _apart(skeleton)
    names = file_names(model)
    found: dict[str, Form] = {}
    for name, module in _linears(model):
        key = names.get(f"{name}.weight", f"{name}.weight").removesuffix("weight")
        own = {entry.removeprefix(key): about for entry, about in held.items() if entry.startswith(key)}
        if own and not (own.keys() <= {"weight", "bias"} and own["weight"][0] in _FLOATS):
            found[name] = form(key.removesuffix("."), module, own)
    return _together(model, found)


def forms_of_model(model: nn.Module) -> dict[str, Form]:
    """How the packed layers of a model in memory are kept: by their own buffers."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            held = (module.packed, module.scale, module.zero, module.bias, module.x_scale, module.x_zero)
            size = sum(tensor.nbytes for tensor in held if tensor is not None)
            file = sum(tensor.nbytes for tensor in ct.pack_state(name, module).values())
            found[name] = Form(size, file, *_numbers(module.spec, module.activation), row_flops=_of(module.transform))
        elif isinstance(module, Sparse24Linear):
            size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
            found[name] = Form(size, sum(t.nbytes for t in module.state_dict().values()), "2:4", sparse=True)
        elif type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            size = sum(tensor.nbytes for tensor in module.state_dict().values())
            found[name] = _bnb_form(size, type(module).__name__ == "Linear8bitLt")
    return _together(model, found)


def meta_copy(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Form]]:
    """(skeleton, forms) of a model in memory, whatever was done to it: a copy on the meta device, none of whose weights
    takes memory, with dense layers in place of packed ones, and how these are kept.

    ValueError for a model that serves with a quantized KV cache.
    """
    if "_remanence_kv" in vars(model):
        raise ValueError("model: serves with a quantized KV cache; call detach_kv_ first")
    forms = forms_of_model(model)
    if any(isinstance(module, ExpertList) for module in model.modules()):  # those run by values; fused ones do not
        config = copy.deepcopy(model.config)
        vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval(), forms
    known: dict[int, Any] = {
        id(part): _dense(part, model.dtype) for name, part in model.named_modules() if name in forms
    }
    for parameter in model.parameters():
        known[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        known[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, known).eval(), forms


def apply(step: Step, forms: Forms, dense: Mapping[str, int], kv: KVSpec | None = None) -> Step:
    """`step` of a dense model, with its layers kept as `forms` says, and keys and values as `kv`.

    dense   bytes of the parameters of each module by itself, as module_bytes
    """
    if kv is not None and not step.attention:
        raise ValueError("kv_bits: this model's keys and values are not known one by one; expected a recipe without")
    shares = {} if kv is None else {each.module: _kv_share(kv, each, step) for each in step.attention}
    parts = []
    for part in step.parts:
        if part.module in forms and part.flops:
            part = _formed(part, forms[part.module], dense[part.module])
        share = shares.get(part.module, 1.0)
        parts.append(replace(part, kv_read=share * part.kv_read, kv_written=share * part.kv_written))
    tokens = step.context + step.tokens
    saved = sum(step.batch * each.bytes(tokens) * (1 - shares.get(each.module, 1.0)) for each in step.attention)
    return replace(step, parts=tuple(parts), cached=round(step.cached - saved))


def _formed(part: Part, form: Form, dense: int) -> Part:
    if part.kind == "experts":
        size = form.bytes * part.weight_bytes / dense
    else:  # beside the layer's own weight there may be an adapter's
        size = form.bytes + max(0.0, part.weight_bytes - dense)
    return replace(
        part,
        weight_bytes=size,
        eager_bytes=part.eager_bytes - part.weight_bytes + size,
        kept=form.kept,
        compute=form.compute or part.compute,
        sparse=form.sparse,
        flops=part.flops + part.rows * form.row_flops,
    )


def _kv_share(kv: KVSpec, each: Attention, step: Step) -> float:
    return kv_bytes(kv, each, step.context + step.tokens) / max(1, each.bytes(step.context + step.tokens))


def kv_bytes(kv: KVSpec | None, each: Attention, tokens: int) -> float:
    """Of the keys and values of one sequence's `tokens` tokens in one layer's cache, as far as they are in reach: of
    closed chunks codes with a scale and a least value per tile (compress/kv_grid.py), the newest as they are."""
    whole = each.bytes(tokens)
    if kv is None or not whole:
        return whole
    seen = tokens if each.window is None else min(tokens, each.window)
    closed = max(0, seen - kv.residual) // kv.group_size * kv.group_size
    token = 0.0
    for numbers, (rows, columns) in ((each.keys, kv.key_tile(each.width)), (each.values, kv.value_tile(each.width))):
        token += numbers * (kv.bits / 8 + 2 * each.itemsize / (rows * columns))
    return closed * token + whole * (seen - closed) / seen


def module_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the parameters that each module holds by itself, each memory once, under its first name."""
    seen: set[int] = set()
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[name] = found.get(name, 0) + parameter.numel() * parameter.itemsize
    return found


def resident_bytes(dense: Mapping[str, int], forms: Forms) -> float:
    """Of all weights as they are kept in memory."""
    return sum(forms[name].bytes if name in forms else size for name, size in dense.items())


def checkpoint_bytes(dense: Mapping[str, int], forms: Forms) -> float:
    """Of the tensors of a checkpoint, its header apart."""
    return sum(forms[name].file_bytes if name in forms else size for name, size in dense.items())


def _apart(skeleton: PreTrainedModel) -> PreTrainedModel:
    """With experts one by one, on a copy."""
    if not has_fused_experts(skeleton):
        return skeleton
    model = copy.deepcopy(skeleton)
    unfuse_experts_(model)
    return model


def _together(model: nn.Module, found: dict[str, Form]) -> dict[str, Form]:
    """Forms of experts added up, under the name of the module that holds them all."""
    for prefix, module in model.named_modules():
        if not isinstance(module, ExpertList):
            continue
        inside = {f"{prefix}.{name}": part for name, part in _linears(module)}
        if not inside.keys() & found.keys():
            continue
        own = [found.pop(name) if name in found else _plain(part) for name, part in inside.items()]
        largest = max(own, key=lambda form: form.bytes)
        sizes = (sum(form.bytes for form in own), sum(form.file_bytes for form in own))
        found[prefix] = Form(*sizes, largest.kept, largest.compute, all(form.sparse for form in own))
    return found


def _linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D | QuantLinear):
            yield name, module


def _sizes(module: Any) -> tuple[int, int, int]:
    """(N, K, bytes of the bias)."""
    K = features(module)
    return module.weight.numel() // K, K, 0 if module.bias is None else module.bias.nbytes


def _plain(module: Any) -> Form:
    size = module.weight.nbytes + (0 if module.bias is None else module.bias.nbytes)
    return Form(size, size, number_of(module.weight.dtype))


def _dense(module: Any, dtype: torch.dtype) -> nn.Linear:
    N, K = module.out_features, module.in_features
    return nn.Linear(K, N, module.bias is not None, dtype=dtype, device="meta").requires_grad_(False)


def _packed(module: Any, spec: QuantSpec, activation: ActivationSpec | None) -> Form:
    """By the buffers of the layer that it becomes."""
    N, K, _ = _sizes(module)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    packed = empty(N, packed_width(K, spec.bits), dtype=torch.uint8)
    scale = empty(N, spec.groups(K), dtype=storage_dtype(module.weight))
    zero = None if spec.symmetric else empty(N, spec.groups(K), dtype=torch.uint8)
    static = None
    if activation is not None and not activation.dynamic:
        static = (empty(1, dtype=torch.float32), empty(1, dtype=torch.int32))
    bias = None if module.bias is None else module.bias.detach()
    return forms_of_model(nn.ModuleDict({"0": QuantLinear(spec, K, packed, scale, bias, zero, activation, static)}))[
        "0"
    ]


def _bnb(module: Any, options: BnB) -> Form:
    N, K, bias = _sizes(module)
    if options.kind == "int8":
        return _bnb_form(N * K + 4 * N + bias, True)
    blocks = math.ceil(N * K / _BLOCK)
    scales = 4 * blocks
    if options.double_quant:
        scales = blocks + 4 * math.ceil(blocks / _BLOCKS) + 4 * 256
    return _bnb_form(math.ceil(N * K / 2) + scales + 4 * 16 + bias, False)


def _bnb_form(size: int, int8: bool) -> Form:
    return Form(size, size, "bnb-int8" if int8 else "bnb-4bit", "int8" if int8 else None)


def _fours(module: Any) -> Form:
    """The values that stay and a bit for every weight; files have the zeros too."""
    N, K, bias = _sizes(module)
    kept = N * K // 2 * module.weight.itemsize + N * math.ceil(K / 8)
    return Form(kept + bias, module.weight.nbytes + bias, "2:4", sparse=True)


def _numbers(spec: QuantSpec, activation: ActivationSpec | None) -> tuple[str, str | None]:
    """(kept, compute): both sides must be integers for integers to be multiplied, of the wider of the two."""
    inputs = 16 if activation is None else activation.bits
    wider = max(spec.bits, inputs)
    return f"w{spec.bits}a{inputs}", "int4" if wider <= 4 else "int8" if wider <= 8 else None


def _before(name: str, K: int, recipe: Recipe) -> float:
    """Operations for a row of the input of a layer, before it is rounded."""
    if recipe.method == "flatquant":
        return _kronecker(*factors(K))
    if recipe.rotation is not None and recipe.rotation.online and name.endswith(("down_proj", "fc2")):
        return _hadamard(K, K // (K & -K))
    return 0.0


def _of(transform: nn.Module | None) -> float:
    if isinstance(transform, Kronecker):
        return _kronecker(len(transform.left), len(transform.right))
    return _hadamard(len(transform.signs), len(transform.core)) if isinstance(transform, OnlineHadamard) else 0.0


def _kronecker(a: int, b: int) -> float:
    return 2.0 * a * b * (a + b)


def _hadamard(n: int, core: int) -> float:
    """A product with the core, and log2 of the rest additions for each number."""
    return 2.0 * n * core * (core > 1) + n * math.log2(n // core)


# Of tensors by name: (dtype, shape), as safetensors names them.
Header = dict[str, tuple[str, tuple[int, ...]]]
Reader = Callable[[str, Any, Header], Form]


def _reader(quantization: dict[str, Any]) -> Reader:
    """What makes a form of the tensors of one layer; ValueError for a method that we do not know."""
    method = quantization.get("quant_method")
    schemes = None
    if method == ct.METHOD and not sparse24.is_config(quantization):
        schemes = ct.Schemes(quantization)
    elif method not in _METHODS:
        raise ValueError(f"quantization_config.quant_method: {method!r} is not one of {', '.join(_METHODS)}")

    def form(name: str, module: Any, own: Header) -> Form:
        size = sum(_ITEMSIZE.get(number, 1) * math.prod(shape) for number, shape in own.values())
        if schemes is not None:
            scheme = schemes.of(name)
            made = _packed(module, scheme.spec, scheme.activation)
            return replace(made, file_bytes=size, row_flops=_stored_transform(own))
        if method == ct.METHOD:
            return Form(size, size, "2:4", sparse=True)
        if method == "bitsandbytes":
            return _bnb_form(size, bool(quantization.get("load_in_8bit")))
        if method == "fp8":
            return Form(size, size, "float8", "float8")
        return Form(size, size, f"w{quantization.get('bits', 4)}a16")

    return form


def _stored_transform(own: Header) -> float:
    shapes = {key.removeprefix("transform."): shape for key, (_, shape) in own.items() if key.startswith("transform.")}
    if "left" in shapes:
        return _kronecker(shapes["left"][0], shapes["right"][0])
    return _hadamard(shapes["signs"][0], shapes["core"][0]) if shapes else 0.0


def _headers(directory: Path) -> Header:
    """Of every tensor in the files of a directory."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory}: no .safetensors file in it; of a compressed model they are looked at")
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = tensors.get_slice(key)
                    found[key] = (part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
    return found
