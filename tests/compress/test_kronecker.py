"""Kronecker maps against the dense matrix in float64, their inverse in the weights, and what they refuse."""

import copy

import numpy as np
import pytest
import torch
from remanence.compress.kronecker import Kronecker, factors, multiply
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("one_thread")

# Square, near-square, prime, one factor 1, odd, and one as wide as a small model.
SIZES = pytest.mark.parametrize("n", [1, 2, 7, 12, 15, 63, 64, 65, 192])


def drawn(n, seed=0):
    """A map far from orthogonal, and scales over two orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    n1, n2 = factors(n)
    left, right = torch.randn(n1, n1, generator=g), torch.randn(n2, n2, generator=g)
    # Twice the identity keeps them away from singular.
    return Kronecker(
        left + 2 * n1**0.5 * torch.eye(n1),
        right + 2 * n2**0.5 * torch.eye(n2),
        10 ** (2 * torch.rand(n, generator=g) - 1),
    )


def dense64(made):
    """[n, n] by definition: entry (i1 n2 + i2, j1 n2 + j2) = left[i1, j1] right[i2, j2] / scale[i1 n2 + i2]."""
    left, right, scale = (tensor.double().numpy() for tensor in (made.left, made.right, made.scale))
    return np.einsum("ij,kl->ikjl", left, right).reshape(len(scale), -1) / scale[:, None]


def rows(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return float((found.double() - torch.as_tensor(expected)).norm() / np.linalg.norm(expected))


def test_factors():
    assert [factors(n) for n in (1, 2, 7, 12, 48, 64, 192, 768, 3584, 4096, 11008, 14336)] == [
        *((1, 1), (1, 2), (1, 7), (3, 4), (6, 8), (8, 8), (12, 16)),
        *((24, 32), (56, 64), (64, 64), (86, 128), (112, 128)),
    ]
    for n in range(1, 300):
        n1, n2 = factors(n)
        assert n1 * n2 == n
        assert n2 - n1 == min(n // d - d for d in range(1, n + 1) if n % d == 0 and d <= n // d)
    for n in (0, -4):
        with pytest.raises(ValueError, match=f"features: {n} has no factors"):
            factors(n)


@SIZES
def test_forward_is_the_dense_matrix(n):
    made, x = drawn(n), rows(3, 5, n)
    expected = x.double().numpy() @ dense64(made)
    np.testing.assert_allclose(made.dense().numpy(), dense64(made), rtol=1e-14)
    assert made(x).dtype == torch.float32
    assert made(x).shape == x.shape
    assert relative(made(x), expected) < 1e-6
    assert relative(made(x.double()), expected) < 1e-14
    # One vector, no rows at all, every other row of a wider tensor, and channels that are not contiguous.
    torch.testing.assert_close(made(x[0, 0]), made(x)[0, 0], rtol=1e-5, atol=1e-5)
    assert made(x[:0]).shape == (0, 5, n)
    assert relative(made(x[::2]), expected[::2]) < 1e-6
    assert relative(made(x.transpose(0, 2).contiguous().transpose(0, 2)), expected) < 1e-6


def test_sixteen_bits_are_computed_in_float32():
    made = drawn(192)
    for dtype in (torch.bfloat16, torch.float16):
        x = rows(9, 192).to(dtype)
        assert made(x).dtype == dtype
        assert torch.equal(made(x), made(x.float()).to(dtype))


@SIZES
def test_folded_weight_undoes_the_map(n):
    made, x, weight = drawn(n), rows(11, n), rows(6, n, seed=2)
    folded = made.fold(weight)
    assert folded.dtype == torch.float64
    expected = (x.double() @ weight.double().T).numpy()
    assert relative(made(x.double()) @ folded.T, expected) < 1e-12
    assert relative(made(x) @ folded.float().T, expected) < 1e-5
    np.testing.assert_allclose(folded.numpy(), weight.double().numpy() @ np.linalg.inv(dense64(made)).T, rtol=1e-9)


def test_gradients_reach_the_factors():
    left, right = (tensor.double().requires_grad_() for tensor in (drawn(12).left, drawn(12).right))
    x = rows(4, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(multiply, (x, left, right))


def test_file_round_trip(tmp_path):
    made, weight = drawn(63), rows(6, 63)
    save_file(made.state_dict(), tmp_path / "map.safetensors")
    tensors = load_file(tmp_path / "map.safetensors")
    assert set(tensors) == {"left", "right", "scale"}
    again = Kronecker(**tensors)
    loaded = drawn(63, seed=5)
    assert not torch.equal(loaded.left, made.left)
    loaded.load_state_dict(tensors)
    for other in (again, loaded, copy.deepcopy(made)):
        assert torch.equal(other.fold(weight), made.fold(weight))
        assert torch.equal(other(weight), made(weight))


def test_stays_wide_when_the_model_is_cast():
    made, model = drawn(64), torch.nn.Sequential(torch.nn.Linear(64, 64), drawn(64))
    for cast in (model.half, model.bfloat16, lambda: model.to(torch.bfloat16)):
        cast()
        assert model[0].weight.dtype != torch.float32
        assert torch.equal(model[1].left, made.left)
        assert torch.equal(model[1].dense(), made.dense())
    assert model.double()[1].scale.dtype == torch.float64
    assert torch.equal(model.float()[1].left, made.left)
    assert model.to("meta")[1].right.is_meta


def test_what_it_refuses():
    eye, ones = torch.eye(3), torch.ones(6)
    for left, right, scale, message in [
        (torch.ones(3), torch.eye(2), ones, r"left: has the shape \[3\]; expected a square matrix"),
        (eye, torch.ones(2, 3), ones, r"right: has the shape \[2, 3\]; expected a square matrix"),
        (eye, torch.eye(2), torch.ones(5), r"scale: has the shape \[5\]; expected \[6\]"),
        (eye, torch.eye(2), torch.ones(6, 1), r"scale: has the shape \[6, 1\]; expected \[6\]"),
        (eye * float("nan"), torch.eye(2), ones, "left: contains NaN or infinity"),
        (eye, torch.eye(2) / 0, ones, "right: contains NaN or infinity"),
        (eye, torch.eye(2), ones * float("inf"), "scale: contains NaN or infinity"),
        (eye, torch.eye(2), torch.tensor([1, 1, 0.0, 1, 1, 1]), "scale: its least value is 0; expected all above 0"),
        (eye, torch.eye(2), -ones, "scale: its least value is -1; expected all above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Kronecker(left, right, scale)
    with pytest.raises(ValueError, match=r"transform: left \[3, 3\] or right \[2, 2\] is singular"):
        Kronecker(eye, torch.ones(2, 2), ones).fold(torch.ones(4, 6))
