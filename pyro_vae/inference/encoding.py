"""From data to latents: encode, and predict discrete ones."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError, nearest
from pyro_vae.inference.passes import DRAWS, guide_of, prepared_batches, summed_out
from pyro_vae.pairs import enumeration, summing
from pyro_vae.pairs.moments import is_category
from pyro_vae.pairs.places import is_local
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import data_first, latents
from pyro_vae.pairs.threads import alone


@alone()
def encode(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    what: Literal["mean", "scale", "draw"] = "mean",
    binarize: str = "dynamic",
    seed: int = 0,
) -> dict[str, Tensor]:
    """The guide's means, scales (standard deviations) or draws of each latent site in the plate.

    Where one latent depends on another, means are those given the means of the others. A discrete
    latent has its mode for a mean, and one without a standard deviation, a category, no scale.
    Latents that only the model has, to be enumerated, have their modes and draws under their
    posterior given the data (see `predict`).

    Returns a dictionary from the name of a site to a tensor of shape (n, *event_shape).

    >>> import torch, pyro_vae as pv
    >>> encode(pv.VAE.mlp((4,), latent_dim=3), torch.ones(5, 4))["z"].shape
    torch.Size([5, 3])
    """
    if what not in ("mean", "scale", "draw"):
        raise UsageError(f"what is 'mean', 'scale' or 'draw', '{what}' came")
    found: dict[str, list[Tensor]] = {}
    with using(pair, seed):
        for batch in prepared_batches(pair, x, context, binarize):
            guide = guide_of(pair, batch, what != "draw")
            for name, site in latents(guide).items():
                value = _scale(site["fn"]) if what == "scale" else site["value"]
                if is_local(site) and value is not None:
                    found.setdefault(name, []).append(data_first(value, site).detach())
            if what != "scale":
                for name, value in summed_out(pair, batch, guide, what == "mean").items():
                    found.setdefault(name, []).append(value)
    return {name: torch.cat(parts) for name, parts in found.items()}


@alone()
def predict(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    site: str | None = None,
    num_samples: int = DRAWS,
    binarize: str = "dynamic",
    seed: int = 0,
) -> Tensor:
    r"""The posterior probabilities of a discrete latent: of classes, clusters, components.

    Where the guide has the site, its :math:`q(y|x)`; where only the model has, enumerated,
    :math:`E_{q(z|x)}[p(k|x, z)]`.

    Arguments:
        x, context: the data; labels that are given are believed, so leave them out.
        site: which latent; the first that is discrete by default.
        num_samples: draws of the latents before it, where there are any.

    Returns a tensor of shape (n, number of values). Raises `UsageError` where no latent of this
    name has a finite list of values.

    >>> import torch, pyro_vae as pv
    >>> pair = pv.SemiSupervisedVAE.mlp((4,), num_classes=3)
    >>> bool((predict(pair, torch.ones(5, 4)).sum(1) - 1 < 1e-6).all())
    True
    """
    parts = []
    with using(pair, seed):
        for batch in prepared_batches(pair, x, context, binarize):
            names = enumeration.discrete(pair, batch)
            if not names or (site is not None and site not in names):
                raise UsageError(_without(pair, site, names))
            parts.append(summing.probabilities(pair, batch, site or names[0], num_samples))
    return torch.cat(parts)


def _without(pair: nn.Module, site: str | None, names: Sequence[str]) -> str:
    """Why probabilities of a site are not to be had, where these are those that are."""
    kind = type(pair).__name__
    if not names:
        return (
            "predict gives the probabilities of a discrete latent that is in the data plate alone "
            f"and has a finite list of values, {kind} has none; encode serves other latents"
        )
    return f"predict needs a discrete latent of {kind}, '{site}' came; {nearest(str(site), names)}"


def _scale(fn: Any) -> Tensor | None:
    """The standard deviation of a distribution, None for a category, which has none."""
    try:
        scale = fn.stddev
    except NotImplementedError:
        return fn.sample((100,)).std(0)
    return None if is_category(fn) else scale
