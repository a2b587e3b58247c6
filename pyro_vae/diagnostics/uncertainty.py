"""`uncertainty`: the variance of predictions, told apart by its sources."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError
from pyro_vae.inference.passes import latent_values, observation
from pyro_vae.pairs import enumeration, fold_plan
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.moments import is_category, mean
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import data_first
from pyro_vae.pairs.threads import alone

ROWS_TIMES_DRAWS = 2000
"""Rows, times draws of the latents, that go through a pair at once."""


@dataclass(frozen=True)
class Uncertainty:
    r"""The variance of what a pair predicts in place of each datum, told apart by its sources.

    Of shape (n, *data_shape), in squares of the data's unit; the three add up to ``total``.
    """

    mean: Tensor
    """:math:`E[x']`, over weights, latents and noise."""
    noise: Tensor
    r""":math:`E_{w,z}\,\mathrm{Var}(x' | z, w)`: what the likelihood leaves open."""
    latent: Tensor
    r""":math:`E_w\,\mathrm{Var}_z\,E[x' | z, w]`: what is unknown of the code given x."""
    weights: Tensor
    r""":math:`\mathrm{Var}_w\,E_z\,E[x' | z, w]`: what is unknown of the decoder. Unbiased, so that
    where it is near 0 it may fall below."""
    num_weights: int
    """Draws of the latents outside the data plate."""
    num_samples: int
    """Draws of those of each datum, for each of them."""

    @property
    def epistemic(self) -> Tensor:
        """What more data of the same kind would take away: ``weights``."""
        return self.weights

    @property
    def aleatoric(self) -> Tensor:
        """What they would not: ``noise + latent``."""
        return self.noise + self.latent

    @property
    def total(self) -> Tensor:
        """The variance of the prediction."""
        return self.aleatoric + self.epistemic

    def as_dict(self) -> dict[str, Any]:
        """Means over data and elements, as metrics.json holds them."""
        parts = {name: getattr(self, name) for name in ("noise", "latent", "weights", "total")}
        means = {f"{name}_variance": part.mean().item() for name, part in parts.items()}
        return means | {"num_weights": self.num_weights, "num_samples": self.num_samples}

    def __str__(self) -> str:
        whole = self.total.mean().item()
        rows = [
            ("noise", "aleatoric", self.noise),
            ("latent", "aleatoric", self.latent),
            ("weights", "epistemic", self.weights),
        ]
        lines = [
            f"{name:<10}{kind:<11}{part.mean().item():>12.4g}{part.mean().item() / whole:>8.1%}"
            for name, kind, part in rows
        ]
        return "\n".join([f"{'variance of':<21}{'mean':>12}{'share':>8}", *lines])


@alone()
def uncertainty(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_weights: int = 30,
    num_samples: int = 10,
    site: str | None = None,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> Uncertainty:
    r"""Tell apart the spread of reconstructions that comes from noise, codes and weights.

    By the law of total variance, for :math:`w \sim q(w)`, :math:`z \sim q(z|x, w)`,
    :math:`x' \sim p(x|z, w)`:

    .. math:: \mathrm{Var}(x') = E_{w,z}\mathrm{Var}(x'|z,w) + E_w\mathrm{Var}_z E[x'|z,w]
        + \mathrm{Var}_w E_z E[x'|z,w]

    Arguments:
        pair: any pair with latents outside the data plate, such as a `BayesianDecoder`.
        x, context: data, as `pyro_vae.evaluate` takes them.
        num_weights: draws of those latents, 2 or more.
        num_samples: draws of each datum's own latents, for each of them; 2 or more.
        site: which observed site; the first by default.

    All three are unbiased. Raises `UsageError` for a pair without such latents, and for data
    without a variance, as names have none. The parts: Depeweg et al., 2018
    (https://arxiv.org/abs/1710.07283), where the latents of a datum are counted as noise; Kendall &
    Gal, 2017 (https://arxiv.org/abs/1703.04977).

    >>> import torch, pyro_vae as pv
    >>> pair = pv.BayesianDecoder(pv.VAE.mlp((4,), latent_dim=2, hidden=(3,)))
    >>> uncertainty(pair, torch.ones(5, 4), num_weights=3, progress=False).epistemic.shape
    torch.Size([5, 4])
    """
    for name, value in (("num_weights", num_weights), ("num_samples", num_samples)):
        if value < 2:
            raise UsageError(f"{name} must be 2 or more, {value} came: a variance takes two")
    rows, prepare = held_rows(pair, x, context, binarize)
    few = prepare(rows.first(2))
    shared = global_latents(pair, few)
    if shared and set(shared) <= set(fold_plan.plan(pair, few).points):
        raise UsageError(
            f"the guide of '{shared[0]}' is a Delta, a point estimate: it has no spread that could "
            "be told apart"
        )
    if not shared:
        raise UsageError(
            f"{type(pair).__name__} has no latent outside the data plate, whose spread could be "
            "told apart: make one by pyro_vae.BayesianDecoder"
        )
    parts, summed = [], enumeration.enumerates(pair, few)
    total = len(rows) * num_weights
    with using(pair, seed), bar(progress, total, "uncertainty", delay=2) as shown:
        for given in rows.batches(max(1, ROWS_TIMES_DRAWS // num_samples)):
            batch = prepare(given)
            moments = []
            for _ in range(num_weights):
                moments.append(_moments(pair, batch, num_samples, site, summed))
                shown.update(len(batch[0]))
            parts.append([torch.stack(column) for column in zip(*moments, strict=True)])
    means, spreads, noise = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    latent = spreads.mean(0)
    return Uncertainty(
        means.mean(0),
        noise.mean(0),
        latent,
        means.var(0) - latent / num_samples,  # a mean of few draws varies with them, too
        num_weights,
        num_samples,
    )


def _moments(
    pair: nn.Module, batch: Batch, num_samples: int, site: str | None, summed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For one draw of the latents that all data share: mean and variance over draws of each
    datum's own of what is predicted, and the mean of its variance given them."""
    repeated = tuple(part.repeat(num_samples, *[1] * (part.dim() - 1)) for part in batch)
    found = observation(pair, repeated, latent_values(pair, repeated, False), site)
    fn = found["fn"]
    if is_category(fn):
        raise UsageError(f"site '{found['name']}' is of names, which have no variance")
    means, noise = (
        data_first(moment, found).unflatten(0, (num_samples, len(batch[0])))
        for moment in (mean(fn), _variance(fn))
    )
    return means.mean(0), means.var(0), noise.mean(0)


def _variance(fn: Any) -> Tensor:
    try:
        return cast(Tensor, fn.variance)
    except NotImplementedError:
        return fn.sample((100,)).to(torch.get_default_dtype()).var(0)
