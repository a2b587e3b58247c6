"""Draws of chains by NUTS: their moments, their agreement, and their distance from the guide."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from pyro_vae.inference.chain_measures import (
    bulk_draws,
    deviation_error,
    effective_draws,
    largest_difference,
    normal_scores,
    r_hat_limit,
    tail_draws,
)
from pyro_vae.pairs.showing import shown_html

STARTS = 10
"""Draws of the prior for each chain. Chains start at the first draws with a finite density."""

PER_UNIT = 5
"""Least number of warm-up transitions for each unit to adapt a full mass matrix."""

AGREEING_R_HAT = 1.01
"""Chains agree up to this R-hat (Vehtari et al., 2021, https://arxiv.org/abs/1903.08008)."""

ENOUGH_DRAWS = 400
"""Least effective sample size of bulk and tails for which errors and R-hat are reliable (Vehtari et
al., 2021)."""


class Moments(NamedTuple):
    """Moments of draws for each unit."""

    mean: Tensor
    """Means, of shape (n, units)."""
    standard_deviation: Tensor
    """Standard deviations, of shape (n, units)."""
    correlation: Tensor
    """Correlations, of shape (n, units, units)."""


@dataclass(frozen=True)
class Posterior:
    """Draws of the posterior of a few data by NUTS, and draws of the guide for comparison.

    A unit is one number of a latent site. The units of all sites are concatenated; ``units`` has
    their names. Units that do not vary (padding of sequences and masked entries) have NaN in all
    results.
    """

    draws: dict[str, Tensor]
    """Draws of each latent site by NUTS, of shape (chains, draws, n, *event)."""
    guide_draws: dict[str, Tensor]
    """The same total number of draws of the guide, of shape (draws, n, *event)."""
    units: tuple[str, ...]
    """The names of the units, such as "z[0]"."""
    r_hat: Tensor
    """Rank-normalized split R-hat of the draws and of their distances from the median (folded),
    the larger of the two, of shape (n, units). See ``agrees`` for its limit."""
    effective_sample_size: Tensor
    """Number of independent draws with the same information about a mean, of shape (n, units)."""
    divergences: Tensor
    """Number of transitions after the warm-up that diverged, for each datum, of shape (n,)."""
    centers: Mapping[str, Tensor] = field(default_factory=dict)
    """The mean direction of the posterior of each latent that is an angle, of shape (n, *event), in
    radians. Results about an angle use its draws within pi of this direction, so they do not depend
    on where the circle is cut."""

    @cached_property
    def moves(self) -> Tensor:
        """Which units vary, of shape (n, units): those on which p(x, z) depends."""
        return _vary(self._chains)

    @cached_property
    def moments(self) -> Moments:
        """The moments of the posterior."""
        return _moments(self._chains.flatten(0, 1), self.moves)

    @cached_property
    def guide_moments(self) -> Moments:
        """The moments of the guide."""
        return _moments(_flat(self.guide_draws, 1, self.centers), self.moves)

    @cached_property
    def bulk_effective_sample_size(self) -> Tensor:
        """The effective sample size of the ranks of the draws, of shape (n, units)."""
        return _measured(bulk_draws, self._chains)

    @cached_property
    def tail_effective_sample_size(self) -> Tensor:
        """The smaller effective sample size of the 5 % and 95 % quantiles, of shape (n, units)."""
        return _measured(tail_draws, self._chains)

    @property
    def too_few_draws(self) -> Tensor:
        """Whether the least bulk or tail effective sample size of a datum is below 400, (n,)."""
        sizes = torch.fmin(self.bulk_effective_sample_size, self.tail_effective_sample_size)
        return _greatest(-sizes) > -ENOUGH_DRAWS

    @property
    def mean_standard_error(self) -> Tensor:
        """The Monte Carlo error of the posterior means, of shape (n, units)."""
        return self.moments.standard_deviation / self.effective_sample_size.sqrt()

    @cached_property
    def standard_deviation_error(self) -> Tensor:
        """The Monte Carlo error of the posterior standard deviations, of shape (n, units)."""
        return _measured(deviation_error, self._chains)

    @property
    def shift(self) -> Tensor:
        """Means of the guide minus those of the posterior, of shape (n, units), in standard
        deviations of the posterior."""
        p, q = self.moments, self.guide_moments
        return (q.mean - p.mean) / p.standard_deviation

    @property
    def scale_ratio(self) -> Tensor:
        """Standard deviations of the guide divided by those of the posterior, (n, units)."""
        return self.guide_moments.standard_deviation / self.moments.standard_deviation

    @property
    def disagreement(self) -> Tensor:
        r"""The distance between guide and posterior, in nats, of shape (n, units).

        It is :math:`\tfrac12 (r^2 + d^2 - 1) - \log r` with r the ``scale_ratio`` and d the
        ``shift``: the KL of two normals with these moments.
        """
        ratio = self.scale_ratio
        return 0.5 * (ratio.square() + self.shift.square() - 1) - ratio.log()

    @property
    def correlation_error(self) -> Tensor:
        """The largest absolute difference between a correlation of the guide and of the posterior,
        of shape (n,); NaN for a datum with one unit."""
        return self._correlations[0]

    @property
    def correlation_standard_error(self) -> Tensor:
        """The Monte Carlo standard error of this difference, of shape (n,), for its pair of units.
        The largest of many differences is over two errors even if all correlations are equal."""
        return self._correlations[1]

    @cached_property
    def _correlations(self) -> tuple[Tensor, Tensor]:
        guide, moments = self.guide_moments, self.moments
        apart = (guide.correlation - moments.correlation).abs()
        return largest_difference(apart, self._chains, _flat(self.guide_draws, 1, self.centers))

    @cached_property
    def r_hat_limit(self) -> Tensor:
        """The R-hat up to which chains of this length agree, of shape (n, units): at least 1.01."""
        tests = 2 * int(self.moves.sum(1).max().clamp(min=1))  # of location and of spread
        limit = _measured(partial(r_hat_limit, tests=tests), self._chains)
        # A chain that does not move has no autocorrelations, so it gets no allowance.
        return limit.nan_to_num(0.0).clamp(min=AGREEING_R_HAT)

    @property
    def agrees(self) -> Tensor:
        """Whether the chains of each datum agree and none diverged, of shape (n,).

        They agree if each R-hat is at most ``r_hat_limit``. Few draws alone do not make them
        disagree; ``too_few_draws`` says that they cannot serve as a reference.
        """
        apart = (self.r_hat > self.r_hat_limit) | self.r_hat.isinf()
        return ~apart.any(1) & (self.divergences == 0)

    @cached_property
    def _chains(self) -> Tensor:
        return _flat(self.draws, 2, self.centers)

    def as_dict(self) -> dict[str, Any]:
        """Return the results over data and units for metrics.json; NaN becomes None."""
        chains, draws, n = next(iter(self.draws.values())).shape[:3]
        correlated = self.guide_moments.correlation - self.moments.correlation
        found = {
            "greatest_r_hat": _greatest(self.r_hat).max(),
            "least_effective_sample_size": _least(self.effective_sample_size),
            "least_bulk_effective_sample_size": _least(self.bulk_effective_sample_size),
            "least_tail_effective_sample_size": _least(self.tail_effective_sample_size),
            "mean_shift": self.shift.abs().nanmean(),
            "mean_scale_ratio": self.scale_ratio.nanmean(),
            "mean_correlation_error": correlated.abs().nanmean(),
            "greatest_correlation_error": self.correlation_error.nan_to_num(-torch.inf).max(),
            "mean_disagreement": self.disagreement.nanmean(),
        }
        return {
            "num_examples": n,
            "num_chains": chains,
            "num_draws": draws,
            "agree": int(self.agrees.sum()),
            "too_few_draws": int(self.too_few_draws.sum()),
            "divergences": int(self.divergences.sum()),
            **{k: v.item() if bool(v.isfinite()) else None for k, v in found.items()},
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        found = self.as_dict()
        n, chains, draws = (found[f"num_{name}"] for name in ("examples", "chains", "draws"))

        def number(name: str) -> str:
            return "infinite" if found[name] is None else f"{found[name]:.3f}"

        sizes = (found[f"least_{part}_effective_sample_size"] for part in ("bulk", "tail"))
        bulk, tail = ("0" if size is None else f"{size:.0f}" for size in sizes)
        lines = [
            ("chains", f"{chains} of {draws} draws for each of {n} data"),
            ("data whose chains agree", f"{found['agree']} of {n}"),
            ("R-hat", f"{number('greatest_r_hat')} (maximum)"),
            ("effective draws", f"{bulk} in the bulk, {tail} in the tails (minimum)"),
            ("data with too few draws", f"{found['too_few_draws']} of {n}"),
            ("divergences", f"{found['divergences']}"),
            ("guide's mean off by", f"{number('mean_shift')} standard deviations"),
            ("guide's scale", f"{number('mean_scale_ratio')} times the posterior's"),
            ("disagreement", f"{number('mean_disagreement')} nats for each unit"),
        ]
        if found["greatest_correlation_error"] is not None:
            off = [number(f"{which}_correlation_error") for which in ("mean", "greatest")]
            lines.append(("guide's correlations", f"off by {off[0]}, at most {off[1]}"))
        return "\n".join(f"{name:<26}{value}" for name, value in lines)


def compared(
    draws: dict[str, Tensor],
    guide_draws: dict[str, Tensor],
    divergences: Tensor,
    angles: Collection[str] = (),
) -> Posterior:
    """Return draws (chains, draws, n, *event) and draws of the guide with all measures of them.

    Arguments:
        angles: the latents that are angles.
    """
    centers = {name: _direction(value) for name, value in draws.items() if name in angles}
    flat = _flat(draws, 2, centers)
    return Posterior(
        draws,
        guide_draws,
        _names(guide_draws),
        _measured(_r_hat, flat),
        _measured(_effective, flat),
        divergences.long(),
        centers,
    )


def _direction(draws: Tensor) -> Tensor:
    """Return the mean direction of angles (chains, draws, n, *event)."""
    return torch.atan2(draws.sin().mean((0, 1)), draws.cos().mean((0, 1)))


def _r_hat(draws: Tensor) -> Tensor:
    """Return R-hat; infinite if no chain moves, so that its variance is 0."""
    return rank_r_hat(draws).nan_to_num(torch.inf, posinf=torch.inf)


def _effective(draws: Tensor) -> Tensor:
    """Return the effective sample size; 1 if no chain moves."""
    return effective_draws(draws).nan_to_num(1.0)


class _Energy(torch.autograd.Function):
    """A value with a gradient that is already known."""

    @staticmethod
    def forward(ctx: Any, moving: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.gradient, None, None


def energy(moving: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """Return a value whose gradient with respect to the moving coordinates is given."""
    found: Tensor = _Energy.apply(moving, value, gradient)
    return found


def rank_r_hat(draws: Tensor) -> Tensor:
    """Return the rank-normalized, folded split R-hat (Vehtari et al., 2021) of draws.

    Draws have shape (chains, draws, ...). The result is the larger of the R-hats of location and
    of spread.
    """
    apart = (draws - draws.flatten(0, 1).quantile(0.5, 0)).abs()
    by_rank = [split_gelman_rubin(normal_scores(part), 0, 1) for part in (draws, apart)]
    return torch.maximum(*by_rank)


def _flat(sites: dict[str, Tensor], leading: int, centers: Mapping[str, Tensor]) -> Tensor:
    """Concatenate all units to (*leading, n, units), in float64; angles are near their centers."""
    values = [
        _near(value.double(), centers[name].double()) if name in centers else value.double()
        for name, value in sites.items()
    ]
    return torch.cat([value.reshape(*value.shape[: leading + 1], -1) for value in values], -1)


def _near(angles: Tensor, center: Tensor) -> Tensor:
    """Turn angles by full circles until they are within pi of the center."""
    return center + (angles - center + torch.pi) % (2 * torch.pi) - torch.pi


def _names(sites: dict[str, Tensor]) -> tuple[str, ...]:
    """Return a name for each unit of draws (draws, n, *event)."""
    return tuple(
        name + "".join(f"[{i}]" for i in index)
        for name, value in sites.items()
        for index in product(*map(range, value.shape[2:]))
    )


def _measured(measure: Callable[[Tensor], Tensor], draws: Tensor) -> Tensor:
    """Measure draws (chains, draws, n, units) by unit; NaN for units that do not vary."""
    moves = _vary(draws)
    found = draws.new_full(moves.shape, torch.nan)
    if moves.any():  # with one NaN, Pyro's measures return only NaN
        found[moves] = measure(draws[:, :, moves])
    return found


def _vary(draws: Tensor) -> Tensor:
    """Return which units of draws (chains, draws, n, units) are not constant."""
    return draws.amax((0, 1)) != draws.amin((0, 1))


def _moments(draws: Tensor, moves: Tensor) -> Moments:
    """Return moments of draws (draws, n, units); NaN for units that do not vary."""
    draws = torch.where(moves, draws, torch.nan)
    off = draws - draws.mean(0)
    scaled = off / off.square().sum(0).sqrt()
    return Moments(draws.mean(0), draws.std(0), torch.einsum("sni,snj->nij", scaled, scaled))


def _greatest(by_unit: Tensor) -> Tensor:
    return by_unit.nan_to_num(-torch.inf, posinf=torch.inf).amax(1)


def _least(by_unit: Tensor) -> Tensor:
    return by_unit.nan_to_num(torch.inf).min()
