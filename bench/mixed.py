"""Mixed precision beside uniform widths at the same average: which measure of sensitivity is worth its seconds.

Two tables. Quality: a language model trained here, quantized at 4 and at 3 bits a weight, uniformly or with widths that
were allocated by every measure, at random too. Sources: the demo model's sensitivities on text, on what is to be
retained and on what is to be forgotten, and how much the choice of data changes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compress.agreement import agreements
from ..compress.allocate import allocate, threshold, total
from ..compress.checkpoint import load_model, save_model
from ..compress.recipe import Recipe, parse_recipe
from ..compress.sensitivity import MEASURES, Sensitivity, sensitivities
from ..compress.sequential import compress_
from ..compress.spec import BITS, Calibration
from ..compress.walk import fitting_linears
from ..compress.widths import DENSE_WIDTH, code_bits, fused, mixed, sizes, weights
from ..unlearn.calibration import calibration_batches
from ..unlearn.data import Corpus
from ..unlearn.demo import DemoConfig, byte_bpe, demo_tokenizer, train_demo
from ..unlearn.encode import Encoder
from ..unlearn.people import people_corpus
from .perplexity import perplexity
from .ptq_quality import told, trained, windows
from .ptq_recovery import FORGET, PEOPLE
from .texts import texts

PARTS = ("quality", "sources")
QUANTIZERS = ("rtn-w4a16-g64", "gptq-w4a16-g64")
BUDGETS = (4, 3)
RANDOM_SEEDS = (0, 1, 2)
# CPTQuant's own measures, whose threshold rule is beside the program at the average that it comes to.
PAPER = ("cmpq", "pmpq", "tdmpq")
DEFAULT = "tdmpq"  # of `remanence allocate`
SHAPE = DemoConfig(
    vocab_size=1024, hidden_size=128, intermediate_size=384, layers=4, heads=4, kv_heads=2, max_length=256
)
EPOCHS = 6
SEQUENCES, LENGTH = 64, 256
HELD_OUT = 240_000  # characters: recipes differ by a thousandth
WIDTHS = (*BITS, DENSE_WIDTH)
Windows = tuple[list[float], list[int]]  # nats and tokens, by window of held-out text


def run(
    seed: int = 0,
    data_dir: str | None = None,
    methods: tuple[str, ...] = (),
    parts: tuple[str, ...] = PARTS,
    shape: DemoConfig = SHAPE,
    epochs: int = EPOCHS,
) -> tuple[list[dict], list[dict]]:
    """(rows, checks).

    data_dir   a directory with WikiText-2's valid.txt and test.txt; None: the generated people's texts
    methods    measures of sensitivity; all when empty
    parts      of PARTS
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts: {part!r} is not one of {', '.join(PARTS)}")
    for measure in methods:
        if measure not in MEASURES:
            raise ValueError(f"methods: {measure!r} is not one of {', '.join(MEASURES)}")
    learned, held_out = texts(data_dir, more=True)
    rows: list[dict] = []
    checks: list[dict] = []
    if "quality" in parts:
        with tempfile.TemporaryDirectory() as place:
            rows = quality(seed, Path(place), learned, held_out, methods or MEASURES, shape, epochs)
        checks = quality_checks(rows)
    if "sources" in parts:
        rows += sources(seed, learned, methods or MEASURES)
    return rows, checks


def quality(
    seed: int,
    place: Path,
    learned: str,
    held_out: str,
    measures: Sequence[str],
    shape: DemoConfig,
    epochs: int,
    quantizers: Sequence[str] = QUANTIZERS,
    budgets: Sequence[int] = BUDGETS,
) -> list[dict]:
    """A row for the dense model, for every uniform recipe and every mixed one.

    recipe         the quantizer at the uniform width that is the budget
    measure, rule  by which widths were chosen: milp; tied: the same, with one width for layers that engines join;
                   threshold: into 16, 8 and 4, and milp at that: with the average that it comes to as the budget
    layers         how many of each width
    bits           average of codes;  used, allowed: of all layers together;  stored_bits: average with scales
    bytes          of the quantized layers in the file
    perplexity     on held-out text
    over_uniform   that, over the uniform recipe's, minus 1;  noise: the standard error of it
    kl             nats per token, from the dense model's answer to the compressed one's
    measuring_s    of measuring sensitivities, once for all rows of a measure
    """
    tokenizer = byte_bpe(learned.splitlines(), shape.vocab_size)
    held_out = held_out[:HELD_OUT]
    target = place / "model"
    length = min(LENGTH, shape.max_length)
    batches = windows(tokenizer, learned, length, SEQUENCES, seed)
    dense = trained(tokenizer, learned, seed, shape, epochs)
    save_model(dense, tokenizer, target)
    table = _Table(target, dense, tokenizer, held_out, batches, windows(tokenizer, held_out, length, 32, seed))
    rows = [told({"recipe": "dense", **table.judge(dense)[0]})]
    # Sensitivities depend on the grid, which quantizers share.
    found = _measured(dense, measures, batches, table.recipe(quantizers[0], 4), seed)
    for name in quantizers:
        for budget in budgets:
            recipe = table.recipe(name, budget)
            names = [name for name, _ in fitting_linears(dense, recipe)]
            room = budget * weights(dense, recipe)
            uniform, theirs = table.row(recipe, dict.fromkeys(names, budget), "uniform", room)
            rows.append(told(uniform))
            choices = [(by, "milp") for by in found] + [(by, "tied") for by in found if by.label == DEFAULT]
            for by, rule in choices:
                chosen = table.milp(recipe, by, room, rule == "tied")
                row, ours = table.row(recipe, chosen, rule, room, by)
                rows.append(told(row | beside(ours, theirs)))
        rows += [told(row) for by in found if by.label in PAPER for row in table.paper(table.recipe(name, 4), by)]
    return rows


@dataclass(frozen=True)
class _Measured:
    """What a measure says, under which label, and how many seconds it took."""

    label: str
    of: Sensitivity
    seconds: float


def _measured(
    model: PreTrainedModel, measures: Sequence[str], batches: Sequence[Tensor], recipe: Recipe, seed: int
) -> list[_Measured]:
    """Chance is there more than once."""
    found = []
    for measure in measures:
        for drawn in RANDOM_SEEDS if measure == "random" else (0,):
            start = time.perf_counter()
            sensitivity = sensitivities(model, measure, batches, recipe, BITS, seed + drawn)
            label = f"random ({drawn})" if measure == "random" else measure
            found.append(_Measured(label, sensitivity, time.perf_counter() - start))
    return found


@dataclass(frozen=True)
class _Table:
    """What rows are measured with."""

    target: Path
    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: str
    batches: Sequence[Tensor]
    judged: Sequence[Tensor]

    @staticmethod
    def recipe(name: str, bits: int) -> Recipe:
        recipe = parse_recipe(name)
        assert recipe.spec is not None
        return replace(recipe, spec=replace(recipe.spec, bits=bits))

    def milp(self, recipe: Recipe, by: _Measured, room: int, tied: bool = False) -> dict[str, int]:
        groups = fused(self.dense, recipe) if tied else ()
        return allocate(by.of.costs, code_bits(self.dense, recipe, WIDTHS), room, groups, WIDTHS, "bits")

    def paper(self, recipe: Recipe, by: _Measured) -> list[dict]:
        """The threshold rule, and the program with what that comes to as its budget."""
        try:
            chosen = threshold(by.of.scores)
        except ValueError as error:  # scores that do not tell layers apart
            return [{"recipe": recipe.name, "measure": by.label, "rule": "threshold", "reason": str(error)}]
        room = total(chosen, code_bits(self.dense, recipe, WIDTHS))
        return [
            self.row(recipe, chosen, "threshold", room, by)[0],
            self.row(recipe, self.milp(recipe, by, room), "milp at that", room, by)[0],
        ]

    def row(
        self, recipe: Recipe, chosen: Mapping[str, int], rule: str, room: int, by: _Measured | None = None
    ) -> tuple[dict[str, Any], Windows]:
        """Compress, and judge."""
        made, count = mixed(recipe, chosen), weights(self.dense, recipe)
        bits, stored = (total(chosen, of(self.dense, recipe, WIDTHS)) for of in (code_bits, sizes))
        model = compress_(load_model(self.target), made, self.batches if made.calibrated else ())
        judged, by_window = self.judge(model)
        widths = list(chosen.values())
        row = {
            "recipe": recipe.name,
            "measure": "" if by is None else by.label,
            "rule": rule,
            "layers": " ".join(f"{width}:{widths.count(width)}" for width in sorted(set(widths))),
            "bits": bits / count,
            "used": bits,
            "allowed": room,
            "stored_bits": 8 * stored / count,
            "bytes": stored,
            **judged,
            **({} if by is None else {"measuring_s": by.seconds}),
        }
        return row, by_window

    @torch.no_grad()
    def judge(self, model: PreTrainedModel) -> tuple[dict[str, float], Windows]:
        window = self.judged[0].shape[1]
        off = tokens = 0.0
        for ids in self.judged:
            ours, theirs = (of(ids).logits.double().log_softmax(-1) for of in (model, self.dense))
            off += float(kl_div(ours, theirs, reduction="sum", log_target=True))
            tokens += ids.numel()
        found = perplexity(model, self.tokenizer, self.text, window, window // 2)
        return {"perplexity": found.value, "kl": off / tokens}, (found.window_nll, found.window_tokens)


def beside(ours: Windows, theirs: Windows) -> dict[str, float]:
    """Our perplexity over theirs on the same windows, minus 1, and its standard error: windows are paired."""
    counts = np.array(ours[1])
    apart = np.array(ours[0]) - np.array(theirs[0])
    mean = apart.sum() / counts.sum()
    noise = np.sqrt(len(counts) / (len(counts) - 1) * ((apart - mean * counts) ** 2).sum()) / counts.sum()
    return {"over_uniform": float(np.exp(mean) - 1), "noise": float(np.exp(mean) * noise)}


def quality_checks(rows: Sequence[dict]) -> list[dict]:
    """Budgets are kept, and chosen widths beat uniform ones: by the measure that does best, and, as one picked by what
    it is judged by proves little, by the one that is taken where none is asked for."""
    checks = []
    for rule in ("milp", "tied", "milp at that"):
        kept = [row for row in rows if row.get("rule") == rule]
        if kept:
            most = max(row["used"] - row["allowed"] for row in kept)
            what = f"{rule}: bits above the budget, the most of {len(kept)} recipes"
            checks.append({"what": what, "limit": 0, "value": most, "ok": most <= 0})
    for uniform in rows:
        mixtures = [row for row in rows if row["recipe"] == uniform["recipe"] and row.get("rule") == "milp"]
        looked = [row for row in mixtures if not row["measure"].startswith("random")]
        if uniform.get("rule") != "uniform" or not looked:
            continue
        best = min(looked, key=lambda row: row["perplexity"])
        judged = [(best, "perplexity")] + [(row, "kl") for row in looked if row["measure"] == DEFAULT]
        for row, of in judged:
            what = f"{uniform['recipe']}, mixed by {row['measure']}: {of} below the uniform one's"
            checks.append({"what": what, "limit": uniform[of], "value": row[of], "ok": row[of] < uniform[of]})
    return checks


def sources(seed: int, text: str, measures: Sequence[str]) -> list[dict]:
    """`compared` for the demo model, trained here."""
    corpus, config = people_corpus(PEOPLE, FORGET, seed), DemoConfig()
    tokenizer = demo_tokenizer(corpus, config)
    model, _ = train_demo(corpus, config, tokenizer, seed, with_forget=True)
    return compared(model, Encoder(tokenizer, config.max_length), corpus, text, measures, seed)


def compared(
    model: PreTrainedModel, encoder: Encoder, corpus: Corpus, text: str, measures: Sequence[str], seed: int
) -> list[dict]:
    """A row for every measure: rank correlation over layers (Spearman's, 1: the same order) of its scores on two
    sources of data, and the share of layers that get another width at 4 bits from one than from the other."""
    count = len(corpus.forget)
    asked = {
        "text": Calibration(text=count, length=64),
        "retain": Calibration(retain=count),
        "forget": Calibration(forget=count),
    }
    known = {"retain": corpus.retain, "forget": corpus.forget}
    batches = {name: calibration_batches(wanted, encoder, known, text, seed) for name, wanted in asked.items()}
    recipe = parse_recipe(QUANTIZERS[0])
    bits, room = code_bits(model, recipe, WIDTHS), 4 * weights(model, recipe)
    rows = []
    for measure in measures:
        if measure == "random":
            continue
        found = {name: sensitivities(model, measure, data, recipe, BITS, seed) for name, data in batches.items()}
        chosen = {name: allocate(of.costs, bits, room, (), WIDTHS, "bits") for name, of in found.items()}
        row: dict[str, Any] = {"measure": measure, "layers": len(bits)}
        pairs = agreements({name: of.scores for name, of in found.items()}, chosen)
        row |= {f"{a}_{b}": pair.rank_correlation for (a, b), pair in pairs.items()}
        row |= {f"{a}_{b}_other_width": pair.other_width for (a, b), pair in pairs.items()}
        rows.append(told(row))
    return rows
