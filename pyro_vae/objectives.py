"""Objectives: Pyro ELBO objects, the weight on the KL, and what is recorded beside them.

Stock objectives serve as they are: ``Trace_ELBO()`` is the default, ``TraceMeanField_ELBO()`` takes
each KL in closed form where that is valid. Every objective here is a ``pyro.infer.ELBO`` too.
"""

import copy
from collections.abc import Sequence
from enum import StrEnum
from math import log
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from pyro_vae import enumeration, folding, masks
from pyro_vae.errors import NotTraceable, UsageError, first_line
from pyro_vae.pairs import (
    Batch,
    Site,
    by_datum,
    data_plates,
    factorizes,
    is_auxiliary,
    is_factor,
    is_local,
    latents,
    observed,
    same_order,
    sample_sites,
    scored,
    site_kl,
)


class KLWeight(Messenger):
    r"""Weigh the KL from outside: multiplies the scale of every unobserved site of model and guide.

    Around a pair, ``Trace_ELBO`` becomes :math:`E_q[\log p(x|z)] - \beta\,\mathrm{KL}(q \| p)`
    (Higgins et al., β-VAE, 2017). The weight may be 0, and may be a tensor. A weighed site keeps it
    as ``kl_weight``, beside its scale.

    Arguments:
        weight: of latents in the data plate, of which each datum has its own.
        global_weight: of latents outside it, of which all N data have one, such as weights of a
            decoder. The bound on a minibatch of M has the share M / N of their KL, so that over
            an epoch it adds up to that of all data; on held-out data it has none.

    >>> from pyro.infer import SVI, Trace_ELBO
    >>> import pyro_vae as pv, pyro.optim
    >>> vae, weight = pv.VAE.mlp((4,)), KLWeight(0.5)
    >>> svi = SVI(weight(vae.model), weight(vae.guide), pyro.optim.Adam({}), Trace_ELBO())
    """

    def __init__(self, weight: float | Tensor = 1.0, global_weight: float = 1.0) -> None:
        super().__init__()
        self.weight, self.global_weight = weight, global_weight

    def _pyro_sample(self, msg: Any) -> None:
        if is_factor(msg) and not is_local(msg):  # a term beside the priors of global latents
            msg["scale"] = msg["scale"] * self.global_weight
        elif not msg["is_observed"] and not site_is_subsample(msg):
            weight = self.weight if is_local(msg) else self.global_weight
            msg["scale"] = msg["scale"] * weight
            msg["kl_weight"] = msg.get("kl_weight", 1.0) * weight


class _DifferentiableELBO(Trace_ELBO):
    """A Pyro ELBO whose loss and gradients are those of its ``differentiable_loss``."""

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        return self.differentiable_loss(model, guide, *args, **kwargs).item()


class Gradient(StrEnum):
    """How the gradient of a bound reaches the guide; its value is the same for all."""

    TOTAL = "total"
    """That of the estimate, by all it depends on."""
    STICKING_THE_LANDING = "sticking-the-landing"
    """Through the draws alone, without the score of log q: no variance where the guide is exact."""
    DOUBLY_REPARAMETRIZED = "doubly-reparametrized"
    """The score of log q is reparametrised once more: unbiased for any number of samples."""


class _Cut(Messenger):
    """Cuts the guide at each draw: what follows sees a leaf of the same value.

    The site keeps the draw itself as ``drawn``. One run gives densities at given draws, of a guide
    whose levels depend on each other or drop units at random too.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or not getattr(msg["fn"], "has_rsample", False):
            return
        msg["drawn"] = msg["fn"](*msg["args"], **msg["kwargs"])
        msg["value"] = msg["drawn"].detach().requires_grad_()
        msg["done"] = True


class _PathELBO(_DifferentiableELBO):
    """An ELBO that can tell how a loss depends on the guide through its draws alone."""

    def _get_cut_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        try:
            return super()._get_trace(model, _Cut()(guide), args, kwargs)
        except (NotImplementedError, KeyError) as error:
            # A fault of the programs themselves comes again as it is.
            drawn = poutine.trace(_Cut()(guide)).get_trace(*args, **kwargs)
            poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
            raise UsageError(
                "the guide has no density at given draws, which a gradient through the draws "
                f"alone needs ({first_line(error)}); use Gradient.TOTAL or Trace_ELBO"
            ) from error


class StickingTheLandingELBO(_PathELBO):
    r"""The ELBO, with a gradient that reaches the guide through its draws alone.

    :math:`\nabla_\phi = E\big[\nabla_z \log \tfrac{p(x, z)}{q(z|x)}\, \nabla_\phi z\big]`: the
    score :math:`\nabla_\phi \log q_\phi(z|x)` at a given z, whose mean is 0, is left out. Where
    the guide is exact nothing is left but 0, for each draw.

    Takes the arguments of ``Trace_ELBO``. Raises `UsageError` for a latent that is not
    reparametrised. Roeder, Wu & Duvenaud, 2017 (https://arxiv.org/abs/1703.09194).

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
            _require_reparametrized(sites, "sticking the landing needs")
            log_p, log_q = model_trace.log_prob_sum(), guide_trace.log_prob_sum()
            elbo = log_p - log_q.detach()
            for site, slope in _paths(log_p - log_q, sites):
                elbo = elbo + _through(site, slope)
            loss = loss - elbo / self.num_particles
        return loss


class ImportanceWeightedELBO(_PathELBO):
    r"""The importance-weighted bound, tighter with each sample.

    :math:`\sum_i E\big[\log \tfrac1K \sum_k w_{ik}\big]` with
    :math:`w_{ik} = p(x_i, z_{ik}) / q(z_{ik}|x_i)`, the samples drawn side by side in a plate.

    Arguments:
        num_samples: the number of samples K for each datum.
        max_plate_nesting: how many plates the pair nests, the data plate counted.
        gradient: how the gradient reaches the guide. With :math:`\tilde w_k = w_k / \sum_l w_l`,
            it is the sum over samples of :math:`\nabla_z \log w_k\, \nabla_\phi z_k` times
            :math:`\tilde w_k` for ``Gradient.STICKING_THE_LANDING``, biased for K over 1, and times
            :math:`\tilde w_k^2` for ``Gradient.DOUBLY_REPARAMETRIZED``, which is unbiased.

    Raises `UsageError` for a site outside the data plate, which would make the bound a joint one
    over the whole batch, for a latent that is not reparametrised, and for a site that is scaled
    (``poutine.scale``) otherwise than the others: a scale of all, of subsampling say, weighs whole
    data, not their weights. A weight on the KL is `KLWeight`'s.
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
            raise UsageError(f"gradient is one of pyro_vae.Gradient, {gradient!r} came")
        # Pyro adds its plate of particles from two particles on.
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
                    f"site '{name}' is outside the data plate: the importance-weighted bound "
                    "would be one for the whole batch, not for each datum; use Trace_ELBO"
                )
        sites = list(latents(guide_trace).values())
        _require_reparametrized(sites, "the importance-weighted bound needs")
        scale = _common_scale(model_trace, guide_trace)
        particles = self.num_particles > 1
        log_p, log_q = (_total(t, particles, scale) for t in (model_trace, guide_trace))
        # What is no part of p(x) is no part of the weights either.
        beside = sum(s["log_prob_sum"] for s in _scored(model_trace) if _beside(s))
        beside = beside / self.num_particles
        if self.gradient == Gradient.TOTAL:
            return -(self._bound(log_p - log_q) * scale).sum() - beside
        bound = (self._bound(log_p - log_q.detach()) * scale).sum() + beside
        shares = self._shares((log_p - log_q).detach())
        for site, slope in _paths(log_p - log_q, sites):
            share = shares[(...,) + (None,) * len(site["fn"].event_shape)]
            if self.gradient == Gradient.DOUBLY_REPARAMETRIZED:
                weight = site["scale"] / scale  # of log q in log w, which the score has as well
                share = share * (1 - weight + weight * share)
            bound = bound + _through(site, slope * share * scale)
        return -bound

    def _bound(self, log_weights: Tensor) -> Tensor:
        """The bound of each datum."""
        if self.num_particles == 1:
            return log_weights
        return log_weights.logsumexp(0) - log(self.num_particles)

    def _shares(self, log_weights: Tensor) -> Tensor:
        """Each sample's share of its datum's weights, in the shape of the plates."""
        if self.num_particles == 1:
            return torch.ones_like(log_weights)
        inner = (1,) * (self.max_plate_nesting - 2)
        return log_weights.softmax(0).reshape(self.num_particles, *inner, -1)


class FreeBitsELBO(_DifferentiableELBO):
    r"""The bound with a KL that is not pushed below a floor in any latent unit.

    :math:`E_q[\log p(x|z)] - \sum_j \max(\lambda, \mathrm{KL}_j)`, with :math:`\mathrm{KL}_j` the
    mean over the minibatch of the KL of unit j (of the whole site where its distributions do not
    split into units), in closed form where torch has it and model and guide draw in one order.
    Latents outside the data plate are no codes, and have no floor.

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
        closed = same_order(model_trace, guide_trace)
        plates = data_plates(model_trace, guide_trace)
        for site in _scored(model_trace):
            loss = loss - site["log_prob_sum"]
        _require_reparametrized(list(latents(guide_trace).values()), "free bits need")
        for name, site in latents(guide_trace).items():
            if name not in model_trace.nodes:
                raise UsageError(f"site '{name}' of the guide has no prior: use Trace_ELBO")
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


class TotalCorrelationELBO(_DifferentiableELBO):
    r"""The bound with a weight of its own on each of the three parts of the KL.

    :math:`E_q[\log p(x|z)] - \alpha\, I(x; z) - \beta\, \mathrm{KL}(q(z) \| \prod_j q(z_j))
    - \gamma \sum_j \mathrm{KL}(q(z_j) \| p(z_j))`, with :math:`q(z) = \tfrac1N \sum_n q(z|x_n)`:
    the mutual information of datum and code, the total correlation of the code's units, and the KL
    of each unit's aggregate. All three weights 1 give the ELBO, for each draw.

    Arguments:
        num_data: N, the number of training data.
        total_correlation: :math:`\beta`.
        mutual_information: :math:`\alpha`.
        dimension_kl: :math:`\gamma`.

    For a draw of datum i in a minibatch of M, :math:`q(z_i)` is estimated by
    :math:`\tfrac1N q(z_i|x_i) + \tfrac{N-1}{N(M-1)} \sum_{j \ne i} q(z_i|x_j)`, which is unbiased
    for a minibatch drawn without replacement and exact where it is all data; its logarithm is
    biased downwards, the more the fewer rows of the minibatch are near. A weight on the KL from
    outside multiplies all three.

    Raises `UsageError` unless guide and model have one latent site, in the data plate alone, whose
    units are independent in posterior and prior, and whose prior is one for all data, whatever the
    context. Chen et al., Isolating Sources of
    Disentanglement in VAEs, 2018 (https://arxiv.org/abs/1802.04942), appendix C.

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
            raise UsageError(f"num_data must be 2 or more, {num_data} came")
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
        reconstruction = sum(s["log_prob_sum"] for s in _scored(model_trace))
        return (kl * site["scale"]).sum() - reconstruction

    def _log_shares(self, z: Tensor) -> Tensor:
        """Logarithms of the share of datum j in q(z) at a draw of datum i, of shape (i, j)."""
        others = (self.num_data - 1) / (self.num_data * max(1, len(z) - 1))
        shares = z.new_full((len(z), len(z)), log(others))
        return shares.fill_diagonal_(-log(self.num_data))


def log_aggregate(fn: Any, z: Tensor, log_shares: Tensor) -> tuple[Tensor, Tensor]:
    r"""Log densities of a mixture of posteriors, :math:`\sum_j s_{ij} q(z_i|x_j)`.

    Arguments:
        fn: the posteriors of m data.
        z: n codes, of shape (n, *event_shape).
        log_shares: :math:`\log s_{ij}`, of shape (n, m).

    Returns the density of each code, of shape (n,), and of each unit of it, of shape (n, units):
    one unit where units depend on each other.
    """
    q = fn.base_dist if factorizes(fn) else fn
    each = q.log_prob(z[:, None]).reshape(*log_shares.shape, -1)
    joint = (each.sum(-1) + log_shares).logsumexp(1)
    return joint, (each + log_shares[..., None]).logsumexp(1)


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

    loss_and_grads = _DifferentiableELBO.loss_and_grads
    loss = _DifferentiableELBO.loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        return poutine.trace(replayed).get_trace(*args, **kwargs), guide_trace

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Any = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            self._require(model_trace, guide_trace)
            terms = enumeration.terms(model_trace, guide_trace)
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
            "discrete latents: use pyro_vae.EnumeratedELBO"
        )


class Parts:
    """What the ELBO is made of, summed over a minibatch from the very traces that gave the loss.

    The sums of :math:`\\log p` of observed sites and of :math:`\\log q - \\log p` of latent sites
    leave every scale out: they are those of the ELBO whatever the weight on the KL.
    ``global_share`` is the minibatch's share of the KL of latents outside the data plate; 0 leaves
    these out. Factors of the model count as observed. With ``pair``, a latent that its guide draws
    by way of another site has the density of both, and a point estimate has none
    (`pyro_vae.folding`).
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
            points = folding.known(self.pair).points
        terms = enumeration.terms(model_trace, guide_trace)
        for name, site in scored(model_trace).items():
            own = 1.0 if is_local(site) else self.global_share
            if own == 0:
                continue
            term = terms.mean(terms.observed[name]).detach().sum()
            _add(self.reconstruction, name, term * (share * own))
            if is_factor(site):
                continue
            if not is_validation_enabled() and name in self.validated:
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
            name = folding.point_name(name) if name in points else folding.joint_name(sites[name])
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
    if kind.loss_and_grads is _DifferentiableELBO.loss_and_grads:
        loss = objective.differentiable_loss(model, guide, *batch)
        return loss, loss
    loss = differentiable = torch.zeros(())
    for model_trace, guide_trace in objective._get_traces(model, guide, batch, {}):
        with _Items():
            terms = objective._differentiable_loss_particle(model_trace, guide_trace)
        loss = loss + terms[0] / objective.num_particles
        differentiable = differentiable + terms[1] / objective.num_particles
    return loss, differentiable


def takes_guide_terms(objective: ELBO) -> bool:
    """Whether an objective sums what a guide observes, factors for one, as ``Trace_ELBO`` does."""
    kind: Any = type(objective)
    return kind.loss_and_grads is not _DifferentiableELBO.loss_and_grads


def _require_reparametrized(sites: Sequence[Site], what: str) -> None:
    for site in sites:
        if not site["fn"].has_rsample:
            raise UsageError(
                f"latent site '{site['name']}' is not reparametrised ({type(site['fn']).__name__}),"
                f" which {what}; use Trace_ELBO"
            )


def _paths(log_weight: Tensor, sites: Sequence[Site]) -> list[tuple[Site, Tensor]]:
    """The derivative of a log weight by each draw of a cut guide, through later draws as well."""
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
    """0, whose gradient is ``slope`` times that of the site's draw."""
    reached = (slope.detach() * site["drawn"]).sum()
    return reached - reached.detach()


def _one_factorized(model_trace: Trace, guide_trace: Trace) -> tuple[Site, Site]:
    """The one latent site, as guide and model have it, if its parts of the KL are known."""
    (name, *others), priors = latents(guide_trace), sample_sites(model_trace)
    if others or name not in priors or len(latents(model_trace)) > 1:
        found = ", ".join(latents(model_trace) | latents(guide_trace))
        raise UsageError(
            f"total correlation needs one latent site with a prior, {found} came; use Trace_ELBO"
        )
    site, prior = latents(guide_trace)[name], priors[name]
    inside = is_local(site, data_plates(model_trace, guide_trace))
    if not inside or len(site["fn"].batch_shape) > 1 or masks.is_masked(site):
        raise UsageError(
            f"total correlation needs latent site '{name}' in the data plate alone, without a "
            "mask; use Trace_ELBO"
        )
    for fn, what in ((site["fn"], "posterior"), (prior["fn"], "prior")):
        if fn.event_shape and not factorizes(fn):
            raise UsageError(
                f"total correlation needs independent units, the {what} of '{name}' has none "
                f"({type(fn).__name__}); use Trace_ELBO"
            )
    _require_reparametrized([site], "total correlation needs")
    same = site["value"].detach()[:1].expand(site["value"].shape)
    if not _equal(log_p := prior["fn"].log_prob(same), log_p[..., :1]):
        raise UsageError(
            f"total correlation needs one prior for all data, that of '{name}' differs from row to "
            "row with the context; use Trace_ELBO"
        )
    return site, prior


def _common_scale(model_trace: Trace, guide_trace: Trace) -> Any:
    """The scale that all sites have, weights on the KL left out."""
    first, *others = observed(model_trace).values()
    for site in (*others, *latents(model_trace).values(), *latents(guide_trace).values()):
        if not _equal(site["scale"], first["scale"] * site.get("kl_weight", 1.0)):
            raise UsageError(
                f"site '{site['name']}' is scaled otherwise than site '{first['name']}', and the "
                "importance-weighted bound is of data weighed as a whole: weigh the KL by beta "
                "(KLWeight), or use Trace_ELBO"
            )
    return first["scale"]


def _equal(a: Any, b: Any) -> bool:
    """Whether two numbers or tensors are equal up to rounding; in a graph there are no values."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if isinstance(a, FakeTensor) or isinstance(b, FakeTensor):
        return True
    return bool(torch.isclose(a, b.to(a), rtol=1e-4, equal_nan=True).all())


def _scored(model_trace: Trace) -> list[Site]:
    """The sites that the model scores values at that it is given, auxiliary ones among them."""
    return [site for site in sample_sites(model_trace).values() if site["is_observed"]]


def _beside(site: Site) -> bool:
    """Whether a site is a term of the objective beside p(x, z)."""
    return site["is_observed"] and is_auxiliary(site) and not is_factor(site)


def _total(trace: Trace, particles: bool, scale: Any) -> Tensor:
    sites = [s for s in sample_sites(trace).values() if not _beside(s)]
    terms = (site["log_prob"] / scale for site in sites)
    return sum((by_datum(term, particles) for term in terms), torch.zeros(()))


def _validates(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return bool(fn._validate_args)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
