"""The estimates of log p(x) of each datum of a minibatch, from chunks of importance samples."""

from collections.abc import Callable
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.inference.pareto import LEAST, Greatest, shape_of_greatest, tail_length
from pyro_vae.pairs.pair import Batch
from pyro_vae.training.tracing import Named


class Weighed(NamedTuple):
    """The fields of `LogLikelihood` that have an entry for each datum, of shape (n,)."""

    per_datum: Tensor
    standard_errors: Tensor
    effective_sample_size: Tensor
    elbo_per_datum: Tensor
    elbo_standard_errors: Tensor
    pareto_k: Tensor
    infinite_weights: Tensor


def weighed(sums: Callable[..., Named], batch: Batch, num_samples: int, chunk: int) -> Weighed:
    """Compute the estimates of each datum of a batch from chunks of samples."""
    n = len(batch[0])
    first = torch.full((n,), -torch.inf, dtype=torch.float64)
    second, least = first.clone(), -first
    logs, squared_logs, infinite = (torch.zeros_like(first) for _ in range(3))
    greatest = Greatest(tail_length(num_samples) + 1)
    for start in range(0, num_samples, chunk):
        found = sums(batch[0].new_empty(min(chunk, num_samples - start)), *batch)
        first = torch.logaddexp(first, found["weights"].cpu())
        second = torch.logaddexp(second, found["squares"].cpu())
        logs += found["logs"].cpu()
        squared_logs += found["squared logs"].cpu()
        log_weights = found["log weights"].cpu()
        infinite += (~(log_weights < torch.inf)).sum(0)
        greatest.add(log_weights)
        least = torch.minimum(least, log_weights.amin(0))
    ratio = torch.exp(second - 2 * first)  # sum w^2 / (sum w)^2, at least 1/K
    errors = relative_error(ratio, num_samples)
    elbo = logs / num_samples
    spread = (squared_logs / num_samples - elbo.square()).clamp(min=0)
    if num_samples == 1:
        spread = torch.full_like(spread, torch.nan)
    elbo_errors = (spread / max(1, num_samples - 1)).sqrt()
    shapes = torch.full_like(first, torch.nan)
    if num_samples >= LEAST:
        kind = batch[0].dtype if batch[0].is_floating_point() else torch.get_default_dtype()
        shapes = _shapes(greatest.values(), least, torch.finfo(kind).eps)
    return Weighed(
        per_datum=first - log(num_samples),
        standard_errors=errors,
        effective_sample_size=1 / ratio,
        elbo_per_datum=elbo,
        elbo_standard_errors=elbo_errors,
        pareto_k=shapes,
        infinite_weights=infinite.long(),
    )


def relative_error(ratio: Tensor, number: int) -> Tensor:
    r"""Return the standard error of the mean of K weights, relative to that mean.

    It is :math:`\sqrt{\tfrac{K}{K - 1} (r - \tfrac1K)}` with :math:`r = \sum w^2 / (\sum w)^2`,
    and NaN for one weight, which gives no error.
    """
    if number == 1:
        return torch.full_like(ratio, torch.nan)
    return ((ratio - 1 / number).clamp(min=0) * number / (number - 1)).sqrt()


def _shapes(greatest: Tensor, least: Tensor, rounding: float) -> Tensor:
    """Return the shapes of the tails of log weights; 0 if the weights differ only by rounding."""
    spread, size = greatest[:, 0] - least, greatest[:, 0].abs().clamp(min=1)
    constant = torch.isfinite(size) & (spread <= 100 * rounding * size)
    return torch.where(constant, 0.0, shape_of_greatest(greatest))
