"""The supervised probe: its minimum against Newton's method, its AUC by counting pairs, and what it finds in states
whose truth is known."""

import numpy as np
import pytest
import torch
from remanence.compress.early_exit.policy import Step
from remanence.compress.early_exit.probe import auc, fit_probe, logistic
from remanence.compress.early_exit.states import States

pytestmark = pytest.mark.usefixtures("one_thread")


def newton(z, y, penalty):
    """The same minimum by another way."""
    x = np.column_stack([z, np.ones(len(z))])
    ridge = penalty * np.diag([*[1.0] * z.shape[1], 0.0])
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (p - y) / len(y) + ridge @ w
        w -= np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x / len(y) + ridge, gradient)
    return w


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_the_minimum_is_newtons(penalty):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(400, 6))
    y = (rng.random(400) < 1 / (1 + np.exp(-z @ rng.normal(size=6) - 0.7))).astype(float)
    assert logistic(z, y, penalty) == pytest.approx(newton(z, y, penalty), abs=1e-5)


def test_auc_counts_pairs():
    rng = np.random.default_rng(1)
    scores, y = rng.integers(0, 5, 60).astype(float), (rng.random(60) < 0.3).astype(float)
    pairs = [(a > b) + (a == b) / 2 for a in scores[y > 0] for b in scores[y == 0]]
    assert auc(scores, y) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc(scores, np.ones(60)) is None
    assert auc(scores, np.zeros(60)) is None


@pytest.fixture(scope="module")
def states():
    """Exit 1 agrees by the sign of a noisy direction, on features of unlike scales; exit 2 never; exit 3 always."""
    g = torch.Generator().manual_seed(0)
    n, d = 3000, 8
    state = torch.randn(n, 3, d, generator=g) * torch.logspace(-2, 2, d) + 5
    z = (state[:, 0] - 5) / torch.logspace(-2, 2, d)
    agree = z[:, 0] + z[:, 7] + 0.5 * torch.randn(n, generator=g) > 0.3
    table = torch.stack([agree, torch.zeros(n).bool(), torch.ones(n).bool()], 1)
    state[:, :, 3] = 2.0  # a feature that never changes
    final = torch.ones(n, dtype=torch.int64)
    episode = torch.arange(n) // 10
    return States((1, 2, 3), 4, state, state, torch.where(table, 1, 0), final, episode, final)


def test_it_finds_the_direction_and_says_how_well(states):
    probe, fits = fit_probe(states)
    assert [fit.depth for fit in fits] == [1, 2, 3]
    assert fits[0].auc > 0.95
    assert fits[0].accuracy > 0.88
    assert fits[0].accuracy > max(fits[0].agreement, 1 - fits[0].agreement) + 0.3
    # The judged tokens are few: the report is of episodes kept aside.
    assert fits[0].tokens == 450
    w = probe.weight[0] / probe.weight[0].abs().max()
    assert w[[0, 7]].min() > 0.8
    assert w[[1, 2, 3, 4, 5, 6]].abs().max() < 0.15
    assert probe.deviation[:, 3].tolist() == [1, 1, 1]
    probe.check_fits(4, 8)


def test_an_exit_with_one_kind_of_token_has_a_constant_score(states):
    probe, fits = fit_probe(states)
    assert (fits[1].penalty, fits[1].auc, fits[2].penalty, fits[2].auc) == (None,) * 4
    assert (fits[1].agreement, fits[2].agreement) == (0, 1)
    scores = [probe.score(Step(d, states.state[:, d - 1], None, None, None)) for d in (2, 3)]
    assert scores[0].max() == scores[0].min()
    # Half a token of 2100.
    assert float(scores[0][0]) == pytest.approx(0.5 / 2101, rel=1e-4)
    assert float(scores[1][0]) == pytest.approx(1 - 0.5 / 2101, rel=1e-6)


def test_score_is_the_reported_classifier(states):
    """What the policy computes in float32 has the accuracy and AUC that the report claims, on the same tokens."""
    probe, fits = fit_probe(states, seed=3)
    judge = states.split((0.15, 0.15), 3)[1]
    p = probe.score(Step(1, judge.state[:, 0], None, None, None)).double().numpy()
    y = judge.agrees[:, 0].double().numpy()
    assert auc(p, y) == pytest.approx(fits[0].auc, abs=1e-5)
    assert ((p >= 0.5) == (y > 0)).mean() == pytest.approx(fits[0].accuracy, abs=1e-9)
    assert -np.log(np.where(y > 0, p, 1 - p)).mean() == pytest.approx(fits[0].loss, rel=1e-4)


def test_same_seed_same_probe(states):
    one, other, third = fit_probe(states, 1)[0], fit_probe(states, 1)[0], fit_probe(states, 2)[0]
    assert torch.equal(one.weight, other.weight)
    assert not torch.equal(one.weight, third.weight)


def test_penalty_is_chosen_where_there_is_little_to_learn():
    """20 tokens to learn from and 40 features of noise: the strongest penalty is best."""
    g = torch.Generator().manual_seed(1)
    state = torch.randn(60, 1, 40, generator=g)
    guess = (torch.rand(60, 1, generator=g) < 0.5).long()
    ones = torch.ones(60, dtype=torch.int64)
    states = States((1,), 2, state, state, guess, ones, torch.arange(60), ones)
    assert fit_probe(states)[1][0].penalty >= 0.1


def test_what_is_refused(states):
    with pytest.raises(ValueError, match="penalties: "):
        fit_probe(states, penalties=(0.0,))
    with pytest.raises(ValueError, match="states: 2 episodes do not make 3 parts"):
        fit_probe(states.rows(torch.arange(20)))
