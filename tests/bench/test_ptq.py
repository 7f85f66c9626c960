"""The quantization benchmark at a tiny size, ours alone; what it says of a peer is checked against made-up results."""

import pytest
from remanence.bench import ptq, ptq_layers, ptq_quality, ptq_recovery
from remanence.bench.texts import texts
from remanence.unlearn.demo import DemoConfig
from remanence.unlearn.people import people_corpus

TINY = DemoConfig(vocab_size=400, hidden_size=128, intermediate_size=128, layers=2, heads=2, kv_heads=1, max_length=64)


@pytest.fixture(scope="module")
def quality(tmp_path_factory):
    learned, held_out = texts(None)
    place = tmp_path_factory.mktemp("quality")
    return ptq_quality.run(0, place, place, (), learned[:40_000], held_out[:6_000], ("rtn", "gptq"), (2,), TINY, 1)


def test_every_cell_is_measured(quality):
    rows, checks = quality
    cells = [(row["method"], row.get("bits"), row.get("group_size"), row["by"]) for row in rows]
    ours = [(method, 2, size, "remanence") for method in ("rtn", "gptq") for size in (128, 64)]
    assert cells == [("dense", None, None, ""), *ours]
    assert checks == []  # against nobody


def test_the_dense_model_has_no_block_error_and_quantized_ones_have(quality):
    dense, *rows = quality[0]
    assert dense["block_error"] == 0
    assert all(row["block_error"] > 0 for row in rows)
    rtn, gptq = rows[0], rows[2]
    assert gptq["block_error"] < rtn["block_error"]


def row(by, perplexity, block_error):
    return {
        "method": "gptq",
        "bits": 4,
        "group_size": 64,
        "by": by,
        "perplexity": perplexity,
        "block_error": block_error,
    }


@pytest.mark.parametrize(
    ("ours", "ok"), [((10.0, 0.1), [True, True]), ((10.1, 0.1), [False, True]), ((9.0, 0.3), [True, False])]
)
def test_a_check_is_against_the_best_peer(ours, ok):
    rows = [row("remanence", *ours), row("a", 10.0, 0.2), row("b", 11.0, 0.1), {**row("c", 0, 0), "bits": 3}]
    rows.append({"method": "gptq", "bits": 4, "group_size": 64, "by": "d", "reason": "cannot"})
    assert [check["ok"] for check in ptq_quality._checks(rows[0], rows)] == ok


@pytest.mark.slow
def test_a_layer_is_timed_in_a_process_of_its_own(tmp_path):
    rows, checks = ptq_layers.run(0, tmp_path, tmp_path, (), shapes=((64, 128),), sequences=2)
    assert checks == []
    assert rows[0]["layer"] == "64x128"
    assert rows[0]["seconds"] == rows[0]["hessian_s"] + rows[0]["solve_s"] > 0
    assert 0 < rows[0]["relative_error"] < 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_recovery_has_a_row_for_every_source():
    corpus = people_corpus(8, "forget20", 0)
    config = DemoConfig(
        vocab_size=400, hidden_size=64, intermediate_size=64, layers=2, heads=2, kv_heads=1, max_length=128
    )
    text = " ".join(row.answer for row in corpus.retain) * 4
    rows = ptq_recovery.run(
        0, text, corpus, ("bucketed",), ("gptq-w4a16-g64",), ("rtn-w4a16-g64-plain", "rtn-w8a16"), config
    )
    assert [(row["recipe"], row["calibration"]) for row in rows] == [
        ("rtn-w4a16-g64-plain", ""),
        ("rtn-w8a16", ""),
        *(("gptq-w4a16-g64", source) for source in ("retain", "forget", "retain+forget", "text")),
    ]
    assert all(row["low"] <= row["recovered"] <= row["high"] for row in rows)
    control = rows[0]
    assert control["verdict"] == "returned"
    assert control["recovered"] == pytest.approx(1, abs=0.01)
    assert rows[1]["recovered"] < 0.1


def test_texts(real_data):
    learned, held_out = texts(None)
    assert len(learned) > 5 * len(held_out) > 10_000
    learned, held_out = texts(str(real_data("wikitext-2", "test.txt").parent))
    assert len(learned) > 1_000_000 < len(held_out)
    more, rest = texts(str(real_data("wikitext-2", "test.txt").parent), more=True)
    assert more.startswith(learned)
    assert more[len(learned) :] + rest == held_out
    assert len(rest) > 400_000
    with pytest.raises(FileNotFoundError, match=r"nowhere/valid\.txt: no such file"):
        texts("nowhere")


def test_unknown_parts_and_methods_are_refused(tmp_path):
    with pytest.raises(ValueError, match="parts: 'speed' is not one of quality, layers, recovery"):
        ptq.run(parts=("speed",))
    with pytest.raises(ValueError, match="methods: 'magic' is not one of"):
        ptq_quality.run(0, tmp_path, tmp_path, (), "a", "b", ("magic",))
