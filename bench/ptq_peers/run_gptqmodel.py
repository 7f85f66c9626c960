"""GPTQModel 7.7 does one job: quantizes a model through `GPTQModel.load` and `quantize`, or one layer through `GPTQ`.

Its defaults everywhere (GPTQ: damping 0.05, blocks of 128, group-aware reordering; AWQ: 20 ratios, clipping; rounding
without smoothing). What it writes is what counts: weights are decoded from its checkpoint, with scales in float16.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from activations import read
from gptqmodel import AWQConfig, GPTQModel, QuantizeConfig, RTNConfig, extension
from gptqmodel.quantization.gptq import GPTQ
from packed import decode_awq, decode_gptq
from peer_job import CannotDo, Memory, Seconds, batches, relative_error, run, save
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM


def quantization(job: dict) -> QuantizeConfig:
    """Its own configuration for the method, everything else at its default."""
    config = {"gptq": QuantizeConfig, "rtn": RTNConfig, "awq": AWQConfig}[job["method"]]
    more = {}
    if job["group_size"] is None and job["method"] == "gptq":
        more["act_group_aware"] = False  # its reordering needs groups
    size = -1 if job["group_size"] is None else job["group_size"]
    return config(bits=job["bits"], group_size=size, sym=job["symmetric"], device="cpu", **more)


def check(job: dict) -> None:
    """Raises CannotDo for sizes that its AWQ has no code for: there its worker threads end the process.

    (Its GPTQ and rounding take any size; a last group may be shorter.)
    """
    if job["method"] != "awq":
        return
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job["model"], local_files_only=True))
    head = network.get_output_embeddings()
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        if job["group_size"] is not None and module.in_features % job["group_size"]:
            size = job["group_size"]
            raise CannotDo(f"{name}: {module.in_features} input features do not divide into groups of {size}")
        clipped = not {"q_proj", "k_proj"} & set(name.split("."))
        if clipped and module.out_features % 64:
            raise CannotDo(f"{name}: {module.out_features} output features; its clipping takes multiples of 64")


def model(job: dict) -> dict:
    """The whole model; weights.safetensors gets all tensors of its checkpoint, packed ones as dense weights."""
    check(job)
    config = quantization(job)
    extension.load("pack_block_cpu")  # compiled on first use, for half a minute: not part of quantizing
    # Its AWQ kernels know 16 bits only, so it calibrates there; what stays dense is rounded to float16 too.
    dtype = torch.float16 if job["method"] == "awq" else torch.float32
    network = GPTQModel.load(job["model"], config, dtype=dtype)
    rows = [ids for batch in batches(job["calibration"]) for ids in batch]
    lengths = {len(ids) for ids in rows}
    # It sorts by length and pads within a batch, so batches are of one row unless all rows are equal.
    size = len(batches(job["calibration"])[0]) if len(lengths) == 1 else 1
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    with Memory() as memory, (quantizing := Seconds()):
        log = network.quantize(None if job["method"] == "rtn" else data, batch_size=size)
    with tempfile.TemporaryDirectory(dir=job["out"]) as folder:
        network.save(folder)
        weights: dict[str, Tensor] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            weights |= load_file(file)
        quantized = sorted(name.removesuffix(".qweight") for name in weights if name.endswith(".qweight"))
        if not quantized:
            raise CannotDo("GPTQModel quantized no layer of this model")
        for name in quantized:
            packed = [weights.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")]
            if job["method"] == "awq":
                dense = decode_awq(*packed, bits=job["bits"])
            else:
                dense = decode_gptq(*packed, weights.pop(f"{name}.g_idx"), bits=job["bits"])
            weights[f"{name}.weight"] = dense
        save(job["out"], weights)
    entries = [entry for part in log.values() for entry in part]
    return {
        "seconds": quantizing.total,
        "peak_rss": memory.bytes,
        "peak_exact": memory.exact,
        "settings": f"{config}; model loaded in {dtype}",
        "quantized": quantized,
        "failures": [
            f"block {entry['layer']}, {entry['module']}: {entry['loss']}"
            for entry in entries
            if job["method"] != "rtn" and "fallback" in str(entry.get("loss"))
        ],
        "log": entries,
    }


def layer(job: dict) -> dict:
    """One layer: Hessian and GPTQ, each timed; weights.safetensors gets `weight` [N, K], dequantized."""
    W = torch.from_numpy(np.load(job["weight"]))
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data.copy_(W)
    del W
    config = quantization(job)
    accumulating, solving = Seconds(), Seconds()
    kept = Path(job["out"]) / "hessian.npy"
    with Memory() as memory, torch.inference_mode():
        solver = GPTQ(linear, config)
        solver.quantizer.configure(perchannel=True)  # as its own processor does
        for chunk in read(job["activations"]):
            x = torch.from_numpy(chunk)[None]  # one sequence, its own default batch
            with accumulating:
                solver.add_batch(x, None)
        del x, chunk
        with accumulating:
            H = solver.finalize_hessian()
        np.save(kept, H.numpy())  # its solver frees it; the error needs H after it
        del H
        with solving:
            Q, _, _, _, _, loss, damp, _ = solver.quantize()
    save(job["out"], {"weight": Q})
    error = relative_error(torch.from_numpy(np.load(job["weight"])), Q, torch.from_numpy(np.load(kept)))
    kept.unlink()
    return {
        "seconds": {"hessian": accumulating.total, "solve": solving.total},
        "peak_rss": memory.bytes,
        "peak_exact": memory.exact,
        "relative_error": error,
        "damp": damp,
        "settings": str(config),
        "failures": ["weight"] if "fallback" in str(loss) else [],
    }


if __name__ == "__main__":
    run({"model": model, "layer": layer}, ("gptqmodel",))
