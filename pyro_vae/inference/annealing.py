"""log p(x) from below and from above by annealed importance sampling from the guide."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, log
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Rows
from pyro_vae.errors import UsageError
from pyro_vae.inference.annealing_path import AnnealingPath, AnnealingSettings
from pyro_vae.inference.importance import CELLS, COMPILED_CELLS, relative_error, unnormalized
from pyro_vae.inference.joint import Joint
from pyro_vae.pairs.folding import factors_of
from pyro_vae.pairs.formatting import with_error
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.simulation import simulate
from pyro_vae.pairs.threads import alone
from pyro_vae.training.settings import require_engine


@dataclass(frozen=True)
class Annealing:
    """A bound on log p(x) by annealed importance sampling; nats per example."""

    value: float
    """Mean over the data of the bound."""
    standard_error: float
    """Monte Carlo standard error of ``value``, for these data; NaN for one chain."""
    per_datum: Tensor
    """The bound of each datum, of shape (n,)."""
    standard_errors: Tensor
    """The Monte Carlo standard error of each, by the delta method over chains, of shape (n,). Of
    reverse annealing it is too small: all chains of a datum start at one draw of its posterior."""
    effective_sample_size: Tensor
    """(sum w)^2 / sum w^2 of each datum's chains, between 1 and their number, of shape (n,)."""
    acceptance: Tensor
    """Mean acceptance of the transitions of each datum, of shape (n,); made to be near 0.7."""
    infinite_weights: Tensor
    """How many of each datum's chains have a weight that is infinite or NaN, of shape (n,)."""
    num_chains: int
    num_temperatures: int
    leapfrog_steps: int
    factors: tuple[str, ...] = ()
    """The model's ``pyro.factor`` sites, with which p(x) is not normalized."""

    def as_dict(self) -> dict[str, Any]:
        """Means and errors, as metrics.json holds them; what is not finite is None."""
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

    def __str__(self) -> str:
        return _table({"log p(x) ≥": self})


@dataclass(frozen=True)
class Sandwich:
    """log p(x) of simulated data between two bounds; nats per example."""

    lower: Annealing
    """Forward annealing, in expectation below log p(x)."""
    upper: Annealing
    """Reverse annealing from the latents that the data were drawn from, in expectation above."""
    batch: Batch
    """The simulated data and their context."""

    @property
    def gap(self) -> float:
        """Mean of upper less lower: in expectation no less than the error of either."""
        return self.upper.value - self.lower.value

    @property
    def gap_standard_error(self) -> float:
        """The standard error of ``gap``, of data and chains."""
        gaps = self.upper.per_datum - self.lower.per_datum
        return (gaps.std() / len(gaps) ** 0.5).item()

    def as_dict(self) -> dict[str, Any]:
        """Both bounds and their gap, as metrics.json holds them; what is not finite is None."""
        gap = {"gap": self.gap, "gap_standard_error": self.gap_standard_error}
        return {
            "lower": self.lower.as_dict(),
            "upper": self.upper.as_dict(),
            **{name: value if isfinite(value) else None for name, value in gap.items()},
        }

    def __str__(self) -> str:
        table = _table({"log p(x) ≥": self.lower, "log p(x) ≤": self.upper})
        return f"{table}\n{'gap':<20}{with_error(self.gap, self.gap_standard_error)}"


def _table(results: dict[str, Annealing]) -> str:
    one, *others = results.values()
    words, *upper = results
    lines = [(words, f"{with_error(one.value, one.standard_error)} nats per example")]
    lines += unnormalized(one.factors)
    # The chains of an upper bound share their start: its error is in that of the gap.
    lines += [(word, f"{other.value:.3f}") for word, other in zip(upper, others, strict=True)]
    chains = f"{one.num_chains} for each of {len(one.per_datum)} data"
    lines.append(("chains", f"{chains}, {one.num_temperatures} temperatures"))
    size = one.effective_sample_size.median().item()
    lines.append(("effective chains", f"{size:.1f} in the median"))
    low = f"{one.acceptance.min().item():.2f}"
    lines.append(("acceptance", f"{one.acceptance.mean().item():.2f}, the least {low}"))
    infinite = sum(int(result.infinite_weights.sum()) for result in results.values())
    if infinite:
        lines.append(("infinite weights", f"{infinite}"))
    return "\n".join(f"{name:<20}{value}" for name, value in lines)


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
    r"""A lower bound of log p(x) by annealed importance sampling from the guide to the posterior.

    A chain starts at :math:`z \sim q(z|x)` and goes through :math:`f_\beta(z) = q(z|x)^{1-\beta}
    p(x, z)^\beta` for T values of :math:`\beta` from 0 to 1, with a Hamiltonian transition that
    leaves :math:`f_\beta` as it is at each. Its weight :math:`w = \prod_t
    (p(x, z_t)/q(z_t|x))^{\beta_{t+1} - \beta_t}` has the mean p(x); the bound is the logarithm of
    the mean over chains.

    Arguments:
        pair: any pair whose latents are continuous, or enumerated: those are summed out.
        num_temperatures: T. With one it is `pyro_vae.log_likelihood` of so few samples.
        num_chains: for each datum.
        leapfrog_steps: of each transition; an evaluation of both gradients each.
        engine: how gradients are computed, as in `pyro_vae.fit`.
        progress: show a bar, where it takes over two seconds.

    Step sizes are those that a pilot run of other chains found for each datum along the path.
    Raises `UsageError`, naming the site, for latents outside the data plate, discrete ones that are
    not enumerated, and those whose guide has a density at its own draws alone. Neal, Annealed
    importance sampling, 2001; for decoders: Wu et al., 2017 (https://arxiv.org/abs/1611.04273).

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
    num_examples: int = 100,
    context: Sequence[Any] = (),
    *,
    num_temperatures: int = 500,
    num_chains: int = 16,
    leapfrog_steps: int = 5,
    seed: int = 0,
    engine: str = "auto",
    progress: bool = True,
) -> Sandwich:
    r"""log p(x) from below and above, on data that the model itself draws.

    Of simulated data a draw of the posterior is known: the latents they were drawn from. From there
    annealing goes back to the guide, by the same transitions in reverse order, and the weights have
    the mean :math:`1/p(x)`: minus the logarithm of their mean is in expectation above log p(x).
    That of `anneal` is below, so the gap bounds the error of both, and settings that make it
    small can be trusted on data like these.

    Arguments:
        pair: a pair with ``template(n)``.
        num_examples: how many data are simulated.
        context: context tensors of so many rows, or of one row for all, for a conditional pair.

    The others are those of `anneal`. Raises `UsageError` where it does, and for a model whose
    draws have no place in its batch. Grosse, Ghahramani & Adams, Sandwiching the marginal
    likelihood using bidirectional Monte Carlo, 2015 (https://arxiv.org/abs/1511.02543).

    >>> import pyro_vae as pv
    >>> vae = pv.VAE.mlp((4,), latent_dim=2)
    >>> both = sandwich(vae, 3, num_temperatures=5, num_chains=4, progress=False)
    >>> both.upper.per_datum.shape
    torch.Size([3])
    """
    settings = AnnealingSettings(num_temperatures, num_chains, leapfrog_steps)
    if num_examples < 2:
        raise UsageError(f"num_examples must be 2 or more, {num_examples} came")
    with using(pair, seed):
        batch, values = simulate(pair, num_examples, tuple(context))
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
    """What all batches of a run share."""

    def __init__(
        self, pair: nn.Module, first: Batch, settings: AnnealingSettings, n: int, engine: str
    ) -> None:
        for name, value in settings._asdict().items():
            if value < 1:
                raise UsageError(f"{name} must be 1 or more, {value} came")
        self.settings, self.joint = settings, Joint(pair, first)
        widest = max(self.joint.widest, self.joint.dim)
        if require_engine(engine) == "auto":
            evaluations = settings.transitions * settings.leapfrog_steps * settings.num_chains * n
            engine = "compiled" if evaluations * widest >= COMPILED_CELLS else "traced"
        self.joint.use(engine)
        most = max(1, min(500, CELLS // (widest * settings.num_chains)))
        self.rows = ceil(n / ceil(n / most))  # parts of one size, for one graph

    def path(self, batch: Batch, done: Callable[[int], Any]) -> "AnnealingPath":
        return AnnealingPath(self.joint, batch, self.settings, done)


def _bound(log_weights: Tensor, acceptance: Tensor, sign: int = 1) -> tuple[Tensor, ...]:
    """The fields of each datum, from log weights (chains, n)."""
    chains = len(log_weights)
    first, second = log_weights.logsumexp(0), (2 * log_weights).logsumexp(0)
    ratio = (second - 2 * first).exp()
    errors = relative_error(ratio, chains)
    infinite = (~(log_weights < torch.inf)).sum(0)
    return sign * (first - log(chains)), errors, 1 / ratio, acceptance, infinite


def _joined(
    found: list[tuple[Tensor, ...]], settings: AnnealingSettings, factors: tuple[str, ...] = ()
) -> Annealing:
    bound, errors, sizes, acceptance, infinite = (
        torch.cat(column).cpu() for column in zip(*found, strict=True)
    )
    error = (errors.square().sum().sqrt() / len(errors)).item()
    values = bound, errors, sizes, acceptance, infinite
    return Annealing(
        bound.mean().item(),
        error,
        *values,
        settings.num_chains,
        settings.num_temperatures,
        settings.leapfrog_steps,
        factors,
    )
