"""Finding one's way in any Hugging Face causal LM: its decoder layers, and the hidden states between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..compress.block import decoder_list
from .encode import Batch


def unwrapped(network: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers, in order; ValueError when there is not exactly one such list."""
    return decoder_list(unwrapped(model))[2]


def forward(network: nn.Module, batch: Batch) -> Tensor:
    """Logits [B, T, V]."""
    return network(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


def hidden_after(network: nn.Module, layer: int, batch: Batch) -> Tensor:
    """Hidden states [B, T, d] that decoder layer `layer` (from 0) puts out. Later layers are not run, and the head sees
    one position only, so that time and memory are those of the layers needed."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:  # noqa: ARG001
        kept.append(output[0] if isinstance(output, tuple) else output)

    with first_layers(network, layer + 1) as last:
        handle = last.register_forward_hook(keep)
        try:
            network(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
    return kept[0]


@contextmanager
def first_layers(network: nn.Module, count: int) -> Iterator[nn.Module]:
    """The first `count` decoder layers alone, inside the block; yields the last of them.

    What follows the layers (final norm, projection, head, a cap on logits) is the model's own and runs as ever.
    """
    owner, name, layers = decoder_list(unwrapped(network))
    if not 1 <= count <= len(layers):
        raise ValueError(f"count: {count} is not between 1 and {len(layers)}, the model's decoder layers")
    setattr(owner, name, layers[:count])
    try:
        yield layers[count - 1]
    finally:
        setattr(owner, name, layers)


def device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def down_projection(block: nn.Module, width: int) -> nn.Linear | Conv1D:
    """The linear layer by which the MLP of a decoder layer returns to the residual stream.

    That is the last one outside attention with `width` output features. ValueError where there is none.
    """
    if any(parameter.dim() == 3 for parameter in block.parameters()):
        raise ValueError("model: its MLP is a mixture of experts; there is no single down projection")
    found = [
        module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "attn" not in name and "attention" not in name
        if (module.nf if isinstance(module, Conv1D) else module.out_features) == width
    ]
    if not found:
        raise ValueError(f"model: no linear layer with {width} output features in the MLP of {type(block).__name__}")
    return found[-1]


def down_weights(block: nn.Module, width: int) -> list[Tensor]:
    """What the MLP's way back to the residual stream is made of: one weight, or the fused stack of the experts'."""
    fused: list[Tensor] = [p for name, p in block.named_parameters() if p.dim() == 3 and name.endswith("down_proj")]
    return fused or [down_projection(block, width).weight]
