"""NVML through ctypes, against a library of ours that stands for it: which GPU is read, its counter, its refusals."""

import ctypes
import time

import pytest
from remanence.backends.energy import nvml
from remanence.backends.energy.probe import Silent

INIT, ENERGY, POWER, MIG_CODE, MIG, MILLIWATTS = range(6)
UUIDS = "aaaaaaaa-0000-0000-0000-000000000000", "bbbbbbbb-0000-0000-0000-000000000000"


@pytest.fixture(scope="module")
def library(compiled):
    return compiled("nvml_stand_in")


@pytest.fixture
def found(library):
    """found(index, uuid, environ, KEY=value, ...) of two GPUs that take 50 W and 100 W, unless set otherwise."""

    def find(index=0, uuid=None, environ=(), settings=()):
        settings = dict.fromkeys(range(5), 0) | {MILLIWATTS: 50_000, MIG_CODE: 3} | dict(settings)
        for key, value in settings.items():
            ctypes.CDLL(library).stand_in(key, ctypes.c_longlong(value))
        return nvml.find(index, uuid, dict(environ), library)

    return find


def gpu(found):
    (probe,) = found.probes
    return probe.about()["gpu"][-1]


def watts(probe):
    """Between what the inner and the outer time make of its joules."""
    outer = time.perf_counter()
    probe.start()
    inner = time.perf_counter()
    time.sleep(0.1)
    inner = time.perf_counter() - inner
    joules = probe.stop()
    return joules / (time.perf_counter() - outer), joules / inner


def test_the_counter(found):
    (probe,) = found().probes
    assert (probe.name, probe.scope, probe.method) == ("nvml", "gpu", "measured-counter")
    low, high = watts(probe)
    assert low <= 50.02
    assert high >= 49.98  # it counts whole millijoules
    low, high = watts(found(1).probes[0])
    assert low <= 100.02
    assert high >= 99.98


def test_power_where_there_is_no_counter(found):
    (probe,) = found(settings={ENERGY: 3}).probes
    assert probe.method == "measured-power-integrated"
    low, high = watts(probe)
    assert low <= 50.01
    assert high >= 49.99


def test_what_decides_its_figures(found):
    (probe,) = found().probes
    assert probe.about() == {
        "gpu": "GPU number 0",
        "driver": "570.1",
        "power_limit_w": 350.0,
        "ecc": None,  # this library is too old to tell
        "mig": False,
        "temperature_c": 41,
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 3201,
    }


@pytest.mark.parametrize(
    ("shown", "index", "uuid", "number"),
    [
        (None, 1, None, "1"),
        ("1", 0, None, "1"),
        ("1, 0", 1, None, "0"),
        ("GPU-bbbbbbbb-0000-0000-0000-000000000000,0", 0, None, "1"),
        ("GPU-bb", 0, None, "1"),  # CUDA takes the beginning of one
        ("0,1", 0, UUIDS[1], "1"),  # CUDA numbers by speed; its UUID says which it is
    ],
)
def test_which_gpu(found, shown, index, uuid, number):
    assert gpu(found(index, uuid, {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown})) == number


@pytest.mark.parametrize(
    ("settings", "reason", "remedy"),
    [
        ({INIT: 9}, "driver is not loaded", "nvidia-smi"),
        ({INIT: 18}, "different releases", "Restart"),
        ({ENERGY: 4}, "does not permit it to this user", "root"),
        ({ENERGY: 3, POWER: 4}, "does not permit it to this user", "root"),
        ({ENERGY: 3, POWER: 3}, "does not tell its energy or power", "Volta"),
        ({ENERGY: 15}, "fallen off the bus", "Restart"),
        ({ENERGY: 999}, "answers with error 999", "nvml.h"),
        ({MIG_CODE: 0, MIG: 1}, "split by MIG", "without MIG"),
    ],
)
def test_refusals(found, settings, reason, remedy):
    refused = found(settings=settings)
    assert refused.probes == ()
    (missing,) = refused.missing
    assert missing.probe == "nvml"
    assert reason in missing.reason
    assert remedy in missing.remedy


@pytest.mark.parametrize(
    ("index", "shown", "uuid", "reason"),
    [
        (0, "MIG-1234", None, "split by MIG"),
        (1, "0", None, "CUDA_VISIBLE_DEVICES=0 leaves no GPU 1"),
        (0, "", None, "CUDA_VISIBLE_DEVICES= leaves no GPU 0"),
        (0, "-1", None, "CUDA_VISIBLE_DEVICES=-1 leaves no GPU 0"),
        (0, "GPU-cc", None, "does not find this GPU"),
        (0, "0", "cccccccc-0000-0000-0000-000000000000", "does not find this GPU"),
        (0, "5", None, "argument for invalid"),
    ],
)
def test_a_gpu_that_is_not_there(found, index, shown, uuid, reason):
    refused = found(index, uuid, {"CUDA_VISIBLE_DEVICES": shown})
    assert refused.probes == ()
    assert reason in refused.missing[0].reason


def test_without_the_library():
    (missing,) = nvml.find(0, environ={}, library="libnvidia-ml-is-not-here.so").missing
    assert missing.reason == "libnvidia-ml-is-not-here.so is not found: no NVIDIA driver"


def test_a_counter_that_stands_still_and_one_that_fails_are_no_zero(found, library):
    (probe,) = found(settings={MILLIWATTS: 0}).probes
    probe.start()
    with pytest.raises(Silent, match="stood still"):
        probe.stop()
    (probe,) = found().probes
    probe.start()
    ctypes.CDLL(library).stand_in(ENERGY, ctypes.c_longlong(15))
    with pytest.raises(Silent, match="nvml: the GPU has fallen off the bus"):
        probe.stop()
