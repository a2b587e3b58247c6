"""Simulation of data from a pair's model, as a batch with its latents."""

from typing import cast

from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.compat import was_observed
from pyro_vae.errors import UsageError
from pyro_vae.pairs import data_plate, masks
from pyro_vae.pairs.data_plate_search import find_places
from pyro_vae.pairs.model import unconditioned
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.sites import data_first, data_site, latents, observed, require_normalized
from pyro_vae.pairs.template import template
from pyro_vae.pairs.traces import Given, trace


def simulate(pair: nn.Module, number: int, context: Batch = ()) -> tuple[Batch, dict[str, Tensor]]:
    """A batch drawn from the model, and the latents that generated it, by site.

    Arguments:
        number: the number of rows.
        context: the context tensors; the default is the context of the template.

    Raises `UsageError` if the draws cannot be written into a batch, because an observed value is
    not a function of the batch, or if the masks of a latent differ between model and guide.
    """
    batch = template(pair, number, context)
    find_places(pair, batch)
    drawn = trace(unconditioned(pair), batch)
    require_normalized(drawn, "data cannot be simulated from it")
    batch = tuple(_with_draws(list(batch), drawn))
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
    masks.require(pair, [batch])
    return batch, values


def _with_draws(batch: list[Tensor], drawn: Trace) -> list[Tensor]:
    """The batch, with each observed tensor replaced by the draws at its site."""
    found, sites = data_plate.known(), observed(drawn)
    observes = {data_site(drawn)["name"]: 0} if found is None else found.observes
    if 0 not in observes.values():
        data_site(drawn)
    for name, i in observes.items():
        value = data_first(sites[name]["value"], sites[name])
        if value.numel() != batch[i].numel():
            raise UsageError(
                f"the model draws data of shape {tuple(value.shape)} at site '{name}' but the "
                f"batch has a tensor of shape {tuple(batch[i].shape)}; they must match"
            )
        batch[i] = value.reshape(batch[i].shape).to(batch[i].dtype)
    return batch
