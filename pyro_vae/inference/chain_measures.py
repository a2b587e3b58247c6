"""How many independent draws chains are worth, and how well they can tell whether they agree."""

from math import log10

import torch
from scipy.stats import f
from torch import Tensor

TAILS = (0.05, 0.95)
"""The quantiles whose effective sample sizes give that of the tails."""

FALSE_REJECTION = 0.01
"""The probability that chains of one datum that agree are rejected, at most."""


def effective_draws(draws: Tensor) -> Tensor:
    r"""Return the effective sample size of the mean of draws (chains, draws, ...), of shape (...).

    :math:`S / \tau` with :math:`\tau = 1 + 2 \sum_t \rho_t` over S draws of split chains. The sum
    ends at the first negative pair of autocorrelations, and pairs do not increase (Geyer, 1992).
    :math:`\rho_t` contains the variance between chains, so chains that disagree are worth few
    draws. It is NaN if no chain moves.
    Vehtari et al., 2021 (https://arxiv.org/abs/1903.08008).

    >>> independent = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    >>> 1600 < effective_draws(independent) < 2500
    tensor(True)
    """
    return _effective(_split(draws))


def bulk_draws(draws: Tensor) -> Tensor:
    """Return the effective sample size of the ranks of draws (chains, draws, ...): of the bulk.

    It is 1 if no chain moves.
    """
    return effective_draws(normal_scores(draws)).nan_to_num(1.0)


def tail_draws(draws: Tensor) -> Tensor:
    """Return the smaller effective sample size of the 5 % and the 95 % quantile of draws."""
    ends = draws.flatten(0, 1).quantile(torch.tensor(TAILS, dtype=draws.dtype), dim=0)
    sizes = [effective_draws((draws <= end).to(draws.dtype)) for end in ends]
    return torch.fmin(*sizes).nan_to_num(float(len(draws) * draws.shape[1]))


def deviation_error(draws: Tensor) -> Tensor:
    r"""Return the Monte Carlo standard error of the standard deviation of draws, by the delta
    method: :math:`\mathrm{sd}((x - \bar x)^2) / (2 s \sqrt{S})` with S effective draws."""
    square = (draws - draws.mean((0, 1))).square()
    variance = square.mean((0, 1))
    spread = (square - variance).square().mean((0, 1)) / effective_draws(square)
    return (spread / variance / 4).sqrt()


def r_hat_limit(draws: Tensor, tests: int) -> Tensor:
    r"""Return the largest R-hat that chains of this length have if they agree, of shape (...).

    For M split chains that agree, each worth S independent draws by its own autocorrelations,
    :math:`(\hat R^2 - 1) S` is near an F distribution with M - 1 degrees of freedom. The limit is
    its quantile with probability `FALSE_REJECTION` / ``tests`` above it. The variance between
    chains does not enter S. So long chains that disagree stay far above the limit.
    """
    alone = _split(normal_scores(draws)).movedim(0, -1)[None]
    length, number = alone.shape[1], alone.shape[-1]
    variance_of_mean = (1 / _effective(alone)).mean(-1)
    # The autocorrelations are estimated too, with an error that falls with the length.
    quantile = f.isf(FALSE_REJECTION / tests, number - 1, number * length**0.5)
    return (1 + quantile * variance_of_mean).sqrt()


def largest_difference(apart: Tensor, chains: Tensor, guide: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the largest difference of correlations of each datum and its standard error, (n,).

    The error is that of :math:`uv - r (u^2 + v^2) / 2` for standardized draws u and v of the two
    units (delta method).

    Arguments:
        apart: absolute differences of correlations, (n, units, units).
        chains: draws of the posterior, (chains, draws, n, units).
        guide: independent draws of the guide, (draws, n, units).
    """
    units = apart.shape[1]
    above = torch.ones(units, units, dtype=torch.bool, device=apart.device).triu(1)
    largest, place = torch.where(above & ~apart.isnan(), apart, -1.0).flatten(1).max(1)
    one, other = place // units, place % units
    ours = _influence(*(_unit(chains, i) for i in (one, other)))
    theirs = _influence(*(_unit(guide[None], i) for i in (one, other)))
    error = (ours.var((0, 1)) / effective_draws(ours) + theirs.var((0, 1)) / len(guide)).sqrt()
    defined = largest >= 0
    return torch.where(defined, largest, torch.nan), torch.where(defined, error, torch.nan)


def _unit(draws: Tensor, unit: Tensor) -> Tensor:
    """Return a unit of each datum, (chains, draws, n), from draws (chains, draws, n, units)."""
    return draws.gather(-1, unit.expand(draws.shape[:-1])[..., None])[..., 0]


def _influence(u: Tensor, v: Tensor) -> Tensor:
    u, v = ((part - part.mean((0, 1))) / part.std((0, 1), correction=0) for part in (u, v))
    return u * v - (u * v).mean((0, 1)) * (u.square() + v.square()) / 2


def normal_scores(draws: Tensor) -> Tensor:
    """Return normal quantiles of the ranks of draws among all chains; ties share a rank."""
    values = draws.flatten(0, 1).movedim(0, -1).contiguous()
    ordered = values.sort(-1).values
    least, most = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    scores = torch.special.ndtri(((least + most + 1) / 2 - 0.375) / (values.shape[-1] + 0.25))
    return scores.to(draws.dtype).movedim(-1, 0).reshape(draws.shape)


def _split(draws: Tensor) -> Tensor:
    """Return the first and the last half of each chain as chains."""
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]])


def _effective(chains: Tensor) -> Tensor:
    """Return the effective sample size of chains (chains, draws, ...) as they are."""
    number, length = chains.shape[:2]
    covariance = _autocovariance(chains)
    within = covariance[:, 0].mean(0) * length / (length - 1)
    between = chains.mean(1).var(0) if number > 1 else torch.zeros_like(within)
    total = within * (length - 1) / length + between
    total = torch.where(within > 1e-12 * total, total, torch.nan)  # no chain moves
    rho = 1 - (within - covariance.mean(0)) / total
    rho[0] = 1.0
    even, odd = rho[0 : 2 * (length // 2) : 2], rho[1::2]
    pairs = even + odd
    counted = (pairs > 0).cumprod(0)
    first_left_out = counted.sum(0, keepdim=True).clamp(max=len(even) - 1)
    rest = even.gather(0, first_left_out)[0].clamp(min=0) * (1 - counted[-1])
    tau = -1 + 2 * (pairs.cummin(0).values * counted).sum(0) + rest
    draws = number * length
    return draws / tau.clamp(min=1 / log10(draws))


def _autocovariance(chains: Tensor) -> Tensor:
    """Return autocovariances (chains, lags, ...) of chains, each from its own mean."""
    length = chains.shape[1]
    frequencies = torch.fft.rfft(chains - chains.mean(1, keepdim=True), 2 * length, dim=1)
    powers = frequencies.abs().square()
    return torch.fft.irfft(powers, 2 * length, dim=1)[:, :length] / length
