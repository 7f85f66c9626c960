"""What self-speculation promises (LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710): the first layers of a model draft
tokens, one pass of all layers checks them."""

from __future__ import annotations

from collections.abc import Mapping


def expected_tokens(accept: float, length: int) -> float:
    """Tokens of one draft and its check, on average: (1 - a^(k+1)) / (1 - a), for a = 1: k + 1 (Leviathan et al. 2023,
    arXiv 2211.17192, eq. 1).

    accept   a, the share of drafted tokens that the whole model takes where it took those before; each by itself
    length   k, drafted tokens; 0: one token, which the whole model gives

    Raises ValueError for a share outside of 0 to 1, and a length below 0.
    """
    if not 0 <= accept <= 1:
        raise ValueError(f"accept: {accept} is not a share from 0 to 1")
    if length < 0:
        raise ValueError(f"length: {length} is below 0")
    # The same as a sum: near a = 1 the fraction loses every digit.
    return sum(float(accept) ** taken for taken in range(length + 1))


def expected_depth(histogram: Mapping[int, int]) -> float:
    """Layers that a token went through, on average; histogram: tokens by depth.

    Raises ValueError for one without tokens, and for counts or depths below 0.
    """
    for depth, count in histogram.items():
        if depth < 0 or count < 0:
            raise ValueError(f"histogram: {count} tokens at depth {depth}: neither can be below 0")
    if not (tokens := sum(histogram.values())):
        raise ValueError("histogram: there is no token in it")
    return sum(depth * count for depth, count in histogram.items()) / tokens
