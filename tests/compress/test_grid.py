"""Scales, zero points and codes against plain NumPy in float64; the clip search against every candidate tried out."""

import numpy as np
import pytest
import torch
from remanence.compress.grid import CLIP_LEAST, CLIP_STEPS, decode, encode, group_parameters
from remanence.compress.knobs import RTN
from remanence.compress.rtn import rtn
from remanence.compress.spec import QuantSpec

FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
BITS = (2, 3, 4, 8)


def groups(seed=0, n=5, groups=3, size=16, tails=False):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, groups, size, generator=generator)
    return w * torch.randn(n, groups, size, generator=generator).abs() if tails else w


def by_hand(w, bits, scale, dtype):
    """(scale, zero) of one group, float64 but for the rounding of the scale to its dtype."""
    half, most = 2 ** (bits - 1), 2**bits - 1
    w = w.double().numpy()
    if scale == "minmax":
        low, high = min(w.min(), 0.0), max(w.max(), 0.0)
        s, zero = (high - low) / most, None
    elif scale == "signed-max":
        s = (w.max() if w.max() > -w.min() else w.min()) / -half
    else:
        s = np.abs(w).max() / (half - 0.5)
    s = float(torch.tensor(s).float().to(dtype)) or 1.0
    zero = np.clip(np.round(-low / s), 0, most) if scale == "minmax" else half
    return s, zero


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, torch.float32])
@pytest.mark.parametrize("scale", ["signed-max", "absmax", "minmax"])
@pytest.mark.parametrize("bits", BITS)
def test_scales_and_codes_are_those_of_the_definition(bits, scale, dtype):
    w = groups(bits)
    spec = QuantSpec(bits, 16, symmetric=scale != "minmax")
    found, zero = group_parameters(w, spec, dtype, scale)
    assert found.dtype == dtype
    assert (zero is None) == spec.symmetric
    codes = encode(w, found, zero, bits)
    values = decode(codes, found, zero, bits)
    for n in range(w.shape[0]):
        for g in range(w.shape[1]):
            s, z = by_hand(w[n, g], bits, scale, dtype)
            assert float(found[n, g]) == pytest.approx(s, rel=2e-7 if dtype == torch.float32 else 0)
            expected = np.clip(np.round(w[n, g].double().numpy() / float(found[n, g])) + z, 0, 2**bits - 1)
            near_tie = np.abs(np.abs(w[n, g].double().numpy() / s % 1) - 0.5) < 1e-5
            assert ((codes[n, g].numpy() == expected) | near_tie).all()
            assert np.allclose(values[n, g].numpy(), (codes[n, g].double().numpy() - z) * float(found[n, g]), rtol=1e-6)


def test_signed_max_gives_the_largest_weight_the_lowest_code_exactly():
    w = groups(3)
    scale, zero = group_parameters(w, QuantSpec(4, 16), torch.float32, "signed-max")
    peak = w.abs().argmax(2, keepdim=True)
    assert (encode(w, scale, zero, 4).gather(2, peak) == 0).all()
    assert torch.equal(scale < 0, w.gather(2, peak)[:, :, 0] > 0)
    assert torch.allclose(decode(encode(w, scale, zero, 4), scale, zero, 4).gather(2, peak), w.gather(2, peak))


def squared(w, spec, **options):
    scale, zero = group_parameters(w, spec, FLOAT16, **options)
    return float(
        (decode(encode(w, scale, zero, spec.bits), scale, zero, spec.bits) - w).square().sum() / w.square().sum()
    )


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.10), (3, 0.20), (2, 0.35)])
def test_signed_max_errs_less_than_absmax_in_the_same_format(bits, gain):
    """Relative squared error, Gaussian weights in groups of 128."""
    w, spec = groups(1, 64, 4, 128), QuantSpec(bits, 128)
    assert squared(w, spec, scale="signed-max") < (1 - gain) * squared(w, spec, scale="absmax")


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("scale", ["signed-max", "absmax", "minmax"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clip_search_errs_less(bits, scale, tails):
    w, spec = groups(2, 16, 4, 64, tails), QuantSpec(bits, 64, symmetric=scale != "minmax")
    assert squared(w, spec, scale=scale, clip=True) < squared(w, spec, scale=scale, clip=False)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search_finds_the_best_of_all_candidates(symmetric):
    w, bits = groups(5, 4, 2, 32), 3
    spec = QuantSpec(bits, 32, symmetric)
    start = "signed-max" if symmetric else "minmax"
    scale, zero = group_parameters(w, spec, FLOAT16, start, clip=True)
    full, _ = group_parameters(w, spec, FLOAT16, start)
    shrinks = [1 - (1 - CLIP_LEAST) * step / CLIP_STEPS for step in range(CLIP_STEPS + 1)]
    for n in range(w.shape[0]):
        for g in range(w.shape[1]):
            row = w[n, g].double().numpy()

            def error(s, z, row=row):
                q = np.clip(np.round(row / s) + z, 0, 2**bits - 1)
                return (np.abs((q - z) * s - row) ** 2.4).sum()

            errors = []
            for shrink in shrinks:
                if symmetric:
                    s = float((full[n, g].float() * shrink).to(FLOAT16))
                    errors += [error(s, 4), error(-s, 4)]
                else:
                    low, high = min(row.min(), 0) * shrink, max(row.max(), 0) * shrink
                    s = float(torch.tensor((high - low) / 7).to(FLOAT16))
                    errors.append(error(s, np.clip(np.round(-low / s), 0, 7)))
            found = error(float(scale[n, g]), 4 if symmetric else float(zero[n, g]))
            # The search sums in float32.
            assert found == pytest.approx(min(errors), rel=1e-4)


def test_the_search_is_the_same_for_rows_alone():
    """It works through the rows in pieces."""
    w, spec = groups(7, 3000, 1, 64), QuantSpec(4, 64)
    whole, _ = group_parameters(w, spec, FLOAT16, clip=True)
    alone = torch.cat([group_parameters(w[i : i + 1], spec, FLOAT16, clip=True)[0] for i in range(0, 3000, 500)])
    assert torch.equal(whole[::500], alone)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("scale", ["signed-max", "absmax", "minmax"])
@pytest.mark.parametrize("value", [0.0, 1e-12, -1e-12])
def test_a_group_of_nothing_stands_for_zeros(value, scale, clip):
    w = groups(0)
    w[1, 2] = value
    spec = QuantSpec(4, 16, symmetric=scale != "minmax")
    found, zero = group_parameters(w, spec, FLOAT16, scale, clip)
    assert found[1, 2] == 1
    assert torch.isfinite(found).all()
    assert (decode(encode(w, found, zero, 4), found, zero, 4)[1, 2] == 0).all()


@pytest.mark.parametrize("scale", ["signed-max", "absmax", "minmax"])
@pytest.mark.parametrize("value", [0.3, -0.3])
def test_a_group_of_one_value_is_kept(value, scale):
    w = torch.full((1, 1, 16), value)
    spec = QuantSpec(4, 16, symmetric=scale != "minmax")
    found, zero = group_parameters(w, spec, torch.float32, scale)
    # absmax has no code for its own maximum: half a step is lost.
    off = (decode(encode(w, found, zero, 4), found, zero, 4) - w).abs().max()
    assert off <= abs(value) * (0.5 / 7.5 if scale == "absmax" else 1e-6) * 1.001


def test_minmax_holds_zero_even_where_all_weights_have_one_sign():
    w = groups(0).abs() + 1
    scale, zero = group_parameters(w, QuantSpec(4, 16, symmetric=False), FLOAT16, "minmax")
    assert (zero == 0).all()
    assert torch.equal(decode(encode(w * 0, scale, zero, 4), scale, zero, 4), w * 0)


@pytest.mark.parametrize("clip", [False, True])
def test_a_scale_beyond_its_dtype_is_refused(clip):
    w = groups(0)
    w[0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"largest value 1e\+06 needs a scale beyond torch.float16"):
        group_parameters(w, QuantSpec(4, 16), FLOAT16, clip=clip)
    assert torch.isfinite(group_parameters(w, QuantSpec(4, 16), BFLOAT16, clip=clip)[0]).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
def test_rtn_is_within_half_a_step_where_nothing_is_clipped(bits, symmetric, group_size):
    weight = groups(bits, 7, 1, 48)[:, 0]
    options = RTN("signed-max" if symmetric else "minmax", clip=False)
    q = rtn(weight, QuantSpec(bits, group_size, symmetric), torch.float32, options)
    step = q.scale.abs().repeat_interleave(48 // q.scale.shape[1], 1)
    inside = (q.codes > 0) & (q.codes < 2**bits - 1)
    assert ((q.dequantize() - weight).abs() <= step * 0.5001)[inside].all()
