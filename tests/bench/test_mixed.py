"""The benchmark of mixed precision, on a model of a few seconds."""

import numpy as np
import pytest
from remanence.bench import frame, mixed
from remanence.unlearn.demo import DemoConfig
from remanence.unlearn.people import people_corpus

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = DemoConfig(vocab_size=400, hidden_size=64, intermediate_size=128, layers=3, heads=4, kv_heads=2, max_length=64)
MEASURES = ("tdmpq", "cmpq", "random")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    text = "\n".join(row.answer for row in people_corpus(15, "forget10", 0).retain)
    place = tmp_path_factory.mktemp("mixed")
    return mixed.quality(0, place, text, text[:1500], MEASURES, SHAPE, 2, budgets=(3,))


def of(rows, rule):
    return [row for row in rows if row.get("rule") == rule]


def test_rows_of_every_measure_quantizer_and_rule(rows):
    assert rows[0].keys() == {"recipe", "perplexity", "kl"}
    assert rows[0]["kl"] == 0
    assert [row["recipe"] for row in of(rows, "uniform")] == ["rtn-w3a16-g64", "gptq-w3a16-g64"]
    assert [row["layers"] for row in of(rows, "uniform")] == ["3:21"] * 2
    labels = ["tdmpq", "cmpq", "random (0)", "random (1)", "random (2)"]
    assert [row["measure"] for row in of(rows, "milp")] == 2 * labels
    assert [row["measure"] for row in of(rows, "tied")] == ["tdmpq"] * 2
    assert [row["measure"] for row in of(rows, "threshold")] == ["tdmpq", "cmpq"] * 2
    for row in rows[1:]:
        assert row["perplexity"] > 1
        assert row["kl"] > 0
        assert row["stored_bits"] > row["bits"]


def test_budgets_are_kept_and_used(rows):
    for row in of(rows, "milp") + of(rows, "tied"):
        assert row["used"] <= row["allowed"]
        assert 2.9 < row["bits"] <= 3
        uniform = next(other for other in of(rows, "uniform") if other["recipe"] == row["recipe"])
        assert row["over_uniform"] == pytest.approx(row["perplexity"] / uniform["perplexity"] - 1, abs=1e-9)
        assert row["noise"] >= 0
        # One set of weights in the file, plus a word here and there that rows are padded with.
        assert row["bytes"] <= 1.01 * uniform["bytes"]
    for rule, other in zip(of(rows, "threshold"), of(rows, "milp at that"), strict=True):
        assert other["used"] <= rule["used"] == other["allowed"]
    # Chance is chance: three draws are not one.
    assert len({row["layers"] for row in of(rows, "milp") if "random" in row["measure"]}) > 1


def test_checks_can_fail(rows):
    checks = mixed.quality_checks(rows)
    kept = [check for check in checks if "above the budget" in check["what"]]
    assert [check["ok"] for check in kept] == [True] * 3
    whats = [check["what"] for check in checks if "below the uniform one's" in check["what"]]
    assert len(whats) == 4
    assert sum("mixed by tdmpq: kl" in what for what in whats) == 2
    better = [row for row in rows if row.get("rule") == "uniform"][:1]
    for factor in (1 - 1e-6, 1.0):
        row = (
            better[0]
            | {"measure": "tdmpq", "rule": "milp"}
            | {of: factor * better[0][of] for of in ("perplexity", "kl")}
        )
        row["used"] += factor == 1
        assert [check["ok"] for check in mixed.quality_checks([*better, row])] == [factor < 1] * 3


def test_paired_windows():
    """Against a bootstrap over windows."""
    chance = np.random.default_rng(0)
    counts = chance.integers(100, 129, 400)
    theirs = 4 * counts + chance.normal(0, 40, 400)
    ours = theirs + 0.01 * counts + chance.normal(0, 1.5, 400)
    found = mixed.beside((list(ours), list(counts)), (list(theirs), list(counts)))
    ratios = []
    for _ in range(2000):
        drawn = chance.integers(0, 400, 400)
        ratios.append(np.exp((ours - theirs)[drawn].sum() / counts[drawn].sum()) - 1)
    assert found["over_uniform"] == pytest.approx(np.exp((ours - theirs).sum() / counts.sum()) - 1)
    assert found["noise"] == pytest.approx(np.std(ratios), rel=0.06)


def test_sources_are_compared(memorized):
    text = " ".join(row.answer for row in memorized.corpus.retain) * 9
    found = mixed.compared(memorized.target, memorized.encoder, memorized.corpus, text, ("error", "random"), 0)
    [row] = found
    assert (row["measure"], row["layers"]) == ("error", 14)
    for a, b in (("text", "retain"), ("text", "forget"), ("retain", "forget")):
        assert -1 <= row[f"{a}_{b}"] <= 1
        assert 0 <= row[f"{a}_{b}_other_width"] <= 1
    assert row["retain_forget"] > 0.5


def test_unknown_parts_and_measures_are_refused():
    assert frame.BENCHES["mixed"][0] == "mixed"
    with pytest.raises(ValueError, match="parts: 'speed' is not one of quality, sources"):
        mixed.run(parts=("speed",))
    with pytest.raises(ValueError, match="methods: 'rtn' is not one of cmpq"):
        mixed.run(methods=("rtn",))
