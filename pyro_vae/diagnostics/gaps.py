"""Where the slack of the ELBO goes: what the family leaves, and what amortisation leaves."""

from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import all_log_weights, unnormalized
from pyro_vae.inference.pareto import LEAST, pareto_shape
from pyro_vae.inference.refinement import Refinement, refine
from pyro_vae.pairs.model import require_local
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.threads import alone

BLOCK = 500
"""Data whose weights are held at once."""


class PerDatum(NamedTuple):
    """A number of nats for each datum, and its Monte Carlo error."""

    per_datum: Tensor
    """In nats, of shape (n,)."""
    standard_errors: Tensor
    """The Monte Carlo standard error of each, of shape (n,)."""

    @property
    def value(self) -> float:
        """Mean over the data, in nats per example."""
        return self.per_datum.mean().item()

    @property
    def standard_error(self) -> float:
        """Monte Carlo standard error of ``value``, for these data."""
        return (self.standard_errors.square().sum().sqrt() / len(self.per_datum)).item()


class Gaps(NamedTuple):
    r"""What `gaps` found: log p(x) = amortised + amortisation gap + approximation gap, in nats."""

    log_likelihood: PerDatum
    """The best lower bound of log p(x) of each datum."""
    refined: PerDatum
    """The ELBO of each datum under its own, refined q."""
    amortised: PerDatum
    """The ELBO of each datum under the guide."""
    approximation: PerDatum
    """``log_likelihood`` - ``refined``: what the best q of the family leaves, KL(q* || p)."""
    amortisation: PerDatum
    """``refined`` - ``amortised``: what the encoder leaves; with too few steps too small, and
    ``approximation`` too great by as much."""
    inference: PerDatum
    """Their sum, ``log_likelihood`` - ``amortised``: KL(q || p)."""
    from_refined: Tensor
    """Whether log p(x) of a datum comes from draws of its refined q, boolean, of shape (n,); none
    does where it was given."""
    pareto_k: Tensor
    """The Pareto shape of the weights that gave log p(x), of shape (n,): over 0.7 it is not to be
    trusted, nor the approximation gap. NaN where log p(x) was given and has none."""
    num_samples: int
    """Draws for each datum and bound."""
    steps: int
    """Steps of the refinement."""
    refinement: Refinement
    """The refined guide, with bounds of fewer draws."""

    def as_dict(self) -> dict[str, Any]:
        """Means, errors and fractions, as metrics.json holds them; what is not finite is None."""
        found: dict[str, float] = {}
        for name in ("log_likelihood", "refined", "amortised", *GAPS):
            gap = getattr(self, name)
            found[name] = gap.value
            found[f"{name}_standard_error"] = gap.standard_error
        found["fraction_from_refined"] = self.from_refined.double().mean().item()
        found["fraction_k_over_0.7"] = _share(self.pareto_k > 0.7, self.pareto_k)
        return {
            "num_examples": len(self.pareto_k),
            "num_samples": self.num_samples,
            "steps": self.steps,
            "not_finite": self._not_finite(),
            **{name: value if isfinite(value) else None for name, value in found.items()},
        }

    def _not_finite(self) -> int:
        return int((~torch.isfinite(self.inference.per_datum)).sum())

    def __str__(self) -> str:
        lines = [
            f"{name:<22}{words}" for name, words in unnormalized(self.refinement.before.factors)
        ]
        lines += [f"{'nats per example':<22}{'mean':>10}{'error':>9}{'median':>10}{'95 %':>10}"]
        for name in ("log_likelihood", "refined", "amortised", *GAPS):
            gap = getattr(self, name)
            middle, high = _quantiles(gap.per_datum)
            lines.append(
                f"{_TITLES[name]:<22}{gap.value:>10.3f}{gap.standard_error:>9.3f}"
                f"{middle:>10.3f}{high:>10.3f}"
            )
        over = int((self.pareto_k > 0.7).sum())
        lines.append(
            f"{len(self.pareto_k)} data, {self.num_samples} draws, {self.steps} steps; log p(x) is "
            f"not to be trusted (Pareto k over 0.7) for {over}"
        )
        if self._not_finite():
            lines.append(f"not finite, because weights are infinite: {self._not_finite()} data")
        return "\n".join(lines)


GAPS = ("approximation", "amortisation", "inference")

_TITLES = {
    "log_likelihood": "log p(x) ≥",
    "refined": "refined ELBO",
    "amortised": "amortised ELBO",
    "approximation": "approximation gap",
    "amortisation": "amortisation gap",
    "inference": "inference gap (sum)",
}


@alone()
def gaps(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_samples: int = 500,
    steps: int = 300,
    learning_rate: float = 0.05,
    num_particles: int = 8,
    log_likelihood: Any = None,
    binarize: str = "dynamic",
    seed: int = 0,
    engine: str = "auto",
    progress: bool = True,
) -> Gaps:
    r"""Split the distance of the ELBO from log p(x) into what the family and the encoder leave.

    .. math:: \log p(x) - \mathrm{ELBO}(q_\phi) =
        \underbrace{\log p(x) - \mathrm{ELBO}(q^*)}_{\text{approximation gap}}
        + \underbrace{\mathrm{ELBO}(q^*) - \mathrm{ELBO}(q_\phi)}_{\text{amortisation gap}}

    where :math:`q^*` is what `refine` makes of each datum's q within its family. log p(x) is the
    importance-weighted bound with q or with q* as proposal, for each datum the greater: which one,
    other draws decide, so that the maximum of two noisy numbers lifts nothing.

    Arguments:
        pair: any pair, which stays as it is.
        x, context: data, as `pyro_vae.log_likelihood` takes them.
        num_samples: draws for each datum from which bounds and errors are measured.
        steps, learning_rate, num_particles, engine, progress: as in `pyro_vae.refine`.
        log_likelihood: a better lower bound of log p(x) for the same rows, with the fields
            ``per_datum`` and ``standard_errors`` of shape (n,), from draws of its own, such as
            annealing gives.
        seed: of all draws.

    Errors are those of differences: the two bounds share their draws, one by one, and so does log
    p(x); by the delta method. Latents that are enumerated are summed out of all three numbers, and
    those that are discrete stay as the guide has them. With too few steps the amortisation gap is
    too small, the approximation gap too great by as much; so is the latter too small where log p(x)
    is. Raises `UsageError` as `refine` does.
    Cremer, Li & Duvenaud, 2018 (https://arxiv.org/abs/1801.03558).

    >>> import torch, pyro_vae as pv
    >>> vae, x = pv.VAE.mlp((4,), latent_dim=2), torch.ones(8, 4)
    >>> found = gaps(vae, x, steps=5, num_samples=30, progress=False)
    >>> both = found.approximation.value + found.amortisation.value
    >>> abs(both - found.inference.value) < 1e-6
    True
    """
    if num_samples < LEAST:
        raise UsageError(
            f"the gaps and their errors take {LEAST} samples or more (num_samples), "
            f"{num_samples} came"
        )
    held, prepare = held_rows(pair, x, context, binarize)
    shared = "log p(x) is given its draws, and no part of the slack of a datum"
    require_local(pair, prepare(held.first(2)), shared)
    refined = refine(
        pair,
        x,
        *context,
        steps=steps,
        learning_rate=learning_rate,
        num_particles=num_particles,
        num_samples=min(num_samples, 100),
        binarize=binarize,
        seed=seed,
        engine=engine,
        progress=progress,
    )
    # NaN, from infinite weights, chooses neither: the datum's log p(x) stays what it is.
    chosen = refined.after.per_datum >= refined.before.per_datum
    parts = []
    for block in range(0, len(chosen), BLOCK):
        rows = slice(block, block + BLOCK)
        batch = tuple(part[rows] for part in refined.batch)
        before = _weights(pair, batch[:-1], num_samples, seed + 1)
        after = _weights(refined.pair, batch, num_samples, seed + 1)
        parts.append(_split(before, after, chosen[rows]))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    *pairs, pareto_k = columns
    log_p, bound, amortised, approximation, amortisation, inference = (
        PerDatum(value, error) for value, error in zip(pairs[::2], pairs[1::2], strict=True)
    )
    if log_likelihood is not None:
        log_p = _given(log_likelihood, len(chosen))
        approximation, inference = _minus(log_p, bound), _minus(log_p, amortised)
        chosen = torch.zeros_like(chosen)
        pareto_k = getattr(log_likelihood, "pareto_k", torch.full_like(pareto_k, torch.nan))
    return Gaps(
        log_p,
        bound,
        amortised,
        approximation,
        amortisation,
        inference,
        chosen,
        pareto_k,
        num_samples,
        steps,
        refined,
    )


def _weights(pair: nn.Module, batch: Batch, num_samples: int, seed: int) -> Tensor:
    with using(pair, seed):
        return all_log_weights(pair, batch, num_samples).cpu()


def _split(before: Tensor, after: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
    """Values and errors of the bounds and gaps of some data, and the Pareto k of their log p(x).

    Of every quantity each draw's share in the error is kept, so that those of a difference
    are the differences: of an ELBO the log weight, of log p(x) the weight over its mean.
    """
    weights = torch.where(chosen, after, before)
    log_p = weights.logsumexp(0) - torch.tensor(float(len(weights))).log()
    relative = (weights - log_p).exp()
    return (
        log_p,
        _error(relative),
        after.mean(0),
        _error(after),
        before.mean(0),
        _error(before),
        log_p - after.mean(0),
        _error(relative - after),
        after.mean(0) - before.mean(0),
        _error(after - before),
        log_p - before.mean(0),
        _error(relative - before),
        pareto_shape(weights.T),
    )


def _error(shares: Tensor) -> Tensor:
    """The standard error of the mean over draws (num_samples, n), by datum."""
    return shares.std(0) / len(shares) ** 0.5


def _minus(a: PerDatum, b: PerDatum) -> PerDatum:
    """The difference of numbers from independent draws."""
    errors = (a.standard_errors.square() + b.standard_errors.square()).sqrt()
    return PerDatum(a.per_datum - b.per_datum, errors)


def _given(found: Any, n: int) -> PerDatum:
    per_datum, errors = (
        torch.as_tensor(part).detach().cpu().double()
        for part in (found.per_datum, found.standard_errors)
    )
    if per_datum.shape != (n,) or errors.shape != (n,):
        raise UsageError(
            f"log_likelihood must have per_datum and standard_errors of shape ({n},), one for each "
            f"row of x; {tuple(per_datum.shape)} and {tuple(errors.shape)} came"
        )
    return PerDatum(per_datum, errors)


def _quantiles(per_datum: Tensor) -> tuple[float, float]:
    finite = per_datum[torch.isfinite(per_datum)]
    if len(finite) == 0:
        return float("nan"), float("nan")
    middle, high = finite.quantile(torch.tensor([0.5, 0.95], dtype=finite.dtype)).tolist()
    return middle, high


def _share(which: Tensor, of: Tensor) -> float:
    return float("nan") if bool(of.isnan().all()) else which.double().mean().item()
