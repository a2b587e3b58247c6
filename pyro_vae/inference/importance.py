"""log p(x) by importance sampling, with the guide as proposal."""

from collections.abc import Callable
from math import isfinite, log
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import Preparation, held_rows
from pyro_vae.data.sources import Rows, Source
from pyro_vae.errors import UsageError
from pyro_vae.inference.pareto import LEAST, Greatest, shape_of_greatest, tail_length, threshold
from pyro_vae.pairs import fold_plan, folding
from pyro_vae.pairs.formatting import with_error
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.weights import log_weights, log_weights_alone, structure
from pyro_vae.training.settings import require_engine
from pyro_vae.training.tracing import Named, traced

CELLS = 2**20
"""Numbers in the greatest tensor that is made at once: as many as the caches of a core hold."""

SAMPLES = 64
"""Samples of a datum that are drawn side by side at least, so that the encoder is run seldom."""

TRACED_RUNS = 20
"""Chunks from which on "auto" traces a graph for them."""

COMPILED_CELLS = 5e9
"""Data times samples times dimensions from which on "auto" compiles that graph."""


class LogLikelihood(NamedTuple):
    """An importance-sampled estimate of log p(x); nats per example."""

    value: float
    """Mean over the data of the estimates: in expectation a lower bound of log p(x)."""
    standard_error: float
    """Monte Carlo standard error of ``value``, for these data; 0 where the guide is exact, NaN for
    one sample, which tells nothing of it."""
    num_samples: int
    """Importance samples for each datum."""
    per_datum: Tensor
    """The estimate for each datum, of shape (n,)."""
    standard_errors: Tensor
    """The Monte Carlo standard error of each, by the delta method, of shape (n,)."""
    effective_sample_size: Tensor
    """(sum w)^2 / sum w^2 of each datum's weights, of shape (n,)."""
    elbo: float
    """Mean over the data of the ELBO, the mean of the same weights' logarithms."""
    elbo_standard_error: float
    """Monte Carlo standard error of ``elbo``, for these data; NaN for one sample."""
    elbo_per_datum: Tensor
    """The ELBO of each datum, of shape (n,)."""
    elbo_standard_errors: Tensor
    """The Monte Carlo standard error of each, of shape (n,)."""
    pareto_k: Tensor
    """The Pareto shape of the tail of each datum's weights (see `pyro_vae.inference.pareto`), of
    shape (n,): over 0.7 neither estimate nor error can be believed. 0 where the weights are
    constant up to rounding, infinite where one is, NaN for fewer than 21 samples, which have no
    tail."""
    infinite_weights: Tensor
    """How many of each datum's weights are infinite or NaN, of shape (n,): where the guide drew
    what it gives no density itself. The estimate is then infinite or NaN too."""
    factors: tuple[str, ...] = ()
    """The model's ``pyro.factor`` sites: with them p(x) is not normalized, and its logarithm is
    that of the integral of p(x, z) times the factors, not a log-likelihood."""

    def worst(self, number: int = 10) -> Tensor:
        """The indices of the data whose estimates are least to be trusted, the worst first.

        By k-hat, and by standard error where that is the same. Raises `UsageError` for fewer than
        21 samples.
        """
        self._require_tails()
        by_error = self.standard_errors.nan_to_num(torch.inf).argsort(descending=True)
        return by_error[self.pareto_k[by_error].argsort(descending=True, stable=True)][:number]

    def as_dict(self) -> dict[str, Any]:
        """Means, fractions and errors, as metrics.json holds them; what is not finite is None."""
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
        """The k-hat up to which so many samples are enough
        (`pyro_vae.inference.pareto.threshold`)."""
        return threshold(self.num_samples)

    def __str__(self) -> str:
        k, n = self.pareto_k, len(self.pareto_k)
        size = (self.effective_sample_size / self.num_samples).median().item()
        lines = [
            ("log p(x) ≥", f"{with_error(self.value, self.standard_error)} nats per example"),
            *unnormalized(self.factors),
            ("ELBO", with_error(self.elbo, self.elbo_standard_error)),
            ("samples", f"{self.num_samples} for each of {n} data"),
            ("effective samples", f"{100 * size:.1f} % in the median"),
        ]
        if self.num_samples < LEAST:
            lines.append(("Pareto k", f"takes {LEAST} samples or more"))
        else:
            limits = {f"{self.k_threshold:.2f} (enough samples)": self.k_threshold}
            limits = limits if self.k_threshold < 0.7 else {}
            limits |= {"0.7 (not to be trusted)": 0.7, "1 (no mean)": 1.0}
            lines.append(("Pareto k", f"{k.median().item():.2f} in the median"))
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
                f"the tail of a datum's weights takes {LEAST} samples or more (num_samples), "
                f"{self.num_samples} came"
            )


def unnormalized(factors: tuple[str, ...]) -> list[tuple[str, str]]:
    """A row of a table that says what factors make of log p(x); none without them."""
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
) -> LogLikelihood:
    r"""Estimate log p(x) by importance sampling, with the guide as proposal.

    :math:`\log \hat p(x) = \log \tfrac1K \sum_k p(x, z_k)/q(z_k|x),\ z_k \sim q(z|x)`, whose
    expectation is below :math:`\log p(x)` and reaches it as K grows. Standard errors are those of
    the delta method, :math:`\mathrm{sd}(w)/(\bar w \sqrt K)`. Enumerated latents are summed out of
    each weight; where there are no others, the estimate is log p(x) itself.

    Arguments:
        num_samples: K for each datum, any number: memory grows with its root at most.
        engine: "eager", "traced", "compiled" or "auto", as in `pyro_vae.fit`.

    Latents w outside the data plate, such as weights of a decoder, are drawn with z, and the
    weights are :math:`p(x, z|w)/q(z|x)`: the estimate is of the posterior predictive density
    :math:`\log E_{q(w)}[p(x|w)]`, given the data that q(w) was fitted to, and no bound on log p(x)
    under the prior of w. Data then share draws of w, and ``standard_error`` is an upper bound.

    Raises `UsageError` for a pair that observes data outside the data plate, for which log p(x) of
    a datum is not defined by these weights. Burda, Grosse & Salakhutdinov, 2016.

    >>> import torch, pyro_vae as pv
    >>> pv.log_likelihood(pv.VAE.mlp((4,)), torch.ones(8, 4), num_samples=100).per_datum.shape
    torch.Size([8])
    """
    if num_samples < 1:
        raise UsageError(f"num_samples must be 1 or more, {num_samples} came")
    rows, prepare = held_rows(pair, x, context, binarize)
    return estimate(pair, rows, prepare, num_samples, seed, engine, progress)


def estimate(
    pair: nn.Module,
    rows: Source,
    prepare: Preparation,
    num_samples: int,
    seed: int,
    engine: str,
    progress: bool,
) -> LogLikelihood:
    """`log_likelihood` of rows that are already checked and binarised."""
    require_engine(engine)
    values: list[tuple[Tensor, ...]] = []
    with using(pair, seed):
        first = prepare(next(iter(rows.batches(2))))
        nesting, vectorized, widest = structure(pair, first)
        batch_size = max(1, min(500, len(rows), CELLS // (widest * min(SAMPLES, num_samples))))
        chunk = max(1, CELLS // (widest * batch_size)) if vectorized else 1
        chunk = min(chunk, num_samples)
        runs = -(-len(rows) // batch_size) * -(-num_samples // chunk)
        if engine == "auto":
            engine = "traced" if runs >= TRACED_RUNS else "eager"
            if len(rows) * num_samples * widest >= COMPILED_CELLS:
                engine = "compiled"
        sums = _sums(pair, nesting, vectorized, engine, chunk * batch_size)
        with bar(progress, len(rows), "log p(x)") as shown:
            for batch in rows.batches(batch_size):
                values.append(_weigh(sums, prepare(batch), num_samples, chunk))
                shown.update(len(batch[0]))
        shared = bool(global_latents(pair, first))
        terms = folding.factors_of(pair, first)
        modes = fold_plan.known(pair).modes
    per_datum, errors, ess, elbos, elbo_errors, shapes, infinite = map(
        torch.cat, zip(*values, strict=True)
    )
    if modes and num_samples >= LEAST:
        # A Delta leaves values of a discrete latent out: more samples never find them.
        shapes = torch.full_like(shapes, torch.inf)
    return LogLikelihood(
        per_datum.mean().item(),
        _error_of_mean(errors, shared),
        num_samples,
        per_datum,
        errors,
        ess,
        elbos.mean().item(),
        _error_of_mean(elbo_errors, shared),
        elbos,
        elbo_errors,
        shapes,
        infinite,
        terms,
    )


def _error_of_mean(errors: Tensor, shared: bool) -> float:
    """The error of the mean over data, at most, where all data share draws."""
    return (errors.mean() if shared else errors.square().sum().sqrt() / len(errors)).item()


def all_log_weights(pair: nn.Module, batch: Batch, num_samples: int) -> Tensor:
    """The log weights of so many draws for each datum of a prepared batch, all of them, in float64:
    of shape (num_samples, batch). To be called where the pair is in use
    (`pyro_vae.pairs.scope.using`).

    For what needs more than `log_likelihood` keeps: differences of draws, and tails.
    """
    nesting, vectorized, widest = structure(pair, tuple(tensor[:2] for tensor in batch))
    beside = min(SAMPLES, num_samples) if vectorized else 1
    rows = max(1, min(len(batch[0]), CELLS // (widest * beside)))
    if vectorized:
        beside = max(1, min(num_samples, CELLS // (widest * rows)))

    def some(part: Batch, draws: int) -> Tensor:
        if vectorized:
            return log_weights(pair, part, draws, nesting)
        return log_weights_alone(pair, part, nesting)[None]

    draws = [min(beside, num_samples - start) for start in range(0, num_samples, beside)]
    parts = zip(*(tensor.split(rows) for tensor in batch), strict=True)
    found = [torch.cat([some(part, number) for number in draws]) for part in parts]
    return torch.cat(found, 1).double()


def _sums(
    pair: nn.Module, nesting: int, vectorized: bool, engine: str, full: int
) -> Callable[..., Named]:
    """What gives the log weights of so many draws for each datum, the weights and their squares
    summed, in logarithms, and the logarithms and their squares summed."""

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

    graph = traced(pair, function, engine, "weighed")

    def run(draws: Tensor, *batch: Tensor) -> Named:
        whole = len(draws) * len(batch[0]) == full  # what is over is seldom
        return (graph if whole else function)(draws, *batch)

    return run


def _weigh(
    sums: Callable[..., Named], batch: Batch, num_samples: int, chunk: int
) -> tuple[Tensor, ...]:
    """Estimate, standard error and effective sample size of each datum, then its ELBO and the
    standard error of that, the shape of its tail and its infinite weights, by chunks of samples."""
    n = len(batch[0])
    first = torch.full((n,), -torch.inf, dtype=torch.float64)
    second, least = first.clone(), -first
    logs, squared_logs, infinite = (torch.zeros_like(first) for _ in range(3))
    greatest = Greatest(tail_length(num_samples) + 1)
    for start in range(0, num_samples, chunk):
        found = sums(batch[0].new_empty(min(chunk, num_samples - start)), *batch)
        first = torch.logaddexp(first, found["weights"].cpu())
        second = torch.logaddexp(second, found["squares"].cpu())
        logs += found["logs"].cpu()
        squared_logs += found["squared logs"].cpu()
        log_weights = found["log weights"].cpu()
        infinite += (~(log_weights < torch.inf)).sum(0)
        greatest.add(log_weights)
        least = torch.minimum(least, log_weights.amin(0))
    ratio = torch.exp(second - 2 * first)  # sum w^2 / (sum w)^2, at least 1/K
    errors = relative_error(ratio, num_samples)
    elbo = logs / num_samples
    spread = (squared_logs / num_samples - elbo.square()).clamp(min=0)
    if num_samples == 1:
        spread = torch.full_like(spread, torch.nan)
    elbo_errors = (spread / max(1, num_samples - 1)).sqrt()
    shapes = torch.full_like(first, torch.nan)
    if num_samples >= LEAST:
        shapes = _shapes(greatest.values(), least, torch.finfo(batch[0].dtype).eps)
    return first - log(num_samples), errors, 1 / ratio, elbo, elbo_errors, shapes, infinite.long()


def relative_error(ratio: Tensor, number: int) -> Tensor:
    r"""The standard error of the mean of so many weights over that mean.

    :math:`\sqrt{\tfrac{K}{K - 1} (r - \tfrac1K)}` for :math:`r = \sum w^2 / (\sum w)^2`; NaN for
    one weight, which tells nothing of its error.
    """
    if number == 1:
        return torch.full_like(ratio, torch.nan)
    return ((ratio - 1 / number).clamp(min=0) * number / (number - 1)).sqrt()


def _shapes(greatest: Tensor, least: Tensor, rounding: float) -> Tensor:
    """The shapes of the tails of log weights; 0 where all weights differ by rounding alone."""
    spread, size = greatest[:, 0] - least, greatest[:, 0].abs().clamp(min=1)
    constant = torch.isfinite(size) & (spread <= 100 * rounding * size)
    return torch.where(constant, 0.0, shape_of_greatest(greatest))
