"""The weight on the KL, for any objective."""

from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.compat import site_is_subsample
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.sites import is_factor


class KLWeight(Messenger):
    r"""Weighs the KL from outside: multiplies the scale of every unobserved site.

    Around model and guide, it turns ``Trace_ELBO`` into
    :math:`E_q[\log p(x|z)] - \beta\,\mathrm{KL}(q \| p)` (Higgins et al., β-VAE, 2017). The weight
    may be 0, and may be a tensor. A weighed site keeps the weight as ``kl_weight``.

    Arguments:
        weight: the weight for local latents, which each datum has for itself.
        global_weight: the weight for latents outside the data plate, which all N data share, such
            as the weights of a decoder. The bound on a minibatch of M rows has the share M / N of
            their KL, so an epoch adds up to the whole KL. On held-out data the share is 0.

    >>> from pyro.infer import SVI, Trace_ELBO
    >>> import pyro_vae as pv, pyro.optim
    >>> vae, weight = pv.VAE.mlp((4,)), KLWeight(0.5)
    >>> svi = SVI(weight(vae.model), weight(vae.guide), pyro.optim.Adam({}), Trace_ELBO())
    """

    def __init__(self, weight: float | Tensor = 1.0, global_weight: float = 1.0) -> None:
        super().__init__()
        self.weight, self.global_weight = weight, global_weight

    def _pyro_sample(self, msg: Any) -> None:
        if is_factor(msg) and not is_local(msg):  # a term like the priors of global latents
            msg["scale"] = msg["scale"] * self.global_weight
        elif not msg["is_observed"] and not site_is_subsample(msg):
            weight = self.weight if is_local(msg) else self.global_weight
            msg["scale"] = msg["scale"] * weight
            msg["kl_weight"] = msg.get("kl_weight", 1.0) * weight
