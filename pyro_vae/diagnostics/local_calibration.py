"""Is the guide right at the real data? Its moments against those of weighted draws, by row."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import whole
from pyro_vae.data.sources import Rows
from pyro_vae.diagnostics.local_moments import Compared, Units, compared
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import CELLS
from pyro_vae.inference.pareto import threshold
from pyro_vae.inference.passes import in_chunks
from pyro_vae.inference.weighted import require_samples
from pyro_vae.pairs.formatting import with_error
from pyro_vae.pairs.given_globals import at_one_draw
from pyro_vae.pairs.particles import Particles
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.threads import alone


class Average(NamedTuple):
    """An average over rows with its standard error, both of shape (units,)."""

    value: Tensor
    standard_error: Tensor


@dataclass(frozen=True)
class LocalCalibration:
    """The results of `local_calibration`: errors of the guide at each row, by unit.

    Numbers of a row that is not reliable, and of a unit that is masked or constant, are NaN.
    Averages are over the other rows. Their standard errors hold the Monte Carlo error and the
    spread of the rows.
    """

    names: tuple[str, ...]
    """The units of the local latents: "z[0]", or "cos(a)" and "sin(a)" for an angle."""
    shift: Tensor
    """Mean of the guide minus posterior mean, in posterior standard deviations, (n, units)."""
    shift_errors: Tensor
    """Monte Carlo standard errors of ``shift``, (n, units)."""
    log_scale: Tensor
    """Logarithm of the guide's over the posterior standard deviation, (n, units)."""
    log_scale_errors: Tensor
    """Monte Carlo standard errors of ``log_scale``, (n, units)."""
    pairs: tuple[tuple[int, int], ...]
    """The pairs of units whose correlations are compared, as indices into ``names``."""
    correlation: Tensor
    """Correlation under the guide minus that under the posterior, (n, pairs)."""
    correlation_errors: Tensor
    """Monte Carlo standard errors of ``correlation``, (n, pairs)."""
    guide_k: Tensor
    """The Pareto shape of the weights of the guide's own draws, (n,)."""
    pareto_k: Tensor
    """The Pareto shape of the weights that were used, after moment matching, (n,)."""
    num_samples: int
    """Draws of the guide for each row."""
    left_out: dict[str, str]
    """Why a latent is not judged."""
    given: tuple[str, ...] = ()
    """Global and group latents that are held at one draw of the guide."""

    @property
    def k_threshold(self) -> float:
        """The largest Pareto shape for which ``num_samples`` are enough."""
        return threshold(self.num_samples)

    @property
    def unreliable(self) -> Tensor:
        """The indices of the rows that these weights cannot judge, the worst first.

        The guide is far from the posterior there, so these rows are evidence against it.
        """
        over = (~(self.pareto_k <= self.k_threshold)).nonzero().flatten()
        return over[self.pareto_k[over].nan_to_num(torch.inf).argsort(descending=True)]

    @property
    def mean_shift(self) -> Average:
        """Mean of ``shift`` over rows: the bias that all rows share."""
        return _mean(self.shift)

    @property
    def rms_shift(self) -> Average:
        """Root mean square of ``shift`` over rows, without the part of the Monte Carlo error.

        If inputs are permuted or ignored, it is large and the mean shift is near 0.
        """
        return _root_mean_square(self.shift, self.shift_errors)

    @property
    def scale_ratio(self) -> Average:
        """Geometric mean over rows of the guide's over the posterior standard deviation."""
        ratio, error = _mean(self.log_scale)
        return Average(ratio.exp(), ratio.exp() * error)

    @property
    def mean_correlation(self) -> Average:
        """Mean of ``correlation`` over rows, of shape (pairs,)."""
        return _mean(self.correlation)

    @property
    def rms_correlation(self) -> Average:
        """Root mean square of ``correlation`` over rows, without the part of the Monte Carlo
        error, of shape (pairs,)."""
        return _root_mean_square(self.correlation, self.correlation_errors)

    def worst(self, number: int = 10) -> Tensor:
        """Return the indices of the worst rows: unreliable ones, then those shifted most."""
        size = self.shift.abs().nan_to_num(0.0).amax(1)
        order = size.argsort(descending=True)
        bad = self.unreliable
        return torch.cat([bad, order[~torch.isin(order, bad)]])[:number]

    def as_dict(self) -> dict[str, Any]:
        """Return averages by unit and the unreliable rows for metrics.json."""
        averages = {
            name: getattr(self, name) for name in ("mean_shift", "rms_shift", "scale_ratio")
        }
        return {
            "num_examples": len(self.pareto_k),
            "num_samples": self.num_samples,
            "k_threshold": self.k_threshold,
            "unreliable": self.unreliable.tolist(),
            "left_out": self.left_out,
            **{
                key: dict(zip(self.names, map(_finite, part.tolist()), strict=True))
                for name, average in averages.items()
                for key, part in ((name, average[0]), (f"{name}_standard_error", average[1]))
            },
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        columns = (self.mean_shift, self.rms_shift, self.scale_ratio)
        lines = [f"{'unit':<16}{'mean shift':>18}{'rms shift':>18}{'scale ratio':>18}"]
        for i, name in enumerate(self.names):
            cells = [
                with_error(value[i].item(), error[i].item(), width=10) for value, error in columns
            ]
            lines.append(f"{name:<16}" + "".join(f"{cell:>18}" for cell in cells))
        bad = self.unreliable
        lines.append(
            f"{len(self.pareto_k)} data, {self.num_samples} draws; {len(bad)} data are not judged: "
            f"Pareto k over {self.k_threshold:.2f}"
        )
        if len(bad):
            lines.append(f"  the worst: {', '.join(map(str, bad[:10].tolist()))}")
        if self.given:
            lines.append(f"given one draw of the guide of {', '.join(self.given)}")
        lines += [f"'{name}' is left out: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


@alone()
def local_calibration(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_samples: int = 500,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> LocalCalibration:
    r"""Compare the guide with the posterior at each row of real data.

    Draws :math:`z_k \sim q(z|x)` with weights :math:`w_k \propto p(x, z_k)/q(z_k|x)` give the
    posterior mean, standard deviation and correlations of each unit of each local latent:

    .. math:: \text{shift} = \frac{E_q[z] - E_p[z]}{\mathrm{sd}_p(z)}, \qquad
        \text{log scale} = \log \frac{\mathrm{sd}_q(z)}{\mathrm{sd}_p(z)}

    The same draws estimate the moments of the guide, so an exact guide gives 0 with an error of 0.
    If the weights of a row have a heavy tail, its draws are moved and stretched until their weights
    are reliable (moment matching). Rows for which this fails are not judged, but named.

    Arguments:
        pair: any pair.
        x, context: real data, as `pyro_vae.fit` takes them.
        num_samples: draws for each row, at least 21.
        binarize, seed: as in `pyro_vae.evaluate`.
        progress: show a bar if the run takes over two seconds.

    Constrained latents are compared as they are, and angles by their cosine and sine. Categories
    and latents that only the model has are left out. Global and group latents are held at one
    draw of the guide. A mode that the guide misses completely leaves no sign in the weights.

    Raises `UsageError` for a guide without density (Delta) and for a pair whose local latents are
    all left out. Yao, Vehtari, Simpson & Gelman, 2018 (https://arxiv.org/abs/1802.02538); moment
    matching: Paananen, Piironen, Bürkner & Vehtari, 2021 (https://arxiv.org/abs/1906.08850).

    >>> import torch, pyro_vae as pv
    >>> from pyro_vae.models.exact import linear_gaussian
    >>> pair = linear_gaussian(spread=1.5)
    >>> found = local_calibration(pair, pair.marginal().sample((20,)), progress=False)
    >>> (found.scale_ratio.value - 1.5).abs().max() < 0.1
    tensor(True)
    """
    require_samples(num_samples)
    batch = whole(pair, x, context, binarize)
    pair, given = at_one_draw(pair, batch, seed)
    found: list[Compared] = []
    with using(pair, seed), bar(progress, len(batch[0]), "local calibration", delay=2) as shown:
        particles = Particles(pair, batch)
        units = Units(particles, batch)
        if not units.names:
            raise UsageError("the pair has no local latent with moments to compare")
        size = max(1, CELLS // (max(particles.widest, units.number) * num_samples))
        for part in in_chunks(batch, size):
            found.append(compared(particles, units, part, num_samples, threshold(num_samples)))
            shown.update(len(part[0]))
    columns = {
        name: torch.cat([getattr(part, name) for part in found]).cpu() for name in Compared._fields
    }
    return LocalCalibration(
        names=tuple(units.names),
        pairs=tuple((i, j) for i, j in units.pairs.T.tolist()),
        num_samples=num_samples,
        left_out=units.left_out,
        given=given,
        **columns,
    )


def _mean(values: Tensor) -> Average:
    """The mean over rows that are not NaN, with its error."""
    number = (~values.isnan()).sum(0)
    mean = values.nanmean(0)
    spread = (values - mean).square().nansum(0) / (number - 1).clamp(min=1)
    error = torch.where(number > 1, (spread / number).sqrt(), torch.nan)
    return Average(mean, error)


def _root_mean_square(values: Tensor, errors: Tensor) -> Average:
    """The root mean square over rows, less the part of the errors.

    The error is the distance to the root of the mean square plus its error, because the root has
    no linear approximation at 0.
    """
    square, error = _mean(values.square() - errors.square())
    root = square.clamp(min=0).sqrt()
    return Average(root, (square.clamp(min=0) + error).sqrt() - root)


def _finite(value: float) -> float | None:
    return None if value != value else value
