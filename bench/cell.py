"""One cell of the grid: a model under a recipe, written, read back and measured."""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..compress.checkpoint import load_model, load_tokenizer, max_length, save_model, weight_bytes, write_model
from ..compress.knobs import FOLDING
from ..compress.kv_attach import attach_kv_, check_rounded
from ..compress.places import base_directory
from ..compress.recipe import Recipe
from ..compress.sequential import LayerReport, Report, compress_
from ..compress.stream import compress_to
from ..unlearn.adapters import with_adapter
from ..unlearn.calibration import calibration_batches, default_calibration, retraining_batches
from ..unlearn.data import Corpus, EvalSet, running_text
from ..unlearn.encode import Encoder, pad_id
from ..unlearn.inference.store import attach, carry
from ..unlearn.muse import SHOTS, muse_from_corpus
from .distance import distance
from .forgetting import Scores, evaluate
from .health import flags, health
from .muse import knowledge, most_shots, rouge_l
from .perplexity import perplexity, wikitext
from .pressures.apply import Subject, apply
from .pressures.relearn import DEMO, Relearning
from .pressures.templates import TEMPLATES, load_templates
from .speed import decode_speed
from .survival import Survival, survival
from .tofu import mean

# Raise this when a change here makes earlier measurements wrong.
CELL_VERSION = 6


@dataclass(frozen=True)
class Measures:
    """What is measured beyond the sets.

    oracle   a model retrained without the forget set, to measure the distance to
    pressures   by name (bench/pressures/catalog.py); templates: a file of one's own for those of asking
    text     a file or directory of running text for the perplexity, "wikitext" for the hub's WikiText-2
    calibration_text   a text file for recipes that are calibrated on running text
    demo     whether the models are a thousand times smaller than those that settings are made for
    """

    oracle: Path | str | None = None
    pressures: tuple[str, ...] = ()
    templates: Path | str | None = None
    text: Path | str | None = None
    calibration_text: Path | str | None = None
    demo: bool = False
    seed: int = 0


@dataclass(frozen=True)
class CellScores:
    """What measure_cell found for `model` (its part in the assay: `control`) under `recipe`."""

    model: str
    control: str | None
    recipe: Recipe
    measured: dict[str, Any]

    @property
    def error(self) -> str | None:
        return self.measured.get("error")

    def scores(self, name: str) -> Scores:
        """Scores on the set called `name` ("forget", "holdout", or one of the utility sets)."""
        return Scores.from_json(self.measured["sets"][name])

    def utility(self) -> dict[str, Scores]:
        return {name: self.scores(name) for name in self.measured["sets"] if name not in ("forget", "holdout")}


def measure_cell(
    model_path: Path | str,
    target_path: Path | str,
    recipe: Recipe,
    corpus: Corpus,
    scratch: Path,
    measures: Measures | None = None,
) -> dict[str, Any]:
    """Compress, export, reload, score; a JSON object.

    An adapter that is kept apart stays as it is beside the compressed base.
    What guards a model at inference time (see unlearn/inference) goes with it: its second model is compressed alike.
    A model that cannot take the recipe gives {"error": reason}: the grid goes on without that cell.
    `scratch` is an existing directory for the checkpoint, which is gone afterwards.
    """
    start = time.perf_counter()
    measures = measures or Measures()
    checkpoint = Path(base_directory(model_path))
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    parameters = sum(p.numel() for p in model.parameters())
    left = None
    layers: list[LayerReport] = []
    try:
        data = _data(recipe, Encoder(tokenizer, max_length(model)), corpus, measures)
        model, left = _compressed(model, load_model(target_path), recipe, data, layers.append)
    except ValueError as error:
        if recipe.compresses:
            return {"error": str(error)}
        # A dense model whose weights are not numbers is served as it is, and measured as it is.
    if recipe.compresses:
        checkpoint = scratch / "checkpoint"
        save_model(model, tokenizer, checkpoint, recipe)
        carry(model_path, checkpoint, lambda source, target: compress_to(source, recipe.at_once, target, *data))
        model = load_model(checkpoint)
    model = attach(with_adapter(model, model_path), tokenizer, checkpoint)
    size = weight_bytes(checkpoint)
    encoder = Encoder(tokenizer, max_length(model))
    try:
        if recipe.kv is not None:
            attach_kv_(model, recipe.kv)
        found = measure(model, encoder, corpus, measures)
        if recipe.kv is not None:
            check_rounded(model)
    except ValueError as error:
        if recipe.kv is None:
            raise
        return {"error": str(error)}
    finally:
        if recipe.compresses:
            shutil.rmtree(checkpoint)
    # A model's own settings (repetition penalty, sampling) are not what is timed.
    model.generation_config = GenerationConfig()
    prompt = encoder.prompt_ids(corpus.forget[0].question)
    new_tokens = max(1, min(32, encoder.max_length - len(prompt) - 1))
    speed = decode_speed(model, prompt, pad_id(tokenizer), new_tokens)
    return {
        **found,
        "parameters": parameters,
        "size_bytes": size,
        "update_survival": None if left is None else asdict(left),
        "layers": [asdict(layer) for layer in layers],
        "decode": asdict(speed),
        "measured_s": time.perf_counter() - start,
    }


def prune_to(
    target_path: Path | str, recipe: Recipe, corpus: Corpus, out: Path, measures: Measures | None = None
) -> None:
    """Write the target, pruned by `recipe`, into the existing directory `out`; ValueError where it cannot be."""
    model, tokenizer = load_model(target_path), load_tokenizer(target_path)
    batches, _ = _data(recipe, Encoder(tokenizer, max_length(model)), corpus, measures or Measures())
    write_model(compress_(model, recipe, batches), tokenizer, out)


def _moved(recipe: Recipe) -> bool:
    """Whether weights stand for something else afterwards, and cannot be compared with another model's."""
    return recipe.method in FOLDING or recipe.rotation is not None


def _data(recipe: Recipe, encoder: Encoder, corpus: Corpus, measures: Measures) -> tuple[list[Tensor], list[Tensor]]:
    """Calibration data for the recipes that need it, by default what a deployment has, the retain set; and what is
    trained on again."""
    text = None if measures.calibration_text is None else running_text(measures.calibration_text)
    rows = {"retain": corpus.retain, "forget": corpus.forget}
    again = [] if recipe.retrain is None else retraining_batches(recipe.retrain, encoder, rows, text)
    if not recipe.calibrated:
        return [], again
    wanted = recipe.calibration or default_calibration(rows, None, encoder)
    return calibration_batches(wanted, encoder, rows, text, measures.seed), again


def _compressed(
    model: PreTrainedModel,
    target: PreTrainedModel,
    recipe: Recipe,
    data: tuple[list[Tensor], list[Tensor]],
    report: Report,
) -> tuple[PreTrainedModel, Survival | None]:
    """The model compressed, and what is left of its update at the weights: None where weights cannot be compared."""
    batches, again = data
    if (recipe.calibrated or recipe.prune is not None) and not _moved(recipe):
        ours = compress_(copy.deepcopy(model), recipe, batches, report, again)
        theirs = compress_(copy.deepcopy(target), recipe, batches, retraining=again)
        return ours, survival(model, target, recipe, (ours, theirs))
    left = None if _moved(recipe) else survival(model, target, recipe)
    return compress_(model, recipe, batches, report, again), left


def load_served(path: Path | str) -> tuple[PreTrainedModel, Encoder]:
    """A model as it answers, with the adapter or the guard that lies beside it."""
    base = base_directory(path)
    tokenizer = load_tokenizer(base)
    model = attach(with_adapter(load_model(base), path), tokenizer, base)
    return model, Encoder(tokenizer, max_length(model))


def measure(model: PreTrainedModel, encoder: Encoder, corpus: Corpus, measures: Measures) -> dict[str, Any]:
    """Everything that is seen from outside of a model, whatever made it so; a JSON object.

    sets        Scores of "forget", every utility set, and "holdout" (likelihoods alone) where there is one
    health, flags   of the answers to forget questions; signs of a collapse in the answers to what should be known
    muse        MUSE's axes by question (bench/muse.py), with as many shots as there is room for, none for a demo
    distance    to the oracle on the forget answers (bench/distance.py), or null
    perplexity  of the text, or null;  pressures   by name (bench/pressures)
    """
    sets = {"forget": EvalSet(corpus.forget), **corpus.utility}
    scores = {name: evaluate(model, encoder, items) for name, items in sets.items()}
    if corpus.holdout:
        scores["holdout"] = evaluate(model, encoder, EvalSet(corpus.holdout), generate=False)
    oracle = load_served(measures.oracle)[0] if measures.oracle else None
    text = None if measures.text is None else wikitext(None if measures.text == "wikitext" else measures.text)
    templates = load_templates(measures.templates) if measures.templates else TEMPLATES
    relearning = DEMO if measures.demo else Relearning()
    subject = Subject(model, encoder, corpus, measures.seed, relearning, templates)
    return {
        "sets": {name: found.as_json() for name, found in scores.items()},
        "health": asdict(health(scores["forget"].answers, [row.question for row in corpus.forget])),
        "flags": _flags(encoder, {name: scores[name] for name in corpus.utility}, corpus.utility),
        "muse": _muse_or_why_not(model, encoder, corpus, scores, measures),
        "distance": None if oracle is None else _distance(model, oracle, encoder, corpus),
        "perplexity": None if text is None else asdict(perplexity(model, encoder.tokenizer, text)),
        "pressures": apply(measures.pressures, subject),
    }


def _distance(model: PreTrainedModel, oracle: PreTrainedModel, encoder: Encoder, corpus: Corpus) -> dict[str, Any]:
    found = distance(model, oracle, encoder, [(row.question, row.answer) for row in corpus.forget])
    return {**asdict(found), "means": found.means()}


def _flags(encoder: Encoder, scores: dict[str, Scores], sets: dict[str, EvalSet]) -> list[str]:
    """Of all answers to what should be known, together; by tokens, as one without spaces may go round in circles."""
    answers = [answer for name in scores for answer in scores[name].answers]
    questions = [row.question for name in scores for row in sets[name].rows]
    tokens = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
    vocabulary = next(iter(scores.values())).vocabulary
    return list(
        flags(
            health(answers, questions, tokens),
            all(found.finite for found in scores.values()),
            [found.entropy for found in scores.values()],
            vocabulary,
        )
    )


def _muse_or_why_not(*asked: Any) -> dict[str, Any]:
    """Answers in a script that ROUGE does not count, or longer than the model's room, leave the axes undefined."""
    try:
        return _muse(*asked)
    except ValueError as error:
        return {"verbmem_f": None, "knowmem_f": None, "knowmem_r": None, "error": str(error)}


def _muse(
    model: PreTrainedModel, encoder: Encoder, corpus: Corpus, scores: dict[str, Scores], measures: Measures
) -> dict[str, Any]:
    """MUSE's memorisation axes by question. The continuation of a question is its greedy answer; privacy leakage is
    made of the sets' attacks (bench/figures.py).

    Demo models never saw shots, behind which they lose what they know: they are asked without.
    """
    sets = {"forget": corpus.forget, "retain": corpus.utility["retain"].rows}
    plain = {name: rouge_l(scores[name].answers, [row.answer for row in rows]) for name, rows in sets.items()}
    if measures.demo:
        items = {"verbmem_f": plain["forget"], "knowmem_f": plain["forget"], "knowmem_r": plain["retain"]}
        return {**{name: mean(values) for name, values in items.items()}, "shots": 0, "items": items}
    shots = min(SHOTS, len(corpus.retain) // 2)
    data = muse_from_corpus(corpus, shots, measures.seed)
    asked = {"knowmem_f": (data.forget_qa, data.forget_icl), "knowmem_r": (data.retain_qa, data.retain_icl)}
    shots = min(shots, *(most_shots(encoder, *rows) for rows in asked.values()))
    items = {
        "verbmem_f": plain["forget"],
        **{name: knowledge(model, encoder, *rows, shots, batch_size=64) for name, rows in asked.items()},
    }
    return {**{name: mean(values) for name, values in items.items()}, "shots": shots, "items": items}
