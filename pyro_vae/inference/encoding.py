"""From data to latents: encode data, and predict discrete latents."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError, nearest
from pyro_vae.inference.passes import DRAWS, guide_of, prepared_batches, summed_out
from pyro_vae.pairs import enumeration, summing
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.moments import is_category
from pyro_vae.pairs.pair import Site
from pyro_vae.pairs.processes import Team, here, single
from pyro_vae.pairs.rng import derived
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import data_first, latents
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.traces import Given


@alone()
def encode(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    what: Literal["mean", "scale", "draw"] = "mean",
    binarize: str = "dynamic",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the guide's means, scales (standard deviations) or draws of each latent.

    If a latent depends on another, its mean and its scale are those given the means of the others.
    So the scale leaves out their uncertainty, for example that of a group in a latent of its rows:
    take the standard deviation of draws of `pyro_vae.posterior`. The mean of a discrete latent is
    its mode. A category has no standard deviation, so it has no scale.
    The model may enumerate latents that the guide does not have. Their modes and draws are those
    of their posterior given the data (see `predict`).

    Arguments:
        pair: any pair.
        x, context: the data, as `pyro_vae.evaluate` takes them.
        what: "mean", "scale" or "draw". A draw is joint: the local latents of all rows are drawn
            given one draw of the global and group latents.

    Returns a dictionary from the name of a site to a tensor. The local latents come first; their
    shape is (n, *event_shape). Then come the global latents, of shape (*event_shape), and the group
    latents, of shape (groups, *event_shape): both are shared by all rows. `pyro_vae.posterior`
    gives many joint draws. Raises `UsageError` for any other value of ``what``.

    >>> import torch, pyro_vae as pv
    >>> encode(pv.VAE.mlp((4,), latent_dim=3), torch.ones(5, 4))["z"].shape
    torch.Size([5, 3])
    """
    local, shared = encode_parts(pair, x, context, what, binarize, seed)
    return local | shared


def encode_parts(
    pair: nn.Module,
    x: Rows,
    context: Sequence[Any],
    what: str = "mean",
    binarize: str = "dynamic",
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the results of `encode` for local latents, and for global and group latents."""
    if what not in ("mean", "scale", "draw"):
        raise UsageError(f"must be 'mean', 'scale' or 'draw', got '{what}'", argument="what")
    team = here()
    with single():
        parts = team.gather(lambda: _encoded(pair, x, context, what, binarize, seed, team))
    found: dict[str, list[Tensor]] = {}
    for i in range(len(parts[0][0])):
        for batches, _ in parts:
            for name, value in batches[i].items() if i < len(batches) else ():
                found.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in found.items()}, parts[0][1]


def _encoded(
    pair: nn.Module,
    x: Rows,
    context: Sequence[Any],
    what: str,
    binarize: str,
    seed: int,
    team: Team,
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the local latents of each minibatch of this process, and those that all share.

    Every process encodes the first minibatch, which shows the latents that all rows share.
    """
    batches: list[dict[str, Tensor]] = []
    shared: dict[str, Site] = {}
    with using(pair, seed):
        for i, batch in enumerate(prepared_batches(pair, x, context, binarize)):
            if i and i % team.count != team.rank:
                continue
            found: dict[str, Tensor] = {}
            batches.append(found)
            # All batches have the same global latents.
            with Given({name: site["value"] for name, site in shared.items()}):
                guide = guide_of(pair, batch, what != "draw")
            for name, site in latents(guide).items():
                if not is_local(site):
                    shared.setdefault(name, site)
                elif (value := _wanted(site, what)) is not None:
                    found[name] = data_first(value, site).detach()
            if what != "scale":
                for name, value in summed_out(pair, batch, guide, what == "mean").items():
                    found[name] = value
            if i == 0 and not team.first:
                batches.clear()
                torch.manual_seed(derived(seed, "process", team.rank))
        own = {name: _wanted(site, what) for name, site in shared.items()}
    return batches, {name: value.detach() for name, value in own.items() if value is not None}


def _wanted(site: Site, what: str) -> Tensor | None:
    return _scale(site["fn"]) if what == "scale" else site["value"]


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
    r"""Return the posterior probabilities of a discrete latent: classes, clusters, components.

    If the guide has the site, the result is its :math:`q(y|x)`. If only the model has it and
    enumerates it, the result is :math:`E_{q(z|x)}[p(k|x, z)]`.

    Arguments:
        x, context: the data. Leave labels out: the pair takes given labels as true.
        site: the latent site; by default the first discrete one.
        num_samples: draws of the latents on which this one depends, if any. With S draws, the
            standard error of a probability is at most :math:`0.5 / \sqrt{S}`. Rows share draws of
            global and group latents.

    Returns a tensor of shape (n, number of values). Raises `UsageError` if no latent of this
    name has a finite list of values, and if ``num_samples`` is below 1.

    >>> import torch, pyro_vae as pv
    >>> pair = pv.SemiSupervisedVAE.mlp((4,), num_classes=3)
    >>> bool((predict(pair, torch.ones(5, 4)).sum(1) - 1 < 1e-6).all())
    True
    """
    if num_samples < 1:
        raise UsageError(f"must be at least 1, got {num_samples}", argument="num_samples")
    parts = []
    with using(pair, seed):
        for batch in prepared_batches(pair, x, context, binarize):
            names = enumeration.discrete(pair, batch)
            if not names or (site is not None and site not in names):
                raise UsageError(_without(pair, site, names))
            parts.append(summing.probabilities(pair, batch, site or names[0], num_samples))
    return torch.cat(parts)


def _without(pair: nn.Module, site: str | None, names: Sequence[str]) -> str:
    """Say why a site has no probabilities; ``names`` are the sites that have some."""
    kind = type(pair).__name__
    if not names:
        return (
            "predict needs a discrete latent that is in no plate except the data plate and has a "
            f"finite list of values, but {kind} has no such latent; use encode for other latents"
        )
    return f"`site` must be a discrete latent of {kind}, got '{site}'; {nearest(str(site), names)}"


def _scale(fn: Any) -> Tensor | None:
    """Return the standard deviation of a distribution; None for a category."""
    try:
        scale = fn.stddev
    except NotImplementedError:
        return fn.sample((100,)).std(0)
    return None if is_category(fn) else scale
