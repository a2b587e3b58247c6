"""Export to ArviZ: draws of the latents, replicated data, and log p(x) of each datum."""

from collections.abc import Callable, Mapping, Sequence
from math import log
from typing import Any, TypeAlias

import torch
from pyro.poutine import Trace, condition
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError
from pyro_vae.inference.inference_data import Groups, converted, installed_arviz
from pyro_vae.pairs import data_plate, enumeration, fold_plan, masks, summing
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import global_latents, trace_model, unconditioned
from pyro_vae.pairs.pair import Batch, Site
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import data_site, latents, observed, require_normalized
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.traces import Given, trace
from pyro_vae.pairs.weights import log_density, structure

DRAWN_CELLS = 2**22
"""Numbers in the largest tensor of one pass."""

Statistics: TypeAlias = Mapping[str, Callable[[Tensor], Tensor]]


@alone()
def to_arviz(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_samples: int = 200,
    num_particles: int = 50,
    new_latents: bool = True,
    statistics: Statistics | None = None,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> Any:
    r"""Export draws of a fitted pair for ArviZ's plots and leave-one-out cross-validation.

    For each datum and each draw s, the guide gives K proposals. One of them is kept with
    probability proportional to its weight :math:`w_k = p(x, z_k)/q(z_k|x)`. It is a draw from the
    posterior as K grows, and from the guide itself with K = 1. Its ``log_likelihood`` is
    :math:`\log \tfrac1K \sum_k w_k`, an estimate of log p(x) with the local latents integrated
    out. Leave-one-out needs this number: ``loo`` on :math:`\log p(x|z)` would have to reweight
    draws of a posterior to draws of a prior, and would fail. Global latents w are drawn from the
    guide once for each s, and all of the above is given w. Then ``loo`` estimates
    :math:`\log p(x_i | x_{-i})` over the posterior of w, as in any Bayesian model.

    Arguments:
        pair: any pair.
        x, context: data; a few hundred rows, because every draw of every datum is kept.
        num_samples: draws for each datum.
        num_particles: K, the number of weights for each draw.
        new_latents: draw replicated data with latents from their prior, as leave-one-out needs
            them. Otherwise use the latents of ``posterior``, as `pyro_vae.reconstruct` does.
        statistics: functions by name. Each takes data (n, *data_shape) and returns a tensor of
            shape (n,). The results are further variables of data and draws, for plots.
        binarize, seed, progress: as in `pyro_vae.log_likelihood`.

    Returns an ArviZ ``InferenceData`` (a ``DataTree`` from version 1.0) with these groups:

    - ``posterior``: latent sites, with dimensions (chain, draw, data, ...), including those that
      are summed out; global latents have dimensions (chain, draw, ...);
    - ``posterior_predictive``: observed sites, with the same dimensions, and the statistics;
    - ``log_likelihood``: dimensions (chain, draw, data), in nats; the name is that of the observed
      site, or "joint" for several sites together;
    - ``observed_data``: what the pair observes, and the statistics; ``constant_data``: the context.

    Masked entries are NaN in all groups.

    Raises `UsageError` if ArviZ is missing, if a weight is infinite, or if all weights of a datum
    are 0. Vehtari, Gelman & Gabry, 2017; for the integration over local latents: Merkle, Furr &
    Rabe-Hesketh, 2019.

    >>> import torch, pyro_vae as pv
    >>> data = pv.to_arviz(pv.VAE.mlp((4,), latent_dim=2), torch.ones(3, 4), num_samples=5)
    >>> data.posterior["z"].shape, data.log_likelihood["x"].shape
    ((1, 5, 3, 2), (1, 5, 3))
    """
    for name, value in (("num_samples", num_samples), ("num_particles", num_particles)):
        if value < 1:
            raise UsageError(f"must be at least 1, got {value}", argument=name)
    arviz = installed_arviz()
    rows, prepare = held_rows(pair, x, context, binarize)
    parts, few = [], prepare(rows.first(2))
    _require_draws(pair, few)
    shared = _shared(pair, few, num_samples, seed)
    with using(pair, seed), bar(progress, len(rows) * num_samples, "draws", delay=2) as shown:
        nesting, _, widest = structure(pair, few)
        at_once = max(1, DRAWN_CELLS // (widest * num_particles))
        for given in rows.batches(min(at_once, 500)):
            batch, draws = prepare(given), []
            chunk = 1 if shared else max(1, at_once // len(batch[0]))
            for start in range(0, num_samples, chunk):
                size = min(chunk, num_samples - start)
                around = Given({name: value[start] for name, value in shared.items()})
                found = _draws(pair, batch, size, num_particles, nesting, new_latents, around)
                draws.append(found)
                shown.update(size * len(batch[0]))
            parts.append(_joined(draws, 0) | _data(pair, batch))
    groups = _joined(parts, 1)
    if statistics:
        with using(pair, seed):
            site = data_site(trace_model(pair, few, trace_guide(pair, few)))["name"]
        for group in ("posterior_predictive", "observed_data"):
            groups[group] |= _statistics(statistics, groups[group], site)
    return converted(arviz, groups, shared)


def _require_draws(pair: nn.Module, few: Batch) -> None:
    for name in fold_plan.plan(pair, few).points:
        raise UsageError(
            f"the guide of latent site '{name}' is a Delta, a point estimate; to_arviz needs draws "
            "and a density"
        )
    with using(pair, 0):
        model = trace_model(pair, few, trace_guide(pair, few))
    require_normalized(model, "it has no log-likelihood and cannot draw data")


def _shared(pair: nn.Module, few: Batch, number: int, seed: int) -> dict[str, Tensor]:
    """Return ``number`` draws of the guide for each global latent."""
    names = global_latents(pair, few)
    with using(pair, seed + 1):  # independent of the draws of the local latents
        drawn = [latents(trace_guide(pair, few)) for _ in range(number if names else 0)]
    return {name: torch.stack([sites[name]["value"] for sites in drawn]) for name in names}


def _draws(
    pair: nn.Module,
    batch: Batch,
    size: int,
    particles: int,
    nesting: int,
    new_latents: bool,
    around: Given,
) -> Groups:
    """Return ``size`` draws of each datum, their estimates of log p(x), and replicated data."""
    n = len(batch[0])
    # Rows are repeated, because not every pair broadcasts over a plate of samples.
    repeated = tuple(tensor.repeat(size * particles, *[1] * (tensor.dim() - 1)) for tensor in batch)
    model, guide = enumeration.traces(pair, repeated, nesting, around)
    summed = enumeration.enumerated(model) or enumeration.enumerated(guide)
    ratio = (
        summing.log_ratio(model, guide)
        if summed
        else log_density(model, False) - log_density(guide, False)
    )
    weights = ratio.reshape(-1, particles, size, n).double().flatten(0, 1)
    estimates = weights.logsumexp(0) - log(particles)
    if not bool(estimates.isfinite().all()):
        raise UsageError(
            f"{int((~estimates.isfinite()).any(0).sum())} data have infinite weights, or only "
            "weights of 0; the guide gives no draws of their posterior"
        )
    kept = torch.distributions.Categorical(logits=weights.permute(1, 2, 0)).sample()
    index = torch.arange(size * n, device=kept.device)
    sites = {
        name: site for name, site in (latents(model) | latents(guide)).items() if is_local(site)
    }

    def drawn_of(site: Site, value: Tensor) -> Tensor:
        draws = _data_first(site, value, ratio.shape).unflatten(1, (particles, size * n))
        return draws.flatten(0, 1)[kept.flatten(), index].unflatten(0, (size, n))

    posterior = {name: drawn_of(site, site["value"]) for name, site in sites.items()}
    shown = {name: drawn_of(site, masks.hidden_as_nan(site)) for name, site in sites.items()}
    again = tuple(tensor[: size * n] for tensor in repeated)
    program: Any = unconditioned(pair)
    if not new_latents:
        program = condition(program, data=_data_last(posterior, sites))
    with around:
        drawn = observed(trace(program, again))
    return {
        "posterior": shown,
        "posterior_predictive": {
            name: _replicate(site, again[0]).unflatten(0, (size, n))
            for name, site in drawn.items()
            if name not in posterior
        },
        "log_likelihood": {_name_of_all(model): estimates},
    }


def _replicate(site: Site, x: Tensor) -> Tensor:
    """Draws of a site, data first; those of x have the missing entries of x."""
    made = _data_first(site, masks.hidden_as_nan(site))[0]
    found = data_plate.known()
    of_x = found is not None and found.observes.get(site["name"]) == 0
    if not of_x or made.numel() != x.numel():
        return made
    return torch.where(x.isnan().reshape(made.shape), torch.nan, made)


def _name_of_all(model: Trace) -> str:
    """Return the name of log p(x): that of the observed site, or "joint" for several sites."""
    names = list(observed(model))
    return names[0] if len(names) == 1 else "joint"


def _data(pair: nn.Module, batch: Batch) -> Groups:
    """Return what the pair observes in a batch, and its context, as one draw."""
    sites = observed(trace_model(pair, batch, trace_guide(pair, batch)))
    return {
        "observed_data": {
            name: _data_first(site, masks.hidden_as_nan(site)) for name, site in sites.items()
        },
        "constant_data": {f"context_{i}": part[None] for i, part in enumerate(batch[1:], 1)},
    }


def _data_first(site: Site, value: Tensor, like: tuple[int, ...] = ()) -> Tensor:
    """Move values to (values of enumerated sites, data, plates within a datum, event)."""
    events = site["fn"].event_dim
    shape, event = value.shape[: value.dim() - events], value.shape[value.dim() - events :]
    shape = torch.broadcast_shapes(shape, like)
    plates = max(-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized)
    value = value.expand(*shape, *event)
    value = value.reshape(-1, *shape[len(shape) - plates :], *event)
    return value.movedim(-1 - events, 1)


def _data_last(values: dict[str, Tensor], sites: dict[str, Site]) -> dict[str, Tensor]:
    """Move draws (draws, data, ...) to the layout of a model: the data right of inner plates."""
    return {
        name: value.flatten(0, 1).movedim(0, value.dim() - 2 - sites[name]["fn"].event_dim)
        for name, value in values.items()
    }


def _joined(parts: Sequence[Groups], dim: int) -> Groups:
    return {
        group: {name: torch.cat([part[group][name] for part in parts], dim) for name in variables}
        for group, variables in parts[0].items()
    }


def _statistics(statistics: Statistics, sites: dict[str, Tensor], site: str) -> dict[str, Tensor]:
    """Compute statistics (draws, data) of an observed site (draws, data, ...)."""
    data = sites[site]
    found = {name: function(data.flatten(0, 1)) for name, function in statistics.items()}
    empty = data.flatten(0, 1).isnan().reshape(data.shape[:2].numel(), -1).all(1)
    for name, value in found.items():
        if value.shape != (data.shape[:2].numel(),):
            raise UsageError(
                f"statistic '{name}' must return shape ({data.shape[:2].numel()},), one number for "
                f"each row, got {tuple(value.shape)}"
            )
        if bool((value.isnan() & ~empty).any()):
            raise UsageError(
                f"statistic '{name}' is NaN for some rows; masked entries of the data are NaN, so "
                "the statistic must ignore them; for one entry, pass the rows that have it"
            )
    return {name: value.unflatten(0, data.shape[:2]) for name, value in found.items()}
