"""Unified quality score: weights, scores and stability against a plain computation, and on 150 real models."""

import json
import math

import numpy as np
import pytest
from remanence.bench.uqs import quality, stability
from scipy.stats import kendalltau, rankdata, spearmanr


def spearman(a, b):
    """Pearson's correlation of ranks, ties sharing theirs."""

    def ranks(values):
        return np.array([np.mean([np.sum(values < v) + 1, np.sum(values <= v)]) for v in values])

    x, y = ranks(np.asarray(a)), ranks(np.asarray(b))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))


@pytest.fixture
def table():
    random = np.random.default_rng(5)
    d = random.random(20)
    return {
        "close": (-d).tolist(),
        "far": (d + 0.3 * random.standard_normal(20)).tolist(),
        "coarse": np.round(-d * 3 + random.standard_normal(20)).tolist(),
        "noise": random.random(20).tolist(),
        "same": [0.5] * 20,
    }, d.tolist()


def test_by_definition(table):
    metrics, d = table
    found = quality(metrics, d)
    rho = {name: spearman(values, d) for name, values in metrics.items() if name != "same"}
    total = sum(abs(value) for value in rho.values())
    score = np.zeros(20)
    for name, value in rho.items():
        oriented = np.asarray(metrics[name]) * (-1 if value > 0 else 1)
        share = (np.array([np.mean([np.sum(oriented < v), np.sum(oriented <= v) - 1]) for v in oriented])) / 19
        score += abs(value) / total * share
        assert found.rho[name] == pytest.approx(value, abs=1e-12)
        assert found.weight[name] == pytest.approx(abs(value) / total, abs=1e-12)
    assert found.score == pytest.approx(score, abs=1e-12)
    assert found.constant == ("same",)
    assert (found.weight["same"], found.rho["same"]) == (0, 0)
    assert sum(found.weight.values()) == pytest.approx(1)


def test_one_faithful_metric_gives_the_oracles_ranking():
    d = [3.0, 1.0, 2.0, 5.0]
    found = quality({"m": [-(x**3) for x in d]}, d)
    assert found.score == pytest.approx([1 / 3, 1, 2 / 3, 0])
    assert quality({"m": d}, d).score == found.score
    assert quality({"m": d, "n": [-x for x in d]}, d).score == pytest.approx(found.score)


def test_given_directions(table):
    metrics, d = table
    del metrics["same"]
    better = {"close": True, "far": True, "coarse": True, "noise": False}
    found = quality(metrics, d, better)
    assert found.weight["far"] == 0  # it says that far models are good
    pull = {name: max(0.0, (-1 if better[name] else 1) * spearman(metrics[name], d)) for name in metrics}
    assert found.weight == pytest.approx({name: value / sum(pull.values()) for name, value in pull.items()})
    with pytest.raises(ValueError, match="higher_is_better: far: every metric needs a direction"):
        quality(metrics, d, {name: True for name in metrics if name != "far"})
    with pytest.raises(ValueError, match="none of far goes with closeness"):
        quality({"far": metrics["far"]}, d, {"far": True})


def test_stability_against_scipy(table):
    metrics, d = table
    found = quality(metrics, d)
    own = stability(found, spread=0.5, draws=50, seed=7)
    random = np.random.default_rng(7)
    names = [name for name in metrics if name != "same"]
    sign = {name: -np.sign(found.rho[name]) for name in names}
    ranks = np.array([(rankdata(sign[n] * np.asarray(metrics[n])) - 1) / 19 for n in names])
    noise = random.standard_normal((50, len(names)))
    taus = [kendalltau(found.score, (np.array([found.weight[n] for n in names]) * np.exp(0.5 * z)) @ ranks).statistic
            for z in noise]  # fmt: skip
    assert own.tau == pytest.approx(np.mean(taus), abs=1e-9)
    assert own.deviation == pytest.approx(np.std(taus), abs=1e-9)
    assert own == stability(found, spread=0.5, draws=50, seed=7)
    assert own != stability(found, spread=0.5, draws=50, seed=8)


def test_the_larger_the_perturbation_the_less_stays(table):
    found = quality(*table)
    taus = [stability(found, spread).tau for spread in (0.0, 0.1, 0.5, 2.0)]
    assert taus[0] == 1
    assert taus == sorted(taus, reverse=True)
    assert stability(found).tau < taus[1]
    one = quality({"m": table[1]}, table[1])
    assert stability(one, 2.0).tau == stability(one).tau == 1


def test_edges():
    assert quality({"m": [1, 2, 3]}, [3, 2, 1]).score == [0, 0.5, 1]
    with pytest.raises(ValueError, match="distance: 2 models; rank correlations need at least 3"):
        quality({"m": [1, 2]}, [1, 2])
    with pytest.raises(ValueError, match="distance: 0 models"):
        quality({}, [])
    with pytest.raises(ValueError, match="distance: the same for all models"):
        quality({"m": [1, 2, 3]}, [1, 1, 1])
    with pytest.raises(ValueError, match="m: model 1 has nan"):
        quality({"m": [1, math.nan, 3]}, [1, 2, 3])
    with pytest.raises(ValueError, match="m: 2 values for 3 models"):
        quality({"m": [1, 2]}, [1, 2, 3])
    with pytest.raises(ValueError, match="none of m goes with"):
        quality({"m": [1, 1, 1]}, [1, 2, 3])
    found = quality({"m": [1, 2, 3]}, [3, 2, 1])
    with pytest.raises(ValueError, match="draws: 0"):
        stability(found, draws=0)
    with pytest.raises(ValueError, match="spread: -1"):
        stability(found, spread=-1)


def test_real_models(real_data):
    """150 unlearned Llama-3.2-1B models; 1 - UDS, how much of the target's knowledge its activations still carry,
    stands in for the distance to the oracle."""
    rows = json.loads(real_data("uds", "method_results.json").read_text())["models"]
    rows = [row for row in rows if not row["is_reference"]]
    names = [
        "one_minus_es", "one_minus_em", "one_minus_paraprob", "one_minus_truth", "privacy_mia", "model_utility",
        "fluency", "logit_lens",
    ]  # fmt: skip
    d = [1 - row["uds"] for row in rows]
    metrics = {name: [row[name] for row in rows] for name in names}
    found = quality(metrics, d)
    small, large, anyhow = (stability(found, spread, 300) for spread in (0.1, 0.5, None))
    print("rho with 1 - uds:", {name: round(value, 3) for name, value in found.rho.items()})
    for name, by in (("exp(0.1 z)", small), ("exp(0.5 z)", large), ("any weights", anyhow)):
        print(f"tau under {name}: {by.tau:.3f} +- {by.deviation:.3f}")
    for name in names:
        assert found.rho[name] == pytest.approx(spearman(metrics[name], d), abs=1e-12)
    # Lenses and extraction go with UDS; utility goes against it, as what forgets deeply also loses.
    assert found.rho["logit_lens"] < -0.98
    assert found.rho["one_minus_es"] < -0.9
    assert found.rho["model_utility"] > 0.4
    assert 1 > small.tau > large.tau > anyhow.tau > 0.7
    assert spearmanr(found.score, d).statistic < -0.9
    # With directions a metric that goes against the distance has no say, rather than an inverted one.
    directed = quality(metrics, d, dict.fromkeys(names, True))
    assert directed.weight["model_utility"] == directed.weight["fluency"] == 0
    # A table of the same models with shuffled distances has nothing to say: weights are those of chance.
    mixed = np.random.default_rng(0).permutation(d)
    assert max(abs(value) for value in quality(metrics, mixed).rho.values()) < 0.25
