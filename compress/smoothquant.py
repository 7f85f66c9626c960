"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): difficulty moves from activations to weights.

Equation 4: s_k = max|x_k|^alpha / max|w_k|^(1 - alpha) over all weights that read channel k. Inputs are divided by s in
the norm before them, weights are multiplied by it, then rounded to nearest. Logarithmic equalization (FPTQ, arXiv
2308.15987, section 3.3) has s_k = max|x_k| / log2(2 + max|x_k|) instead, whatever the weights: ranges become their
logarithms. A layer with no norm in front stays as it is (down_proj, whose inputs have the largest outliers of all): the
paper smooths behind norms only. With activations left in 16 bits this makes rounding harder, not easier; it is what
8-bit activations stand on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block import Block, Solved
from .knobs import RTN, SmoothQuant
from .recipe import Recipe
from .rtn import rtn
from .sites import Site, observe, sites
from .smooth import fold_, survey
from .walk import storage_dtype, weight_of

# Least s and least max|w|, as the authors' code has it.
_LEAST = 1e-5


@torch.no_grad()
def solve(block: Block, recipe: Recipe) -> dict[str, Solved]:
    """Quantize the block's linear layers; scales are folded into the dense block, in place."""
    specs = block.specs(recipe)
    found, refused = survey(block)
    behind_norms = [pair for pair in found if pair.form != "linear"]
    inputs, _ = observe(block)
    factors: dict[str, Tensor] = {}
    for place in sites(block, behind_norms):
        if place.pair is not None:
            s = smoothing([inputs[name].peak for name in place.linears if name in inputs], place, recipe.options)
            fold_(place.pair, s)
            factors |= dict.fromkeys(place.linears, s)
    solved = {}
    for name, layer in block.linears.items():
        weight = weight_of(layer)
        q = rtn(weight, specs[name], storage_dtype(weight), RTN(recipe.options.scale, recipe.options.clip))
        s = factors.get(name, torch.ones(1, device=weight.device))
        error = inputs[name].error(weight.float() / s, q.dequantize() / s) if name in inputs else None
        note = f"not smoothed {refused[name]}" if name in refused else ""
        solved[name] = Solved(q, error, note=note if name in inputs else "0 tokens: rounded to nearest")
    return solved


def smoothing(peaks: list[Tensor], place: Site, options: SmoothQuant) -> Tensor:
    """s [K] float32 from max|x| of the site's inputs [K] each and the weights of its layers. A channel that is zero in
    all calibration data keeps s = 1: the formula would give it the least s, and round its weights away."""
    x = torch.stack(peaks).amax(0)
    if options.equalization == "log":
        s = x / (2 + x).log2()
    else:
        w = torch.stack([weight_of(layer).float().abs().amax(0) for layer in place.linears.values()]).amax(0)
        s = x.pow(options.alpha) / w.clamp(min=_LEAST).pow(1 - options.alpha)
    return torch.where(x > 0, s.clamp(min=_LEAST), torch.ones_like(s))
