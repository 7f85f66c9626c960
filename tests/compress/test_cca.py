"""Canonical correlations against independent implementations, and within [0, 1] whatever the data."""

import numpy as np
import pytest
import scipy.linalg
import torch
from remanence.compress.cca import Moments, cca, correlations, principal, pwcca, svcca, weighted_mean, whitening

SHAPES = [(400, 6, 9), (400, 9, 6), (300, 1, 4), (500, 20, 20), (200, 64, 33)]


def views(n, p, q, seed=0, shared=3):
    """Two views that share some directions, off centre, with features of very different scales."""
    draw = np.random.default_rng(seed)
    z = draw.standard_normal((n, shared))
    X = draw.standard_normal((n, p)) + z @ draw.standard_normal((shared, p))
    Y = draw.standard_normal((n, q)) + z @ draw.standard_normal((shared, q))
    return X * np.logspace(-3, 3, p) + 5, Y * np.logspace(2, -2, q) - 100


def tensors(*arrays):
    return tuple(torch.from_numpy(np.asarray(array)) for array in arrays)


def by_eigenproblem(X, Y):
    """Sxy Syy^-1 Syx a = rho^2 Sxx a, of features brought to one scale: as textbooks have it. Largest first."""
    X, Y = ((view - view.mean(0)) / view.std(0) for view in (X, Y))
    xx, yy, xy = X.T @ X, Y.T @ Y, X.T @ Y
    squares, vectors = scipy.linalg.eigh(xy @ np.linalg.solve(yy, xy.T), xx)
    count = min(X.shape[1], Y.shape[1])
    variates = X @ vectors[:, ::-1][:, :count]
    return np.sqrt(squares[::-1][:count].clip(0)), variates / np.linalg.norm(variates, axis=0)


def by_inverse_roots(X, Y):
    """Singular values of Sxx^-1/2 Sxy Syy^-1/2."""
    X, Y = X - X.mean(0), Y - Y.mean(0)
    roots = [np.real(scipy.linalg.inv(scipy.linalg.sqrtm(v.T @ v))) for v in (X / X.std(0), Y / Y.std(0))]
    return np.linalg.svd(roots[0] @ (X / X.std(0)).T @ (Y / Y.std(0)) @ roots[1], compute_uv=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_as_two_textbook_forms(shape, seed):
    X, Y = views(*shape, seed)
    found = cca(*tensors(X, Y))
    assert found.dtype == torch.float64
    assert found.shape == (min(shape[1:]),)
    assert (found.diff() <= 0).all()
    assert np.abs(found.numpy() - by_eigenproblem(X, Y)[0]).max() < 1e-8
    assert np.abs(found.numpy() - by_inverse_roots(X, Y)).max() < 1e-8


def test_what_was_planted_is_found():
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((50, 9)))[0]
    Q = np.linalg.qr(Q - Q.mean(0))[0]
    planted = np.array([1.0, 0.9, 0.5, 1e-4, 0.0])
    Y = Q[:, :5] * planted + np.c_[Q[:, 5:9], Q[:, 5:6]][:, [0, 1, 2, 3, 0]] * np.sqrt(1 - planted**2)
    Y[:, 4] = np.random.default_rng(1).standard_normal(50)
    Y[:, 4] -= Q @ (Q.T @ Y[:, 4])
    found = cca(*tensors(Q[:, :5], Y))
    assert torch.allclose(found, torch.from_numpy(planted), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_invertible_maps_change_nothing(shape):
    X, Y = views(*shape)
    draw = np.random.default_rng(7)
    before = cca(*tensors(X, Y))
    A, B = (draw.standard_normal((k, k)) + 3 * np.eye(k) for k in shape[1:])
    assert (cca(*tensors(X @ A + 4, Y @ B - 7)) - before).abs().max() < 1e-8
    assert (cca(*tensors(Y, X)) - before).abs().max() < 1e-12


def low_rank(n, p, rank, seed):
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, rank)) @ draw.standard_normal((rank, p))


HARD = {
    "fewer samples than features": lambda: views(20, 50, 30),
    "as many": lambda: views(20, 20, 20),
    "two samples": lambda: views(2, 5, 3),
    "duplicates": lambda: (np.repeat(views(100, 4, 4)[0], 3, axis=1), views(100, 4, 4)[1]),
    "a constant feature": lambda: (np.c_[views(100, 3, 4)[0], np.full(100, 1e8)], views(100, 3, 4)[1]),
    "the same": lambda: (views(100, 5, 5)[0], views(100, 5, 5)[0]),
    "the same, turned": lambda: (views(100, 5, 5)[0], views(100, 5, 5)[0] @ low_rank(5, 5, 5, 3)),
    "low rank": lambda: (low_rank(100, 40, 3, 0), low_rank(100, 30, 7, 1)),
    "huge and tiny": lambda: (views(100, 5, 5)[0] * 1e200, views(100, 5, 5)[1] * 1e-200),
    "far off": lambda: (views(100, 5, 5)[0] + 1e9, views(100, 5, 5)[1]),
    "zeros but one": lambda: (np.eye(30, 8) * [1, 0, 0, 0, 0, 0, 0, 0], views(30, 2, 3)[1]),
    "nearly dependent": lambda: (views(200, 6, 6)[0] @ np.vander(np.linspace(1, 2, 6)), views(200, 6, 6)[1]),
}


@pytest.mark.parametrize("case", HARD)
def test_always_within_0_and_1(case):
    X, Y = tensors(*HARD[case]())
    for x, y in ((X, Y), (Y, X)):
        found = cca(x, y)
        assert len(found)
        assert torch.isfinite(found).all()
        assert ((found >= 0) & (found <= 1)).all()
        for mean in (svcca(x, y), svcca(x, y, 1.0), pwcca(x, y)):
            assert 0 <= mean <= 1


def test_where_features_outnumber_samples_all_is_alike():
    X, Y = tensors(*views(20, 50, 30))
    assert torch.allclose(cca(X, Y), torch.ones(19, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("case", "count"), [("duplicates", 4), ("a constant feature", 3), ("low rank", 3)])
def test_what_adds_no_direction_changes_nothing(case, count):
    X, Y = HARD[case]()
    assert len(cca(*tensors(X, Y))) == count
    if case != "low rank":
        assert torch.allclose(cca(*tensors(X, Y)), cca(*tensors(views(100, count, 4)[0], Y)), atol=1e-10)


def test_one_direction_is_the_multiple_correlation():
    X, Y = views(60, 1, 4)
    design = np.c_[np.ones(60), Y]
    left = X[:, 0] - design @ np.linalg.lstsq(design, X[:, 0], rcond=None)[0]
    expected = np.sqrt(1 - (left**2).sum() / ((X - X.mean(0)) ** 2).sum())
    assert float(cca(*tensors(X, Y))) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_svcca_is_cca_of_principal_components(energy):
    X, Y = views(300, 12, 10)
    parts = []
    for view in (X, Y):
        values, vectors = np.linalg.eigh(np.cov(view.T))
        share = np.cumsum(values[::-1]) / values.sum()
        count = int(np.argmax(share >= energy)) + 1
        parts.append((view - view.mean(0)) @ vectors[:, ::-1][:, :count])
    expected = by_eigenproblem(*parts)[0].mean()
    assert svcca(*tensors(X, Y), energy) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("shape", [(300, 6, 9), (300, 9, 6)])
def test_pwcca_weights_by_projections(shape):
    X, Y = views(*shape)
    values, variates = by_eigenproblem(X, Y)
    weights = np.abs(variates.T @ (X - X.mean(0))).sum(1)
    assert pwcca(*tensors(X, Y)) == pytest.approx((weights * values).sum() / weights.sum(), abs=1e-8)


def test_pwcca_asks_how_much_of_the_first_is_in_the_second():
    """Most of X's variance is one direction, which Y has; of Y it is but a small part."""
    draw = np.random.default_rng(0)
    shared, mine, theirs = (draw.standard_normal((2000, 1)) for _ in range(3))
    X, Y = np.c_[100 * shared, mine], np.c_[shared, 100 * theirs]
    assert pwcca(*tensors(X, Y)) > 0.95
    assert pwcca(*tensors(Y, X)) < 0.2


@pytest.mark.parametrize(
    ("X", "Y", "message"),
    [
        (torch.ones(5), torch.ones(5, 2), r"X: has the shape \[5\]"),
        (torch.rand(1, 3), torch.rand(1, 3), r"X: has the shape \[1, 3\]"),
        (torch.rand(5, 3), torch.rand(5, 0), r"Y: has the shape \[5, 0\]"),
        (torch.rand(5, 3), torch.rand(6, 3), "5 and 6 samples"),
        (torch.full((5, 2), torch.nan), torch.rand(5, 2), "X: contains NaN or infinity"),
        (torch.rand(5, 2), torch.full((5, 2), torch.inf), "Y: contains NaN or infinity"),
        (torch.rand(5, 2), torch.full((5, 2), 0.1), "Y: every feature is constant"),
        (torch.zeros(5, 2), torch.rand(5, 2), "X: every feature is constant"),
    ],
)
@pytest.mark.parametrize("measure", [cca, svcca, pwcca])
def test_what_cannot_be_correlated_is_said(measure, X, Y, message):
    with pytest.raises(ValueError, match=message):
        measure(X, Y)


@pytest.mark.parametrize("energy", [0, -1, 1.5, float("nan")])
def test_no_such_energy(energy):
    with pytest.raises(ValueError, match="energy"):
        svcca(torch.rand(9, 2), torch.rand(9, 2), energy)


def streamed(X, cuts):
    moments = Moments(X.shape[1])
    for part in torch.tensor_split(X, cuts):
        moments.add(part)
    return moments


def test_moments_of_parts_are_those_of_all():
    X, Y = views(500, 6, 4)
    both = np.c_[X, Y] + 1e7
    moments = streamed(torch.from_numpy(both), [0, 1, 7, 7, 300])
    exact = (both - both.mean(0)).T @ (both - both.mean(0))
    size = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert moments.count == 500
    assert np.abs(moments.mean.numpy() - both.mean(0)).max() < 1e-7
    # Of features that vary by 1e-3 around 1e7, float64 has six digits.
    assert (np.abs(moments.scatter.numpy() - exact) / size).max() < 1e-5
    centred = torch.from_numpy(both - both.mean(0))
    expected = (centred.T @ centred).numpy()
    assert (np.abs(streamed(centred, [3, 90]).scatter.numpy() - expected) / size).max() < 1e-9


@pytest.mark.parametrize("shape", [(2000, 6, 9), (2000, 30, 20)])
def test_streamed_equals_direct(shape):
    X, Y = tensors(*views(*shape))
    p = X.shape[1]
    joint = streamed(torch.cat([X, Y], 1), [5, 600, 601])
    xx, xy, yy = joint.scatter[:p, :p], joint.scatter[:p, p:], joint.scatter[p:, p:]
    values, variates = correlations(whitening(xx), xy, whitening(yy))
    assert (values - cca(X, Y)).abs().max() < 1e-8
    h = (X - X.mean(0)) @ variates
    assert torch.allclose(h.T @ h, torch.eye(len(values), dtype=torch.float64), atol=1e-8)
    assert weighted_mean(values, variates.T @ xx) == pytest.approx(pwcca(X, Y), abs=1e-8)


def test_principal_directions_are_white_and_hold_the_view():
    X = torch.from_numpy(views(2000, 12, 5)[0] * np.logspace(2, -2, 12))
    found = principal(streamed(X, [700]))
    z = found.along(X)
    assert torch.allclose(z.T @ z, torch.eye(12, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(z @ found.loads, X - X.mean(0), rtol=1e-6, atol=1e-8)
    values = torch.linalg.eigvalsh(torch.cov(X.T)).flip(0)
    for energy in (0.3, 0.9, 0.999):
        count = principal(streamed(X, [700]), energy).axes.shape[1]
        assert values[:count].sum() / values.sum() >= energy
        assert values[: count - 1].sum() / values.sum() < energy


def test_one_direction_for_ten_samples():
    X = torch.randn(67, 40, generator=torch.Generator().manual_seed(0))
    assert principal(streamed(X, [30])).axes.shape[1] == 6
    wide = torch.randn(3000, 300, generator=torch.Generator().manual_seed(0))
    assert principal(streamed(wide, [])).axes.shape[1] == 256
    with pytest.raises(ValueError, match="9 samples; 10 are needed"):
        principal(streamed(X[:9], []))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_the_same_sample_again_and_again(value):
    with pytest.raises(ValueError, match="are all the same"):
        principal(streamed(torch.full((100, 4), value), [33, 34]))
    with pytest.raises(ValueError, match="every feature is constant"):
        whitening(torch.zeros(3, 3, dtype=torch.float64))


def test_directions_below_rounding_are_left_out():
    X = torch.from_numpy(low_rank(500, 30, 4, 0)).float()
    assert principal(streamed(X, [100])).axes.shape[1] == 4


def test_sums_of_other_samples_are_refused():
    eye = torch.eye(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="not of the same samples"):
        correlations(whitening(eye), 1.1 * eye, whitening(eye))
    with pytest.raises(ValueError, match="NaN"):
        principal(streamed(torch.full((30, 2), torch.nan), []))
