"""The agent: every reward by hand, the known optimum by dynamic programming, its environment as gymnasium wants it,
what PPO reaches on a toy whose best is known, and the same action probabilities once exported."""

import random
import sys
import warnings

import numpy as np
import pytest
import torch
from remanence.compress.early_exit.agent import (
    AgentTraining,
    Reward,
    Walk,
    environment,
    exported,
    returns,
    rewards,
    train_agent,
)
from remanence.compress.early_exit.policy import Step
from remanence.compress.early_exit.states import States

pytestmark = pytest.mark.usefixtures("one_thread")


def made(table, exits, layers, state=None, per_episode=1):
    agrees = torch.as_tensor(table).bool()
    n, E = agrees.shape
    final = torch.ones(n, dtype=torch.int64)
    state = torch.arange(n * E * 2).view(n, E, 2).float() if state is None else state
    episode = torch.arange(n) // per_episode
    return States(exits, layers, state, state, torch.where(agrees, 1, 0), final, episode, final)


# Exits 4, 6, 12 of 20 layers; one token each whose first agreeing exit is 4, 6, 12, none, and one that wavers.
TABLE = [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0], [1, 0, 1]]
# (continue, exit) at each exit, by hand; 7 layers from 12 to... the next exit after 12 is the whole model, 20.
BY_HAND = [
    [(-2, 1), (-8, -2), (-16, -8)],  # l* = 4: next - 4; 1, then -(l - 4)
    [(1, -2), (-6, 1), (-14, -6)],  # l* = 6
    [(1, -8), (1, -6), (-8, 1)],  # l* = 12
    [(1, -16), (1, -14), (1, -8)],  # l* = 20
    [(-2, 1), (-8, -0.1), (-16, -8)],  # wrong and late: epsilon
]


def test_rewards_are_the_table():
    states = made(TABLE, (4, 6, 12), 20)
    wanted = torch.tensor(BY_HAND)
    assert torch.allclose(rewards(states, Reward()), wanted / 11)  # the last exit's index
    negative = torch.where(wanted < 0, wanted / 11, wanted)
    assert torch.allclose(rewards(states, Reward(scaling="negative")), negative)


def test_each_coefficient_is_where_it_belongs():
    states = made(TABLE, (4, 6, 12), 20)
    found = 11 * rewards(states, Reward(alpha=2, beta=3, gamma=5, epsilon=7))
    assert found[0].flatten().tolist() == pytest.approx([-10, 1, -40, -4, -80, -16])
    assert found[2].flatten().tolist() == pytest.approx([1, -24, 1, -18, -40, 1])
    assert found[4, 1].tolist() == pytest.approx([-40, -7])


def test_scaling_of_a_model_of_28_layers():
    """The paper's: exits at index 3 to 27, so that +1 becomes .037."""
    states = made([[1] + [0] * 6], (4, 8, 12, 16, 20, 24, 28), 29)
    assert float(rewards(states, Reward())[0, 0, 1]) == pytest.approx(1 / 27)


@pytest.mark.parametrize("scaling", ["all", "negative"])
def test_the_best_is_to_leave_at_the_first_agreement(scaling):
    """By dynamic programming over every token's exits, on random tables."""
    g = torch.Generator().manual_seed(0)
    states = made(torch.rand(200, 4, generator=g) < 0.4, (1, 3, 4, 7), 9)
    reward = Reward(scaling=scaling)
    table = rewards(states, reward).double()
    best = torch.zeros(200).double()
    for e in reversed(range(4)):
        best = torch.maximum(table[:, e, 0] + best, table[:, e, 1])
    assert torch.allclose(returns(states, states.first_agreement, reward).double(), best, atol=1e-6)
    # And it is the only best one.
    for e in range(5):
        other = torch.full((200,), e)
        differs = other != states.first_agreement
        assert (returns(states, other, reward)[differs] < best[differs] - 1e-3).all()


def test_walk_goes_over_exits_tokens_and_episodes():
    states = made(TABLE, (4, 6, 12), 20, per_episode=2)  # the last episode has one token
    walk = Walk(states, Reward())
    table = rewards(states, Reward())
    assert walk.episodes == 3
    assert walk.reset(1).tolist() == states.state[2, 0].tolist()
    seen = []
    for action in (0, 1, 0, 0, 0):
        seen.append(walk.step(action))
    assert [s.tolist() for s, _, _ in seen[:4]] == [
        states.state[i, e].tolist() for i, e in ((2, 1), (3, 0), (3, 1), (3, 2))
    ]
    assert [r for _, r, _ in seen] == pytest.approx(
        [float(table[2, 0, 0]), float(table[2, 1, 1]), *table[3, :, 0].tolist()]
    )
    assert [over for _, _, over in seen] == [False, False, False, False, True]
    walk.reset(2)
    assert walk.step(1)[2]


@pytest.mark.usefixtures("ppo")
def test_environment_keeps_gymnasiums_rules():
    from gymnasium.utils.env_checker import check_env

    states = made(TABLE, (4, 6, 12), 20, per_episode=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of unbounded states and of having no spec
        check_env(environment(states, Reward()), skip_render_check=True)
    one = environment(states, Reward())
    starts = [tuple(one.reset(seed=seed)[0]) for seed in range(40)]
    assert set(starts) == {tuple(states.state[i, 0].tolist()) for i in (0, 2, 4)}
    assert starts[:5] == [tuple(environment(states, Reward()).reset(seed=seed)[0]) for seed in range(5)]


@pytest.fixture(scope="module")
def ppo():
    pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed (remanence[rl])")


@pytest.fixture(scope="module")
def toy():
    """Whether an exit agrees is the sign of a feature; four exits, ten tokens an episode."""
    g = torch.Generator().manual_seed(0)
    state = torch.randn(600, 4, 6, generator=g)
    return made(state[:, :, 2] > 0.3, (2, 4, 6, 8), 10, state, per_episode=10)


QUICK = {"steps": 8192, "rollout": 512, "batch_size": 128, "learning_rate": 5e-3, "environments": 16}


@pytest.fixture(scope="module")
def learned(toy, ppo):  # noqa: ARG001
    return train_agent(toy, AgentTraining(**QUICK))


def test_ppo_beats_chance_and_nears_the_best(toy, learned):
    assert learned.steps == 8192
    reward = Reward()
    best = float(returns(toy, toy.first_agreement, reward).mean())
    g = torch.Generator().manual_seed(0)
    coins = torch.cat([torch.rand(600, 4, generator=g) < 0.5, torch.ones(600, 1).bool()], 1).int().argmax(1)
    chance = float(returns(toy, coins, reward).mean())
    found = float(returns(toy, toy.leaving(learned.agent, lambda state: state), reward).mean())
    assert chance < 0 < best
    assert found > best - 0.15 * (best - chance)


@pytest.mark.usefixtures("ppo")
def test_exported_actor_has_the_same_probabilities(toy):
    from stable_baselines3 import PPO

    ppo = PPO("MlpPolicy", environment(toy, Reward()), device="cpu", seed=3, policy_kwargs={"net_arch": [16, 8]})
    for parameter in ppo.policy.parameters():  # it starts with both actions alike
        torch.nn.init.normal_(parameter, std=0.5)
    states = toy.state[:, 1]
    theirs = ppo.policy.get_distribution(states).distribution.probs[:, 1].detach()
    agent = exported(ppo.policy, toy.exits)
    agent.check_fits(10, 6)
    ours = agent.score(Step(4, states, None, None, None))
    assert torch.allclose(ours, torch.where(theirs < 0.5, 0, theirs), atol=1e-6)
    assert 0.2 < (ours > 0).float().mean() < 0.8
    # Of standardised states: the first layer takes raw ones.
    mean, deviation = torch.randn(6), torch.rand(6) + 0.5
    folded = exported(ppo.policy, toy.exits, mean=mean, deviation=deviation)
    raw = folded.score(Step(4, states * deviation + mean, None, None, None))
    assert torch.allclose(raw, ours, atol=1e-5)


@pytest.mark.usefixtures("ppo")
def test_standardised_states_are_learned_and_exported_raw(toy):
    """Features far off and of unlike scales, where tanh on raw states sees nothing."""
    from dataclasses import replace

    scale = torch.logspace(-4, 3, 6)
    far = replace(toy, state=toy.state * scale + 1000 * scale)
    reward = Reward()
    agent = train_agent(far, AgentTraining(**QUICK, standardised=True)).agent
    best = float(returns(toy, toy.first_agreement, reward).mean())
    assert float(returns(far, far.leaving(agent, lambda state: state), reward).mean()) > 0.7 * best


@pytest.mark.usefixtures("ppo")
def test_same_seed_same_agent_and_nobodys_randomness_moves(toy):
    quick = AgentTraining(steps=512, rollout=256, batch_size=64, environments=2)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    said = []
    one = train_agent(toy, quick, progress=lambda *told: said.append(told)).agent
    assert said == [(256, 512, ""), (512, 512, "")]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    torch.manual_seed(7)
    other = train_agent(toy, quick).agent
    assert all(torch.equal(a, b) for x, y in zip(one.layers, other.layers) for a, b in zip(x, y))


def test_without_the_library_it_says_what_to_install(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install remanence\[rl\]"):
        train_agent(toy)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps: 0"),
        ({"rollout": 100}, "rollout: 100 does not divide"),
        ({"batch_size": 300}, "rollout: 4096 does not divide into 16 environments and into batches of 300"),
        ({"discount": 1.1}, "discount: 1.1"),
        ({"hidden": ()}, r"hidden: \[\]"),
        ({"learning_rate": 0}, "learning_rate: 0"),
    ],
)
def test_settings_that_make_no_sense(wrong, said):
    with pytest.raises(ValueError, match=said):
        AgentTraining(**wrong)


def test_rewards_that_make_no_sense():
    with pytest.raises(ValueError, match="epsilon: -1"):
        Reward(epsilon=-1)
    with pytest.raises(ValueError, match="scaling: 'some' is not one of all, negative"):
        Reward(scaling="some")


def test_defaults_are_the_papers():
    training = AgentTraining()
    assert (training.steps, training.learning_rate, training.rollout, training.batch_size) == (500_000, 5e-5, 4096, 512)
    assert (training.epochs, training.hidden, training.seed) == (6, (64, 64), 420)
    assert Reward() == Reward(1.0, 1.0, 1.0, 0.1, "all")
