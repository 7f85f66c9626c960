"""GREEN-CODE's agent (arXiv 2501.11006, section IV): PPO learns from states when to leave, offline, on stored rollouts.

It is an optimal stopping problem whose labels are known: every reward is a function of the exit and of the first exit
that agrees with the last layer, and the states do not depend on what the agent does. So the best return is known, too
(leave at that first exit), and a classifier of the same states is its supervised counterpart (`probe.py`). Energy is in
no reward: what counts is depth. Needs stable-baselines3 to train; what is trained is plain tensors and needs nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .policy import Agent
from .states import States

if TYPE_CHECKING:
    import gymnasium

CONTINUE, EXIT = 0, 1
SCALINGS = ("all", "negative")


@dataclass(frozen=True)
class Reward:
    """alpha     for each layer too many, where leaving is right but late
    beta      for each layer too few, where leaving is wrong and early
    gamma     for each layer between the exit that was there and the one that continuing leads to
    epsilon   where leaving is wrong and late: an exit agreed, and this one no longer does
    scaling   "all": everything is divided by the last exit's index (its depth - 1); "negative": penalties alone are.
              The paper's code has both, under which +1 weighs as much as one layer, or as that many; which of them its
              numbers come from is not known
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    epsilon: float = 0.1
    scaling: str = "all"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "epsilon"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}: expected a number of at least 0")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling: {self.scaling!r} is not one of {', '.join(SCALINGS)}")


@dataclass(frozen=True)
class AgentTraining:
    """PPO's settings, the paper's (the rest is stable-baselines3's).

    steps           decisions; learning_rate falls linearly to zero over them
    rollout         decisions between updates, of all `environments` together: the paper has one of 4096, ours are as
                    many in all, side by side as that is faster
    hidden          tanh layers of the policy, and of the value
    standardised    states less their mean, over their deviation (of all exits together), which the exported first
                    layer does by itself; the paper's are raw
    """

    reward: Reward = field(default_factory=Reward)
    steps: int = 500_000
    learning_rate: float = 5e-5
    rollout: int = 4096
    batch_size: int = 512
    epochs: int = 6
    hidden: tuple[int, ...] = (64, 64)
    discount: float = 0.99
    environments: int = 16
    standardised: bool = False
    seed: int = 420

    def __post_init__(self) -> None:
        for name in ("steps", "rollout", "batch_size", "epochs", "environments"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)!r}: expected a whole number of at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: {self.learning_rate}: expected a number above 0")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount: {self.discount}: expected a share between 0 and 1")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden: {list(self.hidden)}: expected the widths of one layer or more")
        if self.rollout % self.environments or self.rollout % self.batch_size:
            raise ValueError(
                f"rollout: {self.rollout} does not divide into {self.environments} environments and into batches of "
                f"{self.batch_size}"
            )


@dataclass(frozen=True)
class Trained:
    """agent    the policy, on the CPU
    steps      decisions that it learned from; seconds: of training
    """

    agent: Agent
    steps: int
    seconds: float


def rewards(states: States, reward: Reward) -> Tensor:
    """[n, E, 2] float32: of continuing, and of leaving, at each exit. With l the exit's depth and l* the first agreeing
    exit's (the whole model's where none agrees):

    leaving       +1 at l*; -alpha (l - l*) where it agrees, later; -beta (l* - l) where it is too early; -epsilon else
    continuing    +1 below l*; -gamma (next - l*) else, next the following exit's depth (or the whole model's)
    """
    depth = torch.tensor([*states.exits, states.layers], dtype=torch.float32)
    star = depth[states.first_agreement][:, None]  # [n, 1]
    here, following = depth[:-1], depth[1:]
    late = torch.where(states.agrees, -reward.alpha * (here - star), -reward.epsilon)
    leave = torch.where(here < star, -reward.beta * (star - here), late)
    leave = torch.where(here == star, 1.0, leave)
    go_on = torch.where(here < star, 1.0, -reward.gamma * (following - star))
    both = torch.stack([go_on, leave], -1)
    scaled = both / max(1, states.exits[-1] - 1)
    return scaled if reward.scaling == "all" else torch.where(both < 0, scaled, both)


def returns(states: States, leaving: Tensor, reward: Reward) -> Tensor:
    """[n]: the sum of a token's rewards, not discounted, if it leaves at exit number `leaving` [n] (E: nowhere)."""
    table = rewards(states, reward)
    n = len(table)
    went = torch.cat([torch.zeros(n, 1), table[:, :, CONTINUE].cumsum(1)], 1)  # [n, E + 1], before each exit
    left = torch.cat([table[:, :, EXIT], torch.zeros(n, 1)], 1)
    return (went + left).gather(1, leaving.view(n, 1))[:, 0]


class Walk:
    """Over an episode's tokens and each token's exits; states are [d] float32."""

    def __init__(self, states: States, reward: Reward) -> None:
        self._state = states.state.numpy()
        self._rewards = rewards(states, reward).numpy()
        _, counts = states.episode.unique_consecutive(return_counts=True)
        self._ends = np.cumsum(counts.numpy())
        self._starts = self._ends - counts.numpy()
        self.episodes, self.width = len(self._ends), self._state.shape[-1]

    def reset(self, episode: int) -> np.ndarray:
        """To the first exit of the first token of the episode of this number, from 0."""
        self._token, self._end, self._exit = int(self._starts[episode]), int(self._ends[episode]), 0
        return self._state[self._token, 0].copy()

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        """(next state, reward, whether the episode has ended)."""
        reward = float(self._rewards[self._token, self._exit, action])
        if action == EXIT or self._exit + 1 == self._state.shape[1]:
            self._token, self._exit = self._token + 1, 0
        else:
            self._exit += 1
        over = self._token == self._end
        # Of what comes after an end only the shape counts.
        return self._state[self._token - over, self._exit].copy(), reward, over


def environment(states: States, reward: Reward) -> gymnasium.Env:
    """Episodes drawn at random, one decision a step; observations are states [d] as they are.

    Raises ModuleNotFoundError that says what to install.
    """
    _libraries()
    import gymnasium as gym

    class Exits(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (states.state.shape[-1],), np.float32)
        action_space = gym.spaces.Discrete(2)

        def __init__(self) -> None:
            self.walk = Walk(states, reward)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            super().reset(seed=seed, options=options)
            return self.walk.reset(int(self.np_random.integers(self.walk.episodes))), {}

        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
            state, reward, over = self.walk.step(int(action))
            return state, reward, over, False, {}

    return Exits()


def train_agent(
    states: States,
    training: AgentTraining | None = None,
    threshold: float = 0.5,
    temperature: float = 1.0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Trained:
    """PPO on the rollouts. The same for the same states and settings, on one machine and with one version of torch.

    progress   called with (decisions, decisions in all, "") after each rollout
    Raises ModuleNotFoundError that says what to install.
    """
    settings = training or AgentTraining()
    _libraries()
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv

    class Said(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            if progress is not None:
                progress(self.num_timesteps, settings.steps, "")

    mean, deviation = _scale(states) if settings.standardised else (None, None)
    seen = states if mean is None else _standardised(states, mean, deviation)
    begin = time.perf_counter()
    with _own_randomness():
        ppo = PPO(
            "MlpPolicy",
            DummyVecEnv([lambda: environment(seen, settings.reward)] * settings.environments),
            learning_rate=lambda left: settings.learning_rate * left,
            n_steps=settings.rollout // settings.environments,
            batch_size=settings.batch_size,
            n_epochs=settings.epochs,
            gamma=settings.discount,
            policy_kwargs={"net_arch": {"pi": list(settings.hidden), "vf": list(settings.hidden)}},
            seed=settings.seed,
            device="cpu",
        )
        ppo.learn(settings.steps, callback=Said())
    seconds = time.perf_counter() - begin
    agent = exported(ppo.policy, states.exits, threshold, temperature, mean, deviation)
    return Trained(agent, ppo.num_timesteps, seconds)


def exported(
    policy: Any,
    exits: tuple[int, ...],
    threshold: float = 0.5,
    temperature: float = 1.0,
    mean: Tensor | None = None,
    deviation: Tensor | None = None,
) -> Agent:
    """stable-baselines3's actor as our policy: tanh layers, and a linear one with two rows.

    mean, deviation   [d], of the states that it was trained on, folded into the first layer
    """
    linears = [m for m in (*policy.mlp_extractor.policy_net, policy.action_net) if isinstance(m, torch.nn.Linear)]
    layers = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in linears]
    if mean is not None and deviation is not None:
        weight, bias = layers[0]
        scaled = weight.double() / deviation.double()
        layers[0] = scaled.float(), (bias.double() - scaled @ mean.double()).float()
    return Agent(exits=exits, threshold=threshold, layers=tuple(layers), temperature=temperature)


def _scale(states: States) -> tuple[Tensor, Tensor]:
    x = states.state.double().flatten(0, 1)
    deviation = x.std(0)
    return x.mean(0).float(), torch.where(deviation > 0, deviation, 1.0).float()


def _standardised(states: States, mean: Tensor, deviation: Any) -> States:
    return replace(states, state=(states.state - mean) / deviation)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """stable-baselines3 seeds every generator of the process; afterwards they go on as if it had not."""
    ours, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)


def _libraries() -> None:
    try:
        import gymnasium  # noqa: F401
        import stable_baselines3  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name}: training an agent needs it; pip install remanence[rl]") from None
