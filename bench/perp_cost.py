"""What retraining costs: adapters beside training everything, same steps and data, each in a process of its own.

The weights are random, and outweigh the activations as those of large models do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ..backends.memory import peak_rss, reset_peak
from ..compress.recipe import parse_recipe
from ..compress.retrain import masks_of, retrain_
from ..compress.sequential import compress_
from ..unlearn.demo import DemoConfig
from .perp_quality import knobs, zeros_are
from .ptq_quality import told

GROUPS = ("norm", "mask_lora", "scale_lora", "lora", "all")
SHAPE = DemoConfig(
    vocab_size=1024, hidden_size=768, intermediate_size=2048, layers=6, heads=12, kv_heads=12, max_length=128
)
STEPS, BATCH = 5, 4


def run(
    seed: int, groups: Sequence[str] = GROUPS, shape: DemoConfig = SHAPE, steps: int = STEPS
) -> tuple[list[dict], list[dict]]:
    """(rows, checks).

    trained           share of the model's parameters
    seconds           of retraining, without loading and pruning
    peak_tensors_mib  of live tensors; peak_rss_mib: of the process, libraries too
    """
    rows = [told(_apart(name, shape, steps, seed)) for name in groups]
    return rows, checks({row["retrained"]: row for row in rows})


def _apart(groups: str, shape: DemoConfig, steps: int, seed: int) -> dict[str, Any]:
    order = {"groups": groups, "shape": asdict(shape), "steps": steps, "seed": seed}
    done = subprocess.run([sys.executable, "-m", __name__, json.dumps(order)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{groups}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(groups: str, shape: Mapping[str, Any], steps: int, seed: int) -> dict[str, Any]:
    """One row, in this process."""
    size = DemoConfig(**shape)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocab_size, hidden_size=size.hidden_size, intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.max_length, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    recipe = parse_recipe("magnitude-s50")
    model = compress_(AutoModelForCausalLM.from_config(config, dtype=torch.float32), recipe)
    masks = masks_of(model, recipe)
    ids = torch.randint(2, size.vocab_size, (4 * BATCH, size.max_length))
    reset_peak()
    retrain = knobs(groups, steps=steps, batch=BATCH, seed=seed)
    found = retrain_(model, retrain, masks, list(ids.split(BATCH)))
    return {
        "retrained": groups,
        "steps": steps,
        "tokens": BATCH * size.max_length,
        "model_mib": sum(p.nbytes for p in model.parameters()) / 2**20,
        "trained": found.trained / found.parameters,
        "seconds": found.seconds,
        "peak_tensors_mib": found.peak_bytes / 2**20,
        "peak_rss_mib": peak_rss() / 2**20,
        "zeros": zeros_are(model, masks),
    }


def checks(rows: Mapping[str, dict[str, Any]]) -> list[dict]:
    """Of the rows that are there."""
    found = []
    for measure in ("peak_tensors_mib", "peak_rss_mib"):
        if {"mask_lora", "all"} <= rows.keys():
            limit, value = rows["all"][measure], rows["mask_lora"][measure]
            what = f"mask_lora: {measure} below that of training all"
            found.append({"what": what, "limit": limit, "value": value, "ok": value < limit})
    return found


if __name__ == "__main__":
    print(json.dumps(measured(**json.loads(sys.argv[1]))))
