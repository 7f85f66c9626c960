"""FlatQuant (Sun et al. 2024, arXiv 2410.09426): a learned map makes inputs and weights flat before both are rounded.

    y = Q(x diag(1/c) P) Q(P^-1 diag(c) W^T),    P = P1 (x) P2

for every input that linear layers share (kronecker.py). Learned are P1, P2 and c, which share of each token's range is
kept (one number an input), and which share of a weight's ranges (one an output channel). All follow the gradient of one
objective: the squared difference between the outputs of a decoder block in which everything is rounded and of the dense
one, on the same inputs. Gradients pass through rounding unchanged (straight-through); those of a step are LSQ's (Esser
et al. 2019, arXiv 1902.08153).

P starts as a flat rotation, where the paper has any orthogonal matrix: outliers are spread from the first step on. The
map stays in front of the layer at run time, which then multiplies with W' = W diag(c) P^-T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .activations import fake_quantize, quantize_rows, without_data
from .block import Block, Linear, Solved
from .experts import starved
from .grid import encode, group_parameters
from .knobs import RTN, FlatQuant, SmoothQuant
from .kronecker import Kronecker, factors, fold, transform
from .recipe import Recipe
from .rtn import QTensor, rtn
from .sites import Rows, Site, observe
from .smoothquant import smoothing
from .spec import ActivationSpec, QuantSpec
from .walk import storage_dtype, weight_of

# The authors' values: all shares start at sigmoid(4) = 0.98 and c where SmoothQuant with this alpha has it; rates fall
# to a thousandth along a cosine, and the shares' are ten times the others'.
START, ALPHA, LEAST_RATE, SHARE_RATE = 4.0, 0.3, 1e-3, 10.0
# Times that all calibration data is looked at to see whether the maps are the best so far.
_LOOKS = 4

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Grids:
    """What each layer's weights are rounded to, by a `scale` as grid.group_parameters has it; and inputs (None: not at
    all)."""

    specs: Mapping[str, QuantSpec]
    scale: str
    activation: ActivationSpec | None


@dataclass(frozen=True)
class Rounded:
    """One layer as it will run: the map of its input, how that is rounded (None: not at all), and the weights."""

    q: QTensor
    transform: Kronecker | None
    activation: ActivationSpec | None

    def rounded_input(self, x: Tensor) -> Tensor:
        """What the weights are multiplied with, for x [..., K]."""
        x = x if self.transform is None else self.transform(x)
        return x if self.activation is None else fake_quantize(x, self.activation)


@dataclass(frozen=True)
class Learned:
    """layers   by name: the best found, all with a transform or none, but for those with too few tokens
    before, after   mean squared difference of the block's outputs over all calibration data: rounded to nearest without
                    transforms, and with `layers`; after <= before
    tokens   by name: rows that the layer saw. With too few of them it is rounded to nearest
    inputs   by name: what the dense block's layers are given; one that is never run is left out
    """

    layers: dict[str, Rounded]
    before: float
    after: float
    tokens: dict[str, int]
    inputs: dict[str, Rows]


def solve(block: Block, recipe: Recipe) -> dict[str, Solved]:
    """Every linear layer of the block, with the map of its input; the block's weights are left as they were.

    Layers that share an input get equal copies of one map, so that each can be stored and moved by itself. Errors are
    those of outputs with inputs rounded too, on about sites.ROWS rows.
    """
    found = learn(block, Grids(block.specs(recipe), recipe.options.scale, recipe.activation), recipe.options)
    solved = {}
    for name, layer in found.layers.items():
        note, clip = "", None
        if layer.transform is not None:
            clip = None if layer.activation is None else layer.activation.clip
        elif starved(found.tokens[name], layer.q.codes.shape[1]):
            note = f"{found.tokens[name]} tokens: rounded to nearest"
        else:
            note = "no transform is better: rounded to nearest"
        rows = found.inputs.get(name)
        error = None if rows is None else output_error(block.linears[name], layer, rows)
        solved[name] = Solved(layer.q, error, note=note, transform=layer.transform, clip=clip)
    return solved


def learn(block: Block, grids: Grids, options: FlatQuant) -> Learned:
    """Quantize the linear layers of `block` and their inputs, all at once.

    Every step sees whole batches of the calibration data, as many as make up options.batch sequences. The same data and
    seed give the same result. Memory: the dense block's outputs on all batches, in the hidden states' dtype; some 40
    bytes for each weight of the block; and what a step's backward pass through the block keeps.
    Raises ValueError for static activation scales, for a layer with a transform in front of it (rotation.py), and for
    a learning rate at which numbers are no longer finite.
    """
    if grids.activation is not None:
        if not grids.activation.dynamic:
            raise ValueError("a_dynamic: False does not go with FlatQuant; its scales are made token by token")
        grids = replace(grids, activation=without_data(grids.activation))
    for name, layer in block.linears.items():
        if getattr(layer, "transform", None) is not None:
            raise ValueError(f"r_online: {name} has a transform in front of it already; FlatQuant learns its own")
    inputs, _ = observe(block)
    tokens = {name: inputs[name].tokens if name in inputs else 0 for name in block.linears}
    with torch.no_grad():
        targets = [block.forward(i) for i in range(len(block))]
        start = {name: _nearest(name, layer, grids) for name, layer in block.linears.items()}
    best, least = start, objective(block, start, targets)
    before = least
    shared = shared_inputs(block, inputs, grids, options.seed)
    if not before or not shared:
        return Learned(start, before, before, tokens, inputs)
    learned = {name for one in shared for name in one.weights}
    fixed = {name: _fixed(block, name, layer) for name, layer in start.items() if name not in learned}
    steps = _steps([target.shape[0] for target in targets], options)
    looks = {round(len(steps) * (i + 1) / _LOOKS) for i in range(_LOOKS)}
    optimizer, schedule = _optimizer(shared, options.learning_rate, len(steps))
    try:
        for step, picked in enumerate(steps):
            optimizer.zero_grad()
            descend(block, shared, fixed, [(i, targets[i]) for i in picked])
            optimizer.step()
            schedule.step()
            if step + 1 in looks:
                now = start | {name: layer for one in shared for name, layer in one.rounded().items()}
                error = objective(block, now, targets)
                if error < least:
                    best, least = now, error
    except ValueError as reason:
        raise ValueError(f"learning_rate: {options.learning_rate:g}: {reason}; expected a smaller one") from None
    return Learned(best, before, least, tokens, inputs)


def descend(
    block: Block, shared: Sequence[Shared], fixed: Mapping[str, Forward], aim: list[tuple[int, Tensor]]
) -> float:
    """Add to the gradients of all that is learned those of the block's squared error; returns that.

    fixed   layer -> its forward, of those that learn nothing
    aim     batches, each with the dense block's output
    The error is taken in units of itself, so that no batch outweighs the others; the root of the number of values
    keeps what flows back in the range of float16, and Adam does not see a common factor.
    Raises ValueError for an error that is not finite.
    """
    parameters = [parameter for one in shared for parameter in one.parameters()]
    with torch.enable_grad():
        forwards = {name: forward for one in shared for name, forward in one.forwards(block).items()}
        with _in_place(block, {**fixed, **forwards}):
            errors = [(block.forward(i).float() - target.float()).square().sum() for i, target in aim]
        error = torch.stack(errors).sum()
        if not torch.isfinite(error):
            raise ValueError(f"the block's error is {float(error)}")
        unit = error.detach().clamp(min=torch.finfo(error.dtype).tiny) / sum(target.numel() for _, target in aim) ** 0.5
        (error / unit).backward(inputs=parameters)
    return error.item()


class Shared(nn.Module):
    """What is learned about one input x [..., K] and the linear layers that read it.

    left [n1, n1], right [n2, n2]   P = left (x) right
    log_scale [K]   log c
    clip []         its sigmoid is the share of each token's range that is kept
    cuts            [N] for each layer: the same for weights
    """

    def __init__(self, layers: dict[str, Linear], rows: Rows, grids: Grids, generator: torch.Generator) -> None:
        super().__init__()
        device = rows.peak.device
        self.grids = grids
        self.scale_dtypes = {name: storage_dtype(layer.weight) for name, layer in layers.items()}
        self.weights = {name: weight_of(layer).detach().float() for name, layer in layers.items()}
        n1, n2 = factors(len(rows.peak))
        self.left = nn.Parameter(flat_rotation(n1, generator).to(device))
        self.right = nn.Parameter(flat_rotation(n2, generator).to(device))
        log_scale = smoothing([rows.peak], Site(layers, None, ""), SmoothQuant(ALPHA)).detach().log()
        self.log_scale = nn.Parameter(log_scale - log_scale.mean())  # W' is about as large as W
        self.clip = nn.Parameter(torch.tensor(START, device=device))
        self.cuts = nn.ParameterList(torch.full((len(w),), START, device=device) for w in self.weights.values())

    def rounded_input(self, x: Tensor) -> Tensor:
        """As Rounded.rounded_input, with gradients to x, left, right, log_scale and clip."""
        x = transform(x, self.left, self.right, self.log_scale.exp())
        return x if self.grids.activation is None else round_rows(x, self.grids.activation, self.clip.sigmoid())

    def rounded_weight(self, name: str) -> Tensor:
        """What the integers of W' stand for [N, K] float32, with gradients to left, right, log_scale and its cuts."""
        w = fold(self.weights[name], self.left, self.right, self.log_scale.exp())
        share = self.cuts[list(self.weights).index(name)].sigmoid()
        with torch.no_grad():
            q = cut_and_round(w, share, self.grids.specs[name], self.grids.scale, self.scale_dtypes[name])
        groups = w.view(*q.scale.shape, -1)  # [N, n, G]
        hard, step = q.dequantize().view_as(groups), q.scale.float()[:, :, None]
        return straight_through(groups, hard, step, share[:, None, None] * _range(groups, q.zero is None)).flatten(1)

    def forwards(self, block: Block) -> dict[str, Forward]:
        """Layer -> what stands in for its forward. An input that several layers are given is rounded once."""
        last: list[Tensor] = []

        def once(x: Tensor) -> Tensor:
            if not last or last[0] is not x:
                last[:] = x, self.rounded_input(x)
            return last[1]

        return {name: _product(once, self.rounded_weight(name), block.linears[name].bias) for name in self.weights}

    @torch.no_grad()
    def rounded(self) -> dict[str, Rounded]:
        """The layers as they will run: W' is computed in float64, from the map as it is stored."""
        activation = self.grids.activation
        if activation is not None:
            activation = replace(activation, clip=self.clip.sigmoid().item())
        found = {}
        for (name, weight), cut in zip(self.weights.items(), self.cuts):
            made = Kronecker(self.left.detach().clone(), self.right.detach().clone(), self.log_scale.exp())
            w = made.fold(weight).float()
            q = cut_and_round(w, cut.sigmoid(), self.grids.specs[name], self.grids.scale, self.scale_dtypes[name])
            found[name] = Rounded(q, made, activation)
        return found


def shared_inputs(block: Block, inputs: Mapping[str, Rows], grids: Grids, seed: int) -> list[Shared]:
    """One for each input of the block's linear layers, but those of which too few rows are seen."""
    generator = torch.Generator().manual_seed(seed)
    readers: dict[int, dict[str, Linear]] = {}
    for name, layer in block.linears.items():
        if name in inputs and not starved(inputs[name].tokens, len(inputs[name].peak)):
            readers.setdefault(id(inputs[name]), {})[name] = layer
    return [Shared(layers, inputs[next(iter(layers))], grids, generator) for layers in readers.values()]


def flat_rotation(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [n, n] float32 without an entry beyond sqrt(2 / n): random signs, then the discrete Hartley
    transform, which there is for every n."""
    at = torch.arange(n, dtype=torch.float64)
    angles = at[:, None] * at % n * (2 * math.pi / n)
    signs = 2 * torch.randint(0, 2, (n, 1), generator=generator) - 1
    return (signs * (angles.cos() + angles.sin()) / n**0.5).float()


def cut_and_round(w: Tensor, share: Tensor, spec: QuantSpec, scale: str, scale_dtype: torch.dtype) -> QTensor:
    """w [N, K] float32 rounded to nearest, on grids for the share [N] of each group's range."""
    groups = w.view(len(w), spec.groups(w.shape[1]), -1)
    s, zero = group_parameters(groups * share[:, None, None], spec, scale_dtype, scale)
    return QTensor(encode(groups, s, zero, spec.bits).flatten(1), s, spec, zero)


def round_rows(x: Tensor, spec: ActivationSpec, share: Tensor) -> Tensor:
    """fake_quantize of x [..., K] with the share [] of each row's range, and gradients to x and share."""
    wide = x.float()
    with torch.no_grad():
        codes, step, zero = quantize_rows(x, replace(spec, clip=share.item()))
        hard = (codes.float() - (0 if zero is None else zero)) * step
    return straight_through(wide, hard, step, share * _range(wide, spec.symmetric)).to(x.dtype)


def straight_through(x: Tensor, hard: Tensor, step: Tensor, size: Tensor) -> Tensor:
    """`hard`, which x is rounded to, with gradients to x and to `size`, which its steps are in proportion to.

    x, hard [..., G]; step, size [..., 1]. With S = size over its own value (so S = 1): x + (hard - x) S where x is on
    the grid, hard S where it is cut off.
    """
    # On the grid x is off by half a step, and a little more as the step is rounded to its dtype.
    kept = torch.where((x - hard).detach().abs() <= 0.501 * step.abs(), x, 0.0)
    soft = kept + (hard - kept.detach()) * (size / size.detach().clamp(min=torch.finfo(size.dtype).tiny))
    return hard + (soft - soft.detach())


def _range(x: Tensor, symmetric: bool) -> Tensor:
    """[..., 1]: what the step of x [..., G] is in proportion to."""
    if symmetric:
        return x.abs().amax(-1, keepdim=True)
    return x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)


@torch.no_grad()
def objective(block: Block, layers: Mapping[str, Rounded], targets: Sequence[Tensor]) -> float:
    """Mean squared difference from `targets` of the block's outputs with `layers` in place of its own."""
    error, count = 0.0, 0
    with _in_place(block, {name: forward_of(block, name, layer) for name, layer in layers.items()}):
        for i, target in enumerate(targets):
            error += float((block.forward(i).float() - target.float()).square().sum(dtype=torch.float64))
            count += target.numel()
    return error / count


@torch.no_grad()
def output_error(module: Linear, layer: Rounded, rows: Rows) -> float:
    """|x W^T - y|^2 / |x W^T|^2 for the sampled rows x, and y what the layer as it will run makes of them."""
    x, weight = torch.cat(rows.sample), weight_of(module).float()
    exact = x.float() @ weight.T
    off = layer.rounded_input(x).float() @ layer.q.dequantize().T - exact
    size = float(exact.square().sum())
    return float(off.square().sum()) / size if size else 0.0


def forward_of(block: Block, name: str, layer: Rounded) -> Forward:
    """What stands in for the forward of the block's layer `name`."""
    return _product(layer.rounded_input, layer.q.dequantize(), block.linears[name].bias)


def _fixed(block: Block, name: str, layer: Rounded) -> Forward:
    """As forward_of for a layer without a transform, but gradients pass through it."""
    activation = layer.activation
    if activation is None:
        return forward_of(block, name, layer)
    share = torch.tensor(activation.clip, device=block.device)
    return _product(lambda x: round_rows(x, activation, share), layer.q.dequantize(), block.linears[name].bias)


def _product(rounded_input: Forward, weight: Tensor, bias: Tensor | None) -> Forward:
    return lambda x: linear(rounded_input(x), weight.to(x.dtype), bias)


@contextmanager
def _in_place(block: Block, forwards: Mapping[str, Forward]) -> Iterator[None]:
    """The block with these in place of its linear layers' own forward."""
    # There is one in an instance where something else (accelerate) has replaced the class's.
    own = {name: vars(block.linears[name]).get("forward") for name in forwards}
    try:
        for name, forward in forwards.items():
            vars(block.linears[name])["forward"] = forward
        yield
    finally:
        for name, before in own.items():
            vars(block.linears[name]).pop("forward", None)
            if before is not None:
                vars(block.linears[name])["forward"] = before


def _nearest(name: str, layer: Linear, grids: Grids) -> Rounded:
    weight = weight_of(layer).detach()
    q = rtn(weight, grids.specs[name], storage_dtype(weight), RTN(scale=grids.scale))
    return Rounded(q, None, grids.activation)


def _optimizer(
    shared: Sequence[Shared], rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    maps = [parameter for one in shared for parameter in (one.left, one.right, one.log_scale)]
    shares = [parameter for one in shared for parameter in (one.clip, *one.cuts)]
    groups = [{"params": maps, "lr": rate}, {"params": shares, "lr": SHARE_RATE * rate}]
    # No decay: towards zero a map has no inverse, and half of every range is cut.
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def cosine(step: int) -> float:
        return LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)


def _steps(sizes: Sequence[int], options: FlatQuant) -> list[list[int]]:
    """Batches (of `sizes` sequences) for each step, at least options.batch sequences of them where an epoch has them
    left; every epoch in a new order."""
    generator = torch.Generator().manual_seed(options.seed)
    steps: list[list[int]] = []
    for _ in range(options.epochs):
        picked: list[int] = []
        for i in torch.randperm(len(sizes), generator=generator).tolist():
            picked.append(i)
            if sum(sizes[j] for j in picked) >= options.batch:
                steps.append(picked)
                picked = []
        if picked:
            steps.append(picked)
    return steps
