"""What is told of a kernel is what runs: beside the dispatcher, the library and the numbers themselves."""

import platform
import re
import sys

import pytest
import torch
from remanence.backends.cpu import cpu_flags
from remanence.kernels import gpu, limits, ops, registry
from remanence.kernels.registry import KERNELS, Case, explain, summary

NAMES = [kernel.name for kernel in KERNELS]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
native = pytest.mark.skipif(not ops.available_isas(), reason="the native kernels are not built")


def cases():
    return [Case(dtype=dtype, act=act) for dtype in DTYPES for act in (None, 4, 8)]


def weight(n=64, k=64):
    """Every weight is 1."""
    codes, scale = torch.full((n, k), 9, dtype=torch.uint8), torch.ones(n, 1)
    return ops.pack(codes, 4), scale


@native
def test_the_native_kernels_are_those_of_the_library():
    """By name, the widest first, as the library lists them narrowest first."""
    available = ops.available_isas()
    assert [name for name in NAMES if name in available] == available[::-1]


def test_what_is_chosen_runs(isa):
    """On every instruction set in turn (conftest.py)."""
    for case in cases():
        choice = explain(case)
        assert choice.kernel == ("reference" if isa == "none" else isa)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"remanence::{case.op}", "CPU") == (isa != "none")
        assert set(choice.others) == set(NAMES) - {choice.kernel}
        assert all(choice.others.values())


def test_bfloat16_is_multiplied_as_said(isa):
    """The dot product of bfloat16 takes numbers below the normal ones for zeros; in float32 they are what is left."""
    packed, scale = weight()
    tiny = torch.full((1, 64), 2.0**-130)
    tiny[0, :3] = torch.tensor([2.0**-60, 2.0**-130, -(2.0**-60)])
    for dtype in (torch.float32, torch.bfloat16):
        y = ops.w4a16_linear(tiny.to(dtype), packed, scale)
        said = explain(Case(dtype=dtype)).arithmetic
        assert said.startswith("bfloat16 pairs") == bool((y == 0).all()), (isa, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_activations_are_multiplied_as_integers(dtype):
    packed, scale = weight()
    x = torch.linspace(-1, 1, 64, dtype=dtype)[None]
    codes, step, _ = ops.quantize_per_token(x, 4)
    exact = (codes.sum(1, dtype=torch.float64) * step[0].double()).to(dtype).expand(64)
    y = ops.integer_linear(x, packed, scale, bits=4, x_bits=4)
    assert torch.equal(y[0], exact)
    assert any(word in explain(Case(dtype=dtype, act=4)).arithmetic for word in ("bytes", "integers"))


@native
def test_why_not_the_wider_and_the_narrower(isa):
    widest = ops.available_isas()[-1]
    others = explain(Case()).others
    for name in set(ops.available_isas()) - {isa}:
        assert others[name] == (f"{isa} is wider" if isa == widest else f"set_isa chose {isa}")
    assert others["reference"] == f"{isa} goes before it"
    assert others["triton"] == "for CUDA devices"


@native
@pytest.mark.skipif(platform.machine() != "x86_64", reason="about x86")
def test_what_this_cpu_lacks(monkeypatch):
    here = cpu_flags()
    assert explain(Case()).others["neon"] == "for aarch64; this is x86_64"
    for kernel, flag in (("avx512_bf16", "avx512_bf16"), ("avx512", "avx512f")):
        assert kernel not in ops.available_isas() or flag in here
    monkeypatch.setattr(registry.ops, "available_isas", lambda: ["scalar", "avx2"])
    monkeypatch.setattr(registry.ops, "isa", lambda: "avx2")
    monkeypatch.setattr(registry, "cpu_flags", lambda: frozenset({"avx2", "fma", "f16c", "avx512f"}))
    others = explain(Case()).others
    assert others["avx512"] == "this CPU lacks avx512bw, avx512vl, avx512dq"
    assert others["avx512_bf16"].endswith("avx512_vnni, avx512_bf16")
    monkeypatch.setattr(registry, "cpu_flags", frozenset)
    assert explain(Case()).others["avx512"] == "not in this build, or this CPU"


@pytest.mark.parametrize(
    "change", [{"bits": 5}, {"k": 100, "group": 64}, {"group": 0}, {"dtype": torch.float64}, {"act": 9}, {"act": 1}]
)
def test_what_the_op_refuses_no_kernel_takes(change):
    case = Case(**change)
    with pytest.raises(ValueError, match=r"^\w+: ") as told:
        explain(case)
    if "group" in change:
        return  # the op is given the scales, not the size of a group
    x = torch.zeros(1, 64, dtype=case.dtype)
    packed, scale = weight()
    grid = {} if case.act is None else {"x_bits": case.act}
    with pytest.raises(ValueError, match=re.escape(str(told.value))):
        (ops.w4a16_linear if case.act is None else ops.integer_linear)(x, packed, scale, bits=case.bits, **grid)


def test_on_cuda_triton_gives_its_own_reasons(monkeypatch):
    if not torch.cuda.is_available():
        assert explain(Case("cuda")).others["triton"] == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "why_not", lambda _: "Triton is not installed")
    assert explain(Case("cuda")).kernel == "reference"
    assert summary("cuda") == "plain torch (Triton is not installed)"
    monkeypatch.setattr(gpu, "why_not", lambda _: None)
    assert explain(Case("cuda")).kernel == summary("cuda") == "triton"
    assert explain(Case("cuda")).others["scalar"] == "for the CPU"
    monkeypatch.setattr(registry, "_registered", lambda op, key: (op, key) == ("w4a16_linear", "CUDA"))
    assert explain(Case("cuda", act=8)).others["triton"] == "has no integer_linear"


def test_without_triton_plain_torch_computes_on_a_gpu(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "remanence.kernels.triton", None)
    for cached in (gpu._launch, gpu.why_not):
        cached.cache_clear()
    try:
        assert gpu.why_not(torch.device("cuda", 7)) == "Triton is not installed: pip install remanence[cuda]"
        assert gpu.why_not(torch.device("cuda", 7))
        assert [record.message for record in caplog.records] == [
            "cuda:7: plain torch computes: Triton is not installed: pip install remanence[cuda]"
        ]
        twice = gpu.implementation("hadamard", lambda x: 2 * x)
        assert torch.equal(twice(torch.ones(2, dtype=torch.float64)), torch.tensor([2.0, 2.0], dtype=torch.float64))
    finally:
        for cached in (gpu._launch, gpu.why_not):
            cached.cache_clear()


def test_a_few_words(isa):
    assert summary("cpu") == ("plain torch (the native kernels are not built)" if isa == "none" else isa)


@native
def test_what_the_cpu_gives_is_measured():
    found = limits.peaks(repeats=1)
    assert found["int8"] > 0
    assert ("bfloat16" in found) == ops.isa().endswith("bf16")
    assert limits.read_bandwidth(1 << 20, 1) > 1e8
