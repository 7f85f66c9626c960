"""From made-up evidence whose answer is known to the verdict."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from remanence.bench.statistics import TAIL
from remanence.bench.verdict import Evidence
from remanence.bench.verdict import judge as judge_together

ITEMS = 40


def judge(cell, seed):
    """One cell by itself."""
    return judge_together([cell], seed)[0]


def first(name, count):
    """A case of CASES with its first `count` items alone."""
    cell = CASES[name][0]
    lists = {key: getattr(cell, key) for key in ("compressed", "unlearned", "baseline", "target", "oracle")}
    return replace(cell, **{key: values[:count] for key, values in lists.items()})


def around(level, spread=0.04, items=ITEMS, seed=0):
    """Probabilities near `level`, kept within 0..1."""
    rng = np.random.default_rng([seed, round(1000 * level)])
    return np.clip(rng.normal(level, spread, items), 0.0, 1.0).tolist()


def evidence(compressed, unlearned, baseline=0.90, target=0.92, oracle=0.10, retain=0.90, retain_target=0.93, **how):
    """One level per list. Lists of the same level are the same list: one model, measured once."""
    forget = {
        "compressed": compressed,
        "unlearned": unlearned,
        "baseline": baseline,
        "target": target,
        "oracle": oracle,
    }
    return Evidence(
        **{name: None if level is None else around(level, **how) for name, level in forget.items()},
        retain=around(retain, seed=1),
        retain_target=around(retain_target, seed=1),
    )


# What the five models know of the forget set, and what is left of the retain set.
CASES = {
    # The target as its own unlearned model: nothing was forgotten, so nothing can return.
    "target-dense": (evidence(0.92, 0.92, baseline=0.92), "undecided"),
    "target-compressed": (evidence(0.90, 0.92), "undecided"),
    # The oracle as its own unlearned model: nothing ever known, nothing to return.
    "oracle-dense": (evidence(0.10, 0.10, baseline=0.92), "held"),
    "oracle-compressed": (evidence(0.12, 0.10, oracle=0.12), "held"),
    # Buckets: forgotten when dense, all of it back under the quantizer.
    "bucketed-dense": (evidence(0.05, 0.05, baseline=0.92), "held"),
    "bucketed-compressed": (evidence(0.90, 0.05), "returned"),
    "well-forgotten": (evidence(0.11, 0.10), "held"),
    "half-returned": (evidence(0.50, 0.10), "returned"),
    "a-quarter-returned": (evidence(0.30, 0.10), "returned"),
    # Driven below the oracle, compression brings it up to where a model is that never knew: no knowledge came back.
    "over-forgotten-up-to-oracle": (evidence(0.30, 0.00, oracle=0.30), "held"),
    "over-forgotten-past-oracle": (evidence(0.70, 0.00, oracle=0.30), "returned"),
    "over-forgotten-stays": (evidence(0.00, 0.00, oracle=0.30), "held"),
    # A third still known when dense; what matters is whether more came back.
    "partly-forgotten-stays": (evidence(0.36, 0.36), "held"),
    "partly-forgotten-returns": (evidence(0.60, 0.36), "returned"),
    # Half still known: whether that is forgetting, the interval cannot say.
    "half-forgotten-stays": (evidence(0.50, 0.50), "undecided"),
    # Four fifths still known: that is not forgetting, whatever compression does.
    "barely-forgotten": (evidence(0.75, 0.75), "undecided"),
    "barely-forgotten-returns": (evidence(0.88, 0.75, spread=0.02), "returned"),
    "worse-than-before-compression": (evidence(0.10, 0.40), "held"),
    # The recipe leaves the target no better than the oracle.
    "recipe-erases": (evidence(0.09, 0.05, baseline=0.10), "damaged"),
    "recipe-erases-to-zero": (evidence(0.00, 0.05, baseline=0.00, oracle=0.00), "damaged"),
    "retain-collapsed": (evidence(0.10, 0.10, retain=0.30), "damaged"),
    "retain-gone": (evidence(0.00, 0.00, retain=0.00), "damaged"),
    # Knowledge that is back is back, even in a model that lost much else.
    "retain-collapsed-but-returned": (evidence(0.90, 0.10, retain=0.30), "returned"),
    "a-little-retain-lost": (evidence(0.10, 0.10, retain=0.80), "held"),
    # Few items, wide apart: the interval of the recovered share reaches from below to above the margin.
    "few-noisy-items": (
        replace(
            evidence(0.0, 0.10, items=5),
            compressed=[0.05, 0.40, 0.08, 0.10, 0.12],
        ),
        "undecided",
    ),
    "target-never-knew": (evidence(0.11, 0.10, baseline=0.11, target=0.12), "undecided"),
}
UNFORGOTTEN = {"target-dense", "target-compressed", "barely-forgotten", "barely-forgotten-returns"}
# Without an oracle only "nothing" is known to be no knowledge.
NO_ORACLE = {
    "over-forgotten-up-to-oracle": "returned",
    "oracle-compressed": "held",
    "half-forgotten-stays": "held",
    "barely-forgotten": "held",
    "recipe-erases": "undecided",
    "target-never-knew": "undecided",
}


@pytest.mark.parametrize(("cell", "verdict"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_verdict(cell, verdict, seed):
    found = judge(cell, seed)
    assert found.verdict == verdict, found
    assert found.reason


@pytest.mark.parametrize("name", CASES)
def test_what_had_not_been_forgotten_is_said(name):
    found = judge(CASES[name][0], 0)
    assert found.unforgotten == (name in UNFORGOTTEN)
    assert ("forgotten: before compression" in found.reason) == (found.unforgotten and found.verdict == "undecided")


def noisy(rng, level, items=ITEMS, spread=0.2):
    """Probabilities of a beta distribution around `level`: nothing is as clean as `around`."""
    return rng.beta(level / spread, (1 - level) / spread, items).tolist()


@pytest.mark.parametrize("with_oracle", [True, False], ids=["oracle", "no-oracle"])
def test_target_against_itself(with_oracle):
    """200 draws of items on which the target is measured twice: no audit may call that a return."""
    words = []
    for seed in range(200):
        rng = np.random.default_rng([1, seed])
        lists = [noisy(rng, 0.9) for _ in range(4)]
        oracle = noisy(rng, 0.1) if with_oracle else None
        retain = [noisy(rng, 0.9) for _ in range(2)]
        words.append(judge(Evidence(*lists, oracle, *retain), seed).verdict)
    assert sum(word in ("held", "undecided") for word in words) >= 190


@pytest.mark.parametrize("with_oracle", [True, False], ids=["oracle", "no-oracle"])
@pytest.mark.parametrize("level", [0.05, 0.3])
def test_unlearned_model_against_itself(level, with_oracle):
    """200 draws on which compression did nothing but shake every item."""
    words = []
    for seed in range(200):
        rng = np.random.default_rng([2, seed])
        compressed, unlearned = noisy(rng, level), noisy(rng, level)
        baseline, target = noisy(rng, 0.9), noisy(rng, 0.9)
        retain = [noisy(rng, 0.9) for _ in range(2)]
        cell = Evidence(compressed, unlearned, baseline, target, noisy(rng, 0.05) if with_oracle else None, *retain)
        words.append(judge(cell, seed).verdict)
    assert sum(word in ("held", "undecided") for word in words) >= 190
    assert "held" in words


def test_share_at_the_margin_is_rarely_called():
    """A true share of exactly a tenth: 2.5% of draws may say returned, 2.5% held."""
    words = []
    for seed in range(400):
        rng = np.random.default_rng([3, seed])
        unlearned = rng.beta(1, 9, ITEMS)
        baseline = rng.beta(9, 1, ITEMS)
        compressed = unlearned + (baseline - unlearned) * rng.beta(1, 9, ITEMS)
        lists = [values.tolist() for values in (compressed, unlearned, baseline, baseline)]
        words.append(judge(Evidence(*lists, None, [0.9] * 5, [0.9] * 5), seed).verdict)
    assert words.count("returned") <= 20
    assert words.count("held") <= 30


def test_recipes_are_judged_together():
    """A recovery that one question alone would call a return is open when it is the best of many."""
    rng = np.random.default_rng(0)
    unlearned = rng.beta(1, 9, ITEMS)
    baseline = rng.beta(9, 1, ITEMS)

    def cell(share):
        compressed = unlearned + (baseline - unlearned) * (share + rng.normal(0, 0.25, ITEMS))
        lists = [values.tolist() for values in (compressed, unlearned, baseline, baseline)]
        return Evidence(*lists, None, [0.9] * 5, [0.9] * 5)

    candidates = [cell(0.2) for _ in range(40)]
    weak = next(c for c in candidates if 0.008 < judge(c, 0).p_returned <= TAIL)
    others = [cell(0.0) for _ in range(7)]
    together = judge_together([weak, *others], 0)
    assert (judge(weak, 0).verdict, together[0].verdict) == ("returned", "undecided")
    assert together[0].p_returned == pytest.approx(8 * judge(weak, 0).p_returned, rel=0.5)
    assert together[0].recovered.value == judge(weak, 0).recovered.value
    clear = judge_together([CASES["bucketed-compressed"][0]] * 40, 0)
    assert {found.verdict for found in clear} == {"returned"}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [name for name in CASES if NO_ORACLE.get(name) != "undecided"])
def test_verdict_without_oracle(name, seed):
    cell, verdict = CASES[name]
    found = judge(replace(cell, oracle=None), seed)
    assert found.known is None
    assert found.verdict == NO_ORACLE.get(name, verdict), found


@pytest.mark.parametrize("level", [0.0, 0.01, 0.03])
def test_target_that_knows_nothing_without_oracle(level):
    cell = evidence(level, level, baseline=level, target=level, oracle=None, spread=0.005)
    assert judge(cell, 0).verdict == "undecided"


def test_recipe_that_leaves_nothing_without_oracle():
    assert judge(evidence(0.0, 0.05, baseline=0.02, oracle=None, spread=0.005), 0).verdict == "damaged"


@pytest.mark.parametrize("with_oracle", [True, False], ids=["oracle", "no-oracle"])
@pytest.mark.parametrize(("cell", "verdict"), CASES.values(), ids=CASES)
def test_shares_are_numbers_inside_their_intervals(cell, verdict, with_oracle):  # noqa: ARG001
    found = judge(cell if with_oracle else replace(cell, oracle=None), 0)
    for interval in (found.recovered, found.kept, found.known):
        if interval is not None:
            assert all(math.isfinite(v) for v in (interval.low, interval.value, interval.high))
            assert interval.low <= interval.value <= interval.high
    assert found.recovered is not None


@pytest.mark.parametrize("with_oracle", [True, False], ids=["oracle", "no-oracle"])
def test_recovered_share_is_always_a_number(with_oracle):
    """Random levels and spreads, few items and many: no evidence may stop an audit."""
    rng = np.random.default_rng(0)
    verdicts = set()
    for seed in range(250):
        items = int(rng.choice([1, 5, 40, 60]))
        levels = rng.choice([0.0, 0.02, 0.1, 0.5, 0.9, 1.0], 6)
        spread = float(rng.choice([0.0, 0.02, 0.3]))
        lists = [around(level, spread, items, seed) for level in levels[:5]]
        found = judge(
            Evidence(
                *lists[:4], lists[4] if with_oracle else None, around(levels[5], spread, 7), around(0.9, spread, 7)
            ),
            seed,
        )
        assert math.isfinite(found.recovered.value)
        assert found.recovered.low <= found.recovered.value <= found.recovered.high
        verdicts.add(found.verdict)
    assert verdicts == {"held", "returned", "damaged", "undecided"}


def test_recovered_share_by_hand():
    found = judge(evidence(0.50, 0.10), 0)
    cell = evidence(0.50, 0.10)
    means = {name: sum(getattr(cell, name)) / ITEMS for name in ("compressed", "unlearned", "baseline", "oracle")}
    gap = means["baseline"] - means["unlearned"]
    assert found.recovered.value == pytest.approx((means["compressed"] - means["unlearned"]) / gap)
    assert found.recovered_of == "unlearned..baseline"
    assert found.known.value == pytest.approx(
        (means["compressed"] - means["oracle"]) / (means["baseline"] - means["oracle"])
    )
    assert found.kept.value == pytest.approx(sum(cell.retain) / sum(cell.retain_target))


@pytest.mark.parametrize(
    ("cell", "of"),
    [
        (evidence(0.90, 0.90), "oracle..baseline"),
        (evidence(0.90, 0.90, oracle=None), "zero..baseline"),
        (evidence(0.02, 0.10, baseline=0.02, oracle=0.02, spread=0.005), "unlearned..target"),
        (evidence(0.01, 0.90, baseline=0.01, target=0.90, oracle=0.01, spread=0.005), "zero..target"),
        (evidence(0.01, 0.01, baseline=0.01, target=0.01, oracle=0.01, spread=0.005), "probability"),
    ],
    ids=["nothing-taken", "nothing-taken-no-oracle", "nothing-left", "nothing-taken-nothing-left", "nothing-known"],
)
def test_levels_that_the_share_is_taken_of(cell, of):
    assert judge(cell, 0).recovered_of == of


def test_same_seed_same_judgement():
    cell = CASES["few-noisy-items"][0]
    assert judge(cell, 1) == judge(cell, 1)
    assert judge(cell, 1).recovered != judge(cell, 2).recovered


@pytest.mark.parametrize(
    "name", [field.name for field in fields(Evidence) if field.name not in ("collapsed", "oracle_dense")]
)
@pytest.mark.parametrize(
    "change", [lambda v: v[:-1], lambda v: [*v, 0.5], lambda v: v[:0]], ids=["less", "more", "none"]
)
def test_lists_of_unlike_lengths(name, change):
    cell = evidence(0.5, 0.1)
    with pytest.raises(ValueError, match="scores: lists of unlike lengths"):
        judge(replace(cell, **{name: change(list(getattr(cell, name)))}), 0)


def test_target_that_knows_nothing_of_the_retain_set():
    """What is kept of nothing is not defined; the rest is judged."""
    found = judge(replace(CASES["bucketed-compressed"][0], retain_target=[0.0] * ITEMS), 0)
    assert (found.kept, found.verdict) == (None, "returned")


def test_few_items_decide_what_is_clear():
    few = first("bucketed-compressed", 4)
    assert {found.verdict for found in judge_together([few] * 5, 0)} == {"returned"}


def test_one_item_decides_nothing():
    for name in ("bucketed-compressed", "recipe-erases", "target-dense", "well-forgotten"):
        found = judge(first(name, 1), 0)
        assert (found.verdict, found.unforgotten) == ("undecided", False), name


@pytest.mark.parametrize("still", [3, 5])
def test_erasure_takes_evidence(still):
    """A tenth of the items is still known under the recipe: too little to measure a return by, nor is it gone."""
    known = [0.9] * still + [0.0] * (ITEMS - still)
    zeros, target = [0.0] * ITEMS, [0.9] * ITEMS
    found = judge(Evidence(known, zeros, known, target, zeros, [0.9] * 5, [0.9] * 5), 0)
    assert found.verdict == "undecided", found
    gone = judge(Evidence(zeros, zeros, zeros, target, zeros, [0.9] * 5, [0.9] * 5), 0)
    assert gone.verdict == "damaged"


def test_what_forgot_in_part_is_not_called_unforgotten():
    target, unlearned = [0.9] * 10, [0.0] * 3 + [0.9] * 7
    found = judge(Evidence(unlearned, unlearned, target, target, None, [0.9] * 5, [0.9] * 5), 0)
    assert (found.verdict, found.unforgotten) == ("undecided", False)


def test_the_oracle_before_compression_tells_what_was_forgotten():
    """A recipe under which the oracle knows more changes nothing about what unlearning did before it."""
    cell = replace(CASES["well-forgotten"][0], oracle=around(0.6), oracle_dense=around(0.05))
    assert not judge(cell, 0).unforgotten
    assert judge(replace(CASES["target-dense"][0], oracle=around(0.9), oracle_dense=around(0.1)), 0).unforgotten


def test_too_few_retain_rows_do_not_let_a_model_hold():
    cell = replace(CASES["well-forgotten"][0], retain=[0.0], retain_target=[0.9])
    found = judge(cell, 0)
    assert (found.verdict, found.reason) == (
        "undecided",
        "it keeps 0% of what the target knows of the retain set, of too few rows to tell",
    )


def test_a_collapsed_model_never_holds():
    flags = ("uniform output",)
    assert judge(replace(CASES["well-forgotten"][0], collapsed=flags), 0).verdict == "damaged"
    assert judge(replace(CASES["bucketed-compressed"][0], collapsed=flags), 0).verdict == "returned"
    assert judge(replace(CASES["well-forgotten"][0], collapsed=flags), 0).reason == "it collapsed: uniform output"
