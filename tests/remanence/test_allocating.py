"""`remanence allocate` from the inside, and through to a compressed model; what cannot be is said at once."""

import io
import json
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from remanence.compress.checkpoint import load_model, load_tokenizer, save_model
from remanence.compress.linear import QuantLinear
from remanence.compress.recipe_file import read_recipe
from remanence.compress.sensitivity import sensitivities
from remanence.compress.walk import fitting_linears
from remanence.compress.widths import fused, sizes
from remanence.unlearn.demo import DemoConfig, demo_tokenizer
from remanence.unlearn.people import people_corpus
from transformers import AutoModelForCausalLM, MixtralConfig

from remanence.allocating import Order, _data, allocate, show_allocation
from remanence.compressing import Order as CompressOrder
from remanence.compressing import compress
from remanence.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "gptq-w4a16-g16"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows to keep, a text, a recipe with data of its own."""
    place = tmp_path_factory.mktemp("files")
    corpus = people_corpus(6, "forget30")
    rows = [json.dumps({"question": row.question, "answer": row.answer}) for row in corpus.retain]
    (place / "retain.jsonl").write_text("\n".join(rows))
    (place / "text.txt").write_text(" ".join(row.answer for row in corpus.retain) * 9)
    (place / "recipe.yaml").write_text("method: gptq\nbits: 4\ngroup_size: 16\ncalibration: retain:3\n")
    return place


@pytest.fixture
def model(untrained, files):
    """Its weights in one decoder layer are larger, so that it matters more what becomes of them."""
    target = files / "model"
    if not target.exists():
        made = untrained("llama")
        with torch.no_grad():
            for name in ("o_proj", "v_proj"):
                getattr(made.model.layers[0].self_attn, name).weight.mul_(12)
        save_model(made, demo_tokenizer(people_corpus(6, "forget30"), DemoConfig(vocab_size=300)), target)
    return str(target)


def order(model, files, **given):
    known = {"model": model, "recipe": NAME, "text": str(files / "text.txt"), "calibration": "text:6,length:32"}
    return Order(**(known | {"measure": "error_absolute", "budget": 3.0} | given))


def widths_of(made):
    return {layer["name"]: layer["width"] for layer in made["layers"]}


def test_from_model_to_recipe_to_compressed_model(model, files, tmp_path):
    said, told = [], []
    out = tmp_path / "recipe.yaml"
    made = allocate(order(model, files), out, lambda *step: told.append(step), said.append)
    chosen = widths_of(made)
    assert told
    assert len(set(chosen.values())) > 1
    assert 2.9 < made["average_bits"] <= 3
    assert (made["used"], made["allowed"], made["unit"]) == (made["average_bits"], 3.0, "bits")
    recipe = read_recipe(str(out))
    assert recipe.name == made["recipe"]
    assert (recipe.spec.group_size, recipe.calibration) == (16, None)
    dense = load_model(model)
    assert made["bytes"] == sum(row[chosen[name]] for name, row in sizes(dense, recipe, (2, 3, 4, 8, 16)).items())
    assert made["dense_bytes"] == sum(layer.weight.nbytes for _, layer in fitting_linears(dense, read_recipe(NAME)))
    for group in fused(dense, recipe):
        assert len({chosen[name] for name in group}) == 1
    data = {"text": str(files / "text.txt"), "calibration": "text:6,length:32"}
    compress(CompressOrder(model, str(out), device="cpu", **data), tmp_path / "out", say=str)
    layers = dict(load_model(tmp_path / "out").named_modules())
    assert {name: layers[name].spec.bits for name in chosen if isinstance(layers[name], QuantLinear)} == chosen
    table = io.StringIO()
    show_allocation(made, table)
    assert "1.mlp.down_proj" in table.getvalue()
    assert "budget: 3 of 3 bits used" in table.getvalue()
    assert f"{made['bytes']:,} bytes in these layers" in table.getvalue()
    assert json.loads(json.dumps(made)) == made


def test_scores_are_those_of_the_measure_on_the_data(model, files, tmp_path):
    asked = order(model, files, measure="pmpq", calibration="retain:4", retain=str(files / "retain.jsonl"), text=None)
    made = allocate(asked, tmp_path / "a.yaml", say=str)

    assert made["data"] == "retain:4"
    assert made["compared"] == []
    batches = _data(asked, files / "model", load_tokenizer(model))["retain:4"]
    assert sum(len(batch) for batch in batches) == 4
    expected = sensitivities(load_model(model), "pmpq", batches, read_recipe(NAME))
    for layer in made["layers"]:
        assert layer["score"] == pytest.approx(expected.scores[layer["name"]], rel=1e-6)
        assert layer["cost"] == pytest.approx(expected.costs[layer["name"]][layer["width"]], rel=1e-6)
        assert layer["noise"] == pytest.approx(expected.noise[layer["name"]], rel=1e-6)


def test_what_hangs_on_the_data(model, files, tmp_path):
    """Each choice is what it would be by itself."""
    rows = str(files / "retain.jsonl")
    names = ("text:6,length:32", "retain:4", "forget:5")
    made = allocate(
        order(model, files, measure="tdmpq", calibration=names[0], compare=names[1:], retain=rows, forget=rows),
        tmp_path / "a.yaml",
        say=str,
    )
    assert made["data"] == names[0]
    alone = {
        name: allocate(
            order(model, files, measure="tdmpq", calibration=name, retain=rows, forget=rows),
            tmp_path / f"{i}.yaml",
            say=str,
        )
        for i, name in enumerate(names)
    }
    assert widths_of(made) == widths_of(alone[names[0]])
    assert [pair["data"] for pair in made["compared"]] == [list(pair) for pair in combinations(names, 2)]
    for pair in made["compared"]:
        a, b = (widths_of(alone[name]) for name in pair["data"])
        assert pair["other_width"] == sum(a[layer] != b[layer] for layer in a) / len(a)
        assert -1 <= pair["rank_correlation"] <= 1
    shown = io.StringIO()
    show_allocation(made, shown)
    assert "how much hangs on the data" in shown.getvalue()


def test_budgets_of_every_unit(model, files, tmp_path):
    def made(name, **given):
        return allocate(order(model, files, **given), tmp_path / f"{name}.yaml", say=said.append)

    said = []
    by_bytes = made("bytes", budget=9000, unit="bytes")
    assert by_bytes["used"] == by_bytes["bytes"] <= 9000
    stored = made("stored", budget=4.75, unit="stored-bits", fuse=False)
    assert stored["used"] == stored["average_stored_bits"] <= 4.75
    seconds = made("seconds", budget=10, unit="seconds", widths=(4, 8))
    assert 0 < seconds["used"] < 1
    assert set(widths_of(seconds).values()) == {8}
    assert "decode times: interquartile ranges" in said[-1]
    with pytest.raises(ValueError, match=r"budget: 1e-09 seconds; the least these layers can take is \d"):
        made("no", budget=1e-9, unit="seconds", widths=(4, 8))
    with pytest.raises(ValueError, match=r"budget: 1\.5 bits; the least these layers can take is 2$"):
        made("no", budget=1.5)
    assert not (tmp_path / "no.yaml").exists()


def test_the_threshold_rule(model, files, tmp_path):
    made = allocate(order(model, files, rule="threshold", budget=None), tmp_path / "a.yaml", say=str)
    chosen = widths_of(made)
    assert set(chosen.values()) == {4, 8, 16}
    scores = {layer["name"]: layer["score"] for layer in made["layers"]}
    assert chosen[max(scores, key=scores.get)] == 16
    assert (made["unit"], made["used"], made["allowed"]) == (None, None, None)
    recipe = read_recipe(str(tmp_path / "a.yaml"))
    assert {name for name, width in chosen.items() if width != 16} == {
        name for name, _ in fitting_linears(load_model(model), recipe)
    }
    two = allocate(order(model, files, rule="threshold", budget=None, widths=(8, 3)), tmp_path / "b.yaml", say=str)
    assert set(widths_of(two).values()) == {3, 8}


def test_what_a_target_runs(model, files, tmp_path):
    made = allocate(order(model, files, target="vllm", budget=5.0), tmp_path / "a.yaml", say=str)
    assert set(widths_of(made).values()) <= {4, 8, 16}
    for given, message in (
        ({"target": "vllm", "widths": (3, 4)}, "widths: 3 is not run by vllm, which has 4, 8, 16"),
        ({"target": "vllm", "fuse": False, "budget": 5.0}, "fuse: vllm joins layers that share an input"),
        ({"target": "transformers", "recipe": "rtn-w4a16-g16-asym"}, "target: transformers reads no asymmetric file"),
        ({"recipe": "gptq-w4a4+a_search=true"}, "a_search decides what is written"),
        ({"target": "tpu"}, "target: 'tpu' is not one of remanence, transformers, vllm"),
        ({"measure": "guess"}, "measure: 'guess' is not one of cmpq"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate(order(model, files, **given), tmp_path / "b.yaml", say=str)
    assert not (tmp_path / "b.yaml").exists()


def test_stock_readers_take_experts_of_one_width(files, tmp_path):
    tokenizer = demo_tokenizer(people_corpus(6, "forget30"), DemoConfig(vocab_size=300))
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=300, num_key_value_heads=2, num_local_experts=4, pad_token_id=0, **shape)
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, tmp_path / "experts")
    asked = {"measure": "random", "calibration": None, "text": None}
    with pytest.raises(UsageError, match="target: transformers reads experts of one width only"):
        allocate(order(str(tmp_path / "experts"), files, target="transformers", **asked), tmp_path / "a.yaml", say=str)
    made = allocate(order(str(tmp_path / "experts"), files, **asked), tmp_path / "a.yaml", say=str)
    assert len(set(widths_of(made).values())) > 1


def test_a_recipe_keeps_its_own_data_and_is_not_overwritten(model, files, tmp_path):
    given = {"recipe": str(files / "recipe.yaml"), "retain": str(files / "retain.jsonl"), "text": None}
    made = allocate(order(model, files, calibration=None, **given), tmp_path / "a.yaml", say=str)
    assert made["recipe"].endswith("@retain:3")
    before = (tmp_path / "a.yaml").read_text()
    with pytest.raises(UsageError, match="is there already; choose another place"):
        allocate(order(model, files), tmp_path / "a.yaml", say=str)
    assert (tmp_path / "a.yaml").read_text() == before
    with pytest.raises(UsageError, match=r"does not end in \.yaml or \.yml"):
        allocate(order(model, files), tmp_path / "a.txt", say=str)
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"unit": "tokens"}, "unit: 'tokens' is not one of bits, stored-bits, bytes, seconds"),
        ({"rule": "vote"}, "rule: 'vote' is not one of milp, threshold"),
        ({"budget": None}, "budget: missing; e.g. 4.0"),
        ({"rule": "threshold"}, "budget: 3.0 does not go with the threshold rule"),
        ({"budget": 0.0}, "budget: 0.0 is not above 0"),
        ({"budget": float("nan")}, "budget: nan is not above 0 and finite"),
        ({"widths": (4,)}, r"widths: \(4,\); expected two at least of 2, 3, 4, 8, 16"),
        ({"widths": (4, 5)}, r"widths: \(4, 5\); expected two"),
        ({"recipe": "wanda-s50"}, "recipe: 'wanda-s50' has no integer weights"),
        ({"recipe": "rtn-w4a16+w8=down_proj"}, "has widths already; give it without"),
        ({"calibration": "web:3"}, "'web' is not one of"),
        ({"compare": ("retain:4", "web:3")}, "'web' is not one of"),
        ({"compare": ("retain:4",), "measure": "random"}, "compare: random looks at no data"),
        ({"text": "t", "compare": ("text:4",), "calibration": "text:4"}, "compare: text:4; expected other data"),
        ({"text": "t", "compare": ("forget:4",)}, "forget: missing; forget:4 needs it; give --forget FILE"),
        ({}, "calibration: tdmpq needs data; give --text FILE"),
        ({"data": "people", "retain": "r"}, "retain: r beside data: people"),
        ({"data_dir": "d"}, "data_dir: d goes with --data tofu"),
    ],
)
def test_orders_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        Order(**({"model": "model", "recipe": NAME, "budget": 3.0} | given))


def test_the_command(model, tmp_path):
    def run(*given):
        words = ["allocate", "--model", model, "--recipe", NAME, "--measure", "random", *given]
        return subprocess.run([sys.executable, "-m", "remanence", *words], capture_output=True, text=True, check=False)

    done = run("--budget", "3", "--widths", "2,3,4", "--no-fuse", "--out", str(tmp_path / "a.yaml"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"] == read_recipe(str(tmp_path / "a.yaml")).name
    wrong = run("--budget", "3", "--widths", "2,x", "--out", str(tmp_path / "b.yaml"))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "remanence: widths: '2,x' is not a list of numbers, e.g. 2,3,4,8,16\n"
