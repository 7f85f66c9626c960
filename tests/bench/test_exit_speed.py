"""Ways to answer side by side: what is told of each, the joules of each, on a model of random weights."""

import pytest
import torch
from remanence.backends.device import device
from remanence.backends.energy.meter import Lengths
from remanence.backends.energy.probe import Found
from remanence.bench import early_exit
from remanence.bench.exit_energy import exit_energy, rows
from remanence.bench.exit_gold import LIMIT, run_gold
from remanence.bench.exit_speed import Served, speed_rows
from remanence.compress.early_exit.policy import Confidence, Fixed, Full, Schedule
from remanence.unlearn.demo import DemoConfig, byte_bpe, demo_model

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = DemoConfig(vocab_size=300, hidden_size=32, intermediate_size=48, layers=4, heads=2, kv_heads=1, max_length=64)
WAYS = [
    Served(Full()),
    Served(Fixed(exits=(2,))),
    Served(Confidence(exits=(1, 3), threshold=0.0), "batch"),
    Served(Full(), drafting=2, drafts=3),
]


@pytest.fixture
def asked():
    model = demo_model(SHAPE, byte_bpe(["some text"], 300), 0).eval()
    # An end that would cut answers short, and a penalty that would move them: neither is what is timed.
    model.generation_config.eos_token_id = list(range(300))
    model.generation_config.repetition_penalty = 1.5
    ids = torch.tensor([[0, 5, 6, 7], [9, 8, 7, 6]])
    return model, ids, (ids > 0).long()


def test_every_way_answers_the_same_request(asked):
    model, ids, mask = asked
    full, fixed, together, drafted = speed_rows(model, ids, mask, WAYS, 6, 3)
    assert [row["way"] for row in (full, fixed, together, drafted)] == [
        "full depth", "fixed at 2", "confidence >= 0", "draft 2, verify"
    ]  # fmt: skip
    assert (full["mean_depth"], full["effective_depth"], full["agreement"], full["speedup"]) == (4, 4, 1, 1)
    assert (fixed["mean_depth"], together["mean_depth"]) == (2, 1)
    assert 2 < fixed["effective_depth"] < 3
    assert fixed["mflop_token"] < full["mflop_token"]
    assert fixed["mb_token"] < full["mb_token"]
    assert (drafted["agreement"], drafted["mean_depth"], drafted["mflop_token"]) == (1, None, None)
    assert 0 <= drafted["acceptance"] <= 1
    assert all(row["batch"] == 2 and row["tokens_per_s"] > 0 for row in (full, fixed, together, drafted))
    assert model.generation_config.repetition_penalty == 1.5


def test_names_of_ways():
    assert Served(Schedule(exits=(2, 6), horizon=4)).name == "schedule 6 to 2"


def test_joules_of_ways_without_a_counter(asked):
    model, ids, mask = asked
    lengths = Lengths(window_s=0.05, windows=2, idle_s=0)
    found = exit_energy(model, device("cpu"), ids, mask, WAYS[:2], 3, Found(), lengths)
    assert [token["joules"] for token in found["tokens"].values()] == [None, None]
    assert found["fewest_first"] is None
    assert [row["method"] for row in rows(found)] == ["no counter", "no counter"]


def test_the_gold_part_holds():
    made, checks = run_gold(3)
    assert all(check["ok"] for check in checks)
    assert len(made) == 12
    assert all(0 < row["max_abs_difference"] <= LIMIT for row in made)


def test_parts_are_checked_by_name():
    with pytest.raises(ValueError, match="parts: 'golden' is not one of gold, quality"):
        early_exit.run(0, ("golden",))
