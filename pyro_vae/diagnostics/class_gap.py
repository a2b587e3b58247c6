"""What the ELBO loses because q(y | x) of an enumerated class is not the best one."""

from math import isnan, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError
from pyro_vae.inference.passes import prepared_batches
from pyro_vae.pairs import enumeration, summing
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.threads import alone


class ClassGap(NamedTuple):
    """The result of `class_gap`."""

    per_datum: Tensor
    """Nats of each datum, (n,)."""
    sites: tuple[str, ...]
    """The enumerated latents of the guide."""
    num_samples: int
    """Draws of the other latents for each datum."""

    @property
    def value(self) -> float:
        """The mean over the data, nats per example."""
        return self.per_datum.mean().item()

    @property
    def standard_error(self) -> float:
        """The error of the mean by the spread of the data; NaN for one datum."""
        if len(self.per_datum) < 2:
            return nan
        return self.per_datum.std().item() / len(self.per_datum) ** 0.5

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for metrics.json."""
        return {
            "value": self.value,
            "standard_error": None if isnan(self.standard_error) else self.standard_error,
            "sites": list(self.sites),
            "num_examples": len(self.per_datum),
            "num_samples": self.num_samples,
        }

    def _repr_html_(self) -> str:
        return shown_html(self)

    def __str__(self) -> str:
        return (
            f"another q of {', '.join(self.sites)} would raise the ELBO by {self.value:.3f} ± "
            f"{self.standard_error:.3f} nats per example ({len(self.per_datum)} data)"
        )


def class_sites(pair: nn.Module, batch: Batch) -> list[str]:
    """Return the latents that the guide enumerates."""
    with using(pair, 0):
        return enumeration.to_enumerate(
            enumeration.glance(pair, tuple(part[:2] for part in batch))[0]
        )


@alone()
def class_gap(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_samples: int = 20,
    binarize: str = "dynamic",
    seed: int = 0,
) -> ClassGap:
    r"""Measure how far q(y | x) of the enumerated latents y is from the best one.

    Given q(z | x, y), the ELBO is largest for :math:`q(y|x) \propto e^{g(y)}` with
    :math:`g(y) = E_q \log p(x, y, z) / q(z|x, y)`. The gap is the KL of q(y | x) from it. log p(x)
    by importance weights sums over y, so it does not depend on q(y | x) and cannot show this.

    Arguments:
        pair: any pair whose guide enumerates a latent, and whose latents are all local.
        x, context: data; the gap has one number for each of the n rows, in nats.
        num_samples: draws of z for each row, at least 2.
        binarize, seed: as in `pyro_vae.evaluate`.

    Raises `UsageError` if the guide enumerates nothing, if a latent is global, or if the sums are
    factored (as in HMMs).

    >>> import torch, pyro_vae as pv
    >>> pair = pv.SemiSupervisedVAE.mlp((6,), num_classes=3)
    >>> found = pv.class_gap(pair, torch.rand(50, 6).round(), torch.full((50,), -1))
    >>> found.sites, found.per_datum.shape, found.value > -0.1
    (('y',), torch.Size([50]), True)
    """
    if num_samples < 2:
        raise UsageError(f"num_samples must be at least 2, got {num_samples}")
    parts: list[Tensor] = []
    sites: list[str] = []
    with using(pair, seed):
        for batch in prepared_batches(pair, x, context, binarize):
            sites = sites or _served(pair, batch)
            parts.append(_of_rows(pair, batch, num_samples))
    return ClassGap(torch.cat(parts), tuple(sites), num_samples)


def _served(pair: nn.Module, batch: Batch) -> list[str]:
    """Return the latents that the guide enumerates, or raise `UsageError`."""
    if shared := global_latents(pair, batch):
        raise UsageError(
            f"class_gap serves pairs whose latents are all local, and '{shared[0]}' is global"
        )
    sites = class_sites(pair, batch)
    if not sites:
        raise UsageError("class_gap needs a guide that enumerates a latent; gaps serves the others")
    return sites


def _of_rows(pair: nn.Module, batch: Batch, num_samples: int) -> Tensor:
    """Return the gap of some rows, (n,)."""
    plates = enumeration.nesting(pair, batch)
    passes = [
        summing.by_value(*enumeration.traces(pair, batch, plates)) for _ in range(num_samples)
    ]
    ratios, log_q = (torch.stack(part).double().cpu() for part in zip(*passes, strict=True))
    if torch.equal(log_q, log_q[:1].expand_as(log_q)):  # y does not depend on other latents
        return _of_mean(ratios, log_q[0])
    return _kl(ratios, log_q).mean(0)


def _of_mean(ratios: Tensor, log_q: Tensor) -> Tensor:
    """Return the KL at the mean of the draws.

    The mean of few draws differs from class to class by chance, so the KL is too large. The
    jackknife removes this bias.
    """
    k, mean = len(ratios), ratios.mean(0)
    others = torch.where(ratios.isinf(), ratios, (k * mean - ratios) / (k - 1))
    without = _kl(others, log_q).mean(0)
    return k * _kl(mean, log_q) - (k - 1) * without


def _kl(ratios: Tensor, log_q: Tensor) -> Tensor:
    """The KL of q and the probabilities in proportion to exp(ratios), (..., values, n)."""
    q = log_q.exp()
    terms = torch.where(q > 0, q * (log_q - ratios), 0.0)
    return ratios.logsumexp(-2) + terms.sum(-2)
