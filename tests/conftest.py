"""What all tests share."""

import pyro
import pytest
import torch

torch.set_num_threads(1)  # the tensors of tests are small: threads would only wait for each other


@pytest.fixture(autouse=True)
def _leaves_no_trace():
    """A test, and so the library, leaves process-wide state as it was."""
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    yield
    assert torch.get_default_dtype() == dtype
    pyro.clear_param_store()
