"""The ELBO of a pair, enumerated where needed, and what all objectives of ours share."""

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
from pyro_vae.pairs.pair import Batch, Site
from pyro_vae.pairs.places import is_local
from pyro_vae.pairs.sites import data_plates, latents, observed, sample_sites


class DifferentiableELBO(Trace_ELBO):
    """A Pyro ELBO whose loss and gradients are those of its ``differentiable_loss``."""

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        return self.differentiable_loss(model, guide, *args, **kwargs).item()


class EnumeratedELBO(TraceEnum_ELBO):
    r"""The ELBO of a pair with discrete latents that are summed out, not drawn.

    With e the values of sites that the guide enumerates and m those of sites that only the model
    has, both marked ``infer={"enumerate": "parallel"}``:
    :math:`E_{q(z|x,e)} \sum_{e,m} q(e|x)\,r(m|e,x,z) \big[\log p(x,z,e,m) - \log q(z|x,e)
    - \log q(e|x) - \log r(m|e,x,z)\big]` with :math:`r = p(m|x,z,e)`, the exact conditional.

    Arguments:
        num_particles: draws of the other latents for each datum.
        vectorize_particles: whether they are drawn side by side, in a plate.
        max_plate_nesting: how many plates the pair nests, the data plate counted.

    Loss and gradients are those of Pyro's ``TraceEnum_ELBO``. A weight on the KL (`KLWeight`)
    weighs the KL of every latent, and leaves r what it is.

    Raises `UsageError` for an observed site outside the data plate, and for a latent that is
    neither enumerated nor reparametrised. Kingma et al., 2014 (https://arxiv.org/abs/1406.5298).

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
            terms = summing.terms(model_trace, guide_trace)
            in_model, in_guide = sample_sites(model_trace), sample_sites(guide_trace)
            for name, term in (terms.observed | terms.prior).items():
                loss = loss - (terms.mean(term) * in_model[name]["scale"]).sum()
            for name, term in terms.posterior.items():
                site = in_guide[name] if name in in_guide else in_model[name]
                loss = loss + (terms.mean(term) * site["scale"]).sum()
        return loss / self.num_particles

    def _require(self, model: Trace, guide: Trace) -> None:
        plates = data_plates(model, guide)
        for name, site in observed(model).items():
            if not is_local(site, plates):
                raise UsageError(
                    f"site '{name}' is outside the data plate: sums over discrete latents are "
                    "taken for each datum; use TraceEnum_ELBO"
                )
        for name, site in latents(guide).items():
            if name not in enumeration.enumerated(guide) and not site["fn"].has_rsample:
                raise UsageError(
                    f"latent site '{name}' is neither enumerated nor reparametrised "
                    f'({type(site["fn"]).__name__}): mark it infer={{"enumerate": "parallel"}}'
                )


def elbo(
    pair: nn.Module, batch: Batch, num_particles: int = 1, vectorize_particles: bool = False
) -> ELBO:
    """The ELBO that fits a pair: `EnumeratedELBO` where it has sites to enumerate, else Trace_ELBO.

    Found by running the pair on two rows of a batch.
    """
    kind: Any = EnumeratedELBO if enumeration.enumerates(pair, batch) else Trace_ELBO
    return kind(
        num_particles,
        vectorize_particles=vectorize_particles,
        max_plate_nesting=enumeration.nesting(pair, batch),
    )


def require_weighable(objective: ELBO | None, beta: Any) -> None:
    """Raise `UsageError` where a weight on the KL would not be what it says under an objective."""
    stock = isinstance(objective, TraceEnum_ELBO) and not isinstance(objective, EnumeratedELBO)
    if stock and (callable(beta) or beta != 1):
        raise UsageError(
            f"{type(objective).__name__} takes no weight on the KL (beta) beside its sums over "
            "discrete latents: use `pyro_vae.EnumeratedELBO`"
        )


def require_reparametrized(sites: Sequence[Site], what: str) -> None:
    for site in sites:
        if not site["fn"].has_rsample:
            raise UsageError(
                f"latent site '{site['name']}' is not reparametrised ({type(site['fn']).__name__}),"
                f" which {what}; use `Trace_ELBO`"
            )


def are_equal(a: Any, b: Any) -> bool:
    """Whether two numbers or tensors are equal up to rounding; in a graph there are no values."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if isinstance(a, FakeTensor) or isinstance(b, FakeTensor):
        return True
    return bool(torch.isclose(a, b.to(a), rtol=1e-4, equal_nan=True).all())


def scored_sites(model_trace: Trace) -> list[Site]:
    """The sites that the model scores values at that it is given, auxiliary ones among them."""
    return [site for site in sample_sites(model_trace).values() if site["is_observed"]]
