"""What is recorded beside an objective: the parts of the ELBO."""

from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_vae import compat
from pyro_vae.errors import NotTraceable
from pyro_vae.pairs import enumeration, fold_plan, folding, folds, summing
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.places import is_local
from pyro_vae.pairs.sites import data_plates, is_factor, latents, scored
from pyro_vae.training.elbo import DifferentiableELBO


class ELBOParts:
    """What the ELBO is made of, summed over a minibatch from the very traces that gave the loss.

    The sums of :math:`\\log p` of observed sites and of :math:`\\log q - \\log p` of latent sites
    leave every scale out: they are those of the ELBO whatever the weight on the KL.
    ``global_share`` is the minibatch's share of the KL of latents outside the data plate; 0 leaves
    these out. Factors of the model count as observed. With ``pair``, a latent that its guide draws
    by way of another site has the density of both, and a point estimate has none
    (`pyro_vae.pairs.folding`).
    """

    def __init__(self, global_share: float = 1.0, pair: nn.Module | None = None) -> None:
        self.global_share, self.pair = global_share, pair
        self.reconstruction: dict[str, Tensor] = {}
        self.kl: dict[str, Tensor] = {}
        self.validated: set[str] = set()
        """Observed sites whose values torch itself has validated."""
        self.outside: dict[str, Tensor] = {}
        """How many of their values are outside the support, counted while validation is off, as it
        is in a graph."""

    def add(self, model_trace: Trace, guide_trace: Trace, share: float) -> None:
        """Add the parts of one pair of traces, which stands for this share of the particles."""
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
                inside = site["fn"].support.check(site["value"])
                _add(self.outside, name, inside.logical_not().sum())
            elif _validates(site["fn"]):
                self.validated.add(name)
        sites = latents(model_trace) | latents(guide_trace)  # the guide's, where both have one
        plates = data_plates(model_trace, guide_trace)
        for name, log_q in terms.posterior.items():
            own = 1.0 if is_local(sites[name], plates) else self.global_share
            if own == 0:
                continue
            term = terms.mean(log_q).detach().sum() * (name not in points)
            if name in terms.prior:  # an auxiliary site of the guide has no prior
                term = term - terms.mean(terms.prior[name]).detach().sum()
            name = folds.point_name(name) if name in points else folds.joint_name(sites[name])
            _add(self.kl, name, term * (share * own))

    def clear(self) -> None:
        """Forget everything."""
        self.reconstruction.clear()
        self.kl.clear()
        self.outside.clear()

    def per_example(self, n: int) -> tuple[float, dict[str, float]]:
        """Reconstruction and the KL of each latent site over n examples, in nats per example."""
        reconstruction = sum(float(value) for value in self.reconstruction.values()) / n
        return reconstruction, {name: float(value) / n for name, value in self.kl.items()}


def recorded(objective: ELBO, parts: ELBOParts) -> ELBO:
    """A copy of a Pyro ELBO that adds the parts of each trace it takes to ``parts``.

    Every Pyro ELBO gets its traces from its own ``_get_trace``, so this serves each of them, a
    user's own too, and costs no second pass.
    """
    copied: Any = compat.tapped(
        objective, lambda model, guide: parts.add(model, guide, 1 / copied.num_particles)
    )
    return copied


class _Items(TorchFunctionMode):
    """``item()`` gives a tensor, not a number: Pyro's sums of sites stay tensors while traced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


_TRACEABLE = (Trace_ELBO.loss_and_grads, DifferentiableELBO.loss_and_grads)


def surrogate(objective: Any, model: Any, guide: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss, and what is differentiated for its gradient, without reading any tensor.

    For ``Trace_ELBO`` and those that share its ``loss_and_grads``, from their own traces and terms;
    for the objectives here their differentiable loss.

    Raises `NotTraceable` for an objective with a ``loss_and_grads`` of its own.
    """
    kind = type(objective)
    if kind.loss_and_grads not in _TRACEABLE:
        raise NotTraceable(f"{kind.__name__} has a loss_and_grads of its own")
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
