"""The estimate, against arithmetic by hand."""

import time
from types import SimpleNamespace

import pytest
from remanence.backends.energy import estimate
from remanence.backends.energy.estimate import Estimate, joules


@pytest.mark.parametrize(
    ("watts", "threads", "seconds", "busy", "expected"),
    [
        (100, 4, 10, 0, 100),  # a tenth of it at rest
        (100, 4, 10, 40, 1000),
        (100, 4, 10, 20, 550),
        (100, 4, 10, 80, 1000),  # more than there is: children that began before
        (8, 2, 3, 3, 2.4 + 10.8),
        (8, 2, 0, 0, 0),
    ],
)
def test_by_hand(watts, threads, seconds, busy, expected):
    assert joules(watts, threads, seconds, busy) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("cpu", "given", "watts", "factors"),
    [
        ("AMD EPYC", None, 16.0, (0.5, 2.0)),  # 4 W a thread, 2 to 8
        ("AMD EPYC 7763 64-Core Processor", None, 280 / 128 * 4, (0.5, 2.0)),
        ("Intel(R) Xeon(R) Platinum 8480+", None, 350 / 112 * 4, (0.5, 2.0)),
        ("AMD EPYC 7763 64-Core Processor", 90.0, 90.0, (1.0, 1.0)),
    ],
)
def test_what_a_processor_takes_at_most(cpu, given, watts, factors):
    probe = Estimate(cpu, 4, given)
    assert probe.watts == pytest.approx(watts)
    assert probe.factors == factors
    assert (probe.method, probe.scope) == ("estimated-tdp", "cpu-package")


def test_the_clock_of_the_processors(monkeypatch):
    ticks = iter([(100.0, 7.0), (104.0, 11.0)])
    monkeypatch.setattr(estimate, "_clock", lambda: next(ticks))
    probe = Estimate("", 2, 100.0)
    probe.start()
    assert probe.stop() == pytest.approx(10 * 4 + 90 * 4 / 2)  # 4 of 8 processor seconds


def test_children_and_the_kernel_are_part_of_it(monkeypatch):
    taken = SimpleNamespace(user=1.0, system=20.0, children_user=300.0, children_system=4000.0)
    monkeypatch.setattr(estimate.os, "times", lambda: taken)
    assert estimate._clock()[1] == 4321.0


def test_work_takes_more_than_rest():
    """On the clock that there is; a share of processor time cannot be less than none or more than one."""
    probe = Estimate("", 1, 100.0)
    begin = time.monotonic()
    probe.start()
    while time.monotonic() - begin < 0.2:
        pass
    seconds = time.monotonic() - begin
    worked = probe.stop()
    assert 10 * seconds < worked < 101 * (time.monotonic() - begin)
