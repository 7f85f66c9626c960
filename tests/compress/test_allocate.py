"""Widths are the best ones: against all combinations, against exact fractions, and budgets to the last bit."""

import math
import random
import time
from fractions import Fraction
from itertools import combinations, pairwise, product

import pytest
from remanence.compress.allocate import allocate, threshold, together, total

WIDTHS = (2, 3, 4, 8, 16)


def instance(layers, seed, largest, decades=2.0):
    """Costs and sizes of layers whose costs spread over so many decades."""
    chance = random.Random(seed)
    costs, sizes = {}, {}
    for i in range(layers):
        numel, worth = chance.randint(1, largest), 10 ** chance.uniform(-decades, decades)
        costs[f"layers.{i}"] = {b: worth * 4.0**-b * chance.uniform(0.7, 1.3) for b in WIDTHS[:-1]} | {16: 0.0}
        sizes[f"layers.{i}"] = {b: numel * b + chance.randint(0, 3) for b in WIDTHS}
    return costs, sizes


def brute_force(costs, sizes, budget, tied=(), allowed=WIDTHS):
    """The least cost, exactly, of all combinations; None when none keeps to the budget."""
    names = list(costs)
    best = None
    for widths in product(allowed, repeat=len(names)):
        chosen = dict(zip(names, widths, strict=True))
        if any(len({chosen[name] for name in group}) > 1 for group in tied) or total(chosen, sizes) > budget:
            continue
        cost = sum(Fraction(costs[name][width]) for name, width in chosen.items())
        best = cost if best is None or cost < best else best
    return best


@pytest.mark.parametrize("largest", [3, 1000, 10**9])
@pytest.mark.parametrize("decades", [1.0, 6.0])
def test_optimal_against_all_combinations(largest, decades):
    for seed in range(12):
        layers = 1 + seed % 5
        costs, sizes = instance(layers, seed, largest, decades)
        least, most = (sum(row[b] for row in sizes.values()) for b in (2, 16))
        budget = least + (most - least) * (seed % 7) // 12
        tied = () if layers < 3 or seed % 2 else (("layers.0", "layers.2"),)
        allowed = (4, 8, 16) if seed % 4 == 3 else None
        best = brute_force(costs, sizes, budget, tied, allowed or WIDTHS)
        if best is None:
            with pytest.raises(ValueError, match="budget"):
                allocate(costs, sizes, budget, tied, allowed)
            continue
        chosen = allocate(costs, sizes, budget, tied, allowed)
        assert list(chosen) == list(costs)
        assert total(chosen, sizes) <= budget
        assert all(len({chosen[name] for name in group}) == 1 for group in tied)
        assert set(chosen.values()) <= set(allowed or WIDTHS)
        cost = sum(Fraction(costs[name][width]) for name, width in chosen.items())
        assert cost - best <= best * Fraction(1, 10**12)


def test_as_good_as_dynamic_programming_on_a_whole_model():
    """224 layers as a 7B model has them, in a second or so; an independent exact solver over every budget."""
    costs, sizes = {}, {}
    chance = random.Random(0)
    for i in range(224):
        units = 4 if i % 7 < 4 else 11  # 4096 x 4096 and 4096 x 11008, in millions or so
        worth = math.exp(chance.gauss(0, 1.5)) * units
        costs[f"l{i}"] = {b: worth * 4.0**-b for b in WIDTHS[:-1]} | {16: 0.0}
        sizes[f"l{i}"] = {b: units * b for b in WIDTHS}
    budget = 4 * sum(row[2] // 2 for row in sizes.values())
    best = [0.0] * (budget + 1)
    for name in costs:
        cheapest = [math.inf] * (budget + 1)
        for b in WIDTHS:
            size, cost = sizes[name][b], costs[name][b]
            for used in range(size, budget + 1):
                if best[used - size] + cost < cheapest[used]:
                    cheapest[used] = best[used - size] + cost
        best = cheapest
    start = time.perf_counter()
    chosen = allocate(costs, sizes, budget)
    assert time.perf_counter() - start < 10
    assert total(chosen, sizes) <= budget
    assert sum(costs[name][width] for name, width in chosen.items()) == pytest.approx(best[-1], rel=1e-11)


def test_a_budget_is_met_to_the_bit():
    costs, sizes = instance(6, seed=1, largest=10**9)
    wanted = dict(zip(costs, (2, 8, 4, 3, 16, 4), strict=True))
    # Worth more than all else together, for each layer: the wanted widths and no wider.
    costs = {name: {b: float(b < wanted[name]) for b in WIDTHS} for name in costs}
    exact = total(wanted, sizes)
    assert allocate(costs, sizes, exact) == wanted
    less = allocate(costs, sizes, exact - 1)
    assert less != wanted
    assert total(less, sizes) < exact
    with pytest.raises(ValueError, match=rf"budget: 1000 bytes; the least these layers can take is {least(sizes)}"):
        allocate(costs, sizes, 1000.9)
    assert set(allocate(costs, sizes, least(sizes)).values()) == {2}


def least(sizes):
    return sum(row[2] for row in sizes.values())


def test_an_average_in_bits_is_met_where_integers_allow():
    """As many layers as steps of a bit: whole budgets are used up."""
    costs = {f"l{i}": {b: (i + 1) * 4.0**-b for b in WIDTHS} for i in range(8)}
    bits = {name: {b: 1000 * b for b in WIDTHS} for name in costs}
    for average in (2.5, 3, 4, 6):
        assert total(allocate(costs, bits, average * 8000), bits) == average * 8000


def test_layers_that_cost_nothing_share_what_is_left():
    costs = {name: dict.fromkeys(WIDTHS, 0.0) for name in "abc"} | {"d": {2: 4.0, 3: 2.0, 4: 1.0, 8: 0.1, 16: 0.0}}
    bits = {name: {b: 10 * b for b in WIDTHS} for name in costs}
    chosen = allocate(costs, bits, 4 * 40)
    assert (chosen.pop("d"), sorted(chosen.values())) == (8, [2, 3, 3])
    chosen = allocate(costs, bits, 4 * 40 + 30)
    assert (chosen.pop("d"), sorted(chosen.values())) == (8, [3, 4, 4])
    alike = {name: dict.fromkeys(WIDTHS, 1.0) for name in "abcd"}
    assert allocate(alike, bits, 4 * 40) == dict.fromkeys("abcd", 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tied": [("a", "b"), ("b", "c")]}, "tied: b is in two groups"),
        ({"tied": [("a", "z")]}, "tied: z is no layer that has a cost"),
        ({"allowed": (5, 6)}, r"widths: a has a cost and a size for none of \[5, 6\]"),
        ({"sizes": {"a": {2: 1}}}, "costs, sizes: b is in one of them"),
        ({"costs": {name: {2: math.nan} for name in "abc"}}, "costs: a: nan; expected a finite number"),
        ({"budget": 5}, "budget: 5 bytes; the least these layers can take is 6"),
        ({"budget": 5, "unit": "s", "per_unit": 1e3}, "budget: 0.005 s; the least these layers can take is 0.006"),
    ],
)
def test_what_cannot_be_allocated(changes, message):
    given = {
        "costs": {name: {2: 1.0, 4: 0.5} for name in "abc"},
        "sizes": {name: {2: 2, 4: 4} for name in "abc"},
        "budget": 9,
    }
    with pytest.raises(ValueError, match=message):
        allocate(**(given | changes))


def squares(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)


@pytest.mark.parametrize("widths", [(16, 8, 4), (4, 8), (16, 8, 4, 2)])
def test_thresholds_against_all_partitions(widths):
    for seed in range(60):
        chance = random.Random(seed)
        drawn = [10 ** chance.uniform(-2, 1) if seed % 2 else chance.gauss(0, 1) for _ in range(4 + seed % 9)]
        scores = {f"l{i}": round(score, 1 + seed % 3) for i, score in enumerate(drawn)}
        values = sorted(Fraction(score) for score in scores.values())
        if len(set(values)) < len(widths):
            continue
        best = min(
            sum(squares(values[a:b]) for a, b in zip((0, *cuts), (*cuts, len(values)), strict=True))
            for cuts in combinations(range(1, len(values)), len(widths) - 1)
        )
        chosen = threshold(scores, widths)
        clusters = [[Fraction(scores[n]) for n, width in chosen.items() if width == w] for w in sorted(widths)]
        assert all(clusters)
        assert sum(map(squares, clusters)) <= best * (1 + Fraction(1, 10**9))
        # The most sensitive are the widest, and equal ones alike.
        assert all(max(a) < min(b) for a, b in pairwise(clusters))


def test_the_most_sensitive_cluster_is_the_widest():
    """The case in which the labels of an algorithm give the most sensitive layer the narrowest width."""
    scores = {f"l{i}": score for i, score in enumerate([24.76, *[7.05] * 3, *[12.57] * 2])}
    assert threshold(scores) == {"l0": 16, "l1": 4, "l2": 4, "l3": 4, "l4": 8, "l5": 8}
    assert threshold({name: -score for name, score in scores.items()})["l0"] == 4
    assert threshold(scores, (4, 16, 8)) == threshold(scores)


def test_scores_that_do_not_tell_layers_apart():
    with pytest.raises(ValueError, match="scores: 2 different ones do not make 3 clusters"):
        threshold({"a": -0.06, "b": -0.0597, "c": -0.06, "d": -0.0597})
    with pytest.raises(ValueError, match="scores: b: inf; expected a finite number"):
        threshold({"a": 1.0, "b": math.inf})


def test_tied_layers_take_the_widest():
    chosen = {"q": 4, "k": 8, "v": 4, "o": 4}
    assert together(chosen, [("q", "k", "v")]) == {"q": 8, "k": 8, "v": 8, "o": 4}
