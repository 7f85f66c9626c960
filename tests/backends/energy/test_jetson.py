"""A Jetson's rails on trees made here, in the layouts of older and newer kernels."""

import time

import pytest
from remanence.backends.energy import jetson


def write(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


HWMON, IIO = "ina3221/1-0040/hwmon/hwmon3", "ina3221x/0-0041/iio:device1"
LABELS = {"in1_label": "VDD_CPU_GPU_CV", "in2_label": "VDD_IN", "in4_label": "sum of shunt voltages"}


@pytest.mark.parametrize(
    ("place", "files", "watts"),
    [
        (HWMON, LABELS | {"in1_input": 5000, "curr1_input": 100, "in2_input": 5000, "curr2_input": 1460}, 7.3),
        (HWMON, LABELS | {"in2_input": 5000, "curr2_input": 1460, "power2_input": 7_250_000}, 7.25),
        (IIO, {"rail_name_0": "POM_5V_IN", "in_power0_input": 3210, "rail_name_1": "POM_5V_CPU"}, 3.21),
    ],
)
def test_the_rail_of_the_whole_module(tmp_path, place, files, watts):
    write(tmp_path / place, files)
    (probe,) = jetson.find(tmp_path).probes
    assert (probe.scope, probe.method) == ("system", "measured-power-integrated")
    before = time.monotonic()
    probe.start()
    inner = time.monotonic()
    time.sleep(0.05)
    inner = time.monotonic() - inner
    joules = probe.stop()
    assert watts * inner <= joules * (1 + 1e-9)
    assert joules <= watts * (time.monotonic() - before)


def test_a_part_is_not_the_whole(tmp_path):
    write(tmp_path / HWMON, {"in1_label": "VDD_GPU_SOC", "in1_input": 5000, "curr1_input": 100})
    found = jetson.find(tmp_path)
    assert found.probes == ()
    assert "(VDD_GPU_SOC) is the whole module's" in found.missing[0].reason


def test_a_rail_that_cannot_be_read(tmp_path):
    write(tmp_path / HWMON, LABELS | {"power2_input": "none"})
    (missing,) = jetson.find(tmp_path).missing
    assert missing.reason.startswith("jetson: ")


def test_another_machine(tmp_path):
    assert jetson.find(tmp_path).missing[0].reason == "no INA3221 monitor: not a Jetson board"
