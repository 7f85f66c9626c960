"""Half-quadratic quantization against its formulas in float64, and against round to nearest on a trained model."""

import numpy as np
import pytest
import torch
from remanence.compress import hqq as module
from remanence.compress.hqq import hqq, objective, shrink, step
from remanence.compress.knobs import HQQ, RTN
from remanence.compress.rtn import rtn
from remanence.compress.spec import QuantSpec
from remanence.compress.walk import linears, weight_of

SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
BITS = pytest.mark.parametrize("bits", [2, 3, 4])


def options(spec, **knobs):
    return HQQ(scale="signed-max" if spec.symmetric else "minmax", **knobs)


def nearest(weight, spec, clip, dtype=torch.float16):
    return rtn(weight, spec, dtype, RTN("signed-max" if spec.symmetric else "minmax", clip))


def per_group(weight, q, p):
    """Sum of |error|^p [N, n], float64."""
    error = (weight.double() - q.dequantize().double()).abs() ** p
    return error.view(*q.scale.shape, -1).sum(2)


def random(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    # Heavy tails, as weights have.
    return torch.randn(*shape, generator=g) * torch.rand(*shape, generator=g).add(0.2).rsqrt() * 0.02


# The formulas


def shrink_reference(x, p, beta):
    return np.array([0.0 if v == 0 else np.sign(v) * max(0.0, abs(v) - abs(v) ** (p - 1) / beta) for v in x.ravel()])


def step_reference(w, scale, zero, unit, bits, p, beta, fit_zero):
    """One group, float64."""
    q = np.clip(np.round(w / scale + zero), 0, 2**bits - 1)
    kept = w - unit * shrink_reference((w - (q - zero) * scale) / unit, p, beta)
    if fit_zero:
        zero = np.mean(q - kept / scale)
    square = sum((c - zero) ** 2 for c in q)
    fitted = sum((c - zero) * k for c, k in zip(q, kept)) / square if square else 0
    return (fitted or scale), zero


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0, 1.5])
def test_shrinkage(p):
    x = torch.cat([torch.linspace(-3, 3, 101), torch.tensor([0.0, 1e-7, -1e-7])])
    for beta in (1.0, 10.0):
        expected = torch.from_numpy(shrink_reference(x.double().numpy(), p, beta))
        torch.testing.assert_close(shrink(x, p, beta).double(), expected, rtol=1e-5, atol=1e-6)


@BITS
@pytest.mark.parametrize("fit_zero", [True, False])
@pytest.mark.parametrize("beta", [2.0, 10.0])
def test_step(bits, fit_zero, beta):
    w = random(9, 24, seed=bits)
    scale = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.3) * torch.tensor([1.0, -1, 1] * 3)[:, None]
    # No code at a tie, where float32 and float64 could part.
    zero = 2 ** (bits - 1) + torch.linspace(-0.4, 0.37, 9)[:, None]
    unit = scale.abs() * 0.9
    found = step(w, scale, zero, unit, bits, HQQ(beta=beta), fit_zero)
    for n in range(9):
        row = [t[n].double().numpy() for t in (w, scale, zero, unit)]
        expected = step_reference(row[0], *(r.item() for r in row[1:]), bits, 0.7, beta, fit_zero)
        assert [float(found[0][n]), float(found[1][n])] == pytest.approx(list(expected), rel=1e-4)


def test_step_keeps_a_scale_that_nothing_speaks_for():
    # All codes on the zero point: 0 / 0.
    scale, zero = step(
        torch.zeros(1, 16), torch.full((1, 1), 3.0), torch.full((1, 1), 8.0), torch.ones(1, 1), 4, HQQ(), False
    )
    assert (float(scale), float(zero)) == (3.0, 8.0)
    # Nothing but zeros to be fitted to: 0.
    far = torch.full((1, 1), 8.6)
    scale, _ = step(torch.zeros(1, 16), torch.full((1, 1), 3.0), far, torch.ones(1, 1), 4, HQQ(beta=1e-3), False)
    assert float(scale) == 3.0


def test_objective():
    w, spec = random(3, 4, 16), QuantSpec(3, 16)
    q = nearest(w.flatten(1), spec, False)
    expected = per_group(w.flatten(1), q, 0.7)
    torch.testing.assert_close(objective(w, q.scale, None, 3, 0.7).double(), expected, rtol=1e-4, atol=0)
    for bad in (0.0, float("inf")):
        assert objective(w, torch.full_like(q.scale, bad), None, 3, 0.7).isinf().all()


def reference(w, starts, bits, symmetric, p, beta, iterations):
    """The least objective of one group w [G], float64: the whole method from its description."""
    half = 2 ** (bits - 1)

    def sum_of(scale, zero):
        scale = float(np.float16(scale))
        q = np.clip(np.round(w / scale) + zero, 0, 2**bits - 1)
        return np.sum(np.abs(w - (q - zero) * scale) ** p)

    starts = [(float(s), half if z is None else int(z)) for s, z in starts]
    least, (scale, zero) = min((sum_of(*start), start) for start in starts)
    unit = abs(scale)
    for _ in range(iterations):
        scale, zero = step_reference(w, scale, zero, unit, bits, p, beta, not symmetric)
        found = np.inf
        for near in [half] if symmetric else [np.floor(zero), np.floor(zero) + 1]:
            whole = min(max(near, 0), 2**bits - 1)
            again, _ = step_reference(w, scale, whole, unit, bits, p, beta, False)
            found = min(found, sum_of(scale, whole), sum_of(again, whole))
        if found >= least:
            break
        least = found
    return least


@BITS
@SYMMETRIC
def test_whole_method(bits, symmetric):
    weight, spec = random(12, 48, seed=7), QuantSpec(bits, 24, symmetric)
    q = hqq(weight, spec, torch.float16, options(spec))
    starts = [nearest(weight, spec, clip) for clip in (False, True)]
    found, expected = per_group(weight, q, 0.7), torch.zeros(12, 2, dtype=torch.float64)
    for n in range(12):
        for g in range(2):
            pairs = [(s.scale[n, g], None if symmetric else s.zero[n, g]) for s in starts]
            w = weight[n, 24 * g : 24 * (g + 1)].double().numpy()
            expected[n, g] = reference(w, pairs, bits, symmetric, 0.7, 10.0, 20)
    # Zero points move where codes are few; at 4 bits hardly any does.
    assert symmetric or bits == 4 or (q.zero != starts[1].zero).any()
    # A step that float32 and float64 judge differently, near a tie or where nothing is gained, may stop one group
    # earlier: 1 of 24 at most, and all of them together within a percent.
    same = (found / expected - 1).abs() < 1e-3
    assert same.sum() >= 23
    assert float(found.sum()) == pytest.approx(float(expected.sum()), rel=0.01)


# What it is for


@BITS
@SYMMETRIC
def test_below_round_to_nearest_on_every_layer_of_a_trained_model(memorized, bits, symmetric):
    spec = QuantSpec(bits, 32, symmetric)
    layers = list(linears(memorized.target, ("lm_head",)))
    assert len(layers) == 14
    for name, layer in layers:
        weight = weight_of(layer).detach()
        sums = per_group(weight, hqq(weight, spec, torch.float16, options(spec)), 0.7)
        for clip in (False, True):
            plain = per_group(weight, nearest(weight, spec, clip), 0.7)
            assert sums.sum() < 0.99 * plain.sum(), name
            assert (sums <= plain * (1 + 1e-4)).all(), name


def test_p_is_what_is_minimised():
    weight, spec = random(32, 64), QuantSpec(3, 64)
    found = {p: hqq(weight, spec, torch.float16, HQQ(p=p)) for p in (0.5, 1.5)}
    for p in found:
        sums = {other: per_group(weight, q, p).sum() for other, q in found.items()}
        assert sums[p] == min(sums.values()) < max(sums.values())


def test_more_iterations_are_no_worse_and_stop_by_themselves(monkeypatch):
    weight, spec = random(8, 64), QuantSpec(3, 32)
    counts = []
    monkeypatch.setattr(module, "step", lambda w, *args: counts.append(len(w)) or step(w, *args))
    sums = [float(per_group(weight, hqq(weight, spec, torch.float16, HQQ(iterations=n)), 0.7).sum()) for n in (1, 3)]
    assert counts[:2] == [16, 16]  # every group, twice a step
    counts.clear()
    sums.append(float(per_group(weight, hqq(weight, spec, torch.float16, HQQ(iterations=10_000)), 0.7).sum()))
    assert sums[0] > sums[1] >= sums[2]
    assert len(counts) < 100
    # Groups leave one by one.
    assert counts[-1] < counts[0]
    assert counts == sorted(counts, reverse=True)


def test_unit_of_the_weights_does_not_matter():
    weight, spec = random(16, 64), QuantSpec(3, 32, False)
    q = hqq(weight, spec, torch.float32, options(spec))
    tiny = hqq(weight * 2.0**-20, spec, torch.float32, options(spec))
    assert torch.equal(q.codes, tiny.codes)
    assert torch.equal(q.scale * 2.0**-20, tiny.scale)


# Edges


@BITS
@SYMMETRIC
def test_groups_of_zeros_and_of_equal_values(bits, symmetric):
    spec = QuantSpec(bits, 16, symmetric)
    weight = torch.zeros(4, 32)
    weight[1], weight[2], weight[3, :16] = 0.3, -0.3, 0.02
    q = hqq(weight, spec, torch.float16, options(spec))
    assert torch.isfinite(q.scale).all()
    assert (q.scale != 0).all()
    assert torch.equal(q.dequantize()[0], weight[0])
    # One code holds them all; what is left is the scale's rounding to 11 bits.
    torch.testing.assert_close(q.dequantize(), weight, rtol=2**-11, atol=0)


@BITS
@SYMMETRIC
def test_pruned_weights_stay_zero(bits, symmetric):
    weight, spec = random(8, 64), QuantSpec(bits, 32, symmetric)
    gone = torch.rand(8, 64, generator=torch.Generator().manual_seed(3)) < 0.5
    weight[gone] = 0
    assert (hqq(weight, spec, torch.float16, options(spec)).dequantize()[gone] == 0).all()


@SYMMETRIC
def test_one_scale_a_channel_odd_sizes_and_strides(symmetric):
    spec = QuantSpec(4, None, symmetric)
    weight = random(37, 13).T
    assert not weight.is_contiguous()
    q = hqq(weight, spec, torch.float16, options(spec))
    assert (q.codes.shape, q.scale.shape) == ((13, 37), (13, 1))
    assert (q.zero is None) == symmetric
    assert per_group(weight, q, 0.7).sum() < per_group(weight, nearest(weight, spec, True), 0.7).sum()


@SYMMETRIC
def test_half_weights_and_row_chunks(symmetric, monkeypatch):
    weight, spec = random(33, 64).bfloat16(), QuantSpec(3, 16, symmetric)
    whole = hqq(weight, spec, torch.bfloat16, options(spec))
    assert whole.scale.dtype == torch.bfloat16
    assert whole.codes.dtype == torch.uint8
    monkeypatch.setattr(module, "_CHUNK", 5 * 64)
    parts = hqq(weight, spec, torch.bfloat16, options(spec))
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)
    assert symmetric or torch.equal(whole.zero, parts.zero)


@pytest.mark.parametrize("size", [1e-7, 2e5])
@SYMMETRIC
def test_ends_of_the_scales_range(size, symmetric):
    # Scales of subnormal halves, and ones of which twice as much would be infinite.
    weight, spec = random(8, 32) / 0.12 * size, QuantSpec(4, 32, symmetric)
    q = hqq(weight, spec, torch.float16, options(spec))
    assert torch.isfinite(q.dequantize()).all()
    assert (per_group(weight, q, 0.7) <= per_group(weight, nearest(weight, spec, True), 0.7) * (1 + 1e-4)).all()


def test_bad_input():
    spec, weight = QuantSpec(4, 16), random(2, 32)
    with pytest.raises(ValueError, match="NaN or infinity"):
        hqq(weight.index_fill(1, torch.tensor([3]), float("nan")), spec, torch.float16, HQQ())
    with pytest.raises(ValueError, match="24 input features do not divide into groups of 16"):
        hqq(weight[:, :24], spec, torch.float16, HQQ())
    with pytest.raises(ValueError, match=r"p: 0.0 is not above 0"):
        hqq(weight, spec, torch.float16, HQQ(p=0.0))
    with pytest.raises(ValueError, match=r"beta: 0.0 is not above 0"):
        hqq(weight, spec, torch.float16, HQQ(beta=0.0))
    with pytest.raises(ValueError, match="needs a scale beyond"):
        hqq(torch.full((1, 16), 1e9), spec, torch.float16, HQQ())
