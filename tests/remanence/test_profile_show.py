"""A profile on the terminal and as rows: nothing lost, nothing steered by a name, no wider than the terminal."""

import csv
import io
import re

import pytest

from remanence import profile_show
from remanence.profile_show import CSV_COLUMNS, csv_text, show
from remanence.units import figure, printable, si


def shown(profile):
    file = io.StringIO()
    show(profile, file)
    return file.getvalue()


def sections(text):
    """Paragraphs by their first line."""
    return {part.splitlines()[0]: part for part in text.split("\n\n")}


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (13_476_831_232, "B", "13.5 GB"),
        (0.00085, "s", "850 µs"),
        (0.9996, "s", "1.00 s"),
        (999.6e9, "", "1.00 T"),
        (1979e12, "OP/s", "1.98 POP/s"),
        (0, "B", "0 B"),
        (1e-12, "s", "1.00 ps"),
        (1e-16, "s", "1e-16 s"),
        (-0.002, "s", "-2.00 ms"),
        (float("inf"), "s", "inf s"),
        (None, "s", ""),
    ],
)
def test_figures_have_three_digits_and_a_prefix(value, unit, said):
    assert si(value, unit) == said


def test_figures_without_a_unit():
    assert [figure(v) for v in (None, 0.5, 62.14, 999.4, 999.6, 12345.6)] == ["", "0.5", "62.1", "999", "1000", "12346"]


def test_ceilings_say_where_they_come_from(profile):
    text = shown(profile())
    assert re.search(r"memory +4\.37 TB/s +measured, spread 1\.2 % +64 MiB copied", text)
    # Two kinds with one ceiling from one source.
    assert re.search(r"bfloat16, float16 +712 TFLOP/s", text)
    assert re.search(r"int8 +1\.42 POP/s", text)
    sheet = profile(measured=False)
    sheet["device"]["memory"]["quoted"] = True
    text = shown(sheet)
    assert re.search(r"memory +4\.37 TB/s +quoted +NVIDIA H200 data sheet", text)
    assert re.search(r"float32 +48\.0 TFLOP/s +sheet", text)


def test_columns_without_a_value_are_left_out(profile):
    measured, asked = (sections(shown(profile(measured=m)))[PASSES] for m in (True, False))
    assert {"estimate", "measured", "attained"} <= set(measured.split())
    assert not {"estimate", "measured", "attained"} & set(asked.split())
    assert "compute 9" in asked  # the share of the floor that the bound is of


PASSES = "passes: what each does and moves at least (op by op: when every op reads and writes memory)"


def test_modules_sum_to_the_pass(profile):
    for measured, whole in ((True, "measured time"), (False, "floor")):
        found = sections(shown(profile(measured=measured)))[
            f"decode, batch 8, 1 token after 576: shares of the {whole}"
        ]
        lines = found.splitlines()[3:]
        # Eight by name, the others in one line, and the time that lies in none.
        assert len(lines) == 9 + measured
        assert "3 others" in lines[8]
        shares = [float(re.findall(r"([\d.]+) %", line)[0]) for line in lines]
        assert sum(shares) == pytest.approx(100, abs=0.5)
        assert shares[:8] == sorted(shares[:8], reverse=True)
        assert ("in no module" in found) == measured


def test_what_was_not_counted_is_loud(profile):
    missing = [{"op": "aten::foo", "count": 3, "modules": ["model.layers.*.mixer"]}]
    text = shown(profile(uncounted=missing))
    assert text.count("NOT COUNTED") == text.count("aten::foo x 3 in model.layers.*.mixer") == 2
    assert text.index("NOT COUNTED") < text.index("NVIDIA") < text.rindex("NOT COUNTED")
    assert "NOT COUNTED" not in shown(profile())


def test_serving_capacity_and_what_if(profile):
    text = shown(profile())
    assert re.search(r"1 +512 +128 +at least +9\.80 ms +810 µs +1136 +4\.10 GB +yes", text)
    assert re.search(r"measured +21\.0 ms +2\.50 ms +381 +4\.40 GB", text)
    assert "408 sequences of 640 tokens; or 4,096 tokens at batch 1 (no more: the model's own positions" in text
    assert "leaving after 21.4 of 32 layers" in text
    assert "drafting 4 tokens by 8 layers, 71.0 % of them accepted" in text
    assert re.search(r"dense +7\.10 ms +2\.81 ms +13\.5 GB", text)
    assert text.rstrip().endswith("more operations a second do not.")


def test_little_is_enough(profile):
    """Nothing asked for but the floor, by a data sheet."""
    bare = profile(
        measured=False, recipe=None, phases=[], serving=[], sweep=[], exits=None, draft=None, assumed=[], notes=[],
        recommendation="", what_if=[],
        capacity={
            "memory_bytes": None, "largest_batch": None, "at_context": 640, "largest_context": None, "at_batch": 1,
            "limited_by": "memory",
        },
    )  # fmt: skip
    for part in ("memory_bytes", "cache_bytes", "watts"):
        bare["device"][part] = None
    text = shown(bare)
    assert "models/llama-2-7b" in text
    assert "None" not in text
    assert csv_text(bare) == ",".join(CSV_COLUMNS) + "\r\n"


@pytest.mark.parametrize("width", [48, 60, 80, 100, 150])
def test_no_wider_than_the_terminal(profile, monkeypatch, width):
    monkeypatch.setattr(profile_show, "WIDTH", width)
    made = profile()
    text = shown(made)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    # Every pass with every figure, in one table or in more.
    for phase in made["phases"]:
        assert {si(phase[key], "s") for key in ("floor_s", "estimate_s", "measured_s")} <= set(
            re.split(r"  +|\n", text)
        )
        assert si(phase["weight_bytes"], "B") in text


def test_names_steer_nothing(profile):
    evil = "[red]\x1b[31m\u202e<script>\r\n=1+1"
    named = profile(model=evil, notes=[evil])
    named["device"]["device"] = evil
    named["phases"][0]["modules"][0]["module"] = evil
    text = shown(named)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.count(printable(evil)) >= 4
    assert printable(evil).startswith("[red]\N{REPLACEMENT CHARACTER}[31m")


def test_rows_for_a_spreadsheet(profile):
    made = profile()
    rows = list(csv.DictReader(io.StringIO(csv_text(made), newline="")))
    assert rows[0].keys() == CSV_COLUMNS.keys()
    assert len(rows) == sum(1 + len(phase["modules"]) for phase in made["phases"])
    for phase in made["phases"]:
        here = [r for r in rows if all(r[k] == str(phase[k]) for k in ("phase", "batch", "tokens", "context"))]
        total, *parts = here
        assert total["module"] == "total"
        for column in ("flops", "bytes", "floor_s"):
            assert float(total[column]) == phase[column] == pytest.approx(sum(float(part[column]) for part in parts))
        assert total["remainder_s"]
        assert not parts[0]["remainder_s"]
    assert {row["measured_s"] for row in csv.DictReader(io.StringIO(csv_text(profile(measured=False))))} == {""}


@pytest.mark.parametrize("evil", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_spreadsheet_computes_no_name(profile, evil):
    made = profile()
    made["phases"][0]["modules"][0]["module"] = evil
    made["phases"][0]["remainder_s"] = -0.5
    total, row, *_ = csv.DictReader(io.StringIO(csv_text(made), newline=""))
    assert row["module"] == f"'{evil}"
    assert total["remainder_s"] == "-0.5"


def test_cells_are_quoted(profile):
    made = profile()
    name = 'a "b", c\r\nd'
    made["phases"][0]["modules"][0]["module"] = name
    text = csv_text(made)
    assert '"a ""b"", c\r\nd"' in text
    assert list(csv.DictReader(io.StringIO(text, newline="")))[1]["module"] == name
