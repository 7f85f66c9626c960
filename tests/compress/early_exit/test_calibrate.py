"""The guarantee: its p-value by direct sums, that it is one, that the search stops where it must, and by simulation
that what it promises holds."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from remanence.compress.early_exit.calibrate import (
    THRESHOLDS,
    calibrated,
    p_value,
    textual_loss,
    textual_losses,
)
from remanence.compress.early_exit.parallel import frozen_at
from remanence.compress.early_exit.policy import NEVER, Confidence, Fixed, Full
from transformers import AutoModelForCausalLM, LlamaConfig

POLICY = Confidence(exits=(1, 2))


def directly(total, n, delta):
    """Of n losses with this sum, in exact numbers as far as they go."""
    delta = Fraction(delta)
    m = min(Fraction(total) / n, delta)
    logs = [x * (math.log(x) - math.log(y)) for x, y in ((m, delta), (1 - m, 1 - delta)) if x]
    whole = math.ceil(Fraction(total))
    tail = sum(math.comb(n, k) * delta**k * (1 - delta) ** (n - k) for k in range(whole + 1))
    return min(1.0, math.exp(-n * sum(logs)), math.e * float(tail))


@pytest.mark.parametrize("n", [1, 10, 57, 200])
@pytest.mark.parametrize("delta", ["1/20", "1/10", "1/2"])
def test_p_value_is_the_written_one(n, delta):
    for total in (Fraction(0), Fraction(1, 3), Fraction(1), Fraction(n, 20), Fraction(n, 7), Fraction(n)):
        found = p_value(float(total / n), n, float(Fraction(delta)))
        assert found == pytest.approx(directly(total, n, delta), rel=1e-9)


def test_both_bounds_are_used():
    """Either is the smaller one somewhere."""
    hoeffding = math.exp(-100 * math.log(1 / 0.9))
    assert p_value(0.0, 100, 0.1) == pytest.approx(hoeffding)  # Bentkus: e times as much
    assert p_value(0.05, 100, 0.1) < math.exp(-100 * (0.05 * math.log(0.5) + 0.95 * math.log(0.95 / 0.9))) - 0.01


def test_p_value_is_one():
    """At a true mean of delta, P(p <= u) <= u."""
    rng = np.random.default_rng(0)
    means = (rng.random((4000, 80)) < 0.1).mean(1)
    p = np.array([p_value(m, 80, 0.1) for m in means])
    for u in (0.01, 0.05, 0.2):
        assert (p <= u).mean() <= u + 3 * (u / 4000) ** 0.5
    assert (p <= 0.2).mean() > 0.02  # not by never being small


def losses_of(table):
    """What `calibrated` asks for, and the thresholds that it asked for."""
    asked = []

    def losses(policy):
        asked.append(policy.threshold)
        return table[policy.threshold]

    return losses, asked


def test_the_search_stops_at_the_first_that_is_not_safe():
    n = 100
    table = {1.0: [0.0] * n, 0.9: [0.01] * n, 0.8: [0.5] * n, 0.7: [0.0] * n}
    losses, asked = losses_of(table)
    policy, found = calibrated(POLICY, losses, 0.1, thresholds=(0.7, 0.9, 1.0, 0.8))
    assert asked == [1.0, 0.9, 0.8]  # what lies behind may be as safe as it likes
    assert found.threshold == policy.threshold == 0.9
    assert policy == POLICY.at(0.9)
    assert [(t.threshold, t.loss) for t in found.tested] == [(1.0, 0), (0.9, pytest.approx(0.01)), (0.8, 0.5)]
    assert [t.p_value <= 0.05 for t in found.tested] == [True, True, False]
    assert found.texts == n


def test_all_safe_is_the_smallest():
    losses, asked = losses_of(dict.fromkeys(THRESHOLDS, [0.0] * 100))
    policy, _ = calibrated(POLICY, losses, 0.1)
    assert policy.threshold == 0.0
    assert asked == sorted(THRESHOLDS, reverse=True)


def test_none_safe_never_leaves():
    for bad in ([0.5] * 100, [0.0] * 5):  # a large loss; too few texts to know
        policy, found = calibrated(POLICY, losses_of({0.9: bad, 0.5: bad})[0], 0.1, thresholds=(0.5, 0.9))
        assert policy.threshold == found.threshold == NEVER
        assert len(found.tested) == 1


def test_the_promise_holds():
    """300 calibrations of texts whose true mean losses are known, one of them just above delta: at most epsilon of them
    (and three standard errors) choose a threshold that breaks it. Losses are anything within 0 and 1."""
    rng = np.random.default_rng(1)
    delta, epsilon, n = 0.1, 0.1, 150
    truth = {0.9: 0.02, 0.8: 0.05, 0.7: 0.101, 0.6: 0.2}
    chosen = []
    for _ in range(300):
        hard = rng.random(n)  # thresholds see the same texts
        table = {t: np.where(hard < 2 * m, rng.random(n), 0.0) for t, m in truth.items()}
        chosen.append(calibrated(POLICY, losses_of(table)[0], delta, epsilon, tuple(truth))[1].threshold)
    broken = np.mean([truth.get(t, 0.0) > delta for t in chosen])
    assert broken <= epsilon + 3 * (epsilon * (1 - epsilon) / 300) ** 0.5
    # And it is of use: the safe one that is worth most is found more often than not.
    assert np.mean([t <= 0.8 for t in chosen]) > 0.5


def test_textual_loss_is_by_the_longest_common_subsequence():
    def brute(a, b):
        def parts(x, k):
            return {tuple(x[i] for i in where) for where in combinations(range(len(x)), k)}

        return max(k for k in range(min(len(a), len(b)) + 1) if parts(a, k) & parts(b, k))

    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = (rng.integers(0, 4, rng.integers(0, 8)).tolist() for _ in range(2))
        wanted = 1 - 2 * brute(a, b) / (len(a) + len(b)) if a or b else 0
        assert textual_loss(a, b) == pytest.approx(wanted)
    assert textual_loss([1, 2, 3], [1, 2, 3]) == 0
    assert textual_loss([], [1]) == 1


def test_losses_of_texts_are_of_what_a_model_says():
    """Beside single prompts, each token from the whole text anew."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prompts = [[3, 5, 8], [30], [7, 7, 21, 9], [12, 4]]

    def says(prompt, depths, end):
        text, said = list(prompt), []
        while len(said) < 6:
            at = torch.tensor([[3] * len(prompt) + [depths] * len(said)])
            with torch.no_grad(), frozen_at(model, at):
                said.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
            if said[-1] == end:
                return said[:-1]
            text.append(said[-1])
        return said

    own = model.generation_config
    for end in (None, says(prompts[0], 3, None)[2]):
        losses = textual_losses(model, prompts, pad=0, end=end, new_tokens=6, batch_size=3)
        assert losses(Full()) == [0] * 4
        wanted = [textual_loss(says(prompt, 1, end), says(prompt, 3, end)) for prompt in prompts]
        assert losses(Fixed(exits=(1,))) == pytest.approx(wanted)
        assert max(wanted) > 0
    assert model.generation_config is own


def test_what_is_refused():
    def losses(policy):  # noqa: ARG001
        return [0.1, float("nan")]

    with pytest.raises(ValueError, match="losses: item 1 is nan"):
        calibrated(POLICY, losses, 0.1)
    with pytest.raises(ValueError, match=r"losses: item 0 is 1\.5"):
        calibrated(POLICY, lambda policy: [1.5], 0.1)  # noqa: ARG005
    with pytest.raises(ValueError, match="losses: 0; expected one of each"):
        calibrated(POLICY, lambda policy: [], 0.1)  # noqa: ARG005
    with pytest.raises(ValueError, match="losses: 3; expected one of each"):
        calibrated(POLICY, losses_of({1.0: [0] * 90, 0.9: [0] * 3})[0], 0.1, thresholds=(1.0, 0.9))
    with pytest.raises(ValueError, match="delta: 1: expected"):
        calibrated(POLICY, losses, 1)
    with pytest.raises(ValueError, match="epsilon: 0: expected"):
        calibrated(POLICY, losses, 0.1, 0)
    with pytest.raises(ValueError, match="thresholds: none"):
        calibrated(POLICY, losses, 0.1, thresholds=())
