"""The gap between the ELBO and log p(x), split into approximation and amortization gap."""

import warnings
from collections.abc import Sequence
from math import isfinite, log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import Preparation, held_rows, joined
from pyro_vae.data.sources import Rows, Source
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import LogLikelihood, all_log_weights, unnormalized
from pyro_vae.inference.pareto import LEAST, threshold, unreliable
from pyro_vae.inference.refinement import CLEAR, COMPARED_DRAWS, Refinement, refine
from pyro_vae.inference.weighted import steady_shape
from pyro_vae.pairs.given_globals import at_one_draw
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.threads import alone

BLOCK = 500
"""Number of data whose weights are in memory at the same time."""


class PerDatum(NamedTuple):
    """A number for each datum, with its Monte Carlo error; nats."""

    per_datum: Tensor
    """The numbers, of shape (n,)."""
    standard_errors: Tensor
    """The Monte Carlo standard error of each number, of shape (n,)."""

    @property
    def value(self) -> float:
        """Mean over the data, in nats per example."""
        return self.per_datum.mean().item()

    @property
    def standard_error(self) -> float:
        """Monte Carlo standard error of ``value``, for these data."""
        return (self.standard_errors.square().sum().sqrt() / len(self.per_datum)).item()


class Gaps(NamedTuple):
    r"""The results of `gaps`, in nats; log p(x) is amortized ELBO plus both gaps."""

    log_likelihood: PerDatum
    """The best lower bound on log p(x) of each datum."""
    refined: PerDatum
    """The ELBO of each datum under its own refined q."""
    amortized: PerDatum
    """The ELBO of each datum under the guide."""
    approximation: PerDatum
    """``log_likelihood`` - ``refined``: the gap of the best q of the family, KL(q* || p)."""
    amortization: PerDatum
    """``refined`` - ``amortized``: the gap due to the encoder. With too few steps it is too small,
    and ``approximation`` is too large by the same amount."""
    inference: PerDatum
    """The sum of both gaps, ``log_likelihood`` - ``amortized``: KL(q || p)."""
    from_refined: Tensor
    """Whether log p(x) of a datum uses draws of its refined q, booleans of shape (n,). All are
    False if you passed log p(x)."""
    pareto_k: Tensor
    """The Pareto shape of the weights that gave log p(x), of shape (n,). NaN if you passed log p(x)
    without a ``pareto_k``."""
    num_samples: int
    """Draws for each datum and bound."""
    steps: int
    """Steps of the refinement."""
    refinement: Refinement
    """The refined guide, with bounds from fewer draws."""
    given: tuple[str, ...] = ()
    """Global and group latents, held at one draw of the guide. All numbers are given this draw:
    log p(x | w) in place of log p(x)."""

    k_threshold: float = 0.7
    """The largest ``pareto_k`` for which log p(x) is reliable with this number of draws
    (`pyro_vae.inference.pareto.threshold`)."""

    @property
    def unreliable(self) -> Tensor:
        """Whether log p(x) and the approximation gap of a datum are unreliable, (n,)."""
        deviation = self.log_likelihood.standard_errors * self.num_samples**0.5
        found = unreliable(self.pareto_k, deviation, self.k_threshold)
        return found & ~self.pareto_k.isnan()  # log p(x) that you passed without a shape

    @property
    def amortised(self) -> PerDatum:
        """Deprecated name of ``amortized``."""
        _warn_of_old_name("amortised", "amortized")
        return self.amortized

    @property
    def amortisation(self) -> PerDatum:
        """Deprecated name of ``amortization``."""
        _warn_of_old_name("amortisation", "amortization")
        return self.amortization

    def as_dict(self) -> dict[str, Any]:
        """Return means, errors and fractions for metrics.json; what is not finite becomes None."""
        found: dict[str, float] = {}
        for name in ("log_likelihood", "refined", "amortized", *GAPS):
            gap = getattr(self, name)
            found[name] = gap.value
            found[f"{name}_standard_error"] = gap.standard_error
        found["fraction_from_refined"] = self.from_refined.double().mean().item()
        found["fraction_k_over_0.7"] = _share(self.pareto_k > 0.7, self.pareto_k)
        found["fraction_k_over_threshold"] = _share(self.unreliable, self.pareto_k)
        return {
            "num_examples": len(self.pareto_k),
            "num_samples": self.num_samples,
            "steps": self.steps,
            "k_threshold": self.k_threshold,
            **({"given_one_draw_of": list(self.given)} if self.given else {}),
            "not_finite": self._not_finite(),
            **{name: value if isfinite(value) else None for name, value in found.items()},
        }

    def _not_finite(self) -> int:
        return int((~torch.isfinite(self.inference.per_datum)).sum())

    def _repr_html_(self) -> str:
        return shown_html(self)

    def __str__(self) -> str:
        lines = [
            f"{name:<22}{words}" for name, words in unnormalized(self.refinement.before.factors)
        ]
        lines += [f"{'nats per example':<22}{'mean':>10}{'error':>9}{'median':>10}{'95 %':>10}"]
        for name in ("log_likelihood", "refined", "amortized", *GAPS):
            gap = getattr(self, name)
            middle, high = _quantiles(gap.per_datum)
            lines.append(
                f"{_TITLES[name]:<22}{gap.value:>10.3f}{gap.standard_error:>9.3f}"
                f"{middle:>10.3f}{high:>10.3f}"
            )
        over = int(self.unreliable.sum())
        lines.append(
            f"{len(self.pareto_k)} data, {self.num_samples} draws, {self.steps} steps; log p(x) is "
            f"unreliable (Pareto k over {self.k_threshold:.2f}) for {over}"
        )
        if self.given:
            lines.append(f"given one draw of the guide of {', '.join(self.given)}")
        if self._not_finite():
            lines.append(f"not finite, because weights are infinite: {self._not_finite()} data")
        return "\n".join(lines)


def _warn_of_old_name(old: str, new: str) -> None:
    """Warn the reader of a deprecated property of `Gaps`."""
    warnings.warn(
        f"Gaps.{old} is deprecated and will be removed in the next release; use Gaps.{new}",
        DeprecationWarning,
        stacklevel=3,
    )


GAPS = ("approximation", "amortization", "inference")

_TITLES = {
    "log_likelihood": "log p(x) ≥",
    "refined": "refined ELBO",
    "amortized": "amortized ELBO",
    "approximation": "approximation gap",
    "amortization": "amortization gap",
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
    r"""Split the gap between the ELBO and log p(x) into approximation and amortization gap.

    .. math:: \log p(x) - \mathrm{ELBO}(q_\phi) =
        \underbrace{\log p(x) - \mathrm{ELBO}(q^*)}_{\text{approximation gap}}
        + \underbrace{\mathrm{ELBO}(q^*) - \mathrm{ELBO}(q_\phi)}_{\text{amortization gap}}

    `refine` finds :math:`q^*`, the best q of each datum within the family of the guide. log p(x) is
    the importance-weighted bound with q or with q* as proposal, the better one for each datum: the
    clearly higher bound with a reliable Pareto k, or else the larger effective sample size. Other
    draws make this choice, because the maximum of two noisy numbers would be too high. A datum
    whose ELBO does not rise keeps the guide's q, so an exact guide has gaps of 0.

    Arguments:
        pair: any pair; it does not change.
        x, context: data, as `pyro_vae.log_likelihood` takes them.
        num_samples: draws for each datum in bounds and errors.
        steps, learning_rate, num_particles, engine, progress: as in `pyro_vae.refine`.
        log_likelihood: a better lower bound on log p(x) for the same rows, such as the result of
            `pyro_vae.anneal`. It must have the fields ``per_datum`` and ``standard_errors`` of
            shape (n,) and use its own draws.
        binarize: as in `pyro_vae.evaluate`.
        seed: random seed.

    Errors are those of differences, by the delta method: both ELBOs and log p(x) use the same
    draws. Enumerated latents are summed out of all three numbers. Other discrete latents stay as
    the guide has them. With too few steps the amortization gap is too small, and the approximation
    gap is too large by the same amount. If log p(x) is too low, the approximation gap is too small.

    Global and group latents w are held at one draw of the guide, the same for all rows and all
    three numbers. So the gaps are those of the local latents given this w, between
    :math:`E_q[\log p(x, z \mid w) - \log q(z \mid x, w)]` and :math:`\log p(x \mid w)`. They do
    not judge the guide of w; `pyro_vae.global_weights` and `pyro_vae.nuts` do.

    Raises `UsageError` for the same reasons as `refine`, and for fewer than 21 samples.
    Cremer, Li & Duvenaud, 2018 (https://arxiv.org/abs/1801.03558).

    >>> import torch, pyro_vae as pv
    >>> vae, x = pv.VAE.mlp((4,), latent_dim=2), torch.ones(8, 4)
    >>> found = gaps(vae, x, steps=5, num_samples=30, progress=False)
    >>> both = found.approximation.value + found.amortization.value
    >>> abs(both - found.inference.value) < 1e-6
    True
    """
    if num_samples < LEAST:
        raise UsageError(f"must be at least {LEAST}, got {num_samples}", argument="num_samples")
    held, prepare = held_rows(pair, x, context, binarize)
    pair, given = at_one_draw(pair, _whole(pair, held, prepare), seed)
    refined = refine(
        pair,
        x,
        *context,
        steps=steps,
        learning_rate=learning_rate,
        num_particles=num_particles,
        num_samples=min(num_samples, COMPARED_DRAWS),
        binarize=binarize,
        seed=seed,
        engine=engine,
        progress=progress,
    )
    chosen = _proposal_is_refined(refined.before, refined.after)
    parts = []
    for block in range(0, len(chosen), BLOCK):
        rows = slice(block, block + BLOCK)
        batch = tuple(part[rows] for part in refined.batch)
        before = _weights(pair, batch[:-1], num_samples, seed + 1)
        after = _weights(refined.pair, batch, num_samples, seed + 1)
        parts.append(_split(before, after, chosen[rows], batch[0].dtype))
    split = _joined(parts)
    if log_likelihood is not None:
        split, chosen = _with_given(split, log_likelihood), torch.zeros_like(chosen)
    return Gaps(
        **split._asdict(),
        from_refined=chosen,
        num_samples=num_samples,
        steps=steps,
        refinement=refined,
        given=given,
        k_threshold=threshold(getattr(log_likelihood, "num_samples", num_samples)),
    )


def _whole(pair: nn.Module, held: Source, prepare: Preparation) -> Batch:
    """Return all rows if the pair has global latents, whose guide may pool them, or else two."""
    few = prepare(held.first(2))
    if not global_latents(pair, few):
        return few
    return joined(held, prepare)


def _weights(pair: nn.Module, batch: Batch, num_samples: int, seed: int) -> Tensor:
    with using(pair, seed):
        return all_log_weights(pair, batch, num_samples).cpu()


def _proposal_is_refined(before: LogLikelihood, after: LogLikelihood) -> Tensor:
    """Return whether log p(x) of a datum uses draws of its refined q, (n,).

    The higher of two lower bounds is better if the difference is clear and its Pareto k reliable.
    Otherwise the weights with the larger effective sample size are better: a bound whose few
    largest weights are too large by chance looks higher. A NaN compares as false, so log p(x)
    stays that of the guide.
    """
    gain = after.per_datum - before.per_datum
    error = (after.standard_errors.square() + before.standard_errors.square()).sqrt()
    k = torch.where(gain > 0, after.pareto_k, before.pareto_k)
    clear = (gain.abs() > CLEAR * error.nan_to_num(0.0)) & (k <= after.k_threshold)
    better = after.effective_sample_size >= before.effective_sample_size
    return torch.where(clear, gain > 0, better)


class _GapParts(NamedTuple):
    """The fields of `Gaps` that come from log weights."""

    log_likelihood: PerDatum
    refined: PerDatum
    amortized: PerDatum
    approximation: PerDatum
    amortization: PerDatum
    inference: PerDatum
    pareto_k: Tensor


def _split(before: Tensor, after: Tensor, chosen: Tensor, dtype: torch.dtype) -> _GapParts:
    """Compute bounds and gaps of some data from log weights before and after refinement.

    Each draw has a share in the error of a number: its log weight for an ELBO, and its weight over
    the mean weight for log p(x). The shares of a difference are the differences of the shares.
    ``dtype`` is that of the data: weights that differ by its rounding only have no tail.
    """
    weights = torch.where(chosen, after, before)
    log_p = weights.logsumexp(0) - log(len(weights))
    relative = (weights - log_p).exp()
    refined, amortized = after.mean(0), before.mean(0)
    return _GapParts(
        log_likelihood=PerDatum(log_p, _error(relative)),
        refined=PerDatum(refined, _error(after)),
        amortized=PerDatum(amortized, _error(before)),
        approximation=PerDatum(log_p - refined, _error(relative - after)),
        amortization=PerDatum(refined - amortized, _error(after - before)),
        inference=PerDatum(log_p - amortized, _error(relative - before)),
        pareto_k=steady_shape(weights, dtype),
    )


def _joined(parts: Sequence[_GapParts]) -> _GapParts:
    """Concatenate the numbers of blocks of data."""
    *columns, pareto_k = zip(*parts, strict=True)
    numbers = [PerDatum(*map(torch.cat, zip(*column, strict=True))) for column in columns]
    return _GapParts._make([*numbers, torch.cat(pareto_k)])


def _with_given(split: _GapParts, found: Any) -> _GapParts:
    """Replace log p(x) by a bound that the user passed."""
    log_p = _given(found, len(split.pareto_k))
    return split._replace(
        log_likelihood=log_p,
        approximation=_minus(log_p, split.refined),
        inference=_minus(log_p, split.amortized),
        pareto_k=getattr(found, "pareto_k", torch.full_like(split.pareto_k, torch.nan)),
    )


def _error(shares: Tensor) -> Tensor:
    """Return the standard error of the mean over draws (num_samples, n), for each datum."""
    return shares.std(0) / len(shares) ** 0.5


def _minus(a: PerDatum, b: PerDatum) -> PerDatum:
    """Return the difference of numbers from independent draws."""
    errors = (a.standard_errors.square() + b.standard_errors.square()).sqrt()
    return PerDatum(a.per_datum - b.per_datum, errors)


def _given(found: Any, n: int) -> PerDatum:
    per_datum, errors = (
        torch.as_tensor(part).detach().cpu().double()
        for part in (found.per_datum, found.standard_errors)
    )
    if per_datum.shape != (n,) or errors.shape != (n,):
        raise UsageError(
            f"must have per_datum and standard_errors of shape ({n},), one number for each row of "
            f"x, got {tuple(per_datum.shape)} and {tuple(errors.shape)}",
            argument="log_likelihood",
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
