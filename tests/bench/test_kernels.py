"""The kernel benchmark at sizes that take no time: what it times is right, and it would say if it were not."""

import pytest
import torch
from remanence.bench import kernel_contenders, kernel_linear, kernel_model, kernels
from remanence.kernels import ops


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernel_linear, "SIZES", ((128, 256),))
    monkeypatch.setattr(kernel_linear, "ROUNDS", 1)
    monkeypatch.setattr(kernel_linear, "WINDOW_S", 0.0)
    monkeypatch.setattr(kernel_linear, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(kernel_contenders, "_ROTATE", 1 << 16)


def test_every_contender_is_right():
    rows, checks = kernel_linear.measure(0)
    timed = [row for row in rows if "error" in row]
    assert {row["shape"].split()[0] for row in timed} == {f"M={m}" for m in kernel_linear.ROWS}
    for row in timed:
        # Peers' 4 bits are compared with the weights before they were rounded: a tenth.
        dense = row["bits"] > 8 or row["isa"]
        assert row["error"] < (0.2 if not dense else 2e-2 if "A8" in row["kernel"] else 4e-3), row
    assert any("share of the bandwidth" in check["what"] for check in checks)
    assert not any("error" in check["what"] for check in checks)


@pytest.mark.slow
def test_a_wrong_contender_is_seen(monkeypatch):
    monkeypatch.setattr(kernel_contenders, "_weight_only", lambda x, w: torch.zeros(len(x), w.n, dtype=x.dtype))
    _, checks = kernel_linear.measure(0)
    assert any("W4A16 M=1 N=128 K=256: error" in check["what"] and not check["ok"] for check in checks)


@pytest.mark.slow
def test_the_narrow_kernels_leave_the_instruction_set_as_it_was():
    before = ops.isa()
    kernel_linear.measure(0)
    assert ops.isa() == before


def test_a_part_that_is_none_is_refused():
    with pytest.raises(ValueError, match="parts: 'tpu' is not one of linear, model, gpu"):
        kernels.run(parts=("tpu",))


@pytest.mark.slow
def test_a_model_in_turns(monkeypatch):
    monkeypatch.setattr(kernel_model, "CONFIG", kernel_model.CONFIG | {"num_hidden_layers": 1})
    monkeypatch.setattr(kernel_model, "ROUNDS", 1)
    rows, checks = kernel_model.measure(0)
    assert [row["model"] for row in rows] == ["bf16", *kernel_model.RECIPES]
    assert rows[1]["memory_over_bf16"] < 0.5  # with one layer the embeddings weigh more
    assert len(checks) == 3
