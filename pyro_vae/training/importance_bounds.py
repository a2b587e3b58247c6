"""The importance-weighted bound, and gradients that reach the guide only through its draws."""

from collections.abc import Sequence
from enum import StrEnum
from math import log
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.pair import Site
from pyro_vae.pairs.sites import (
    by_datum,
    data_plates,
    is_auxiliary,
    is_factor,
    latents,
    observed,
    sample_sites,
    scored,
)
from pyro_vae.training.elbo import (
    DifferentiableELBO,
    are_equal,
    require_reparametrized,
    scored_sites,
)


class Gradient(StrEnum):
    """How the gradient of a bound reaches the guide. The value of the bound is always the same."""

    TOTAL = "total"
    """The gradient of the estimate, through everything that it depends on."""
    STICKING_THE_LANDING = "sticking-the-landing"
    """Only through the draws, without the score of log q. No variance if the guide is exact."""
    DOUBLY_REPARAMETRIZED = "doubly-reparametrized"
    """The score of log q is reparametrized again. Unbiased for any number of importance samples."""


class _Cut(Messenger):
    """Cuts the guide at each draw. Later sites see a leaf with the same value.

    The site keeps the draw itself as ``drawn``. So one run gives densities at given draws. This
    also works for a guide whose levels depend on each other, and for a guide with dropout.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or not getattr(msg["fn"], "has_rsample", False):
            return
        msg["drawn"] = msg["fn"](*msg["args"], **msg["kwargs"])
        msg["value"] = msg["drawn"].detach().requires_grad_()
        msg["done"] = True


class _PathELBO(DifferentiableELBO):
    """An ELBO that can separate how a loss depends on the guide through its draws."""

    def _get_cut_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        try:
            return super()._get_trace(model, _Cut()(guide), args, kwargs)
        except (NotImplementedError, KeyError) as error:
            # A fault of the programs themselves is raised again here, unchanged.
            drawn = poutine.trace(_Cut()(guide)).get_trace(*args, **kwargs)
            poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
            raise UsageError(
                "a gradient only through the draws needs the guide's density at given draws, which "
                f"is not available ({first_line(error)}); use Gradient.TOTAL or `Trace_ELBO`"
            ) from error


class StickingTheLandingELBO(_PathELBO):
    r"""The ELBO, with a gradient that reaches the guide only through its draws.

    :math:`\nabla_\phi = E\big[\nabla_z \log \tfrac{p(x, z)}{q(z|x)}\, \nabla_\phi z\big]`. This
    leaves out the score :math:`\nabla_\phi \log q_\phi(z|x)` at a given z, whose mean is 0. If the
    guide is exact, the gradient is 0 for each draw.

    The arguments are those of ``Trace_ELBO``. Raises `UsageError` for a latent that is not
    reparametrized. Roeder, Wu & Duvenaud, 2017 (https://arxiv.org/abs/1703.09194).

    >>> import torch, pyro_vae as pv
    >>> vae = pv.VAE.mlp((4,))
    >>> loss = StickingTheLandingELBO().differentiable_loss(vae.model, vae.guide, torch.ones(3, 4))
    """

    def _get_trace(self, *args: Any) -> tuple[Trace, Trace]:
        return self._get_cut_trace(*args)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Any = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            sites = list(latents(guide_trace).values())
            require_reparametrized(sites, "sticking the landing needs")
            log_p, log_q = model_trace.log_prob_sum(), guide_trace.log_prob_sum()
            elbo = log_p - log_q.detach()
            for site, slope in _paths(log_p - log_q, sites):
                elbo = elbo + _through(site, slope)
            loss = loss - elbo / self.num_particles
        return loss


class ImportanceWeightedELBO(_PathELBO):
    r"""The importance-weighted bound, which is tighter with each importance sample.

    :math:`\sum_i E\big[\log \tfrac1K \sum_k w_{ik}\big]` with
    :math:`w_{ik} = p(x_i, z_{ik}) / q(z_{ik}|x_i)`. A plate draws the samples in parallel.

    Arguments:
        num_samples: the number K of importance samples for each datum.
        max_plate_nesting: the number of nested plates of the pair, including the data plate.
        gradient: how the gradient reaches the guide. With :math:`\tilde w_k = w_k / \sum_l w_l`,
            the gradient is a sum over samples of :math:`\nabla_z \log w_k\, \nabla_\phi z_k`. Its
            factor is :math:`\tilde w_k` for ``Gradient.STICKING_THE_LANDING``, which is biased if
            K > 1, and :math:`\tilde w_k^2` for ``Gradient.DOUBLY_REPARAMETRIZED``, which is
            unbiased.

    Raises `UsageError` for a site outside the data plate, because the bound would be a joint one
    over the whole batch. Also for a latent that is not reparametrized, and for a site with another
    scale (``poutine.scale``) than the other sites. A scale of all sites, for example of
    subsampling, weighs whole data and not their importance weights. `KLWeight` weighs the KL.
    Burda, Grosse & Salakhutdinov, 2016 (https://arxiv.org/abs/1509.00519); Tucker et al., Doubly
    Reparameterized Gradient Estimators, 2019 (https://arxiv.org/abs/1810.04152).

    >>> import torch, pyro_vae as pv
    >>> vae, objective = pv.VAE.mlp((4,)), ImportanceWeightedELBO(8)
    >>> loss = objective.differentiable_loss(vae.model, vae.guide, torch.ones(3, 4))
    >>> objective = ImportanceWeightedELBO(8, gradient=pv.Gradient.DOUBLY_REPARAMETRIZED)
    >>> loss = objective.differentiable_loss(vae.model, vae.guide, torch.ones(3, 4))
    """

    def __init__(
        self,
        num_samples: int,
        max_plate_nesting: int = 1,
        gradient: Gradient = Gradient.TOTAL,
    ) -> None:
        if gradient not in tuple(Gradient):
            raise UsageError(
                f"must be a member of pyro_vae.Gradient, got {gradient!r}", argument="gradient"
            )
        # Pyro adds its plate of particles only for two or more particles.
        super().__init__(
            num_particles=num_samples,
            vectorize_particles=num_samples > 1,
            max_plate_nesting=max_plate_nesting,
        )

        self.gradient = Gradient(gradient)

    def _get_trace(self, *args: Any) -> tuple[Trace, Trace]:
        if self.gradient == Gradient.TOTAL:
            return super()._get_trace(*args)
        return self._get_cut_trace(*args)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        ((model_trace, guide_trace),) = self._get_traces(model, guide, args, kwargs)
        plates = data_plates(model_trace, guide_trace)
        for name, site in (latents(guide_trace) | scored(model_trace)).items():
            if not is_local(site, plates):
                raise UsageError(
                    f"site '{name}' is outside the data plate, so the importance-weighted bound "
                    "would hold for the whole batch, not for each datum; use `Trace_ELBO`"
                )
        sites = list(latents(guide_trace).values())
        require_reparametrized(sites, "the importance-weighted bound needs")
        scale = _common_scale(model_trace, guide_trace)
        particles = self.num_particles > 1
        log_p, log_q = (_total(t, particles, scale) for t in (model_trace, guide_trace))
        # Terms that are not part of p(x) are not part of the importance weights either.
        extra = sum(s["log_prob_sum"] for s in scored_sites(model_trace) if _is_extra(s))
        extra = extra / self.num_particles
        if self.gradient == Gradient.TOTAL:
            return -(self._bound(log_p - log_q) * scale).sum() - extra
        bound = (self._bound(log_p - log_q.detach()) * scale).sum() + extra
        shares = self._shares((log_p - log_q).detach())
        for site, slope in _paths(log_p - log_q, sites):
            share = shares[(...,) + (None,) * len(site["fn"].event_shape)]
            if self.gradient == Gradient.DOUBLY_REPARAMETRIZED:
                weight = site["scale"] / scale  # of log q in log w, and so of the score
                share = share * (1 - weight + weight * share)
            bound = bound + _through(site, slope * share * scale)
        return -bound

    def _bound(self, log_weights: Tensor) -> Tensor:
        """Return the bound of each datum."""
        if self.num_particles == 1:
            return log_weights
        return log_weights.logsumexp(0) - log(self.num_particles)

    def _shares(self, log_weights: Tensor) -> Tensor:
        """Return the normalized importance weights, in the shape of the plates."""
        if self.num_particles == 1:
            return torch.ones_like(log_weights)
        inner = (1,) * (self.max_plate_nesting - 2)
        return log_weights.softmax(0).reshape(self.num_particles, *inner, -1)


def _paths(log_weight: Tensor, sites: Sequence[Site]) -> list[tuple[Site, Tensor]]:
    """Return the derivative of a log weight by each draw of a cut guide, also via later draws."""
    if not torch.is_grad_enabled():
        return []
    sites = [site for site in sites if "drawn" in site]
    leaves = [site["value"] for site in sites]
    slopes = _slopes(log_weight.sum(), leaves)
    for i, site in reversed(list(enumerate(sites))):
        further = _slopes(site["drawn"], leaves[:i], slopes[i])
        slopes[:i] = [slope + more for slope, more in zip(slopes, further, strict=False)]
    return list(zip(sites, slopes, strict=True))


def _slopes(value: Tensor, leaves: Sequence[Tensor], weight: Tensor | None = None) -> list[Tensor]:
    if not leaves or not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(
        value, leaves, weight, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return list(found)


def _through(site: Site, slope: Tensor) -> Tensor:
    """Return 0 with a gradient: ``slope`` times that of the site's draw."""
    reached = (slope.detach() * site["drawn"]).sum()
    return reached - reached.detach()


def _common_scale(model_trace: Trace, guide_trace: Trace) -> Any:
    """Return the scale that all sites share, without the weight on the KL."""
    first, *others = observed(model_trace).values()
    for site in (*others, *latents(model_trace).values(), *latents(guide_trace).values()):
        if not are_equal(site["scale"], first["scale"] * site.get("kl_weight", 1.0)):
            raise UsageError(
                f"site '{site['name']}' and site '{first['name']}' have different scales, but the "
                "importance-weighted bound needs the same scale for all; weigh the KL by beta "
                "(KLWeight), or use `Trace_ELBO`"
            )
    return first["scale"]


def _is_extra(site: Site) -> bool:
    """Whether a site is a term of the objective that is not part of p(x, z)."""
    return site["is_observed"] and is_auxiliary(site) and not is_factor(site)


def _total(trace: Trace, particles: bool, scale: Any) -> Tensor:
    sites = [s for s in sample_sites(trace).values() if not _is_extra(s)]
    terms = (site["log_prob"] / scale for site in sites)
    return sum((by_datum(term, particles) for term in terms), torch.zeros(()))
