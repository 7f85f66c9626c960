"""What retraining gives back to a pruned language model, by pruner, by sparsity and by what is retrained.

The model is OPT's architecture, which has every group that there is: biases, LayerNorms with both parameters, a head
that is made apart from the embedding. It is trained here, pruned, and retrained on the text that it was trained on. Its
features start with scales that differ, as those of large models come to do: what Wanda looks at beyond magnitudes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compress.recipe import parse_recipe
from ..compress.retrain import masks_of, retrain_
from ..compress.sequential import compress_
from ..compress.spec import Retrain
from ..compress.walk import linears, weight_of
from ..unlearn.demo import DemoConfig, byte_bpe
from .perplexity import perplexity
from .ptq_quality import HELD_OUT, told, trained, windows

SHAPE = DemoConfig(
    arch="opt", vocab_size=1024, hidden_size=128, intermediate_size=512, layers=4, heads=4, kv_heads=4, max_length=256
)
# Of the logarithm of the norms' gains: the largest of 128 is about 12 times the median.
GAINS = 1.0
PRUNERS = ("random", "magnitude", "wanda", "sparsegpt")
LEVELS = ("s50", "s60", "s70", "2:4")
# What PERP's authors retrain, at every level; each group by itself where differences are large.
PERP = "bias|norm|mask_lora"
GROUPS = ("bias", "norm", "bias|norm", "head", "embeddings", "mask_lora", "scale_lora", "lora", PERP, "all")
RECONSTRUCTED = tuple((groups, by) for by in ("block", "sublayer") for groups in (PERP, "all"))
APART = "wanda-s70"
# The pruners that are retrained at every level, and whose order is known from their papers.
ORDER = ("sparsegpt", "wanda", "magnitude")
# By what helps, on another model and text than the table's: few parameters bear a higher rate.
RATE = 3e-3
RATES = {"bias": 1e-2, "norm": 1e-2, "bias|norm": 1e-2, "all": 1e-3}
RANK = 16  # the authors', and as they do scaled by 2
STEPS, BATCH = 200, 8
EPOCHS = 6
SEQUENCES, LENGTH = 128, 256  # of the data to prune on, and to reconstruct on; retraining sees all that was learned


def knobs(groups: str, by: str = "loss", **more: Any) -> Retrain:
    """How the benchmark retrains these groups."""
    given: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "learning_rate": RATES.get(groups, RATE)}
    given |= {"rank": RANK, "alpha": 2.0 * RANK}
    return Retrain(groups, by, **(given | more))


def run(
    seed: int,
    learned: str,
    held_out: str,
    pruners: Sequence[str] = PRUNERS,
    levels: Sequence[str] = LEVELS,
    groups: Sequence[str] = GROUPS,
    apart: str = APART,
    shape: DemoConfig = SHAPE,
    epochs: int = EPOCHS,
    steps: int = STEPS,
) -> tuple[list[dict], list[dict]]:
    """(rows, checks). A row is one pruned model, or one that was retrained.

    retrained    groups; before them "block: " or "sublayer: ": by reconstruction; "": as it was pruned
    perplexity   on held-out text
    gap_closed   (pruned - retrained) / (pruned - dense), of perplexities; above 1 where training on helps more than
                 pruning hurt, which the dense model, trained on as long, shows
    trained      share of the model's parameters
    zeros        whether exactly the masked weights are zero
    peak_mib     of tensors while it was retrained
    """
    for name in pruners:
        if name not in PRUNERS:
            raise ValueError(f"methods: {name!r} is not one of {', '.join(PRUNERS)}")
    tokenizer = byte_bpe(learned.splitlines(), shape.vocab_size)
    held_out = held_out[:HELD_OUT]
    dense = untied_(trained(tokenizer, learned, seed, shape, epochs, GAINS))
    length = min(LENGTH, shape.max_length)
    some, every = (windows(tokenizer, learned, length, count, seed) for count in (SEQUENCES, len(learned)))
    made = _Made(dense, tokenizer, held_out, some, every, length, steps, seed)
    rows = list(made.dense_rows())
    for level in levels:
        for pruner in pruners:
            name = f"{pruner}-{level}"
            wanted = [(PERP, "loss")] if pruner in ORDER else []
            if name == apart:
                wanted = [(chosen, "loss") for chosen in groups] + list(RECONSTRUCTED)
            rows += made.rows(name, wanted)
    return rows, checks(rows)


def untied_(model: PreTrainedModel) -> PreTrainedModel:
    """The same function, its head's weights apart from the embedding's: each can be trained, and the head be kept."""
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model


@dataclass
class _Made:
    """The dense model, and what is made of it. some, every: of the windows of text that it has learned from."""

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: str
    some: list[Tensor]
    every: list[Tensor]
    length: int
    steps: int
    seed: int

    def __post_init__(self) -> None:
        self.best = self.perplexity(self.dense)

    def perplexity(self, model: PreTrainedModel) -> float:
        return perplexity(model, self.tokenizer, self.text, self.length, self.length // 2).value

    def dense_rows(self) -> Iterator[dict]:
        """The dense model, and trained on as pruned ones are."""
        yield told({"recipe": "dense", "retrained": "", "perplexity": self.best})
        model = copy.deepcopy(self.dense)
        found = retrain_(model, knobs("all", steps=self.steps, seed=self.seed), {}, self.every)
        row = {"recipe": "dense", "retrained": "all", "perplexity": self.perplexity(model), "seconds": found.seconds}
        yield told(row)

    def rows(self, name: str, wanted: Sequence[tuple[str, str]]) -> list[dict]:
        """Of one pruned model: as it is, and retrained in every way that is wanted."""
        recipe = parse_recipe(name)
        pruned = compress_(copy.deepcopy(self.dense), recipe, self.some if recipe.calibrated else ())
        masks = masks_of(pruned, recipe)
        worst = self.perplexity(pruned)
        row = {"recipe": name, "retrained": "", "perplexity": worst, "sparsity": _sparsity(pruned)}
        rows = [told(row)]
        for groups, by in wanted:
            model = copy.deepcopy(pruned)
            # Reconstruction keeps what flows between blocks.
            dense, batches = (None, self.every) if by == "loss" else (self.dense, self.some)
            found = retrain_(model, knobs(groups, by, steps=self.steps, seed=self.seed), masks, batches, dense)
            value = self.perplexity(model)
            row = {
                "recipe": name,
                "retrained": groups if by == "loss" else f"{by}: {groups}",
                "perplexity": value,
                "gap_closed": (worst - value) / (worst - self.best),
                "trained": found.trained / found.parameters,
                "zeros": zeros_are(model, masks),
                "seconds": found.seconds,
                "peak_mib": found.peak_bytes / 2**20,
            }
            rows.append(told(row))
        return rows


def zeros_are(model: PreTrainedModel, masks: dict[str, Tensor]) -> bool:
    """Whether exactly the masked weights of the layers of these names are zero."""
    layers = dict(linears(model, ()))
    return all(torch.equal(weight_of(layers[name]) != 0, mask) for name, mask in masks.items())


def _sparsity(model: PreTrainedModel) -> float:
    """Share of zeros in the linear layers but the head."""
    weights = [layer.weight for _, layer in linears(model, ("lm_head",))]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def checks(rows: Sequence[dict]) -> list[dict]:
    """Of the rows that are there."""
    pruned = {row["recipe"]: row["perplexity"] for row in rows if not row["retrained"]}
    found = []
    for level in ("s60", "s70"):
        for better, worse in itertools.pairwise(ORDER):
            names = f"{better}-{level}", f"{worse}-{level}"
            if all(name in pruned for name in names):
                value, limit = (pruned[name] for name in names)
                what = f"{names[0]}: perplexity at most that of {worse}, not retrained"
                found.append({"what": what, "limit": limit, "value": value, "ok": value <= limit})
    for row in rows:
        if row["retrained"] == PERP and row["recipe"] != "dense":
            value = row["gap_closed"]
            what = f"{row['recipe']}: share of the gap that {PERP} closes"
            found.append({"what": what, "limit": "> 0.5", "value": value, "ok": value > 0.5})
    zeros = [row["zeros"] for row in rows if "zeros" in row]
    if zeros:
        what = "retrained models: exactly the masked weights are zero"
        found.append({"what": what, "limit": len(zeros), "value": sum(zeros), "ok": all(zeros)})
    return found
