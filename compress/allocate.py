"""One width for every layer, by what it costs: which layers are worth many bits, and which choice fits a budget.

Two rules turn sensitivities (sensitivity.py) into widths. The threshold rule of CPTQuant (arXiv 2412.03599): layers are
put into as many clusters as there are widths, and the most sensitive cluster gets the widest; clusters are ranked by
their centres here, not by the numbers that an algorithm gives them. The other is exact: the least sum of costs that
keeps to a budget, an integer program as in HAWQ-V3 (arXiv 2011.10680). Sizes are integers, so that a budget is met
exactly or not. What sizes are, and what becomes of the widths: widths.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from math import floor, gcd, isfinite

import numpy as np

# Of the objective: HiGHS ends a search within 1e-6 of the optimum, here 1e-12 of what widths can make a difference.
_SPAN = 1e6
Option = tuple[int, float, int]  # width, cost, size


def threshold(scores: Mapping[str, float], widths: Sequence[int] = (16, 8, 4)) -> dict[str, int]:
    """CPTQuant's rule: as many clusters of scores as widths, the most sensitive cluster the widest.

    Clusters have the least sum of squared distances to their means, found exactly (in one dimension they are runs of
    the sorted scores). ValueError for fewer different scores than widths: they do not tell layers apart.
    """
    _check_finite("scores", {name: {0: score} for name, score in scores.items()})
    values, counts = np.unique(np.array(list(scores.values()), dtype=np.float64), return_counts=True)
    if len(values) < len(widths):
        raise ValueError(f"scores: {len(values)} different ones do not make {len(widths)} clusters")
    starts = _clusters(values, counts, len(widths))
    ranked = sorted(widths)
    return {
        name: ranked[int(np.searchsorted(values[starts], score, side="right")) - 1] for name, score in scores.items()
    }


def _clusters(values: np.ndarray, counts: np.ndarray, clusters: int) -> list[int]:
    """Where each of the best clusters of sorted values [n] starts; each value is there counts [n] times."""
    n = len(values)
    x = (values - np.average(values, weights=counts)) / (np.ptp(values) or 1.0)
    number, first, second = (np.concatenate([[0.0], np.cumsum(counts * power)]) for power in (x**0, x, x**2))

    def spread(start: np.ndarray, end: int) -> np.ndarray:
        """Squared distances to their mean, of values start .. end - 1."""
        return second[end] - second[start] - (first[end] - first[start]) ** 2 / (number[end] - number[start])

    # best[end]: of the first `end` values in the clusters so far; `came[k][end]`: where the last of them starts.
    best = np.array([np.inf, *(float(spread(np.array(0), end)) for end in range(1, n + 1))])
    came = [np.zeros(n + 1, dtype=int)]
    for _ in range(1, clusters):
        following, starts = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=int)
        for end in range(1, n + 1):
            sums = best[:end] + spread(np.arange(end), end)
            starts[end] = int(sums.argmin())
            following[end] = sums[starts[end]]
        best = following
        came.append(starts)
    found, end = [], n
    for starts in reversed(came):
        end = int(starts[end])
        found.append(end)
    return found[::-1]


def together(chosen: Mapping[str, int], tied: Sequence[Sequence[str]]) -> dict[str, int]:
    """The same, but tied layers have the widest width of any of them."""
    widest = {name: max(chosen[other] for other in group) for group in tied for name in group}
    return {**chosen, **widest}


def total(chosen: Mapping[str, int], sizes: Mapping[str, Mapping[int, int]]) -> int:
    """What the chosen widths take of a budget."""
    return sum(sizes[name][width] for name, width in chosen.items())


def allocate(
    costs: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, Mapping[int, int]],
    budget: float,
    tied: Sequence[Sequence[str]] = (),
    allowed: Collection[int] | None = None,
    unit: str = "bytes",
    per_unit: float = 1,
) -> dict[str, int]:
    """One width for every layer: the least sum of costs whose sizes sum up to at most `budget`.

    costs     by layer and width, any unit, lower is better
    sizes     by layer and width, integers in the unit of the budget
    tied      layers of one tuple have the same width
    allowed   widths to choose from; None: all that have a cost and a size
    unit, per_unit   that an error names, and how many of the budget make one of it
    Solved by HiGHS to a gap of 0, then checked in integers; of equal sums one that spreads evenly. Raises ValueError
    for a budget that no choice keeps to.
    """
    groups = _groups(costs, sizes, tied)
    options = [_options(group, costs, sizes, allowed) for group in groups]
    least, room = sum(min(size for _, _, size in option) for option in options), floor(budget)
    if room < least:
        short, wanted = (f"{number / per_unit:.10g}" for number in (room, least))
        raise ValueError(f"budget: {short} {unit}; the least these layers can take is {wanted}")
    picks = _evened(options, _solve(options, room), room)
    chosen = {name: option[pick][0] for group, option, pick in zip(groups, options, picks) for name in group}
    return {name: chosen[name] for name in costs}


def _groups(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, int]], tied: Sequence[Sequence[str]]
) -> list[tuple[str, ...]]:
    """Layers that are decided on together, each layer in one of them."""
    if costs.keys() != sizes.keys():
        other = min(costs.keys() ^ sizes.keys())
        raise ValueError(f"costs, sizes: {other} is in one of them; expected the same layers in both")
    _check_finite("costs", costs)
    counted = Counter(name for group in tied for name in group)
    for name, times in counted.items():
        if name not in costs or times > 1:
            raise ValueError(f"tied: {name} is {'in two groups' if name in costs else 'no layer that has a cost'}")
    return [tuple(group) for group in tied if group] + [(name,) for name in costs if name not in counted]


def _check_finite(field: str, values: Mapping[str, Mapping[int, float]]) -> None:
    for name, row in values.items():
        for value in row.values():
            if not isfinite(value):
                raise ValueError(f"{field}: {name}: {value}; expected a finite number")


def _options(
    group: Sequence[str],
    costs: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, Mapping[int, int]],
    allowed: Collection[int] | None,
) -> list[Option]:
    """What a group may be, narrowest first."""
    common = set.intersection(*(set(costs[name]) & set(sizes[name]) for name in group))
    widths = sorted(common if allowed is None else common & set(allowed))
    if not widths:
        raise ValueError(f"widths: {group[0]} has a cost and a size for none of {sorted(allowed or ())}")
    return [(b, sum(costs[name][b] for name in group), sum(sizes[name][b] for name in group)) for b in widths]


def _solve(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The number of one option of every group: the least sum of costs with sizes of at most `budget` in all."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    # Small whole numbers: what every choice takes anyway is taken off, and the rest is counted in its common divisor.
    least = [min(size for _, _, size in option) for option in options]
    excess = [size - low for option, low in zip(options, least) for _, _, size in option]
    unit = gcd(*excess) or 1
    best = [min(cost for _, cost, _ in option) for option in options]
    extra = [[cost - low for _, cost, _ in option] for option, low in zip(options, best)]
    span = sum(map(max, extra)) or 1.0
    lengths = [len(option) for option in options]
    owner, count = np.repeat(np.arange(len(options)), lengths), sum(lengths)
    one_each = csr_array((np.ones(count), (owner, np.arange(count))), shape=(len(options), count))
    taken = csr_array(np.array([[size // unit for size in excess]], dtype=np.float64))
    found = milp(
        np.array([cost / span * _SPAN for row in extra for cost in row]),
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(taken, -np.inf, float((budget - sum(least)) // unit)),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"integer program: {found.message}")
    picks = [int(found.x[start:end].argmax()) for start, end in pairwise(np.cumsum([0, *lengths]))]
    if sum(option[pick][2] for option, pick in zip(options, picks)) > budget:
        raise RuntimeError("integer program: its solution does not keep to the budget")
    return picks


def _evened(options: Sequence[Sequence[Option]], picks: Sequence[int], budget: int) -> list[int]:
    """The same sum of costs, and what it leaves of the budget spread evenly over groups that cost the same at other
    widths (no token came by): which of those a solver widens is chance."""
    picks = [
        min(range(len(option)), key=lambda i: (option[i][1] > option[pick][1], option[i][2]))
        for option, pick in zip(options, picks)
    ]
    left = budget - sum(option[pick][2] for option, pick in zip(options, picks))
    narrowest = [(option[pick][0], at) for at, (option, pick) in enumerate(zip(options, picks))]
    heapify(narrowest)
    while narrowest:
        _, at = heappop(narrowest)
        width, cost, size = options[at][picks[at]]
        for i, (wider, same, more) in enumerate(options[at]):
            if wider > width and same <= cost and more - size <= left:
                picks[at], left = i, left - (more - size)
                heappush(narrowest, (wider, at))
                break
    return picks
