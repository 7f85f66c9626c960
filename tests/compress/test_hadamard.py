"""Hadamard matrices of computed orders, orthogonal matrices of every size, and the fast product with them."""

import pytest
import scipy.linalg
import torch
from remanence.compress.hadamard import (
    OnlineHadamard,
    apply_hadamard,
    hadamard,
    mean_preserving,
    orthogonal,
    randomized,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def deviation(Q):
    """From orthogonality."""
    return float((Q @ Q.T - torch.eye(len(Q), dtype=torch.float64)).abs().max())


# Sylvester; Paley's first construction (12, 20, 44, 48 / 28 over 3^3, 344 over 7^3), his second (36; 52 over 5^2, 100
# over 7^2); products with twos (40, 56, 96, 688).
@pytest.mark.parametrize("n", [1, 2, 4, 64, 12, 20, 28, 36, 40, 44, 48, 52, 56, 60, 76, 96, 100, 108, 140, 344, 688])
def test_hadamard_matrices(n):
    H = hadamard(n)
    assert H is not None
    assert set(H.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 6, 7, 47, 50, 92, 156])
def test_sizes_without_a_known_one(n):
    assert hadamard(n) is None


def test_widths_of_common_models_have_one():
    """Residual streams and MLPs of OPT, Llama, Qwen2, Qwen3, Mistral, Phi, Gemma, but no matrix larger than 2000."""
    widths = [768, 896, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6656, 8192]
    inner = [4864, 5632, 6912, 8960, 9728, 10240, 11008, 12288, 13824, 14336, 18944, 22016, 24576, 27648, 28672, 29568]
    for n in widths + inner:
        core, signs = randomized(n, generator())
        assert len(signs) == n
        assert len(core) < 2000
        assert deviation(core) < 1e-12
        # The same size for all entries: a Hadamard matrix and no random one.
        assert float((core.abs() - len(core) ** -0.5).abs().max()) < 1e-12, n


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("n", [1, 2, 3, 39, 48, 56, 96, 156, 188])
def test_orthogonal_for_every_size(kind, n):
    Q = orthogonal(n, kind, generator())
    assert Q.dtype == torch.float64
    assert deviation(Q) < 1e-12
    assert torch.equal(Q, orthogonal(n, kind, generator()))
    if n > 2:
        assert not torch.allclose(Q, orthogonal(n, kind, generator(1)))
    if n > 1:
        Q = orthogonal(n, kind, generator(), fixed_first=True)
        assert deviation(Q) < 1e-12
        ones = torch.ones(n, dtype=torch.float64)
        torch.testing.assert_close(Q @ ones, ones)
        x = torch.randn(5, n, dtype=torch.float64, generator=generator(2))
        torch.testing.assert_close((x @ Q.T).mean(1), x.mean(1))
        assert n == 2 or float((Q - torch.eye(n)).abs().max()) > 0.1


def test_a_hadamard_gives_every_channel_the_same_share():
    for n in (48, 56, 96):
        assert float((orthogonal(n, "hadamard", generator()).abs() - n**-0.5).abs().max()) < 1e-12
    # Of 156 = 4 * 39 the part of 4.
    share = orthogonal(156, "hadamard", generator()).reshape(4, 39, 4, 39).square().sum((1, 3)) / 39
    torch.testing.assert_close(share, torch.full((4, 4), 0.25, dtype=torch.float64))


def test_haar_is_uniform():
    """An entry of a uniform one has mean 0 and variance 1 / n; without the signs of R fixed, diagonals are biased."""
    n, drawn = 4, generator()
    diagonals = torch.stack([orthogonal(n, "orthogonal", drawn).diagonal() for _ in range(2000)])
    assert float(diagonals.mean().abs()) < 4 * (n * len(diagonals) * n) ** -0.5
    assert abs(float(diagonals.square().mean()) - 1 / n) < 0.02


@pytest.mark.parametrize("n", [1, 2, 8, 12, 39, 48, 56, 156, 160])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_fast_product(n, dtype):
    """Against the dense Kronecker product, with scipy's Sylvester matrices, on a strided input."""
    core, signs = randomized(n, generator())
    outer = torch.from_numpy(scipy.linalg.hadamard(n // len(core)).astype("float64"))
    R = torch.kron(outer, core) @ torch.diag(signs) * len(outer) ** -0.5
    assert deviation(R) < 1e-12
    x = torch.randn(3, n, 5, generator=generator(1)).to(dtype).transpose(1, 2)  # [3, 5, n]
    y = apply_hadamard(x, core, signs)
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), x.double() @ R.T, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(orthogonal(n, "hadamard", generator()), R)


def test_online_module():
    core, signs = randomized(24, generator())
    online = OnlineHadamard(core, signs)
    assert dict(online.named_parameters()) == {}
    assert {name: b.dtype for name, b in online.named_buffers()} == {"core": torch.float32, "signs": torch.float32}
    x = torch.randn(2, 24, generator=generator(1))
    assert torch.equal(online(x), apply_hadamard(x, core.float(), signs.float()))
    torch.testing.assert_close(online(x[:1]), online(x)[:1])  # rows do not depend on each other
    assert core.is_contiguous()
    assert randomized(39, generator())[0].is_contiguous()  # as safetensors wants it


def test_mean_preserving_is_the_formula_and_differentiable():
    n = 6
    R = orthogonal(n - 1, "orthogonal", generator())
    first = torch.full((n, 1), n**-0.5, dtype=torch.float64)
    v = torch.eye(n, dtype=torch.float64)[:, :1] - first
    H = torch.eye(n, dtype=torch.float64) - 2 * v @ v.T / (v.T @ v)
    torch.testing.assert_close(H[:, :1], first)
    torch.testing.assert_close(mean_preserving(R), H @ torch.block_diag(torch.ones(1, 1).double(), R) @ H.T)
    assert torch.autograd.gradcheck(mean_preserving, R.requires_grad_())


def test_wrong_input():
    with pytest.raises(ValueError, match="kind: 'dct' is not one of hadamard, orthogonal"):
        orthogonal(8, "dct", generator())
    with pytest.raises(ValueError, match="n: 0 is below 1"):
        orthogonal(0, "hadamard", generator())
    with pytest.raises(ValueError, match="n: 1 is below 2"):
        orthogonal(1, "hadamard", generator(), fixed_first=True)
