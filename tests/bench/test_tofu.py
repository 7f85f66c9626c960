"""TOFU's formulas at their edges, each against a plain computation; the real logs are in test_logs.py."""

import math

import numpy as np
import pytest
from remanence.bench.tofu import (
    VARIANTS,
    Items,
    choice_probability,
    collapsed,
    components,
    forget_quality,
    forget_truth_ratio,
    harmonic_mean,
    mean,
    model_utility,
    summary,
    truth_ratio,
    utility_truth_ratio,
)
from scipy.stats import ks_2samp


def plain_ratio(base, wrong, variant):
    """In probabilities, not logarithms."""
    p, q = np.exp(-np.float64(base)), np.exp(-np.asarray(wrong, dtype=np.float64))
    if variant == "arithmetic":
        return q.mean() / p
    geometric = q.prod() ** (1 / len(q))
    return p / (p + geometric) if variant == "prob" else geometric / p


def random_items(rng, rows, choices=False):
    return Items(
        nll=rng.exponential(1, rows).tolist(),
        base_nll=rng.exponential(1, rows).tolist(),
        wrong_nll=[rng.exponential(2, rng.integers(1, 6)).tolist() for _ in range(rows)],
        rouge=rng.uniform(0.1, 1, rows).tolist(),
        choices=choices,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [1, 2, 57])
def test_truth_ratios_against_probabilities(variant, rows):
    items = random_items(np.random.default_rng(rows), rows)
    expected = [plain_ratio(b, w, variant) for b, w in zip(items.base_nll, items.wrong_nll, strict=True)]
    assert items.truth_ratio(variant) == pytest.approx(expected, rel=1e-12)
    ratios = np.array(expected)
    prob = variant == "prob"
    assert forget_truth_ratio(items, variant) == pytest.approx(
        (ratios if prob else np.minimum(ratios, 1 / ratios)).mean(), rel=1e-12
    )
    assert utility_truth_ratio(items, variant) == pytest.approx(
        (ratios if prob else np.maximum(0, 1 - ratios)).mean(), rel=1e-12
    )


@pytest.mark.parametrize("choices", [False, True])
def test_probabilities_against_numpy(choices):
    items = random_items(np.random.default_rng(3), 20, choices)
    p = np.exp(-np.array(items.nll))
    if choices:
        p = p / (p + [np.exp(-np.array(wrong)).sum() for wrong in items.wrong_nll])
    assert items.probability == pytest.approx(p.tolist(), rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_utility_against_numpy(variant):
    rng = np.random.default_rng(5)
    sets = {name: random_items(rng, 30, name != "retain") for name in ("retain", "real_authors", "world_facts")}
    values = []
    for items in sets.values():
        values += [np.mean(items.probability), np.mean(items.rouge)]
        ratios = np.array([plain_ratio(b, w, variant) for b, w in zip(items.base_nll, items.wrong_nll, strict=True)])
        values.append((ratios if variant == "prob" else np.maximum(0, 1 - ratios)).mean())
    assert model_utility(sets, variant) == pytest.approx(9 / sum(1 / v for v in values), rel=1e-12)
    assert len([v for parts in components(sets).values() for v in parts.values()]) == 9


def test_truth_ratio_variants_by_hand():
    base, wrong = -math.log(0.5), [-math.log(0.1), -math.log(0.4)]
    assert truth_ratio(base, wrong) == pytest.approx(0.2 / 0.5)
    assert truth_ratio(base, wrong, "arithmetic") == pytest.approx(0.25 / 0.5)
    assert truth_ratio(base, wrong, "prob") == pytest.approx(0.5 / 0.7)


def test_truth_ratio_needs_a_wrong_answer_and_a_known_variant():
    with pytest.raises(ValueError, match="wrong: none; a truth ratio needs at least one wrong answer"):
        truth_ratio(1.0, [])
    with pytest.raises(ValueError, match="variant: 'mean' is not one of geometric, arithmetic, prob"):
        truth_ratio(1.0, [1.0], "mean")


EXTREMES = [0.0, 800.0, 1e4]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("right", EXTREMES)
@pytest.mark.parametrize("wrong", EXTREMES)
def test_collapsed_models_have_finite_truth_ratios(right, wrong, variant):
    """exp(-800) is 0 in float64: only in log space is 0 over 0 still 1."""
    ratio = truth_ratio(right, [wrong] * 5, variant)
    assert math.isfinite(ratio)
    if right == wrong:
        assert ratio == (0.5 if variant == "prob" else 1.0)
    elif variant != "prob":
        assert (ratio > 1) == (right > wrong)
    items = Items([right], [right], [[wrong] * 5], [0.0])
    for aggregate in (forget_truth_ratio, utility_truth_ratio):
        assert 0.0 <= aggregate(items, variant) <= 1.0


@pytest.mark.parametrize("right", EXTREMES)
@pytest.mark.parametrize("wrong", EXTREMES)
def test_collapsed_models_have_finite_choice_probabilities(right, wrong):
    probability = choice_probability(right, [wrong] * 3)
    assert probability == pytest.approx(0.25 if right == wrong else float(right < wrong), abs=1e-300)


def test_choice_probability():
    right, wrong = 0.3, [1.0, 0.2, 4.0]
    p = [math.exp(-loss) for loss in (right, *wrong)]
    assert choice_probability(right, wrong) == pytest.approx(p[0] / sum(p), rel=1e-14)
    assert choice_probability(right, []) == 1.0


def alike(nll, rows=5, noise=0.0):
    rng = np.random.default_rng(0)
    near = lambda: (nll + noise * rng.normal(size=rows)).tolist()  # noqa: E731
    return Items(near(), near(), [near() for _ in range(rows)], [0.0] * rows)


def test_collapse_is_said():
    """A uniform model has the best forget truth ratio there is: 1."""
    uniform = alike(math.log(32000))
    assert forget_truth_ratio(uniform) == 1.0
    assert collapsed(uniform) == ["right and wrong answers are equally likely in every row, as under uniform output"]
    constant = alike(40.0, noise=3.0)
    assert collapsed(constant) == ["true answers take 40.1 nats per token, more than at random"]
    assert collapsed(alike(2.0, noise=0.5)) == []
    assert collapsed(alike(2.0, rows=2)) == [], "two rows may be alike by chance"
    found = summary({"retain": alike(2.0, noise=0.5)}, uniform, None)
    assert found["flags"] == [
        "forget: right and wrong answers are equally likely in every row, as under uniform output"
    ]


@pytest.mark.parametrize("n", [3, 40, 200, 400])
def test_forget_quality_floor(n):
    """Two lists without overlap: D = 1, p = 2 / C(2n, n)."""
    low, high = [i / n for i in range(n)], [2 + i / n for i in range(n)]
    quality = forget_quality(low, high)
    assert quality.d == 1.0
    assert quality.p == pytest.approx(2 / math.comb(2 * n, n), rel=1e-9)
    assert quality.sign == -1
    assert forget_quality(high, low).sign == 1


def test_forget_quality_below_the_smallest_float():
    quality = forget_quality([0.0] * 700, [1.0] * 600)
    assert quality.p == 0.0
    exact = math.log10(2) - (math.lgamma(1301) - math.lgamma(701) - math.lgamma(601)) / math.log(10)
    assert quality.log10_p == pytest.approx(exact, rel=1e-12)
    assert forget_quality([i / 4000 for i in range(4000)], [0.8 + i / 3000 for i in range(3000)]).log10_p < -300


@pytest.mark.parametrize(("n", "shift"), [(600, 585), (1000, 990), (1000, 950)])
def test_forget_quality_below_the_smallest_float_with_an_overlap(n, shift):
    """Against the sum over paths in whole numbers (Gnedenko & Korolyuk 1951)."""
    low, high = [float(i) for i in range(n)], [float(i + shift) + 0.5 for i in range(n)]
    quality = forget_quality(low, high)
    h = round(quality.d * n)
    paths = 2 * sum((-1) ** (j + 1) * math.comb(2 * n, n - j * h) for j in range(1, n // h + 1))
    exact = (math.log10(paths) if paths < 1e300 else len(str(paths)) - 1 + math.log10(int(str(paths)[:15]) / 1e14)) - (
        len(str(math.comb(2 * n, n))) - 1 + math.log10(int(str(math.comb(2 * n, n))[:15]) / 1e14)
    )
    assert quality.log10_p == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("sizes", [(1, 1), (5, 9), (40, 40), (300, 300)])
def test_forget_quality_is_scipys_exact_test(sizes):
    rng = np.random.default_rng(sizes[0])
    a, b = rng.exponential(1, sizes[0]).tolist(), rng.exponential(2, sizes[1]).tolist()
    found = forget_quality(a, b)
    expected = ks_2samp(a, b, method="exact")
    assert (found.p, found.d) == (expected.pvalue, expected.statistic)
    grid = sorted([*a, *b])
    gaps = [np.mean(np.array(a) <= x) - np.mean(np.array(b) <= x) for x in grid]
    widest = gaps[int(np.argmax(np.abs(gaps)))]
    assert found.d == pytest.approx(abs(widest))
    assert found.sign == -np.sign(widest)
    swapped = forget_quality(b, a)
    assert (swapped.p, swapped.sign) == (pytest.approx(found.p, rel=1e-9), -found.sign)


def test_forget_quality_of_the_oracle_itself():
    ratios = [0.1 * i for i in range(40)]
    quality = forget_quality(ratios, ratios[::-1])
    assert (quality.p, quality.log10_p, quality.d, quality.sign) == (1.0, 0.0, 0.0, 0)


@pytest.mark.parametrize(("ratios", "oracle"), [([], [1.0]), ([1.0], []), ([], [])])
def test_forget_quality_needs_rows(ratios, oracle):
    with pytest.raises(ValueError, match="truth ratios: none"):
        forget_quality(ratios, oracle)


def scored(probability, rouge, ratio):
    """Two rows with these values."""
    base = 1.0
    wrong = [[base - math.log(ratio)]] * 2 if ratio is not None else [[], []]
    return Items([-math.log(probability)] * 2, [base] * 2, wrong, [rouge] * 2)


def test_set_without_wrong_answers_counts_two():
    sets = {"retain": scored(0.9, 0.8, None), "general": scored(0.5, 0.6, 0.1)}
    values = [0.9, 0.8, 0.5, 0.6, 0.9]
    assert model_utility(sets) == pytest.approx(len(values) / sum(1 / v for v in values), rel=1e-14)


@pytest.mark.parametrize("zero", [(0.9, 0.0, 0.3), (0.9, 0.8, 1.5)], ids=["rouge", "ratio"])
def test_model_utility_is_zero_when_any_number_is(zero):
    assert model_utility({"retain": scored(*zero), "general": scored(0.5, 0.6, 0.1)}) == 0.0


def test_harmonic_mean():
    assert harmonic_mean([1.0, 4.0]) == pytest.approx(1.6)
    assert harmonic_mean([0.3]) == pytest.approx(0.3)
    assert harmonic_mean([0.3, 0.0]) == 0.0
    for bad in ([], [0.5, -0.1]):
        with pytest.raises(ValueError, match="a harmonic mean needs at least one, none below 0"):
            harmonic_mean(bad)


def test_mean_of_nothing():
    with pytest.raises(ValueError, match="values: none; at least one is needed"):
        mean([])
    assert mean([0.1] * 10) == 0.1


@pytest.mark.parametrize("field", ["nll", "base_nll", "rouge", "wrong_nll"])
def test_a_value_that_is_nan_names_the_item(field):
    fields = {"nll": [1.0] * 3, "base_nll": [1.0] * 3, "rouge": [1.0] * 3, "wrong_nll": [[1.0, 2.0]] * 3}
    fields[field] = [*fields[field][:2], [0.1, math.nan] if field == "wrong_nll" else math.nan]
    with pytest.raises(ValueError, match="item 2: a value is NaN"):
        Items(**fields)


def test_lists_of_unlike_lengths():
    with pytest.raises(ValueError, match=r"items: lists of unlike lengths.*'rouge': 1"):
        Items([1.0, 1.0], [1.0, 1.0], [[], []], [1.0])


def test_all_right_and_none_right():
    right = Items([0.0] * 3, [0.0] * 3, [[50.0]] * 3, [1.0] * 3)
    wrong = Items([50.0] * 3, [50.0] * 3, [[0.0]] * 3, [0.0] * 3)
    assert model_utility({"retain": right}) == pytest.approx(1.0)
    assert model_utility({"retain": wrong}) == 0.0
    assert (forget_truth_ratio(right), forget_truth_ratio(wrong)) == pytest.approx((0.0, 0.0), abs=1e-12)
