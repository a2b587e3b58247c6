"""Masks: which entries of a site count, and whether the model and the guide agree on them.

A mask (``poutine.mask``, ``fn.mask``, ``obs_mask``) leaves terms out of a density. On an observed
site it marks missing entries, and only the model needs it. On a latent site, the model and the
guide must have the same mask, and no unmasked site may depend on the hidden entries. Otherwise the
mean of the weights p(x, z) / q(z | x) is not p(x), and all results based on them are wrong.
"""

from collections.abc import Iterable
from itertools import chain, zip_longest
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
    """Which entries of a site's value count in its density: booleans of the value's shape.

    Four things hide entries: a mask around the site, a mask within its distribution, the end of a
    sequence, and NaN in the value, which marks a missing entry.
    """
    fn, value = site["fn"], site["value"]
    return ~value.isnan() & _wide(site["mask"], fn.event_dim, value) & _within(fn, value)


def is_masked(site: Site) -> bool:
    """Whether a site has a mask, around it or within its distribution, even an all-true mask."""
    fn, found = site["fn"], site["mask"] is not None
    while hasattr(fn, "base_dist") and not found:
        found, fn = isinstance(fn, MaskedDistribution), fn.base_dist
    return found


def scores_missing(pair: nn.Module, batch: Batch) -> bool:
    """Whether a pair leaves out missing entries, which are NaN in x: no density is NaN."""
    try:
        with using(pair, seed=0), pyro.validation_enabled(True), torch.no_grad():
            guide, model = _traces(pair, batch)
            sites = [*sample_sites(guide).values(), *sample_sites(model).values()]
            return all(bool(log_prob(site).isfinite().all()) for site in sites)
    except Exception:  # the code of a user may raise anything
        return False


def fails(pair: nn.Module, batch: Batch) -> bool:
    """Whether the pair cannot be run on a batch, as with the number of a group that it lacks."""
    try:
        with using(pair, seed=0), pyro.validation_enabled(False), torch.no_grad():
            _traces(pair, batch)
            return False
    except Exception:  # the code of a user may raise anything
        return True


def takes_missing(pair: nn.Module, batch: Batch) -> bool:
    """Whether a pair would leave out missing entries of x, which may have none."""
    x = batch[0].clone()
    if not x.is_floating_point():
        return False
    x.reshape(len(x), -1)[:, 0] = torch.nan
    return scores_missing(pair, (x, *batch[1:]))


def missing_entries(x: Tensor) -> Tensor | None:
    """Which entries of x are missing (NaN), or None if no entry is."""
    found = x.isnan()
    return found if bool(found.any()) else None


def hidden_as_nan(site: Site) -> Tensor:
    """A site's value, with NaN for entries that a mask hides; unchanged if it hides nothing."""
    counts = scored(site)
    value = site["value"].expand(counts.shape)
    if bool(counts.all()):
        return value
    real = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    return torch.where(counts, real, torch.nan)


def seen(site: Site, x: Tensor) -> Tensor:
    """The value that the model observes or draws for x, in the shape of x, NaN where masked.

    Integers become floats.
    """
    made = hidden_as_nan(site)
    made = made.movedim(made.dim() - 1 - site["fn"].event_dim, 0)
    if made.numel() != x.numel():
        raise UsageError(
            f"the model draws data of shape {tuple(made.shape[1:])} but x has rows of shape "
            f"{tuple(x.shape[1:])}; they must match"
        )
    # A replicate of x has the same missing entries as x.
    real = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return torch.where(x.isnan(), torch.nan, made.reshape(x.shape).to(real))


def _within(fn: Any, like: Tensor) -> Tensor:
    """The mask within a distribution, in a shape that broadcasts with its values."""
    if isinstance(fn, MaskedDistribution):
        return _wide(mask_of(fn), fn.event_dim, like) & _within(fn.base_dist, like)
    if isinstance(fn, Independent | ExpandedDistribution):
        return _within(fn.base_dist, like)
    if isinstance(inside := getattr(fn, "inside", None), Tensor):  # the steps of a sequence
        return inside[..., None]
    return torch.ones((), dtype=torch.bool, device=like.device)


def _wide(mask: Any, right: int, like: Tensor) -> Tensor:
    """A mask of the batch shape, with ``right`` more dimensions on its right."""
    mask = torch.as_tensor(True if mask is None else mask, device=like.device)
    return mask.reshape(mask.shape + (1,) * right) if mask.dim() else mask


def fault(pair: nn.Module, batch: Batch, model: Trace, guide: Trace) -> str | None:
    """Say why the masks of latents prevent an estimate of log p(x); None if they do not.

    Arguments:
        model, guide: traces of the pair on the batch; the model is replayed against the guide.

    Call this inside `pyro_vae.pairs.scope.using`.
    """
    wide = too_wide(model, "model") or too_wide(guide, "guide")
    return wide or _apart(model, guide) or _needed(pair, batch, guide)


def too_wide(traced: Trace, where: str) -> str | None:
    """The error for a mask or scale that would count each row of a site several times.

    A mask of shape (n, 1) around a site of shape (n,) makes its log density (n, n).

    Arguments:
        where: "model" or "guide", for the message.
    """
    for name, site in sample_sites(traced).items():
        shape = tuple(site["fn"].batch_shape)
        for what in ("mask", "scale"):
            own = tuple(site[what].shape) if isinstance(site[what], Tensor) else ()
            sizes = zip_longest(own[::-1], shape[::-1], fillvalue=1)
            if any(size not in (1, plate) for size, plate in sizes):
                return (
                    f"the {what} of site '{name}' in the {where} has shape {own}, which does not "
                    f"broadcast to the shape of its plates, {shape}: give it this shape, for "
                    "example by .squeeze(-1)"
                )
    return None


def scale_fault(model: Trace, guide: Trace) -> str | None:
    """Say why scales of a latent (``poutine.scale``) make the loss not a bound; None otherwise."""
    for name, ours, theirs in _shared(model, guide):
        p, q = (torch.as_tensor(site["scale"], dtype=torch.double) for site in (ours, theirs))
        if not bool(torch.isclose(p, q.to(p.device)).all()):
            return (
                f"latent site '{name}' is scaled by {_number(p)} in the model and by {_number(q)} "
                "in the guide (by poutine.scale or plate subsampling): use the same scale in both"
            )
    return None


def require(pair: nn.Module, batches: Iterable[Batch]) -> None:
    """Raise `UsageError` if the latents or their masks prevent an estimate of log p(x).

    The batches must be prepared. A pair without masks on its latents runs only once, on two rows of
    the first batch.
    """
    batches = iter(batches)
    first = next(batches)
    with using(pair, seed=0), pyro.validation_enabled(False):
        guide, model = require_present(pair, first)
        sites = [site for _, *both in _shared(model, guide) for site in both]
        if not any(is_masked(site) for site in sites):
            return
        for batch in chain([first], batches):
            guide, model = _traces(pair, batch)
            if found := fault(pair, batch, model, guide):
                raise UsageError(found)


def require_present(pair: nn.Module, batch: Batch) -> tuple[Trace, Trace]:
    """Traces of guide and model on two rows; raise `UsageError` for a latent without a guide.

    Without this check, draws of the prior would replace those of the posterior of this latent. A
    mask or scale of a wrong shape raises it, too.
    """
    guide, model = _traces(pair, tuple(tensor[:2] for tensor in batch))
    wide = too_wide(model, "model") or too_wide(guide, "guide")
    if found := wide or _absent(model, guide):
        raise UsageError(found)
    return guide, model


def missing(name: str, model: Trace) -> str:
    """The error for a latent site of the model that is missing from the guide."""
    if (site := _imputed(name, model)) is None:
        return (
            f"latent site '{name}' of the model is missing from the guide: add "
            f'pyro.sample("{name}", ...) to the guide'
        )
    return (
        f"obs_mask at site '{site}' makes a latent site '{name}', which is missing from the guide: "
        f'add pyro.sample("{name}", ...) to the guide under pyro.poutine.mask(mask=~obs_mask), or '
        f"mask site '{site}' with pyro.poutine.mask(mask=obs_mask) instead of obs_mask"
    )


def _traces(pair: nn.Module, batch: Batch) -> tuple[Trace, Trace]:
    guide = trace_guide(pair, batch)
    return guide, trace_model(pair, batch, guide)


def _absent(model: Trace, guide: Trace) -> str | None:
    """The error for a latent of the model that is neither in the guide nor enumerated."""
    for name, site in latents(model).items():
        if name not in guide.nodes and not site["infer"].get("enumerate"):
            return missing(name, model)
    return None


def _apart(model: Trace, guide: Trace) -> str | None:
    """The error for a latent site whose masks differ between the model and the guide."""
    for name, ours, theirs in _shared(model, guide):
        p, q = torch.broadcast_tensors(scored(ours), scored(theirs))
        if bool((p != q).any()):
            return (
                f"the masks of latent site '{name}' differ: {int(p.sum())} of {p.numel()} entries "
                f"count in the model, {int(q.sum())} in the guide, and {int((p != q).sum())} "
                f"entries count in only one of them: {_remedy(name, model)}"
            )
    return None


def _remedy(name: str, model: Trace) -> str:
    if (site := _imputed(name, model)) is None:
        return "put the site under the same pyro.poutine.mask(mask=...) in both"
    return (
        f"obs_mask at site '{site}' masks the site in the model, so put it under "
        "pyro.poutine.mask(mask=~obs_mask) in the guide"
    )


def _needed(pair: nn.Module, batch: Batch, guide: Trace) -> str | None:
    """The error for a site of the model that depends on entries that a latent's mask hides."""
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
                f"site '{name}' of the model depends on entries of latent site "
                f"'{next(iter(hidden))}' that a mask hides: hidden entries do not have a prior, so "
                "log p(x) is not defined; also mask the entries that depend on them, or remove the "
                "mask"
            )
    return None


def _densities(pair: nn.Module, batch: Batch, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The log density of each site of the model, given values of the guide's latents."""
    with seeded(0), Given(values):  # sites that only the model has get the same draws each time
        sites = sample_sites(trace(cast(Pair, pair).model, batch))
    return {name: log_prob(site) for name, site in sites.items()}


def _shared(model: Trace, guide: Trace) -> list[tuple[str, Site, Site]]:
    """The latents that both programs have: name, site in the model, site in the guide."""
    ours = latents(model)
    return [(name, ours[name], site) for name, site in latents(guide).items() if name in ours]


def _imputed(name: str, model: Trace) -> str | None:
    """The site whose unobserved part this one is, where ``obs_mask`` made it."""
    site = name.removesuffix(UNOBSERVED_PART)
    return site if site != name and f"{site}{OBSERVED_PART}" in model.nodes else None


def _number(scale: Tensor) -> str:
    low, high = scale.min().item(), scale.max().item()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
