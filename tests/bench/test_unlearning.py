"""The benchmark of unlearning methods: what it holds rows against, and that each part runs as a process of its own."""

import pytest
from remanence.bench import unlearning
from remanence.bench.frame import markdown, run


def row(p_forget, p_retain, p_forget_w4):
    return {"p_forget": p_forget, "p_retain": p_retain, "p_forget_w4": p_forget_w4}


def failed(rows):
    return [check["what"] for check in unlearning._checks(rows) if not check["ok"]]


def test_good_rows_pass_every_check():
    rows = dict.fromkeys((*unlearning.FORGETS, *unlearning.SURVIVES), row(0.2, 0.8, 0.25))
    rows["bucketed"] = row(0.05, 0.9, 0.9)
    assert len(unlearning._checks(rows)) == 2 * 6 + 3 + 3
    assert failed(rows) == []


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("rmu", row(0.21, 0.9, 0.2), "rmu: forget probability"),
        ("loku", row(0.1, 0.79, 0.2), "loku: retain probability"),
        ("quail", row(0.1, 0.9, 0.16), "quail: forget probability, rtn-w4a16-g64-plain - full precision"),
        ("bucketed", row(0.06, 0.95, 0.95), "bucketed: forget probability, full precision"),
        ("bucketed", row(0.01, 0.89, 0.95), "bucketed: retain probability, full precision"),
        ("bucketed", row(0.01, 0.95, 0.89), "bucketed: forget probability, rtn-w4a16-g64-plain"),
    ],
)
def test_a_row_that_misses_its_figure_fails(method, values, said):
    assert failed({method: values}) == [said]


@pytest.mark.parametrize(("stored", "ok"), [(1100.0, True), (1101.0, False)])
def test_a_stored_reference_may_cost_a_tenth(stored, ok):
    rows = dict(zip(unlearning._MEMORY, ({"peak_tensors_mib": peak} for peak in (1000.0, stored, 1500.0))))
    assert unlearning._memory_check(rows)["ok"] is ok


def test_an_option_of_another_benchmark_is_refused():
    with pytest.raises(ValueError, match="data-dir: the benchmark startup has no such option"):
        run("startup", 0, data_dir="somewhere")


@pytest.mark.slow
def test_what_goes_wrong_in_a_part_is_said_in_its_words(tmp_path):
    order = {"name": "npo", "target": str(tmp_path), "data_dir": str(tmp_path / "none"), "seed": 0}
    with pytest.raises(RuntimeError, match=r"npo: FileNotFoundError: data-dir: .*none: no such directory"):
        unlearning._apart("method", order)


def test_markdown_starts_a_table_where_the_columns_change():
    assert markdown([{"a": 1, "b": 0.12345}, {"a": 2, "b": None}, {"c": "x"}]).splitlines() == [
        "| a | b |",
        "|---|---|",
        "| 1 | 0.1235 |",
        "| 2 |  |",
        "",
        "| c |",
        "|---|",
        "| x |",
    ]
