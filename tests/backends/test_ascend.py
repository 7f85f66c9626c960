"""Ascend devices as far as they go without one: which piece is missing, what a chip is, its peaks."""

import sys
from types import SimpleNamespace

import pytest
import torch
from remanence.backends import ascend, autoload
from remanence.backends.ascend import AscendDevice, platform_peaks, refusal
from remanence.backends.ascend_products import PRODUCTS, product_named
from remanence.backends.device import PEAKS, device, refusals

PLATFORM = """# [Platform Info configuration begin]
[version]
SoC_version=Ascend910B4
[SoCInfo]
ai_core_cnt=20
cube_core_cnt=20
memory_size=34359738368
[AICoreSpec]
cube_freq=1500
[DtypeMKN]
Default=16,16,16
DT_INT8=16,32,16
DT_INT4=16,64,16
[AICoreintrinsicDtypeMap]
0=Intrinsic_vrec|float16,float32
"""


@pytest.fixture
def failed(monkeypatch):
    """failed(text): as if torch-npu were installed, and its import had ended with that."""

    def fail(text, wheel=None):
        wheel = wheel or torch.__version__.partition("+")[0]
        monkeypatch.setattr(autoload, "_failed", [text])
        monkeypatch.setattr(ascend, "_wheel", lambda: wheel)
        monkeypatch.setattr(torch.version, "cuda", None)

    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    return fail


@pytest.mark.parametrize(
    ("said", "missing", "remedy"),
    [
        ("ImportError: libhccl.so: cannot open shared object file", "libhccl.so is not found", "set_env.sh"),
        ("Exception: ASCEND_HOME_PATH :  does not exist. Please run", "CANN is not installed", "set_env.sh"),
        ("ImportError: libascend_hal.so: cannot open shared", "driver's libascend_hal.so is not found", "npu-smi"),
        ("RuntimeError: something of its own", "cannot be loaded: RuntimeError: something of its own", "anew"),
    ],
)
def test_the_missing_piece_and_its_remedy(failed, said, missing, remedy):
    failed(said)
    reason, help_ = refusal(0)
    assert missing in reason
    assert remedy in help_


def test_a_wheel_for_another_torch(failed):
    failed("ImportError: undefined symbol: _ZN2at4_ops", wheel="2.6.0.post5")
    reason, remedy = refusal(0)
    assert reason == f"torch-npu 2.6.0.post5 does not go with torch {torch.__version__.partition('+')[0]}"
    assert remedy == f"pip install torch-npu=={torch.__version__.partition('+')[0]}"


def test_a_torch_for_cuda(failed, monkeypatch):
    failed("RuntimeError: Two accelerators cannot be used at the same time in PyTorch: npu and cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "refuses a torch that is built for CUDA" in refusal(0)[0]


def test_cann_that_is_not_set_up_is_told_by_its_place(failed, monkeypatch):
    failed("ImportError: libascendcl.so: cannot open shared object file")
    monkeypatch.setenv("ASCEND_HOME_PATH", "/opt/cann")
    assert refusal(0) == (
        "CANN at /opt/cann cannot be loaded: libascendcl.so is not found",
        "source /opt/cann/set_env.sh in this shell first",
    )


@pytest.fixture
def npus(monkeypatch):
    """npus(n): torch.npu as torch-npu has it on a machine with so many of them."""

    def there(count, chip="Ascend910B4"):
        module = SimpleNamespace(
            is_available=lambda: count > 0,
            device_count=lambda: count,
            get_device_name=lambda _: chip,
            get_device_properties=lambda _: SimpleNamespace(L2_cache_size=96 * 2**20),
            mem_get_info=lambda _: (30 * 2**30, 32 * 2**30),
        )
        monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace())
        monkeypatch.setattr(autoload, "_failed", [])
        monkeypatch.setattr(ascend, "installed", lambda: True)
        monkeypatch.setattr(ascend, "load", lambda: None)
        monkeypatch.setattr(torch, "npu", module, raising=False)

    return there


def test_no_npu_in_the_machine(npus):
    npus(0)
    reason, remedy = refusal(0)
    assert reason == "torch-npu sees no NPU: no Ascend driver is loaded"
    assert "npu-smi" in remedy
    assert ascend.count() == 0


def test_a_driver_that_does_not_answer(npus, monkeypatch):
    npus(1)

    def fails():
        raise AssertionError("of its own")

    monkeypatch.setattr(torch.npu, "is_available", fails)
    assert ascend.count() == 0


def test_a_number_too_large(npus):
    npus(2)
    assert refusal(2) == ("torch-npu sees 2 NPUs, numbered from 0", "Choose one of them")
    assert ascend.count() == 2


def test_what_an_npu_is(npus):
    npus(1)
    info = AscendDevice(0).info()
    assert info["name"] == "Ascend910B4"
    assert info["product"] == "910B4"
    assert info["memory_bytes"] == 32 * 2**30
    assert AscendDevice(0).free_memory() == 30 * 2**30
    npus(1, "Ascend910A")
    assert AscendDevice(0).info()["product"] is None


@pytest.mark.skipif(ascend.installed(), reason="torch-npu is installed here")
def test_without_the_wheel():
    release = torch.__version__.partition("+")[0]
    assert refusal(0)[0] == "torch-npu is not installed"
    assert f"torch-npu=={release}" in refusal(0)[1]
    assert "npu" in refusals()
    with pytest.raises(ValueError, match=r"device: 'npu:1' cannot be had: torch-npu is not installed\. Here are: cpu"):
        device("npu:1")


def test_making_one_asks_nothing_of_torch_npu():
    npu = AscendDevice(3)
    assert (npu.kind, npu.name) == ("npu", "npu:3")


@pytest.mark.parametrize(
    ("chip", "product"),
    [
        ("Ascend910B1", "910B1"),
        ("Ascend910B2C", "910B2"),
        ("Ascend910B4-1", "910B4"),
        ("Ascend910B4", "910B4"),
        ("Ascend910_9391", "910C"),
        ("910_9362", "910C"),
        ("Ascend310P3", "310P"),
        ("310P", "310P"),
        ("910C", "910C"),
    ],
)
def test_products_by_chip_and_by_name(chip, product):
    assert product_named(chip).name == product


@pytest.mark.parametrize("name", ["Ascend910A", "310B4", "910B5", "", "Ascend910_95", "Ascend910PremiumA"])
def test_other_chips_are_refused(name):
    with pytest.raises(ValueError, match=f"product: '{name}' is not one of 910B1, .*310P"):
        product_named(name)


def test_what_the_310p_lacks():
    lacking = [
        field for field in ("bfloat16", "int4", "per_token", "fused", "sums") if not getattr(PRODUCTS["310P"], field)
    ]
    assert lacking == ["bfloat16", "int4", "per_token", "fused", "sums"]


@pytest.mark.parametrize("below", ["", "latest"])
def test_peaks_from_canns_platform_file(tmp_path, below):
    folder = tmp_path / below / "data/platform_config"
    folder.mkdir(parents=True)
    (folder / "Ascend910B4.ini").write_text(PLATFORM)
    (folder / "Ascend310P3.ini").write_text(PLATFORM)
    peaks = platform_peaks("Ascend910B4", str(tmp_path))
    assert set(peaks) == set(PEAKS)
    assert peaks["float16"].value == peaks["bfloat16"].value == pytest.approx(245.76e12)
    assert peaks["int8"].value == pytest.approx(491.52e12)
    assert "Ascend910B4.ini" in peaks["int8"].source
    assert peaks["memory"] is peaks["float32"] is None
    assert platform_peaks("Ascend310P3", str(tmp_path))["bfloat16"] is None


@pytest.mark.parametrize(
    "text", [None, "nothing", PLATFORM.replace("cube_freq=1500", ""), PLATFORM.replace("16,32,16", "x")]
)
def test_no_peak_is_guessed(tmp_path, text):
    if text is not None:
        (tmp_path / "data/platform_config").mkdir(parents=True)
        (tmp_path / "data/platform_config/Ascend910B4.ini").write_text(text)
    assert set(platform_peaks("Ascend910B4", str(tmp_path)).values()) == {None}
