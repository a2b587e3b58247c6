"""Estimates of log p(x) by importance sampling, with the guide as proposal."""

from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import Preparation, shared_rows
from pyro_vae.data.sources import Rows, Source
from pyro_vae.errors import UsageError, warn
from pyro_vae.inference.datum_weights import Weighed, weighed
from pyro_vae.inference.pareto import LEAST, threshold, unreliable
from pyro_vae.pairs import fold_plan, folding
from pyro_vae.pairs.formatting import with_error
from pyro_vae.pairs.given_globals import POOLED_ROWS, pooled_latents
from pyro_vae.pairs.memory import smaller, told_smaller
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.processes import ALONE, Team, here, in_order, single
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.rng import derived
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.weights import log_weights, log_weights_alone, structure
from pyro_vae.training.settings import require_engine
from pyro_vae.training.tracing import Named, traced

CELLS = 2**20
"""Numbers in the largest tensor of one pass; this many fit into the caches of a core."""

SAMPLES = 64
"""Least number of samples of a datum in one pass, so that the encoder runs seldom."""

TRACED_RUNS = 20
"""From this number of chunks on, "auto" traces a graph."""

COMPILED_CELLS = 2e9
"""From this product of data, samples and dimensions on, "auto" compiles the graph."""


class LogLikelihood(NamedTuple):
    """An importance-sampled estimate of log p(x); nats per example."""

    value: float
    """Mean of the estimates over the data; in expectation a lower bound on log p(x)."""
    standard_error: float
    """Monte Carlo standard error of ``value``, for these data; NaN for one sample."""
    num_samples: int
    """Importance samples for each datum."""
    per_datum: Tensor
    """The estimate for each datum, of shape (n,)."""
    standard_errors: Tensor
    """The Monte Carlo standard error of each estimate, by the delta method, of shape (n,)."""
    effective_sample_size: Tensor
    """(sum w)^2 / sum w^2 over each datum's weights, of shape (n,)."""
    elbo: float
    """Mean of the ELBO over the data: the mean of the logarithms of the same weights."""
    elbo_standard_error: float
    """Monte Carlo standard error of ``elbo``, for these data; NaN for one sample."""
    elbo_per_datum: Tensor
    """The ELBO of each datum, of shape (n,)."""
    elbo_standard_errors: Tensor
    """The Monte Carlo standard error of each ELBO, of shape (n,)."""
    pareto_k: Tensor
    """The Pareto shape of the tail of each datum's weights (see `pyro_vae.inference.pareto`), of
    shape (n,). Over ``k_threshold`` neither the estimate nor its error is reliable. It is 0 if the
    weights are constant up to rounding, or if the largest occurs five times; infinite if a weight
    is infinite, and NaN for fewer than 21 samples, which have no tail."""
    infinite_weights: Tensor
    """The number of each datum's weights that are infinite or NaN, of shape (n,). These belong to
    draws of the guide to which the guide itself gives no density. The estimate is then infinite or
    NaN too."""
    factors: tuple[str, ...] = ()
    """The model's ``pyro.factor`` sites. With them p(x) is not normalized: its logarithm is that of
    the integral of p(x, z) times the factors, and not a log-likelihood."""

    @property
    def unreliable(self) -> Tensor:
        """Which data have an unreliable estimate, booleans (n,).

        Their k-hat is over the threshold for this number of samples, and their weights vary. (The
        tail of weights that hardly vary is noise without effect.)
        """
        self._require_tails()
        deviation = self.standard_errors * self.num_samples**0.5
        return unreliable(self.pareto_k, deviation, self.k_threshold)

    @property
    def total_error(self) -> float:
        r"""The error of ``value`` for these data: Monte Carlo error and bias.

        The logarithm of a mean of K weights is too low by about half its variance, so the error is
        :math:`\sqrt{s^2 + (\tfrac{1}{2n} \sum_i s_i^2)^2}`.
        """
        bias = self.standard_errors.square().mean().item() / 2
        return (self.standard_error**2 + bias**2) ** 0.5

    def worst(self, number: int = 10) -> Tensor:
        """Return the indices of the data with the least reliable estimates, the worst first.

        The order is by k-hat, then by standard error. It needs at least 21 samples.
        """
        self._require_tails()
        by_error = self.standard_errors.nan_to_num(torch.inf).argsort(descending=True)
        return by_error[self.pareto_k[by_error].argsort(descending=True, stable=True)][:number]

    def as_dict(self) -> dict[str, Any]:
        """Return means, fractions and errors for metrics.json; what is not finite becomes None."""
        fractions = {
            "median_relative_sample_size": self.effective_sample_size.median() / self.num_samples,
            "fraction_k_over_0.7": (self.pareto_k > 0.7).double().mean(),
            "fraction_k_over_1": (self.pareto_k > 1).double().mean(),
            "fraction_k_over_threshold": (self.pareto_k > self.k_threshold).double().mean(),
            "median_k": self.pareto_k.median(),
        }
        if self.num_samples < LEAST:
            fractions = {name: torch.tensor(torch.nan) for name in fractions}
        found = {
            "log_likelihood": self.value,
            "log_likelihood_standard_error": self.standard_error,
            "elbo": self.elbo,
            "elbo_standard_error": self.elbo_standard_error,
            **{name: fraction.item() for name, fraction in fractions.items()},
        }
        return {
            "num_examples": len(self.per_datum),
            **({"unnormalized_by": list(self.factors)} if self.factors else {}),
            "num_samples": self.num_samples,
            "k_threshold": self.k_threshold,
            **{name: value if isfinite(value) else None for name, value in found.items()},
            "infinite_weights": int(self.infinite_weights.sum()),
        }

    @property
    def k_threshold(self) -> float:
        """The largest k-hat for which ``num_samples`` are enough."""
        return threshold(self.num_samples)

    def _repr_html_(self) -> str:
        return shown_html(self)

    def __str__(self) -> str:
        k, n = self.pareto_k, len(self.pareto_k)
        size = (self.effective_sample_size / self.num_samples).median().item()
        lines = [
            ("log p(x) ≥", f"{with_error(self.value, self.total_error)} nats per example"),
            *unnormalized(self.factors),
            ("ELBO", with_error(self.elbo, self.elbo_standard_error)),
            ("samples", f"{self.num_samples} for each of {n} data"),
            ("effective samples", f"{100 * size:.1f} % (median)"),
        ]
        if self.num_samples < LEAST:
            lines.append(("Pareto k", f"needs at least {LEAST} samples"))
        else:
            limits = {"0.7 (unreliable)": 0.7, "1 (no mean)": 1.0}
            if self.k_threshold < 0.695:  # else both would be printed as 0.7
                limits = {f"{self.k_threshold:.2f} (too few samples)": self.k_threshold} | limits
            lines.append(("Pareto k", f"{k.median().item():.2f} (median)"))
            lines += [
                (f"  over {words}", f"{int((k > limit).sum())} of {n}")
                for words, limit in limits.items()
            ]
        if bool(self.infinite_weights.any()):
            count = int((self.infinite_weights > 0).sum())
            lines.append(("infinite weights", f"{int(self.infinite_weights.sum())}, {count} data"))
        return "\n".join(f"{name:<32}{value}" for name, value in lines)

    def _require_tails(self) -> None:
        if self.num_samples < LEAST:
            raise UsageError(
                f"must be at least {LEAST} for Pareto k, got {self.num_samples}",
                argument="num_samples",
            )


def unnormalized(factors: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return a table row that names the factors in p(x); an empty list without factors."""
    names = ", ".join(factors)
    return [("not normalized", f"p(x) includes the factor {names}")] if factors else []


@alone()
def log_likelihood(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    num_samples: int = 500,
    binarize: str = "dynamic",
    seed: int = 0,
    engine: str = "auto",
    progress: bool = False,
    batch_size: int = 500,
) -> LogLikelihood:
    r"""Estimate log p(x) by importance sampling, with the guide as proposal.

    The estimate is :math:`\log \hat p(x) = \log \tfrac1K \sum_k p(x, z_k)/q(z_k|x),\
    z_k \sim q(z|x)`. Its expectation is below :math:`\log p(x)` and converges to it as K grows.
    Standard errors use the delta method, :math:`\mathrm{sd}(w)/(\bar w \sqrt K)`. Enumerated
    latents are summed out of each weight. If all latents are enumerated, the estimate is exact.

    Arguments:
        pair: any pair.
        x, context: data, as `pyro_vae.fit` takes them.
        num_samples: K for each datum. Memory grows with the square root of K at most.
        binarize, seed: as in `pyro_vae.evaluate`.
        engine: "eager", "traced", "compiled" or "auto", as in `pyro_vae.fit`.
        progress: show a bar.
        batch_size: greatest number of rows in one pass. Memory is proportional to it, because rows
            and draws of a pass are limited together.

    Global latents w, such as the weights of a decoder, are drawn with z, and the weights are
    :math:`p(x, z|w)/q(z|x)`. The estimate is then that of the posterior predictive density
    :math:`\log E_{q(w)}[p(x|w)]`, given the training data of q(w). It is not a bound on log p(x)
    under the prior of w. All data share draws of w, and ``standard_error`` is an upper bound. If
    the guide computes w from the rows that it is given, the estimate depends on ``batch_size``. A
    warning says so, unless all rows are given at once.

    Raises `UsageError` for a pair that observes data outside the data plate, because these weights
    then do not define log p(x) of a datum. Burda, Grosse & Salakhutdinov, 2016
    (https://arxiv.org/abs/1509.00519).

    >>> import torch, pyro_vae as pv
    >>> pv.log_likelihood(pv.VAE.mlp((4,)), torch.ones(8, 4), num_samples=100).per_datum.shape
    torch.Size([8])
    """
    require_sizes(num_samples=num_samples, batch_size=batch_size)
    team = here()
    with single(), told_smaller(lambda: smaller(batch_size)):
        rows, prepare = shared_rows(team, pair, x, context, binarize)
        return estimate(pair, rows, prepare, num_samples, seed, engine, progress, team, batch_size)


def require_sizes(**sizes: int) -> None:
    """Raise `UsageError` for an argument below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"must be at least 1, got {value}", argument=name)


def estimate(
    pair: nn.Module,
    rows: Source,
    prepare: Preparation,
    num_samples: int,
    seed: int,
    engine: str,
    progress: bool,
    team: Team = ALONE,
    at_once: int = 500,
) -> LogLikelihood:
    """Compute `log_likelihood` of rows that are already checked and binarized.

    Arguments:
        team: the processes that share the minibatches. All of them get the same result.
        at_once: the greatest number of rows in one pass.
    """
    require_engine(engine)
    with using(pair, seed=0):
        pooled = pooled_latents(pair, prepare(rows.first(POOLED_ROWS)))
    parts = team.gather(
        lambda: _weigh(
            pair, rows, prepare, num_samples, seed, engine, progress, team, at_once, pooled
        )
    )
    if pooled and len(rows) > at_once and team.first:
        names = ", ".join(map(repr, pooled))
        warn(
            f"the guide computes {names} from the rows that it is given, so the ELBO and log p(x) "
            f"of a row depend on the {at_once} rows of its minibatch: `batch_size={len(rows)}` "
            "gives it all rows"
        )
    whole = Weighed(*map(torch.cat, zip(*in_order(parts), strict=True)))
    with using(pair, seed):
        first = prepare(next(iter(rows.batches(2))))
        shared, terms = bool(global_latents(pair, first)), folding.factors_of(pair, first)
        modes = fold_plan.known(pair).modes
    if modes and num_samples >= LEAST:
        # A Delta omits values of a discrete latent, and more samples never find them.
        whole = whole._replace(pareto_k=torch.full_like(whole.pareto_k, torch.inf))
    return LogLikelihood(
        value=whole.per_datum.mean().item(),
        standard_error=_error_of_mean(whole.standard_errors, shared),
        num_samples=num_samples,
        elbo=whole.elbo_per_datum.mean().item(),
        elbo_standard_error=_error_of_mean(whole.elbo_standard_errors, shared),
        factors=terms,
        **whole._asdict(),
    )


def _weigh(
    pair: nn.Module,
    rows: Source,
    prepare: Preparation,
    num_samples: int,
    seed: int,
    engine: str,
    progress: bool,
    team: Team,
    at_once: int,
    pooled: tuple[str, ...],
) -> list[Weighed]:
    """Compute the estimates of the minibatches of this process."""
    with using(pair, derived(seed, "process", team.rank)):
        first = prepare(next(iter(rows.batches(2))))
        nesting, vectorized, widest = structure(pair, first)
        cells = CELLS * min(at_once, 500) // 500
        most = min(at_once, len(rows))
        if not pooled:  # or else the result would depend on the number of rows
            most = min(most, cells // (widest * min(SAMPLES, num_samples)))
        batch_size = max(1, most)
        chunk = max(1, cells // (widest * batch_size)) if vectorized else 1
        chunk = _divided(num_samples, min(chunk, num_samples))
        runs = -(-len(rows) // batch_size) * -(-num_samples // chunk)
        if engine == "auto":
            engine = "traced" if runs >= TRACED_RUNS else "eager"
            if len(rows) * num_samples * widest >= COMPILED_CELLS:
                engine = "compiled"
        sums = _sums(pair, nesting, vectorized, engine, chunk * batch_size)
        found = []
        with bar(progress and team.first, len(rows), "log p(x)") as shown:
            for batch in team.own(rows.batches(batch_size)):
                found.append(weighed(sums, prepare(batch), num_samples, chunk))
                shown.update(team.count * len(batch[0]))
        return found


def _divided(number: int, most: int) -> int:
    """Return the size of equal chunks of a number of draws, if one is near the greatest size.

    A smaller last chunk does not run in the graph, which has a fixed shape.
    """
    divisors = (size for size in range(most, 3 * most // 4, -1) if number % size == 0)
    return next(divisors, most)


def _error_of_mean(errors: Tensor, shared: bool) -> float:
    """Return the error of the mean over data; an upper bound if all data share draws."""
    return (errors.mean() if shared else errors.square().sum().sqrt() / len(errors)).item()


def all_log_weights(pair: nn.Module, batch: Batch, num_samples: int) -> Tensor:
    """Return all log weights of a prepared batch, of shape (num_samples, batch), in float64.

    `gaps` needs them for differences of draws and for tails; `log_likelihood` keeps only sums. Call
    this function within `pyro_vae.pairs.scope.using`.
    """
    nesting, vectorized, widest = structure(pair, tuple(tensor[:2] for tensor in batch))
    at_once = min(SAMPLES, num_samples) if vectorized else 1
    rows = max(1, min(len(batch[0]), CELLS // (widest * at_once)))
    if vectorized:
        at_once = max(1, min(num_samples, CELLS // (widest * rows)))

    def some(part: Batch, draws: int) -> Tensor:
        if vectorized:
            return log_weights(pair, part, draws, nesting)
        return log_weights_alone(pair, part, nesting)[None]

    draws = [min(at_once, num_samples - start) for start in range(0, num_samples, at_once)]
    parts = zip(*(tensor.split(rows) for tensor in batch), strict=True)
    found = [torch.cat([some(part, number) for number in draws]) for part in parts]
    return torch.cat(found, 1).double()


def _sums(
    pair: nn.Module, nesting: int, vectorized: bool, engine: str, full: int
) -> Callable[..., Named]:
    """Return a function from empty draws and a batch to log weights and their sums over draws.

    The sums are those of the weights and of their squares, as logarithms, and those of the log
    weights and of their squares.
    """

    def function(draws: Tensor, *batch: Tensor) -> Named:
        if vectorized:
            weights = log_weights(pair, batch, len(draws), nesting)
        else:
            weights = log_weights_alone(pair, batch, nesting)[None]
        weights = weights.double()
        return {
            "log weights": weights,
            "weights": weights.logsumexp(0),
            "squares": (2 * weights).logsumexp(0),
            "logs": weights.sum(0),
            "squared logs": weights.square().sum(0),
        }

    graph = traced(pair, function, engine, "evaluated")

    def run(draws: Tensor, *batch: Tensor) -> Named:
        whole = len(draws) * len(batch[0]) == full  # a smaller rest is rare and needs no graph
        return (graph if whole else function)(draws, *batch)

    return run
