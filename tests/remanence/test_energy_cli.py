"""`remanence energy`: joules where something counts them, a word where nothing does, an estimate when asked for."""

import json
import sys
from types import SimpleNamespace

import pytest
from remanence.backends.energy import ascend, jetson, meter, nvml, probes, rapl
from remanence.backends.energy.probe import Found, Missing
from remanence.backends.energy.sampler import Counter

from remanence.cli import main
from remanence.doctor import diagnose, show

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(untrained, tmp_path):
    untrained("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without any counter."""
    monkeypatch.setattr(rapl.find, "__defaults__", (tmp_path,))
    monkeypatch.setattr(jetson.find, "__defaults__", (tmp_path,))
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu, npu = nvml.find.__defaults__, ascend.find.__defaults__
    monkeypatch.setattr(nvml.find, "__defaults__", (*gpu[:-1], "libnvidia-ml-is-not-here.so"))
    monkeypatch.setattr(ascend.find, "__defaults__", (*npu[:-1], ("libdcmi-is-not-here.so",)))


@pytest.fixture
def energy(model, monkeypatch, capsys):
    """energy(*arguments): exit code, stdout and stderr on a tiny model, in short windows."""

    def run(*arguments):
        short = ("--device=cpu", "--window=0.02", "--idle=0.02", "--windows=2", "--prompt=8", "--new=4")
        monkeypatch.setattr(sys, "argv", ["remanence", "energy", str(model), *short, *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return SimpleNamespace(code=stop.value.code, **dict(zip(("out", "err"), capsys.readouterr())))

    return run


UNITS = ("prompt_token", "output_token", "request")


@pytest.mark.usefixtures("bare")
def test_without_a_counter_there_are_no_joules(energy):
    done = energy()
    assert done.code == 0
    (line,) = [line for line in done.out.splitlines() if line.startswith("no energy counter: ")]
    assert "rapl: " in line
    assert "jetson: no INA3221" in line
    assert "tokens/s" in done.out
    assert " J" not in done.out.replace(line, "")
    done = energy("--json")
    told = json.loads(done.out)
    assert done.code == 0
    assert [told[unit]["joules"] for unit in UNITS] == [None] * 3
    assert told["probes"] == []
    assert [each["probe"] for each in told["missing"]] == ["rapl", "jetson"]
    assert all(each["remedy"] for each in told["missing"])
    assert told["tokens_per_s"]["prompt"] > 0
    assert told["environment"]["torch"]


@pytest.mark.usefixtures("bare")
def test_an_estimate_is_labelled_wherever_it_stands(energy):
    done = energy("--estimate")
    rows = [line for line in done.out.splitlines() if line.startswith("  ")]
    assert len(rows) == 3
    assert all(" J, range " in row and row.endswith("(estimated-tdp)") for row in rows)
    assert "estimated-tdp is processor time x a constant" in done.out
    assert "no energy counter: " in done.out
    told = json.loads(energy("--estimate", "--json").out)
    for unit in UNITS:
        joules = told[unit]["joules"]
        assert joules["methods"] == ["estimated-tdp"]
        assert (joules["low"], joules["high"]) == (joules["total"]["mean"] / 2, joules["total"]["mean"] * 2)
    told = json.loads(energy("--estimate", "--cpu-watts=30", "--json").out)
    assert told["probes"][0]["before"]["tdp_w"] == 30
    assert told["request"]["joules"]["low"] == told["request"]["joules"]["high"]


@pytest.fixture
def counter(monkeypatch):
    """counter(name, scope, watts), on a clock on which a token takes a tenth of a second."""
    clock = SimpleNamespace(now=0.0)

    def sleep(seconds):
        clock.now += seconds

    def generate(_, ids, new):
        clock.now += 0.1 * new
        return new * len(ids)

    def make(name, scope, watts):
        return Counter(name, scope, lambda: [watts * clock.now], [None], 1e-3)

    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=sleep))
    monkeypatch.setattr("remanence.bench.energy.generate", generate)
    return make


def test_a_part_is_told_as_a_part(energy, counter, monkeypatch):
    """Of memory alone there is no total; an estimate takes its place and is not added to it."""
    refused = Missing("rapl-package", "no permission to read it", "sudo")
    partial = Found((counter("rapl-dram", "dram", 10),), (refused,))
    monkeypatch.setitem(probes.COUNTERS, "cpu", (lambda _: partial,))
    out = energy().out
    assert "rapl-package: no permission to read it" in out
    assert "; rapl-dram alone: 4 " in out
    told = json.loads(energy("--json").out)
    assert [told[unit]["joules"] for unit in UNITS] == [None] * 3
    assert told["request"]["parts"]["rapl-dram"]["total"]["mean"] == pytest.approx(10 * 0.4)
    assert any(note.endswith("alone, no total; rapl-package: no permission to read it") for note in told["notes"])
    told = json.loads(energy("--estimate", "--json").out)
    assert told["request"]["joules"]["methods"] == ["estimated-tdp"]
    assert told["request"]["joules"]["scopes"] == ["cpu-package"]
    assert told["request"]["joules"] == told["request"]["parts"]["estimate"]


def test_with_counters(energy, counter, monkeypatch):
    """Two, so that nothing is estimated even when asked."""
    both = Found((counter("rapl-package", "cpu-package", 40), counter("rapl-dram", "dram", 10)))
    monkeypatch.setitem(probes.COUNTERS, "cpu", (lambda _: both,))
    done = energy("--estimate")
    assert "rapl-package (cpu-package, measured-counter): at rest 40 W" in done.out
    assert "; cpu-package + dram: " in done.out
    assert "; rapl-dram: " in done.out
    assert "estimated" not in done.out
    assert "no energy counter" not in done.out
    told = json.loads(energy("--json").out)
    assert told["request"]["joules"]["total"]["mean"] == pytest.approx(50 * 0.4)
    assert told["request"]["joules"]["above_idle"]["mean"] == pytest.approx(0)
    assert told["request"]["parts"]["rapl-dram"]["total"]["mean"] == pytest.approx(10 * 0.4)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--cpu-watts=30"], "cpu-watts: goes with --estimate"),
        (["--estimate", "--cpu-watts=-1"], "cpu-watts: -1 is not finite and above 0"),
        (["--estimate", "--cpu-watts=nan"], "cpu-watts: nan is not finite and above 0"),
        (["--estimate", "--cpu-watts=inf"], "cpu-watts: inf is not finite and above 0"),
        (["--new=1"], "new: 1 is below 2"),
        (["--window=0"], "window: 0 is not at least 0.01"),
        (["--prompt=4000"], "prompt + new: 4000 + 4 tokens, the model has places for 128"),
        (["--device=tpu"], "device: 'tpu' is not one of"),
    ],
)
@pytest.mark.usefixtures("bare")
def test_usage(energy, arguments, error):
    done = energy(*arguments)
    assert done.code == 2
    assert f"remanence: {error}" in done.err
    assert done.out == ""


@pytest.mark.usefixtures("bare")
def test_doctor_names_what_is_missing(capsys):
    found = diagnose()
    assert json.loads(json.dumps(found)) == found
    assert [each["probe"] for each in found["energy"]["missing"]] == ["nvml", "rapl", "dcmi", "jetson"]
    show(found)
    text = capsys.readouterr().out
    assert "energy   nvml none: libnvidia-ml-is-not-here.so is not found: no NVIDIA driver. Install" in text
    assert "energy   rapl none: " in text


def test_doctor_names_what_is_there(capsys, monkeypatch):
    there = Found((Counter("rapl-package", "cpu-package", lambda: [0.0], [None], 1e-3, lambda: {"zones": ["x"]}),))
    monkeypatch.setattr("remanence.doctor.survey", lambda: there)
    found = diagnose()
    assert found["energy"] == {
        "probes": [
            {"name": "rapl-package", "scope": "cpu-package", "method": "measured-counter", "about": {"zones": ["x"]}}
        ],
        "missing": [],
    }
    show(found)
    assert "energy   rapl-package: cpu-package, measured-counter" in capsys.readouterr().out
