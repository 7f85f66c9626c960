"""Torch-npu's operators in plain torch, for every test of this folder."""

import pytest
from remanence.bench import ascend_reference


@pytest.fixture(autouse=True)
def operators():
    ascend_reference.install()
    ascend_reference.calls.clear()
