"""Whether the model fits: data drawn given each datum's posterior; and data that do not belong."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pyro_vae.data import Rows, held_rows
from pyro_vae.errors import UsageError, nearest
from pyro_vae.guides import refine
from pyro_vae.importance import LogLikelihood, log_likelihood
from pyro_vae.inference import CHUNK, generate, latent_values
from pyro_vae.pairs import Batch, global_latents, using
from pyro_vae.progress import bar

Statistic: TypeAlias = Callable[[Tensor], Tensor]

LEAST_REPLICATES = 20
"""So few replicates can put a datum outside 95 % of them."""

STATISTICS: dict[str, Statistic] = {
    "mean": lambda x: _flat(x).mean(1),
    "variance": lambda x: _flat(x).var(1, correction=0),
    "greatest": lambda x: _flat(x).amax(1),
    "share of zeros": lambda x: (_flat(x) == 0).to(x.dtype).mean(1),
}
"""Statistics of a datum, over its elements, that any data have."""


def _flat(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)  # a datum may be one number


@dataclass(frozen=True)
class PredictiveCheck:
    """What `predictive_check` found; statistics are in the units of the data."""

    names: tuple[str, ...]
    """The statistics."""
    observed: Tensor
    """Those of the data, of shape (n, statistics)."""
    replicated_mean: Tensor
    """Their means over the replicates of each datum, of shape (n, statistics)."""
    replicated_deviation: Tensor
    """Their standard deviations over the replicates of each datum, of shape (n, statistics)."""
    p_values: Tensor
    """Share of a datum's replicates above it, ties halved, of shape (n, statistics); near 0 or 1
    the model does not make such data."""
    whole: Tensor
    """Means over all data of each replicate's statistics, of shape (num_replicates, statistics)."""

    @property
    def num_replicates(self) -> int:
        """Replicates of each datum."""
        return len(self.whole)

    @property
    def whole_p_values(self) -> dict[str, float]:
        """Share of the replicated data sets whose mean statistic is above that of the data."""
        found = _p_values(self.whole[:, None], self.observed.mean(0)[None])[0]
        return dict(zip(self.names, found.tolist(), strict=True))

    def worst(self, name: str | None = None, number: int = 10) -> Tensor:
        """The indices of the data that lie most standard deviations from their replicates, by one
        statistic or by any of them, the worst first."""
        if name is not None and name not in self.names:
            raise UsageError(f"no statistic is called '{name}'; {nearest(name, self.names)}")
        off = self.distances.nan_to_num(0.0, posinf=torch.inf).abs()
        off = off.amax(1) if name is None else off[:, self.names.index(name)]
        return off.argsort(descending=True, stable=True)[:number]

    @property
    def distances(self) -> Tensor:
        """How many standard deviations of its replicates a datum lies above their mean, of shape
        (n, statistics); infinite where they do not vary and it differs, NaN where it does not."""
        return (self.observed - self.replicated_mean) / self.replicated_deviation

    def as_dict(self) -> dict[str, Any]:
        """Means, p-values and shares by statistic, as metrics.json holds them."""
        extreme = (self.p_values - 0.5).abs() > 0.475
        rows = zip(
            self.names,
            self.observed.mean(0).tolist(),
            self.whole.mean(0).tolist(),
            self.whole_p_values.values(),
            extreme.double().mean(0).tolist(),
            strict=True,
        )
        return {
            "num_examples": len(self.observed),
            "num_replicates": self.num_replicates,
            "statistics": {
                name: {
                    "observed": _finite(observed),
                    "replicated": _finite(replicated),
                    "p_value": p,
                    "fraction_outside_95": outside,
                }
                for name, observed, replicated, p, outside in rows
            },
        }

    def __str__(self) -> str:
        lines = [
            f"{'statistic':<18}{'data':>12}{'replicates':>12}{'p, all data':>13}"
            f"{'data outside 95 %':>19}"
        ]
        for name, row in self.as_dict()["statistics"].items():
            numbers = (row[key] for key in ("observed", "replicated"))
            shown = "".join(
                f"{number:>12.4g}" if number is not None else f"{'infinite':>12}"
                for number in numbers
            )
            outside = 100 * row["fraction_outside_95"]
            lines.append(f"{name:<18}{shown}{row['p_value']:>13.3f}{outside:>17.1f} %")
        lines.append(f"{len(self.observed)} data, {self.num_replicates} replicates of each")
        return "\n".join(lines)


def predictive_check(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    statistics: Mapping[str, Statistic] | None = None,
    num_replicates: int = 100,
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> PredictiveCheck:
    r"""Hold statistics of the data against those of data that the model draws in their place.

    For each datum :math:`x^{rep}_r \sim \int p(x^{rep} | z)\, q(z | x)\, dz`, and with R of them
    :math:`p = \tfrac{1}{R + 1} \big(\#\{T(x^{rep}) > T(x)\} + \tfrac12 \#\{T(x^{rep}) = T(x)\}
    + \tfrac12\big)`, never 0 or 1. For all data the same, of the mean of T over them.

    Arguments:
        pair: any pair.
        x, context: data, as `pyro_vae.log_likelihood` takes them.
        statistics: by name, functions that take data (n, *data_shape) and return a tensor of
            shape (n,); `STATISTICS` by default: mean, variance, greatest, share of zeros.
        num_replicates: R for each datum, 20 or more.
        seed: of all draws. progress: show a bar, where it takes over two seconds.

    The latents are the guide's draws (of those that only the model has, draws given them and x), so
    that model and guide are checked together; a refined pair brings them nearer to the posterior:
    ``refined = pv.refine(pair, x)``, then ``predictive_check(refined.pair, *refined.batch)``. As a
    replicate has seen its datum, p-values crowd about 1/2: extreme ones say more than usual ones.
    Raises `UsageError` for a statistic that does not return a number for each datum, and where the
    model draws no data of the shape of x. Gelman, Meng & Stern, 1996.

    >>> import torch, pyro_vae as pv
    >>> x = torch.ones(8, 4)
    >>> found = predictive_check(pv.VAE.mlp((4,)), x, statistics={"total": lambda x: x.sum(1)})
    >>> found.p_values.shape, bool(found.p_values.max() < 0.5)
    (torch.Size([8, 1]), True)
    """
    if num_replicates < LEAST_REPLICATES:
        raise UsageError(
            f"num_replicates must be {LEAST_REPLICATES} or more, {num_replicates} came"
        )
    chosen = STATISTICS if statistics is None else dict(statistics)
    if not chosen:
        raise UsageError("statistics must name one function or more, none came")
    rows, prepare = held_rows(pair, x, context, binarize)
    # Of latents that all data share each replicate of the whole data has a draw of its own.
    shared = bool(global_latents(pair, prepare(rows.first(2))))
    size, beside = (len(rows), 1) if shared else (CHUNK, CHUNK)
    parts = []
    with using(pair, seed), bar(progress, len(rows), "replicates", delay=2) as shown:
        for part in rows.batches(size):
            batch = prepare(part)
            observed = _measured(chosen, batch[0])
            parts.append((observed, _replicated(pair, batch, chosen, num_replicates, beside)))
            shown.update(len(observed))
    observed = torch.cat([part[0] for part in parts])
    replicated = torch.cat([part[1] for part in parts], 1)
    return PredictiveCheck(
        tuple(chosen),
        observed,
        replicated.mean(0),
        replicated.std(0, correction=0),
        _p_values(replicated, observed),
        replicated.mean(1),
    )


def _replicated(
    pair: nn.Module, batch: Batch, statistics: Mapping[str, Statistic], number: int, beside: int
) -> Tensor:
    """Statistics of replicates (number, n, statistics), so many rows of them drawn side by side."""
    n = len(batch[0])
    together = max(1, beside // n)
    parts = []
    for start in range(0, number, together):
        times = min(together, number - start)
        wide = tuple(tensor.repeat(times, *[1] * (tensor.dim() - 1)) for tensor in batch)
        made = generate(pair, wide, latent_values(pair, wide, False), False, None)
        if made.numel() != wide[0].numel():
            raise UsageError(
                f"the model draws data of shape {tuple(made.shape[1:])} for x of shape "
                f"{tuple(batch[0].shape[1:])}: their statistics cannot be compared"
            )
        parts.append(_measured(statistics, made.reshape(wide[0].shape)).unflatten(0, (times, n)))
    return torch.cat(parts)


def _measured(statistics: Mapping[str, Statistic], x: Tensor) -> Tensor:
    """All statistics of data, of shape (n, statistics)."""
    columns = []
    for name, statistic in statistics.items():
        found = statistic(x)
        if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
            came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(
                f"statistic '{name}' must return a number for each datum, a tensor of shape "
                f"({len(x)},); {came} came"
            )
        columns.append(found.double())
    return torch.stack(columns, 1).cpu()


def _p_values(replicated: Tensor, observed: Tensor) -> Tensor:
    """Shares of replicates (replicates, n, statistics) above what was observed (n, statistics)."""
    rounding = 1e-6 * observed.abs()
    above = (replicated > observed + rounding).sum(0)
    ties = ((replicated - observed).abs() <= rounding).sum(0)
    return (above + (ties + 1) / 2) / (len(replicated) + 1)


def _finite(number: float) -> float | None:
    return number if isfinite(number) else None


class Scores(NamedTuple):
    """Outlier scores of some data, nats, each of shape (n,)."""

    log_likelihood: Tensor
    """log p(x), importance-sampled."""
    typicality: Tensor
    """How far -log p(x) is from its mean over the reference, either way."""
    regret: Tensor | None
    """How much the ELBO rises as each datum gets its own q; None where it was not asked for."""
    standard_errors: Tensor
    """The Monte Carlo standard errors of ``log_likelihood``."""

    def as_outlying(self) -> dict[str, Tensor]:
        """The scores by name, each greater the less the datum belongs."""
        found = {"-log p(x)": -self.log_likelihood, "typicality": self.typicality}
        return found if self.regret is None else {**found, "likelihood regret": self.regret}


@dataclass(frozen=True)
class OutlierScores:
    """What `outlier_scores` found."""

    inside: Scores
    """Scores of x."""
    other: Scores | None
    """Scores of the other data, where they were given."""
    reference_nll: float
    """Mean of -log p(x) over the reference, nats per example."""
    auroc: dict[str, float] | None
    """For each score the probability that a datum of the other data has the greater one, ties
    halved: 1 where it tells them apart, 1/2 where it says nothing, below that where it errs."""

    def as_dict(self) -> dict[str, Any]:
        """Means and AUROCs, as metrics.json holds them; what is not finite is None."""
        found: dict[str, Any] = {"reference_nll": _finite(self.reference_nll)}
        for which, scores in (("inside", self.inside), ("other", self.other)):
            if scores is not None:
                means = {name: _finite(s.mean().item()) for name, s in scores.as_outlying().items()}
                bad = sum(int((~torch.isfinite(s)).sum()) for s in scores.as_outlying().values())
                n = len(scores.log_likelihood)
                found[which] = {"num_examples": n, "not_finite": bad, **means}
        return found if self.auroc is None else {**found, "auroc": self.auroc}

    def __str__(self) -> str:
        lines = [f"{'nats per example':<20}{'x':>12}{'other':>12}{'AUROC':>9}"]
        other = {} if self.other is None else self.other.as_outlying()
        for name, score in self.inside.as_outlying().items():
            line = f"{name:<20}{score.mean().item():>12.3f}"
            if name in other and self.auroc is not None:
                line += f"{other[name].mean().item():>12.3f}{self.auroc[name]:>9.3f}"
            lines.append(line)
        lines.append(f"{'reference':<20}{self.reference_nll:>12.3f}")
        return "\n".join(lines)


def outlier_scores(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    reference: Tensor | Sequence[Any] | None = None,
    other: Tensor | Sequence[Any] | None = None,
    regret: bool = True,
    num_samples: int = 500,
    steps: int = 300,
    binarize: str = "dynamic",
    seed: int = 0,
    engine: str = "auto",
    progress: bool = True,
) -> OutlierScores:
    r"""Score how little each datum belongs to what the pair was fitted to.

    .. math:: -\log p(x), \qquad |{-\log p(x)} - \overline{\mathrm{nll}}|, \qquad
        \mathrm{ELBO}(q^*_x) - \mathrm{ELBO}(q_\phi(\cdot | x)),

    the negative log-likelihood; typicality, its distance from the mean of the reference; and
    likelihood regret, what the ELBO gains as `refine` gives the datum its own q within the family.
    The greater each is, the more the datum is an outlier.

    Arguments:
        pair: any pair.
        x, context: data to score, as `pyro_vae.log_likelihood` takes them.
        reference: x, or a tuple of x and context, of which typical data are taken: held-out data of
            the kind that the pair was fitted to, never those that it was fitted to. x itself by
            default, which says how unlike the rest a datum is.
        other: the same of data known not to belong, for the AUROC of each score.
        regret: compute likelihood regret, much the longest.
        num_samples: importance samples for each datum.
        steps: of the refinement. seed, engine, progress: as in `pyro_vae.refine`.

    A high log p(x) does not say that a datum belongs: simple data of another kind, an empty image
    say, can have a higher one than the data that the pair was fitted to.
    Raises `UsageError` as `pyro_vae.log_likelihood`, and with ``regret`` as `refine`.
    Nalisnick et al., 2019 (https://arxiv.org/abs/1810.09136, https://arxiv.org/abs/1906.02994);
    Xiao, Yan & Amit, 2020 (https://arxiv.org/abs/2003.02977).

    >>> import torch, pyro_vae as pv
    >>> x, other = torch.ones(8, 4), torch.zeros(8, 4)
    >>> found = outlier_scores(pv.VAE.mlp((4,)), x, other=(other,), regret=False, num_samples=50)
    >>> found.inside.typicality.shape, sorted(found.auroc)
    (torch.Size([8]), ['-log p(x)', 'typicality'])
    """
    options: dict[str, Any] = {"num_samples": num_samples, "binarize": binarize}
    options |= {"seed": seed, "engine": engine, "progress": progress}

    def measured(
        given: Tensor | Sequence[Any], refined: bool
    ) -> tuple[LogLikelihood, Tensor | None]:
        rows = (given,) if isinstance(given, Tensor) else given
        if not refined:
            return log_likelihood(pair, *rows, **options), None
        found = refine(pair, *rows, steps=steps, **options)
        return found.before, found.gain

    def scores(found: tuple[LogLikelihood, Tensor | None]) -> Scores:
        estimate, gain = found
        typicality = (-estimate.per_datum - reference_nll).abs()
        return Scores(estimate.per_datum, typicality, gain, estimate.standard_errors)

    own = measured((x, *context), regret)
    typical = own if reference is None else measured(reference, False)
    reference_nll = -typical[0].value
    inside = scores(own)
    outside = None if other is None else scores(measured(other, regret))
    auroc = None if outside is None else _auroc(inside, outside)
    return OutlierScores(inside, outside, reference_nll, auroc)


def _auroc(inside: Scores, outside: Scores) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    found = {}
    for name, low in inside.as_outlying().items():
        high = outside.as_outlying()[name]
        values = torch.cat([low, high]).nan_to_num(nan=torch.finfo(low.dtype).max)
        belongs = torch.cat([torch.zeros(len(low)), torch.ones(len(high))])
        found[name] = float(roc_auc_score(belongs.numpy(), values.numpy()))
    return found
