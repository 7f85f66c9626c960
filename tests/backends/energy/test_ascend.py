"""An NPU's power: DCMI through ctypes against a library of ours, npu-smi as its releases print."""

import ctypes
import time

import pytest
from remanence.backends.energy import ascend, npu_smi
from remanence.backends.energy.npu_smi import parse_mapping, parse_power
from remanence.backends.energy.probe import Silent

INIT, POWER, SECOND_INIT = range(3)


@pytest.fixture(scope="module")
def libraries(compiled):
    flags = {"first": (), "second": ("-DSECOND",), "no numbers": ("-DNO_NUMBERS",)}
    return {name: compiled("dcmi_stand_in", *each) for name, each in flags.items()}


@pytest.fixture
def found(libraries, monkeypatch, tmp_path):
    """found(which, index, visible, {KEY: code}), with no npu-smi beside it."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def find(which="first", index=0, shown=None, codes=()):
        for key, code in (dict.fromkeys(range(3), 0) | dict(codes)).items():
            ctypes.CDLL(libraries[which]).stand_in(key, code)
        environ = {} if shown is None else {"ASCEND_RT_VISIBLE_DEVICES": shown}
        return ascend.find(index, environ, ("libdcmi-is-not-here.so", libraries[which]))

    return find


def takes(found, watts):
    """Whether its joules lie between the inner and the outer time of so many watts."""
    (probe,) = found.probes
    assert (probe.scope, probe.method) == ("npu", "measured-power-integrated")
    before = time.monotonic()
    probe.start()
    inner = time.monotonic()
    time.sleep(0.12)
    inner = time.monotonic() - inner
    joules = probe.stop()
    low, high = joules / (time.monotonic() - before), joules / inner
    return low * (1 - 1e-9) <= watts <= high * (1 + 1e-9)


@pytest.mark.parametrize(
    ("which", "index", "shown", "expected"),
    [
        ("first", 0, None, 1000.5),  # as the driver numbers them
        ("first", 1, "", 700.5),
        ("first", 2, None, 300.5),
        ("first", 1, "0,2", 300.5),  # ASCEND_RT_VISIBLE_DEVICES renumbers
        ("no numbers", 0, None, 300.5),  # through the cards
        ("no numbers", 2, None, 1000.5),
        ("second", 2, None, 400.0),
    ],
)
def test_the_chips_power_in_tenths_of_watts(found, which, index, shown, expected):
    assert takes(found(which, index, shown), expected)


def test_the_second_version_that_does_not_start(found):
    assert takes(found("second", 0, codes={SECOND_INIT: -8005}), 1000.5)


@pytest.mark.parametrize(
    ("options", "reason", "remedy"),
    [
        ({"codes": {INIT: -8005}}, "inner fault", "dmesg"),
        ({"codes": {POWER: -8002}}, "does not permit it", "HwHiAiUser"),
        ({"codes": {POWER: -8013}}, "in a container", "outside"),
        ({"codes": {POWER: -8255}}, "does not tell its power", "driver"),
        ({"codes": {POWER: -7}}, "dcmi_get_device_power_info answers with error -7", "npu-smi"),
        ({"index": 3}, "knows the chips [0, 1, 2], asked for chip 3", "npu-smi"),
        ({"index": 1, "shown": "0"}, "ASCEND_RT_VISIBLE_DEVICES=0 leaves no NPU 1", "Name it"),
    ],
)
def test_refusals(found, options, reason, remedy):
    refused = found(**options)
    assert refused.probes == ()
    (missing,) = refused.missing
    assert reason in missing.reason
    assert remedy in missing.remedy


def test_power_that_is_no_longer_told(found, libraries):
    (probe,) = found().probes
    probe.start()
    ctypes.CDLL(libraries["first"]).stand_in(POWER, -8006)
    with pytest.raises(Silent, match="gave no answer in time"):
        probe.stop()


def test_without_a_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (missing,) = ascend.find(0, {}, ("libdcmi-is-not-here.so",)).missing
    assert missing.reason == "libdcmi.so is not found: no Ascend driver"


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """tool(mapping, power): an npu-smi that prints these; @N, @C in `power` are the NPU and chip it was asked for."""

    def make(mapping, power):
        (tmp_path / "mapping").write_text(mapping)
        (tmp_path / "power").write_text(power)
        script = tmp_path / "npu-smi"
        script.write_text(
            f'#!/bin/sh\nif [ "$2" = -m ]; then cat {tmp_path}/mapping; exit; fi\n'
            f'sed "s/@N/$5/; s/@C/$7/" {tmp_path}/power\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    return make


MAPPING = """        NPU ID             Chip ID            Chip Logic ID      Chip Name
        0                  0                  0                  Ascend 910B4
        0                  1                  -                  Mcu
        4                  1                  5                  Ascend 910B4
"""


def test_npu_smi_where_there_is_no_library(tool):
    """The chip that ASCEND_RT_VISIBLE_DEVICES leaves, at the place that npu-smi has it."""
    tool(MAPPING, "\tPower Dissipation(W)           : @N@C.0\n")
    (probe,) = ascend.find(1, {"ASCEND_RT_VISIBLE_DEVICES": "0,5"}, ("libdcmi-is-not-here.so",)).probes
    assert (probe.name, probe.scope, probe.about()["npu"]) == ("npu-smi", "npu", 4)
    before = time.monotonic()
    probe.start()
    inner = time.monotonic()
    time.sleep(0.05)
    inner = time.monotonic() - inner
    joules = probe.stop()
    assert 41 * inner <= joules * (1 + 1e-9)
    assert joules <= 41 * (time.monotonic() - before)


def test_npu_smi_that_tells_no_power(tool):
    tool(MAPPING, "Power Dissipation(W) : NA\n")
    (missing,) = ascend.find(0, {}, ("libdcmi-is-not-here.so",)).missing
    assert missing.reason.endswith("npu-smi does not tell the power of NPU 0, chip 0")


def test_npu_smi_that_fails(monkeypatch, tmp_path):
    (tmp_path / "npu-smi").write_text("#!/bin/sh\necho 'Power(W) : 5'\nexit 1\n")
    (tmp_path / "npu-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert npu_smi.power(0, 0) is None
    assert npu_smi.chips() == {}


@pytest.mark.parametrize(
    ("text", "watts"),
    [
        ("\tNPU ID                         : 0\n\tPower Dissipation(W)           : 93.4\n", 93.4),
        ("        NPU ID            : 5\n        Chip Count : 1\n\n        Real-time Power(W)  : 112.0\n", 112.0),
        ("NPU Real-time Power(W)   : 71\n", 71.0),
        ("Power Usage (W) : 12.8", 12.8),
        ("Power Limit (W) : 300\nPower Usage (W) : 12.8", 12.8),
        ("\tRated Power Dissipation(W)     : 8.0\n", None),  # a constant of the 310
        ("Power Dissipation(W)           : NA\n", None),
        ("Power Usage (0.1W) : 935", 93.5),
        ("Power Usage (0.1 W): 935", 93.5),
        ("Power Usage (mW) : 93500", 93.5),
        ("Power Usage : 93.5 W", 93.5),
        ("Power Usage : 93500 mW\n", 93.5),
        ("Power Usage (real time) (0.1W) : 935", 93.5),
        ("Power Usage : 93.5", 93.5),
        ("Power Usage (%) : 45\nPower Usage (W) : 93.5", 93.5),
        ("Power Usage (%) : 45", None),
        ("Power Usage (kW) : 1", None),
        ("Power Usage (MW) : 93500", None),
        ("Power Usage (W) : 935 mW", None),  # one of the two is not true
        ("", None),
    ],
)
def test_power_as_releases_of_npu_smi_print_it(text, watts):
    assert parse_power(text) == (None if watts is None else pytest.approx(watts))


def test_chips_are_numbered_across_npus():
    assert parse_mapping(MAPPING) == {0: (0, 0), 5: (4, 1)}
