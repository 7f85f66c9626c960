"""Lets transformers' own `from_pretrained` read what we write: packed layers that stay packed, run by our op.

`import remanence` calls `arm`, and must stay light. Where transformers is loaded already, its registry of quantizers is
extended at once; else at the moment that registry is imported. Files of compressed-tensors that carry our mark in their
`quantization_config` then load through quantizer.py; all other files load as before, and so do ours with an explicit
`quantization_config=CompressedTensorsConfig()`, and those of mixtures of experts, by the stock reader, which makes them
dense (`remanence.load_model` keeps them packed).
"""

from __future__ import annotations

import sys
import warnings

from ..backends.on_import import after_import

TYPE_CHECKING = False  # as typing's own, which would be most of the time that `import remanence` takes
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType
    from typing import Any

    from .quantizer import PackedConfig, PackedQuantizer

MARK = "remanence"
METHOD = "remanence"
_REGISTRY = "transformers.quantizers.auto"


def mark(recipe: object, stem: str, experts: bool) -> dict[str, object]:
    """What is added to the `quantization_config` of a file of ours. `stem`: of the names of its weight files; other
    than "model" where stock readers are to find nothing, instead of filling gaps with random numbers. `experts`:
    whether there are some that were taken apart."""
    from importlib.metadata import version

    about: dict[str, object] = {"version": version("remanence"), "recipe": str(recipe)}
    about |= {} if stem == "model" else {"weights": stem}
    return {MARK: about | ({"experts": "apart"} if experts else {})}


def read_mark(quantization: Mapping[str, Any]) -> str:
    """Name of the recipe by which a file of ours was made; of another's file its quant_method."""
    about = quantization.get(MARK)
    return str(about.get("recipe") if isinstance(about, dict) else quantization.get("quant_method"))


def arm() -> None:
    """Extend transformers' registry of quantizers, now or when it is imported. Twice is once."""
    registry = sys.modules.get(_REGISTRY)
    if registry is not None:
        register(registry)
    after_import(_REGISTRY, register)  # also when it is there: it may be imported anew


def register(registry: ModuleType) -> None:
    """Make the module `transformers.quantizers.auto` know our quantizer, and our files where it settles on one."""
    try:
        quantizers, auto = registry.AUTO_QUANTIZER_MAPPING, registry.AutoHfQuantizer
        stock = auto.merge_quantization_configs
    except AttributeError as error:
        # An import of transformers must not fail because of us.
        warnings.warn(
            f"remanence: this version of transformers keeps its quantizers elsewhere ({error}): its from_pretrained "
            "takes packed checkpoints as without remanence; remanence.load_model reads them all",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    if METHOD in quantizers:
        return
    quantizers[METHOD] = _quantizer
    auto.merge_quantization_configs = staticmethod(_merger(stock))


def _merger(stock: Callable[..., Any]) -> Callable[..., Any]:
    def merge_quantization_configs(quantization_config: Any, asked: Any = None, *args: Any, **kwargs: Any) -> Any:
        if asked is None and isinstance(quantization_config, dict) and MARK in quantization_config:
            if "experts" in quantization_config[MARK]:
                # They are merged by transformers' own rules, which know dense tensors: its reader makes them dense.
                return stock(quantization_config, asked, *args, **kwargs)
            from .quantizer import PackedConfig

            return PackedConfig(**quantization_config)
        return stock(quantization_config, asked, *args, **kwargs)

    return merge_quantization_configs


def _quantizer(config: PackedConfig, **kwargs: Any) -> PackedQuantizer:
    # Not imported before a model is loaded: it needs all of transformers, which is half imported when we register.
    from .quantizer import PackedQuantizer

    return PackedQuantizer(config, **kwargs)
