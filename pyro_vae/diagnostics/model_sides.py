"""Rows through the inference of a pair: log p(x), posterior draws, residuals."""

from math import log
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.diagnostics.two_samples import WIDEST
from pyro_vae.errors import UsageError
from pyro_vae.inference.weighted import Weighted, log_weights_at, weighted_parts
from pyro_vae.pairs import masks
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.moments import num_values
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.sites import data_first, data_site, latents
from pyro_vae.pairs.traces import DataFirst, trace
from pyro_vae.parts.circular import circle_of, near

MOMENT_DRAWS = 50
"""Draws of a likelihood that has no mean or variance in closed form."""

TINY = 1e-8
"""An element with a smaller variance has no residual."""


class Side(NamedTuple):
    """One side of the comparison, by row."""

    log_likelihood: Tensor
    """log p(x), (n,)."""
    unreliable: Tensor
    """Whether the importance weights are not reliable, booleans (n,)."""
    codes: dict[str, Tensor]
    """A draw of the posterior of each local latent of real numbers, (n, units); 0 if masked."""
    classes: dict[str, Tensor]
    """The same of latents that are categories, as whole numbers; -1 if masked."""
    residuals: Tensor | None
    """Standardized residuals of x given this draw, (n, elements), NaN where x is missing."""
    scaled: bool
    """Whether the likelihood has a scale."""
    scores: dict[str, Tensor]
    """Normal scores of true values among weighted draws, (n, units of the site); NaN if masked."""
    bridge: Tensor
    """Three numbers of each row, (n, 3), see `_bridge`; NaN without true latents."""
    context: Tensor
    """The columns of the context that vary, (n, columns), at most `WIDEST`."""

    def kept(self, rows: Tensor) -> "Side":
        """Return some of the rows."""
        return Side(
            self.log_likelihood[rows],
            self.unreliable[rows],
            {name: part[rows] for name, part in self.codes.items()},
            {name: part[rows] for name, part in self.classes.items()},
            None if self.residuals is None else self.residuals[rows],
            self.scaled,
            {name: part[rows] for name, part in self.scores.items()},
            self.bridge[rows],
            self.context[rows],
        )

    @property
    def units(self) -> tuple[str, ...]:
        """The names of the units with ``scores``."""
        return tuple(
            name + (f"[{i}]" if part.shape[1] > 1 else "")
            for name, part in self.scores.items()
            for i in range(part.shape[1])
        )


def through_inference(
    pair: nn.Module, batch: Batch, truth: dict[str, Tensor], num_samples: int
) -> Side:
    """Draw latents of each row by weighted draws of the guide; ``truth`` are the true latents."""
    parts, start = [], 0
    true_weights = _weights_of_truth(pair, batch, truth)
    for part in weighted_parts(pair, batch, num_samples):
        n = part.log_weights.shape[1]
        own = tuple(tensor[start : start + n] for tensor in batch)
        true = {
            name: truth[name].reshape(len(batch[0]), -1)[start : start + n]
            for name, value in part.values.items()
            if _ranks(value, truth.get(name), n * num_samples) and len(truth[name]) == len(batch[0])
        }
        bridge = _bridge(part, true_weights[start : start + n])
        parts.append(_of_rows(pair, own, part, true, bridge))
        start += n
    residuals = [part.residuals for part in parts if part.residuals is not None]
    return Side(
        torch.cat([part.log_likelihood for part in parts]),
        torch.cat([part.unreliable for part in parts]),
        {name: torch.cat([part.codes[name] for part in parts]) for name in parts[0].codes},
        {name: torch.cat([part.classes[name] for part in parts]) for name in parts[0].classes},
        torch.cat(residuals) if len(residuals) == len(parts) else None,
        parts[0].scaled,
        {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
        torch.cat([part.bridge for part in parts]),
        _varying(torch.cat([part.context for part in parts])),
    )


def _varying(columns: Tensor) -> Tensor:
    return columns[:, (columns != columns[:1]).any(0)][:, :WIDEST]


def _ranks(draws: Tensor, truth: Tensor | None, number: int) -> bool:
    """Whether true values of a site can be ranked among its draws: real numbers of each datum."""
    return (
        truth is not None
        and draws.is_floating_point()
        and len(draws) == number
        and truth[0].numel() == draws[0].numel()
        and truth.shape[1:] == draws.shape[1:]
    )


def _scores(draws: Tensor, truth: Tensor, shares: Tensor) -> Tensor:
    """Return normal scores of true values (n, units) among weighted draws (K n, ...).

    Of equal values half are below.
    """
    samples, n = shares.shape
    values = draws.reshape(samples, n, -1)
    lower = (values < truth).double() + (values == truth).double() / 2
    below = (shares[..., None] * lower).sum(0)
    size = 1 / shares.square().sum(0)[:, None]  # as among so many draws without weights
    return torch.special.ndtri((below * size + 0.5) / (size + 1)).cpu()


def _weights_of_truth(pair: nn.Module, batch: Batch, truth: dict[str, Tensor]) -> Tensor:
    """Return the log importance weights of the true latents, (n,); NaN if they are not known."""
    if not latents(trace_guide(pair, batch)).keys() <= truth.keys():
        return torch.full((len(batch[0]),), torch.nan, dtype=torch.float64)
    with pyro.validation_enabled(False):  # the guide may have no density at the true latents
        return log_weights_at(pair, batch, truth).cpu()


def _bridge(part: Weighted, true_weights: Tensor) -> Tensor:
    r"""Return the mean of u / (1 + u) over draws of the guide, 1 / (1 + u) at the true latents, and
    the bias of the logarithm of the mean weight.

    Here u is a weight divided by the mean weight :math:`\hat p` of the row. With
    :math:`c = \hat p / p(x)` the expectation of the second number is c times that of the first. So
    their means over rows show by which factor :math:`\hat p` is too low, also where the guide has
    no draws. Bennett, 1976; Meng & Wong, Simulating ratios of normalizing constants, 1996. The bias
    is about half of the relative variance of :math:`\hat p`.
    """
    samples = len(part.log_weights)
    log_mean = part.log_weights.logsumexp(0) - log(samples)
    draws = (part.log_weights - log_mean).sigmoid().mean(0)
    bias = (1 / part.effective_sample_size - 1 / samples).cpu() / 2
    truth = (log_mean.cpu() - true_weights).sigmoid()
    return torch.stack([draws.cpu(), truth, bias], 1)


def _of_rows(
    pair: nn.Module, batch: Batch, part: Weighted, truth: dict[str, Tensor], bridge: Tensor
) -> Side:
    samples, n = part.log_weights.shape
    log_p = part.log_weights.logsumexp(0) - torch.tensor(float(samples)).log()
    unreliable = ~(part.reliable & log_p.isfinite())
    chosen = torch.multinomial(part.shares.nan_to_num(1.0).T, 1)[:, 0].to(batch[0].device)
    index = chosen * n + torch.arange(n, device=batch[0].device)
    values = {
        name: value[index] for name, value in part.values.items() if len(value) == samples * n
    }
    with DataFirst(dict(values)):
        model = trace(cast(Pair, pair).model, batch)
    residuals, scaled = _residuals(model, batch[0])
    counts = _counts(model, values)
    codes = {
        name: torch.where(counts[name], value.reshape(n, -1).double().cpu(), 0.0)
        for name, value in values.items()
        if value.is_floating_point() and value.numel()
    }
    classes = {
        name: torch.where(counts[name], value.reshape(n, -1).cpu(), -1)
        for name, value in values.items()
        if not value.is_floating_point() and value.numel()
    }
    scores = {
        name: torch.where(counts[name], _scores(part.values[name], true, part.shares), torch.nan)
        for name, true in truth.items()
    }
    wide = [torch.zeros(n, 0), *(part.reshape(n, -1).cpu() for part in batch[1:])]
    context = torch.cat([part.double().nan_to_num(0.0) for part in wide], 1)
    weighted = log_p.cpu(), unreliable.cpu()
    return Side(*weighted, codes, classes, residuals, scaled, scores, bridge, context)


def _counts(model: Trace, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return which units of each latent count, (n, units): their density says nothing of those
    that a mask hides, such as the padding of a group."""
    found = {name: torch.ones(1, 1, dtype=torch.bool) for name in values}
    for name, site in latents(model).items():
        if name in values and masks.is_masked(site):
            counts = data_first(masks.scored(site), site)
            found[name] = counts.reshape(len(counts), -1).cpu()
    return found


def _residuals(model: Trace, x: Tensor) -> tuple[Tensor | None, bool]:
    """Return standardized residuals (n, elements) of x, and whether the likelihood has a scale."""
    try:
        site = data_site(model)
    except UsageError:  # several sites observe x
        return None, False
    mean, variance = _mean_and_variance(site["fn"])
    if not bool((mean + variance).isfinite().any()):
        return None, False
    value = masks.seen(site, x).double()
    mean, variance = (
        data_first(part.expand(site["value"].shape), site).double().reshape(value.shape)
        for part in (mean, variance)
    )
    if (circle := circle_of(site["fn"])) is not None:
        value = near(value, mean, circle.period)
    found = torch.where(variance > TINY, (value - mean) / variance.sqrt(), torch.nan)
    return found.reshape(len(x), -1).cpu(), _has_scale(site["fn"])


def _mean_and_variance(fn: Any) -> tuple[Tensor, Tensor]:
    """Return the moments of a distribution, in closed form or from draws."""
    try:
        return fn.mean, fn.variance
    except NotImplementedError:
        draws = fn.sample((MOMENT_DRAWS,)).double()
        return draws.mean(0), draws.var(0)


def _has_scale(fn: Any) -> bool:
    """Whether residuals can be too large or small for their mean: not if values are 0 or 1."""
    support: Any = getattr(fn, "support", None)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support in (constraints.boolean, constraints.one_hot) or support is None:
        return False
    return num_values(fn) != 2
