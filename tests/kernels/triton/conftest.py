"""The same tests on two machines: in Triton's interpreter on CPU tensors, and on a GPU (`-m gpu`).

Which one is chosen for the whole process, in tests/conftest.py.
"""

import importlib.util
import os

import pytest
import torch

GPU = torch.cuda.is_available()


def _teach_the_interpreter_bfloat16():
    """Triton 3.9's interpreter keeps bfloat16 as uint16: it subtracts and multiplies those bits as integers, and cuts
    float32 off where every GPU rounds."""
    import numpy as np
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    if isinstance(tl.sum, triton.runtime.JITFunction):
        raise pytest.UsageError("triton was imported before its interpreter was chosen: set TRITON_INTERPRET=1")

    builder = interpreter.InterpreterBuilder
    dot, binary, cast = builder.create_dot, builder.binary_op, builder.cast_impl

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def narrow(handle):
        rounded = torch.from_numpy(np.ascontiguousarray(handle.data)).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def binary_op(self, lhs, rhs, op):
        if lhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        return narrow(binary(self, wide(lhs), wide(rhs), op))

    def cast_impl(self, src, dst_type):
        match src.dtype.scalar, dst_type.scalar:
            case tl.float32, tl.bfloat16:
                return narrow(src)
            case tl.bfloat16, tl.float32:
                return wide(src)
        return cast(self, src, dst_type)

    builder.binary_op, builder.cast_impl = binary_op, cast_impl
    builder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)


# The poisoned memory of tests/kernels asks for deterministic algorithms, and cuBLAS then for this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Without Triton each file is skipped, and says why.
if not GPU and importlib.util.find_spec("triton"):
    _teach_the_interpreter_bfloat16()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "interpreter" and GPU:
        pytest.skip("kernels are compiled in this process; CUDA_VISIBLE_DEVICES= gives the interpreter")
    if request.param == "cuda" and not GPU:
        pytest.skip("no GPU")
    return torch.device("cpu" if request.param == "interpreter" else "cuda")


@pytest.fixture(autouse=True)
def quiet_numpy():
    """The interpreter's NumPy warns of the NaN and the overflows that tests ask for; a GPU does not."""
    import numpy as np

    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def isa():
    """Nothing here depends on the CPU's instruction set."""
