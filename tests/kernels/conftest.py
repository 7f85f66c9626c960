"""What tests of kernels share: memory that shows what was not written, one thread, every instruction set in turn."""

import pytest
import torch
from remanence.kernels import ops


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN (float) or the largest value (integer): a cell left unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def single(one_thread):
    """One thread in every test here."""


@pytest.fixture(autouse=True, params=ops.available_isas() or ["none"])
def isa(request):
    """ "none" where the native kernels are not built: the same tests then ask the reference of itself."""
    before = ops.isa()
    if request.param != before:
        ops.set_isa(request.param)
    yield request.param
    if ops.isa() != before:
        ops.set_isa(before)
