"""What only a GPU shows: capture in a CUDA graph, torch.compile, streams. The other files run there too (`-m gpu`)."""

import pytest
import torch
from remanence.kernels import ops, reference

launch = pytest.importorskip("remanence.kernels.triton.launch", reason="Triton is not installed: pip install triton")

pytestmark = pytest.mark.gpu

N, K, GROUPS = 256, 512, 4


@pytest.fixture
def stored():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    scale = 0.01 + torch.rand(N, GROUPS)
    zero = torch.randint(0, 16, (N, GROUPS), dtype=torch.uint8)
    return tuple(tensor.cuda() for tensor in (reference.pack(codes, 4), scale, zero))


CALLS = {
    "w4a16_linear": lambda x, stored: launch.w4a16_linear(x, *stored, None, 4),
    "integer_linear": lambda x, stored: launch.integer_linear(x, None, None, *stored, None, 4, 8, False, 1.0),
    "dequantize": lambda x, stored: launch.dequantize(*stored, 4, K) + x.sum(),
    "quantize_per_token": lambda x, _: launch.quantize_per_token(x, 8, True, 1.0)[0],
    "hadamard": lambda x, _: launch.hadamard(x),
}


@pytest.mark.parametrize("m", [1, 7, 130])
@pytest.mark.parametrize("name", CALLS)
def test_a_captured_graph_gives_the_same_bits(stored, name, m):
    x = torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
    expected = CALLS[name](x, stored)
    torch.cuda.synchronize()
    graph, given = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = CALLS[name](given, stored)
    given.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("m", [1, 7, 130])
def test_compiled_and_on_a_stream_of_its_own(stored, m):
    x = torch.randn(m, K, device="cuda", dtype=torch.float16)
    expected = torch.nn.functional.silu(ops.w4a16_linear(x, *stored, None, 4))
    compiled = torch.compile(lambda x: torch.nn.functional.silu(ops.w4a16_linear(x, *stored, None, 4)), fullgraph=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = compiled(x)
    torch.cuda.current_stream().wait_stream(side)
    # silu of the same float16 numbers, fused or not: one rounding apart.
    assert torch.allclose(y, expected, rtol=2**-10, atol=2**-14)


def test_a_device_is_supported_or_says_why():
    reason = launch.supports(torch.device("cuda"))
    assert reason is None or "compute capability" in reason
