"""Objectives: Pyro ELBO objects, the weight on the KL, and what is recorded beside them.

Stock objectives serve as they are: ``Trace_ELBO()`` is the default, ``TraceMeanField_ELBO()`` takes
each KL in closed form where that is valid. Every objective here is a ``pyro.infer.ELBO`` too.
"""

import copy
from math import log
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae.errors import NotTraceable, UsageError
from pyro_vae.pairs import (
    Batch,
    by_datum,
    is_local,
    latents,
    log_prob,
    observed,
    sample_sites,
    site_kl,
)


class KLWeight(Messenger):
    r"""Weigh the KL from outside: multiplies the scale of every unobserved site of model and guide.

    Around a pair, ``Trace_ELBO`` becomes :math:`E_q[\log p(x|z)] - \beta\,\mathrm{KL}(q \| p)`
    (Higgins et al., β-VAE, 2017). The weight may be 0, and may be a tensor.

    >>> from pyro.infer import SVI, Trace_ELBO
    >>> import pyro_vae as pv, pyro.optim
    >>> vae, weight = pv.VAE.mlp((4,)), KLWeight(0.5)
    >>> svi = SVI(weight(vae.model), weight(vae.guide), pyro.optim.Adam({}), Trace_ELBO())
    """

    def __init__(self, weight: float | Tensor = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.weight


class _DifferentiableELBO(Trace_ELBO):
    """A Pyro ELBO whose loss and gradients are those of its ``differentiable_loss``."""

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        return self.differentiable_loss(model, guide, *args, **kwargs).item()


class ImportanceWeightedELBO(_DifferentiableELBO):
    r"""The importance-weighted bound, tighter with each sample.

    :math:`\sum_i E\big[\log \tfrac1K \sum_k w_{ik}\big]` with
    :math:`w_{ik} = p(x_i, z_{ik}) / q(z_{ik}|x_i)`, the samples drawn side by side in a plate.

    Arguments:
        num_samples: the number of samples K for each datum.
        max_plate_nesting: how many plates the pair nests, the data plate counted.

    Raises `UsageError` for a site outside the data plate, which would make the bound a joint one
    over the whole batch, and for a latent that is not reparametrised.
    Burda, Grosse & Salakhutdinov, 2016 (https://arxiv.org/abs/1509.00519).

    >>> import torch, pyro_vae as pv
    >>> vae = pv.VAE.mlp((4,))
    >>> loss = ImportanceWeightedELBO(8).differentiable_loss(vae.model, vae.guide, torch.ones(3, 4))
    """

    def __init__(self, num_samples: int, max_plate_nesting: int = 1) -> None:
        # Pyro adds its plate of particles from two particles on.
        super().__init__(
            num_particles=num_samples,
            vectorize_particles=num_samples > 1,
            max_plate_nesting=max_plate_nesting,
        )

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        ((model_trace, guide_trace),) = self._get_traces(model, guide, args, kwargs)
        for name, site in (latents(guide_trace) | observed(model_trace)).items():
            if not is_local(site):
                raise UsageError(
                    f"site '{name}' is outside the data plate: the importance-weighted bound "
                    "would be one for the whole batch, not for each datum; use Trace_ELBO"
                )
            if not site["is_observed"] and not site["fn"].has_rsample:
                raise UsageError(
                    f"latent site '{name}' is not reparametrised ({type(site['fn']).__name__}), "
                    "which the importance-weighted bound needs; use Trace_ELBO"
                )
        # The scale of observed sites, of subsampling say, weighs whole data, not their weights.
        (scale, *_) = (site["scale"] for site in observed(model_trace).values())
        particles = self.num_particles > 1
        log_weights = _total(model_trace, particles, scale) - _total(guide_trace, particles, scale)
        if particles:
            log_weights = log_weights.logsumexp(0) - log(self.num_particles)
        return -(log_weights * scale).sum()


class FreeBitsELBO(_DifferentiableELBO):
    r"""The bound with a KL that is not pushed below a floor in any latent unit.

    :math:`E_q[\log p(x|z)] - \sum_j \max(\lambda, \mathrm{KL}_j)`, with :math:`\mathrm{KL}_j` the
    mean over the minibatch of the KL of unit j (of the whole site where its distributions do not
    split into units), in closed form where torch has it.

    Arguments:
        free_bits: the floor :math:`\lambda`, in nats for each unit.

    It is below the ELBO; where a KL has no closed form, its estimates that fall under the floor by
    chance put it further below. What the tools report as ``elbo`` is the ELBO itself.
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
        for site in observed(model_trace).values():
            loss = loss - site["log_prob_sum"]
        for name, site in latents(guide_trace).items():
            if not site["fn"].has_rsample:
                raise UsageError(
                    f"latent site '{name}' is not reparametrised ({type(site['fn']).__name__}), "
                    "which free bits need; use Trace_ELBO"
                )
            if name not in model_trace.nodes:
                raise UsageError(f"site '{name}' of the guide has no prior: use Trace_ELBO")
            kl = site_kl(sample_sites(model_trace)[name], site)
            batch = site["fn"].batch_shape
            kl = kl.expand(torch.broadcast_shapes(kl.shape, batch + (1,) * (kl.dim() - len(batch))))
            floor = self.free_bits * batch.numel()
            units = kl.reshape(batch.numel(), -1).sum(0)
            loss = loss + (units.clamp(min=floor) * site["scale"]).sum()
        return loss


class Parts:
    """What the ELBO is made of, summed over a minibatch from the very traces that gave the loss.

    The sums of :math:`\\log p` of observed sites and of :math:`\\log q - \\log p` of latent sites
    leave every scale out: they are those of the ELBO whatever the weight on the KL.
    """

    def __init__(self) -> None:
        self.reconstruction: dict[str, Tensor] = {}
        self.kl: dict[str, Tensor] = {}
        self.validated: set[str] = set()
        """Observed sites whose values torch itself has validated."""
        self.outside: dict[str, Tensor] = {}
        """How many of their values are outside the support, counted while validation is off, as it
        is in a graph."""

    def add(self, model_trace: Trace, guide_trace: Trace, share: float) -> None:
        """Add the parts of one pair of traces, which stands for this share of the particles."""
        for name, site in observed(model_trace).items():
            _add(self.reconstruction, name, log_prob(site).detach().sum() * share)
            if not is_validation_enabled() and name in self.validated:
                inside = site["fn"].support.check(site["value"])
                _add(self.outside, name, inside.logical_not().sum())
            elif _validates(site["fn"]):
                self.validated.add(name)
        for name, site in latents(guide_trace).items():
            term = log_prob(site).detach().sum()
            if name in model_trace.nodes:  # an auxiliary site of the guide has no prior
                term = term - log_prob(sample_sites(model_trace)[name]).detach().sum()
            _add(self.kl, name, term * share)

    def clear(self) -> None:
        """Forget everything."""
        self.reconstruction.clear()
        self.kl.clear()
        self.outside.clear()

    def per_example(self, n: int) -> tuple[float, dict[str, float]]:
        """Reconstruction and the KL of each latent site over n examples, in nats per example."""
        reconstruction = sum(float(value) for value in self.reconstruction.values()) / n
        return reconstruction, {name: float(value) / n for name, value in self.kl.items()}


def recorded(objective: ELBO, parts: Parts) -> ELBO:
    """A copy of a Pyro ELBO that adds the parts of each trace it takes to ``parts``.

    Every Pyro ELBO gets its traces from its own ``_get_trace``, so this serves each of them, a
    user's own too, and costs no second pass.
    """
    copied: Any = copy.copy(objective)
    take = copied._get_trace

    def get_trace(*args: Any) -> tuple[Trace, Trace]:
        model_trace, guide_trace = take(*args)
        parts.add(model_trace, guide_trace, 1 / copied.num_particles)
        return model_trace, guide_trace

    copied._get_trace = get_trace
    return copied


class _Items(TorchFunctionMode):
    """``item()`` gives a tensor, not a number: Pyro's sums of sites stay tensors while traced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


_TRACEABLE = (Trace_ELBO.loss_and_grads, _DifferentiableELBO.loss_and_grads)


def surrogate(objective: Any, model: Any, guide: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss, and what is differentiated for its gradient, without reading any tensor.

    For ``Trace_ELBO`` and those that share its ``loss_and_grads``, from their own traces and terms;
    for the objectives here their differentiable loss.

    Raises `NotTraceable` for an objective with a ``loss_and_grads`` of its own.
    """
    kind = type(objective)
    if kind.loss_and_grads not in _TRACEABLE:
        raise NotTraceable(f"{kind.__name__} has a loss_and_grads of its own")
    if isinstance(objective, _DifferentiableELBO):
        loss = objective.differentiable_loss(model, guide, *batch)
        return loss, loss
    loss = differentiable = torch.zeros(())
    for model_trace, guide_trace in objective._get_traces(model, guide, batch, {}):
        with _Items():
            terms = objective._differentiable_loss_particle(model_trace, guide_trace)
        loss = loss + terms[0] / objective.num_particles
        differentiable = differentiable + terms[1] / objective.num_particles
    return loss, differentiable


def _total(trace: Trace, particles: bool, scale: Any) -> Tensor:
    terms = (site["log_prob"] / scale for site in sample_sites(trace).values())
    return sum((by_datum(term, particles) for term in terms), torch.zeros(()))


def _validates(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return bool(fn._validate_args)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
