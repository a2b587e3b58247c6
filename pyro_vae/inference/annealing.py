"""Lower and upper bounds on log p(x) by annealed importance sampling from the guide."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, isfinite, log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError
from pyro_vae.inference.annealing_path import AnnealingPath, AnnealingSettings
from pyro_vae.inference.datum_weights import relative_error
from pyro_vae.inference.importance import CELLS, COMPILED_CELLS, unnormalized
from pyro_vae.inference.joint import Joint
from pyro_vae.pairs.arrays import each_context
from pyro_vae.pairs.folding import factors_of
from pyro_vae.pairs.formatting import in_columns, with_error
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.simulation import simulate
from pyro_vae.pairs.threads import alone
from pyro_vae.training.settings import require_engine


@dataclass(frozen=True)
class Annealing:
    """A bound on log p(x) by annealed importance sampling; nats per example."""

    value: float
    """Mean of the bound over the data."""
    standard_error: float
    """Monte Carlo standard error of ``value``, for these data; NaN for one chain."""
    per_datum: Tensor
    """The bound of each datum, of shape (n,)."""
    standard_errors: Tensor
    """The Monte Carlo standard error of each bound, by the delta method over chains, of shape (n,).
    For reverse annealing it is too small, because all chains of a datum start at the same draw of
    its posterior."""
    effective_sample_size: Tensor
    """(sum w)^2 / sum w^2 over each datum's chains, of shape (n,); between 1 and their number."""
    acceptance: Tensor
    """Mean acceptance of the transitions of each datum, of shape (n,); step sizes are adapted so
    that it is near 0.7."""
    infinite_weights: Tensor
    """The number of each datum's chains whose weight is infinite or NaN, of shape (n,)."""
    num_chains: int
    num_temperatures: int
    leapfrog_steps: int
    factors: tuple[str, ...] = ()
    """The model's ``pyro.factor`` sites; with them p(x) is not normalized."""

    def as_dict(self) -> dict[str, Any]:
        """Return means and errors for metrics.json; numbers that are not finite become None."""
        found = {
            "log_likelihood": self.value,
            "log_likelihood_standard_error": self.standard_error,
            "median_effective_sample_size": self.effective_sample_size.median().item(),
            "acceptance": self.acceptance.mean().item(),
            "least_acceptance": self.acceptance.min().item(),
        }
        return {
            "num_examples": len(self.per_datum),
            **({"unnormalized_by": list(self.factors)} if self.factors else {}),
            "num_chains": self.num_chains,
            "num_temperatures": self.num_temperatures,
            "leapfrog_steps": self.leapfrog_steps,
            **{name: value if isfinite(value) else None for name, value in found.items()},
            "infinite_weights": int(self.infinite_weights.sum()),
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        return _table({"log p(x) ≥": self})


@dataclass(frozen=True)
class Sandwich:
    """Lower and upper bounds on log p(x) of simulated data; nats per example."""

    lower: Annealing
    """Forward annealing; in expectation below log p(x)."""
    upper: Annealing
    """Reverse annealing from the latents of the simulated data; in expectation above log p(x)."""
    batch: Batch
    """The simulated data and their context."""

    @property
    def gap(self) -> float:
        """Mean of upper minus lower; in expectation at least as large as the error of either."""
        return self.upper.value - self.lower.value

    @property
    def gap_standard_error(self) -> float:
        """The standard error of ``gap``, over data and chains."""
        gaps = self.upper.per_datum - self.lower.per_datum
        return (gaps.std() / len(gaps) ** 0.5).item()

    def as_dict(self) -> dict[str, Any]:
        """Return both bounds and their gap for metrics.json; what is not finite becomes None."""
        gap = {"gap": self.gap, "gap_standard_error": self.gap_standard_error}
        return {
            "lower": self.lower.as_dict(),
            "upper": self.upper.as_dict(),
            **{name: value if isfinite(value) else None for name, value in gap.items()},
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        table = _table({"log p(x) ≥": self.lower, "log p(x) ≤": self.upper})
        return f"{table}\n{'gap':<20}{with_error(self.gap, self.gap_standard_error)}"


def _table(results: dict[str, Annealing]) -> str:
    one, *others = results.values()
    words, *upper = results
    lines = [(words, f"{with_error(one.value, one.standard_error)} nats per example")]
    lines += unnormalized(one.factors)
    # The chains of an upper bound share their start. The error of the gap includes its error.
    lines += [(word, f"{other.value:.3f}") for word, other in zip(upper, others, strict=True)]
    chains = f"{one.num_chains} for each of {len(one.per_datum)} data"
    lines.append(("chains", f"{chains}, {one.num_temperatures} temperatures"))
    size = one.effective_sample_size.median().item()
    lines.append(("effective chains", f"{size:.1f} (median)"))
    low = f"{one.acceptance.min().item():.2f}"
    lines.append(("acceptance", f"{one.acceptance.mean().item():.2f} (mean), {low} (minimum)"))
    infinite = sum(int(result.infinite_weights.sum()) for result in results.values())
    if infinite:
        lines.append(("infinite weights", f"{infinite}"))
    return in_columns(lines)


@alone()
def anneal(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_temperatures: int = 500,
    num_chains: int = 16,
    leapfrog_steps: int = 5,
    binarize: str = "dynamic",
    seed: int = 0,
    engine: str = "auto",
    progress: bool = True,
) -> Annealing:
    r"""Compute a lower bound on log p(x) by annealed importance sampling from guide to posterior.

    A chain starts at :math:`z \sim q(z|x)` and goes through :math:`f_\beta(z) = q(z|x)^{1-\beta}
    p(x, z)^\beta` for T values of :math:`\beta` from 0 to 1. At each value it makes a Hamiltonian
    transition that leaves :math:`f_\beta` invariant. Its weight :math:`w = \prod_t
    (p(x, z_t)/q(z_t|x))^{\beta_{t+1} - \beta_t}` has the mean p(x). The bound is the logarithm of
    the mean over chains.

    Arguments:
        pair: any pair whose latents are continuous or enumerated; enumerated ones are summed out.
        x, context: data, as `pyro_vae.log_likelihood` takes them.
        num_temperatures: T. With T = 1 the result is `pyro_vae.log_likelihood` with ``num_chains``
            samples.
        num_chains: number of chains for each datum.
        leapfrog_steps: leapfrog steps of each transition. Each step evaluates both gradients.
        binarize, seed: as in `pyro_vae.evaluate`.
        engine: how gradients are computed, as in `pyro_vae.fit`.
        progress: show a bar if the run takes over two seconds.

    A pilot run of other chains finds the step sizes for each datum along the path. Raises
    `UsageError` for latents that are not local, for discrete latents that are not enumerated, and
    for latents whose guide knows its density only at its own draws; the error names the site.
    Neal, Annealed importance sampling, 2001; for decoders: Wu et al., 2017
    (https://arxiv.org/abs/1611.04273).

    >>> import torch, pyro_vae as pv
    >>> vae, x = pv.VAE.mlp((4,), latent_dim=2), torch.ones(3, 4)
    >>> anneal(vae, x, num_temperatures=5, num_chains=4, progress=False).per_datum.shape
    torch.Size([3])
    """
    settings = AnnealingSettings(num_temperatures, num_chains, leapfrog_steps)
    rows, prepare = held_rows(pair, x, context, binarize)
    first = prepare(next(iter(rows.batches(2))))
    run = _AnnealingRun(pair, first, settings, len(rows), engine)
    total = len(rows) * settings.transitions
    with using(pair, seed), bar(progress, total, "annealing", delay=2) as shown:
        found = []
        for part in rows.batches(run.rows):
            batch = prepare(part)
            path = run.path(batch, shown.update)
            found.append(_bound(*path.forward(shown.update)))
    return _joined(found, settings, factors_of(pair, first))


@alone()
def sandwich(
    pair: nn.Module,
    *context: Any,
    num_examples: int = 100,
    num_temperatures: int = 500,
    num_chains: int = 16,
    leapfrog_steps: int = 5,
    seed: int = 0,
    engine: str = "auto",
    progress: bool = True,
) -> Sandwich:
    r"""Compute lower and upper bounds on log p(x), on data that the model itself draws.

    For simulated data one draw of the posterior is known: the latents from which they were drawn.
    From there annealing goes back to the guide, by the same transitions in reverse order. The
    weights then have the mean :math:`1/p(x)`, so minus the logarithm of their mean is in
    expectation above log p(x). The bound of `anneal` is below, so the gap bounds the error of
    both. If the gap is small, the same settings are reliable on data like these.

    Arguments:
        pair: a pair with ``template(n)``.
        context: the context tensors of a conditional pair, with ``num_examples`` rows or with one
            row for all.
        num_examples: number of simulated data.

    The other arguments are those of `anneal`. Raises `UsageError` for the same reasons as
    `anneal`, for fewer than two examples, and for a model whose draws do not fit into its batch.
    Grosse, Ghahramani & Adams, Sandwiching the marginal likelihood using bidirectional Monte Carlo,
    2015 (https://arxiv.org/abs/1511.02543).

    >>> import pyro_vae as pv
    >>> vae = pv.VAE.mlp((4,), latent_dim=2)
    >>> both = sandwich(vae, num_examples=3, num_temperatures=5, num_chains=4, progress=False)
    >>> both.upper.per_datum.shape
    torch.Size([3])
    """
    settings = AnnealingSettings(num_temperatures, num_chains, leapfrog_steps)
    if num_examples < 2:
        raise UsageError(f"must be at least 2, got {num_examples}", argument="num_examples")
    with using(pair, seed):
        batch, values = simulate(pair, num_examples, each_context(context))
        run = _AnnealingRun(pair, tuple(t[:2] for t in batch), settings, num_examples, engine)
        exact = run.joint.unconstrained(values, *batch)[0]
    total = num_examples * (settings.transitions + settings.num_temperatures - 1)
    lower, upper = [], []
    with using(pair, seed + 1), bar(progress, total, "sandwich", delay=2) as shown:
        parts = zip(exact.split(run.rows), *(t.split(run.rows) for t in batch), strict=True)
        for known, *part in parts:
            path = run.path(tuple(part), shown.update)
            lower.append(_bound(*path.forward(shown.update)))
            upper.append(_bound(*path.reverse(known, shown.update), sign=-1))
    return Sandwich(_joined(lower, settings), _joined(upper, settings), batch)


class _AnnealingRun:
    """Settings and densities that all batches of a run share."""

    def __init__(
        self, pair: nn.Module, first: Batch, settings: AnnealingSettings, n: int, engine: str
    ) -> None:
        for name, value in settings._asdict().items():
            if value < 1:
                raise UsageError(f"must be at least 1, got {value}", argument=name)
        self.settings, self.joint = settings, Joint(pair, first)
        widest = max(self.joint.widest, self.joint.dim)
        if require_engine(engine) == "auto":
            evaluations = settings.transitions * settings.leapfrog_steps * settings.num_chains * n
            engine = "compiled" if evaluations * widest >= COMPILED_CELLS else "traced"
        self.joint.use(engine)
        most = max(1, min(500, CELLS // (widest * settings.num_chains)))
        self.rows = ceil(n / ceil(n / most))  # parts of equal size share one graph

    def path(self, batch: Batch, done: Callable[[int], Any]) -> "AnnealingPath":
        return AnnealingPath(self.joint, batch, self.settings, done)


class _Bounds(NamedTuple):
    """The fields of `Annealing` that have an entry for each datum, of shape (n,)."""

    per_datum: Tensor
    standard_errors: Tensor
    effective_sample_size: Tensor
    acceptance: Tensor
    infinite_weights: Tensor


def _bound(log_weights: Tensor, acceptance: Tensor, sign: int = 1) -> _Bounds:
    """Compute the bound of each datum from log weights (chains, n)."""
    chains = len(log_weights)
    first, second = log_weights.logsumexp(0), (2 * log_weights).logsumexp(0)
    ratio = (second - 2 * first).exp()
    errors = relative_error(ratio, chains)
    infinite = (~(log_weights < torch.inf)).sum(0)
    return _Bounds(sign * (first - log(chains)), errors, 1 / ratio, acceptance, infinite)


def _joined(
    found: list[_Bounds], settings: AnnealingSettings, factors: tuple[str, ...] = ()
) -> Annealing:
    bounds = _Bounds(*(torch.cat(column).cpu() for column in zip(*found, strict=True)))
    errors = bounds.standard_errors
    return Annealing(
        value=bounds.per_datum.mean().item(),
        standard_error=(errors.square().sum().sqrt() / len(errors)).item(),
        **bounds._asdict(),
        **settings._asdict(),
        factors=factors,
    )
