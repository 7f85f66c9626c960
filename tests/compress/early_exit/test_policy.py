"""Scores and thresholds by hand; a policy's two files."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from remanence.compress.early_exit.policy import (
    POLICIES,
    Agent,
    Confidence,
    Fixed,
    Full,
    Policy,
    Probe,
    Saturation,
    Schedule,
    Step,
    evenly,
)
from remanence.compress.early_exit.stored import SETTINGS, WEIGHTS, is_stored, load_policy, save_policy
from safetensors.torch import load_file, save_file
from torch import Tensor

D, V = 64, 199


def step(state: Tensor, depth: int = 2, before: Tensor | None = None, position: int = 1, head: Tensor | None = None):
    """At one exit, with a linear head."""
    n = len(state)
    head = torch.zeros(V, state.shape[1]) if head is None else head
    before = state if before is None else before
    return Step(depth, state, before, torch.full((n,), position), lambda h: h @ head.T)


def probe(exits: tuple[int, ...] = (2, 4), d: int = D, **more: object) -> Probe:
    g, e = torch.Generator().manual_seed(3), len(exits)
    mean, weight = torch.randn(e, d, generator=g), torch.randn(e, d, generator=g)
    return Probe(
        exits=exits, mean=mean, weight=weight, deviation=torch.rand(e, d, generator=g) + 0.5, bias=torch.ones(e), **more
    )


def agent(d: int = D, **more: object) -> Agent:
    g = torch.Generator().manual_seed(4)
    sizes = [d, 5, 3, 2]
    layers = tuple((torch.randn(n, k, generator=g), torch.randn(n, generator=g)) for k, n in pairwise(sizes))
    return Agent(exits=(1, 3), layers=layers, **more)


def every() -> list[Policy]:
    return [
        Full(),
        Fixed(exits=(3,)),
        Schedule(exits=(2, 4), horizon=9),
        Saturation(exits=(1, 2), threshold=0.9),
        Confidence(exits=(2,), threshold=0.7, decay=4.0),
        probe(threshold=0.8),
        agent(threshold=0.92, temperature=2.0),
    ]


def test_every_policy_is_tested() -> None:
    assert {policy.name for policy in every()} == POLICIES.keys()


def test_scores_by_hand() -> None:
    h, before = torch.randn(7, D), torch.randn(7, D)
    x, y = h.double().numpy(), before.double().numpy()
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    found = Saturation(exits=(2,)).score(step(h, before=before))
    assert np.allclose(found.numpy(), cosine, atol=1e-6)

    head = torch.randn(V, D)
    z = x @ head.double().numpy().T
    p = np.sort(np.exp(z - z.max(1, keepdims=True)) / np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True), 1)
    assert np.allclose(Confidence(exits=(2,)).score(step(h, head=head)).numpy(), p[:, -1] - p[:, -2], atol=1e-5)

    policy = probe()
    for e, depth in enumerate(policy.exits):
        z = ((x - policy.mean[e].numpy()) / policy.deviation[e].numpy()) @ policy.weight[e].double().numpy() + 1
        assert np.allclose(policy.score(step(h, depth)).numpy(), 1 / (1 + np.exp(-z)), atol=1e-6)

    policy = agent(temperature=2.0)
    a = x
    for weight, bias in policy.layers[:-1]:
        a = np.tanh(a @ weight.double().numpy().T + bias.double().numpy())
    z = (a @ policy.layers[-1][0].double().numpy().T + policy.layers[-1][1].double().numpy()) / 2
    p = np.exp(z[:, 1]) / np.exp(z).sum(1)
    found = policy.score(step(h)).numpy()
    assert np.allclose(found, np.where(p < 0.5, 0, p), atol=1e-6)
    assert 0 < (found == 0).sum() < 7  # where going on is the likelier, no threshold lets it leave


def test_positions_of_a_schedule_fall() -> None:
    policy = Schedule(exits=(2, 4, 6), horizon=8)
    h = torch.zeros(1, D)

    def depth(position: int) -> int:
        return next(d for d in (*policy.exits, 8) if d == 8 or bool(policy.leaves(step(h, d, position=position))))

    depths = [depth(t) for t in range(13)]
    assert depths == [6] * 1 + [6] * 3 + [4] * 4 + [2] * 5
    assert depths == sorted(depths, reverse=True)


def test_a_threshold_falls_with_the_position() -> None:
    policy = Confidence(exits=(1,), threshold=0.8, decay=4.0, horizon=10)
    for t in (0, 1, 5, 50):
        assert float(policy.limit(torch.tensor([t]))) == pytest.approx(0.9 * 0.8 + 0.1 * np.exp(-4 * t / 10))
    # The score is held against the position's own limit.
    rows = Step(
        1,
        torch.eye(2),
        torch.eye(2),
        torch.tensor([0, 50]),
        lambda h: torch.stack([torch.log(torch.tensor([0.875, 0.125]))] * len(h)),
    )
    assert policy.leaves(rows).tolist() == [False, True]


def test_a_state_that_is_no_number_stays() -> None:
    h = torch.full((2, D), float("nan"))
    for policy in every():
        if policy.graded:
            assert not policy.leaves(step(h, policy.exits[0], head=torch.randn(V, D))).any()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"exits": ()}, "exits: none; the policy confidence needs at least one"),
        ({"exits": (3, 2)}, r"exits: \[3, 2\]: expected depths from 1, ascending"),
        ({"exits": (0,)}, r"exits: \[0\]: expected depths from 1"),
        ({"exits": (1,), "threshold": -0.1}, "threshold: -0.1: expected a number of at least 0"),
        ({"exits": (1,), "threshold": float("nan")}, "threshold: nan"),
        ({"exits": (1,), "decay": 0}, "decay: 0: expected a number above 0"),
        ({"exits": (1,), "horizon": 0}, "horizon: 0"),
        ({"exits": (1,), "horizon": 1.5}, "horizon: 1.5: expected a whole number of tokens"),
        ({"exits": (1,), "horizon": True}, "horizon: True"),
        ({"exits": 3}, "exits: 3: expected depths from 1"),
        ({"exits": (True, 2)}, r"exits: \[True, 2\]: expected depths from 1"),
        ({"exits": (1.0,)}, r"exits: \[1\.0\]: expected depths from 1"),
        ({"exits": ([1], "2")}, r"exits: \[\[1\], '2'\]: expected depths from 1"),
        ({"exits": (1,), "threshold": "0.5"}, "threshold: '0.5': expected a number"),
        ({"exits": (1,), "threshold": True}, "threshold: True: expected a number"),
        ({"exits": (1,), "threshold": 10**400}, "threshold: 10+: expected a number"),
        ({"exits": (1,), "decay": "fast"}, "decay: 'fast': expected a number above 0"),
        ({"exits": (1,), "decay": True}, "decay: True"),
        ({"exits": (1,), "decay": float("inf")}, "decay: inf"),
    ],
)
def test_settings_that_mean_nothing(values, said) -> None:
    with pytest.raises(ValueError, match=said):
        Confidence(**values)


@pytest.mark.parametrize("temperature", [0, float("nan"), True, "hot"])
def test_an_agents_temperature_is_a_number(temperature) -> None:
    with pytest.raises(ValueError, match=f"temperature: {temperature!r}: expected a number above 0"):
        agent(temperature=temperature)


def test_exits_evenly_spaced() -> None:
    assert evenly(12, 3) == (3, 6, 9)
    assert evenly(4, 9) == (1, 2, 3)
    with pytest.raises(ValueError, match="count: 0"):
        evenly(4, 0)


@pytest.mark.parametrize("number", range(7), ids=[policy.name for policy in every()])
def test_there_and_back(tiny, tmp_path, number) -> None:
    model, policy = tiny("llama"), every()[number]
    assert not is_stored(tmp_path)
    save_policy(policy, model, tmp_path, "batch", {"text": "abc"})
    assert is_stored(tmp_path)
    found, sync = load_policy(tmp_path, model)
    assert sync == "batch"
    assert type(found) is type(policy)
    assert found.settings() == policy.settings()
    assert found.tensors().keys() == policy.tensors().keys()
    assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in policy.tensors().items())
    h = torch.randn(5, D)
    if policy.exits:
        at = step(h, policy.exits[0], torch.randn(5, D), head=torch.randn(V, D))
        assert torch.equal(found.leaves(at), policy.leaves(at))


def test_a_policy_of_another_model_is_not_written(tiny, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"mean: \[2, 7\]; expected \[2, 64\]"):
        save_policy(probe(d=7), tiny("llama"), tmp_path)
    with pytest.raises(ValueError, match="exits: 9 is not below 6"):
        save_policy(Fixed(exits=(9,)), tiny("llama"), tmp_path)
    assert not list(tmp_path.iterdir())


def edited(**changes: object):
    def edit(directory) -> None:
        found = json.loads((directory / SETTINGS).read_text())
        for key, value in changes.items():
            found.pop(key) if value is None else found.update({key: value})
        (directory / SETTINGS).write_text(json.dumps(found))

    return edit


def weights(change):
    def edit(directory) -> None:
        found = load_file(directory / WEIGHTS)
        change(found)
        save_file(found, directory / WEIGHTS)

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (edited(schema="remanence.early_exit/9"), "schema: 'remanence.early_exit/9' is not"),
        (edited(policy="oracle"), "policy: 'oracle' is not one of full, fixed"),
        (edited(policy=[]), r"policy: \[\] is not one of full, fixed"),
        (edited(policy={}), r"policy: \{\} is not one of full, fixed"),
        (edited(sync=[]), r"sync: \[\] is not one of row, batch"),
        (edited(sync="all"), "sync: 'all' is not one of row, batch"),
        (edited(layers=5), "layers: 5; this model has 6"),
        (edited(hidden_size=32), "hidden_size: 32; this model has 64"),
        (edited(settings={"exits": [2, 4]}), "settings: expected decay, exits, horizon, threshold"),
        (
            edited(settings={"exits": [2, 4], "threshold": "high", "decay": None, "horizon": 1}),
            "settings: threshold: 'high': expected a number",
        ),
        (
            edited(settings={"exits": [2, 4], "threshold": 0.5, "decay": None, "horizon": 1.5}),
            r"settings: horizon: 1\.5: expected a whole number",
        ),
        (
            edited(settings={"exits": {"2": 4}, "threshold": 0.5, "decay": None, "horizon": 1}),
            "settings: exits: {'2': 4}: expected depths",
        ),
        (edited(settings=[]), "settings: expected"),
        (edited(sync=None), "sync: missing"),
        (edited(run="rm"), "run: unknown"),
        (edited(policy="agent"), "settings: expected decay, exits, horizon, temperature"),
        (weights(lambda found: found.pop("bias")), "deviation, mean, weight; expected mean, deviation, weight, bias"),
        (weights(lambda found: found.update(bias=torch.full((2,), float("inf")))), "bias: expected finite float32"),
        (
            weights(lambda found: found.update(bias=torch.zeros(2, dtype=torch.float64))),
            "bias: expected finite float32",
        ),
        (weights(lambda found: found.update(bias=torch.zeros(3))), r"bias: \[3\]; expected \[2\]"),
        (lambda directory: (directory / WEIGHTS).write_bytes(b"\x00" * 40), "not a readable safetensors file"),
        (lambda directory: (directory / WEIGHTS).unlink(), "exit_policy.safetensors: no such file"),
        (lambda directory: (directory / SETTINGS).write_text("{"), "early_exit.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "edit",
)
def test_damaged_files_are_one_line(tiny, tmp_path, edit, said) -> None:
    model = tiny("llama")
    save_policy(probe(), model, tmp_path)
    edit(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        load_policy(tmp_path, model)
    assert "\n" not in str(error.value)


def test_an_agents_layers_must_fit(tiny, tmp_path) -> None:
    model = tiny("llama")
    save_policy(agent(), model, tmp_path)
    weights(lambda found: found.pop("layers.1.bias"))(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.\d\.\w+: expected layers\.N\.weight"):
        load_policy(tmp_path, model)
    three = Agent(exits=(1,), layers=((torch.zeros(3, D), torch.zeros(3)),))
    with pytest.raises(ValueError, match=r"layers\.0: 3 actions; expected 2"):
        three.check_fits(6, D)
