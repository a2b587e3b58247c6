"""`uncertainty`: the variance of predictions, split by its sources."""

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
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.sites import data_first
from pyro_vae.pairs.threads import alone

ROWS_TIMES_DRAWS = 2000
"""Number of rows times draws of the latents in one pass through a pair."""


@dataclass(frozen=True)
class Uncertainty:
    r"""The variance of the prediction of each datum, split by its sources.

    All tensors have shape (n, *data_shape). Variances are in squares of the data's unit, and the
    three parts add up to ``total``.
    """

    mean: Tensor
    """:math:`E[x']`, over weights, latents and noise."""
    noise: Tensor
    r""":math:`E_{w,z}\,\mathrm{Var}(x' | z, w)`: the variance of the likelihood."""
    latent: Tensor
    r""":math:`E_w\,\mathrm{Var}_z\,E[x' | z, w]`: the uncertainty of the code given x."""
    weights: Tensor
    r""":math:`\mathrm{Var}_w\,E_z\,E[x' | z, w]`: the uncertainty of the decoder. The estimate is
    unbiased, so it may be negative if the true value is near 0."""
    num_weights: int
    """Draws of the global latents."""
    num_samples: int
    """Draws of the local latents for each draw of the global latents."""

    @property
    def epistemic(self) -> Tensor:
        """The variance that more data of the same kind would remove: ``weights``."""
        return self.weights

    @property
    def aleatoric(self) -> Tensor:
        """The variance that more data would not remove: ``noise + latent``."""
        return self.noise + self.latent

    @property
    def total(self) -> Tensor:
        """The variance of the prediction."""
        return self.aleatoric + self.epistemic

    def as_dict(self) -> dict[str, Any]:
        """Return means over data and elements for metrics.json."""
        parts = {name: getattr(self, name) for name in ("noise", "latent", "weights", "total")}
        means = {f"{name}_variance": part.mean().item() for name, part in parts.items()}
        return means | {"num_weights": self.num_weights, "num_samples": self.num_samples}

    _repr_html_ = shown_html

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
    r"""Split the variance of reconstructions into the parts due to noise, codes and weights.

    The law of total variance, for :math:`w \sim q(w)`, :math:`z \sim q(z|x, w)` and
    :math:`x' \sim p(x|z, w)`, is

    .. math:: \mathrm{Var}(x') = E_{w,z}\mathrm{Var}(x'|z,w) + E_w\mathrm{Var}_z E[x'|z,w]
        + \mathrm{Var}_w E_z E[x'|z,w]

    Arguments:
        pair: any pair with global latents, such as a `BayesianDecoder`.
        x, context: data, as `pyro_vae.evaluate` takes them.
        num_weights: draws of the global latents, at least 2.
        num_samples: draws of the local latents for each of them, at least 2.
        site: the observed site; the first by default.
        binarize, seed: as in `pyro_vae.evaluate`.
        progress: show a bar if the run takes over two seconds.

    All three estimates are unbiased. Raises `UsageError` for a pair without global latents or with
    point estimates of them, and for data without a variance, such as categories. Depeweg et al.,
    2018 (https://arxiv.org/abs/1710.07283), where local latents count as noise; Kendall & Gal, 2017
    (https://arxiv.org/abs/1703.04977).

    >>> import torch, pyro_vae as pv
    >>> pair = pv.BayesianDecoder(pv.VAE.mlp((4,), latent_dim=2, hidden=(3,)))
    >>> uncertainty(pair, torch.ones(5, 4), num_weights=3, progress=False).epistemic.shape
    torch.Size([5, 4])
    """
    for name, value in (("num_weights", num_weights), ("num_samples", num_samples)):
        if value < 2:
            raise UsageError(f"must be at least 2, got {value}", argument=name)
    rows, prepare = held_rows(pair, x, context, binarize)
    few = prepare(rows.first(2))
    shared = global_latents(pair, few)
    if shared and set(shared) <= set(fold_plan.plan(pair, few).points):
        raise UsageError(
            f"the guide of '{shared[0]}' is a Delta, a point estimate without variance; "
            "uncertainty needs a guide with a density"
        )
    if not shared:
        raise UsageError(
            f"{type(pair).__name__} has no global latent, but uncertainty needs one; use "
            "pyro_vae.BayesianDecoder"
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
        means.var(0) - latent / num_samples,  # a mean of few draws has a variance of its own
        num_weights,
        num_samples,
    )


def _moments(
    pair: nn.Module, batch: Batch, num_samples: int, site: str | None, summed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return moments of the prediction for one draw of the global latents.

    They are its mean and variance over draws of the local latents, and the mean of its variance
    given the local latents.
    """
    repeated = tuple(part.repeat(num_samples, *[1] * (part.dim() - 1)) for part in batch)
    found = observation(pair, repeated, latent_values(pair, repeated, False), site)
    fn = found["fn"]
    if is_category(fn):
        raise UsageError(f"site '{found['name']}' has categories, which have no variance")
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
