"""Data drawn from a pair's model, as a batch, with the latents that made them."""

from typing import cast

from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.compat import was_observed
from pyro_vae.errors import UsageError
from pyro_vae.pairs import masks, places
from pyro_vae.pairs.location import find_places
from pyro_vae.pairs.model import unconditioned
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.sites import data_first, data_site, latents, observed, require_normalized
from pyro_vae.pairs.template import template
from pyro_vae.pairs.traces import Given, trace


def simulate(pair: nn.Module, number: int, context: Batch = ()) -> tuple[Batch, dict[str, Tensor]]:
    """A batch that the model draws, and the latents it was drawn from, by site.

    The context is that of the template, or what is given. Raises `UsageError` for a model that
    observes what is no function of the batch, so that its draws cannot be put into one, and for
    latents whose masks are not those of the guide.
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
            raise UsageError(f"what the model draws at site '{name}' has no place in its batch")
    masks.require(pair, [batch])
    return batch, values


def _with_draws(batch: list[Tensor], drawn: Trace) -> list[Tensor]:
    """A batch that holds what was drawn at each site that observes one of its tensors."""
    found, sites = places.known(), observed(drawn)
    observes = {data_site(drawn)["name"]: 0} if found is None else found.observes
    if 0 not in observes.values():
        data_site(drawn)
    for name, i in observes.items():
        value = data_first(sites[name]["value"], sites[name])
        if value.numel() != batch[i].numel():
            raise UsageError(
                f"the model draws data of shape {tuple(value.shape)} at site '{name}', and the "
                f"batch has shape {tuple(batch[i].shape)} there: draws cannot be put into a batch"
            )
        batch[i] = value.reshape(batch[i].shape).to(batch[i].dtype)
    return batch
