"""What rounding leaves of an update, against rounding written again in numpy."""

import copy

import numpy as np
import pytest
import torch
from remanence.bench.survival import update_survival
from remanence.compress.spec import DENSE, parse_recipe
from remanence.compress.walk import linears
from remanence.unlearn.bucketed import freeze_to_buckets

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = ["rtn-w4a16-g16", "rtn-w3a16", "rtn-w8a16-g32"]


def shifted(model, size, seed=0):
    """A copy whose linear layers are moved by noise of `size` times each weight's own spread."""
    generator, moved = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for _, module in linears(moved, ()):
            noise = torch.randn(module.weight.shape, generator=generator).to(module.weight.dtype)
            module.weight += size * module.weight.float().std().to(noise.dtype) * noise
    return moved


def rounded(weight, bits, group_size):
    """Round to nearest in float64, the scale stored as float16."""
    n, k = weight.shape
    groups = weight.reshape(n, -1, group_size or k).astype(np.float64)
    scale = (np.abs(groups).max(2) / (2 ** (bits - 1) - 0.5)).astype(np.float16).astype(np.float64)[:, :, None]
    q = np.clip(np.rint(groups / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (q * scale).reshape(n, k)


@pytest.mark.parametrize("size", [0.01, 1.0])
@pytest.mark.parametrize("recipe", RECIPES)
def test_against_rounding_by_hand(untrained, recipe, size):
    target = untrained("llama")
    model, spec = shifted(target, size), parse_recipe(recipe).spec
    changed = total = 0
    after = before = 0.0
    for (_, new), (_, old) in zip(linears(model, ("lm_head",)), linears(target, ("lm_head",)), strict=True):
        w_new, w_old = new.weight.detach().numpy(), old.weight.detach().numpy()
        left = rounded(w_new, spec.bits, spec.group_size) - rounded(w_old, spec.bits, spec.group_size)
        changed += np.count_nonzero(left)
        total += left.size
        after += np.square(left).sum()
        before += np.square(w_new.astype(np.float64) - w_old).sum()
    found = update_survival(model, target, parse_recipe(recipe))
    # Division in float32 may send single weights to the other side of an edge.
    assert found.changed == pytest.approx(changed / total, abs=5e-4)
    assert found.norm == pytest.approx(np.sqrt(after / before), rel=5e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_large_update_survives(untrained, recipe):
    target = untrained("llama")
    found = update_survival(shifted(target, 5.0), target, parse_recipe(recipe))
    assert found.changed > 0.8
    assert found.norm == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("recipe", RECIPES)
def test_update_inside_the_buckets_is_undone(untrained, recipe):
    target = untrained("llama")
    model = copy.deepcopy(target)
    generator = torch.Generator().manual_seed(0)
    for bucket in freeze_to_buckets(model, parse_recipe(recipe)):
        bucket.parameter.data += torch.randn(bucket.parameter.shape, generator=generator)
        bucket.clamp_()
    found = update_survival(model, target, parse_recipe(recipe))
    assert (found.changed, found.norm) == (0.0, 0.0)
    assert update_survival(model, target, DENSE).norm == 1.0


@pytest.mark.parametrize("recipe", ["dense", *RECIPES])
def test_no_update_has_no_norm(untrained, recipe):
    target = untrained("llama")
    found = update_survival(copy.deepcopy(target), target, parse_recipe(recipe))
    assert (found.changed, found.norm) == (0.0, None)


def test_dense_keeps_the_update_whole(untrained):
    target = untrained("llama")
    model = copy.deepcopy(target)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, :8] += 0.5
    found = update_survival(model, target, DENSE)
    total = sum(module.weight.numel() for _, module in linears(model, ("lm_head",)))
    assert found.norm == 1.0
    assert found.changed == pytest.approx(64 * 8 / total, rel=1e-12)


def test_only_layers_that_are_quantized_count(untrained):
    target = untrained("llama")
    model = copy.deepcopy(target)
    with torch.no_grad():
        model.lm_head.weight += 1.0
        model.model.embed_tokens.weight += 1.0
    found = update_survival(model, target, parse_recipe("rtn-w4a16-g16"))
    assert (found.changed, found.norm) == (0.0, None)


@pytest.mark.parametrize("arch", ["opt", "gpt2"])
def test_other_architectures(untrained, arch):
    """GPT-2 keeps its weights transposed; groups run along the input all the same."""
    target = untrained(arch)
    large, small = (
        update_survival(shifted(target, size), target, parse_recipe("rtn-w4a16-g16")) for size in (5.0, 1e-7)
    )
    assert large.norm == pytest.approx(1.0, abs=0.05)
    assert small.changed < 0.01


def test_bfloat16(untrained):
    target = untrained("llama").bfloat16()
    found = update_survival(shifted(target, 5.0), target, parse_recipe("rtn-w4a16-g16"))
    assert found.norm == pytest.approx(1.0, abs=0.05)


def test_models_of_unlike_depth(untrained):
    target = untrained("llama")
    model = copy.deepcopy(target)
    model.model.layers = model.model.layers[:1]
    with pytest.raises(ValueError, match="zip"):
        update_survival(model, target, DENSE)
