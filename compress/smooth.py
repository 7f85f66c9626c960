"""Which linear layers may be smoothed by what runs before them, and the folding.

Input channel k of a linear layer may be multiplied by s_k when what produces that channel is divided by it: a norm in
front (SmoothQuant, arXiv 2211.10438, equation 3), or an earlier linear layer with nothing but channel-wise linear
operations between (AWQ, arXiv 2306.00978, section 3.2). Candidates come from what reads what in one forward pass. No
candidate is trusted: the earlier output is divided and the readers' inputs multiplied by random powers of two, which is
exact in any floating point, and the block's output has to stay the same. So a GELU in between, a residual that branches
off after the norm, or a reader that was overlooked each rule a candidate out, whatever the model is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from .block import Block

Form = Literal["linear", "norm", "shifted norm", "unknown"]
# Of the block's output. Powers of two change nothing on CPUs; kernels that add up in another order each time may.
_SAME = 1e-5


@dataclass(frozen=True, eq=False)
class Smooth:
    """One earlier operation and all that reads it; names are inside the block.

    previous   what is divided: a norm or a linear layer
    form       what its weight means: "linear" W x + b; "norm" w * x^ (+ b); "shifted norm" (1 + w) * x^, as in Gemma
    rows       [K] int64: input channel k of the readers is output rows[k] of `previous` (heads repeat under grouped
               queries; of a fused projection only a part is read)
    fed        all readers by name, also those that stay dense (a router)
    parent     the module whose output tells what an error in the readers does ("" is the whole block)
    """

    previous: str
    module: Any  # has a weight, as all those in `fed`
    form: Form
    rows: Tensor
    fed: dict[str, Any]
    parent: str

    @property
    def name(self) -> str:
        readers = list(self.fed)
        if len(readers) > 5:  # experts
            readers = [readers[0], f"{len(readers) - 1} more"]
        return f"{self.previous} -> {', '.join(readers)}"

    @property
    def weights(self) -> list[Tensor]:
        """What folding changes besides biases."""
        return [module.weight for module in (self.module, *self.fed.values())]

    def tie(self, s: Tensor) -> Tensor:
        """s [K] with one value, the geometric mean, for all channels that come from the same output of `previous`."""
        rows = self.rows.to(s.device)
        sums = torch.zeros(int(rows.max()) + 1, dtype=s.dtype, device=s.device)
        counts = sums.index_add(0, rows, torch.ones_like(s))
        return sums.index_add(0, rows, s.log()).div(counts.clamp(min=1)).exp()[rows]

    def spread(self, s: Tensor) -> Tensor:
        """s [K] in the order of all outputs of `previous`; 1 for one that is not read."""
        whole = torch.ones(_outputs(self.module), dtype=s.dtype, device=s.device)
        whole[self.rows.to(s.device)] = s
        return whole


def pairs(block: Block) -> list[Smooth]:
    """What may be smoothed in a decoder block, in the order in which it runs."""
    return survey(block)[0]


@torch.no_grad()
def survey(block: Block) -> tuple[list[Smooth], dict[str, str]]:
    """What may be smoothed, and for every other layer with a weight matrix why it may not be.

    Runs the first calibration batch a few times. Raises ValueError when the output of that is not finite.
    """
    trace = _trace(block)
    found: list[Smooth] = []
    refused: dict[str, str] = {}
    behind_norms: set[str] = set()
    for norm in trace.norms:
        patterns = trace.behind(norm)
        behind_norms.update(patterns)
        if patterns:
            pair = _after_norm(trace, norm, patterns)
            reason = _reason(block, trace, pair)
            if reason is None:
                found.append(pair)
            else:
                refused |= dict.fromkeys(pair.fed, f"by {norm}: {reason}")
    for pattern, members in trace.patterns.items():
        if pattern in behind_norms:
            continue
        reasons: list[str] = []
        for candidate in _after_linear(trace, members):
            reason = _reason(block, trace, *candidate)
            if reason is None:
                found += candidate
                break
            reasons.append(f"by {candidate[0].previous}: {reason}")
        else:
            # The latest layer before is the likeliest.
            refused |= dict.fromkeys(members, reasons[0] if reasons else "by anything before it")
    order = {name: at for at, name in enumerate(trace.inputs)}
    found.sort(key=lambda pair: min(order.get(name, len(order)) for name in pair.fed))
    return found, refused


@torch.no_grad()
def fold_(pair: Smooth, s: Tensor) -> None:
    """Multiply the readers' input channels by s [K], divide what `previous` puts out by it, in place.

    Computed in float32 or wider, then rounded to the weights' dtype: in bfloat16 that costs up to 0.4% of each weight,
    and nothing where s is a power of two. Folding 1 / s undoes it up to that rounding.
    Raises ValueError for an s that is not positive and finite, or differs where channels share an output.
    """
    rows = pair.rows.to(s.device)
    if s.shape != rows.shape:
        raise ValueError(f"s: {list(s.shape)} for the {len(rows)} channels of {pair.name}")
    if not bool((torch.isfinite(s) & (s > 0)).all()):
        raise ValueError(f"s: {float(s.min()):g} .. {float(s.max()):g} for {pair.name}; expected above 0 and finite")
    whole = pair.spread(s)
    if not torch.equal(whole[rows], s):
        raise ValueError(f"s: differs between channels that share an output of {pair.previous}; see Smooth.tie")
    for module in pair.fed.values():
        _times_(module.weight, s[:, None] if isinstance(module, Conv1D) else s)
    weight, bias = pair.module.weight, getattr(pair.module, "bias", None)
    if pair.form == "shifted norm":
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        weight.copy_((1 + wide) / whole.to(wide) - 1)
    else:
        lengthwise = pair.form == "linear" and not isinstance(pair.module, Conv1D)
        _times_(weight, (1 / whole)[:, None] if lengthwise else 1 / whole)
    if isinstance(bias, Tensor):
        _times_(bias, 1 / whole)


def _times_(weight: Any, factor: Tensor) -> None:
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(weight.to(wide) * factor.to(weight.device, wide))


def _outputs(module: Any) -> int:
    """Channels that a norm or a linear layer puts out."""
    return module.weight.shape[-1 if isinstance(module, Conv1D) else 0]


def _width(module: Any) -> int:
    """Channels that a linear layer reads."""
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]


@dataclass(frozen=True)
class _Trace:
    """What one forward pass showed, by name inside the block.

    modules    all of the block's
    norms      (input, output) of what has one weight per channel and no parts
    inputs     what those with a weight matrix were given, in the order in which they ran
    patterns   names of those, whether they ran or not, by name without numbers: experts without a token in this batch
               read what the others read
    output     the block's
    """

    modules: dict[str, nn.Module]
    norms: dict[str, tuple[Tensor, Tensor]]
    inputs: dict[str, Tensor]
    patterns: dict[str, list[str]]
    output: Tensor
    config: Any

    def behind(self, norm: str) -> list[str]:
        """Patterns of what reads the output of `norm`."""
        out = self.norms[norm][1]
        return [
            pattern
            for pattern, members in self.patterns.items()
            if any(_among(self.inputs[name], out) for name in members if name in self.inputs)
        ]


def _among(x: Tensor, out: Tensor) -> bool:
    """Whether x [..., K] looks like rows of out [..., K]: the same, in another shape, or some of them (as experts see).
    The first and the last row are looked for."""
    if x.shape[-1] != out.shape[-1] or not x.numel():
        return False
    rows, source = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
    return all(bool((source == row).all(1).any()) for row in (rows[0], rows[-1]))


def _trace(block: Block) -> _Trace:
    modules = dict(block.module.named_modules())
    norms: dict[str, tuple[Tensor, Tensor]] = {}
    inputs: dict[str, Tensor] = {}
    patterns: dict[str, list[str]] = {}
    handles = []

    def keep_norm(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
            if args and isinstance(output, Tensor):
                norms[name] = args[0], output

        return hook

    def keep_input(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001
            if args:
                inputs.setdefault(name, args[0])

        return hook

    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or isinstance(module, nn.Embedding):
            continue
        if weight.dim() == 1:
            handles.append(module.register_forward_hook(keep_norm(name)))
        elif weight.dim() == 2:
            patterns.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(name)
            handles.append(module.register_forward_pre_hook(keep_input(name)))
    try:
        output = block.forward(0)
    finally:
        for handle in handles:
            handle.remove()
    if not bool(torch.isfinite(output).all()):
        raise ValueError(f"{block.name}: what it puts out on the first calibration batch is not finite")
    return _Trace(modules, norms, inputs, patterns, output, block.config.get_text_config())


def _after_norm(trace: _Trace, norm: str, patterns: Sequence[str]) -> Smooth:
    fed = {name: trace.modules[name] for pattern in patterns for name in trace.patterns[pattern]}
    module, (x, out) = trace.modules[norm], trace.norms[norm]
    parents = {name.rpartition(".")[0] for name in fed}
    if len(parents) > 1:
        parent = _common(list(fed))
    else:
        # A fused projection is one layer, but what counts is what attention or MLP make of it.
        parent = parents.pop() or (next(iter(fed)) if len(fed) == 1 else "")
    return Smooth(norm, module, _norm_form(module, x), torch.arange(out.shape[-1]), fed, parent)


def _common(names: Sequence[str]) -> str:
    """The innermost module that holds all of these."""
    common = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _norm_form(norm: Any, x: Tensor) -> Form:
    """How a norm uses its weight, found out by setting it to what would make nothing of the input but the bias."""
    some = x.reshape(-1, x.shape[-1])[:2]
    weight, bias = norm.weight, getattr(norm, "bias", None)
    forms: dict[Form, float] = {"norm": 0.0, "shifted norm": -1.0}
    for form, value in forms.items():
        out = functional_call(norm, {"weight": torch.full_like(weight, value)}, (some,))
        if torch.equal(out, torch.zeros_like(out) if bias is None else bias.expand_as(out)):
            return form
    return "unknown"


def _after_linear(trace: _Trace, members: Sequence[str]) -> Iterator[list[Smooth]]:
    """Candidates for layers of one pattern (one layer, or the experts' of one kind): linear layers that ran before it
    in the same module, the latest first; one pair per member."""
    ran = [name for name in trace.inputs if isinstance(trace.modules[name], nn.Linear | Conv1D)]
    this = next((name for name in ran if name in members), None)
    if this is None:
        return
    home = this.rpartition(".")[0]
    earlier = [
        name
        for name in ran[: ran.index(this)]
        if name.rpartition(".")[0] == home and trace.inputs[name].data_ptr() != trace.inputs[this].data_ptr()
    ]
    for previous in reversed(earlier):
        for rows in _layouts(_outputs(trace.modules[previous]), _width(trace.modules[this]), trace.config):
            twins = [(_beside(name, previous), name) for name in members]
            if all(twin in trace.modules for twin, _ in twins):
                yield [
                    Smooth(twin, trace.modules[twin], "linear", rows, {name: trace.modules[name]}, name)
                    for twin, name in twins
                ]


def _beside(name: str, leaf_of: str) -> str:
    home = name.rpartition(".")[0]
    leaf = leaf_of.rpartition(".")[2]
    return f"{home}.{leaf}" if home else leaf


def _layouts(outputs: int, width: int, config: Any) -> Iterator[Tensor]:
    """Ways in which `width` inputs may come from `outputs` earlier ones: rows [width] each.

    One to one; the second or first half (gate and up in one); and for heads the values: alone, shared by several
    queries' heads, or in one projection with queries and keys, which lie side by side or group by group.
    """
    channels = torch.arange(width)
    if outputs == width:
        yield channels
    if outputs == 2 * width:
        yield channels + width
        yield channels
    heads = getattr(config, "num_attention_heads", None)
    if not heads or width % heads:
        return
    size = width // heads
    counts = [getattr(config, name, None) for name in ("num_key_value_heads", "num_kv_heads")]
    for groups in dict.fromkeys(count or heads for count in [*counts, 1]):
        if heads % groups:
            continue
        queries = heads // groups
        group, inside = channels // size // queries, channels % size
        if outputs == groups * size and groups < heads:
            yield group * size + inside
        if outputs == (heads + 2 * groups) * size:
            yield (heads + groups + group) * size + inside
            yield (group * (queries + 2) + queries + 1) * size + inside


def _reason(block: Block, trace: _Trace, *candidate: Smooth) -> str | None:
    """Why these pairs, together, may not be smoothed; None: they may."""
    uses = [id(parameter) for module in trace.modules.values() for parameter in module._parameters.values()]
    for pair in candidate:
        if pair.form == "unknown":
            return f"{type(pair.module).__name__} has no weight per channel that could be divided"
        if any(uses.count(id(weight)) > 1 for weight in pair.weights):
            return "a weight is shared with another layer"
    scaled = _with_powers_of_two(block, candidate)
    off = (scaled.float() - trace.output.float()).norm() / trace.output.float().norm()
    return None if bool(off <= _SAME) else f"the block's output changes (relative {float(off):.1e})"


def _with_powers_of_two(block: Block, candidate: Sequence[Smooth]) -> Tensor:
    """The block's output with earlier outputs divided and inputs multiplied by random ones of 1/2, 1, 2."""
    generator = torch.Generator().manual_seed(0)
    handles = []

    def divide(by: Tensor) -> Any:
        return lambda module, args, output: output / by.to(output)  # noqa: ARG005

    def multiply(by: Tensor) -> Any:
        return lambda module, args: (args[0] * by.to(args[0]), *args[1:])  # noqa: ARG005

    for pair in candidate:
        powers = 2.0 ** torch.randint(-1, 2, (_outputs(pair.module),), generator=generator)
        whole = pair.spread(powers[pair.rows])
        handles.append(pair.module.register_forward_hook(divide(whole)))
        handles += [m.register_forward_pre_hook(multiply(whole[pair.rows])) for m in pair.fed.values()]
    try:
        return block.forward(0)
    finally:
        for handle in handles:
            handle.remove()
