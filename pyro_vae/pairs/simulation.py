"""Simulation of data from a pair's model, as a batch with its latents."""

from typing import cast

import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.compat import was_observed
from pyro_vae.errors import UsageError
from pyro_vae.pairs import data_plate, masks
from pyro_vae.pairs.data_plate_search import find_places
from pyro_vae.pairs.model import unconditioned
from pyro_vae.pairs.pair import Batch, Pair, Site
from pyro_vae.pairs.sites import data_first, data_site, latents, observed, require_normalized
from pyro_vae.pairs.template import template
from pyro_vae.pairs.traces import Given, trace


def simulate(
    pair: nn.Module, number: int, context: Batch = (), missing: Tensor | None = None
) -> tuple[Batch, dict[str, Tensor]]:
    """A batch drawn from the model, and the latents that generated it, by site.

    Arguments:
        number: the number of rows.
        context: the context tensors; the default is the context of the template.
        missing: which entries of x become NaN after the draw, booleans (number, *data_shape).

    Raises `UsageError` if the draws cannot be written into a batch, because an observed value is
    not a function of the batch, or if the masks of a latent differ between model and guide.
    """
    batch = template(pair, number, context)
    find_places(pair, batch)
    drawn = trace(unconditioned(pair), batch)
    require_normalized(drawn, "data cannot be simulated from it")
    batch = tuple(_with_draws(list(batch), drawn, _observes(pair, batch, drawn)))
    sites = latents(drawn)
    values = {name: site["value"] for name, site in sites.items() if not was_observed(site)}
    with Given(values):
        again = observed(trace(cast(Pair, pair).model, batch))
    for name, site in observed(drawn).items():
        differs = again[name]["value"] != site["value"]
        if bool((differs & masks.scored(again[name])).any()):
            raise UsageError(
                f"the draws of the model at site '{name}' cannot be written into a batch: the "
                "value that the site observes must be a tensor of the batch"
            )
    if missing is not None:
        batch = _hidden(pair, batch, missing)
    masks.require(pair, [batch])
    return batch, values


def choose_rows(number: int, context: Batch, missing: Tensor | None) -> tuple[Batch, Tensor | None]:
    """The context and the missing entries of rows that are drawn at random."""
    given = context if missing is None else (*context, missing)
    if any(not len(part) for part in given):
        raise UsageError("the context and the missing entries need at least 1 row, got 0")
    chosen = torch.randint(len(given[0]) if given else 1, (number,))
    some = tuple(part[chosen.to(part.device)] for part in given)
    return (some, None) if missing is None else (some[:-1], some[-1])


def _hidden(pair: nn.Module, batch: Batch, missing: Tensor) -> Batch:
    """The batch with NaN for missing entries; the pair must leave them out."""
    x = batch[0]
    if missing.dtype != torch.bool or missing.shape != x.shape:
        shape = ", ".join(map(str, ("n", *x.shape[1:])))
        raise UsageError(
            f"must be booleans of shape ({shape}), got {missing.dtype} of shape "
            f"({', '.join(map(str, ('n', *missing.shape[1:])))})",
            argument="missing",
        )
    hidden = (torch.where(missing.to(x.device), torch.nan, x), *batch[1:])
    if not x.is_floating_point() or not masks.scores_missing(pair, hidden):
        raise UsageError(
            "needs a likelihood that leaves out missing entries, such as "
            "pyro_vae.Missing(pyro_vae.Gaussian) or pyro_vae.Columns",
            argument="missing",
        )
    return hidden


def _observes(pair: nn.Module, batch: Batch, drawn: Trace) -> dict[str, int]:
    """Which tensor of the batch each site observes; context may be observed where it counts only.

    The label of a row is an example: the model observes it where it is known, and a mask hides the
    site where it is missing.
    """
    found = data_plate.known()
    observes = {data_site(drawn)["name"]: 0} if found is None else dict(found.observes)
    if 0 not in observes.values():
        data_site(drawn)
    if observed(drawn).keys() <= observes.keys() or len(batch) == 1:
        return observes
    for name, site in observed(trace(cast(Pair, pair).model, batch)).items():
        free = (i for i in range(1, len(batch)) if i not in observes.values())
        for i in free if name not in observes else ():
            value, counts = data_first(site["value"], site), _counts(site)
            if value.shape == batch[i].shape and bool((value == batch[i])[counts].all()):
                observes[name] = i
                break
    return observes


def _counts(site: Site) -> Tensor:
    """Which entries of an observed value count, with the data first."""
    return data_first(masks.scored(site).expand(site["value"].shape), site)


def _with_draws(batch: list[Tensor], drawn: Trace, observes: dict[str, int]) -> list[Tensor]:
    """The batch, with each observed tensor replaced by the draws at its site.

    Context keeps its values where they do not count: a missing label stays missing.
    """
    sites = observed(drawn)
    for name, i in observes.items():
        value = data_first(sites[name]["value"], sites[name])
        if value.numel() != batch[i].numel():
            raise UsageError(
                f"the model draws data of shape {tuple(value.shape)} at site '{name}' but the "
                f"batch has a tensor of shape {tuple(batch[i].shape)}; they must match"
            )
        own = value.reshape(batch[i].shape).to(batch[i].dtype)
        counts = _counts(sites[name]).reshape(own.shape)
        batch[i] = torch.where(counts, own, batch[i]) if i else own
    return batch
