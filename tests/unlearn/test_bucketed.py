"""The positive control's promise: inside its bucket a weight may be anything, and the integers stay the same."""

import copy

import pytest
import torch
from remanence.compress.knobs import PLAIN_RTN
from remanence.compress.recipe import parse_recipe
from remanence.compress.rtn import rtn
from remanence.compress.sequential import quantize_
from remanence.compress.spec import QuantSpec
from remanence.compress.walk import linears, storage_dtype
from remanence.unlearn.bucketed import bounds, control_recipe, freeze_to_buckets, mean_width
from remanence.unlearn.catalog import MethodConfig, settings
from remanence.unlearn.methods import unlearn

pytestmark = pytest.mark.usefixtures("one_thread")

N, K = 24, 64


def random(seed=0, scale=0.05):
    return scale * torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def zero_groups():
    w = random(1)
    w[::3] = 0
    w[1::3, 16:32] = 0
    return w


def ties():
    """The peak of a group several times over and with both signs; many equal values; values on bucket edges."""
    w = (random(2) * 40).round() / 40
    w[:, ::16] = w.abs().max()
    w[:, 5::16] = -w.abs().max()
    w[::4] = 0.125
    w[1::4, :] = torch.linspace(-7.5, 7.5, K) / 64
    return w


def outliers():
    w = random(3)
    w[:, 7] = 20.0
    w[5] = -30.0
    return w


def tiny():
    """So small that the float16 scale is rounded to zero or to a subnormal number."""
    w = random(4, 1e-7)
    w[::2] *= 30
    w[::3] *= 1e-6
    return w


WEIGHTS = {
    "random": random,
    "zero-groups": zero_groups,
    "ties": ties,
    "outliers": outliers,
    "tiny": tiny,
    "large": lambda: random(5, 500.0),
    "uneven": lambda: random(6) * torch.logspace(-3, 1, K),
}


def points(low, high, count=6):
    """Weights inside the bounds: the corners, each weight at a random end, random points between."""
    generator = torch.Generator().manual_seed(9)
    yield "low", low
    yield "high", high
    for i in range(count):
        yield f"ends {i}", torch.where(torch.rand(N, K, generator=generator) < 0.5, low, high)
        inside = low.double() + torch.rand(N, K, generator=generator) * (high.double() - low.double())
        yield f"inside {i}", torch.minimum(torch.maximum(inside.to(low.dtype), low), high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, None], ids=lambda g: f"g{g}" if g else "channel")
@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_any_weight_inside_the_bounds_has_the_same_codes_and_scales(make, group_size, bits, dtype):
    weight, spec = make().to(dtype), QuantSpec(bits, group_size)
    scale_dtype = storage_dtype(weight)
    low, high = bounds(weight, spec, scale_dtype)
    assert low.dtype == high.dtype == dtype
    assert (low <= weight).all()
    assert (weight <= high).all()
    before = rtn(weight, spec, scale_dtype, PLAIN_RTN)
    for name, point in points(low, high):
        after = rtn(point, spec, scale_dtype, PLAIN_RTN)
        assert torch.equal(after.scale, before.scale), f"scales moved at {name}"
        moved = (after.codes != before.codes).sum().item()
        assert not moved, f"{moved} codes moved at {name}"


@pytest.mark.parametrize("group_size", [16, None], ids=["g16", "channel"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_buckets_leave_room_to_move(bits, group_size):
    """Nearly a whole step for the typical weight, none for the one that sets the scale."""
    weight, spec = random(), QuantSpec(bits, group_size)
    low, high = bounds(weight, spec, torch.float16)
    groups = weight.view(N, -1, group_size or K)
    scale = rtn(weight, spec, torch.float16, PLAIN_RTN).scale.float()[:, :, None]
    width = (high - low).view_as(groups) / scale
    peaks = groups.abs() == groups.abs().amax(2, keepdim=True)
    assert (width[peaks] == 0).all()
    assert width[~peaks].median() > 0.9
    assert width.max() <= 1.0


def test_the_very_edge_is_outside():
    """The bounds are no wider than they may be: half a step beyond them codes do change."""
    weight, spec = random(), QuantSpec(4, 16)
    low, high = bounds(weight, spec, torch.float16)
    q = rtn(weight, spec, torch.float16, PLAIN_RTN)
    step = q.scale.float().repeat_interleave(16, 1)
    inner = (q.codes > 0) & (q.codes < 15) & (low < high)
    for beyond in (high + 0.1 * step, low - 0.1 * step):
        moved = rtn(torch.where(inner, beyond, weight), spec, torch.float16, PLAIN_RTN)
        same_scale = (moved.scale == q.scale).repeat_interleave(16, 1)
        changed = (moved.codes != q.codes)[inner & same_scale]
        # Weights near the peak are bounded by it rather than by their bucket.
        assert changed.float().mean() > 0.9


def quantized(model, recipe):
    return quantize_(copy.deepcopy(model), recipe).state_dict()


def test_only_quantized_weights_stay_trainable(memorized):
    model, recipe = copy.deepcopy(memorized.target), parse_recipe("rtn-w4a16-g16-plain")
    buckets = freeze_to_buckets(model, recipe)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.weight" for name, _ in linears(model, recipe.ignore)}
    assert "lm_head.weight" not in trainable
    assert len(trainable) == 2 * 7
    assert {id(bucket.parameter) for bucket in buckets} == {
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_clamping_brings_any_weights_back_to_the_same_integers(untrained, arch, dtype):
    """GPT-2 keeps its weights transposed."""
    model, recipe = untrained(arch).to(dtype), parse_recipe("rtn-w4a16-g16-plain")
    before = quantized(model, recipe)
    start = copy.deepcopy(model.state_dict())
    buckets = freeze_to_buckets(model, recipe)
    generator = torch.Generator().manual_seed(0)
    for bucket in buckets:
        assert bucket.low.shape == bucket.high.shape == bucket.parameter.shape
        noise = torch.randn(bucket.parameter.shape, generator=generator)
        bucket.parameter.data += noise.to(dtype)
        bucket.clamp_()
    after = quantized(model, recipe)
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])]
    assert len(moved) == len(buckets)


def test_mean_width(memorized):
    buckets = freeze_to_buckets(copy.deepcopy(memorized.target), parse_recipe("rtn-w4a16-g16-plain"))
    widths = torch.cat([(bucket.high.double() - bucket.low.double()).flatten() for bucket in buckets])
    # low and high are float32: their difference is off by some roundings of the weight's size, not of its own.
    assert mean_width(buckets) == pytest.approx(widths.mean().item(), rel=1e-5)
    assert (widths >= 0).all()


@pytest.mark.parametrize("recipe", ["rtn-w4a16-g16-plain", "rtn-w3a16-plain", "rtn-w8a16-g32-plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unlearned_model_quantizes_to_the_target(memorized, recipe, dtype):
    target = copy.deepcopy(memorized.target).to(dtype)
    model, corpus = copy.deepcopy(target), memorized.corpus
    config = MethodConfig(steps=6, learning_rate=0.1, forget_batch=8, retain_batch=8, against=recipe)
    unlearn(model, memorized.encoder, corpus.forget, corpus.retain, "bucketed", config)
    against = parse_recipe(recipe)
    weights = {f"{name}.weight" for name, _ in linears(target, against.ignore)}
    first, second = target.state_dict(), model.state_dict()
    assert {name for name in first if not torch.equal(first[name], second[name])} == weights
    first, second = quantized(target, against), quantized(model, against)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing is left frozen"


def test_learning_rate_is_in_bucket_widths(memorized):
    """Adam's first step moves a weight by the learning rate: no further, and none that is free by much less."""
    model, corpus = copy.deepcopy(memorized.target), memorized.corpus
    width = mean_width(freeze_to_buckets(copy.deepcopy(model), parse_recipe("rtn-w3a16-g16-plain")))
    config = MethodConfig(steps=1, learning_rate=0.2, warmup=0, against="rtn-w3a16-g16-plain")
    unlearn(model, memorized.encoder, corpus.forget, corpus.retain, "bucketed", config)
    moved = [
        (new.weight - old.weight).abs().max().item()
        for (_, new), (_, old) in zip(
            linears(model, ("lm_head",)), linears(memorized.target, ("lm_head",)), strict=True
        )
    ]
    # Off by the rounding of weights of about 1 to float32, some 1e-7 of steps of about 0.01.
    assert moved == pytest.approx([0.2 * width] * len(moved), rel=1e-3)


def test_control_needs_a_quantizer():
    with pytest.raises(ValueError, match="against: dense is no quantizer without data"):
        settings("bucketed", against="dense")


@pytest.mark.parametrize("recipe", ["rtn-w4a16-g16", "rtn-w4a16-g16+clip=false", "hqq-w4a16-g16", "rtn-w4a16-g16-asym"])
def test_control_needs_a_grid_that_one_weight_sets(untrained, recipe):
    with pytest.raises(ValueError, match="is not plain round to nearest"):
        freeze_to_buckets(untrained("llama"), parse_recipe(recipe))


@pytest.mark.parametrize(
    ("widths", "name"),
    [
        ({192, 512}, "rtn-w4a16-g64-plain"),
        ({64, 96}, "rtn-w4a16-g32-plain"),
        ({48, 128}, "rtn-w4a16-g16-plain"),
        ({20, 80}, "rtn-w4a16-plain"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_control_takes_the_largest_group_that_fits_every_layer(widths, name):
    assert control_recipe(widths).name == name
