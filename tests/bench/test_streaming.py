"""The streaming benchmark on a model of megabytes: the same steps, killed and resumed through the command line."""

import hashlib
import random
import sys

import pytest
from remanence.bench import streaming
from remanence.bench.streaming import make_model
from remanence.compress.checkpoint import load_model, load_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a limit of address space is enforced on Linux")


def test_a_model_is_of_the_size_that_was_asked_for_and_can_be_loaded(tmp_path):
    size = make_model(tmp_path / "model", 0.01, seed=0)
    assert size / 2**30 == pytest.approx(0.01, rel=0.1)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    model = load_model(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) * 2 == pytest.approx(size, rel=0.01)
    assert len(load_tokenizer(tmp_path / "model")) <= model.config.vocab_size
    # The same seed makes the same files.
    make_model(tmp_path / "again", 0.01, seed=0)
    digests = [
        hashlib.sha256((tmp_path / name / "model-00001-of-00004.safetensors").read_bytes()).digest()
        for name in ("model", "again")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("gib", "shape"), [(6, (4096, 11008, 32000)), (0.3, (1024, 2816, 8000)), (0.01, (256, 768, 2000))]
)
def test_shapes(gib, shape):
    assert streaming._blocks(shape, gib) >= 4


@pytest.mark.slow
def test_killed_and_resumed_under_a_limit():
    rows, checks = streaming.run(seed=0, gib=0.01, limit_gib=1.5, methods=("gptq-w4a16-g64-plain",))
    (row,) = rows
    assert row["equal"] is True
    assert 1 <= row["killed_at_block"] < row["blocks"]
    assert row["below_limit"] is False  # of this model
    assert row["peak_memory_ratio"] == pytest.approx(1, abs=0.15)
    assert row["disk_ratio"] == pytest.approx(1, abs=0.05)
    assert len(checks) == 3
    assert not checks[0]["ok"]  # nothing is shown by a model that fits


def test_a_limit_that_is_too_low_is_an_error(tmp_path):
    """The limit is one: what does not fit fails."""
    make_model(tmp_path / "model", 0.01, seed=0)
    recipe = "rtn-w4a16-g64-plain"
    with pytest.raises(RuntimeError, match=f"streaming: {recipe}: compress ended with"):
        streaming._finished(streaming._start(tmp_path / "model", recipe, tmp_path / "out", 2**28), recipe)
    assert not (tmp_path / "out").exists()


def test_words_do_not_repeat_from_seed_to_seed():
    assert streaming._text(50, 0) == streaming._text(50, 0) != streaming._text(50, 1)
    assert random.Random("0 rtn").random() != random.Random("0 gptq").random()
