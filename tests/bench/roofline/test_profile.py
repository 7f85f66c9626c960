"""The document: sums that agree, what is said, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from remanence.backends.ceilings import Ceilings, Rate
from remanence.backends.cpu import CpuDevice
from remanence.bench.roofline.bones import Bones
from remanence.bench.roofline.load import Early, Load
from remanence.bench.roofline.measure import measure
from remanence.bench.roofline.profile import SCHEMA, add_measured, profile
from remanence.compress.checkpoint import load_model, save_model
from remanence.compress.recipe import parse_recipe
from remanence.compress.sequential import compress_
from transformers import AutoModelForCausalLM, LlamaConfig

DEVICE = Ceilings(
    "d",
    Rate(1e9, "s"),
    {"float32": Rate(1e11, "s"), "int8": Rate(4e11, "s")},
    memory_bytes=10**8,
    cache_bytes=1000,
)


@pytest.fixture(scope="module")
def saved(memorized, tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=512,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    save_model(model, memorized.tokenizer, place / "dense")
    recipe = parse_recipe("rtn-w4a16-g32")
    compress_(model, recipe)
    save_model(model, memorized.tokenizer, place / "packed", recipe)
    return place


def test_sums_agree_and_the_document_is_json(saved):
    found = profile(Bones.of(saved / "dense"), DEVICE, Load((1, 4), 32, 9), Early({1: 1, 3: 1}, (1, 2, 0.5)))
    assert json.loads(json.dumps(found)) == found
    assert found["schema"] == SCHEMA
    assert [(each["phase"], each["batch"], each["tokens"], each["context"]) for each in found["phases"]] == [
        ("prefill", 1, 32, 0),
        ("decode", 1, 1, 36),
        ("prefill", 4, 32, 0),
        ("decode", 4, 1, 36),
    ]
    for phase in found["phases"]:
        for number in ("flops", "bytes", "floor_s"):
            assert sum(module[number] for module in phase["modules"]) == pytest.approx(phase[number])
        assert phase["bytes"] == phase["weight_bytes"] + phase["kv_bytes"] + phase["activation_bytes"]
        assert phase["floor_s"] >= max(phase["bytes"] / 1e9, phase["flops"] / 1e11) * (1 - 1e-9)
        assert phase["eager_bytes"] > phase["bytes"]
    assert [module["count"] for module in found["phases"][0]["modules"] if module["kind"] == "attention"] == [3]
    assert found["exits"]["mean_depth"] == 2
    assert found["exits"]["decode_s"] < found["phases"][1]["floor_s"]
    assert found["draft"]["speedup"] == pytest.approx(found["phases"][1]["floor_s"] / found["draft"]["decode_s"])
    rows = [row for row in found["sweep"] if row["context"] == 36]
    assert rows[0]["floor_s"] == found["phases"][1]["floor_s"]
    assert rows[2]["floor_s"] == found["phases"][3]["floor_s"]
    assert found["serving"][1]["tokens_per_s"] == pytest.approx(4 / found["phases"][3]["floor_s"])
    assert not found["uncounted"]


def test_a_recipe_says_what_its_files_will_say(saved):
    load = Load((1,), 32, 9)
    reckoned = profile(Bones.of(saved / "dense", parse_recipe("rtn-w4a16-g32")), DEVICE, load)
    read = profile(Bones.of(saved / "packed"), DEVICE, load)
    assert reckoned["phases"] == read["phases"]
    assert reckoned["weights"] == read["weights"]
    assert (reckoned["recipe"], read["recipe"]) == ("rtn-w4a16-g32", None)
    dense = profile(Bones.of(saved / "dense"), DEVICE, load)
    assert {row["recipe"]: row["decode_s"] for row in reckoned["what_if"]}["dense"] == dense["phases"][1]["floor_s"]
    assert not read["what_if"]
    said = f"from {1e3 * dense['phases'][1]['floor_s']:.3g} to {1e3 * read['phases'][1]['floor_s']:.3g} ms"
    assert said in reckoned["recommendation"]


def test_what_fits_is_the_same_everywhere(saved):
    load = Load((1,), 32, 9)
    most = profile(Bones.of(saved / "dense"), DEVICE, load)["capacity"]["largest_batch"]
    found = profile(Bones.of(saved / "dense"), DEVICE, Load((most, most + 1), 32, 9))
    assert [row["fits"] for row in found["serving"]] == [True, False]


def test_an_adapter_beside_a_model_takes_its_room(saved, memorized, tmp_path):
    peft = pytest.importorskip("peft")
    from remanence.unlearn.adapters import save_unmerged

    adapted = peft.get_peft_model(load_model(saved / "dense"), peft.LoraConfig(r=8, target_modules=["q_proj"]))
    save_unmerged(adapted, memorized.tokenizer, tmp_path)
    load, size = Load((1,), 32, 9), 3 * 4 * (8 * 64 + 64 * 8)
    for recipe in (None, parse_recipe("rtn-w4a16-g32")):
        alone = profile(Bones.of(saved / "dense", recipe), DEVICE, load)["weights"]
        both = profile(Bones.of(tmp_path, recipe), DEVICE, load)["weights"]
        for name in ("read_bytes", "resident_bytes", "checkpoint_bytes"):
            assert both[name] == alone[name] + size
    others = [profile(Bones.of(place), DEVICE, load)["what_if"] for place in (saved / "dense", tmp_path)]
    assert [row["resident_bytes"] + size for row in others[0]] == [row["resident_bytes"] for row in others[1]]


def test_a_recommendation_follows_from_what_binds(saved):
    slow_memory = profile(Bones.of(saved / "dense"), replace(DEVICE, memory=Rate(1e6, "s")), Load((1,), 32, 9))
    assert "Decode at batch 1 is bound by memory (100% of its floor" in slow_memory["recommendation"]
    slow_arithmetic = profile(Bones.of(saved / "dense"), replace(DEVICE, memory=Rate(1e15, "s")), Load((1,), 32, 9))
    assert "Decode at batch 1 is bound by arithmetic in float32 (100%" in slow_arithmetic["recommendation"]
    assert "rtn-w8a8 would take it" in slow_arithmetic["recommendation"]
    best = min(slow_memory["what_if"], key=lambda row: row["decode_s"])
    assert f"{best['recipe']} would take it" in slow_memory["recommendation"].partition("Decode")[2]


def test_a_quantized_cache_is_read_in_fewer_bytes(saved):
    load = Load((1,), 300, 9)
    dense = profile(Bones.of(saved / "dense"), DEVICE, load)
    four = profile(Bones.of(saved / "dense", parse_recipe("dense+kv_bits=4")), DEVICE, load)
    assert four["phases"][1]["kv_bytes"] < 0.6 * dense["phases"][1]["kv_bytes"]
    assert four["phases"][1]["weight_bytes"] == dense["phases"][1]["weight_bytes"]
    assert four["kv_bytes_per_token"] < dense["kv_bytes_per_token"]


@pytest.mark.usefixtures("one_thread")
def test_what_was_measured_stands_beside_its_floor(saved):
    model = load_model(saved / "dense")
    found = profile(Bones.of(saved / "dense"), DEVICE, Load((1, 2), 16, 5))
    measured = measure(model, CpuDevice(), 2, 16, 5)
    add_measured(found, measured, found["weights"]["resident_bytes"], 1000)
    one, two = found["phases"][:2], found["phases"][2:]
    assert all(phase["measured_s"] is None for phase in one)
    assert [phase["measured_s"] for phase in two] == [measured.ttft_s, measured.tpot_s]
    for phase in two:
        assert phase["attained"] == phase["floor_s"] / phase["measured_s"]
        timed = {module["module"]: module["measured_s"] for module in phase["modules"]}
        assert timed["model.layers.*.mlp.up_proj"] > 0
        assert sum(filter(None, timed.values())) + phase["remainder_s"] == pytest.approx(phase["measured_s"])
    assert found["serving"][1]["measured"]["tokens_per_s"] == measured.tokens_per_s
    assert found["serving"][0]["measured"] is None


@pytest.mark.usefixtures("one_thread")
def test_a_model_that_fits_into_the_cache_is_told_so(saved):
    found = profile(Bones.of(saved / "dense"), DEVICE, Load((1,), 16, 5))
    measured = measure(load_model(saved / "dense"), CpuDevice(), 1, 16, 5)
    add_measured(found, measured, found["weights"]["resident_bytes"], 32 << 20)
    for phase in found["phases"]:
        assert phase["attained"] is None
        assert "fit into the last-level cache (32 MiB)" in phase["note"]
        assert all(module["attained"] is None for module in phase["modules"])


@pytest.mark.usefixtures("one_thread")
def test_ceilings_that_are_too_low_are_told(saved):
    """They were measured while the machine was busy, and the model ran when it was not."""
    low = replace(DEVICE, memory=Rate(1e3, "s"))
    found = profile(Bones.of(saved / "dense"), low, Load((1,), 16, 5))
    add_measured(found, measure(load_model(saved / "dense"), CpuDevice(), 1, 16, 5), 10**6, 1000)
    for phase in found["phases"]:
        assert phase["attained"] > 1
        assert "--remeasure" in phase["note"]


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ({"batches": ()}, "batch: none"),
        ({"batches": (1, 0)}, "batch: 1, 0; expected numbers from 1 on"),
        ({"prompt": 0}, "prompt: 0 is below 1"),
        ({"new": 1}, "new: 1 is below 2"),
    ],
)
def test_loads_that_make_no_sense(load, said):
    with pytest.raises(ValueError, match=said):
        Load(**load)


def test_what_cannot_be_profiled(saved):
    with pytest.raises(ValueError, match=r"prompt, new: 500 \+ 128 tokens, and .* has positions for 512"):
        profile(Bones.of(saved / "dense"), DEVICE, Load((1,), 500, 128))
    with pytest.raises(ValueError, match="compressed already"):
        Bones.of(saved / "packed", parse_recipe("rtn-w4a16-g32"))
    with pytest.raises(ValueError, match="do not divide into groups of 128"):
        Bones.of(saved / "dense", parse_recipe("rtn-w4a16-g128"))
