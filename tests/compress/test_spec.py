"""Short names of recipes: parsed, printed, refused."""

import pytest
from remanence.compress.spec import DENSE, PruneSpec, QuantSpec, Recipe, parse_recipe


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("dense", DENSE),
        ("rtn-w4a16-g64", Recipe("rtn", QuantSpec(4, 64))),
        ("rtn-w4-g64", Recipe("rtn", QuantSpec(4, 64))),
        ("rtn-w8a16", Recipe("rtn", QuantSpec(8))),
        ("rtn-w3a16-g128", Recipe("rtn", QuantSpec(3, 128))),
        *((f"magnitude-s{p}", Recipe("magnitude", None, prune=PruneSpec(p / 100))) for p in (10, 29, 50, 57, 90)),
    ],
)
def test_names(name, recipe):
    assert parse_recipe(name) == recipe
    assert parse_recipe(recipe.name) == recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtn-w4a16-g46x", "did you mean rtn-w4a16-g64"),
        ("rnt-w4a16-g64", "did you mean rtn-w4a16-g64"),
        ("rtn-w5a16", "bits: 5 is not one of 3, 4, 8"),
        ("rtn-w4a16-g0", "group_size: 0"),
        ("rtn-w4a16-g12", "group_size: 12"),
        ("rtn-w4a4", "unknown"),
        ("", "known forms"),
        ("magnitud-s50", "did you mean magnitude-s50"),
        ("magnitude-w4a16", "unknown; did you mean magnitude-s"),
        ("rtn-s50", "unknown"),
        ("magnitude-s9", "sparsity: 0.09 is not a whole percentage from 0.1 to 0.9"),
        ("magnitude-s100", "sparsity: 1.0"),
        ("magnitude-s50-w4a16", "unknown"),
    ],
)
def test_unknown_names_are_refused_with_a_hint(name, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(name)


def test_groups():
    assert QuantSpec(4, 64).groups(192) == 3
    assert QuantSpec(4).groups(77) == 1
    with pytest.raises(ValueError, match="100 input features do not divide into groups of 64"):
        QuantSpec(4, 64).groups(100)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.125, 0.91, 1.0, -0.5, float("nan")])
def test_sparsities_without_a_name_are_refused(share):
    with pytest.raises(ValueError, match="is not a whole percentage"):
        PruneSpec(share)


def test_a_recipe_does_not_prune_and_quantize():
    with pytest.raises(ValueError, match="prunes or quantizes, not both"):
        Recipe("magnitude", QuantSpec(4), prune=PruneSpec(0.5))
