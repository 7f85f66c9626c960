"""LLM-Viewer's counts of a model's operations and bytes, the true ones beside them, and why they differ.

LLM-Viewer (Yuan et al. 2024, arXiv 2402.16363; github.com/hahnyuan/LLM-Viewer at 472f71f) has formulas for one layer in
model_analyzer.py and a list of matrices for each architecture in configs/ (here Llama.py, without its flash attention).
`viewer` is those formulas, in our words; `closed_form` is what products and weights amount to, by pencil, as a check of
whatever walks a model; `explained` names what lies between a count of ours and one of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

# Theirs, for each element: max, subtract, exp, sum, divide; seven of a norm; two of the activation between up and down.
_SOFTMAX, _NORM, _ADD, _ACT = 5, 7, 1, 2


@dataclass(frozen=True)
class Shape:
    """A decoder like Llama's, in plain numbers.

    head_dim   of queries, keys and values; often hidden / heads, but not always (Qwen3)
    tied       whether the head is the embedding's own table
    qk_norm    whether queries and keys have a norm of their own (Qwen3)
    qkv_bias   whether q, k and v have a bias (Qwen2)
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False

    @property
    def attention(self) -> int:
        """Weights of q, k, v and o in a layer."""
        return 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim

    @property
    def mlp(self) -> int:
        """Weights of gate, up and down in a layer."""
        return 3 * self.hidden * self.intermediate

    @property
    def table(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.hidden * self.vocabulary

    @property
    def vectors(self) -> int:
        """Parameters that are in no matrix: norms and biases of all layers, the last norm."""
        layer = 2 * self.hidden
        layer += 2 * self.head_dim if self.qk_norm else 0
        layer += (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return self.layers * layer + self.hidden

    @property
    def split(self) -> int:
        """What LLM-Viewer takes for head_dim."""
        return self.hidden // self.heads


@dataclass(frozen=True)
class Counts:
    """decode_ops      of one step: a token for each sequence, which sees `context` ones, itself among them
    prefill_ops     of a pass over `context` tokens of each sequence, the head for the last of them
    weight_bytes    that lie in memory
    read_bytes      of weights, that one pass reads
    kv_bytes        of the cache of `context` tokens of each sequence
    """

    decode_ops: float
    prefill_ops: float
    weight_bytes: float
    read_bytes: float
    kv_bytes: float


@dataclass(frozen=True)
class Difference:
    """Ours less theirs, and what it is made of.

    causes     amounts by name, each from the shape alone
    residual   what no cause explains, as a share of the difference
    """

    ours: float
    theirs: float
    causes: Mapping[str, float]

    @property
    def residual(self) -> float:
        whole, told = self.ours - self.theirs, sum(self.causes.values())
        # Where both agree a share of nothing is meaningless: whatever causes amount to then stands against the count.
        return abs(whole - told) / (abs(whole) or abs(self.ours) or 1.0)


def viewer(shape: Shape, batch: int, context: int, bits: float = 16) -> Counts:
    """What LLM-Viewer prints: `bits` for a weight, 16 for an activation and for keys and values."""
    h, heads = shape.hidden, shape.heads
    # k and v have hidden * kv_heads / heads columns there, a float.
    matrices = 2 * h * h + 2 * h * h * shape.kv_heads / heads + shape.mlp

    def ops(tokens: int, pairs: int) -> float:
        attention = pairs * heads * (4 * shape.split + _SOFTMAX)
        vectors = tokens * h * (2 * _NORM + 2 * _ADD + _ACT)
        return batch * (shape.layers * (2 * tokens * matrices + attention + vectors) + shape.table)

    weights = shape.layers * matrices * bits / 8
    return Counts(
        decode_ops=ops(1, context),
        prefill_ops=ops(context, context * context),
        # The footprint is summed before the head is added, what is read after it.
        weight_bytes=weights,
        read_bytes=weights + shape.table * bits / 8,
        kv_bytes=batch * shape.layers * 2 * context * h * shape.kv_heads / heads * 2,
    )


def closed_form(shape: Shape, batch: int, tokens: int, context: int = 0, bits: float = 16) -> dict[str, float]:
    """Of a pass over `tokens` new ones of each sequence after `context` in the cache, the head for the last of them.

    flops          of products alone, each with its sum two; a token attends to those before it and to itself
    weight_bytes   that lie in memory; read_bytes: of those, all but the table of an embedding that is not the head
    kv_bytes       of the cache after the pass, 16 bits each
    """
    pairs = tokens * context + tokens * (tokens + 1) / 2
    matrices = shape.layers * (shape.attention + shape.mlp)
    attention = 4 * pairs * shape.heads * shape.head_dim * shape.layers
    read = (matrices + shape.table) * bits / 8 + shape.vectors * 2
    return {
        "flops": float(batch * (2 * tokens * matrices + attention + 2 * shape.table)),
        "weight_bytes": read + (0 if shape.tied else shape.table * 2),
        "read_bytes": read,
        "kv_bytes": float(batch * (context + tokens) * shape.layers * 2 * shape.kv_heads * shape.head_dim * 2),
    }


def ours(shape: Shape, batch: int, context: int, bits: float = 16) -> Counts:
    """The closed form of both passes that `viewer` counts."""
    prefill = closed_form(shape, batch, context, 0, bits)
    decode = closed_form(shape, batch, 1, context - 1, bits)
    sizes = {key: prefill[key] for key in ("weight_bytes", "read_bytes", "kv_bytes")}
    return Counts(decode["flops"], prefill["flops"], **sizes)


def explained(shape: Shape, batch: int, context: int, ours: Counts, theirs: Counts) -> dict[str, Difference]:
    """Every count's difference by its causes, for weights of 16 bits. A cause without effect on a shape is left out.

    ours     counted by anything, of the same batch and context
    theirs   `viewer`'s, or what LLM-Viewer itself printed
    """
    counted = {"ours": asdict(ours), "theirs": asdict(theirs)}
    found = {}
    for name, causes in _causes(shape, batch, context).items():
        kept = {cause: amount for cause, amount in causes.items() if amount}
        found[name] = Difference(counted["ours"][name], counted["theirs"][name], kept)
    return found


def _causes(shape: Shape, batch: int, context: int) -> dict[str, dict[str, float]]:
    """What each of LLM-Viewer's choices takes away from a count (or, negative, adds to it)."""
    h, heads, layers = shape.hidden, shape.heads, shape.layers
    # Weights of q, k, v and o that a true head_dim has more.
    wider = layers * 2 * h * (heads + shape.kv_heads) * (shape.head_dim - h / heads)
    longer = shape.head_dim - shape.split
    triangle = context * (context + 1) / 2

    def ops(tokens: int, seen: float, counted: float) -> dict[str, float]:
        vectors = batch * layers * tokens * h
        return {
            "the head is counted without its factor 2": float(batch * shape.table),
            "q, k, v and o are sized by hidden / heads": 2 * batch * tokens * wider,
            "attention is sized by hidden / heads": 4 * batch * layers * heads * longer * seen,
            "a causal mask is counted in full": 4 * batch * layers * heads * shape.split * (seen - counted),
            "softmax is no product": -float(_SOFTMAX * batch * layers * heads * counted),
            "norms are no products": -float(2 * _NORM * vectors),
            "additions and activations are no products": -float((2 * _ADD + _ACT) * vectors),
        }

    widths = {"q, k, v and o are sized by hidden / heads": 2 * wider, "norms and biases": 2.0 * shape.vectors}
    # As a float for k and v there, not as `split`.
    keys = shape.head_dim - h / heads
    return {
        "decode_ops": ops(1, context, context),
        "prefill_ops": ops(context, triangle, context * context),
        "weight_bytes": {
            "the head is not in memory": 2.0 * shape.table,
            "the embedding is not in memory": 0.0 if shape.tied else 2.0 * shape.table,
            **widths,
        },
        "read_bytes": widths,
        "kv_bytes": {
            "keys and values are sized by hidden / heads": 4 * batch * layers * context * shape.kv_heads * keys
        },
    }
