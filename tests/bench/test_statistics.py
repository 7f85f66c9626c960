"""Bootstrap intervals: how often they hold the truth, that they are paired, and that the seed decides them."""

import math

import numpy as np
import pytest
from remanence.bench.statistics import RESAMPLES, Interval, bootstrap_mean, bootstrap_share, resamples


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


def coverage(interval, truth, repetitions=200):
    rng = np.random.default_rng(11)
    hits = 0
    for repetition in range(repetitions):
        found = interval(rng, repetition)
        hits += found.low <= truth <= found.high
    return hits / repetitions


def test_coverage_of_the_mean():
    """95 % nominal; the percentile interval of 40 items falls a little short, 200 repetitions know it to 1.5 %."""
    # Beta(0.5, 1.5): most probabilities near 0, some near 1, as after unlearning. Its mean is 1/4.
    assert 0.90 <= coverage(lambda rng, seed: bootstrap_mean(rng.beta(0.5, 1.5, 40), seed), 0.25) <= 0.99


def test_coverage_of_the_share():
    def interval(rng, seed):
        floor = rng.beta(1, 9, 40)  # mean 0.1
        whole = rng.beta(9, 1, 40)  # mean 0.9
        part = floor + (whole - floor) * rng.beta(2, 6, 40)  # a share of 1/4, of its own for every item
        return bootstrap_share(part, floor, whole, seed)

    assert 0.90 <= coverage(interval, 0.25) <= 0.99


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
    found = bootstrap_share([0.6, 0.5], [0.9, 0.9], [0.1, 0.2], seed=0)
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
        assert found.low <= found.value <= found.high
        assert all(math.isfinite(number) for number in (found.low, found.value, found.high))


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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nothing_has_no_mean():
    with pytest.raises(ValueError):  # noqa: PT011 (numpy's words)
        bootstrap_mean([], 0)
