"""`remanence exit`: from a model to one that leaves early, what it says and how fast; or one line and nothing more."""

import json
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from remanence.compress.checkpoint import load_model, load_tokenizer, save_model
from remanence.compress.early_exit.generation import early_exit
from remanence.compress.early_exit.stored import SETTINGS, WEIGHTS, load_policy
from remanence.compress.recipe import parse_recipe
from remanence.compress.stream import compress_to
from remanence.unlearn.demo import DemoConfig, demo_model, demo_tokenizer
from remanence.unlearn.people import people_corpus
from safetensors.torch import load_file

from remanence.cli import main
from remanence.exiting import TUNING

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """An untrained Llama of six layers."""
    shape = DemoConfig(vocab_size=300, hidden_size=32, intermediate_size=64, layers=6, max_length=96)
    tokenizer = demo_tokenizer(people_corpus(6, "forget30"), shape)
    place = tmp_path_factory.mktemp("models") / "dense"
    save_model(demo_model(shape, tokenizer, 0), tokenizer, place)
    return place


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "retain.jsonl"
    lines = [json.dumps({"question": f"Who is number {i}?", "answer": f"Number {i} is {i}."}) for i in range(24)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def command(monkeypatch, capfd):
    """`remanence exit` in this process: (exit code, stdout, stderr)."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["remanence", "exit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return SimpleNamespace(code=stop.value.code, **dict(zip(("out", "err"), capfd.readouterr())))

    yield run
    signal.signal(signal.SIGTERM, handler)


def test_from_tuning_to_an_answer(dense, rows, command, tmp_path) -> None:
    more = ("--retain", rows, "--json")
    done = command(
        "tune", dense, "--out", tmp_path / "t", "--exits", "2,4", "--steps", 4, "--learning-rate", "1e-2", *more
    )
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert [row["depth"] for row in made["depths"]] == [2, 4, 6]
    assert sum(row["weight"] for row in made["depths"]) == pytest.approx(1)
    assert all(row["loss_after"] < row["loss_before"] for row in made["depths"])
    assert json.loads((tmp_path / "t" / TUNING).read_text())["depths"] == made["depths"]
    before, after = load_model(dense).state_dict(), load_model(tmp_path / "t").state_dict()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])

    learned = ("--exits", "2,4", "--prompts", 12, "--new", 4, "--threshold", 0.3)
    done = command("policy", tmp_path / "t", "--policy", "probe", "--out", tmp_path / "p", *learned, *more)
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert (made["policy"], made["exits"], made["threshold"], made["exit_sync"]) == ("probe", [2, 4], 0.3, "row")
    assert made["data"] == {"retain": str(rows), "seed": 0}
    # The model's files are the very same, and the tuning's record goes along.
    for name in ("model.safetensors", "config.json", TUNING):
        assert (tmp_path / "p" / name).read_bytes() == (tmp_path / "t" / name).read_bytes()
    assert load_file(tmp_path / "p" / WEIGHTS)["weight"].shape == (2, 32)

    asked = ("--prompt", "Who is number 3?", "--prompt", "Who?", "--new", 8, "--repeats", 2)
    done = command("generate", tmp_path / "p", *asked, "--draft", 3, "--threshold", 0, "--exit-sync", "batch", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    full, exits, draft = made["rows"]
    assert "histogram" not in draft
    depth = sum(int(at) * count for at, count in exits["histogram"].items()) / sum(exits["histogram"].values())
    assert depth == pytest.approx(exits["mean_depth"])
    assert (full["mean_depth"], full["agreement"], full["speedup"]) == (6, 1, 1)
    assert (exits["mean_depth"], exits["exit_sync"]) == (2, "batch")
    assert 2 < exits["effective_depth"] < 3
    assert (draft["agreement"], draft["mean_depth"]) == (1, None)
    assert 0 <= draft["acceptance"] <= 1
    assert [row["prompt"] for row in made["texts"]] == ["Who is number 3?", "Who?"]
    assert all(row["full depth"] == row["draft 3, verify"] for row in made["texts"])
    assert "energy" not in made


def test_the_agent_by_ppo(dense, rows, command, tmp_path) -> None:
    pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed (remanence[rl])")
    done = command(
        "policy", dense, "--policy", "agent", "--out", tmp_path / "a", "--exits", "2,4", "--retain", rows,
        "--prompts", 8, "--new", 3, "--ppo-steps", 64, "--temperature", 2, "--threshold", 0.6, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert (made["ppo"]["steps"], made["temperature"], made["threshold"]) == (64, 2, 0.6)
    policy, _ = load_policy(tmp_path / "a", load_model(dense))
    assert policy.name == "agent"


def test_a_threshold_with_a_guarantee(dense, rows, command, tmp_path) -> None:
    """Of an untrained model no exit is safe, so nobody leaves; any is where anything may change."""
    more = ("--policy", "confidence", "--exits", "3", "--retain", rows, "--prompts", 24, "--new", 4, "--json")
    done = command("policy", dense, "--out", tmp_path / "strict", "--calibrate", "0.05,0.05", *more)
    assert done.code == 0, done.err
    calibration = json.loads(done.out)["calibration"]
    assert calibration["texts"] == 12  # too few for such a promise, whatever they say
    assert json.loads((tmp_path / "strict" / SETTINGS).read_text())["settings"]["threshold"] > 1
    done = command("policy", dense, "--out", tmp_path / "loose", "--calibrate", "0.99,0.5", *more)
    assert json.loads(done.out)["threshold"] <= 1


def test_a_compressed_model_takes_a_policy(dense, command, tmp_path) -> None:
    compress_to(dense, parse_recipe("rtn-w4a16-g32"), tmp_path / "w4")
    done = command("policy", tmp_path / "w4", "--policy", "fixed", "--exits", "2", "--out", tmp_path / "p")
    assert done.code == 0, done.err
    model = load_model(tmp_path / "p")
    policy, sync = load_policy(tmp_path / "p", model)
    ids = torch.tensor([[5, 6, 7]])
    with early_exit(model, policy, sync) as run:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert run.histogram() == {2: 4}
    done = command("truncate", tmp_path / "w4", "--depth", 2, "--out", tmp_path / "no")
    assert (done.code, "is quantized; truncate the model that it was made of" in done.err) == (2, True)


def test_truncate(dense, command, tmp_path) -> None:
    done = command("truncate", dense, "--depth", 2, "--out", tmp_path / "s", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["layers"] == 6
    assert load_model(tmp_path / "s").config.num_hidden_layers == 2


def test_joules_are_told_by_counters_alone(dense, command, monkeypatch) -> None:
    from remanence.backends.energy import probes

    monkeypatch.setitem(probes.COUNTERS, "cpu", ())  # as a machine without any
    asked = ("--prompt", "Who?", "--new", 4, "--repeats", 2, "--draft", 3, "--energy", "--window", 0.05, "--json")
    done = command("generate", dense, *asked)
    assert done.code == 0, done.err
    energy = json.loads(done.out)["energy"]
    assert [token["joules"] for token in energy["tokens"].values()] == [None, None]
    assert energy["fewest_first"] is None
    assert any("no energy counter" in note for note in energy["notes"])
    done = command("generate", dense, *asked, "--estimate")
    energy = json.loads(done.out)["energy"]
    for token in energy["tokens"].values():
        assert token["joules"]["methods"] == ["estimated-tdp"]
        assert 0 < token["joules"]["low"] < token["joules"]["total"]["mean"] < token["joules"]["high"]
    assert energy["fewest_first"] is None
    done = command("generate", dense, *asked[:-1], "--estimate")
    assert "estimated-tdp is processor time x a constant" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tune", "DENSE", "--out", "OUT"), "text, retain, data: none given; one of them is needed"),
        (("tune", "DENSE", "--out", "OUT", "--text", "x", "--retain", "y"), "text and retain given"),
        (("tune", "DENSE", "--out", "OUT", "--text", "none.txt"), "text: none.txt: no such file"),
        (
            ("tune", "DENSE", "--out", "OUT", "--retain", "ROWS", "--exits", "2,x"),
            "exits: '2,x' is not a list of depths",
        ),
        (("tune", "DENSE", "--out", "OUT", "--retain", "ROWS", "--exits", "4,2"), "exits: [4, 2]: expected depths"),
        (("tune", "DENSE", "--out", "OUT", "--retain", "ROWS", "--weights", "even"), "weights: 'even' is not one of"),
        (("tune", "nowhere", "--out", "OUT", "--retain", "ROWS"), "nowhere: no such model directory"),
        (("tune", "DENSE", "--out", "DENSE", "--retain", "ROWS"), "exists and is not empty"),
        (("policy", "DENSE", "--out", "OUT", "--policy", "oracle"), "policy: 'oracle' is not one of full, fixed"),
        (("policy", "DENSE", "--out", "OUT"), "policy: probe learns from data"),
        (("policy", "DENSE", "--out", "OUT", "--policy", "fixed", "--exits", "6"), "exits: 6 is not below 6"),
        (("policy", "DENSE", "--out", "OUT", "--policy", "saturation", "--threshold", "-1"), "threshold: -1.0"),
        (
            ("policy", "DENSE", "--out", "OUT", "--policy", "probe", "--retain", "ROWS", "--temperature", "2"),
            "has none",
        ),
        (("policy", "DENSE", "--out", "OUT", "--policy", "fixed"), "exits: the policy fixed leaves at one depth"),
        (("policy", "DENSE", "--out", "OUT", "--policy", "fixed", "--exits", "2,4"), "leaves at one depth"),
        (("policy", "DENSE", "--out", "OUT", "--policy", "fixed", "--exits", "2", "--threshold", ".3"), "has none"),
        (("policy", "DENSE", "--out", "OUT", "--policy", "full", "--exits", "2"), "the policy full has none"),
        (
            ("policy", "DENSE", "--out", "OUT", "--policy", "saturation", "--retain", "ROWS"),
            "saturation learns nothing",
        ),
        (
            ("policy", "DENSE", "--out", "OUT", "--calibrate", ".1,.1", "--threshold", ".3", "--retain", "ROWS"),
            "threshold: is what the calibration chooses",
        ),
        (("policy", "DENSE", "--out", "OUT", "--retain", "ROWS", "--prompts", "2"), "2 episodes"),
        (("tune", "DENSE", "--out", "OUT", "--retain", "ROWS", "--exits", "6"), "exits: 6 is not below 6"),
        (("generate", "DENSE", "--prompt", "a", "--drafts", "2"), "make one with remanence exit policy"),
        (("generate", "DENSE", "--prompt", "a", "--draft", "2", "--threshold", "1"), "has no policy"),
        (("generate", "DENSE", "--prompt", "a", "--draft", "2", "--window", "1"), "go with --energy"),
        (("policy", "DENSE", "--out", "OUT", "--policy", "fixed", "--calibrate", "1"), "'1' is not DELTA,EPSILON"),
        (
            ("policy", "DENSE", "--out", "OUT", "--policy", "fixed", "--ppo-steps", "9"),
            "ppo-steps: fixed is not trained",
        ),
        (("policy", "DENSE", "--out", "OUT", "--policy", "fixed", "--exit-sync", "all"), "exit-sync: 'all' is not one"),
        (
            (
                "policy",
                "DENSE",
                "--out",
                "OUT",
                "--policy",
                "fixed",
                "--exits",
                "2",
                "--calibrate",
                ".1,.1",
                "--retain",
                "ROWS",
            ),
            "calibrate: fixed has no threshold",
        ),
        (("truncate", "DENSE", "--out", "OUT", "--depth", "6"), "depth: 6 is not between 1 and 5"),
        (("generate", "DENSE", "--prompt", "a"), "has no early_exit.json; make one with remanence exit policy"),
        (("generate", "DENSE", "--draft", "2"), "prompt: missing"),
        (("generate", "DENSE", "--prompt", "a", "--draft", "6"), "depth: 6 is not between 1 and 5"),
        (("generate", "DENSE", "--prompt", "a", "--draft", "2", "--new", "200"), "this model takes 96"),
        (("generate", "DENSE", "--prompt", "a", "--draft", "2", "--estimate"), "estimate, window: go with --energy"),
        (("generate", "DENSE", "--prompts", "none.txt"), "prompts: none.txt: no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_bad_input_is_one_line_and_nothing_is_written(dense, rows, command, tmp_path, arguments, said) -> None:
    places = {"DENSE": dense, "ROWS": rows, "OUT": tmp_path / "out"}
    done = command(*(places.get(argument, argument) for argument in arguments))
    assert done.code == 2, done.err
    assert said in done.err
    assert done.err.strip().splitlines()[-1].startswith("remanence: ")
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_penalties_of_the_model_itself_move_no_text(dense, command, tmp_path) -> None:
    """Greedy for all: else a draft would be held against another kind of decoding."""
    model = load_model(dense)
    model.generation_config.repetition_penalty = 1.7
    save_model(model, load_tokenizer(dense), tmp_path / "r")
    asked = ("--prompt", "Who is number 1?", "--new", 12, "--repeats", 2, "--draft", 3, "--json")
    plain, penalized = (json.loads(command("generate", place, *asked).out) for place in (dense, tmp_path / "r"))
    assert plain["texts"] == penalized["texts"]
    assert all(row["full depth"] == row["draft 3, verify"] for row in plain["texts"])


def test_a_threshold_is_calibrated_as_it_is_served(dense, rows, command, tmp_path, monkeypatch) -> None:
    from remanence.compress.early_exit import calibrate

    served = []
    exits = calibrate.early_exit
    monkeypatch.setattr(
        calibrate, "early_exit", lambda model, policy, sync: served.append(sync) or exits(model, policy, sync)
    )
    done = command(
        "policy", dense, "--policy", "confidence", "--exits", "3", "--exit-sync", "batch", "--calibrate", "0.9,0.5",
        "--retain", rows, "--prompts", 16, "--new", 3, "--out", tmp_path / "p",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert set(served) == {"batch"}
