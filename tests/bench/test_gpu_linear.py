"""The GPU benchmark as far as it goes without one: the stored weight, what peers are held against, the refusal."""

import pytest
import torch
from remanence.bench import gpu_linear, gpu_peers
from remanence.kernels import reference


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_the_stored_weight_is_what_its_product_is_held_against(bits, group):
    stored = gpu_peers.Stored.random(6, 64, bits, group, device="cpu")
    assert torch.equal(stored.packed, reference.pack(stored.codes, bits))
    w = reference.dequantize(stored.packed, stored.scale, None, bits, 64)
    assert torch.equal(stored.dense(torch.float32), w)
    assert torch.equal(stored.scale.half().float(), stored.scale.float())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="torch sees none"):
        gpu_linear.run()


@pytest.mark.gpu
def test_on_a_gpu_every_contender_is_right(monkeypatch):
    monkeypatch.setattr(gpu_linear, "SIZES", ((1024, 1024),))
    monkeypatch.setattr(gpu_linear, "ROWS", (1, 16, 128))
    monkeypatch.setattr(gpu_linear, "INTEGER_ROWS", (512,))
    rows, checks = gpu_linear.run()
    assert {"remanence", "cublas_bf16", "remanence_w8a8", "torch_int_mm"} <= {row["kernel"] for row in rows}
    assert [check for check in checks if not check["ok"]] == []
