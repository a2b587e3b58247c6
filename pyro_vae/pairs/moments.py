"""Means and modes of distributions."""

from typing import Any, cast

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Independent, constraints

from pyro_vae.errors import UsageError


def mean(fn: Any, num_samples: int = 100) -> Tensor:
    """The mean of a distribution: in closed form, or else the average of ``num_samples`` draws."""
    closed = _closed_mean(fn)
    if closed is None or bool(closed.isnan().any()):  # torch's Categorical has a mean of NaN
        draws = _draws(fn, num_samples)
        return (draws if draws.is_floating_point() else draws.to(torch.get_default_dtype())).mean(0)
    return closed


def _draws(fn: Any, number: int) -> Tensor:
    try:
        return cast(Tensor, fn.sample((number,)))
    except NotImplementedError:  # Pyro needs no more than a call, as of its ZukoToPyro
        with torch.no_grad():
            return cast(Tensor, fn(torch.Size([number])))


def _closed_mean(fn: Any) -> Tensor | None:
    try:
        return cast(Tensor, fn.mean)
    except NotImplementedError:
        return None


def support_of(fn: Any) -> Any:
    """The support of a distribution; raise `UsageError` if its class does not define one."""
    try:
        return fn.support
    except NotImplementedError:
        raise UsageError(
            f"{type(fn).__name__} does not define its support; subclass it and set support, for "
            "example to torch.distributions.constraints.real_vector"
        ) from None


def is_discrete(fn: Any) -> bool:
    """Whether the values are discrete; without a support, reparametrized draws are continuous."""
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:
        return not fn.has_rsample and bool(support_of(fn).is_discrete)


def is_category(fn: Any) -> bool:
    """Whether a distribution is over unordered classes, which have a mode but not a mean."""
    closed = _closed_mean(fn) if is_discrete(fn) else None
    return closed is not None and bool(closed.isnan().any())


def typical(fn: Any) -> Tensor:
    """The mean of each entry of a distribution, or its mode if it has no mean, as for classes.

    For one-hot classes the mean is the vector of class probabilities.
    """
    closed = _closed_mean(fn)
    if closed is None:
        return mean(fn)
    absent = closed.isnan()
    if not bool(absent.any()):
        return closed
    found = mode(fn)
    return found if bool(absent.all()) else torch.where(absent, found, closed)


def has_mean(fn: Any) -> Tensor:
    """Which entries of a distribution have a mean: all but classes, booleans of its full shape."""
    shape = fn.batch_shape + fn.event_shape
    closed = _closed_mean(fn)
    return torch.ones(shape, dtype=torch.bool) if closed is None else ~closed.isnan().expand(shape)


def mode(fn: Any) -> Tensor:
    """The most probable value of a distribution."""
    if isinstance(fn, (Independent, MaskedDistribution)):
        return mode(fn.base_dist)
    try:
        return fn.mode
    except NotImplementedError:
        pass
    if fn.event_shape or not num_values(fn):
        raise UsageError(
            f"{type(fn).__name__} has neither a mode nor a list of values; give it a property mode"
        )
    values = [torch.full_like(fn.mean, k) for k in range(num_values(fn))]
    return torch.stack([fn.log_prob(value) for value in values]).argmax(0)


def num_values(fn: Any) -> int:
    """The number of values of each element if they are 0, 1, ...; 0 for other distributions."""
    support = support_of(fn)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if not isinstance(support, constraints.integer_interval) or int(support.lower_bound) != 0:
        return 0
    return int(support.upper_bound) + 1
