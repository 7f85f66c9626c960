"""Short names of recipes: parsed, printed, refused."""

import re

import pytest
from remanence.compress.knobs import AWQ, GPTQ, HQQ, METHODS, PLAIN_RTN, RTN, BnB, SignRound, SmoothQuant
from remanence.compress.recipe import DENSE, Recipe, parse_recipe
from remanence.compress.spec import (
    ActivationSpec,
    Calibration,
    KVSpec,
    PruneSpec,
    QuantSpec,
    Retrain,
    Rotation,
    parse_calibration,
)
from remanence.kernels import ops

G64, ASYM = QuantSpec(4, 64), QuantSpec(4, 64, symmetric=False)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("dense", DENSE),
        ("rtn-w4a16-g64", Recipe("rtn", G64)),
        ("rtn-w8a16", Recipe("rtn", QuantSpec(8))),
        ("rtn-w3a16-g128", Recipe("rtn", QuantSpec(3, 128))),
        ("rtn-w2a16-g64-asym", Recipe("rtn", QuantSpec(2, 64, symmetric=False))),
        ("rtn-w4a16-g64-plain", Recipe("rtn", G64, options=PLAIN_RTN)),
        ("rtn-w4a16-g64+scale=absmax", Recipe("rtn", G64, options=RTN("absmax"))),
        ("rtn-w4a16-g64-asym-plain", Recipe("rtn", ASYM, options=RTN("minmax", False))),
        ("gptq-w4a16-g64-asym-plain", Recipe("gptq", ASYM, options=GPTQ(scale="minmax", clip=False))),
        ("gptq-w4a16-g128", Recipe("gptq", QuantSpec(4, 128))),
        ("gptq-w4a16-g64-asym", Recipe("gptq", ASYM, options=GPTQ(scale="minmax"))),
        (
            "gptq-w4a16-g64-plain+act_order=none+damp=0.1+alpha=0.25+sequential=false",
            Recipe("gptq", G64, options=GPTQ("none", 0.1, 128, 0.25, False, "absmax", False)),
        ),
        ("awq-w4a16-g64-asym+grid=10+duo=false", Recipe("awq", ASYM, options=AWQ(10, False, "minmax"))),
        ("smoothquant-w8a16+alpha=0.8", Recipe("smoothquant", QuantSpec(8), options=SmoothQuant(0.8))),
        ("hqq-w4a16-g64-asym+p=0.5", Recipe("hqq", ASYM, options=HQQ(0.5, scale="minmax"))),
        ("signround-w2a16-g64+learning_rate=0.01", Recipe("signround", QuantSpec(2, 64), options=SignRound(200, 0.01))),
        ("bnb-nf4", Recipe("bnb", None)),
        ("bnb-fp4-dq", Recipe("bnb", None, options=BnB("fp4", True))),
        ("bnb-int8", Recipe("bnb", None, options=BnB("int8"))),
        ("rtn-w4a16-g64+ignore=lm_head|re:.*gate", Recipe("rtn", G64, ignore=("lm_head", "re:.*gate"))),
        ("rtn-w4a16-g64+ignore=re:(q%7Ck)_proj|re:a%2B%40%25", Recipe("rtn", G64, ignore=("re:(q|k)_proj", "re:a+@%"))),
        ("rtn-w4a16-g64+ignore=", Recipe("rtn", G64, ignore=())),
        ("rtn-w8a8", Recipe("rtn", QuantSpec(8), activation=ActivationSpec(8))),
        ("rtn-w4a8-g64", Recipe("rtn", G64, activation=ActivationSpec(8))),
        ("rtn-w4a4+a_narrow=true", Recipe("rtn", QuantSpec(4), activation=ActivationSpec(4, narrow=True))),
        ("rtn-w4a4-g64-asym+a_clip=0.9", Recipe("rtn", ASYM, activation=ActivationSpec(4, clip=0.9))),
        (
            "gptq-w4a4-g64+damp=0.1+a_symmetric=false+a_search=true+a_fallback=0.1+ignore=lm_head|fc2@text:9",
            Recipe(
                "gptq",
                G64,
                ("lm_head", "fc2"),
                options=GPTQ(damp=0.1),
                calibration=Calibration(text=9),
                activation=ActivationSpec(4, False, search=True, fallback=0.1),
            ),
        ),
        (
            "smoothquant-w8a8+alpha=0.8+a_dynamic=false",
            Recipe(
                "smoothquant",
                QuantSpec(8),
                options=SmoothQuant(0.8),
                activation=ActivationSpec(8, dynamic=False),
            ),
        ),
        (
            "smoothquant-w8a8+equalization=log",
            Recipe("smoothquant", QuantSpec(8), options=SmoothQuant(equalization="log"), activation=ActivationSpec(8)),
        ),
        (
            "dense+kv_bits=4+kv_keys=token+kv_rotate=true",
            Recipe("dense", None, kv=KVSpec(4, keys="token", rotate=True)),
        ),
        ("gptq-w4a16-g64@retain:64+forget:32", Recipe("gptq", G64, calibration=Calibration(64, 32))),
        (
            "awq-w4a16-g64+grid=5@text:128+length:512",
            Recipe("awq", G64, options=AWQ(5), calibration=parse_calibration("text:128,length:512")),
        ),
        ("wanda-2:4", Recipe("wanda", None, prune=PruneSpec(0.5, "wanda", "2:4"))),
        (
            "sparsegpt-4:8@text:9",
            Recipe("sparsegpt", None, prune=PruneSpec(0.5, "sparsegpt", "4:8"), calibration=Calibration(text=9)),
        ),
        ("random-s40+scope=row+seed=3", Recipe("random", None, prune=PruneSpec(0.4, "random", scope="row", seed=3))),
        (
            "wanda-s50+order=prune-unlearn",
            Recipe("wanda", None, prune=PruneSpec(0.5, "wanda", order="prune-unlearn")),
        ),
        (
            "rtn-w4a16-g64+p_sparsity=0.5+p_order=prune-unlearn",
            Recipe("rtn", G64, prune=PruneSpec(0.5, order="prune-unlearn")),
        ),
        ("magnitude-s40+scope=global", Recipe("magnitude", None, prune=PruneSpec(0.4, scope="global"))),
        (
            "wanda-s50+t_groups=bias|norm+t_source=retain+t_steps=7",
            Recipe(
                "wanda", None, prune=PruneSpec(0.5, "wanda"), retrain=Retrain("bias|norm", source="retain", steps=7)
            ),
        ),
        (
            "gptq-w4a16-g64+w2=re:.*q%2B|fc1+w8=fc2+p_sparsity=0.5+p_method=sparsegpt+p_pattern=2:4",
            Recipe(
                "gptq",
                G64,
                widths=((2, ("re:.*q+", "fc1")), (8, ("fc2",))),
                prune=PruneSpec(0.5, "sparsegpt", "2:4"),
            ),
        ),
        *((f"magnitude-s{p}", Recipe("magnitude", None, prune=PruneSpec(p / 100))) for p in (10, 29, 50, 57, 90)),
    ],
)
def test_names(name, recipe):
    assert parse_recipe(name) == recipe
    assert recipe.name == str(recipe) == name
    assert hash(parse_recipe(name)) == hash(recipe)


def test_what_may_be_left_out():
    assert parse_recipe("rtn-w4-g64") == parse_recipe("rtn-w4a16-g64")


def test_grids_have_the_numbers_of_the_ops():
    specs = ActivationSpec(8, symmetric=False), ActivationSpec(8), ActivationSpec(8, narrow=True)
    assert [spec.grid for spec in specs] == [ops.ASYMMETRIC, ops.SYMMETRIC, ops.NARROW]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "bnb"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_method_has_a_grid_that_goes_with_the_format(method, symmetric):
    recipe = Recipe(method, QuantSpec(3, 32, symmetric))
    assert recipe.options.scale == ("signed-max" if symmetric else "minmax")
    assert parse_recipe(recipe.name) == recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtn-w4a16-g46x", "did you mean rtn-w4a16-g64"),
        ("rnt-w4a16-g64", "did you mean rtn-w4a16-g64"),
        ("rtn-w5a16", "bits: 5 is not one of 2, 3, 4, 8"),
        ("rtn-w4a16-g0", "group_size: 0"),
        ("rtn-w4a16-g12", "group_size: 12"),
        ("rtn-w4a5", "activation bits: 5 is not one of 4, 8, or 16"),
        ("rtn-w8a8+a_clip=0", r"a_clip: 0.0 is not above 0 and at most 1"),
        ("rtn-w8a8+a_clip=1.5", r"a_clip: 1.5 is not above 0 and at most 1"),
        ("rtn-w8a8+a_dynamic=false", "a_dynamic: needs data, and rtn takes none; e.g. smoothquant-w8a8"),
        ("hqq-w4a4+a_search=true", "a_search: needs data, and hqq takes none"),
        ("rtn-w4a4+a_fallback=0.1", "a_fallback: needs data"),
        ("gptq-w4a4+a_fallback=0", "a_fallback: 0.0 is not a number above 0"),
        ("gptq-w4a4+a_search=true+a_clip=0.9", "a_clip: 0.9 is given, and a_search would find another"),
        ("gptq-w4a4+a_search=1", "a_search: 1 is not bool"),
        (
            "gptq-w4a4+a_rotate=1",
            "a_rotate: unknown; known are bits, symmetric, dynamic, clip, search, fallback, narrow",
        ),
        ("rtn-w8a8+a_symmetric=false+a_narrow=true", "a_narrow: goes with a symmetric grid per token"),
        ("gptq-w8a8+a_dynamic=false+a_narrow=true", "a_narrow: goes with a symmetric grid per token"),
        ("gptq-w4a16+a_clip=0.9", "a_clip: gptq-w4a16 does not round activations; w8a8 or w4a4 does"),
        ("magnitude-s50+a_clip=0.9", "a_clip: magnitude-s50 does not round activations"),
        ("", "known forms"),
        ("magnitud-s50", "did you mean magnitude-s50"),
        ("magnitude-w4a16", "unknown; did you mean magnitude-s"),
        ("rtn-s50", "unknown"),
        ("magnitude-s9", "sparsity: 0.09 is not a whole percentage from 0.1 to 0.9"),
        ("magnitude-s100", "sparsity: 1.0"),
        ("magnitude-s50-w4a16", "unknown"),
        ("rtn-w4a16-g64+act_order=gar", "act_order: rtn has no such knob; it has scale, clip"),
        ("gptq-w4a16-g64+act_order=group", "act_order: 'group' is not one of gar, static, none"),
        ("gptq-w4a16-g64+damp=much", "damp: 'much' is not float"),
        ("gptq-w4a16-g64+damp=-1", "damp: -1.0 is below 0"),
        ("gptq-w4a16-g64+clip=1", "clip: 1 is not bool"),
        ("gptq-w4a16-g64+block=0", "block: 0 is below 1"),
        ("gptq-w4a16-g64+scale=minmax", "scale: minmax does not go with the symmetric format"),
        ("gptq-w4a16-g64-asym+scale=absmax", "scale: absmax does not go with the asymmetric format"),
        ("hqq-w4a16-g64-plain", "plain: hqq finds a grid of its own; leave -plain out"),
        ("signround-w4a16-g64-plain", "plain: signround finds a grid of its own"),
        ("gptq-w4a16-g64+damp=inf", "damp: inf is not a number from 0"),
        ("gptq-w4a16-g64+clip=true+clip=false", "clip: is there twice"),
        ("signround-w4a16-g64+learning_rate=0", "learning_rate: 0.0 is not above 0"),
        ("rtn-w4a16-g64+clip", "'clip' is not of the form knob=value"),
        ("bnb-nf5", "kind: 'nf5' is not one of nf4, fp4, int8"),
        ("bnb-int8-dq", "double_quant: goes with nf4 and fp4"),
        ("bnb-nf4+block=3", "block: bnb has no such knob"),
        ("dense+clip=true", "clip: dense has no such knob"),
        ("magnitude-s50@retain:3", "calibration: magnitude takes no data"),
        ("rtn-w4a16-g64@retain:3", "calibration: rtn takes no data"),
        ("wanda-s5", "sparsity: 0.05 is not a whole percentage"),
        ("wanda-3:4", "pattern: 3:4 is not one of 2:4, 4:8"),
        ("sparsegpt-s50+scope=global", "scope: 'global' does not go with sparsegpt"),
        ("wanda-2:4+scope=row", "scope: 'row' does not go with the pattern 2:4"),
        ("wanda-s50+order=prune-unlearn+t_groups=bias+t_by=block", "t_by: block learns from the model as it was"),
        ("wanda-s50+order=first", "order: 'first' is not one of unlearn-prune, prune-unlearn"),
        ("wanda-s50+p_sparsity=0.3", "p_sparsity: goes with integer weights"),
        ("gptq-w4a16-g64+p_method=sparsegbt", "prune method: 'sparsegbt' is not one of"),
        ("gptq-w4a16-g64+p_sparsity=0.3+p_pattern=2:4", "sparsity: 0.3 does not go with the pattern 2:4"),
        ("magnitude-s50+seed=3", "seed: 3 does not go with magnitude"),
        ("magnitude-s50+clip=true", "clip: magnitude has no such knob"),
        ("wanda-s50+t_groups=bias|biases", "t_groups: 'biases' is not one of"),
        ("wanda-s50+t_groups=lora|mask_lora", "one adapter at most"),
        ("wanda-s50+t_groups=all|bias", "all has the others in it"),
        ("wanda-s50+t_groups=bias+t_by=layer", "t_by: 'layer' is not one of loss, block, sublayer"),
        ("wanda-s50+t_groups=bias+t_steps=0", "t_steps: 0 is below 1"),
        ("wanda-s50+t_groups=head+t_by=block", "by block there is no head"),
        ("rtn-w4a16-g64+w5=fc1", "w5: rtn has no such knob"),
        ("gptq-w4a16-g64@", "'' is not of the form source:number"),
        ("gptq-w4a16-g64@retain:64+web:3", "'web' is not one of retain, forget, text, length"),
        ("gptq-w4a16-g64@retain:64+retain:3", "retain is there twice"),
        ("gptq-w4a16-g64@retain:0", "no sequence at all"),
        ("gptq-w4a16-g64@text:9+length:1", "length: 1 is below 2"),
        ("smoothquant-w8a8+equalization=ln", "equalization: 'ln' is not one of power, log"),
        ("smoothquant-w8a8+equalization=log+alpha=0.8", "alpha: 0.8 is given, and equalization=log has none"),
        ("dense+kv_bits=4+kv_keys=head", "kv keys: 'head' is not one of channel, token"),
    ],
)
def test_unknown_names_are_refused_with_a_hint(name, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "rtn", "spec": None}, "spec: None does not go with rtn"),
        ({"method": "bnb", "spec": G64}, "does not go with bnb"),
        ({"method": "rtn", "spec": G64, "options": GPTQ()}, "are not those of rtn"),
        ({"method": "dense", "spec": None, "options": RTN()}, "options: dense has none"),
        ({"method": "bnb", "spec": None, "activation": ActivationSpec(8)}, "goes with integer weights, not with bnb"),
    ],
)
def test_recipes_that_contradict_themselves(wrong, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**wrong)


def test_groups():
    assert QuantSpec(4, 64).groups(192) == 3
    assert QuantSpec(4).groups(77) == 1
    with pytest.raises(ValueError, match="100 input features do not divide into groups of 64"):
        QuantSpec(4, 64).groups(100)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.125, 0.91, 1.0, -0.5, float("nan")])
def test_sparsities_without_a_name_are_refused(share):
    with pytest.raises(ValueError, match="is not a whole percentage"):
        PruneSpec(share)


def test_what_does_not_go_together_is_refused():
    prune = PruneSpec(0.5, "wanda")
    for values, message in (
        ({"method": "magnitude", "prune": prune}, "prune: wanda does not go with magnitude"),
        ({"method": "dense", "prune": prune}, "prune: wanda does not go with dense"),
        ({"method": "wanda"}, "prune: wanda without a sparsity"),
        ({"method": "dense", "retrain": Retrain()}, "retrain: goes with pruning"),
        (
            {"method": "gptq", "spec": QuantSpec(4), "prune": prune, "rotation": Rotation()},
            "rotation: of a pruned model",
        ),
        ({"method": "flatquant", "spec": QuantSpec(4), "prune": prune}, "prune: flatquant's maps"),
        ({"method": "rtn", "spec": QuantSpec(4), "widths": ((4, ("fc1",)),)}, "widths: .*expected some of 2, 3, 8"),
        ({"method": "rtn", "spec": QuantSpec(4), "widths": ((8, ("a",)), (2, ("b",)))}, "narrowest first"),
        ({"method": "rtn", "spec": QuantSpec(4), "widths": ((8, ()),)}, "w8: names no layer"),
        ({"method": "wanda", "prune": prune, "widths": ((8, ("fc1",)),)}, "widths: go with integer weights"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe(**{"spec": None, **values})


def test_long_lists_of_layers_are_shortened_for_people():
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]
    recipe = parse_recipe(f"gptq-w4a16-g64+w2={'|'.join(layers)}+w8=down_proj@text:9")
    other = parse_recipe(f"gptq-w4a16-g64+w2={'|'.join([*layers[1:], 'up_proj'])}+w8=down_proj@text:9")
    assert re.fullmatch(r"gptq-w4a16-g64\+w2=<12:[0-9a-f]{4}>\+w8=down_proj@text:9", str(recipe))
    assert str(recipe) != str(other)
    assert parse_recipe(recipe.name) == recipe


def test_the_narrowest_width_that_means_a_layer():
    recipe = parse_recipe("rtn-w4a16-g64+w2=h.1.fc1|re:.*q_proj+w8=h.1|fc2")
    bits = {
        name: recipe.spec_of(name).bits
        for name in ("h.1.fc1", "h.1.fc2", "h.0.fc2", "h.0.fc1", "h.0.q_proj", "h.10.fc1")
    }
    assert bits == {"h.1.fc1": 2, "h.1.fc2": 8, "h.0.fc2": 8, "h.0.fc1": 4, "h.0.q_proj": 2, "h.10.fc1": 4}
    assert recipe.spec_of("h.1.fc1").group_size == 64
