"""llm-compressor 0.14 does one job: quantizes a model through `oneshot`, or one layer through its GPTQ functions.

Schemes are its presets' (integers, one scale per group, its own observers) with the job's bits and group size; GPTQ
(damping 0.01, blocks of 128, static activation order), AWQ (20 ratios, duo scaling) and rounding as it comes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from activations import read
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import (
    accumulate_hessian,
    make_empty_hessian,
    prepare_batch,
    update_batch_qparams,
)
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.quantization.calibration import observe
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from peer_job import CannotDo, Memory, Seconds, batches, relative_error, run, save
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def quantization(job: dict) -> dict:
    """The scheme as keywords of a modifier."""
    grouped = job["group_size"] is not None
    args = QuantizationArgs(
        num_bits=job["bits"],
        type="int",
        strategy="group" if grouped else "channel",
        group_size=job["group_size"],
        symmetric=job["symmetric"],
        dynamic=False,
    )
    return {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}}


def model(job: dict) -> dict:
    """The whole model; weights.safetensors gets its state dict with every quantized weight dequantized."""
    network = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, local_files_only=True).eval()
    names = list(network.state_dict())
    head = network.get_output_embeddings()
    scheme = quantization(job) | {"ignore": [name for name, module in network.named_modules() if module is head]}
    recipe = {
        "rtn": lambda: [QuantizationModifier(**scheme)],
        "gptq": lambda: [GPTQModifier(**scheme)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**scheme)],
    }[job["method"]]()
    settings = [repr(modifier) for modifier in recipe]
    data: Any = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches(job["calibration"])]
    notes = []
    if job["method"] == "awq" and not torch.accelerator.is_available():
        # It pins what it caches in host memory for faster copies to a GPU, and fails where there is none.
        IntermediatesCache.pin_memory = lambda *_: None
        notes.append("AWQ of this version fails without a GPU: its pinning of host memory was switched off")
    warnings: list[str] = []
    # By name: its own level for metrics lies above that of warnings.
    logger.add(lambda text: warnings.append(text.record["message"]), filter=lambda row: row["level"].name == "WARNING")
    with Memory() as memory, (quantizing := Seconds()):
        # Rounding needs no data, and llm-compressor takes its data-free way only without.
        dataset = None if job["method"] == "rtn" else DataLoader(data, batch_size=None)
        oneshot(model=network, recipe=recipe, dataset=dataset)
    weights = dict(network.state_dict())
    quantized = []
    for name, module in network.named_modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if args is not None and hasattr(module, "weight_scale"):
            quantized.append(name)
            zero = getattr(module, "weight_zero_point", None)
            weights[f"{name}.weight"] = fake_quantize(module.weight, module.weight_scale, zero, args)
    if not quantized:
        raise CannotDo("llm-compressor found no nn.Linear to quantize in this model")
    save(job["out"], {name: weights[name] for name in names})
    return {
        "seconds": quantizing.total,
        "peak_rss": memory.bytes,
        "peak_exact": memory.exact,
        "settings": settings,
        "quantized": quantized,
        "failures": sorted(set(re.findall(r"[\w.]+", " ".join(_affected(warnings))))),
        "warnings": warnings,
        "notes": notes,
    }


def _affected(warnings: list[str]) -> list[str]:
    """What its one warning about GPTQ's silent fall back to rounding names, at most ten layers."""
    return [text.partition("Affected modules:")[2] for text in warnings if text.startswith("Hessian inversion failed")]


def layer(job: dict) -> dict:
    """One layer: Hessian and GPTQ, each timed; weights.safetensors gets `weight` [N, K], dequantized."""
    W = torch.from_numpy(np.load(job["weight"]))
    linear: Any = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data.copy_(W)
    del W
    network = nn.Sequential(linear)
    modifier = GPTQModifier(**quantization(job))
    modifier.initialize_quantization(network)
    modifier.start_calibration(network)
    accumulating, solving = Seconds(), Seconds()
    kept = Path(job["out"]) / "hessian.npy"
    with Memory() as memory, torch.no_grad():
        H, count = make_empty_hessian(linear), torch.zeros(())
        for chunk in read(job["activations"]):
            x = torch.from_numpy(chunk)[None]  # one sequence, its own default batch
            with accumulating:
                H, count = accumulate_hessian(x, linear, H, count)
        del x, chunk
        np.save(kept, H.numpy())  # its solver works in this memory; the error needs H after it
        args = linear.quantization_scheme.weights
        with solving:
            observe([linear], base_name="weight")
            qparams = [linear.weight_observer.get_qparams()]
            statistics = {linear: H}, {linear: count}
            del H
            W, hessians, scale, zero, global_scale = prepare_batch([linear], qparams, *statistics)
            Q, _, fallen = quantize_weight(
                weights=W,
                hessians=hessians,
                scale=scale,
                zero_point=zero,
                global_scale=global_scale,
                quant_args=args,
                blocksize=modifier.block_size,
                percdamp=modifier.dampening_frac,
            )
            update_batch_qparams([linear], Q, scale, zero, global_scale, args)
    Q = linear.weight.detach()
    save(job["out"], {"weight": Q})
    error = relative_error(torch.from_numpy(np.load(job["weight"])), Q, torch.from_numpy(np.load(kept)))
    kept.unlink()
    return {
        "seconds": {"hessian": accumulating.total, "solve": solving.total},
        "peak_rss": memory.bytes,
        "peak_exact": memory.exact,
        "relative_error": error,
        "settings": [repr(modifier)],
        "failures": ["weight"] if bool(fallen.any()) else [],
    }


if __name__ == "__main__":
    run({"model": model, "layer": layer}, ("llmcompressor", "compressed-tensors"))
