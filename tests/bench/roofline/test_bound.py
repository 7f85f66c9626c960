"""Floors and estimates by hand."""

from dataclasses import replace

import pytest
from remanence.backends.ceilings import Ceilings, Pace, Rate
from remanence.bench.roofline.bound import ceiling, estimate_s, floor, floor_s, memory_share, replaced
from remanence.bench.roofline.work import Part, Step

KINDS = {"float32": 10.0, "bfloat16": 100.0, "int8": 200.0}
DEVICE = Ceilings("d", Rate(8.0, "s"), {kind: Rate(value, "s") for kind, value in KINDS.items()}, sparse24=2.0)


def part(**changes):
    given = {"module": "m", "kind": "linear", "compute": "bfloat16", "kept": "w4a16"}
    return Part(**given | changes)


def step(*parts):
    return Step("decode", 1, 1, 4, parts)


def test_the_longer_of_two_times():
    busy = part(flops=1000.0, weight_bytes=8.0, kv_read=8.0, kv_written=8.0, activation_bytes=8.0)
    time = floor(busy, DEVICE)
    assert (time.compute_s, time.memory_s, time.seconds, time.bound) == (10.0, 4.0, 10.0, "compute")
    waiting = replace(busy, flops=100.0)
    assert (floor(waiting, DEVICE).seconds, floor(waiting, DEVICE).bound) == (4.0, "memory")
    assert floor_s(step(busy, waiting), DEVICE) == 14.0
    assert memory_share(step(busy, waiting), DEVICE) == pytest.approx(4 / 14)


def test_two_of_four_weights_are_twice_as_fast_where_the_device_can():
    sparse = part(flops=1000.0, sparse=True)
    assert floor(sparse, DEVICE).compute_s == 5.0
    assert floor(sparse, replace(DEVICE, sparse24=1.0)).compute_s == 10.0


@pytest.mark.parametrize(
    ("compute", "taken"),
    [
        ("bfloat16", "bfloat16"),
        ("int8", "int8"),
        ("int4", "int8"),
        ("float8", "bfloat16"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float32"),
    ],
)
def test_numbers_that_a_device_has_not_are_computed_in_those_that_hold_them(compute, taken):
    assert ceiling(compute, DEVICE) == (taken, DEVICE.compute[taken])


def test_what_is_faster_in_wider_numbers_is_reckoned_in_them():
    slow = replace(DEVICE, compute=DEVICE.compute | {"bfloat16": Rate(1.0, "s")})
    assert ceiling("bfloat16", slow)[0] == "float32"
    assert replaced([step(part(flops=1.0))], slow) == {"bfloat16": "float32"}
    assert replaced([step(part(flops=1.0))], DEVICE) == {}


def test_a_device_without_bfloat16_takes_the_nearest():
    only = replace(DEVICE, compute={"float16": Rate(1.0, "s")})
    assert ceiling("bfloat16", only)[0] == "float16"
    assert ceiling("float32", only)[0] == "float16"  # no slower, so that a floor stays one
    assert replaced([step(part(flops=1.0, compute="float32"))], only) == {"float32": "float16"}
    with pytest.raises(ValueError, match="d has no known ceiling for int8"):
        ceiling("int8", replace(DEVICE, compute={"int4": Rate(1.0, "s")}))


def test_an_estimate_needs_what_was_measured():
    assert estimate_s(step(part(flops=1.0)), DEVICE) is None


def test_an_estimate_follows_the_measured_paces():
    rows = {1: Rate(2.0, "s"), 4: Rate(8.0, "s"), 16: Rate(8.0, "s")}
    measured = replace(DEVICE, launch=Rate(0.5, "s"), paces={"w4a16": Pace(Rate(3.0, "s"), rows)})

    def estimate(count, **changes):
        return estimate_s(step(part(flops=16.0, rows=count, weight_bytes=9.0, **changes)), measured)

    assert estimate(1, eager_bytes=9.0) == pytest.approx(3 + 16 / 2)
    assert estimate(2, eager_bytes=9.0) == pytest.approx(3 + 16 / 4)  # between 1 and 4 rows, in the middle by powers
    assert estimate(4, eager_bytes=25.0) == pytest.approx(3 + 16 / 8 + 16 / 8)
    assert estimate(500, eager_bytes=9.0) == pytest.approx(3 + 16 / 8)  # beyond what was measured the pace stays
    # No pace of its own: floors, what is moved op by op, and what ops take.
    assert estimate(1, kept="nf4", eager_bytes=25.0, ops=4) == pytest.approx(9 / 8 + 16 / 8 + 4 * 0.5)
    other = part(kind="other", flops=0.0, eager_bytes=16.0, ops=3)
    assert estimate_s(step(other), measured) == pytest.approx(16 / 8 + 3 * 0.5)
