"""Log importance weights of draws from the guide, and the structure of a pair."""

from math import prod

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.pairs import enumeration, folding, summing
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Site
from pyro_vae.pairs.sites import by_datum, factors, latents, log_prob, observed
from pyro_vae.pairs.traces import Given


def log_weights(pair: nn.Module, batch: Batch, num_samples: int, nesting: int = 1) -> Tensor:
    """log p(x, z) - log q(z | x) for draws from the guide, of shape (num_samples, batch)."""
    return weights_of(*sampled(pair, batch, num_samples, nesting), nesting)


def sampled(
    pair: nn.Module, batch: Batch, num_samples: int, nesting: int
) -> tuple[poutine.Trace, poutine.Trace]:
    """Traces of model and guide under a plate of samples, to the left of all other plates."""
    plate = pyro.plate("importance_samples", num_samples, dim=-1 - nesting)
    return enumeration.traces(pair, batch, nesting + 1, plate)


def weights_of(model: poutine.Trace, guide: poutine.Trace, nesting: int) -> Tensor:
    """The log weights of two traces under a plate of samples."""
    summed = len(enumeration.enumerated(model) | enumeration.enumerated(guide))
    for name, site in (_local(guide) | observed(model)).items():
        if not nesting < log_prob(site).dim() <= nesting + 1 + summed:
            raise ValueError(f"site '{name}' does not broadcast over a plate of samples")
    if summed:
        return summing.evidence(model, guide)
    return log_density(model, True) - log_guide(guide, True)


def _local(trace: poutine.Trace) -> dict[str, Site]:
    """The local latents of a trace; weights are conditional on global latents."""
    return {name: site for name, site in latents(trace).items() if is_local(site)}


def log_density(model: poutine.Trace, particles: bool) -> Tensor:
    """The log joint density of a model's trace for each datum, of shape (particles, n) or (n,).

    It is the sum of all local latents, observed sites and local factors.
    """
    terms = {name: site for name, site in factors(model).items() if is_local(site)}
    return _summed(_local(model) | observed(model) | terms, particles)


def log_joint(model: poutine.Trace, particles: bool) -> Tensor:
    """`log_density` of a model's trace with its enumerated sites summed out."""
    if enumeration.enumerated(model):
        return summing.evidence(model, poutine.Trace())
    return log_density(model, particles)


def log_guide(guide: poutine.Trace, particles: bool) -> Tensor:
    """log q of all local latents; sites that the guide observes are terms of the loss, not of q."""
    return _summed(_local(guide), particles)


def _summed(sites: dict[str, Site], particles: bool) -> Tensor:
    terms = (by_datum(log_prob(site), particles=particles) for site in sites.values())
    return sum(terms, torch.zeros(()))


def structure(pair: nn.Module, batch: Batch) -> tuple[int, bool, int]:
    """Three facts about a pair that determine how its importance samples are drawn.

    They are the number of nested plates, whether the pair broadcasts over a plate of samples, and
    the largest number of values that a site has for one datum.
    Raises `UsageError` if importance weights of the pair are not defined.
    """
    folding.require_density(pair, batch, "gives no importance weights")
    guide = trace_guide(pair, batch)
    model = trace_model(pair, batch, guide)
    enumeration.require_placed(guide, model)
    folding.require_factors_placed(pair, batch)
    sites = [*latents(guide).values(), *observed(model).values()]
    nesting = enumeration.nesting_of(model, guide)
    widest = max(prod(site["fn"].event_shape) for site in sites)
    for name, site in observed(model).items():
        if not is_local(site):
            raise UsageError(
                f"observed site '{name}' is outside the data plate, so importance weights cannot "
                "estimate log p(x) of a datum: put it in the data plate"
            )
    widest *= enumeration.combinations(*enumeration.traces(pair, batch, nesting))
    return nesting, _vectorizes(pair, batch, nesting), widest


def _vectorizes(pair: nn.Module, batch: Batch, nesting: int) -> bool:
    """Whether weights under a plate of samples equal the weights of the same draws one by one."""
    try:
        model, guide = sampled(pair, batch, 3, nesting)
        together = weights_of(model, guide, nesting)
        drawn = {
            name: (site["value"], -1 - nesting - site["fn"].event_dim, own_dims(site, nesting))
            for name, site in latents(guide).items()
            if name not in enumeration.enumerated(guide)
        }
        for k in range(3):
            draw = {
                name: _narrow(value.select(dim, k), right)
                for name, (value, dim, right) in drawn.items()
            }
            if not torch.allclose(
                together[k], log_weights_alone(pair, batch, nesting, draw), 1e-3, 1e-3
            ):
                return False
    except (RuntimeError, ValueError, LookupError, AssertionError):
        return False
    return together.shape == (3, len(batch[0]))


def _narrow(value: Tensor, right: int) -> Tensor:
    """A draw without empty dimensions to its left; values of enumerated sites stay there."""
    own = value.shape[value.dim() - right :]
    return value.reshape(own) if value.numel() == own.numel() else value


def own_dims(site: Site, nesting: int) -> int:
    """The number of dimensions of a site to the right of the plate of samples."""
    inner = [-f.dim for f in site["cond_indep_stack"] if f.vectorized and -f.dim <= nesting]
    return max(inner, default=0) + site["fn"].event_dim


def draws_first(value: Tensor, right: int, event_dim: int) -> Tensor:
    """Move values under a plate of samples to (draws, n, *plates within a datum, *event).

    Arguments:
        right: the number of dimensions to the right of the plate of samples, see `own_dims`.
    """
    own = value.shape[value.dim() - right :]
    return value.reshape(-1, *own).movedim(-1 - event_dim, 1)


def log_weights_alone(
    pair: nn.Module, batch: Batch, nesting: int, draw: dict[str, Tensor] | None = None
) -> Tensor:
    """The log weight of one draw for each datum: a new draw from the guide, or a given draw."""
    model, guide = enumeration.traces(pair, batch, nesting, Given(draw or {}))
    if enumeration.enumerated(model):
        return summing.evidence(model, guide)
    return log_density(model, False) - log_guide(guide, False)
