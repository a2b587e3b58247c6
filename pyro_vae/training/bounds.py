"""Bounds that treat parts of the KL differently: free bits and total correlation."""

from math import log
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.errors import UsageError
from pyro_vae.pairs import masks
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.pair import Site
from pyro_vae.pairs.sites import data_plates, factorizes, latents, same_order, sample_sites, site_kl
from pyro_vae.training.elbo import (
    DifferentiableELBO,
    are_equal,
    require_reparametrized,
    scored_sites,
)


class FreeBitsELBO(DifferentiableELBO):
    r"""The bound in which the KL of each latent unit counts with at least a floor.

    :math:`E_q[\log p(x|z)] - \sum_j \max(\lambda, \mathrm{KL}_j)`, where :math:`\mathrm{KL}_j` is
    the mean over the minibatch of the KL of unit j. If the distributions of a site do not split
    into units, the whole site is one unit. The KL has closed form if torch provides it and if model
    and guide draw latents in the same order. Global and group latents are not codes, so they have
    no floor.

    Arguments:
        free_bits: the floor :math:`\lambda`, in nats for each unit.

    The bound is below the ELBO. A KL without closed form is estimated. Estimates that fall under
    the floor by chance lower the bound further. The tools report the ELBO itself as ``elbo``.
    Kingma et al., 2016 (https://arxiv.org/abs/1606.04934).

    >>> import torch, pyro_vae as pv
    >>> vae = pv.VAE.mlp((4,))
    >>> loss = FreeBitsELBO(0.1).differentiable_loss(vae.model, vae.guide, torch.ones(3, 4))
    """

    def __init__(self, free_bits: float) -> None:
        super().__init__()
        self.free_bits = free_bits

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        ((model_trace, guide_trace),) = self._get_traces(model, guide, args, kwargs)
        loss: Any = 0.0
        closed = same_order(model_trace, guide_trace)
        plates = data_plates(model_trace, guide_trace)
        for site in scored_sites(model_trace):
            loss = loss - site["log_prob_sum"]
        require_reparametrized(list(latents(guide_trace).values()), "free bits need")
        for name, site in latents(guide_trace).items():
            if name not in model_trace.nodes:
                raise UsageError(f"site '{name}' of the guide has no prior; use `Trace_ELBO`")
            kl = site_kl(sample_sites(model_trace)[name], site, closed)
            if not is_local(site, plates):
                loss = loss + (kl * site["scale"]).sum()
                continue
            batch = site["fn"].batch_shape
            kl = kl.expand(torch.broadcast_shapes(kl.shape, batch + (1,) * (kl.dim() - len(batch))))
            units = kl.reshape(batch.numel(), -1).sum(0)
            live = masks.scored(site).reshape(batch.numel(), -1)
            live = live if len(units) == live.shape[1] else live.any(1, keepdim=True)
            floor = self.free_bits * live.sum(0).to(units.dtype)
            loss = loss + (units.clamp(min=floor) * site["scale"]).sum()
        return loss


class TotalCorrelationELBO(DifferentiableELBO):
    r"""The bound with a separate weight on each of the three parts of the KL.

    :math:`E_q[\log p(x|z)] - \alpha\, I(x; z) - \beta\, \mathrm{KL}(q(z) \| \prod_j q(z_j))
    - \gamma \sum_j \mathrm{KL}(q(z_j) \| p(z_j))` with :math:`q(z) = \tfrac1N \sum_n q(z|x_n)`.
    The parts are the mutual information of datum and code, the total correlation of the units of
    the code, and the KL of the aggregate posterior of each unit. If all three weights are 1, the
    bound is the ELBO, for each draw.

    Arguments:
        num_data: N, the number of training data.
        total_correlation: :math:`\beta`.
        mutual_information: :math:`\alpha`.
        dimension_kl: :math:`\gamma`.

    For a draw of datum i in a minibatch of M, :math:`q(z_i)` is estimated by
    :math:`\tfrac1N q(z_i|x_i) + \tfrac{N-1}{N(M-1)} \sum_{j \ne i} q(z_i|x_j)`. The estimate is
    unbiased for a minibatch drawn without replacement, and exact if the minibatch is all data. Its
    logarithm is biased downwards. The bias is larger if fewer rows of the minibatch are near. A
    weight on the KL (`KLWeight`) multiplies all three parts.

    Raises `UsageError` unless guide and model have exactly one latent site, a local one in the data
    plate only, with independent units in posterior and prior, and with the same prior for all data
    and contexts. Chen et al., Isolating Sources of Disentanglement in VAEs, 2018
    (https://arxiv.org/abs/1802.04942), appendix C.

    >>> import torch, pyro_vae as pv
    >>> vae, objective = pv.VAE.mlp((4,)), TotalCorrelationELBO(100, total_correlation=6.0)
    >>> loss = objective.differentiable_loss(vae.model, vae.guide, torch.ones(3, 4))
    """

    def __init__(
        self,
        num_data: int,
        total_correlation: float = 6.0,
        mutual_information: float = 1.0,
        dimension_kl: float = 1.0,
    ) -> None:
        super().__init__()
        if num_data < 2:
            raise UsageError(f"must be at least 2, got {num_data}", argument="num_data")
        self.num_data, self.total_correlation = num_data, total_correlation
        self.mutual_information, self.dimension_kl = mutual_information, dimension_kl

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        ((model_trace, guide_trace),) = self._get_traces(model, guide, args, kwargs)
        site, prior = _one_factorized(model_trace, guide_trace)
        joint, units = log_aggregate(site["fn"], site["value"], self._log_shares(site["value"]))
        units, log_q = units.sum(1), site["fn"].log_prob(site["value"])
        kl = (
            self.mutual_information * (log_q - joint)
            + self.total_correlation * (joint - units)
            + self.dimension_kl * (units - prior["fn"].log_prob(site["value"]))
        )
        reconstruction = sum(s["log_prob_sum"] for s in scored_sites(model_trace))
        return (kl * site["scale"]).sum() - reconstruction

    def _log_shares(self, z: Tensor) -> Tensor:
        """Return log shares of datum j in q(z) at a draw of datum i, of shape (i, j)."""
        others = (self.num_data - 1) / (self.num_data * max(1, len(z) - 1))
        shares = z.new_full((len(z), len(z)), log(others))
        return shares.fill_diagonal_(-log(self.num_data))


def log_aggregate(fn: Any, z: Tensor, log_shares: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return log densities of a mixture of posteriors, :math:`\sum_j s_{ij} q(z_i|x_j)`.

    Arguments:
        fn: the posteriors of m data.
        z: n codes, of shape (n, *event_shape).
        log_shares: :math:`\log s_{ij}`, of shape (n, m).

    The first result is the log density of each code, of shape (n,). The second is that of each unit
    of a code, of shape (n, units). Dependent units count as one unit.
    """
    q = fn.base_dist if factorizes(fn) else fn
    each = q.log_prob(z[:, None]).reshape(*log_shares.shape, -1)
    joint = (each.sum(-1) + log_shares).logsumexp(1)
    return joint, (each + log_shares[..., None]).logsumexp(1)


def takes_guide_terms(objective: ELBO) -> bool:
    """Whether an objective adds the observed sites of a guide, such as factors, to its loss.

    ``Trace_ELBO`` does.
    """
    kind: Any = type(objective)
    return kind.loss_and_grads is not DifferentiableELBO.loss_and_grads


def _one_factorized(model_trace: Trace, guide_trace: Trace) -> tuple[Site, Site]:
    """Return the only latent site, of guide and of model; reject it if its KL does not split."""
    (name, *others), priors = latents(guide_trace), sample_sites(model_trace)
    if others or name not in priors or len(latents(model_trace)) > 1:
        found = ", ".join(latents(model_trace) | latents(guide_trace))
        raise UsageError(
            f"total correlation needs exactly one latent site with a prior, got {found}; use "
            "`Trace_ELBO`"
        )
    site, prior = latents(guide_trace)[name], priors[name]
    inside = is_local(site, data_plates(model_trace, guide_trace))
    if not inside or len(site["fn"].batch_shape) > 1 or masks.is_masked(site):
        raise UsageError(
            f"total correlation needs latent site '{name}' in the data plate only, without a "
            "mask; use `Trace_ELBO`"
        )
    for fn, what in ((site["fn"], "posterior"), (prior["fn"], "prior")):
        if fn.event_shape and not factorizes(fn):
            raise UsageError(
                f"total correlation needs independent units, but the {what} of '{name}' has "
                f"dependent ones ({type(fn).__name__}); use `Trace_ELBO`"
            )
    require_reparametrized([site], "total correlation needs")
    same = site["value"].detach()[:1].expand(site["value"].shape)
    if not are_equal(log_p := prior["fn"].log_prob(same), log_p[..., :1]):
        raise UsageError(
            f"total correlation needs the same prior for all data, but the prior of '{name}' "
            "depends on the context; use `Trace_ELBO`"
        )
    return site, prior
