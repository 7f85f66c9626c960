"""Bootstrap intervals: how often they hold the truth, that they are paired, and that the seed decides them."""

import math

import numpy as np
import pytest
from remanence.bench.statistics import (
    RESAMPLES,
    TAIL,
    Draws,
    Interval,
    bootstrap_mean,
    holm,
    mean_draws,
    resamples,
    share_draws,
)
from scipy import stats


def bootstrap_share(*asked, seed=None):
    return share_draws(*asked, *([] if seed is None else [seed])).interval()


def test_resamples_are_seeded_draws_with_replacement():
    first, again, other = resamples(30, 7), resamples(30, 7), resamples(30, 8)
    assert first.shape == (RESAMPLES, 30)
    assert (first == again).all()
    assert (first != other).any()
    assert (first.min(), first.max()) == (0, 29)
    assert len(set(first[0].tolist())) < 30, "with replacement"
    # 60000 draws over 30 items: each expected 2000 times, with a standard deviation of 44.
    assert np.abs(np.bincount(first.ravel()) - RESAMPLES).max() < 250


def test_mean_interval_is_the_textbook_one_for_many_items():
    values = np.random.default_rng(0).normal(0.4, 0.1, 400)
    found = bootstrap_mean(values.tolist(), seed=1)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean(), rel=1e-14)
    # 2000 resamples know the ends to about 5 % of the half width.
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_share_interval_is_that_of_the_ratio_of_means():
    """Against the delta method, with the covariance of numerator and denominator."""
    rng = np.random.default_rng(3)
    n = 400
    floor = rng.normal(0.2, 0.05, n)
    whole = floor + rng.normal(0.6, 0.1, n)
    part = floor + 0.3 * (whole - floor) + rng.normal(0.0, 0.05, n)
    found = bootstrap_share(part.tolist(), floor.tolist(), whole.tolist(), seed=0)
    top, gap = part - floor, whole - floor
    share = top.mean() / gap.mean()
    half = 1.96 * (top - share * gap).std() / gap.mean() / math.sqrt(n)
    assert found.value == pytest.approx(share, rel=1e-12)
    assert found.low == pytest.approx(share - half, abs=0.15 * half)
    assert found.high == pytest.approx(share + half, abs=0.15 * half)


def coverage(draw, interval, truth, repetitions=1000):
    """Share of `repetitions` samples whose interval holds the truth."""
    rng = np.random.default_rng(11)
    hits = 0
    for repetition in range(repetitions):
        found = interval(*draw(rng), repetition)
        hits += found.low <= truth <= found.high
    return hits / repetitions


def share_of_a_quarter(rng, items=40):
    floor = rng.beta(1, 9, items)  # mean 0.1
    whole = rng.beta(9, 1, items)  # mean 0.9
    return floor + (whole - floor) * rng.beta(2, 6, items), floor, whole


# What known effects look like: symmetric, few items, most of it near 0 as after unlearning, yes or no.
SAMPLES = {
    "normal-40": (lambda rng: (rng.normal(0.4, 0.1, 40),), bootstrap_mean, 0.4),
    "normal-10": (lambda rng: (rng.normal(0.4, 0.1, 10),), bootstrap_mean, 0.4),
    "skewed-40": (lambda rng: (rng.beta(0.5, 1.5, 40),), bootstrap_mean, 0.25),
    "very-skewed-40": (lambda rng: (rng.beta(0.1, 1.9, 40),), bootstrap_mean, 0.05),
    "normal-4": (lambda rng: (rng.normal(0.4, 0.1, 4),), bootstrap_mean, 0.4),
    "yes-or-no-100": (lambda rng: ((rng.random(100) < 0.3).astype(float),), bootstrap_mean, 0.3),
    "share-40": (share_of_a_quarter, bootstrap_share, 0.25),
    "share-200": (lambda rng: share_of_a_quarter(rng, 200), bootstrap_share, 0.25),
    "no-recovery-40": (
        lambda rng: (lambda u: (u + rng.normal(0, 0.05, 40), u, u + rng.beta(9, 2, 40)))(rng.beta(1, 20, 40)),
        bootstrap_share,
        0.0,
    ),
}


@pytest.mark.parametrize(("draw", "interval", "truth"), SAMPLES.values(), ids=SAMPLES)
def test_coverage(draw, interval, truth):
    """95% nominal; 1000 samples know it to 0.7%."""
    assert 0.93 <= coverage(draw, interval, truth) <= 0.97


@pytest.mark.parametrize("items", [2, 3, 5, 10, 40, 1000])
@pytest.mark.parametrize("limit", [0.3, 0.45, 0.5, 0.55, 0.7])
def test_p_values_are_the_intervals_read_the_other_way(items, limit):
    found = mean_draws(np.random.default_rng(items).normal(0.5, 0.2, items), seed=1)
    interval = found.interval()
    assert (found.p_below(limit) <= TAIL) == (interval.low > limit)
    assert (found.p_above(limit) <= TAIL) == (interval.high < limit)


def test_p_values_are_uniform_when_there_is_nothing():
    """Of 1000 samples whose mean is the limit, 2.5% may say that it lies above."""
    rng = np.random.default_rng(4)
    p = [mean_draws(rng.normal(0.1, 0.1, 30), seed).p_below(0.1) for seed in range(1000)]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.015 <= np.mean(np.array(p) <= TAIL) <= 0.037


def test_p_value_is_that_of_student_for_many_items():
    values = np.random.default_rng(2).normal(0.13, 0.1, 200)
    expected = stats.ttest_1samp(values, 0.12, alternative="greater").pvalue
    assert mean_draws(values, 0).p_below(0.12) == pytest.approx(expected, rel=0.2)


def test_one_item_proves_nothing():
    found = mean_draws([0.9], 0)
    assert (found.p_below(0.1), found.p_above(0.1)) == (1.0, 1.0)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_holm_is_the_textbook_one(count):
    p = np.random.default_rng(count).uniform(0, 0.2, count)
    order = np.argsort(p)
    expected = np.empty(count)
    expected[order] = np.maximum.accumulate(np.minimum(1, (count - np.arange(count)) * p[order]))
    assert holm(p.tolist()) == pytest.approx(expected.tolist(), rel=1e-12)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_value_beyond_the_resamples_is_students():
    """No draw lies below the limit, which alone would leave 1/2001."""
    values = np.random.default_rng(3).normal(0.5, 0.1, 12)
    expected = stats.ttest_1samp(values, 0.1, alternative="greater").pvalue
    assert mean_draws(values, 0).p_below(0.1) == pytest.approx(expected, rel=0.9)
    assert expected < 1e-5 < 1 / 2001
    assert mean_draws([0.5] * 3, 0).p_below(0.1) == 0.0
    found = Draws(0.5, np.append(np.ones(99), np.inf), 12)
    assert found.p_below(0.1) > 1e-3, "nothing is known of a spread that is not finite"


def test_share_without_a_gap_in_some_resamples_is_unbounded():
    """Gap +1 on one item, -0.9 on the other: a quarter of the resamples each way, whose shares say nothing."""
    found = share_draws([0.5, 0.5], [0.0, 0.9], [1.0, 0.0], seed=0)
    assert np.isinf(found.draws).mean() == pytest.approx(0.25, abs=0.03)
    assert found.interval() == Interval(pytest.approx(1.0), -math.inf, math.inf)
    assert found.p_below(0.1) > TAIL < found.p_above(0.1)


def test_items_are_paired():
    """Lists that rise and fall together leave nothing uncertain about their share."""
    rng = np.random.default_rng(5)
    floor = rng.uniform(0, 0.2, 20)
    whole = rng.uniform(0.5, 1, 20)
    found = bootstrap_share(floor + 0.4 * (whole - floor), floor, whole, seed=0)
    assert found.value == pytest.approx(0.4)
    assert found.high - found.low < 1e-12
    # The same numbers in another order are not: the interval is wide.
    shuffled = bootstrap_share(rng.permutation(floor + 0.4 * (whole - floor)), floor, whole, seed=0)
    assert shuffled.high - shuffled.low > 0.02


@pytest.mark.parametrize("share", [-0.5, 0.0, 0.3, 1.0, 1.7])
def test_exact_shares(share):
    floor, whole = [0.1, 0.3, 0.2], [0.9, 0.7, 0.8]
    part = [f + share * (w - f) for f, w in zip(floor, whole, strict=True)]
    found = bootstrap_share(part, floor, whole, seed=0)
    assert (found.low, found.value, found.high) == pytest.approx((share, share, share), abs=1e-12)


def test_share_of_a_gap_downwards():
    found = bootstrap_share([0.6, 0.5] * 4, [0.9] * 8, [0.1, 0.2] * 4, seed=0)
    assert found.value == pytest.approx((0.55 - 0.9) / (0.15 - 0.9))
    assert 0 < found.low <= found.value <= found.high < 1


def test_seed_decides():
    values = [0.1, 0.5, 0.2, 0.9, 0.4]
    assert bootstrap_mean(values, 3) == bootstrap_mean(values, 3)
    assert bootstrap_mean(values, 3) != bootstrap_mean(values, 4)
    floor, whole = [0.0] * 5, [1.0, 0.9, 0.8, 0.9, 1.0]
    assert bootstrap_share(values, floor, whole, 3) == bootstrap_share(values, floor, whole, 3)
    assert bootstrap_share(values, floor, whole, 3) != bootstrap_share(values, floor, whole, 4)


@pytest.mark.parametrize("items", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(20))
def test_value_lies_inside_even_for_few_items(items, seed):
    rng = np.random.default_rng(seed)
    part, floor, whole = rng.uniform(0, 1, items), rng.uniform(0, 0.5, items), rng.uniform(0, 1, items)
    for found in (bootstrap_mean(part, seed), bootstrap_share(part, floor, whole, seed)):
        assert isinstance(found, Interval)
        assert math.isfinite(found.value)
        assert found.low <= found.value <= found.high


def test_equal_values_have_no_width():
    assert bootstrap_mean([0.25] * 9, 0) == Interval(0.25, 0.25, 0.25)


def test_more_items_narrow_the_interval():
    rng = np.random.default_rng(0)
    widths = []
    for items in (10, 100, 1000):
        found = bootstrap_mean(rng.uniform(0, 1, items), 0)
        widths.append(found.high - found.low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_no_gap_no_share():
    with pytest.raises(ValueError, match="there is no gap to take a share of"):
        bootstrap_share([0.1, 0.2], [0.5, 0.25], [0.25, 0.5], seed=0)


@pytest.mark.parametrize("call", [bootstrap_mean, mean_draws])
def test_nothing_has_no_mean(call):
    with pytest.raises(ValueError, match="values: none; at least one is needed"):
        call([], 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_named(bad):
    with pytest.raises(ValueError, match=f"values: item 2 is {bad}; every score must be a number"):
        bootstrap_mean([0.1, 0.2, bad], 0)
    with pytest.raises(ValueError, match="floor: item 1"):
        bootstrap_share([0.1, 0.2], [0.0, bad], [1.0, 1.0], 0)
