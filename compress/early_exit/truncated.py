"""Static truncation: a model without its last layers, an ordinary checkpoint for any engine."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..block import decoder_list

# Settings of some configurations that have one entry per layer.
_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")


def truncate_(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """The first `depth` decoder layers, in place; final norm and head stay. Before saving a model that is to leave at
    `depth` always, wherever the engine knows no exits. ValueError for a depth that is not below the model's."""
    owner, name, layers = decoder_list(model)
    if not 1 <= depth < len(layers):
        raise ValueError(f"depth: {depth} is not between 1 and {len(layers) - 1}, the layers below the last")
    config: Any = model.config.get_text_config()
    setattr(owner, name, layers[:depth])
    config.num_hidden_layers = depth
    for key in _PER_LAYER:
        values = getattr(config, key, None)
        if isinstance(values, list) and len(values) == len(layers):
            setattr(config, key, values[:depth])
    if getattr(config, "max_window_layers", None) is not None:  # Qwen2's: layers from here on have a window
        config.max_window_layers = min(config.max_window_layers, depth)
    return model
