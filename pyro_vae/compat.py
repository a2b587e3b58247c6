"""The unstable names of torch and Pyro that the library imports, each with the reason.

All of them exist in torch 2.6.0 and 2.14.1, and in Pyro 1.9.1 and 1.9.2.
"""

from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer.util import is_validation_enabled, zero_grads
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    # The active handlers: `pairs/folds.py` asks them which values they give to a latent.
    "_PYRO_STACK",
    # The type of tensors while `make_fx` traces.
    "FakeTensor",
    # Pyro does not have a public function that tells whether validation is on.
    "is_validation_enabled",
    # Masks a density in the same way as `Trace.compute_log_prob`.
    "scale_and_mask",
    # Pyro does not document another way to recognize the subsampling site of a plate.
    "site_is_subsample",
    # Sums over event dimensions.
    "sum_rightmost",
    # Resets gradients in the same way as `SVI.step`.
    "zero_grads",
]
