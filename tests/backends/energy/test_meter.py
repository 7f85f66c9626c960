"""Windows of work on a clock of ours, with counters whose power is known."""

import math
from types import SimpleNamespace

import pytest
from remanence.backends.cpu import CpuDevice
from remanence.backends.energy import jetson, meter, nvml, probes, rapl
from remanence.backends.energy.meter import Lengths, figure, measure, metered
from remanence.backends.energy.probe import ESTIMATE, Found, Missing, Silent, disjoint
from remanence.backends.energy.sampler import Counter


class Clock:
    """now: seconds; joules: what a machine has taken, 20 W at rest."""

    def __init__(self):
        self.now = self.joules = 0.0

    def pass_(self, seconds, watts=20.0):
        self.now += seconds
        self.joules += seconds * watts


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    stand_in = SimpleNamespace(perf_counter=lambda: clock.now, sleep=clock.pass_)
    monkeypatch.setattr(meter, "time", stand_in)
    return clock


def counter(clock, name="counter", scope="gpu", times=1.0):
    return Counter(name, scope, lambda: [clock.joules * times], [None], 0.1)


class Device(CpuDevice):
    """One that takes a while until it is done."""

    def __init__(self, clock, waits=0.0):
        self.clock, self.waits, self.syncs = clock, waits, []

    def synchronize(self):
        self.clock.pass_(self.waits, 70.0)
        self.syncs.append(self.clock.now)


def test_known_power(clock):
    """Half a second at 70 W, five units each: seven joules a unit, of which 20 W would have gone at rest."""
    calls = []

    def work():
        calls.append(clock.now)
        clock.pass_(0.5, 70.0)
        return 5

    measured = measure(Device(clock), {"a": work}, Found((counter(clock),)), Lengths(5, 3, 5, 2))
    assert measured.idle_watts("counter") == pytest.approx(20)
    assert measured.idle.seconds == 5
    assert len(measured.windows["a"]) == 3
    for window in measured.windows["a"]:
        assert window.seconds == 5
        assert (window.calls, window.units) == (10, 50)
        assert window.joules["counter"] / window.units == pytest.approx(7, rel=0.01)
        above = window.joules["counter"] - measured.idle_watts("counter") * window.seconds
        assert above / window.units == pytest.approx(5, rel=0.01)
    assert len(calls) == 30 + 2 * 2  # warm before rest, and again after it


def test_the_device_is_waited_for_on_both_sides(clock):
    """Its queue is part of what was asked of it, that of before is not."""
    device = Device(clock, waits=2.0)
    probe = counter(clock)
    with metered(device, [probe]) as window:
        clock.pass_(1.0, 70.0)
    assert device.syncs == [2.0, 5.0]
    assert window.seconds == 3.0
    assert window.joules == {"counter": 210.0}


def test_works_take_turns_and_change_places(clock):
    order = []

    def work(name):
        order.append(name)
        clock.pass_(1.0)
        return 1

    works = {name: lambda name=name: work(name) for name in "ab"}
    measure(Device(clock), works, Found((counter(clock),)), Lengths(1, 3, 1, 0))
    assert "".join(order) == "abbaab"


def test_a_counter_that_stands_still_is_no_zero(clock):
    still = Counter("still", "dram", lambda: [7.0], [None], 0.1)
    measured = measure(
        Device(clock), {"a": lambda: clock.pass_(1) or 1}, Found((counter(clock), still)), Lengths(1, 1, 1)
    )
    assert set(measured.windows["a"][0].joules) == {"counter"}
    assert measured.idle_watts("still") is None
    assert measured.silences() == ["still: the counter stood still; the window may be shorter than its steps"]


def test_a_probe_that_cannot_be_started(clock):
    def gone():
        raise Silent("x: gone")

    with metered(Device(clock), [Counter("x", "gpu", gone, [None], 0.1)]) as window:
        clock.pass_(1)
    assert (window.joules, window.silent, window.seconds) == ({}, {"x": "x: gone"}, 1)


def test_without_a_probe_the_time(clock):
    measured = measure(Device(clock), {"a": lambda: clock.pass_(1) or 3}, Found(), Lengths(2, 2, 5))
    assert [window.seconds for window in measured.windows["a"]] == [2, 2]
    assert measured.windows["a"][0].joules == {}
    assert measured.idle.seconds == 0, "rest is not waited for where nothing reads it"


def test_work_that_fails_leaves_no_thread(clock):
    import threading

    def fails():
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        measure(Device(clock), {"a": fails}, Found((counter(clock),)), Lengths(1, 1, 1, 0))
    assert "energy" not in [thread.name for thread in threading.enumerate()]


def test_mean_and_interval():
    three = figure([1.0, 2.0, 3.0])
    assert three.mean == 2
    assert (three.low, three.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert three.spread == 1
    assert figure([4.0]) == meter.Figure(4.0, None, None, 0.0, 1)
    assert figure([1.0, None]) is None
    assert figure([]) is None


@pytest.mark.parametrize(
    ("lengths", "error"),
    [
        ((0, 3, 5), "window: 0 is"),
        ((5, 0, 5), "windows: 0 is"),
        ((5, 3, -1), "idle: -1 is"),
        ((float("nan"),), "window: nan"),
    ],
)
def test_lengths(lengths, error):
    with pytest.raises(ValueError, match=error):
        Lengths(*lengths)


def test_what_may_be_added_up(clock):
    cpu, cuda, npu = (probes.OWN[kind] for kind in ("cpu", "cuda", "npu"))
    gpu, dram, package = counter(clock), counter(clock, "dram", "dram"), counter(clock, "package", "cpu-package")
    system, jetson = counter(clock, "board", "system"), counter(clock, "jetson", "system")
    assert disjoint((gpu, system, dram), cuda) == (gpu, dram)
    assert disjoint((package, dram, system), cpu) == (package, dram)
    assert disjoint((dram, system), cpu) == (system,), "memory alone is no total, the board is"
    assert disjoint((system,), cpu) == (system,)
    assert disjoint((jetson,), cpu) == disjoint((jetson,), cuda) == (jetson,)
    # What is left without the device's own is a part.
    assert disjoint((dram,), cpu) == ()
    assert disjoint((package, dram, system), cuda) == ()
    assert disjoint((package,), npu) == ()
    estimate = counter(clock, "estimate", "cpu-package")
    estimate.method = ESTIMATE
    assert disjoint((dram, estimate), cpu) == (estimate,)
    with pytest.raises(
        ValueError, match=r"estimate \(estimated-tdp\): an estimate and a measured value have no common"
    ):
        disjoint((package, estimate), cpu)


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without any counter."""
    monkeypatch.setattr(rapl.find, "__defaults__", (tmp_path,))
    monkeypatch.setattr(jetson.find, "__defaults__", (tmp_path,))


@pytest.mark.usefixtures("bare")
def test_without_a_counter_an_estimate_only_when_asked_for():
    found = probes.probes(CpuDevice())
    assert found.probes == ()
    assert [each.probe for each in found.missing] == ["rapl", "jetson"]
    assert probes.no_counter(found).startswith("no energy counter: rapl: ")
    found = probes.probes(CpuDevice(), allow_estimate=True, cpu_watts=50)
    assert [probe.method for probe in found.probes] == ["estimated-tdp"]
    assert found.probes[0].watts == 50
    for watts in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"cpu-watts: {watts:g} is not finite and above 0"):
            probes.probes(CpuDevice(), allow_estimate=True, cpu_watts=watts)


def test_no_estimate_beside_a_counter(monkeypatch, clock):
    monkeypatch.setitem(probes.COUNTERS, "cpu", (lambda _: Found((counter(clock, scope="cpu-package"),)),))
    assert [probe.name for probe in probes.probes(CpuDevice(), allow_estimate=True).probes] == ["counter"]


def test_memory_alone_is_no_counter_of_a_processor(monkeypatch, clock):
    """As where dram can be read and the package cannot: the estimate steps in, and what is missing is said."""
    refused = Missing("rapl-package", "no permission to read it", "sudo")
    partial = Found((counter(clock, "rapl-dram", "dram"),), (refused,))
    monkeypatch.setitem(probes.COUNTERS, "cpu", (lambda _: partial,))
    device = CpuDevice()
    assert probes.summed(probes.probes(device), device) == ()
    found = probes.probes(device, allow_estimate=True)
    assert [probe.name for probe in found.probes] == ["rapl-dram", "estimate"]
    assert [probe.name for probe in probes.summed(found, device)] == ["estimate"]
    for each in (partial, found):
        assert probes.no_counter(each) == (
            "no energy counter of the device itself: rapl-dram (dram) alone, no total; "
            "rapl-package: no permission to read it"
        )


def test_no_estimate_of_an_accelerator(monkeypatch):
    device = SimpleNamespace(kind="npu", name="npu:0")
    monkeypatch.setitem(probes.COUNTERS, "npu", (lambda _: Found(missing=(Missing("dcmi", "a", "b"),)),))
    found = probes.probes(device, allow_estimate=True)
    assert found.probes == ()
    assert found.missing[-1].reason == "processor time says nothing of npu:0"


def test_a_gpu_is_asked_for_by_its_uuid(monkeypatch):
    from remanence.backends.cuda import CudaDevice

    asked = []
    monkeypatch.setattr(nvml, "find", lambda *place: asked.append(place) or Found())
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(uuid="GPU-1234"))
    probes.probes(CudaDevice(1))
    assert asked == [(1, "1234")]
