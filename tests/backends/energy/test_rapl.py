"""RAPL on powercap trees made here: what is counted, once, and what cannot be read."""

from pathlib import Path

import pytest
from remanence.backends.energy import rapl
from remanence.backends.energy.probe import Silent

SPAN = 262_143_328_850
# As a server of two sockets has it: microjoules by zone.
SERVER = {
    "intel-rapl:0": ("package-0", 1_000_000),
    "intel-rapl:0:0": ("core", 500_000),
    "intel-rapl:0:1": ("dram", 200_000),
    "intel-rapl:1": ("package-1", 3_000_000),
    "intel-rapl:1:0": ("dram", 400_000),
    "intel-rapl:2": ("psys", 9_000_000),
    "intel-rapl-mmio:0": ("package-0", 7_000_000),
}


@pytest.fixture
def tree(tmp_path):
    """tree(zones) -> the root; zones within zones are there twice, as under /sys."""

    def make(zones):
        for name, (label, energy) in zones.items():
            nested = tmp_path / name.rpartition(":")[0] / name if name.count(":") > 1 else None
            for zone in filter(None, (tmp_path / name, nested)):
                zone.mkdir(parents=True)
                (zone / "name").write_text(label + "\n")
                (zone / "energy_uj").write_text(f"{energy}\n")
                (zone / "max_energy_range_uj").write_text(f"{SPAN}\n")
        (tmp_path / "intel-rapl").mkdir()  # the control type, which counts nothing
        return tmp_path

    return make


def add(root, zone, microjoules):
    file = root / zone / "energy_uj"
    file.write_text(str(int(file.read_text()) + microjoules))


def test_packages_and_their_memory_are_each_counted_once(tree):
    root = tree(SERVER)
    probes = {probe.name: probe for probe in rapl.find(root).probes}
    assert {name: probe.scope for name, probe in probes.items()} == {
        "rapl-package": "cpu-package",
        "rapl-dram": "dram",
        "rapl-psys": "system",
    }
    assert probes["rapl-package"].about()["zones"] == ["intel-rapl:0", "intel-rapl:1"]
    for probe in probes.values():
        probe.start()
    for at, zone in enumerate(SERVER):
        add(root, zone, 10**at * 1_000_000)
    # Digits from the right are the zones in order: 0 and 3 are packages, 2 and 4 memory, 5 the board.
    assert {name: probe.stop() for name, probe in probes.items()} == {
        "rapl-package": 1_001.0,
        "rapl-dram": 10_100.0,
        "rapl-psys": 100_000.0,
    }


def test_dies_and_amd(tree):
    root = tree(
        {
            "intel-rapl:0": ("package-0-die-0", 0),
            "intel-rapl:1": ("package-0-die-1", 0),
            "intel-rapl:1:0": ("core", 0),
        }
    )
    (probe,) = rapl.find(root).probes
    assert probe.about()["zones"] == ["intel-rapl:0", "intel-rapl:1"]


def test_the_counter_starts_again(tree):
    root = tree(SERVER)
    (root / "intel-rapl:1/energy_uj").write_text(str(SPAN - 2_000_000))
    package = rapl.find(root).probes[0]
    package.start()
    (root / "intel-rapl:1/energy_uj").write_text("3000000")
    add(root, "intel-rapl:0", 500_000)
    assert package.stop() == pytest.approx(5.5)


@pytest.fixture
def barred(monkeypatch):
    """barred(part of a path): nobody may read there, not even root."""
    read_text = Path.read_text

    def bar(part):
        def read(self, *args, **kwargs):
            if part in str(self):
                raise PermissionError(13, "Permission denied", str(self))
            return read_text(self, *args, **kwargs)

        monkeypatch.setattr(Path, "read_text", read)

    return bar


def test_without_permission(tree, barred):
    root = tree(SERVER)
    barred("energy_uj")
    found = rapl.find(root)
    assert found.probes == ()
    assert [each.probe for each in found.missing] == ["rapl-package", "rapl-dram", "rapl-psys"]
    assert "intel-rapl:0/energy_uj: no permission" in found.missing[0].reason
    assert "sudo chmod a+r" in found.missing[0].remedy


def test_one_package_of_two_is_no_total(tree, barred):
    root = tree(SERVER)
    barred("intel-rapl:1/energy_uj")
    found = rapl.find(root)
    assert [probe.name for probe in found.probes] == ["rapl-dram", "rapl-psys"]
    assert [each.probe for each in found.missing] == ["rapl-package"]


def test_permission_that_goes_away(tree, barred):
    root = tree(SERVER)
    package = rapl.find(root).probes[0]
    package.start()
    barred("energy_uj")
    with pytest.raises(Silent, match=r"rapl-package: .*Permission denied"):
        package.stop()


@pytest.mark.parametrize("content", ["", "none"])
def test_a_counter_that_is_no_number(tree, content):
    root = tree(SERVER)
    (root / "intel-rapl:0/energy_uj").write_text(content)
    assert "cannot be read" in rapl.find(root).missing[0].reason


def test_a_machine_without(tmp_path, tree):
    for root in (tmp_path / "none", tree({})):
        (missing,) = rapl.find(root).missing
        assert missing.probe == "rapl"
        assert "in a virtual machine the host keeps them" in missing.reason
        assert "modprobe intel_rapl_msr" in missing.remedy


def test_power_limits(tree):
    root = tree(SERVER)
    (root / "intel-rapl:0/constraint_0_power_limit_uw").write_text("225000000")
    assert rapl.find(root).probes[0].about()["power_limit_w"] == [225.0, None]
