"""Makers' sheets: consistent with themselves, found by the names that people use, and never guessed."""

import subprocess
import sys

import pytest
from remanence.backends.ceilings import COMPUTE
from remanence.backends.sheets import _BY_NAME, SHEETS, _plain, sheet_named, sheet_of_gpu

NAMES = ("A100-40G A100-80G H100 H200 L4 RTX4090 B200 MI300X 910B1 910B2 910B3 910B4 910C 310P3").split()
# Tera-operations a second, dense, as published; of Ascend as the reference works them out.
PUBLISHED = {
    ("A100-80G", "bfloat16"): 312,
    ("A100-80G", "int4"): 1248,
    ("H100", "float8"): 1979,
    ("H200", "float32"): 67,
    ("L4", "int8"): 242.5,
    ("RTX4090", "float16"): 165.2,
    ("B200", "int8"): 4500,
    ("MI300X", "float16"): 1307.4,
    ("910B1", "bfloat16"): 363.7,
    ("910B2", "float16"): 353.9,
    ("910B3", "int8"): 589.8,
    ("910B4", "int4"): 983.0,
    ("910C", "int8"): 727.4,
    ("310P3", "float16"): 69.5,
}
PLATFORM = (
    "[SoCInfo]\ncube_core_cnt=10\n[AICoreSpec]\ncube_freq=1000\n"
    "[DtypeMKN]\nDefault=16,16,16\nDT_INT8=16,32,16\nDT_INT4=16,64,16\n"
)


def test_all_are_there():
    assert list(SHEETS) == NAMES
    claims = {(_plain(name), s.name) for s in SHEETS.values() for name in (s.name, *s.aliases, *s.torch_names)}
    assert len(claims) == len(_BY_NAME), "no name means two devices"
    assert all(sheet_named(plain).name == name for plain, name in claims)


@pytest.mark.parametrize(("name", "kind"), PUBLISHED)
def test_published_numbers(name, kind):
    assert SHEETS[name].compute[kind].value == pytest.approx(PUBLISHED[name, kind] * 1e12, rel=1e-3)


@pytest.mark.parametrize("sheet", SHEETS.values(), ids=lambda sheet: sheet.name)
def test_a_sheet_agrees_with_itself(sheet):
    assert set(sheet.compute) <= set(COMPUTE)
    for rate in (*sheet.compute.values(), sheet.memory, sheet.memory_bytes, sheet.cache_bytes, sheet.sparse24):
        assert rate.source
        assert not rate.measured
        assert rate.quoted or "quoted" not in rate.source
    rates = {kind: rate.value for kind, rate in sheet.compute.items()}
    assert rates["int8"] >= 1.95 * rates["float16"], "dense: int8 is twice the 16-bit rate"
    assert rates["int8"] <= 4.05 * rates["float16"]
    if "float8" in rates:
        assert rates["float8"] == pytest.approx(2 * rates["float16"], rel=0.01)
    if "int4" in rates:
        assert rates["int4"] == pytest.approx(2 * rates["int8"], rel=0.01)
    assert 1 < rates["float16"] / sheet.memory.value < 1000, "operations a byte"
    assert 8 * 2**20 < sheet.cache_bytes.value < sheet.memory_bytes.value / 50


def test_what_devices_have_not():
    assert "bfloat16" not in SHEETS["310P3"].compute
    assert not {"int4"} & {*SHEETS["H100"].compute, *SHEETS["H200"].compute, *SHEETS["B200"].compute}
    assert not any("float8" in SHEETS[name].compute for name in ("A100-40G", "A100-80G", "910B1", "910C", "310P3"))
    assert {name for name, sheet in SHEETS.items() if sheet.sparse24.value == 1} == set(NAMES[8:])
    assert all(SHEETS[name].memory.quoted for name in NAMES[8:])
    assert SHEETS["910B3"].memory.value == 1200e9
    assert "1600" in SHEETS["910B3"].memory.source


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("A100", "A100-80G"),
        ("a100-40g", "A100-40G"),
        ("H100 SXM", "H100"),
        ("NVIDIA H200", "H200"),
        ("rtx 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Ascend910B4", "910B4"),
        ("910b2", "910B2"),
        ("Ascend910_9391", "910C"),
        ("Ascend310P3", "310P3"),
    ],
)
def test_by_name(name, expected):
    assert sheet_named(name).name == expected


@pytest.mark.parametrize(("name", "close"), [("H10O", "H100"), ("910B5", "910B4"), ("A1000", "A100"), ("", None)])
def test_another_name(name, close):
    with pytest.raises(ValueError, match=f"^device: '{name}' is not one of {', '.join(NAMES)}") as error:
        sheet_named(name)
    assert ("did you mean" in str(error.value)) == (close is not None)
    if close is not None:
        assert close in str(error.value).partition("mean")[2]


def test_a_slice_of_a_gpu_is_not_what_the_sheet_is_about():
    assert sheet_of_gpu("NVIDIA H200", 132) is SHEETS["H200"]
    assert sheet_of_gpu("NVIDIA H200", 16) is None
    assert sheet_of_gpu("NVIDIA H201", 132) is None
    assert sheet_of_gpu("H200", 132) is None, "by torch's own name alone"


def test_ceilings(monkeypatch):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    of = SHEETS["A100-40G"].ceilings()
    assert (of.device, of.memory_bytes, of.cache_bytes, of.sparse24, of.watts) == ("A100-40G", 40e9, 40 << 20, 2, 400)
    assert of.memory.value == 1555e9
    assert of.launch is None
    assert not of.gemv
    assert SHEETS["910B4"].ceilings().compute == SHEETS["910B4"].compute


def test_canns_own_file_goes_before_the_table(monkeypatch, tmp_path):
    folder = tmp_path / "data/platform_config"
    folder.mkdir(parents=True)
    (folder / "Ascend910B4.ini").write_text(PLATFORM)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    of = SHEETS["910B4"].ceilings()
    assert of.compute["int8"].value == 10 * 1e9 * 16 * 32 * 16 * 2
    assert "Ascend910B4.ini" in of.compute["int8"].source
    assert of.compute["int4"] == SHEETS["910B4"].compute["int4"], "of which the file's reader says nothing"
    assert SHEETS["910B1"].ceilings().compute == SHEETS["910B1"].compute, "no file of that chip"


def test_takes_no_torch():
    code = (
        "import sys\nfrom remanence.backends.sheets import sheet_named\nfrom remanence.backends.cpu_peaks import "
        "cpu_peaks\nsheet_named('A100').ceilings(); cpu_peaks(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
