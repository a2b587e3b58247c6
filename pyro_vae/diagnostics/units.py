"""The units of the latents of a fitted pair: their KL, codes, and number of data dimensions."""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.compat import scale_and_mask
from pyro_vae.data.preparation import Preparation
from pyro_vae.data.sources import Source
from pyro_vae.pairs import enumeration, folds, masks, summing
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.moments import is_category, is_discrete, mean
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents, observed, same_order, sample_sites, site_kl
from pyro_vae.parts.sequences import elements


def units(
    pair: nn.Module, rows: Source, prepare: Preparation, batch_size: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], float]:
    """Return KL by unit, codes by site, codes minus the prior's means, and the number of dims.

    The dims are the entries of discrete data that are not masked.
    """
    kl: dict[str, Tensor] = {}
    codes: dict[str, list[Tensor]] = {}
    moves: dict[str, list[Tensor]] = {}
    count, dims = 0, 0.0
    nesting = enumeration.nesting(pair, prepare(rows.first(2)))
    with using(pair, seed):
        for batch in rows.batches(batch_size):
            prepared = prepare(batch)
            model, guide = enumeration.traces(pair, prepared, nesting)
            terms = summing.terms(model, guide)
            n, closed = len(prepared[0]), same_order(model, guide)
            for name, site in latents(guide).items():
                if is_category(site["fn"]) or not is_local(site):
                    continue
                each = _kl_of_units(terms, sample_sites(model).get(name), site, closed)
                if each is not None:
                    kl[name] = kl.get(name, 0) + each.reshape(n, -1).sum(0).cpu()
                right, loc = len(site["fn"].event_shape), mean(site["fn"])
                center = _closed_mean(sample_sites(model).get(name))
                live = masks.scored(site)
                code, move = torch.where(live, loc, 0.0), torch.where(live, loc - center, torch.nan)
                for found, value in ((codes, code), (moves, move)):
                    each = terms.units(value, right)
                    if each is not None:
                        by_row = each.movedim(-1 - right, 0)  # with inner plates as units
                        found.setdefault(name, []).append(by_row.reshape(n, -1).cpu())
            data = list(observed(model).values())
            discrete = all(is_discrete(site["fn"]) for site in data)
            for seen in data if discrete else []:
                each = elements(seen["fn"], seen["value"])
                dims += scale_and_mask(each, mask=seen["mask"]).sum().item()
            count += n
    return (
        {name: total / count for name, total in kl.items()},
        {name: torch.cat(parts) for name, parts in codes.items()},
        {name: torch.cat(parts) for name, parts in moves.items()},
        dims,
    )


def variance(move: Tensor) -> Tensor:
    """Return the variance of each unit over the data in which it is not masked."""
    return (move - move.nanmean(0)).square().nanmean(0)


def _closed_mean(prior: Any) -> Tensor | float:
    """Return the mean of a prior if it is in closed form, and 0 otherwise."""
    try:
        loc = 0.0 if prior is None else prior["fn"].mean
    except NotImplementedError:
        return 0.0
    return 0.0 if isinstance(loc, Tensor) and bool(loc.isnan().any()) else loc


def _kl_of_units(terms: summing.Terms, prior: Any, site: Any, closed: bool) -> Tensor | None:
    """Return the KL (batch, *units) of a latent site; None if it is not a sum over units."""
    if prior is None or folds.is_delta(site["fn"]) or folds.shares(site):
        return None
    shape = site["fn"].event_shape
    # If the weights depend on the draw, the weighted terms must use the same draw.
    each = site_kl(prior, site, closed and not terms.dims)
    if each.shape[max(1, each.dim() - len(shape)) :] != shape:
        return None
    means = terms.units(each, len(shape))
    return means if means is not None and means.dim() == 1 + len(shape) else None
