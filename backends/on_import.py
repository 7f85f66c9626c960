"""Have something done right after a module was imported, whoever imports it. Loads nothing itself."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as typing's own, which would be most of the time that `import remanence` takes
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def after_import(name: str, then: Callable[[ModuleType], object]) -> None:
    """Call `then` with the module called `name` each time that one has run. Asked twice is once."""
    if not any(isinstance(finder, _Watcher) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher(name, then))


class _Watcher:
    """A finder on sys.meta_path that lets the others find one module, and has `then` run right after it ran."""

    def __init__(self, name: str, then: Callable[[ModuleType], object]) -> None:
        self.name, self.then = name, then
        self.asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name or self.asking:
            return None
        self.asking = True  # we are among those whom we ask, and others may ask everybody too
        try:
            found = (finder.find_spec(name, path, target) for finder in sys.meta_path)
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self.asking = False
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_then(module: ModuleType) -> None:
            run(module)
            if module.__name__ == self.name:  # a loader may serve many modules
                self.then(module)

        spec.loader.exec_module = run_and_then  # type: ignore[method-assign]
        return spec
