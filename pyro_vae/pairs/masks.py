"""Masks: which numbers of a site count, and whether model and guide agree on them.

A mask (``poutine.mask``, ``fn.mask``, ``obs_mask``) leaves terms out of a density. On an observed
site it marks entries that are missing, and the model may have it alone. On a latent site model and
guide must have the same, and nothing that counts may depend on what the mask hides: else the
weights p(x, z) / q(z | x) have another mean than p(x), and no number made of them is right.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any, cast

import pyro
import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import Independent

from pyro_vae.compat import OBSERVED_PART, UNOBSERVED_PART, mask_of
from pyro_vae.errors import UsageError
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import trace_model
from pyro_vae.pairs.pair import Batch, Pair, Site
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents, log_prob, sample_sites
from pyro_vae.pairs.traces import Given, trace


def scored(site: Site) -> Tensor:
    """Which numbers of a site's value count in its density: booleans of the value's shape.

    By masks around the site and within its distribution, and by steps beyond a sequence's end.
    """
    fn, value = site["fn"], site["value"]
    ones = torch.ones_like(value, dtype=torch.bool)
    return ones & _wide(site["mask"], fn.event_dim, value) & _within(fn, value)


def is_masked(site: Site) -> bool:
    """Whether a mask is around a site or within its distribution, even one that hides nothing."""
    fn, found = site["fn"], site["mask"] is not None
    while hasattr(fn, "base_dist") and not found:
        found, fn = isinstance(fn, MaskedDistribution), fn.base_dist
    return found


def hidden_as_nan(site: Site) -> Tensor:
    """A site's value, with NaN for what a mask hides; left as it is where nothing is hidden."""
    counts = scored(site)
    value = site["value"].expand(counts.shape)
    if bool(counts.all()):
        return value
    real = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    return torch.where(counts, real, torch.nan)


def seen(site: Site, x: Tensor) -> Tensor:
    """What a model observes or draws in place of data x, in their shape, NaN where masked."""
    made = hidden_as_nan(site)
    made = made.movedim(made.dim() - 1 - site["fn"].event_dim, 0)
    if made.numel() != x.numel():
        raise UsageError(
            f"the model draws data of shape {tuple(made.shape[1:])} for x of shape "
            f"{tuple(x.shape[1:])}: the two cannot be compared"
        )
    return made.reshape(x.shape).to(x.dtype)


def _within(fn: Any, like: Tensor) -> Tensor:
    """The mask within a distribution, to be broadcast against its values; one number if none."""
    if isinstance(fn, MaskedDistribution):
        return _wide(mask_of(fn), fn.event_dim, like) & _within(fn.base_dist, like)
    if isinstance(fn, Independent | ExpandedDistribution):
        return _within(fn.base_dist, like)
    if isinstance(inside := getattr(fn, "inside", None), Tensor):  # the steps of a sequence
        return inside[..., None]
    return torch.ones((), dtype=torch.bool, device=like.device)


def _wide(mask: Any, right: int, like: Tensor) -> Tensor:
    """A mask of a batch, with so many dimensions more on its right."""
    mask = torch.as_tensor(True if mask is None else mask, device=like.device)
    return mask.reshape(mask.shape + (1,) * right) if mask.dim() else mask


def fault(pair: nn.Module, batch: Batch, model: Trace, guide: Trace) -> str | None:
    """Why masks of latents make a density that is not log p(x), or None.

    Arguments:
        model, guide: traces of the pair on the batch, the model's replayed against the guide's.

    To be called where the pair is in use (`pyro_vae.pairs.scope.using`).
    """
    return _apart(model, guide) or _needed(pair, batch, guide)


def scale_fault(model: Trace, guide: Trace) -> str | None:
    """Why the scales of a latent (``poutine.scale``) make a loss that is no bound, or None."""
    for name, ours, theirs in _shared(model, guide):
        p, q = (torch.as_tensor(site["scale"], dtype=torch.double) for site in (ours, theirs))
        if not bool(torch.isclose(p, q.to(p.device)).all()):
            return (
                f"latent site '{name}' is scaled by {_number(p)} in the model and by {_number(q)} "
                "in the guide (poutine.scale, or a plate's subsampling): scale it alike in both"
            )
    return None


def require(pair: nn.Module, batches: Iterable[Batch]) -> None:
    """Raise `UsageError` where latents of a pair and their masks make no log p(x) of a batch.

    Batches are prepared. A pair without masks on its latents is run on two rows of the first alone.
    """
    batches = iter(batches)
    first = next(batches)
    with using(pair, seed=0), pyro.validation_enabled(False):
        guide, model = _traces(pair, tuple(tensor[:2] for tensor in first))
        if found := _absent(model, guide):
            raise UsageError(found)
        sites = [site for _, *both in _shared(model, guide) for site in both]
        if not any(is_masked(site) for site in sites):
            return
        for batch in chain([first], batches):
            guide, model = _traces(pair, batch)
            if found := fault(pair, batch, model, guide):
                raise UsageError(found)


def missing(name: str, model: Trace) -> str:
    """What to say of a latent site of the model that the guide lacks."""
    if (site := _imputed(name, model)) is None:
        return (
            f"latent site '{name}' of the model is missing from the guide: add "
            f'pyro.sample("{name}", ...) to the guide'
        )
    return (
        f"obs_mask at site '{site}' makes a latent site '{name}', which is missing from the guide: "
        f'add pyro.sample("{name}", ...) to it under pyro.poutine.mask(mask=~obs_mask), or leave '
        f"obs_mask out and mask site '{site}' itself by pyro.poutine.mask(mask=obs_mask)"
    )


def _traces(pair: nn.Module, batch: Batch) -> tuple[Trace, Trace]:
    guide = trace_guide(pair, batch)
    return guide, trace_model(pair, batch, guide)


def _absent(model: Trace, guide: Trace) -> str | None:
    """What is wrong with latents of the model that are neither the guide's nor enumerated."""
    for name, site in latents(model).items():
        if name not in guide.nodes and not site["infer"].get("enumerate"):
            return missing(name, model)
    return None


def _apart(model: Trace, guide: Trace) -> str | None:
    """Which latent site has another mask in the model than in the guide."""
    for name, ours, theirs in _shared(model, guide):
        p, q = torch.broadcast_tensors(scored(ours), scored(theirs))
        if bool((p != q).any()):
            return (
                f"the masks of latent site '{name}' differ: {int(p.sum())} of {p.numel()} of its "
                f"numbers count in the model, {int(q.sum())} in the guide, {int((p != q).sum())} "
                f"in one alone: {_remedy(name, model)}"
            )
    return None


def _remedy(name: str, model: Trace) -> str:
    if (site := _imputed(name, model)) is None:
        return "put it under the same pyro.poutine.mask(mask=...) in both"
    return (
        f"obs_mask at site '{site}' masks it in the model, so put it under "
        "pyro.poutine.mask(mask=~obs_mask) in the guide"
    )


def _needed(pair: nn.Module, batch: Batch, guide: Trace) -> str | None:
    """Which site of the model counts, and depends on what a latent's mask hides."""
    hidden = {name: site for name, site in latents(guide).items() if not scored(site).all()}
    if not hidden:
        return None
    again = latents(trace_guide(pair, batch))
    values = {name: site["value"] for name, site in latents(guide).items()}
    moved = values | {
        name: torch.where(scored(site), site["value"], again[name]["value"])
        for name, site in hidden.items()
    }
    before, after = (_densities(pair, batch, given) for given in (values, moved))
    for name, density in before.items():
        if not torch.allclose(density, after[name], 1e-4, 1e-4, equal_nan=True):
            return (
                f"site '{name}' of the model depends on numbers of latent site "
                f"'{next(iter(hidden))}' that a mask hides: they have no prior then, and log p(x) "
                "is not defined; mask what depends on them too, or take the mask off"
            )
    return None


def _densities(pair: nn.Module, batch: Batch, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The log density of each site of the model, given values of the guide's latents."""
    with seeded(0), Given(values):  # what the model alone draws is drawn alike
        sites = sample_sites(trace(cast(Pair, pair).model, batch))
    return {name: log_prob(site) for name, site in sites.items()}


def _shared(model: Trace, guide: Trace) -> list[tuple[str, Site, Site]]:
    """The latents that both have, as the model and the guide have them."""
    ours = latents(model)
    return [(name, ours[name], site) for name, site in latents(guide).items() if name in ours]


def _imputed(name: str, model: Trace) -> str | None:
    """The site whose unobserved part this one is, where ``obs_mask`` made it."""
    site = name.removesuffix(UNOBSERVED_PART)
    return site if site != name and f"{site}{OBSERVED_PART}" in model.nodes else None


def _number(scale: Tensor) -> str:
    low, high = scale.min().item(), scale.max().item()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
