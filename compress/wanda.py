"""Wanda: weights go by their size times the norm of their input, and no other changes (Sun et al. 2023, arXiv
2306.11695, equation 1).

All of a block's layers are looked at in one pass, as they are before any of them is pruned; later blocks see what comes
out of it afterwards. By default, as in the paper, the weights of one output are compared with each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .block import Block
from .experts import starved
from .prune import Pruned, kept, prune, zeros_note
from .sites import ROWS, spread
from .spec import PruneSpec
from .walk import data_free_prune, put_weight_, weight_of


@dataclass
class Inputs:
    """What is known of one input [n, K] over all calibration data.

    tokens    n
    squares   [K] float64, sum of x^2
    sample    rows of it, about ROWS of them
    """

    tokens: int
    squares: Tensor
    sample: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, keep: int) -> None:
        """Rows x [n, K], of which `keep` go into the sample."""
        if not len(x):
            return
        self.tokens += len(x)
        self.squares += x.float().square().sum(0).double()
        self.sample.append(spread(x, keep).clone())

    @property
    def norm(self) -> Tensor:
        """[K] float32."""
        return self.squares.sqrt().float()

    def error(self, weight: Tensor, off: Tensor) -> float:
        """|x D^T|^2 / |x W^T|^2 on the sample, for W and D = W - W_hat [N, K]."""
        x = torch.cat(self.sample).float()
        size = float((x @ weight.float().T).square().sum())
        return float((x @ off.float().T).square().sum()) / size if size else 0.0


@torch.no_grad()
def prune_block_(block: Block, spec: PruneSpec) -> dict[str, Pruned]:
    """Prune the block's linear layers in place; errors are of their outputs, on what the dense block gives them.

    Layers that saw too few tokens are pruned by magnitude, and say so. ValueError names the layer.
    """
    seen = observe(block)
    found = {}
    for name, layer in block.linears.items():
        weight, inputs, full = weight_of(layer), seen.get(name), f"{block.name}.{name}"
        tokens = 0 if inputs is None else inputs.tokens
        notes = []
        try:
            if inputs is None or starved(tokens, weight.shape[1]):
                new = prune(full, weight, data_free_prune(spec))
                notes.append(f"{tokens} tokens: by magnitude")
            else:
                new = weight.masked_fill(~kept(full, weight, spec, inputs.norm), 0)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        lost = None if inputs is None else inputs.error(weight, weight - new)
        put_weight_(layer, new)
        found[name] = Pruned(lost, zeros_note(new, *notes))
    return found


def observe(block: Block) -> dict[str, Inputs]:
    """What the block's linear layers are given, in one pass over all data; layers that share an input share this. One
    that is never run (an expert without tokens) is left out."""
    known: dict[str, Inputs] = {}
    for batch in block.inputs(list(block.linears)):
        first: dict[tuple[int, torch.Size], str] = {}
        for name, x in batch.items():
            other = first.setdefault((x.data_ptr(), x.shape), name)
            if other != name:
                known[name] = known[other]
                continue
            if name not in known:
                known[name] = Inputs(0, torch.zeros(x.shape[1], dtype=torch.float64, device=x.device))
            if len(x):
                known[name].add(x, -(-ROWS // len(block)))
    return {name: inputs for name, inputs in known.items() if inputs.tokens}
