"""What all tests share."""

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _leaves_no_trace():
    """A test, and so the library, leaves process-wide state as it was."""
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    yield
    assert torch.get_default_dtype() == dtype
    pyro.clear_param_store()
