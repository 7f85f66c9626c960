"""Ceilings measured on a device: the arithmetic on a clock of ours, once for real, refused where unsteady, and kept."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from remanence.backends.ceilings import Ceilings, Rate, ceilings_from_json
from remanence.backends.cpu import CpuDevice
from remanence.backends.sheets import SHEETS
from remanence.bench.roofline import ceilings as module
from remanence.bench.roofline import measured, weights, windows
from remanence.bench.roofline.ceilings import ceilings_of, kept_ceilings
from remanence.bench.roofline.measured import Sizes, measure_ceilings
from remanence.bench.roofline.paces import PaceSizes, pace
from remanence.bench.roofline.windows import LIMIT, Windows
from remanence.kernels import ops

MIB = 2**20
TICK = 1e-6
# No cache is asked for, so that arrays are small; whatever else runs beside a test is no reason to refuse.
FEW = PaceSizes((1, 4), 128, 256, 128)
SMALL = Sizes(512, 32, 512, 32, least_bytes=MIB, caches=0, windows=7, window_s=0, limit=float("inf"), paces=FEW)
native = pytest.mark.skipif(not ops.available_isas(), reason="the native kernels are not built")


class Clocked(CpuDevice):
    """The CPU, on a clock of ours: every timed block takes the next of `ticks`, however much is done in it."""

    def __init__(self, ticks, free=2**30):
        self.ticks, self.free, self.blocks = iter(ticks), free, 0

    def free_memory(self):
        return self.free

    def timed(self):
        self.blocks += 1
        return TimedBlock(next(self.ticks))


class TimedBlock(SimpleNamespace):
    def __init__(self, seconds):
        super().__init__(seconds=seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def probed(monkeypatch):
    """Kernels that measure themselves, at set rates; and a process that never waited for a core."""
    monkeypatch.setattr(measured.limits, "peaks", lambda _: {"float32": 3e9, "int8": 5e9})
    monkeypatch.setattr(measured.limits, "read_bandwidth", lambda *_: 2e9)
    monkeypatch.setattr(windows, "_scheduled", lambda: (0, 0))


def constant(seconds=TICK):
    return Clocked(itertools.repeat(seconds))


@pytest.fixture(scope="module")
def real():
    said = []
    return measure_ceilings(CpuDevice(), said.append, SMALL), said


def test_for_real(real):
    found, said = real
    assert found.device == CpuDevice().info()["name"]
    assert 1e8 < found.memory.value < 1e13
    assert found.memory.measured
    assert 1e-8 < found.launch.value < 1e-2
    names = {"float32", "bfloat16", "float16"} | ({"w4a16", "w8a16", "w8a8", "w4a8", "w4a4"} & set(found.gemv))
    assert set(found.gemv) == set(found.products) == names
    assert {"float32", "bfloat16", "float16", "int8"} <= set(found.compute)
    assert not {"float8", "int4"} & set(found.compute), "no CPU of ours has them"
    for rate in (*found.gemv.values(), *found.products.values(), *found.compute.values()):
        assert rate.value > 1e6
        assert rate.spread >= 0
        assert rate.source.startswith("measured: ")
    assert all(found.compute[kind].value >= found.products[kind].value for kind in ("float32", "bfloat16", "float16"))
    assert found.memory.value >= max(rate.value for rate in found.gemv.values())
    if ops.available_isas():
        assert len(names) == 8
        assert said == []


def test_through_json_and_back(real):
    found, _ = real
    assert ceilings_from_json(json.loads(json.dumps(found.as_json()))) == found


@pytest.mark.usefixtures("probed")
def test_what_is_counted():
    found = measure_ceilings(constant(), sizes=SMALL)
    assert found.launch.value == pytest.approx(TICK / 6)
    # Two weights of 1 MiB in turns, in one tick.
    assert found.gemv["float32"].value == pytest.approx(2 * 512 * 512 * 4 / TICK)
    assert found.gemv["bfloat16"].value == pytest.approx(2 * 512 * 512 * 2 / TICK)
    assert found.products["float16"].value == pytest.approx(2 * 32 * 512 * 512 / TICK)
    assert found.memory.value == pytest.approx(3 * MIB / TICK)
    assert "triad, before copy 2.1e+03, " in found.memory.source
    assert found.compute["float32"].value == found.products["float32"].value
    assert "float32, before " in found.compute["float32"].source
    assert all(rate.spread == 0 for rate in found.gemv.values())


def test_what_a_product_takes_beyond_its_weights():
    """Two seconds, and one for every 16384 weights; with four rows, four times as long for a weight."""
    seconds = {(128, 1): 3.0, (256, 1): 6.0, (128, 4): 6.0}
    shapes = []

    def make(features, count):  # noqa: ARG001
        for _ in range(count):
            yield weights.Weight(1, lambda x: shapes.append((x.shape[1], x.shape[0])))

    class ByShape(CpuDevice):
        """A norm takes 12 s, a product what its shape says."""

        def timed(self):
            before = len(shapes)
            return SimpleTimer(lambda: seconds[shapes[-1]] if len(shapes) > before else 12.0)

    device = ByShape()
    form = weights.Form(make, torch.float32, "a product")
    found, launch = pace(device, Windows(device, 7, 0.0), "w4a16", form, 4, FEW)
    assert found.start.value == pytest.approx(2)
    assert found.rows[1].value == pytest.approx(2 * 128**2)
    assert found.rows[4].value == pytest.approx(2 * 4 * 128**2 / 4)
    assert launch.value == 2  # six ops in a norm
    assert launch.spread == 0


class SimpleTimer:
    def __init__(self, taken):
        self.taken = taken

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.seconds = self.taken()


@native
@pytest.mark.usefixtures("probed")
def test_packed_weights_count_as_they_are_stored():
    found = measure_ceilings(constant(), sizes=SMALL)
    of = {name: rate.value * TICK for name, rate in found.gemv.items()}
    four, eight = 512 * 512 // 2, 512 * 512
    groups, rows = 512 * 4 * 2, 512 * 2  # bytes of scales
    assert of["w4a16"] == pytest.approx(8 * (four + groups), rel=0.02)
    assert of["w8a16"] == pytest.approx(4 * (eight + groups), rel=0.02)
    assert of["w8a8"] == pytest.approx(4 * (eight + rows), rel=0.02)
    assert of["w4a8"] == of["w4a4"] == pytest.approx(8 * (four + rows), rel=0.02)


@native
@pytest.mark.usefixtures("probed")
def test_a_cpu_computes_16_bits_in_float32_and_instructions_alone_count():
    found = measure_ceilings(constant(1.0), sizes=SMALL)  # on so slow a clock the probes are the fastest
    assert {kind: rate.value for kind, rate in found.compute.items()} == {
        "float32": 3e9,
        "float16": 3e9,
        "bfloat16": 3e9,
        "int8": 5e9,
    }
    assert "probe of float32, before " in found.compute["bfloat16"].source
    assert "w8a8 " in found.compute["int8"].source
    assert found.memory.value == 2e9
    assert ": read, before copy" in found.memory.source


@pytest.mark.usefixtures("probed")
def test_a_slow_device_gets_smaller_weights():
    big = replace(SMALL, features=1024)
    found = measure_ceilings(constant(0.06), sizes=big)
    assert "1 x 512 x 512" in found.gemv["float32"].source
    assert "32 x 512 x 512" in found.products["float32"].source
    assert "1 x 1024 x 1024" in measure_ceilings(constant(0.04), sizes=big).gemv["float32"].source


@pytest.mark.usefixtures("probed")
def test_a_fast_device_gets_larger_products():
    found = measure_ceilings(constant(), sizes=replace(SMALL, most_features=1024, most_rows=64))
    assert "1 x 1024 x 1024" in found.gemv["bfloat16"].source
    assert found.gemv["bfloat16"].value == pytest.approx(2 * 1024 * 1024 * 2 / TICK)
    assert "64 x 512 x 512" in found.products["bfloat16"].source
    assert found.products["bfloat16"].value == pytest.approx(2 * 64 * 512 * 512 / TICK)


class Gpu(Clocked):
    """As a GPU says what it is; it computes on the CPU all the same."""

    kind = "accelerator"

    def info(self):
        return {"name": "NVIDIA L4", "multiprocessors": 58, "capability": "8.9", "memory_bytes": 22 * 2**30}


@pytest.mark.usefixtures("probed")
def test_what_the_sheet_adds_and_what_the_device_has_no_kernel_for(monkeypatch):
    monkeypatch.setattr(measured, "cache_bytes", lambda _: None)
    monkeypatch.setattr(weights, "explain", no_kernel)
    said = []
    found = measure_ceilings(Gpu(itertools.repeat(TICK)), said.append, SMALL)
    sheet = SHEETS["L4"]
    assert found.compute["int4"] == sheet.compute["int4"]
    assert not found.compute["int4"].measured
    assert (found.sparse24, found.watts, found.memory_bytes) == (2.0, 72.0, 22 * 2**30)
    assert set(found.gemv) == {"float32", "bfloat16", "float16"}
    assert [line for line in said if line.startswith("w4a4")] == ["w4a4: not measured: no such kernel"]
    assert "read" not in found.memory.source, "a CPU's"
    assert "probe" not in found.compute["float32"].source
    for name, needs in (("_int_mm", "int8"), ("_scaled_mm", "float8")):
        assert needs in found.compute or any(line.startswith(name) for line in said)
    old = Gpu(itertools.repeat(TICK))
    old.info = lambda: Gpu.info(old) | {"capability": "8.0", "multiprocessors": 7}
    found = measure_ceilings(old, sizes=SMALL)
    assert not {"float8", "int4"} & set(found.compute), "too old for the one, and a slice has no sheet"
    assert (found.sparse24, found.watts) == (1.0, None)


def no_kernel(_):
    raise ValueError("no such kernel")


@pytest.mark.usefixtures("probed")
def test_too_little_memory_is_said(monkeypatch):
    monkeypatch.setattr(measured, "cache_bytes", lambda _: 4 * MIB)
    said = []
    measure_ceilings(Clocked(itertools.repeat(TICK), free=8 * MIB), said.append, replace(SMALL, caches=4))
    assert any("arrays of 2 MiB, which the cache may hold in part" in line for line in said)
    said.clear()
    few = replace(SMALL, caches=4, paces=replace(FEW, rows=(1,), small=512, large=1024))  # fewer weights fill a cache
    found = measure_ceilings(constant(), said.append, few)
    assert "arrays of 16 MiB" in found.memory.source, "four times the cache"
    assert "16 weights in turns" in found.gemv["float32"].source
    assert not any("arrays" in line for line in said)
    assert found.cache_bytes == 4 * MIB


def test_an_unsteady_figure_is_refused(monkeypatch):
    monkeypatch.setattr(windows, "_PAUSE", 0)
    device = Clocked(itertools.cycle([TICK, 5 * TICK]))
    sizes = replace(SMALL, limit=LIMIT)
    said = r"^memory, copy: the spread of 7 windows is \d\.\d+ of their median, above 0.3, 3 times in a row: stop "
    with pytest.raises(ValueError, match=said) as error:
        measure_ceilings(device, sizes=sizes)
    assert "stop what else runs on cpu, or name a device for the ceilings of its maker's sheet" in str(error.value)
    assert "\n" not in str(error.value)
    assert device.blocks == 1 + 3 * 7


@pytest.mark.usefixtures("probed")
def test_a_burst_is_measured_again(monkeypatch):
    monkeypatch.setattr(windows, "_PAUSE", 0)
    noisy, calm = [TICK, 9 * TICK, TICK, 9 * TICK, TICK, 9 * TICK, TICK], [2 * TICK] * 7
    device = Clocked([TICK, *noisy, *calm])
    rate = Windows(device, 7, 0).rate("some", 6.0, lambda: None, "")
    assert rate.value == pytest.approx(3 / TICK)
    assert rate.spread == 0
    assert device.blocks == 15


def test_median_and_spread():
    device = Clocked([1, *(0.96, 0.98, 0.99, 1.0, 1.01, 1.02, 50.0)])
    rate = Windows(device, 7, 0).rate("some", 1.0, lambda: None, "")
    assert rate.value == 1
    assert rate.spread == pytest.approx(0.04)  # quartiles of seven are the second and the sixth


def test_short_calls_fill_a_window():
    calls = []
    device = Clocked([0.001, *[0.02] * 7])
    rate = Windows(device, 7, 0.02).rate("some", 1.0, lambda: calls.append(0), "")
    assert len(calls) == 2 + 7 * 20
    assert rate.value == pytest.approx(1000)


def test_a_core_that_is_shared_is_refused(monkeypatch):
    told = iter([(100, 100), (200, 190)])
    monkeypatch.setattr(windows, "_scheduled", lambda: next(told))
    with pytest.raises(
        ValueError, match=r"waited for a core 0\.47 of the time, above 0\.3: stop what else runs on cpu"
    ):
        Windows(constant(), 7, 0).undisturbed(lambda: 1)
    told = iter([(100, 100), (200, 120)])
    assert Windows(constant(), 7, 0).undisturbed(lambda: 1) == 1


@pytest.fixture
def counted(monkeypatch):
    """In place of a measurement; the list grows by one with each."""
    done = []

    def measure(device, say):  # noqa: ARG001
        done.append(1)
        return Ceilings(device.info()["name"], Rate(1e9 * len(done), "measured: copy", spread=0.1), {})

    monkeypatch.setattr(module, "measure_ceilings", measure)
    return done


def test_measured_once_and_kept(counted, tmp_path):
    said = []
    first = ceilings_of(CpuDevice(), tmp_path, say=said.append)
    assert "measuring now" in said[0]
    assert ceilings_of(CpuDevice(), tmp_path, say=said.append) == first
    assert len(counted) == 1
    (path,) = (tmp_path / "ceilings").iterdir()
    assert "kept in" in said[-1]
    assert str(path) in said[-1]
    kept = kept_ceilings(CpuDevice(), tmp_path)
    assert kept.ceilings == first
    assert kept.measured.startswith("20")
    assert kept.measured.endswith("+00:00")
    assert ceilings_of(CpuDevice(), tmp_path, again=True).memory.value == 2e9
    assert ceilings_of(CpuDevice(), tmp_path).memory.value == 2e9


@pytest.mark.parametrize("what", ["torch", "threads", "isa", "driver"])
def test_other_software_is_another_device(counted, tmp_path, monkeypatch, what):
    class Driven(CpuDevice):
        release = "550.1"

        def info(self):
            return super().info() | {"driver": self.release}

    ceilings_of(Driven(), tmp_path)
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9.9")
    elif what == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    elif what == "isa":
        monkeypatch.setattr(module, "isa", lambda: "avx1024")
    else:
        Driven.release = "550.2"
    assert kept_ceilings(Driven(), tmp_path) is None
    ceilings_of(Driven(), tmp_path)
    assert len(counted) == 2
    assert len(list((tmp_path / "ceilings").iterdir())) == 2


def truncated(path):
    path.write_text(path.read_text()[:50])


def binary(path):
    path.write_bytes(b"\xff\xfe\x00")


def changed(**fields):
    def change(path):
        told = json.loads(path.read_text())
        for name, value in fields.items():
            at, key = (told, name) if name in told else (told["ceilings"], name)
            at[key] = value
        path.write_text(json.dumps(told))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        binary,
        lambda path: path.write_text("[]"),
        changed(identity={"schema": 0}),
        changed(measured="yesterday"),
        changed(measured=7),
        changed(memory=None),
        changed(compute={"float33": {}}),
        changed(dense=False),
        changed(watts=-1),
        changed(memory_bytes=True),
    ],
)
def test_a_damaged_file_is_measured_anew(counted, tmp_path, damage):
    ceilings_of(CpuDevice(), tmp_path)
    (path,) = (tmp_path / "ceilings").iterdir()
    whole = path.read_text()
    damage(path)
    said = []
    assert ceilings_of(CpuDevice(), tmp_path, say=said.append).memory.value == 2e9
    assert f"{path}: not used: " in said[0]
    assert len(counted) == 2
    assert set(json.loads(path.read_text())) == set(json.loads(whole))


def test_what_is_refused_is_not_kept(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("launch: unsteady")

    monkeypatch.setattr(module, "measure_ceilings", refuse)
    with pytest.raises(ValueError, match="unsteady"):
        ceilings_of(CpuDevice(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_costs_nothing_but_the_file(counted, tmp_path):
    (tmp_path / "ceilings").write_text("in the way")
    said = []
    assert ceilings_of(CpuDevice(), tmp_path, say=said.append).memory.value == 1e9
    assert "not kept: " in said[-1]
    assert len(counted) == 1


RATE = {"value": 1.0, "source": "s", "measured": False, "quoted": False, "spread": None}


@pytest.mark.parametrize(
    ("where", "rate"),
    [
        ("memory", RATE | {"value": 0}),
        ("memory", RATE | {"value": float("inf")}),
        ("memory", RATE | {"value": float("nan")}),
        ("memory", RATE | {"value": True}),
        ("memory", RATE | {"value": "1"}),
        ("memory", RATE | {"source": ""}),
        ("memory", RATE | {"quoted": 0}),
        ("memory", RATE | {"spread": 0.1}),
        ("memory", RATE | {"spread": -0.1, "measured": True}),
        ("memory", RATE | {"more": 1}),
        ("memory", {"value": 1.0}),
        ("launch", []),
    ],
)
def test_no_rate(where, rate):
    told = Ceilings("d", Rate(1.0, "s"), {}).as_json()
    assert ceilings_from_json(told) == Ceilings("d", Rate(1.0, "s"), {})
    with pytest.raises(ValueError, match=f"^{where}"):
        ceilings_from_json(told | {where: rate})


@pytest.mark.parametrize("missing", Ceilings("d", Rate(1.0, "s"), {}).as_json())
def test_every_field_is_needed(missing):
    told = Ceilings("d", Rate(1.0, "s"), {}).as_json()
    del told[missing]
    with pytest.raises(ValueError, match=missing):
        ceilings_from_json(told)
