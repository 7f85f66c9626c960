"""Joules per token, from windows whose energy is known; what has no common total and no common order."""

from dataclasses import replace

import pytest
import torch
from remanence.backends.cpu import CpuDevice
from remanence.backends.energy import meter
from remanence.backends.energy.estimate import Estimate
from remanence.backends.energy.meter import Lengths, Measured, Window
from remanence.backends.energy.probe import Found, Missing
from remanence.backends.energy.probes import OWN
from remanence.backends.energy.sampler import Counter
from remanence.bench.energy import CONSTANT, Shape, document, generate, generation_energy, token_energies, token_energy
from remanence.bench.joules import cost, ranked

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = Lengths(window_s=0.02, windows=2, idle_s=0.02, warm_up=1)


def probe(name="counter", scope="gpu", watts=50.0):
    """Of steady power."""
    return Counter(name, scope, lambda: [watts * meter.time.perf_counter()], [None], 0.1)


def package(watts=50.0):
    """Of the processor that the models here run on."""
    return probe("package", "cpu-package", watts)


def measured(windows, idle=10.0, probes=(), kind="cuda"):
    """windows: {work: [(seconds, calls, joules)]}"""
    probes = probes or (probe(),)
    rows = {
        name: tuple(Window(s, calls, calls, {} if j is None else {p.name: j for p in probes}) for s, calls, j in rows)
        for name, rows in windows.items()
    }
    rest = Window(1.0, joules={p.name: idle for p in probes})
    return Measured(Found(probes), Lengths(), rest, rows, {}, {}, OWN[kind])


DECODING = {"request": 1, "prompt": -1}


def test_the_pass_over_the_prompt_is_taken_off_round_by_round():
    """Two rounds of other power; a request makes 10 tokens after its prompt."""
    rounds = measured({"prompt": [(5.0, 10, 100.0), (5.0, 5, 100.0)], "request": [(6.0, 2, 120.0), (6.0, 3, 120.0)]})
    prompt = cost(rounds, {"prompt": 1}, [4, 4])
    assert prompt.seconds.mean == pytest.approx((5 / 10 + 5 / 5) / 2 / 4)
    assert prompt.joules.total.mean == pytest.approx((100 / 10 + 100 / 5) / 2 / 4)
    assert prompt.joules.above_idle.mean == pytest.approx((50 / 10 + 50 / 5) / 2 / 4)
    decoding = cost(rounds, DECODING, [10, 10])
    assert decoding.seconds.mean == pytest.approx(((3 - 0.5) + (2 - 1)) / 2 / 10)
    assert decoding.joules.total.mean == pytest.approx(((60 - 10) + (40 - 20)) / 2 / 10)
    assert decoding.joules.above_idle.mean == pytest.approx(((30 - 5) + (20 - 10)) / 2 / 10)
    assert decoding.joules.total.windows == 2


def test_a_silent_window_leaves_no_mean_over_the_others():
    rounds = measured({"prompt": [(5.0, 1, 1.0), (5.0, 1, None)], "request": [(5.0, 1, 2.0), (5.0, 1, 3.0)]})
    assert cost(rounds, {"prompt": 1}, [1, 1]).joules.total is None
    assert cost(rounds, DECODING, [1, 1]).joules.total is None
    assert cost(rounds, DECODING, [1, 1]).seconds.mean == 0
    assert cost(rounds, {"request": 1}, [1, 1]).joules.total.mean == 2.5


def test_parts_are_added_and_the_board_is_not():
    probes = probe(), probe("dram", "dram"), probe("board", "system")
    whole = cost(measured({"a": [(1.0, 1, 7.0)]}, probes=probes), {"a": 1}, [1])
    assert whole.joules.scopes == ("gpu", "dram")
    assert whole.joules.total.mean == 14
    assert whole.parts["board"].total.mean == 7


def test_nothing_measured_has_no_joules():
    nothing = Measured(Found(), Lengths(), Window(), {"a": (Window(1.0, 1, 1),)}, {}, {}, OWN["cpu"])
    assert cost(nothing, {"a": 1}, [1]).joules is None


@pytest.mark.parametrize(
    ("kind", "scopes"),
    [("cuda", ("cpu-package", "dram")), ("npu", ("cpu-package",)), ("cpu", ("dram",)), ("cuda", ("system",))],
)
def test_a_part_is_no_total_and_has_no_rank(kind, scopes):
    """The host's counters beside an accelerator without one; memory without its processor."""
    probes = tuple(probe(scope, scope) for scope in scopes)
    rounds = measured({"a": [(1.0, 1, 7.0)]}, probes=probes, kind=kind)
    part = cost(rounds, {"a": 1}, [1])
    assert part.joules is None
    assert {name: each.total.mean for name, each in part.parts.items()} == dict.fromkeys(scopes, 7)
    with pytest.raises(ValueError, match="a: there are no joules to rank it by"):
        ranked({"a": part})
    refused = Missing("nvml", "no driver", "Install it")
    about = {name: {} for name in scopes}
    told = document(replace(rounds, found=Found(probes, (refused,)), before=about, after=about))["notes"]
    assert told[0].startswith("no energy counter of the device itself: ")
    assert told[0].endswith(" alone, no total; nvml: no driver")


def one(joules, **options):
    return cost(measured({"a": [(1.0, 1, joules)]}, **options), {"a": 1}, [1])


def test_an_order_of_like_with_like_alone():
    assert ranked({"a": one(3.0), "b": one(1.0), "c": one(2.0)}) == ["b", "c", "a"]
    estimate = one(1.0, probes=(Estimate("", 2),), kind="cpu")
    assert ranked({"a": estimate}) == ["a"]
    with pytest.raises(ValueError, match=r"a: measured \('gpu',\), b: estimated .* have no common order"):
        ranked({"a": one(3.0), "b": estimate})
    with pytest.raises(ValueError, match="no common order"):
        ranked({"a": one(3.0), "b": one(3.0, probes=(probe(), probe("dram", "dram")))})
    with pytest.raises(ValueError, match="b: there are no joules to rank it by"):
        ranked({"a": one(3.0), "b": one(None)})


def test_an_estimate_has_a_range():
    estimate = one(3.0, probes=(Estimate("", 2),), kind="cpu").joules
    assert (estimate.low, estimate.high) == (1.5, 6.0)
    assert one(3.0).joules.low is None


@pytest.fixture
def clock(monkeypatch):
    """A clock that work moves on."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(meter, "time", clock)
    return clock


def test_any_work_that_makes_tokens(clock):
    """A second each at 50 W; how many tokens that makes differs from call to call."""
    made = iter([1] * 2 + [4, 6] * 3)

    def work():
        clock.now += 1.0
        return next(made)

    token = token_energy(work, CpuDevice(), found=Found((package(),)), lengths=Lengths(2, 3, 5, 1))
    assert token.seconds.mean == pytest.approx(0.2)
    assert token.joules.total.mean == pytest.approx(10, rel=0.01)
    assert token.joules.above_idle.mean == pytest.approx(0, abs=0.01)
    assert not token.estimated


def test_several_side_by_side(clock):
    def policy(seconds):
        clock.now += seconds
        return 2

    works = {"late": lambda: policy(2.0), "early": lambda: policy(1.0)}
    costs = token_energies(works, CpuDevice(), Found((package(),)), Lengths(4, 2, 5, 1))
    assert {name: each.joules.total.mean for name, each in costs.items()} == pytest.approx({"late": 50, "early": 25})
    assert ranked(costs) == ["early", "late"]


def test_work_that_makes_nothing(clock):
    def work():
        clock.now += 1
        return 0

    with pytest.raises(ValueError, match="idler: a window made no token"):
        token_energies({"idler": work}, CpuDevice(), Found(), Lengths(1, 1, 0, 0))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_every_answer_has_its_length(untrained, architecture):
    """Of a model, too, that would end it with the first token."""
    model = untrained(architecture)
    ids = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.generation_config.eos_token_id = model(ids).logits[:, -1].argmax(-1).tolist()
    for new in (1, 7):
        assert generate(model, ids, new) == 2 * new


def test_a_model(untrained, clock, monkeypatch):
    """On a clock on which a pass over the prompt takes half a second, and each token a tenth."""

    def on_the_clock(model, ids, new):
        clock.now += 0.5 + 0.1 * new
        return generate(model, ids, new)

    monkeypatch.setattr("remanence.bench.energy.generate", on_the_clock)
    told = generation_energy(untrained("llama"), CpuDevice(), Shape(2, 8, 4), Found((package(40.0),)), SHORT)
    assert (told["batch"], told["prompt"], told["new"]) == (2, 8, 4)
    assert (told["dtype"], told["attention"], told["kv_cache"]) == ("float32", "sdpa", True)
    seconds = {"prompt_token": 0.6 / 16, "output_token": 0.3 / 6, "request": 0.9 / 2}
    assert {unit: told[unit]["seconds"]["mean"] for unit in seconds} == pytest.approx(seconds)
    for unit, each in seconds.items():
        assert told[unit]["joules"]["total"]["mean"] == pytest.approx(40 * each)
        assert told[unit]["joules"]["methods"] == ("measured-counter",)
    assert told["tokens_per_s"] == pytest.approx({"prompt": 16 / 0.6, "output": 20})
    assert told["probes"][0]["idle_watts"] == pytest.approx(40)
    assert "figures are coarse" in told["notes"][0]
    assert CONSTANT not in told["notes"]


@pytest.mark.parametrize("shape", [(0, 8, 4), (1, 0, 4), (1, 8, 1)])
def test_shapes(shape):
    with pytest.raises(ValueError, match=r"(batch|prompt|new): \d is below \d"):
        Shape(*shape)


def test_more_tokens_than_places(untrained):
    with pytest.raises(ValueError, match=r"prompt \+ new: 125 \+ 4 tokens, the model has places for 128"):
        generation_energy(untrained("llama"), CpuDevice(), Shape(1, 125, 4), Found(), SHORT)
