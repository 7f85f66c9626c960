"""What is settled about a layer's input when calibration data is there: its static grid, its clip, or 8 bits instead.

The weight's rounding is done when this begins. What is measured is the input's alone: |(x - Q(x)) W^T|^2 / |x W^T|^2 on
the rows that the layer sees in the model compressed so far, W the quantized weight. Massive activations in front of
down_proj and fc2, which no norm tames, show there (Sun et al. 2024, arXiv 2402.17762).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.ops import quantize_per_token
from ..kernels.reference import quantize_with
from .block import Block, Solved
from .sites import spread
from .spec import ActivationSpec

# Rows of each layer's input that errors are measured on.
_ROWS = 512
_CLIPS = tuple(1 - i / 20 for i in range(11))  # 1, 0.95 .. 0.5


@dataclass(frozen=True)
class Rounding:
    """How one layer's input is rounded, and what it costs.

    activation   bits, grid and clip as they were settled
    static       scale float32 [1] and zero int32 [1] of a static grid; else None
    error        relative squared error of the layer's output, of the input's rounding alone; None without data
    note         what is not as the recipe says
    """

    activation: ActivationSpec
    static: tuple[Tensor, Tensor] | None = None
    error: float | None = None
    note: str = ""


def quantize_rows(x: Tensor, activation: ActivationSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [..., K] -> codes int8 [..., K], scale float32 [..., 1], zero int32 [..., 1], None in a symmetric grid."""
    codes, scale, zero = quantize_per_token(x, activation.bits, activation.grid, activation.clip)
    return codes, scale, None if activation.symmetric else zero


def fake_quantize(x: Tensor, activation: ActivationSpec, static: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x [..., K] as the integer path sees it, in x's dtype: row by row, or on the static grid (scale [1], zero [1])."""
    if static is None:
        codes, scale, zero = quantize_per_token(x, activation.bits, activation.grid, activation.clip)
    else:
        (scale, zero), codes = static, quantize_with(x, *static, activation.bits)
    return ((codes - zero).float() * scale).to(x.dtype)


@torch.no_grad()
def settle(block: Block, wanted: ActivationSpec, solved: Mapping[str, Solved]) -> dict[str, Rounding]:
    """The rounding of every layer's input in a block whose weights are solved and not replaced yet."""
    rows, low, high = _observe(block, list(solved))
    found = {}
    for name, part in solved.items():
        if name not in rows:
            found[name] = Rounding(without_data(wanted), note="its input was never seen: rounded token by token")
            continue
        x, weight = rows[name].float(), part.q.dequantize()
        if part.transform is not None:
            x = part.transform(x)
        asked = wanted if part.clip is None else replace(wanted, clip=part.clip, search=False)
        made = _settled(x, weight, asked, low[name], high[name])
        if wanted.fallback is not None and wanted.bits < 8 and made.error is not None and made.error > wanted.fallback:
            eight = _settled(x, weight, replace(asked, bits=8, fallback=None), low[name], high[name])
            note = f"input in 8 bits: error {made.error:.2g} in {wanted.bits}"
            made = replace(eight, note=", ".join(filter(None, [note, eight.note])))
        found[name] = made
    return found


def without_data(wanted: ActivationSpec) -> ActivationSpec:
    """The same as far as it can be had without data: a grid per token, no search."""
    return replace(wanted, dynamic=True, search=False, fallback=None)


def _settled(x: Tensor, weight: Tensor, wanted: ActivationSpec, low: float, high: float) -> Rounding:
    tried = []
    for clip in _CLIPS if wanted.search else (wanted.clip,):
        activation = replace(wanted, clip=clip, search=False, fallback=None)
        static = None if wanted.dynamic else static_grid(low, high, activation, x.device)
        # A static clip is in the grid.
        kept = activation if static is None else replace(activation, clip=1.0)
        tried.append(Rounding(kept, static, _error(x, weight, activation, static), f"clip {clip:g}"))
    best = min(tried, key=lambda found: found.error or 0.0)
    return best if wanted.search else replace(best, note="")


def static_grid(low: float, high: float, activation: ActivationSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale float32 [1] and zero int32 [1] for inputs from `low` to `high`, as quantize_per_token makes them."""
    row = torch.tensor([[low, high]], device=device)
    _, scale, zero = quantize_per_token(row, activation.bits, activation.grid, activation.clip)
    return scale[0], zero[0]


def _error(x: Tensor, weight: Tensor, activation: ActivationSpec, static: tuple[Tensor, Tensor] | None) -> float:
    size = float((x @ weight.T).square().sum())
    off = float(((fake_quantize(x, activation, static) - x) @ weight.T).square().sum())
    return off / size if size else 0.0


def _observe(block: Block, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
    """Some rows [n, K] that each layer sees, and the least and the largest of all it sees."""
    kept: dict[str, list[Tensor]] = {}
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for seen in block.inputs(names):
        for name, x in seen.items():
            if not len(x):
                continue
            kept.setdefault(name, []).append(spread(x, -(-_ROWS // len(block))).clone())
            least, most = (float(value) for value in x.aminmax())
            low[name], high[name] = min(least, low.get(name, least)), max(most, high.get(name, most))
    return {name: torch.cat(rows) for name, rows in kept.items()}, low, high
