"""The one training loop: its schedule, its optimizer's first steps by hand, and what it refuses to hand on."""

import pytest
import torch
from remanence.unlearn.train import Schedule, fit
from torch import nn


def factors(schedule):
    return [schedule.factor(step) for step in range(schedule.steps)]


def test_linear_schedule():
    assert factors(Schedule(8, 1.0, warmup=3)) == pytest.approx([1 / 3, 2 / 3, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5])


def test_constant_schedule():
    assert factors(Schedule(5, 1.0, warmup=2, decay="constant")) == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("decay", ["linear", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (5, 0), (5, 5), (5, 9), (100, 10)])
def test_factor_is_a_share_above_zero(steps, warmup, decay):
    values = factors(Schedule(steps, 1.0, warmup, decay))
    assert all(0 < value <= 1 for value in values)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)


class Numbers(nn.Module):
    """Three weights and one that is frozen."""

    def __init__(self, *start):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)


def test_learning_rate_follows_the_schedule():
    """Under a constant gradient Adam moves every weight by the learning rate, whatever its moments' decay."""
    model, path = Numbers(1.0, -2.0), []
    schedule = Schedule(6, 0.25, warmup=2)
    fit(model, lambda *_: model.w[0] - model.w[1], schedule, after_step=lambda: path.append(model.w.tolist()))
    expected, at = [], 0.0
    for factor in factors(schedule):
        at += 0.25 * factor
        expected.append([1.0 - at, -2.0 + at])
    # Adam divides by |gradient| + 1e-8: clipped to norm 1, each gradient is 0.7.
    assert path == [pytest.approx(step, abs=1e-6) for step in expected]


def test_no_weight_decay_and_nothing_frozen_moves():
    model = Numbers(1.0, 5.0)
    fit(model, lambda *_: model.w[0] ** 2 + 0 * model.frozen.sum(), Schedule(20, 0.1))
    assert model.w[1].item() == 5.0
    assert model.frozen.tolist() == [1.0, 1.0]


def test_loss_goes_down_and_is_returned():
    model = Numbers(1.0, -2.0, 0.5)
    history = fit(model, lambda *_: (model.w**2).sum(), Schedule(50, 0.1))
    assert len(history) == 50
    assert history[0] == 1 + 4 + 0.25
    assert history[-1] < 0.1
    assert all(type(value) is float for value in history)


def test_gradients_are_clipped_together():
    """A gradient of norm 500 is scaled to 1, so a later one of norm 1 still counts in Adam's moments."""
    gradients, model = [], Numbers(0.0, 0.0)
    scale = iter([100.0, 0.5])

    def loss(*_):
        return next(scale) * (3 * model.w[0] + 4 * model.w[1])

    fit(model, loss, Schedule(2, 0.0), after_step=lambda: gradients.append(model.w.grad.tolist()))
    assert gradients[0] == pytest.approx([0.6, 0.8], rel=1e-5)
    assert gradients[1] == pytest.approx([0.6, 0.8], rel=1e-5)


def test_projection_and_progress_come_after_each_step():
    model, seen = Numbers(1.0), []

    def project():
        with torch.no_grad():
            model.w.clamp_(min=0.75)

    fit(
        model,
        lambda *_: model.w.sum(),
        Schedule(4, 0.1, decay="constant"),
        after_step=project,
        progress=lambda done, total: seen.append((done, total, model.w.item())),
    )
    assert seen == [
        (1, 4, pytest.approx(0.9)),
        (2, 4, pytest.approx(0.8)),
        (3, 4, 0.75),
        (4, 4, 0.75),
    ]


def test_modes():
    model, modes = Numbers(1.0), []
    model.eval()
    fit(model, lambda *_: modes.append(model.training) or model.w.sum(), Schedule(2, 0.1))
    assert modes == [True, True]
    assert not model.training


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_divergence_is_raised_before_the_update(bad):
    model = Numbers(1.0, 2.0)
    losses = iter([1.0, 1.0, bad])
    before = []

    def loss(*_):
        before.append(model.w.tolist())
        return next(losses) * model.w.sum()

    with pytest.raises(FloatingPointError, match=f"the loss is {bad} at step 3 of 9"):
        fit(model, loss, Schedule(9, 0.1))
    assert model.w.tolist() == before[-1], "the update of the bad step was not made"
    assert torch.isfinite(model.w).all()


def test_divergence_of_the_gradient_at_the_last_step_is_raised():
    """The loss is finite (a norm, 0), its gradient is not; no further loss would show it."""
    model = Numbers(0.0, 0.0)
    with pytest.raises(FloatingPointError):
        fit(model, lambda *_: (model.w**2).sum().sqrt(), Schedule(1, 0.1))


def test_zero_steps_change_nothing():
    model = Numbers(1.0, 2.0)
    assert fit(model, lambda *_: model.w.sum(), Schedule(0, 0.1)) == []
    assert model.w.tolist() == [1.0, 2.0]
