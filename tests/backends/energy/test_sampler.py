"""Counters that wrap around, power that is integrated: against sums made by hand."""

import threading
import time

import pytest
from remanence.backends.energy.probe import Silent
from remanence.backends.energy.sampler import Counter, SampledPower, trapezoid


def counter(readings, spans, watch_s=10.0):
    readings = iter(readings)
    return Counter("x", "cpu-package", lambda: next(readings), spans, 1e-3, watch_s=watch_s)


@pytest.mark.parametrize(
    ("readings", "spans", "joules"),
    [
        ([[10], [25]], [100], 15),
        ([[90], [5]], [100], 15),
        ([[90, 1], [5, 4]], [100, None], 18),
        ([[0, 0], [0, 2]], [100, 100], 2),  # one of two stands still
    ],
)
def test_a_counter(readings, spans, joules):
    probe = counter(readings, spans)
    probe.start()
    assert probe.stop() == joules


def test_a_counter_that_starts_again_several_times_is_watched():
    """30 J from reading to reading, of which every fourth or so passes the end."""
    seen = []
    enough = threading.Event()

    def read():
        seen.append(30 * len(seen) % 100)
        if len(seen) > 12:
            enough.set()
        return [seen[-1]]

    probe = Counter("x", "cpu-package", read, [100], 1e-3, watch_s=0.005)
    probe.start()
    assert enough.wait(5)
    assert probe.stop() == 30 * (len(seen) - 1) > 300


def test_used_again_it_starts_anew():
    probe = counter([[1], [4], [100], [107]], [None])
    for joules in (3, 7):
        probe.start()
        assert probe.stop() == joules


@pytest.mark.parametrize(
    ("readings", "reason"), [([[5], [5]], "stood still"), ([[5], [3]], "went back from 5 J to 3 J")]
)
def test_a_counter_without_an_answer(readings, reason):
    probe = counter(readings, [None])
    probe.start()
    with pytest.raises(Silent, match=reason):
        probe.stop()


def test_a_reading_that_fails_meanwhile_is_told_at_the_end():
    failed = threading.Event()

    def read():
        if threading.current_thread().name == "energy":
            failed.set()
            raise Silent("x: gone")
        return 5.0

    probe = SampledPower("x", "npu", read, 0.005)
    probe.start()
    assert failed.wait(5)
    with pytest.raises(Silent, match="x: gone"):
        probe.stop()


def test_no_power_is_no_answer():
    probe = SampledPower("x", "npu", lambda: 0.0, 0.1)
    probe.start()
    with pytest.raises(Silent, match="0 W"):
        probe.stop()


@pytest.mark.parametrize(
    ("samples", "begin", "end", "joules"),
    [
        ([(0, 10), (2, 10)], 0, 2, 20),
        ([(0, 0), (1, 10), (4, 10)], 0, 4, 5 + 30),
        ([(0, 0), (2, 20)], 1, 2, 15),  # what lies outside only says where the line goes
        ([(0, 0), (2, 20), (3, 20), (5, 0)], 1, 4, 15 + 20 + 15),
    ],
)
def test_the_trapezoid_rule(samples, begin, end, joules):
    assert trapezoid(samples, begin, end) == pytest.approx(joules)


def test_power_that_rises_is_read_often_enough():
    """400 W more each second: a straight line, which the rule has exactly."""
    begin = time.monotonic()
    probe = SampledPower("x", "npu", lambda: 100 + 400 * (time.monotonic() - begin), 0.01)
    before = time.monotonic() - begin
    probe.start()
    inner = time.monotonic() - begin
    time.sleep(0.1)
    end = time.monotonic() - begin
    joules = probe.stop()
    after = time.monotonic() - begin

    def between(a, b):
        return 100 * (b - a) + 200 * (b * b - a * a)

    assert between(inner, end) * 0.999 <= joules <= between(before, after) * 1.001


def test_a_tool_that_takes_long_is_not_part_of_the_window():
    def slow():
        time.sleep(0.1)
        return 100.0

    probe = SampledPower("x", "npu", slow, 0.01)
    probe.start()
    begin = time.monotonic()
    time.sleep(0.05)
    end = time.monotonic()
    assert probe.stop() == pytest.approx(100 * (end - begin), abs=3)
