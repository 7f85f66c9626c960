"""Small quantized models for an NPU: on the emulated device, in a process of its own, beside the same on the CPU."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

FLATQUANT = "flatquant-w4a4+a_narrow=true"
RECIPES = (
    "rtn-w4a16-g64",
    "rtn-w4a16",
    "rtn-w3a16-g32-asym",
    "rtn-w8a16-asym",
    "rtn-w8a8",
    "rtn-w8a8+a_narrow=true",
    "rtn-w8a8+a_symmetric=false",
    "smoothquant-w8a8+a_dynamic=false",
    "rtn-w4a8-g64",
    "rtn-w4a4",
    "rtn-w4a4+a_narrow=true",
    "rtn-w4a4+a_narrow=true+r_kind=hadamard+r_online=true",
    FLATQUANT,
)
NEW = 12  # tokens generated


def tiny(name: str, dtype: torch.dtype) -> Any:
    """A Llama or an OPT with random weights, whose sides suit every operator."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
    shape |= {"max_position_embeddings": 128, "initializer_range": 0.1}
    if name == "llama":
        llama = LlamaConfig(**shape, intermediate_size=256, num_key_value_heads=2)
        return LlamaForCausalLM(llama).eval().to(dtype)
    opt = OPTConfig(**shape, ffn_dim=256, word_embed_proj_dim=128, init_std=0.1)
    return OPTForCausalLM(opt).eval().to(dtype)


def compressed(name: str, recipe: str, dtype: torch.dtype) -> Any:
    """On the CPU, laid out for it. FlatQuant's maps are put in by hand: of a model with random weights none is learned
    that is worth it."""
    from ..compress.kronecker import Kronecker, factors
    from ..compress.linear import QuantLinear, prepack_
    from ..compress.recipe import parse_recipe
    from ..compress.sequential import compress_

    parsed = parse_recipe(recipe.replace("flatquant", "rtn"))
    batches = [torch.arange(256).reshape(4, 64)] if parsed.calibrated else []
    model = compress_(tiny(name, dtype), parsed, batches)
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules() if recipe == FLATQUANT else ():
        if isinstance(layer, QuantLinear):
            left, right = (
                torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in factors(layer.in_features)
            )
            layer.transform = Kronecker(left, right, torch.rand(layer.in_features, generator=generator) + 0.5)
            assert layer.activation is not None
            layer.activation = replace(layer.activation, clip=0.95)
    return prepack_(model)


@torch.no_grad()
def beside_the_cpu(name: str, recipe: str, dtype: torch.dtype) -> dict[str, Any]:
    """The model on the CPU, then on the emulated NPU.

    off        norm of the difference of logits, of the logits' norm
    layer_off  the same of a packed layer's output, both given what it has been given on the CPU; the worst one's
    tokens     generated otherwise than on the CPU, of two rows padded on the left
    operators  of torch-npu, how often they were called
    same       whether the state_dict is the same, and the model again what it was once it is back on the CPU
    """
    from .ascend_reference import calls

    model = compressed(name, recipe, dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 256, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with _watched(model) as seen:
        logits = model(ids, attention_mask=mask).logits
    served = _generate(model, ids, mask)
    model.to("npu")
    layer_off = max(_layer_off(layer, *given) for layer, given in seen.items())
    calls.clear()
    there = model(ids.to("npu"), attention_mask=mask.to("npu")).logits
    operators = Counter(calls)
    told = _generate(model, ids.to("npu"), mask.to("npu")).cpu()
    after = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
    model.to("cpu")
    again = model(ids, attention_mask=mask).logits
    rows = mask.bool()
    off = (there.cpu().double() - logits.double())[rows].norm() / logits.double()[rows].norm()
    return {
        "model": name,
        "recipe": recipe,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(there.device),
        "off": float(off),
        "layer_off": layer_off,
        "tokens": int((told != served).sum()),
        "operators": dict(operators),
        "same": all(torch.equal(before[key], after[key]) for key in before) and torch.equal(again, logits),
    }


@contextmanager
def _watched(model: Any) -> Iterator[dict[Any, tuple[torch.Tensor, torch.Tensor]]]:
    """Input and output of every packed layer."""
    from ..compress.linear import QuantLinear

    seen: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(layer: Any, args: Any, output: torch.Tensor) -> None:
        seen[layer] = args[0], output

    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    yield seen
    for handle in handles:
        handle.remove()


def _layer_off(layer: Any, x: torch.Tensor, expected: torch.Tensor) -> float:
    found = layer(x.to("npu")).cpu().double()
    return float((found - expected.double()).norm() / expected.double().norm())


def _generate(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **options)


def main(names: list[str]) -> None:
    from . import ascend_emulated

    ascend_emulated.install()
    recipes = names or list(RECIPES)
    cases = [(name, recipe, dtype) for recipe in recipes for name in ("llama", "opt") for dtype in _DTYPES]
    print(json.dumps([beside_the_cpu(*case) for case in cases]))


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

if __name__ == "__main__":
    main(sys.argv[1:])
