"""remanence: a model was made to forget; does the forgetting survive compression?

The public names below load on first use, so that `import remanence` and `remanence --help` stay light.
"""

from importlib import import_module

from .backends.autoload import guard
from .compress.integration import arm

__version__ = "0.1.0"

_PUBLIC = {
    "AuditConfig": "remanence.config",
    "audit": "remanence.engine",
    "load_model": "remanence.compress.checkpoint",
    "Recipe": "remanence.compress.recipe",
    "parse_recipe": "remanence.compress.recipe",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'remanence' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# What happens on import, and loads nothing: a broken torch-npu no longer ends `import torch`, and transformers'
# from_pretrained learns to read our checkpoints.
guard()
arm()
