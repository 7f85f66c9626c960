"""Any of the recovery pressures of catalog.py on one model and corpus, through one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from ...compress.recipe import parse_recipe
from ...unlearn.data import QA, Corpus, spread
from ...unlearn.encode import Encoder
from .compression import compression
from .early_exit import early_exit
from .forms import forms
from .pressed import Pressed
from .prompts import attacks, in_context, persuasion
from .relearn import Relearning, relearn
from .templates import TEMPLATES, Templates

QUANTIZERS = ("rtn-w8a16", "rtn-w4a16-g64", "rtn-w4a16", "rtn-w3a16-g64")
PRUNERS = ("magnitude-s30", "magnitude-s50", "magnitude-s70")
# Rows of other people that prompts are filled with, and that are trained on: more would not change them.
_OTHERS = 200


@dataclass(frozen=True)
class Subject:
    """What is put under pressure. relearning: how; the defaults are those for models of billions of parameters."""

    model: PreTrainedModel
    encoder: Encoder
    corpus: Corpus
    seed: int = 0
    relearning: Relearning = field(default_factory=Relearning)
    templates: Templates = field(default_factory=lambda: TEMPLATES)

    @property
    def others(self) -> tuple[QA, ...]:
        return spread(self.corpus.retain, _OTHERS)


def _asking(pressure: Callable[..., list[Pressed]]) -> Callable[[Subject], list[Pressed]]:
    def run(s: Subject) -> list[Pressed]:
        return pressure(s.model, s.encoder, s.corpus.forget, s.others, s.templates, s.seed)

    return run


def _compressing(recipes: Sequence[str]) -> Callable[[Subject], list[Pressed]]:
    def run(s: Subject) -> list[Pressed]:
        return [compression(s.model, s.encoder, s.corpus.forget, [parse_recipe(name) for name in recipes])]

    return run


def _exit(s: Subject) -> list[Pressed]:
    return [early_exit(s.model, s.encoder, s.corpus.forget)]


def _relearning(s: Subject) -> list[Pressed]:
    found = relearn(s.model, s.encoder, s.corpus.forget, {"retain": s.others}, s.relearning, s.seed)
    # The rows that were shown tell whether the attack taught anything.
    return [found] if found.shown is None else [found, replace(found.shown, name=f"{found.name}, rows shown")]


APPLIED: dict[str, Callable[[Subject], list[Pressed]]] = {
    "in-context": _asking(in_context),
    "persuasion": _asking(persuasion),
    "attacks": _asking(attacks),
    "forms": _asking(forms),
    "early-exit": _exit,
    "relearning": _relearning,
    "quantization": _compressing(QUANTIZERS),
    "pruning": _compressing(PRUNERS),
}


def apply(names: Sequence[str], subject: Subject) -> dict[str, list[dict[str, Any]] | str]:
    """What each pressure found, as JSON: a list of Pressed (pressed.py), or in words why it could not be applied."""
    found: dict[str, list[dict[str, Any]] | str] = {}
    for name in names:
        try:
            found[name] = [_fields(pressed) for pressed in APPLIED[name](subject)]
        except ValueError as error:
            found[name] = str(error)
    return found


def _fields(pressed: Pressed) -> dict[str, Any]:
    return {key: value for key, value in asdict(pressed).items() if key in Pressed.__dataclass_fields__}


def read(found: Sequence[dict[str, Any]]) -> list[Pressed]:
    """Back from JSON."""
    return [Pressed(**{**values, "references": tuple(values["references"])}) for values in found]
