"""The benchmark of pruning and retraining, on models of a few seconds."""

import copy
from dataclasses import replace

import pytest
import torch
from remanence.bench import perp, perp_cost, perp_quality, perp_recovery
from remanence.bench.frame import BENCHES
from remanence.bench.perp_quality import PERP, knobs, untied_, zeros_are
from remanence.compress.recipe import parse_recipe
from remanence.compress.retrain import masks_of
from remanence.compress.sequential import compress_
from remanence.unlearn.demo import DemoConfig
from remanence.unlearn.people import people_corpus

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = DemoConfig(
    arch="opt", vocab_size=400, hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=4, max_length=64
)


@pytest.fixture(scope="module")
def quality():
    text = "\n".join(f"{row.question} {row.answer}" for row in people_corpus(40, "forget10", 0).retain)
    groups = ("bias", "head", PERP)
    return perp_quality.run(0, text, text[:3000], ("magnitude", "wanda"), ("s70",), groups, "wanda-s70", SHAPE, 4, 20)


def test_every_cell_has_its_row(quality):
    rows = quality[0]
    cells = [(row["recipe"], row["retrained"]) for row in rows]
    rebuilt = [f"{by}: {group}" for by in ("block", "sublayer") for group in (PERP, "all")]
    apart = [("wanda-s70", group) for group in ("bias", "head", PERP, *rebuilt)]
    assert cells == [
        ("dense", ""),
        ("dense", "all"),
        ("magnitude-s70", ""),
        ("magnitude-s70", PERP),
        ("wanda-s70", ""),
        *apart,
    ]
    found = dict(zip(cells, rows, strict=True))
    dense = found["dense", ""]["perplexity"]
    for (recipe, groups), row in found.items():
        if recipe == "dense" or not groups:
            continue
        worst = found[recipe, ""]["perplexity"]
        assert row["perplexity"] < worst
        assert row["gap_closed"] == pytest.approx((worst - row["perplexity"]) / (worst - dense))
        assert row["zeros"] is True
        assert 0 < row["trained"] < 1
    assert found["wanda-s70", ""]["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert found["wanda-s70", "bias"]["trained"] < 0.02 < found["wanda-s70", PERP]["trained"]


def test_checks_can_fail(quality):
    rows, checks = quality
    assert [check["what"] for check in checks] == [
        "wanda-s70: perplexity at most that of magnitude, not retrained",
        f"magnitude-s70: share of the gap that {PERP} closes",
        f"wanda-s70: share of the gap that {PERP} closes",
        "retrained models: exactly the masked weights are zero",
    ]
    assert checks[3]["ok"]
    assert checks[3]["limit"] == 8
    worse = []
    for row in rows:
        if row["recipe"] == "wanda-s70":
            row = row | {"perplexity": 1e9, "gap_closed": 0.4, "zeros": False}
        worse.append(row)
    assert [check["ok"] for check in perp_quality.checks(worse)] == [False, checks[1]["ok"], False, False]


def test_zeros_are_compared_both_ways(untrained):
    recipe = parse_recipe("magnitude-s50")
    model = compress_(untrained("gpt2"), recipe)
    masks = masks_of(model, recipe)
    assert zeros_are(model, masks)
    name, mask = next(iter(masks.items()))
    weight = model.get_submodule(name).weight  # [K, N]
    for kept, value in ((False, 1.0), (True, 0.0)):
        changed = copy.deepcopy(model)
        i, j = (mask == kept).nonzero()[0].tolist()
        with torch.no_grad():
            changed.get_submodule(name).weight[j, i] = value
        assert not zeros_are(changed, masks)
    assert weight.shape == mask.T.shape


def test_untying_changes_no_answer(untrained):
    model = untrained("opt")
    ids = torch.randint(2, 300, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(untied_(model)(ids).logits, before)
        model.lm_head.weight.zero_()
        assert not torch.equal(model.get_input_embeddings().weight, model.lm_head.weight)


@pytest.mark.slow
def test_cost_is_measured_in_processes_of_their_own():
    shape = replace(SHAPE, arch="llama", hidden_size=32, max_length=32)
    rows, checks = perp_cost.run(0, ("mask_lora",), shape, 3)
    assert checks == []  # beside nothing
    rows.append(perp_cost.measured("all", vars(shape), 3, 0))
    assert [row["retrained"] for row in rows] == ["mask_lora", "all"]
    assert all(row["zeros"] for row in rows)
    assert 0 < rows[0]["trained"] < rows[1]["trained"] == 1
    assert rows[1]["peak_tensors_mib"] > 4 * rows[1]["model_mib"]
    rows = {"mask_lora": {"peak_tensors_mib": 2, "peak_rss_mib": 1}, "all": {"peak_tensors_mib": 1, "peak_rss_mib": 2}}
    assert [check["ok"] for check in perp_cost.checks(rows)] == [False, True]


@pytest.mark.slow
def test_recovery_has_a_row_for_every_source_and_order(memorized):
    rows = perp_recovery.run(
        0,
        None,
        memorized.corpus,
        ("graddiff",),
        ("magnitude-s30",),
        memorized.config,
        knobs("norm|mask_lora", steps=20),
    )
    assert [(row["order"], row["retrained_on"]) for row in rows] == [
        (order, source) for order in perp_recovery.ORDERS for source in ("", "text", "retain", "forget")
    ]
    assert all(row["low"] <= row["recovered"] <= row["high"] for row in rows)
    for order in perp_recovery.ORDERS:
        found = {row["retrained_on"]: row for row in rows if row["order"] == order}
        # The rows themselves bring back more than anything else does.
        assert found["forget"]["p_forget"] > max(found[source]["p_forget"] for source in ("", "text", "retain"))
        assert (found[""]["p_forget"] == found[""]["p_before"]) == (order == "prune, unlearn")


def test_it_is_listed_and_parts_are_checked():
    assert BENCHES["perp"][0] == "perp"
    with pytest.raises(ValueError, match="parts: 'speed' is not one of quality, cost, recovery"):
        perp.run(parts=("speed",))
    with pytest.raises(ValueError, match="methods: 'gptq' is not one of random, magnitude, wanda, sparsegpt"):
        perp.run(methods=("gptq",), parts=("quality",))
