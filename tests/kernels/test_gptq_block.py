"""The inner loops of calibration: the native kernels against plain torch and float64, on every instruction set."""

import itertools

import pytest
import torch
from remanence.kernels import ops, reference


def samples(n, b, groups, bits, asymmetric=False, masked=False, pushed=False, dtype=torch.float32):
    """Arguments of the op; scales of both signs, some weights far beyond the codes, some exactly between two."""
    generator = torch.Generator().manual_seed(n + b)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    upper = randn(b, b) * 0.1
    upper.diagonal().abs_().add_(0.5)
    scale = ((0.05 + torch.rand(n, groups, generator=generator)) * randn(n, groups).sign()).to(dtype)
    group = torch.randint(0, groups, (b,), generator=generator)
    running = randn(n, b)
    running[:, 0] = 2.5 * scale[:, group[0]].float()  # a tie: to even
    running[-1, -1] *= 1e30
    zero = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=generator) if asymmetric else None
    kept = torch.rand(n, b, generator=generator) > 0.5 if masked else None
    return running, upper, scale, zero, group, kept, randn(b, b) * 0.05 if pushed else None, bits


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize(("asymmetric", "masked", "pushed"), [*itertools.product((False, True), repeat=3)])
@pytest.mark.parametrize(("n", "b", "groups"), [(1, 1, 1), (3, 63, 2), (65, 65, 1), (33, 128, 5), (16, 7, 7)])
def test_equals_the_reference(n, b, groups, asymmetric, masked, pushed, bits):
    args = samples(n, b, groups, bits, asymmetric, masked, pushed)
    codes, errors = ops.gptq_block(*args)
    exact_codes, exact_errors = reference.gptq_block(*args)
    assert torch.equal(codes, exact_codes)
    assert torch.equal(errors, exact_errors)


def test_reference_is_the_formula():
    """One row in Python numbers; the sum of what was left to a column, in float64."""
    running, upper, scale, zero, group, kept, push, bits = samples(1, 40, 3, 4, True, True, True)
    running[-1, -1] = 0.3
    codes, errors = reference.gptq_block(running, upper, scale, zero, group, kept, push, bits)
    w = [float(x) for x in running[0]]
    for i in range(40):
        s, z = float(scale[0, group[i]]), int(zero[0, group[i]])
        code = min(max(round(w[i] / s) + z, 0), 15) if kept[0, i] else z
        assert int(codes[0, i]) == code
        error = (w[i] - (code - z) * s) / float(upper[i, i])
        assert float(errors[0, i]) == pytest.approx(error, abs=1e-4)
        for j in range(i + 1, 40):
            w[j] += w[i] * float(push[i, j]) - error * float(upper[i, j])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_every_dtype(dtype):
    args = samples(19, 33, 3, 4, True, dtype=dtype)
    codes, errors = ops.gptq_block(*args)
    again, exact = ops.gptq_block(args[0], args[1], args[2].float(), *args[3:])
    assert torch.equal(codes, again)
    assert torch.equal(errors, exact)


def test_threads_do_not_change_a_bit_and_nothing_given_is_changed():
    args = samples(301, 128, 4, 4, True, True, True)
    before = [None if not isinstance(arg, torch.Tensor) else arg.clone() for arg in args]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.gptq_block(*args))
    assert all(torch.equal(a, b) for found in results for a, b in zip(found, results[0]))
    assert all(torch.equal(arg, old) for arg, old in zip(args, before) if old is not None)


def test_slices_and_transposes_are_taken_as_they_are():
    running, upper, scale, zero, group, kept, push, bits = samples(33, 64, 4, 4, True, True, True)
    expected = ops.gptq_block(running, upper, scale, zero, group, kept, push, bits)
    wide = torch.full((33, 200), torch.nan)
    wide[:, 50:114] = running
    strided = (
        wide[:, 50:114],
        upper.T.contiguous().T,
        scale.T.contiguous().T,
        zero.T.contiguous().T,
        group.repeat_interleave(2)[::2],
        kept.T.contiguous().T,
        push.T.contiguous().T,
    )
    for found in (ops.gptq_block(*strided, bits), ops.gptq_block(running.T.contiguous().T, *strided[1:], bits)):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    unread = torch.full_like(upper, torch.nan).tril(-1)
    found = ops.gptq_block(running, upper.triu() + unread, *strided[2:], bits)
    assert torch.equal(found[1], expected[1])


def test_empty():
    for n, b in ((0, 5), (5, 0)):
        args = torch.empty(n, b), torch.ones(b, b), torch.ones(n, 1), None, torch.zeros(b, dtype=torch.int64)
        codes, errors = ops.gptq_block(*args)
        assert codes.shape == errors.shape == (n, b)


@pytest.mark.parametrize("isa", ops.available_isas()[-1:], indirect=True)
@pytest.mark.parametrize("given", [0, 1])
def test_opcheck(given):
    torch.library.opcheck(torch.ops.remanence.gptq_block.default, samples(5, 8, 2, 3, given, given, given))


R, U, S, G = torch.zeros(4, 8), torch.eye(8), torch.ones(4, 2), torch.zeros(8, dtype=torch.int64)
MISTAKES = [
    (lambda: ops.gptq_block(R, U, S, None, G, bits=5), r"bits: 5 is not one of 2, 3, 4, 8"),
    (lambda: ops.gptq_block(R[0], U, S, None, G), r"running: shape \[8\] is not \[N, B\]"),
    (lambda: ops.gptq_block(R.double(), U, S, None, G), r"running: torch.float64 is not torch.float32"),
    (lambda: ops.gptq_block(R, U[:7], S, None, G), r"upper: shape \[7, 8\] is not \[8, 8\]"),
    (lambda: ops.gptq_block(R, U, S[:3], None, G), r"scale: shape \[3, 2\] is not \[4, 2\]"),
    (lambda: ops.gptq_block(R, U, S[0], None, G), r"scale: shape \[2\] is not \[N, G\]"),
    (lambda: ops.gptq_block(R, U, S, S, G), r"zero: torch.float32 is not torch.uint8"),
    (lambda: ops.gptq_block(R, U, S, S[:, :1].byte(), G), r"zero: shape \[4, 1\] is not \[4, 2\]"),
    (lambda: ops.gptq_block(R, U, S, None, G[:7]), r"group: shape \[7\] is not \[8\]"),
    (lambda: ops.gptq_block(R, U, S, None, G.int()), r"group: torch.int32 is not torch.int64"),
    (lambda: ops.gptq_block(R, U, S, None, G + 2), r"group: entries 2 to 2, but scale has 2 columns"),
    (lambda: ops.gptq_block(R, U, S, None, G - 1), r"group: entries -1 to -1, but scale has 2 columns"),
    (lambda: ops.gptq_block(R, U, S, None, G, R), r"kept: torch.float32 is not torch.bool"),
    (lambda: ops.gptq_block(R, U, S, None, G, R[:3] > 0), r"kept: shape \[3, 8\] is not \[4, 8\]"),
    (lambda: ops.gptq_block(R, U, S, None, G, None, U[:3]), r"push: shape \[3, 8\] is not \[8, 8\]"),
]


@pytest.mark.parametrize("mistake", range(len(MISTAKES)), ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()


# Clip search: what rounding costs on many grids.


def grids(m, g, s, bits, asymmetric):
    generator = torch.Generator().manual_seed(m + g)
    w = torch.randn(m, g, generator=generator) * 0.02
    scale = w.abs().amax(1, keepdim=True) / 2 ** (bits - 1) * torch.linspace(1.2, -0.2, s)
    zero = torch.randint(0, 2**bits, (m, s), dtype=torch.uint8, generator=generator) if asymmetric else None
    return w, scale, zero, bits


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("m", "g", "s"), [(1, 16, 1), (3, 63, 17), (65, 128, 73), (7, 16, 16)])
def test_clip_error_is_the_sum_of_powers(m, g, s, asymmetric, bits):
    w, scale, zero, bits = grids(m, g, s, bits, asymmetric)
    middle = 2.0 ** (bits - 1) if zero is None else zero.double()[:, None]
    step = scale.double()[:, None]  # [m, 1, s]
    codes = ((w.double()[:, :, None] / step).round() + middle).clamp(0, 2**bits - 1)
    exact = (((codes - middle) * step - w.double()[:, :, None]).abs() ** 2.4).sum(1)
    # The power is good to 2e-6, the sum of 128 about as well.
    for error in (ops.clip_error(w, scale, zero, bits), reference.clip_error(w, scale, zero, bits)):
        assert torch.allclose(error.double(), exact, rtol=1e-5, atol=0)


def test_clip_error_of_grids_without_a_scale_and_of_groups_of_zeros():
    w = torch.zeros(2, 32)
    w[1] = 0.5
    scale = torch.tensor([[0.0, 0.5, -0.25], [0.0, 0.5, -0.25]])
    for clip_error in (ops.clip_error, reference.clip_error):
        error = clip_error(w, scale, None, 4)
        assert torch.isinf(error[:, 0]).all()
        assert (error[:, 1:] < 1e-12).all()


def test_threads_do_not_change_a_clip_error():
    args = grids(301, 64, 73, 4, True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.clip_error(*args))
    assert all(torch.equal(found, results[0]) for found in results)


@pytest.mark.skipif(not ops.available_isas(), reason="the native kernels are not built")
def test_every_instruction_set_gives_the_bits_of_the_portable_one():
    args = grids(33, 128, 73, 3, True)
    found = ops.clip_error(*args)
    ops.set_isa("scalar")
    assert torch.equal(ops.clip_error(*args), found)


@pytest.mark.parametrize("isa", ops.available_isas()[-1:], indirect=True)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_clip_error_opcheck(asymmetric):
    torch.library.opcheck(torch.ops.remanence.clip_error.default, grids(5, 8, 3, 4, asymmetric))


CLIP_MISTAKES = [
    (lambda: ops.clip_error(R, S, None, 5), r"bits: 5 is not one of"),
    (lambda: ops.clip_error(R[0], S, None, 4), r"w: shape \[8\] is not \[M, G\]"),
    (lambda: ops.clip_error(R.half(), S, None, 4), r"w: torch.float16 is not torch.float32"),
    (lambda: ops.clip_error(R, S[:3], None, 4), r"scale: shape \[3, 2\] is not \[4, 2\]"),
    (lambda: ops.clip_error(R, S.half(), None, 4), r"scale: torch.float16 is not torch.float32"),
    (lambda: ops.clip_error(R, S, S[:, :1].byte(), 4), r"zero: shape \[4, 1\] is not \[4, 2\]"),
]


@pytest.mark.parametrize("mistake", range(len(CLIP_MISTAKES)), ids=[message for _, message in CLIP_MISTAKES])
def test_clip_mistakes_are_named(mistake):
    call, message = CLIP_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()
