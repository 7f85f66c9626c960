"""How far two looks at a model agree, against numbers worked out by hand."""

import pytest
from remanence.compress.agreement import agreements, rank_correlation


def test_rank_correlation():
    a = {"x": 1.0, "y": 2.0, "z": 9.0, "w": 9.0}
    assert rank_correlation(a, {name: value**3 for name, value in a.items()}) == pytest.approx(1)
    assert rank_correlation(a, {name: -value for name, value in a.items()}) == pytest.approx(-1)
    # Ranks 1, 2, 3.5, 3.5 and 2, 1, 3, 4: covariance 3.75 (from means of 2.5), squares 4.5 and 5.
    other = {"w": 8.0, "z": 7.0, "y": 3.0, "x": 4.0}
    assert rank_correlation(a, other) == pytest.approx(3.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(a, dict.fromkeys(a, 1.0)) is None


def test_every_two_looks_are_compared():
    scores = {"text": {"x": 1.0, "y": 2.0}, "retain": {"y": 5.0, "x": 7.0}, "forget": {"x": 0.1, "y": 0.3}}
    widths = {"text": {"x": 2, "y": 4}, "retain": {"y": 2, "x": 4}, "forget": {"x": 2, "y": 8}}
    found = agreements(scores, widths)
    assert list(found) == [("text", "retain"), ("text", "forget"), ("retain", "forget")]
    assert [pair.rank_correlation for pair in found.values()] == pytest.approx([-1, 1, -1])
    assert [pair.other_width for pair in found.values()] == [1, 0.5, 1]
