"""The record of the parts of the ELBO, for any objective."""

from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_vae import compat
from pyro_vae.errors import NotTraceable
from pyro_vae.pairs import enumeration, fold_plan, folding, folds, summing
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.moments import support_of
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.sites import data_plates, is_factor, latents, scored
from pyro_vae.training.elbo import DifferentiableELBO


class ELBOParts:
    """The parts of the ELBO, summed over a minibatch from the same traces that give the loss.

    The sums are :math:`\\log p` of observed sites, and :math:`\\log q - \\log p` of latent sites.
    They leave out every scale, so they are the parts of the ELBO for any weight on the KL. Factors
    of the model count as observed.

    Arguments:
        global_share: the minibatch's share of the KL of latents outside the data plate; 0 leaves
            them out.
        pair: with it, a latent that the guide draws through another site has the density of both,
            and a point estimate has no density (`pyro_vae.pairs.folding`).
    """

    def __init__(self, global_share: float = 1.0, pair: nn.Module | None = None) -> None:
        self.global_share, self.pair = global_share, pair
        self.reconstruction: dict[str, Tensor] = {}
        self.kl: dict[str, Tensor] = {}
        self.validated: set[str] = set()
        """Observed sites whose values torch has validated."""
        self.outside: dict[str, Tensor] = {}
        """The number of their values outside the support, counted if validation is off, as it is in
        a graph."""

    def add(self, model_trace: Trace, guide_trace: Trace, share: float) -> None:
        """Add the parts of one pair of traces, which has this share of the particles."""
        enumeration.require_summed(model_trace, guide_trace)
        points: tuple[str, ...] = ()
        if self.pair is not None:
            guide_trace = folding.folded(self.pair, guide_trace)
            points = fold_plan.known(self.pair).points
        terms = summing.terms(model_trace, guide_trace)
        for name, site in scored(model_trace).items():
            own = 1.0 if is_local(site) else self.global_share
            if own == 0:
                continue
            term = terms.mean(terms.observed[name]).detach().sum()
            _add(self.reconstruction, name, term * (share * own))
            if is_factor(site):
                continue
            if not compat.is_validation_enabled() and name in self.validated:
                inside = support_of(site["fn"]).check(site["value"])
                _add(self.outside, name, inside.logical_not().sum())
            elif _validates(site["fn"]):
                self.validated.add(name)
        sites = latents(model_trace) | latents(guide_trace)  # sites of the guide take precedence
        plates = data_plates(model_trace, guide_trace)
        for name, log_q in terms.posterior.items():
            # A joint KL of summed-out latents has several sites, all of which are local.
            own = 1.0 if name not in sites or is_local(sites[name], plates) else self.global_share
            if own == 0:
                continue
            term = terms.mean(log_q).detach().sum() * (name not in points)
            if name in terms.prior:  # an auxiliary site of the guide has no prior
                term = term - terms.mean(terms.prior[name]).detach().sum()
            if name in points:
                name = folds.point_name(name)
            elif name in sites:
                name = folds.joint_name(sites[name])
            _add(self.kl, name, term * (share * own))

    def clear(self, global_share: float = 1.0) -> None:
        """Delete the sums, and set the share for the next ones."""
        self.global_share = global_share
        self.reconstruction.clear()
        self.kl.clear()
        self.outside.clear()

    def named(self) -> dict[Any, Tensor]:
        """The sums by kind and site, and the counts of values outside their support."""
        kinds = {"reconstruction": self.reconstruction, "kl": self.kl, "outside": self.outside}
        return {(kind, name): value for kind, of in kinds.items() for name, value in of.items()}

    def per_example(self, n: int) -> tuple[float, dict[str, float]]:
        """Return reconstruction and the KL of each latent site, in nats per example.

        Arguments:
            n: the number of examples.
        """
        reconstruction = sum(float(value) for value in self.reconstruction.values()) / n
        return reconstruction, {name: float(value) / n for name, value in self.kl.items()}


def sums(loss: Tensor, norm: Tensor, parts: ELBOParts) -> dict[tuple[str, str], Tensor]:
    """Return the numbers of a step by kind and site, of the loss's type, and counts."""
    named = {("loss", ""): loss, ("norm", ""): norm, **parts.named()}
    return {
        key: value if key[0] == "outside" else value.to(loss.dtype) for key, value in named.items()
    }


def recorded(objective: ELBO, parts: ELBOParts) -> ELBO:
    """Return a copy of a Pyro ELBO that adds the parts of each of its traces to ``parts``.

    Every Pyro ELBO gets its traces from its own ``_get_trace``. So this works for all of them,
    including a user's own, and needs no second pass.
    """
    copied: Any = compat.tapped(
        objective, lambda model, guide: parts.add(model, guide, 1 / copied.num_particles)
    )
    return copied


class _Items(TorchFunctionMode):
    """Makes ``item()`` return a tensor, so that Pyro's sums of sites stay tensors in a trace."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


_TRACEABLE = (Trace_ELBO.loss_and_grads, DifferentiableELBO.loss_and_grads)


def surrogate(objective: Any, model: Any, guide: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss and the value to differentiate, without reading any tensor.

    For ``Trace_ELBO`` and ELBOs that share its ``loss_and_grads``, both are built from their own
    traces and terms. For the objectives of this library, both are the differentiable loss.

    Raises `NotTraceable` for an objective that defines its own ``loss_and_grads``.
    """
    kind = type(objective)
    if kind.loss_and_grads not in _TRACEABLE:
        raise NotTraceable(f"{kind.__name__} defines its own loss_and_grads")
    if kind.loss_and_grads is DifferentiableELBO.loss_and_grads:
        loss = objective.differentiable_loss(model, guide, *batch)
        return loss, loss
    loss = differentiable = torch.zeros(())
    for model_trace, guide_trace in compat.particle_traces(objective, model, guide, batch):
        with _Items():
            terms = compat.particle_loss(objective, model_trace, guide_trace)
        loss = loss + terms[0] / objective.num_particles
        differentiable = differentiable + terms[1] / objective.num_particles
    return loss, differentiable


def _validates(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return compat.validates(fn)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
