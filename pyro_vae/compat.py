"""Every unstable name of torch and Pyro that we import: why, and what it was tried on.

They are there in torch 2.6.0 and 2.14.1, and in Pyro 1.9.1 and 1.9.2.
"""

from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer.util import is_validation_enabled, zero_grads
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    # The handlers that are active, to be left aside for a moment.
    "_PYRO_STACK",
    # What tensors are while `make_fx` traces.
    "FakeTensor",
    # Whether Pyro checks values; no public function tells.
    "is_validation_enabled",
    # The density of a masked site as `Trace.compute_log_prob` makes it.
    "scale_and_mask",
    # Whether a site is a plate's own subsample; Pyro documents no other way to tell.
    "site_is_subsample",
    # A sum over the dimensions of an event.
    "sum_rightmost",
    # What `SVI.step` itself does to gradients.
    "zero_grads",
]
