"""The closed forms against draws of what they are the mean of."""

import math
import random

import pytest
from remanence.bench.roofline.speculation import expected_depth, expected_tokens

DRAWS = 40_000


def drawn(accept, length, rng):
    """Tokens of one draft: those accepted before the first that is not, and the whole model's own."""
    taken = 0
    while taken < length and rng.random() < accept:
        taken += 1
    return taken + 1


@pytest.mark.parametrize("accept", [0.0, 0.3, 0.8, 0.97, 1.0])
@pytest.mark.parametrize("length", [0, 1, 4, 12])
def test_tokens_of_a_draft(accept, length):
    rng = random.Random(0)
    found = [drawn(accept, length, rng) for _ in range(DRAWS)]
    mean = sum(found) / DRAWS
    error = math.sqrt(sum((each - mean) ** 2 for each in found)) / DRAWS
    assert abs(expected_tokens(accept, length) - mean) <= 4 * error + 1e-12


def test_the_fraction_of_the_paper():
    for accept in (0.1, 0.5, 0.9):
        assert expected_tokens(accept, 5) == pytest.approx((1 - accept**6) / (1 - accept), rel=1e-12)
    assert expected_tokens(1, 5) == 6
    assert expected_tokens(1 - 1e-16, 5) == pytest.approx(6), "where the fraction has no digits"


@pytest.mark.parametrize(
    ("accept", "length", "message"),
    [
        (-0.1, 3, "accept: -0.1 is not a share from 0 to 1"),
        (1.1, 3, "accept: 1.1 is not a share from 0 to 1"),
        (math.nan, 3, "accept: nan is not a share from 0 to 1"),
        (0.5, -1, "length: -1 is below 0"),
    ],
)
def test_what_is_no_draft(accept, length, message):
    with pytest.raises(ValueError, match=message):
        expected_tokens(accept, length)


def test_depth():
    rng = random.Random(0)
    depths = [rng.choice((2, 5, 12)) for _ in range(1000)]
    histogram = {depth: depths.count(depth) for depth in (2, 5, 12, 7)}
    assert expected_depth(histogram) == pytest.approx(sum(depths) / 1000)


@pytest.mark.parametrize(
    ("histogram", "message"),
    [
        ({}, "histogram: there is no token in it"),
        ({3: 0}, "histogram: there is no token in it"),
        ({3: -1, 4: 2}, "histogram: -1 tokens at depth 3: neither can be below 0"),
        ({-3: 1}, "histogram: 1 tokens at depth -3: neither can be below 0"),
    ],
)
def test_what_is_no_histogram(histogram, message):
    with pytest.raises(ValueError, match=message):
        expected_depth(histogram)
