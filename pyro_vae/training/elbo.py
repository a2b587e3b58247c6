"""The ELBO of a pair, enumerated if needed, and the base of the objectives of this library."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.compat import FakeTensor
from pyro_vae.errors import UsageError
from pyro_vae.pairs import enumeration, summing
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.factored_sums import FactoredBound, is_factored
from pyro_vae.pairs.pair import Batch, Site
from pyro_vae.pairs.sites import data_plates, latents, observed, sample_sites


class DifferentiableELBO(Trace_ELBO):
    """A Pyro ELBO that computes loss and gradients from its ``differentiable_loss``."""

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        return self.differentiable_loss(model, guide, *args, **kwargs).item()


class EnumeratedELBO(TraceEnum_ELBO):
    r"""The ELBO of a pair with discrete latents that are summed out, not drawn.

    The sites to sum out are marked ``infer={"enumerate": "parallel"}``. Let e be the values of
    those that the guide has, and m the values of those that only the model has. The bound is
    :math:`E_{q(z|x,e)} \sum_{e,m} q(e|x)\,r(m|e,x,z) \big[\log p(x,z,e,m) - \log q(z|x,e)
    - \log q(e|x) - \log r(m|e,x,z)\big]` with :math:`r = p(m|x,z,e)`, the exact conditional.

    Arguments:
        num_particles: the number of draws of the other latents for each datum.
        vectorize_particles: whether to draw them in parallel, in a plate.
        max_plate_nesting: the number of nested plates of the pair, including the data plate.

    Loss and gradients equal those of Pyro's ``TraceEnum_ELBO``, also for sites in ``pyro.markov``
    and in plates within a datum. A weight on the KL (`KLWeight`) weighs the KL of every latent, and
    does not change r.

    Raises `UsageError` for an observed site outside the data plate, and for a latent that is
    neither enumerated nor reparametrized. Kingma et al., 2014 (https://arxiv.org/abs/1406.5298).

    >>> import torch, pyro_vae as pv
    >>> mixture = pv.MixtureVAE.mlp((4,), components=3)
    >>> EnumeratedELBO().loss(mixture.model, mixture.guide, torch.ones(8, 4)) > 0
    True
    """

    def __init__(
        self,
        num_particles: int = 1,
        vectorize_particles: bool = False,
        max_plate_nesting: int = 1,
    ) -> None:
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
        )

    loss_and_grads = DifferentiableELBO.loss_and_grads
    loss = DifferentiableELBO.loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        return poutine.trace(replayed).get_trace(*args, **kwargs), guide_trace

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Any = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            self._require(model_trace, guide_trace)
            if is_factored(model_trace, guide_trace):
                loss = loss + _factored_loss(model_trace, guide_trace)
            else:
                loss = loss + _listed_loss(model_trace, guide_trace)
        return loss / self.num_particles

    def _require(self, model: Trace, guide: Trace) -> None:
        plates = data_plates(model, guide)
        for name, site in observed(model).items():
            if not is_local(site, plates):
                raise UsageError(
                    f"site '{name}' is outside the data plate, but sums over discrete latents are "
                    "taken for each datum; use TraceEnum_ELBO"
                )
        for name, site in latents(guide).items():
            if name not in enumeration.enumerated(guide) and not site["fn"].has_rsample:
                raise UsageError(
                    f"latent site '{name}' is neither enumerated nor reparametrized "
                    f'({type(site["fn"]).__name__}); mark it infer={{"enumerate": "parallel"}}'
                )


def _listed_loss(model: Trace, guide: Trace) -> Any:
    loss: Any = 0.0
    terms = summing.terms(model, guide)
    in_model, in_guide = sample_sites(model), sample_sites(guide)
    for name, term in (terms.observed | terms.prior).items():
        loss = loss - (terms.mean(term) * in_model[name]["scale"]).sum()
    for name, term in terms.posterior.items():
        site = in_guide[name] if name in in_guide else in_model[name]
        loss = loss + (terms.mean(term) * site["scale"]).sum()
    return loss


def _factored_loss(model: Trace, guide: Trace) -> Any:
    """The loss if the sums are factored.

    If all sites that depend on m have the scale of m, it needs only their evidence log Z. Otherwise
    the evidence is split into log p of these sites and the KL of m.
    """
    bound, loss = FactoredBound(model, guide), 0.0
    in_model, in_guide = sample_sites(model), sample_sites(guide)
    for name, term in bound.free.items():
        loss = loss - term * in_model[name]["scale"]
    for name, term in bound.posterior.items():
        loss = loss + term * in_guide[name]["scale"]
    if not bound.summed:
        return loss
    scale = _common_scale([in_model[name] for name in bound.summed])
    if all(_is_same(in_model[name]["scale"], scale) for name in bound.dependent):
        return loss - bound.evidence * scale
    for name, term in bound.depending.items():
        loss = loss - term * in_model[name]["scale"]
    return loss + bound.kl * scale


def _common_scale(sites: Sequence[Site]) -> Any:
    scale = sites[0]["scale"]
    for site in sites[1:]:
        if not are_equal(site["scale"], scale):
            raise UsageError(
                f"the enumerated sites '{sites[0]['name']}' and '{site['name']}' have different "
                "scales, but their KL is one joint KL: give them the same scale"
            )
    return scale


def _is_same(a: Any, b: Any) -> bool:
    """Whether two scales are the same; tensors have no values while a graph is traced."""
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def elbo(
    pair: nn.Module, batch: Batch, num_particles: int = 1, vectorize_particles: bool = False
) -> ELBO:
    """Return the ELBO for a pair: `EnumeratedELBO` if it has sites to enumerate, else Trace_ELBO.

    The function runs the pair on two rows of a batch.
    """
    kind: Any = EnumeratedELBO if enumeration.enumerates(pair, batch) else Trace_ELBO
    return kind(
        num_particles,
        vectorize_particles=vectorize_particles,
        max_plate_nesting=enumeration.nesting(pair, batch),
    )


def require_weighable(objective: ELBO | None, beta: Any) -> None:
    """Raise `UsageError` if an objective does not support a weight on the KL."""
    stock = isinstance(objective, TraceEnum_ELBO) and not isinstance(objective, EnumeratedELBO)
    if stock and (callable(beta) or beta != 1):
        raise UsageError(
            f"{type(objective).__name__} does not support a weight on the KL (`beta`) with sums "
            "over discrete latents; use `pyro_vae.EnumeratedELBO`"
        )


def require_reparametrized(sites: Sequence[Site], what: str) -> None:
    """Raise `UsageError` for a site that is not reparametrized; ``what`` names who needs it."""
    for site in sites:
        if not site["fn"].has_rsample:
            raise UsageError(
                f"latent site '{site['name']}' is not reparametrized ({type(site['fn']).__name__}),"
                f" which {what}; use `Trace_ELBO`"
            )


def are_equal(a: Any, b: Any) -> bool:
    """Whether two numbers or tensors are equal up to rounding.

    Tensors have no values while a graph is traced. Then the result is True.
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if isinstance(a, FakeTensor) or isinstance(b, FakeTensor):
        return True
    return bool(torch.isclose(a, b.to(a), rtol=1e-4, equal_nan=True).all())


def scored_sites(model_trace: Trace) -> list[Site]:
    """Return the observed sites of the model, including auxiliary ones."""
    return [site for site in sample_sites(model_trace).values() if site["is_observed"]]
