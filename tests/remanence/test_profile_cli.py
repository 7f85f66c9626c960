"""`remanence profile`: from a config alone, from files, on a device that is here, and what it refuses."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from remanence.backends.ceilings import Ceilings, Rate
from remanence.bench.roofline import ceilings
from transformers import AutoModelForCausalLM, LlamaConfig

from remanence.cli import main

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "architectures": ["LlamaForCausalLM"],
}
HERE = Ceilings(
    "this CPU",
    Rate(1e10, "measured: read", spread=0.1),
    {"float32": Rate(1e11, "measured: probe", spread=0.0)},
    memory_bytes=10**9,
    cache_bytes=1,
    launch=Rate(1e-6, "measured: a norm", spread=0.1),
)


@pytest.fixture
def config_only(tmp_path):
    LlamaConfig(**SIZES, dtype="bfloat16").save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def profile(monkeypatch, capsys, tmp_path):
    """profile(model, *arguments): exit code, stdout and stderr; a device that is here has ceilings made up above."""
    monkeypatch.setenv("REMANENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device, say: HERE)  # noqa: ARG005

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["remanence", "profile", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return SimpleNamespace(code=stop.value.code, **dict(zip(("out", "err"), capsys.readouterr())))

    return run


SHORT = ("--prompt", "16", "--new", "4")


def test_a_config_and_the_name_of_a_device_are_enough(profile, config_only):
    done = profile(config_only, *SHORT, "--device", "910B4", "--batch", "1,8", "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["schema"] == "remanence.profile/1"
    assert (found["device"]["name"], found["device"]["kind"]) == ("910B4", "sheet")
    assert [phase["batch"] for phase in found["phases"]] == [1, 1, 8, 8]
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    head = 128 * 64
    by_hand = 2 * (linear + head) + 2 * 4 * 64 * 18  # 17 in the cache, and itself
    assert found["phases"][1]["flops"] == pytest.approx(by_hand, rel=1e-3)  # some versions turn positions by a product
    assert found["weights"]["read_bytes"] == 2 * (linear + head + 5 * 64)
    assert all(phase["measured_s"] is None for phase in found["phases"])


def test_a_device_that_is_here_is_measured(profile, model):
    done = profile(model, *SHORT, "--device", "cpu", "--batch", "2", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["device"]["kind"] == "cpu"
    for phase in found["phases"]:
        assert phase["measured_s"] > 0
        assert phase["attained"] == pytest.approx(phase["floor_s"] / phase["measured_s"])
        assert phase["estimate_s"] > phase["floor_s"]
    assert "measuring batch 2: 16 tokens, then 4 more, on cpu" in done.err


def test_a_recipe_is_measured_as_it_is_reckoned(profile, model):
    done = profile(model, *SHORT, "--device", "cpu", "--recipe", "rtn-w4a16-g32", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["recipe"] == "rtn-w4a16-g32"
    assert all(phase["measured_s"] > 0 for phase in found["phases"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--recipe", "gptq-w4a16-g32"), "gptq-w4a16-g32 looks at data; profile what `remanence compress` makes of it"),
        (("--no-measure",), "as asked"),
    ],
)
def test_what_is_not_measured_is_said(profile, model, arguments, said):
    done = profile(model, *SHORT, "--device", "cpu", *arguments)
    assert done.code == 0
    assert f"not measured: {said}" in " ".join(done.out.split())


def test_without_weights_a_device_that_is_here_is_not_measured(profile, config_only):
    done = profile(config_only, *SHORT, "--device", "cpu", "--json")
    assert "holds a config, and no weights" in json.loads(done.out)["notes"][-1]


def test_files_for_every_use(profile, config_only, tmp_path):
    done = profile(config_only, *SHORT, "--device", "H200", "--out", tmp_path / "out")
    assert done.code == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"profile.json", "profile.csv", "roofline.svg", "sweep.svg"} <= written
    assert "no PNG" in done.err or {"roofline.png", "sweep.png"} <= written
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert found["phases"][0]["phase"] == "prefill"
    assert "bound by memory" in " ".join(done.out.split())


def test_leaving_early_and_drafting(profile, config_only, tmp_path):
    rows = [{"way": "full", "histogram": {"2": 10}}, {"way": "probe", "histogram": {"1": 5, "2": 5}}, {"way": "draft"}]
    (tmp_path / "run.json").write_text(json.dumps({"rows": rows}))
    arguments = ("--exits", tmp_path / "run.json", "--draft", "1:2:0.5", "--json")
    found = json.loads(profile(config_only, *SHORT, "--device", "H200", *arguments).out)
    assert found["exits"]["mean_depth"] == 1.5
    assert found["draft"]["length"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--device", "H300"), 2, "device: 'H300' is not one of A100"),
        (("--device", "cuda:7"), 2, "device: 'cuda:7' cannot be had"),
        (("--batch", "1,x"), 2, "batch: '1,x' is not a number"),
        (("--batch", "0"), 2, "batch: 0; expected numbers from 1 on"),
        (("--prompt", "0"), 2, "prompt: 0 is below 1"),
        (("--prompt", "400"), 2, "has positions for 256"),
        (("--recipe", "rtn-w5a16"), 2, "recipe: 'rtn-w5a16'"),
        (("--recipe", "rtn-w4a16-g128"), 2, "do not divide into groups of 128"),
        (("--exits", "a:b"), 2, "exits: 'a:b' is not of the form"),
        (("--exits", "9:1"), 2, "depth 9 is not from 1 to 2"),
        (("--exits", "1:3,1:4"), 2, "exits: '1:3,1:4' has a depth twice"),
        (("--draft", "1:2:0.5:9"), 2, "draft: '1:2:0.5:9' is not of the form"),
        (("--draft", "1:2"), 2, "draft: '1:2' is not of the form LAYERS:LENGTH:ACCEPT"),
        (("--draft", "1:2:1.5"), 2, "accept: 1.5"),
        (("--device", "H200", "--remeasure"), 2, "remeasure: H200 is a name"),
    ],
)
def test_one_clear_line(profile, config_only, arguments, code, said):
    done = profile(config_only, *SHORT, *(("--device", "H200") if "--device" not in arguments else ()), *arguments)
    lines = [line for line in done.err.splitlines() if line.startswith("remanence: ")]
    assert done.code == code
    assert len(lines) == 1
    assert said in lines[0]
    assert not done.out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_type"', "not JSON"),
        ('{"model_type": "no-such-thing"}', "cannot be read"),
        ('{"model_type": "llama", "hidden_size": "many"}', "cannot be read"),
        (
            '{"model_type": "llama", "hidden_size": 64, "quantization_config": {"quant_method": "x"}}',
            "quant_method: 'x'",
        ),
    ],
)
def test_a_config_that_cannot_be_read(profile, tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    done = profile(tmp_path, *SHORT, "--device", "H200")
    assert done.code == 2
    [line] = [line for line in done.err.splitlines() if line.startswith("remanence: ")]
    assert said in line


def test_a_device_that_is_too_busy_is_refused(profile, model, monkeypatch):
    def unsteady(device, say):  # noqa: ARG001
        raise ValueError("memory, copy: the spread of 9 windows is 0.80 of their median, above 0.3")

    monkeypatch.setattr(ceilings, "measure_ceilings", unsteady)
    done = profile(model, *SHORT, "--device", "cpu")
    assert done.code == 1
    assert "remanence: memory, copy: the spread of 9 windows is 0.80" in done.err


def test_a_name_that_is_wrong_is_said_before_torch_loads(config_only):
    code = (
        "import sys\nfrom remanence.cli import main\n"
        f"sys.argv = ['remanence', 'profile', {str(config_only)!r}, '--device', 'H300']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
