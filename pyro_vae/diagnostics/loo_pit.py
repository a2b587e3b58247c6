"""LOO-PIT: where each entry of a datum lies in its predictive distribution given the others."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import whole
from pyro_vae.data.sources import Rows
from pyro_vae.inference.pareto import threshold
from pyro_vae.inference.scoring import by_entry, log_prob_of
from pyro_vae.inference.weighted import Weighted, require_samples, steady_shape, weighted_parts
from pyro_vae.pairs.given_globals import at_one_draw
from pyro_vae.pairs.moments import is_discrete
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.threads import alone
from pyro_vae.parts.circular import on_its_circle

INTERVALS = (0.5, 0.8, 0.9, 0.95)
"""Probabilities of the central predictive intervals for which coverage is computed."""

SUMMED = 10
"""Distributions with at most so many values are summed; others without a CDF are drawn."""


@dataclass(frozen=True)
class LooPit:
    """The results of `loo_pit`."""

    pit: Tensor
    """P(x_j' <= x_j | all other entries of the row), (n, *data_shape); NaN where missing."""
    pareto_k: Tensor
    """The Pareto shape of the weights without each entry, (n, *data_shape)."""
    num_samples: int
    """Importance samples of each row."""
    given: tuple[str, ...] = ()
    """Global and group latents that are held at one draw of the guide."""

    @property
    def coverage(self) -> Tensor:
        """The share of entries in central predictive intervals of 50, 80, 90, 95 %, (4,).

        It equals these probabilities if the model is right.
        """
        return self._inside().nanmean(0)

    @property
    def coverage_errors(self) -> Tensor:
        """Standard errors of ``coverage`` by the spread of the rows, (4,). The entries of a row are
        dependent. NaN for one row."""
        inside = self._inside()
        known = inside[~inside[:, 0].isnan()]
        return known.std(0) / len(known) ** 0.5 if len(known) > 1 else torch.full((4,), torch.nan)

    @property
    def unreliable(self) -> float:
        """The share of entries whose weights are unreliable.

        Their values are kept, because they are mostly the surprising entries, with values near 0
        or 1. To leave them out would hide a misfit.
        """
        over = ~(self.pareto_k <= threshold(self.num_samples)) & ~self.pit.isnan()
        return (over.sum() / (~self.pit.isnan()).sum()).item()

    def _inside(self) -> Tensor:
        """The share of the entries of each row in each interval, (n, 4)."""
        middle = (self.pit - 0.5).abs().reshape(len(self.pit), -1)
        inside = [
            torch.where(middle.isnan(), torch.nan, (middle <= width / 2).double()).nanmean(1)
            for width in INTERVALS
        ]
        return torch.stack(inside, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the coverage of predictive intervals for metrics.json."""
        return {
            "num_examples": len(self.pit),
            "num_samples": self.num_samples,
            "unreliable": self.unreliable,
            "coverage": dict(zip(map(str, INTERVALS), self.coverage.tolist(), strict=True)),
            "coverage_standard_error": {
                str(width): None if error != error else error
                for width, error in zip(INTERVALS, self.coverage_errors.tolist(), strict=True)
            },
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        lines = ["predictive interval   share of entries inside"]
        for width, share, error in zip(
            INTERVALS, self.coverage.tolist(), self.coverage_errors.tolist(), strict=True
        ):
            lines.append(f"{100 * width:>15.0f} %   {100 * share:>10.1f} ± {100 * error:.1f} %")
        lines.append(f"weights are unreliable for {100 * self.unreliable:.1f} % of the entries")
        return "\n".join(lines)


@alone()
def loo_pit(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_samples: int = 500,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> LooPit:
    r"""Compute the leave-one-out probability integral transform of each entry of each row.

    With :math:`w_k = p(x, z_k) / q(z_k|x)` and the distribution function F of an entry,

    .. math:: \mathrm{PIT}_j = P(x_j' \le x_j \mid x_{-j}) \approx
        \frac{\sum_k F(x_j|z_k)\, w_k / p(x_j|z_k)}{\sum_k w_k / p(x_j|z_k)}

    If the model is right for these rows, each value is uniform on [0, 1]. Too many values near 0
    and 1 mean that the predictive distributions are too narrow. Discrete entries are randomized:
    :math:`P(x_j' < x_j) + V\, P(x_j' = x_j)` with uniform V. If a distribution has neither a CDF
    nor few values, a draw for each k replaces F.

    Arguments:
        pair: any pair whose likelihood has independent entries given the latents.
        x, context: held-out data, as `pyro_vae.log_likelihood` takes them.
        num_samples: importance samples of each row, at least 21.
        binarize, seed: as in `pyro_vae.evaluate`.
        progress: show a bar if the run takes over two seconds.

    Raises `UsageError` for a likelihood that does not split into entries.
    Gelfand, Dey & Chang, 1992; Gabry et al., Visualization in Bayesian workflow, 2019.

    >>> import torch, pyro_vae as pv
    >>> found = loo_pit(pv.VAE.mlp((4,)), torch.ones(8, 4), num_samples=50, progress=False)
    >>> found.pit.shape
    torch.Size([8, 4])
    """
    require_samples(num_samples)
    batch = whole(pair, x, context, binarize)
    pair, given = at_one_draw(pair, batch, seed)
    found = []
    with using(pair, seed), bar(progress, len(batch[0]), "LOO-PIT", delay=2) as shown:
        for part in weighted_parts(pair, batch, num_samples):
            found.append(_transformed(pair, part))
            shown.update(part.log_weights.shape[1])
    pit, shape = (torch.cat(parts) for parts in zip(*found, strict=True))
    return LooPit(pit, shape, num_samples, given)


def _transformed(pair: nn.Module, part: Weighted) -> tuple[Tensor, Tensor]:
    """The transforms of some rows, and the Pareto shapes of their weights."""
    each = by_entry(pair, part, log_prob_of).double()
    ones = (1,) * (each.dim() - 2)
    without = part.log_weights.reshape(*part.log_weights.shape, *ones) - each
    missing = each.isnan().any(0)
    without = torch.where(missing, 0.0, without)
    seed = int(torch.randint(2**31, ()))
    with seeded(seed):
        below = by_entry(pair, part, _below).double()
    with seeded(seed):  # the same draws, if any
        equal = by_entry(pair, part, _equal).double()
    shares, split = without.softmax(0), torch.rand_like(without[0])
    pit = (shares * (below + split * equal)).sum(0)
    shape = torch.where(missing, torch.nan, steady_shape(without, torch.float32))
    return torch.where(missing, torch.nan, pit).cpu(), shape.cpu()


def _below(fn: Any, x: Tensor) -> Tensor:
    """P(x' < x), or for one draw whether it is below x."""
    if (known := _cdf(fn, x)) is not None:
        return known
    x = on_its_circle(fn, x)  # as the draws, which start at one point of the circle
    if (values := _few_values(fn)) is not None:
        wide = (torch.full_like(x, value) for value in values)
        smaller = (torch.where(value < x, fn.log_prob(value).exp(), 0.0) for value in wide)
        return sum(smaller, torch.zeros_like(x))
    return (fn.sample() < x).to(x.dtype)


def _equal(fn: Any, x: Tensor) -> Tensor:
    """P(x' = x), or for one draw whether it equals x."""
    if _cdf(fn, x) is not None:
        return torch.zeros_like(x)
    if _few_values(fn) is not None:
        return cast(Tensor, fn.log_prob(x).exp())
    return (fn.sample() == x).to(x.dtype)


def _cdf(fn: Any, x: Tensor) -> Tensor | None:
    """The distribution function of a continuous distribution, if torch knows it."""
    try:
        return None if is_discrete(fn) else cast(Tensor, fn.cdf(x))
    except NotImplementedError:
        return None


def _few_values(fn: Any) -> list[float] | None:
    """The values of a discrete distribution, if they are few."""
    try:
        values = fn.enumerate_support(expand=False).flatten().tolist()
    except NotImplementedError:
        return None
    return values if len(values) <= SUMMED else None
