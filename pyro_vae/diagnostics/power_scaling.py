"""Power-scaling sensitivity: how much the posterior of a datum depends on prior and likelihood."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import whole
from pyro_vae.data.sources import Rows
from pyro_vae.diagnostics.local_moments import Units
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import CELLS
from pyro_vae.inference.moment_matching import Draws, matched, shape_of
from pyro_vae.inference.pareto import threshold
from pyro_vae.inference.passes import in_chunks
from pyro_vae.inference.weighted import require_samples
from pyro_vae.pairs.given_globals import at_one_draw
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.particles import Particles
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.threads import alone

STEP = 0.01
"""Powers are 1 / (1 + STEP) and 1 + STEP, so the weights change little."""

SENSITIVE = 0.05
"""Sensitivities from here on count: a normal whose mean then moves by about 0.3 standard deviations
if the power is doubled or halved (Kallioinen et al., 2023)."""

CONFLICT, WEAK = "prior-data conflict", "weak likelihood"


@dataclass(frozen=True)
class PowerScaling:
    """The results of `power_scaling`. Rows with unreliable weights and masked units are NaN."""

    names: tuple[str, ...]
    """The units of the local latents."""
    prior: Tensor
    """The sensitivity of each unit of each row to the prior, (n, units)."""
    likelihood: Tensor
    """The sensitivity of each unit of each row to the likelihood, (n, units)."""
    pareto_k: Tensor
    """The Pareto shape of the weights of each row, (n,)."""
    num_samples: int
    """Draws for each row."""
    left_out: dict[str, str]
    """Why a latent is left out."""
    given: tuple[str, ...] = ()
    """Global and group latents that are held at one draw of the guide."""

    @property
    def unreliable(self) -> Tensor:
        """The indices of the rows that these weights cannot judge."""
        return (~(self.pareto_k <= threshold(self.num_samples))).nonzero().flatten()

    @property
    def conflict(self) -> Tensor:
        """Where the posterior is sensitive to both, so prior and datum disagree, (n, units)."""
        return (self.prior >= SENSITIVE) & (self.likelihood >= SENSITIVE)

    @property
    def weak(self) -> Tensor:
        """Where it is sensitive to the prior only, so the datum says little, (n, units)."""
        return (self.prior >= SENSITIVE) & (self.likelihood < SENSITIVE)

    def diagnosis(self, row: int) -> dict[str, str]:
        """Return "prior-data conflict", "weak likelihood" or "-" for each unit of a row."""
        return {
            name: CONFLICT if conflict else WEAK if weak else "-"
            for name, conflict, weak in zip(
                self.names, self.conflict[row].tolist(), self.weak[row].tolist(), strict=True
            )
        }

    def worst(self, number: int = 10) -> Tensor:
        """Return the rows with a conflict that are most sensitive to the prior, worst first."""
        size = torch.where(self.conflict, self.prior, 0.0).amax(1)
        return size.argsort(descending=True)[: min(number, int((size > 0).sum()))]

    def as_dict(self) -> dict[str, Any]:
        """Return medians and shares of rows by unit for metrics.json."""
        known = (~self.prior.isnan()).sum(0).clamp(min=1)
        columns = {
            "prior": self.prior.nanmedian(0).values,
            "likelihood": self.likelihood.nanmedian(0).values,
            "conflict": self.conflict.sum(0) / known,
            "weak": self.weak.sum(0) / known,
        }
        return {
            "num_examples": len(self.pareto_k),
            "num_samples": self.num_samples,
            "unreliable": self.unreliable.tolist(),
            "left_out": self.left_out,
            **{
                name: {
                    unit: None if value != value else value
                    for unit, value in zip(self.names, column.tolist(), strict=True)
                }
                for name, column in columns.items()
            },
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        record = self.as_dict()
        title = f"{'prior':>10}{'likelihood':>12}{CONFLICT:>22}{WEAK:>18}"
        lines = [f"{'unit':<16}{title}"]
        for name in self.names:
            middle = (record["prior"][name], record["likelihood"][name])
            first, second = ("-" if value is None else f"{value:.3f}" for value in middle)
            rows = f"{100 * record['conflict'][name]:.0f} %", f"{100 * record['weak'][name]:.0f} %"
            lines.append(f"{name:<16}{first:>10}{second:>12}{rows[0]:>22}{rows[1]:>18}")
        lines.append(
            f"medians and shares of {len(self.pareto_k)} rows; {len(self.unreliable)} rows have "
            "unreliable weights"
        )
        lines += [f"'{name}' is left out: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


@alone()
def power_scaling(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_samples: int = 1000,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> PowerScaling:
    r"""Measure how much the posterior of each datum depends on the prior and on the likelihood.

    The posteriors :math:`p(z)^\alpha p(x|z)` and :math:`p(z)\,p(x|z)^\alpha` have the weights
    :math:`p(z)^{\alpha - 1}` and :math:`p(x|z)^{\alpha - 1}` on posterior draws. The sensitivity is
    the distance between the marginals at :math:`\alpha` and at 1 for each unit, divided by
    :math:`|\log_2 \alpha|`: the mean for :math:`\alpha` = 1/1.01 and 1.01. The distance is the root
    of the cumulative Jensen-Shannon divergence, divided by its upper bound.

    Arguments:
        pair: any pair.
        x, context: data, as `pyro_vae.fit` takes them.
        num_samples: draws for each row, at least 21. They are draws of the guide with importance
            weights, after moment matching (`pyro_vae.local_calibration`).
        binarize, seed: as in `pyro_vae.evaluate`.
        progress: show a bar if the run takes over two seconds.

    From 0.05 on a sensitivity counts. A unit that is sensitive to both has a prior-data conflict:
    the datum is unusual under the prior, or the prior does not match the codes. A unit that is
    sensitive only to the prior has a weak likelihood: its posterior is nearly the prior.

    Raises `UsageError` for a guide without density, and without local latents with moments.
    Kallioinen, Paananen, Bürkner & Vehtari, 2023 (https://arxiv.org/abs/2107.14054).

    >>> from pyro_vae.models.exact import linear_gaussian
    >>> pair = linear_gaussian()
    >>> found = power_scaling(pair, 9 * pair.marginal().sample((3,)), progress=False)
    >>> found.prior.shape
    torch.Size([3, 2])
    """
    require_samples(num_samples)
    batch = whole(pair, x, context, binarize)
    pair, given = at_one_draw(pair, batch, seed)
    found = []
    with using(pair, seed), bar(progress, len(batch[0]), "power scaling", delay=2) as shown:
        particles = Particles(pair, batch)
        units = Units(particles, batch)
        if not units.names:
            raise UsageError("the pair has no local latent with moments to compare")
        size = max(1, CELLS // (max(particles.widest, len(units.names)) * num_samples))
        for part in in_chunks(batch, size):
            found.append(_scaled(particles, units, part, num_samples))
            shown.update(len(part[0]))
    columns = _Scaled(*(torch.cat(part).cpu() for part in zip(*found, strict=True)))
    return PowerScaling(
        tuple(units.names),
        columns.prior,
        columns.likelihood,
        columns.pareto_k,
        num_samples,
        {name: why for name, why in units.left_out.items() if name != "correlations"},
        given,
    )


class _Scaled(NamedTuple):
    prior: Tensor
    likelihood: Tensor
    pareto_k: Tensor


def _scaled(particles: Particles, units: Units, batch: Batch, num_samples: int) -> _Scaled:
    # The measure is relative to the range of the draws, so that they must have the right scale.
    moves, _ = matched(particles, Draws(batch, particles.draw(num_samples, batch)), light=0.0)
    drawn = particles.draw(num_samples, batch)
    values = moves(drawn.values)
    scored = particles.score(values, batch)
    log_weights = scored.joint - drawn.log_q + moves.log_det
    z, pareto_k = units.vector(values), shape_of(log_weights)
    known = units.counts(drawn.counts) & (pareto_k <= threshold(num_samples))[:, None]
    both = (
        torch.where(known, _sensitivity(z, log_weights, part), torch.nan)
        for part in (scored.prior, scored.joint - scored.prior)
    )
    prior, likelihood = both
    return _Scaled(prior, likelihood, pareto_k)


def _sensitivity(z: Tensor, log_weights: Tensor, log_part: Tensor) -> Tensor:
    """The gradient of the distance in the logarithm (to base 2) of the power, (n, units)."""
    found = torch.zeros_like(z[0])
    for power in (1 / (1 + STEP), 1 + STEP):
        scaled = log_weights + (power - 1) * log_part
        distance = cumulative_distance(z, log_weights.softmax(0), scaled.softmax(0))
        found += distance / abs(torch.tensor(power).double().log2()) / 2
    return found


def cumulative_distance(z: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The distance between two weightings of the same draws, between 0 and 1, (n, units).

    It is the larger of the distances for z and for -z, because cumulative distribution functions
    do not treat both ends alike.

    Arguments:
        z: draws, of shape (K, n, units).
        p, q: weights of the draws, which sum to one, of shape (K, n).
    """
    order = z.argsort(0)
    ordered = z.gather(0, order)
    p, q = (part[..., None].expand(z.shape).gather(0, order) for part in (p, q))
    flipped = [part.flip(0) for part in (-ordered, p, q)]
    return torch.maximum(_one_sided(ordered, p, q), _one_sided(*flipped))


def _one_sided(z: Tensor, p: Tensor, q: Tensor) -> Tensor:
    width = z.diff(dim=0)
    below_p, below_q = (part.cumsum(0)[:-1] for part in (p, q))
    smallest = torch.finfo(torch.float64).tiny  # where both are 0, the divergence is 0
    middle = ((below_p + below_q) / 2).clamp(min=smallest)
    area_p, area_q = ((width * below).sum(0) for below in (below_p, below_q))
    terms = torch.xlogy(below_p, below_p / middle) + torch.xlogy(below_q, below_q / middle)
    # The two terms of the areas cancel: they have opposite signs in the two directions.
    divergence = (width * terms).sum(0) / torch.log(torch.tensor(2.0).double())
    return (divergence / (area_p + area_q).clamp(min=smallest)).clamp(min=0).sqrt()
