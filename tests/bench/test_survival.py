"""What compression leaves of an update, against the same written again in plain numpy."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from remanence.bench import survival as module
from remanence.bench.survival import Agreement, predicted_order, survival
from remanence.bench.tokens import answers
from remanence.compress.recipe import DENSE, parse_recipe
from remanence.compress.sequential import compress_
from remanence.compress.walk import linears
from remanence.unlearn.bucketed import freeze_to_buckets
from remanence.unlearn.catalog import settings
from remanence.unlearn.methods import unlearn
from scipy.stats import spearmanr
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = ["rtn-w4a16-g16-plain", "rtn-w3a16-plain", "rtn-w8a16-g32-plain"]
# Of half-step sizes, which are counted in bins.
BIN = 2**-10


def shifted(model, size, seed=0):
    """A copy whose linear layers are moved by noise of `size` times each weight's own spread."""
    generator, moved = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for _, layer in linears(moved, ()):
            noise = torch.randn(layer.weight.shape, generator=generator).to(layer.weight.dtype)
            layer.weight += size * layer.weight.float().std().to(noise.dtype) * noise
    return moved


def pair(shapes, size=0.3, seed=0):
    """Two modules of linear layers of these [N, K], called after their place and kind: target, and moved by noise."""
    generator = np.random.default_rng(seed)
    target = nn.Module()
    for i, (n, k) in enumerate(shapes):
        layer = nn.Linear(k, n, bias=False)
        layer.weight.data = torch.from_numpy(generator.normal(0, 0.05, (n, k)).astype(np.float32))
        block = nn.Module()
        block.add_module("up" if i % 2 else "down", layer)
        target.add_module(str(i), block)
    return shifted(target, size, seed), target


def rtn_by_hand(weight, recipe):
    """Codes q (signed) and step of each weight, all [N, K]; float32 and float16 where the format has them so."""
    bits, group = recipe.spec.bits, recipe.spec.group_size or weight.shape[1]
    groups = weight.astype(np.float32).reshape(weight.shape[0], -1, group)
    step = (np.abs(groups).max(2, keepdims=True) / np.float32(2 ** (bits - 1) - 0.5)).astype(np.float16)
    step = np.where(step == 0, np.float32(1), step.astype(np.float32))
    q = np.clip(np.rint(groups / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    step = np.where((q == 0).all(2, keepdims=True), np.float32(0), step)
    step = np.broadcast_to(step, groups.shape).reshape(weight.shape)
    return q.reshape(weight.shape).astype(np.float64), step.astype(np.float64)


def by_hand(pairs, recipe):
    """All numbers of WeightSurvival over [(new, old)] weights, in float64, by their definitions."""
    new, old = (np.concatenate([weights[i].astype(np.float64).ravel() for weights in pairs]) for i in (0, 1))
    if recipe.spec is not None:
        parts = [(*rtn_by_hand(a, recipe), *rtn_by_hand(b, recipe)) for a, b in pairs]
        q_new, s_new, q_old, s_old = (np.concatenate([part[i].ravel() for part in parts]) for i in range(4))
        value_new, value_old = q_new * s_new, q_old * s_old
        differs = q_new != q_old
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = (np.abs((new - old).astype(np.float32)) / s_old.astype(np.float32)).astype(np.float64)
        stepped = np.sort(2 * steps[s_old > 0])
        chance = np.where(new == old, 0, np.minimum(1, steps))
    else:
        keep_new, keep_old = (np.concatenate([kept(weights[i], recipe).ravel() for weights in pairs]) for i in (0, 1))
        value_new, value_old = new * keep_new, old * keep_old
        differs, stepped = value_new != value_old, np.array([])
        chance = (new != old) & (value_old == old)
    update, left = new - old, value_new - value_old
    before, after = np.linalg.norm(update), np.linalg.norm(left)
    zeros = value_old == 0
    return {
        "weights": len(new),
        "moved": (new != old).mean(),
        "changed_codes": differs.mean(),
        "predicted_codes": chance.mean(),
        "changed": (left != 0).mean(),
        "half_steps": stepped[math.ceil(0.5 * len(stepped)) - 1] if len(stepped) else None,
        "half_steps_p90": stepped[math.ceil(0.9 * len(stepped)) - 1] if len(stepped) else None,
        "norm": after / before if before else None,
        "cosine": left @ update / (before * after) if before * after else None,
        "survival": left @ update / before**2 if before else None,
        "zero_codes": zeros.mean(),
        "zero_bucket": np.square(update[zeros]).sum() / before**2 if before else None,
    }


def kept(weight, recipe):
    """Mask of what magnitude pruning keeps; all for the dense recipe."""
    if recipe.prune is None:
        return np.ones(weight.shape, bool)
    mask = np.ones(weight.size, bool)
    mask[np.argsort(np.abs(weight).ravel(), kind="stable")[: round(recipe.prune.sparsity * weight.size)]] = False
    return mask.reshape(weight.shape)


def check(found, expected):
    assert vars(found).keys() == expected.keys()
    for name, value in expected.items():
        tolerance = {"rel": 1e-9, "abs": 1e-15}
        if name.startswith("half_steps") and value:
            # Truncated to its bin: below the true one, by a bin at most.
            assert value * (1 - BIN) <= getattr(found, name) <= value * (1 + 1e-9), name
        else:
            assert getattr(found, name) == (None if value is None else pytest.approx(value, **tolerance)), name


def weights(model):
    return [layer.weight.detach().numpy() for _, layer in linears(model, ())]


def zeroed(update):
    """Both models zero in one layer, the target alone in a part of the other: groups without a scale."""
    new, old = update
    for model in update:
        model.get_submodule("0.down").weight.data.zero_()
    old.get_submodule("1.up").weight.data[:2] = 0
    old.get_submodule("1.up").weight.data[2, :16] = 0
    return new, old


def in_one_layer(update):
    new, old = update
    new.get_submodule("0.down").weight.data.copy_(old.get_submodule("0.down").weight.data)
    return new, old


def all_zero(update):
    for model in update:
        for _, layer in linears(model, ()):
            layer.weight.data.zero_()
    return update


SMALL = [(5, 48), (7, 96), (1, 48)]
CASES = {
    "random": lambda: pair(SMALL),
    "small update": lambda: pair(SMALL, 1e-4),
    "large update": lambda: pair(SMALL, 20.0),
    "single row": lambda: pair([(1, 48)]),
    "single column of groups": lambda: pair([(65, 16)]),
    "no update": lambda: pair(SMALL, 0.0),
    "one layer": lambda: in_one_layer(pair(SMALL)),
    "groups of zeros": lambda: zeroed(pair(SMALL)),
    "all zero": lambda: all_zero(pair(SMALL)),
}


@pytest.mark.parametrize(
    "recipe",
    [
        "rtn-w4a16-g16-plain",
        "rtn-w3a16-g16-plain",
        "rtn-w4a16-plain",
        "rtn-w8a16-plain",
        "magnitude-s30",
        "magnitude-s90",
        "dense",
    ],
)
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_all_numbers_by_hand(make, recipe):
    new, old = make()
    recipe = parse_recipe(recipe)
    pairs = dict(zip((name for name, _ in linears(old, ())), zip(weights(new), weights(old), strict=True), strict=True))
    found = survival(new, old, recipe)
    check(found.total, by_hand(list(pairs.values()), recipe))
    assert list(found.layers) == list(pairs)
    for name, layer in found.layers.items():
        check(layer, by_hand([pairs[name]], recipe))
    assert set(found.by_module) == {name.split(".")[-1] for name in pairs}
    for kind, part in found.by_module.items():
        check(part, by_hand([both for name, both in pairs.items() if name.endswith(kind)], recipe))


@pytest.mark.parametrize("columns", [1, 63, 65])
@pytest.mark.parametrize("recipe", ["rtn-w4a16-plain", "magnitude-s50", "dense"])
def test_odd_sizes_in_blocks(monkeypatch, columns, recipe):
    """Blocks of rows add up to the layer, also where they do not divide it, or hold less than a row."""
    new, old = pair([(67, columns)])
    whole = survival(new, old, parse_recipe(recipe))
    check(whole.total, by_hand([(weights(new)[0], weights(old)[0])], parse_recipe(recipe)))
    for block in (8, 64, 1000):
        monkeypatch.setattr(module, "_BLOCK", block)
        check(survival(new, old, parse_recipe(recipe)).total, vars(whole.total))


def test_prediction_is_exact_where_positions_are_even():
    """Targets at evenly spaced positions in their buckets, all moved alike: the share that crosses an edge."""
    old, new = pair([(1, 4096)], 0.0)
    weight = torch.linspace(-6.4, 6.4, 4096) / 7.5
    weight[0] = 1.0
    for share in (0.01, 0.25, 0.9):
        step = float(torch.tensor(1 / 7.5).half())
        old.get_submodule("0.down").weight.data = weight[None].clone()
        new.get_submodule("0.down").weight.data = weight[None] + share * step * (torch.arange(4096) > 0)
        found = survival(new, old, parse_recipe("rtn-w4a16-plain")).total
        assert found.half_steps == pytest.approx(2 * share, rel=2 * BIN)
        assert found.predicted_codes == pytest.approx(share, rel=1e-3)
        assert found.changed_codes == pytest.approx(share, abs=0.02)
        # Changed codes move by a whole step each: on average what the update was.
        assert found.survival == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_large_update_survives(untrained, recipe):
    target = untrained("llama")
    found = survival(shifted(target, 5.0), target, parse_recipe(recipe)).total
    assert found.changed > 0.8
    assert found.norm == pytest.approx(1.0, abs=0.05)
    assert found.survival == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("recipe", RECIPES)
def test_update_inside_the_buckets_is_undone(untrained, recipe):
    target = untrained("llama")
    model = copy.deepcopy(target)
    generator = torch.Generator().manual_seed(0)
    for bucket in freeze_to_buckets(model, parse_recipe(recipe)):
        bucket.parameter.data += torch.randn(bucket.parameter.shape, generator=generator)
        bucket.clamp_()
    found = survival(model, target, parse_recipe(recipe)).total
    assert (found.changed_codes, found.changed, found.norm, found.cosine, found.survival) == (0, 0, 0, None, 0)
    assert found.predicted_recovery == 1.0
    assert found.predicted_codes > 0.3, (
        "an update of this size would have changed codes, had it not kept clear of edges"
    )
    dense = survival(model, target, DENSE).total
    assert (dense.norm, dense.cosine, dense.survival, dense.predicted_recovery) == (1.0, 1.0, 1.0, 0.0)


def test_only_the_zero_bucket_moves(untrained):
    """As in pure bfloat16: an update below half an ulp of all but the smallest weights."""
    target = untrained("llama").bfloat16()
    model = copy.deepcopy(target)
    with torch.no_grad():
        for _, layer in linears(model, ()):
            layer.weight += 2e-5
    found = survival(model, target, parse_recipe("rtn-w4a16-g16-plain")).total
    assert 0 < found.moved < found.zero_codes < 0.5
    assert found.zero_bucket == 1.0


@pytest.mark.parametrize("recipe", ["dense", "magnitude-s50", *RECIPES])
def test_no_update_has_no_norm(untrained, recipe):
    target = untrained("llama")
    same = copy.deepcopy(target)
    found = survival(same, target, parse_recipe(recipe)).total
    assert (found.moved, found.changed_codes, found.predicted_codes, found.changed) == (0, 0, 0, 0)
    assert (found.norm, found.cosine, found.survival, found.zero_bucket, found.predicted_recovery) == (None,) * 5


def test_dense_keeps_the_update_whole(untrained):
    target = untrained("llama")
    model = copy.deepcopy(target)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, :8] += 0.5
    found = survival(model, target, DENSE)
    total = sum(layer.weight.numel() for _, layer in linears(model, ("lm_head",)))
    assert found.total.norm == 1.0
    assert found.total.changed == found.total.moved == pytest.approx(64 * 8 / total, rel=1e-12)
    assert found.by_module["up_proj"].changed == pytest.approx(8 / 32 / 2)
    assert found.by_module["down_proj"].norm is None


def test_only_layers_that_are_compressed_count(untrained):
    target = untrained("llama")
    model = copy.deepcopy(target)
    with torch.no_grad():
        model.lm_head.weight += 1.0
        model.model.embed_tokens.weight += 1.0
    found = survival(model, target, parse_recipe("rtn-w4a16-g16-plain"))
    assert (found.total.changed, found.total.norm) == (0.0, None)
    assert "lm_head" not in found.layers


@pytest.mark.parametrize("arch", ["opt", "gpt2"])
def test_other_architectures(untrained, arch):
    """GPT-2 keeps its weights transposed; groups run along the input all the same."""
    target = untrained(arch)
    recipe = parse_recipe("rtn-w4a16-g16-plain")
    large, small = (survival(shifted(target, size), target, recipe).total for size in (5.0, 1e-7))
    assert large.norm == pytest.approx(1.0, abs=0.05)
    assert small.changed < 0.01
    if arch == "gpt2":
        model = shifted(target, 0.1)
        pairs = [
            (new.weight.detach().numpy().T, old.weight.detach().numpy().T)
            for (_, new), (_, old) in zip(linears(model, ("lm_head",)), linears(target, ("lm_head",)), strict=True)
        ]
        check(survival(model, target, recipe).total, by_hand(pairs, recipe))


def test_bfloat16(untrained):
    target = untrained("llama").bfloat16()
    found = survival(shifted(target, 5.0), target, parse_recipe("rtn-w4a16-g16-plain")).total
    assert found.norm == pytest.approx(1.0, abs=0.05)


def test_models_stay_as_they_are(untrained):
    target = untrained("llama")
    model = shifted(target, 0.1)
    before = [copy.deepcopy(m.state_dict()) for m in (model, target)]
    for recipe in ("rtn-w4a16-g16-plain", "magnitude-s50", "dense"):
        survival(model, target, parse_recipe(recipe))
    for m, state in zip((model, target), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in m.state_dict().items())


def test_bad_input(untrained):
    target = untrained("llama")
    shallow = copy.deepcopy(target)
    shallow.model.layers = shallow.model.layers[:1]
    with pytest.raises(ValueError, match=r"unlearned: its layers are not the target's; .*model\.layers\.1\."):
        survival(shallow, target, DENSE)
    with pytest.raises(ValueError, match=r"0\.down: \[3, 16\] in unlearned, \[4, 16\] in target"):
        survival(pair([(3, 16)])[0], pair([(4, 16)])[1], DENSE)
    with pytest.raises(ValueError, match="Module has no linear layer"):
        survival(nn.Module(), nn.Module(), DENSE)
    for recipe in ("dense", "rtn-w4a16-plain", "magnitude-s50"):
        new, old = pair([(3, 16)])
        new.get_submodule("0.down").weight.data[1, 2] = float("nan")
        with pytest.raises(ValueError, match=r"unlearned: 0\.down: weight: contains NaN"):
            survival(new, old, parse_recipe(recipe))
    with pytest.raises(ValueError, match=r"0\.down: 24 input features do not divide into groups of 16"):
        survival(*pair([(3, 24)]), parse_recipe("rtn-w4a16-g16-plain"))


def table(values):
    return dict(enumerate(values))


@pytest.mark.parametrize(
    ("predicted", "measured"),
    [
        ([0.1, 0.2, 0.9], [0.0, 0.3, 0.8]),
        ([0.1, 0.4, 0.2, 0.9], [0.5, 0.3, 0.1, 0.8]),
        ([0.1, 0.1, 0.2, 0.9, 1.0], [0.5, 0.3, 0.3, 0.8, -0.1]),
    ],
    ids=["three", "four", "ties"],
)
def test_order_with_an_exact_p(predicted, measured):
    found = predicted_order(table(predicted), table(measured))
    rho = spearmanr(predicted, measured).statistic
    tried = [spearmanr(order, measured).statistic for order in itertools.permutations(predicted)]
    assert found.rho == pytest.approx(rho)
    assert found.p == pytest.approx(np.mean([abs(one) >= abs(rho) - 1e-9 for one in tried]))
    assert found.n == len(predicted)


def test_order_of_many():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 12))
    expected = spearmanr(x, y)
    assert predicted_order(table(x), table(y)) == Agreement(expected.statistic, expected.pvalue, 12)
    perfect = predicted_order(table(x), table(2 * x))
    assert perfect.rho == pytest.approx(1.0)
    assert perfect.p == pytest.approx(2 / math.factorial(12))
    assert predicted_order(table(x), table(-x)).rho == pytest.approx(-1.0)


def test_order_needs_something_to_order():
    x = [0.1, 0.2, 0.3, 0.4]
    for y in ([], [1.0, 2.0], [1.0, None, 2.0, float("nan")]):
        found = predicted_order(table(x), table(y))
        assert (found.rho, found.p) == (None, None)
        assert "an order needs 3" in found.reason
    assert predicted_order({}, {}).n == 0
    assert "measured: all 4" in predicted_order(table(x), table([1.0] * 4)).reason
    assert "predicted: all 3" in predicted_order(table([0, None, 0, 0]), table(x)).reason
    # What has no prediction or no measurement is left out.
    assert predicted_order(table([*x, None]), table([1.0, 2.0, 3.0, float("inf"), 4.0])) == predicted_order(
        table(x[:3]), table([1.0, 2.0, 3.0])
    )


def test_weights_alone_order_recipes_as_the_behaviour_does(memorized):
    """The positive control: undone at its own quantizer and nowhere else; the less survives, the more comes back."""
    target, corpus = memorized.target, memorized.corpus
    model, own = copy.deepcopy(target), "rtn-w4a16-g16-plain"
    unlearn(
        model, memorized.encoder, corpus.forget, corpus.retain, "bucketed", settings("bucketed", True, against=own), 0
    )

    def knowledge(network):
        scored = answers(network, memorized.encoder, [(row.question, row.answer) for row in corpus.forget])
        return np.mean([answer.probability for answer in scored])

    predicted, measured, forgotten = {}, {}, knowledge(model)
    for name in (
        own,
        "rtn-w8a16-plain",
        "rtn-w8a16-g16-plain",
        "rtn-w4a16-plain",
        "rtn-w4a16-g32-plain",
        "rtn-w4a16-g64-plain",
        "magnitude-s30",
    ):
        recipe = parse_recipe(name)
        found = survival(model, target, recipe).total
        assert (found.changed_codes == 0) == (name == own)
        predicted[name] = found.predicted_recovery
        whole, part = (knowledge(compress_(copy.deepcopy(m), recipe)) for m in (target, model))
        measured[name] = (part - forgotten) / (whole - forgotten)
        print(f"{name:16} predicted {predicted[name]:7.4f} measured {measured[name]:7.4f}")
    found = predicted_order(predicted, measured)
    print(found)
    assert predicted[own] == 1.0
    assert measured[own] == pytest.approx(1.0, abs=1e-6)
    assert found.rho >= 0.8
