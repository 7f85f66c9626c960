"""Recipes as YAML: the same object as from the short name, both ways; what is wrong is named with file and field."""

import pytest
from remanence.compress.knobs import GPTQ
from remanence.compress.recipe import Recipe, parse_recipe
from remanence.compress.recipe_file import from_yaml, read_recipe, to_yaml
from remanence.compress.spec import QuantSpec

NAMES = [
    "dense",
    "rtn-w4a16-g64",
    "rtn-w4a16-g64-plain",
    "rtn-w8a16",
    "rtn-w2a16-g64-asym",
    "gptq-w4a16-g128+act_order=none+damp=0.1@retain:64+forget:32",
    "awq-w4a16-g128-asym+duo=false",
    "signround-w3a16-g64+learning_rate=0.01",
    "hqq-w4a16-g64-asym",
    "bnb-nf4-dq",
    "magnitude-s50",
    "wanda-2:4+t_groups=bias|norm+t_source=forget@retain:4",
    "random-s30+scope=global+seed=4",
    "gptq-w4a16-g64+w2=fc1|re:.*q_proj+w8=fc2+p_sparsity=0.5+p_method=wanda+p_scope=layer",
    "rtn-w4a16+ignore=lm_head|re:.*gate",
    "rtn-w8a8",
    "gptq-w4a4-g64+a_symmetric=false+a_search=true+a_fallback=0.1",
    "rtn-w8a8+a_clip=0.9+a_narrow=true",
]


@pytest.mark.parametrize("name", NAMES)
def test_yaml_and_short_name_say_the_same(name, tmp_path):
    recipe = parse_recipe(name)
    assert from_yaml(to_yaml(recipe)) == recipe
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert read_recipe(str(tmp_path / "recipe.yaml")) == read_recipe(name) == recipe


def test_what_is_left_out_is_the_default():
    text = "method: gptq\nbits: 4\ngroup_size: 64\nsymmetric: false\noptions: {act_order: static}\n"
    spec = QuantSpec(4, 64, symmetric=False)
    assert from_yaml(text) == Recipe("gptq", spec, options=GPTQ("static", scale="minmax"))
    assert from_yaml("method: rtn\nbits: 4\n") == parse_recipe("rtn-w4a16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [", "not YAML"),
        ("- gptq", "not a recipe"),
        ("", "not a recipe"),
        ("bits: 4", "method: missing"),
        ("method: rtn\nbits: 4\nbits: 3", "bits: is there twice"),
        ("method: magic\nbits: 4", "method: 'magic' is not one of"),
        ("method: rtn\nbits: 4\ngroupsize: 64", "groupsize: no field of a recipe"),
        ("method: rtn", "bits: None does not go with rtn"),
        ("method: bnb\nbits: 4", "bits: 4 does not go with bnb"),
        ("method: rtn\nbits: '4'", "bits: '4' is not int"),
        ("method: rtn\nbits: 5", "bits: 5 is not one of"),
        ("method: rtn\nbits: 4\nsymmetric: maybe", "symmetric: 'maybe' is not bool"),
        ("method: rtn\nbits: 4\noptions: {damp: 1}", "damp: rtn has no such knob"),
        ("method: rtn\nbits: 4\nignore: lm_head", "ignore: 'lm_head' is not a list"),
        ("method: gptq\nbits: 4\ncalibration: web:3", "calibration: 'web'"),
        ("method: rtn\nbits: 4\nactivation: {}", "activation: bits: missing"),
        ("method: rtn\nbits: 4\nactivation: 8", "activation: 8 is not dict"),
        ("method: rtn\nbits: 4\nactivation: {bits: 8, rotate: 1}", "activation: rotate: unknown"),
        ("method: rtn\nbits: 4\nactivation: {bits: 8, clip: yes}", "activation: clip: True is not float"),
        ("method: magnitude", "prune: magnitude without a sparsity"),
        ("method: magnitude\nprune: {sparsity: half}", "prune: sparsity: 'half' is not float"),
        ("method: dense\nprune: {sparsity: 0.5}", "prune: magnitude does not go with dense"),
        ("method: rtn\nbits: 4\nwidths: {8: down_proj}", "widths: 8: 'down_proj'; expected a width and a list"),
        ("method: dense\noptions: {}", "options: dense has none"),
    ],
)
def test_what_is_wrong_is_named(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(str(tmp_path / "r.yaml"))
    assert str(tmp_path / "r.yaml") in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such recipe file"):
        read_recipe(str(tmp_path / "none.yaml"))
