"""What an audit is asked to do: one strict model, checked before any work starts."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .bench.pressures.catalog import pressures_named
from .bench.pressures.templates import load_templates
from .compress.recipe import Recipe, parse_recipe
from .compress.recipe_file import read_recipe
from .compress.spec import parse_calibration
from .unlearn.catalog import DEFAULT, METHODS, method_named, settings
from .unlearn.data import running_text

CONTROL = "bucketed"
DEFAULT_RECIPES = ("dense", "rtn-w8a16", "rtn-w4a16-g64-plain", "rtn-w4a16-g64", "gptq-w4a16-g64", "rtn-w3a16-g64")


def default_cache() -> Path:
    """$REMANENCE_CACHE, else remanence/ in the user's cache directory."""
    if path := os.environ.get("REMANENCE_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remanence"


class AuditConfig(BaseModel):
    """One audit.

    model       "demo" trains target and oracle from scratch on the corpus; else a model directory or hub id
    arch        of the demo model
    data        "people" (generated), "tofu", or a file with all rows; None: forget and retain are files of their own
    data_dir    where TOFU's files are; None fetches them from the hub
    forget      "forgetNN" (percent of the people or authors), or a file of rows
    retain      a file of rows; default: the data without the forget set
    people      how many people or authors in all; None: 80 people, 20 TOFU authors for a demo model, else all
    oracle      a model retrained without the forget set (given models only)
    unlearned   models already unlearned, by name
    methods     unlearning methods to run; the positive control runs in any case
    recipes     compressions, short names or YAML files; "dense" runs in any case
    calibration   data for the recipes that need it and name none: each of them runs once with each of these; none: the
                retain set. text: a file, for calibration on running text
    requests    the forget set in so many parts by person; `request`: how many of them are made (None: all), at once, or
                one after another when `sequential` (what MUSE calls scalability and sustainability)
    pressures   names from bench/pressures, applied to every cell; templates: a file of texts for those of asking
    perplexity  a text file, a directory that holds WikiText-2, or "wikitext" for the hub's; measured on every cell
    learning_rate, steps    of the methods that train, but the positive control; None: their own
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = "demo"
    arch: Literal["llama", "opt"] = "llama"
    data: str | None = "people"
    data_dir: str | None = None
    forget: str = "forget10"
    retain: str | None = None
    people: int | None = Field(default=None, ge=2)
    oracle: str | None = None
    unlearned: dict[str, str] = Field(default_factory=dict)
    methods: tuple[str, ...] = DEFAULT
    recipes: tuple[str, ...] = DEFAULT_RECIPES
    calibration: tuple[str, ...] = ()
    text: str | None = None
    requests: int = Field(default=1, ge=1)
    request: int | None = Field(default=None, ge=1)
    sequential: bool = False
    pressures: tuple[str, ...] = ()
    templates: str | None = None
    perplexity: str | None = None
    learning_rate: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for method in methods:
            method_named(method)
        return tuple(dict.fromkeys(methods))

    @field_validator("recipes")
    @classmethod
    def _known_recipes(cls, recipes: tuple[str, ...]) -> tuple[str, ...]:
        names = [read_recipe(name).name for name in recipes]
        return tuple(dict.fromkeys(["dense", *names]))

    @field_validator("calibration")
    @classmethod
    def _known_sources(cls, calibration: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(parse_calibration(text).name for text in calibration))

    @field_validator("text")
    @classmethod
    def _readable_text(cls, text: str | None) -> str | None:
        if text is not None:
            running_text(text)
        return text

    @field_validator("pressures")
    @classmethod
    def _known_pressures(cls, pressures: tuple[str, ...]) -> tuple[str, ...]:
        return pressures_named(pressures)

    @field_validator("templates")
    @classmethod
    def _readable_templates(cls, templates: str | None) -> str | None:
        if templates is not None:
            load_templates(templates)
        return templates

    @field_validator("perplexity")
    @classmethod
    def _some_text(cls, text: str | None) -> str | None:
        if text is not None and text != "wikitext" and not Path(text).exists():
            raise ValueError(f"perplexity: {text}: no such file or directory, nor 'wikitext'")
        return text

    def compressions(self) -> list[Recipe]:
        """The recipes, those that are calibrated once for each choice of data. Before one that prunes and has the rest
        come after unlearning, the pruning by itself: what it is held against."""
        found: list[Recipe] = []
        for recipe in map(parse_recipe, self.recipes):
            if recipe.calibrated and recipe.calibration is None and self.calibration:
                found += [replace(recipe, calibration=parse_calibration(text)) for text in self.calibration]
            else:
                found.append(recipe)
        return list(dict.fromkeys(each for recipe in found for each in (recipe.before, recipe)))

    @model_validator(mode="after")
    def _consistent(self) -> AuditConfig:
        if self.calibration and not any(recipe.calibrated for recipe in map(parse_recipe, self.recipes)):
            raise ValueError(f"calibration: none of {', '.join(self.recipes)} is calibrated; name e.g. gptq-w4a16-g64")
        wants_text = [recipe for recipe in self.compressions() if recipe.calibration and recipe.calibration.text]
        if wants_text and self.text is None:
            raise ValueError(f"text: {wants_text[0]} is calibrated on running text; give --text FILE")
        taken = {"target", "oracle", *METHODS} & set(self.unlearned)
        if taken:
            raise ValueError(f"unlearned: the name {min(taken)!r} is taken; choose another")
        if not self.methods and not self.unlearned:
            raise ValueError("methods: none given, and no unlearned model; there is nothing to audit")
        if self.model == "demo" and self.oracle:
            raise ValueError("oracle: the demo trains its own; an oracle directory goes with --model")
        if self.request is not None and self.request > self.requests:
            raise ValueError(f"request: {self.request} is beyond the {self.requests} requests")
        apart = [name for name in self.methods if METHODS[name].kind == "inference" or settings(name).unmerged]
        if self.sequential and apart:
            raise ValueError(f"sequential: {apart[0]} leaves the weights alone, from which the next request starts")
        if self.requests > 1 and self.unlearned:
            raise ValueError("requests: models already unlearned have forgotten everything at once; audit them alone")
        first = [recipe.name for recipe in self.compressions() if recipe.before.compresses]
        merged = [name for name in self.methods if settings(name).unmerged]
        if first and (self.unlearned or merged):
            why = f"{merged[0]} keeps an adapter apart" if merged else f"{min(self.unlearned)} is unlearned already"
            raise ValueError(f"recipes: {first[0]} prunes before anything is unlearned, and {why}")
        if self.data_dir and self.data != "tofu":
            raise ValueError(f"data-dir: goes with --data tofu, not with --data {self.data}")
        named = self.data in ("people", "tofu")
        if named and not re.fullmatch(r"forget\d{1,2}", self.forget) and not Path(self.forget).is_file():
            raise ValueError(f"forget: {self.forget!r} is neither a file nor of the form forgetNN (NN percent)")
        if self.data is None and not Path(self.forget).is_file():
            raise ValueError(
                f"forget: {self.forget!r} is no file; a model of your own needs --forget FILE with --retain FILE or "
                "--data FILE"
            )
        if named and self.retain:
            raise ValueError(f"retain: goes with forget and retain files of your own, not with --data {self.data}")
        if self.people is not None and not named:
            raise ValueError("people: goes with --data people or --data tofu")
        return self
