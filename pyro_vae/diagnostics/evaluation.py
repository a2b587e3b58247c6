"""Evaluation of a fitted pair: the ELBO and its parts, log p(x), active units, a linear probe."""

import warnings
from dataclasses import asdict, dataclass, field
from math import isnan, log, nan
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import Preparation, held_rows, shared_rows
from pyro_vae.data.sources import Rows, Source, parts
from pyro_vae.diagnostics.global_kl import global_kl
from pyro_vae.diagnostics.labels import LabelScores, flat_codes, probe_accuracy_of, score_classes
from pyro_vae.diagnostics.units import units, variance
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import LogLikelihood, estimate, require_sizes, unnormalized
from pyro_vae.pairs import enumeration, fold_plan, folding, folds
from pyro_vae.pairs.arrays import as_labels
from pyro_vae.pairs.formatting import in_columns, with_error
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.memory import smaller, told_smaller
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.processes import Team, here, single
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.threads import alone
from pyro_vae.runs import files as run_files
from pyro_vae.training.elbo import elbo
from pyro_vae.training.validation import bound

ACTIVE = 0.01
"""A unit is active if the variance of its posterior mean is larger (Burda et al., 2016).

If the prior of a latent depends on other latents or on the context, the mean of that prior is
subtracted first. Otherwise each unit that only follows the level above would count as active."""

PARTICLES = 10
"""Draws for each datum in the estimate of the ELBO by `evaluate`."""


@dataclass(frozen=True)
class Evaluation:
    """The results of `evaluate` on held-out data; bounds and KL in nats per example."""

    num_examples: int
    elbo: float
    reconstruction: float
    kl: float
    kl_by_site: dict[str, float]
    kl_by_unit: dict[str, list[float]]
    """Mean KL of each unit of a latent site, if the KL is a sum over units."""
    num_units: dict[str, int]
    """Number of units of each latent site that is not discrete."""
    active_units: dict[str, int]
    """Number of active units of each latent site: the posterior mean, minus that of the prior, has
    a variance over 0.01 across the data."""
    log_likelihood: float
    log_likelihood_standard_error: float
    """Monte Carlo standard error of ``log_likelihood``, for these data."""
    num_samples: int
    bits_per_dim: float | None
    """-log_likelihood / (dimensions * log 2), for discrete data. Masked entries and padding are not
    dimensions. If the data are tokens, 2 to this power is the perplexity of each token."""
    probe_accuracy: float | None
    """Accuracy of a linear classifier of the codes on the held-out data, if there are labels."""
    accuracy: float | None = None
    """Fraction of labels that equal the most probable value of a discrete latent. It needs a model
    that observes labels given this latent, so that its values are labels."""
    calibration_error: float | None = None
    """Expected calibration error of the probability of that value: the mean distance between
    probability and accuracy over 15 bins, weighted by their data (Guo et al., 2017)."""
    clustering_accuracy: float | None = None
    """Accuracy of the most probable value of a discrete latent under the best one-to-one matching
    of values and labels, if the values are not labels."""
    mutual_information: float | None = None
    """Mutual information of that value and the label, divided by the mean of their entropies."""
    not_computed: dict[str, str] = field(default_factory=dict)
    """The reason for each requested score that is missing, by the name of the score."""
    log_joint: float | None = None
    """log p(x, z) at a point, if the guide of a local latent is a Delta (a point estimate). It is
    not a bound on log p(x). ``elbo`` and ``log_likelihood`` are then NaN, and ``kl`` is that of the
    other latents."""
    point_estimates: tuple[str, ...] = ()
    """Latents whose guide is a Delta. If all of them are global, the bounds are bounds on
    log p(x | w) at the points w."""
    factors: tuple[str, ...] = ()
    """The model's ``pyro.factor`` sites. They are part of ``reconstruction``. With them p(x) is not
    normalized: ``log_likelihood`` is the logarithm of an integral and not a likelihood."""
    global_kl: dict[str, float] = field(default_factory=dict)
    """KL of each global and group latent, in nats for all data; for guides that read rows, given
    the first ``batch_size``. Point estimates and discrete latents that are summed out have none."""
    elbo_standard_error: float = nan
    """Monte Carlo standard error of ``elbo``, for these data. The importance samples give it, so
    it is NaN for one sample, and for a guide that enumerates a latent, whose weights sum over it.
    If all data share draws of a global latent, it is an upper bound."""
    log_likelihood_total_error: float = nan
    """``log_likelihood_standard_error`` and the bias, as in `LogLikelihood.total_error`."""

    @property
    def nll(self) -> float:
        """The negative log-likelihood."""
        return -self.log_likelihood

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for metrics.json; NaN becomes None, and infinite numbers become
        "Infinity" or "-Infinity"."""
        fields = asdict(self).items()
        return run_files.json_ready(
            {k: None if isinstance(v, float) and isnan(v) else v for k, v in fields}
        )

    def _estimate(self) -> str:
        found = with_error(self.log_likelihood, self.log_likelihood_total_error)
        if self.num_samples == 1:
            return f"{found}, 1 sample, which gives no error"
        return f"{found}, {self.num_samples} samples"

    _repr_html_ = shown_html

    def __str__(self) -> str:
        several = len(self.active_units) > 1
        active = ", ".join(
            f"{count} of {self.num_units[site]}" + (f" ({site})" if several else "")
            for site, count in self.active_units.items()
        )
        points = ", ".join(self.point_estimates)
        bounds = [
            ("ELBO", f"{with_error(self.elbo, self.elbo_standard_error)} nats per example"),
            ("log p(x) ≥", self._estimate()),
            *unnormalized(self.factors),
        ]
        if self.log_joint is not None:
            at = f"at a point estimate of {points}, not a bound"
            words = f"{self.log_joint:.3f} nats per example, {at}"
            bounds = [("log joint", words), ("log p(x)", "not estimated: the guide has no density")]
        elif points:
            bounds.append(("conditional on", f"a point estimate of {points}"))
        lines = [
            ("examples", f"{self.num_examples}"),
            *bounds,
            ("reconstruction", f"{self.reconstruction:.3f}"),
        ]
        if self.kl_by_site or not self.global_kl:
            lines.append(("KL", f"{self.kl:.3f}"))
        for name, value in self.global_kl.items():
            lines.append((f"KL of {name}", f"{value:.3f} nats for all data, not in the ELBO"))
        if active:
            lines.append(("active units", active))
        if self.bits_per_dim is not None:
            lines.append(("bits per dimension", f"{self.bits_per_dim:.4f}"))
        if self.probe_accuracy is not None:
            lines.append(("linear probe", f"{100 * self.probe_accuracy:.1f} % correct"))
        if self.accuracy is not None:
            lines.append(("classes", f"{100 * self.accuracy:.1f} % correct"))
            lines.append(("calibration error", f"{100 * (self.calibration_error or 0):.1f} %"))
        if (share := self.clustering_accuracy) is not None:
            lines.append(("clusters", f"{100 * share:.1f} % correct, best matching"))
        if self.mutual_information is not None:
            lines.append(("mutual information", f"{self.mutual_information:.3f}, normalized"))
        for name, why in self.not_computed.items():
            lines.append((_TITLES[name], f"not computed: {why}"))
        return in_columns(lines)


_TITLES = {
    "probe_accuracy": "linear probe",
    "accuracy": "classes",
    "calibration_error": "calibration error",
    "clustering_accuracy": "clusters",
    "mutual_information": "mutual information",
}


@alone()
def evaluate(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    labels: Any = None,
    train: Any = None,
    train_labels: Any = None,
    num_samples: int = 500,
    binarize: str = "dynamic",
    batch_size: int = 500,
    seed: int = 0,
    engine: str = "auto",
    progress: bool = False,
) -> Evaluation:
    r"""Measure a fitted pair on held-out data.

    Arguments:
        pair: any pair.
        x, context: held-out data, as `pyro_vae.fit` takes them.
        labels: classes of x, integers from 0, for the linear probe and for comparison with a
            discrete latent. -1 means that a label is missing; scores of labels ignore such rows.
        train, train_labels: training data, as x or a tuple of x and context, and their labels. The
            probe is fitted only to these.
        num_samples: importance samples of each datum for log p(x).
        binarize: "dynamic" draws gray intensities under a Bernoulli once, with a fixed seed; see
            `pyro_vae.fit` for the other values.
        batch_size: number of rows in one pass.
        seed: random seed. Parameters, generators and the parameter store do not change.
        engine: how log p(x) is computed, as in `pyro_vae.log_likelihood`.
        progress: show a bar.

    If the labels do not allow a score, it is None, and ``not_computed`` has the reason. A warning
    names the first row of x whose log p(x) is not finite. Raises `UsageError` if ``num_samples`` is
    below 1 or the labels do not match the rows.

    >>> import torch, pyro_vae as pv
    >>> result = pv.evaluate(pv.VAE.mlp((4,), latent_dim=2), torch.ones(8, 4), num_samples=10)
    >>> result.num_examples, result.elbo <= result.log_likelihood + 1
    (8, True)
    """
    require_sizes(num_samples=num_samples, batch_size=batch_size)
    team = here()
    with single(), told_smaller(lambda: smaller(batch_size)):
        return _evaluated(
            pair,
            (x, context),
            labels,
            train,
            train_labels,
            num_samples,
            binarize,
            batch_size,
            seed,
            engine,
            progress,
            team,
        )


def _evaluated(
    pair: nn.Module,
    data: tuple[Rows, tuple[Any, ...]],
    labels: Any,
    train: Any,
    train_labels: Any,
    num_samples: int,
    binarize: str,
    batch_size: int,
    seed: int,
    engine: str,
    progress: bool,
    team: Team,
) -> Evaluation:
    """Do what `evaluate` says; several processes share the two estimates over rows."""
    rows, prepare = shared_rows(team, pair, *data, binarize)
    given = None if train is None else parts(train)
    known = None if given is None else held_rows(pair, given[0], given[1:], binarize)
    if labels is not None:
        labels = _labels_of(rows, labels, "x")
    if train_labels is not None and known is not None:
        train_labels = _labels_of(known[0], train_labels, "train")
    objective = elbo(pair, prepare(rows.first(2)), PARTICLES)
    measured = bound(pair, rows, prepare, objective, batch_size, seed, team)
    few = prepare(rows.first(2))
    points, factors = fold_plan.plan(pair, few), folding.factors_of(pair, few)
    likelihood = None
    if not points.local_points:
        how = (num_samples, seed, engine, progress, team, batch_size)
        likelihood = estimate(pair, rows, prepare, *how)
        _warn_of_rows(rows, prepare, likelihood.per_datum, batch_size)
    by_unit, codes, moves, dims = units(pair, rows, prepare, batch_size, seed)
    scores = LabelScores()
    if labels is not None and known is not None and train_labels is not None and codes:
        train_codes = units(pair, *known, batch_size, seed)[1]
        scores.take(
            ("probe_accuracy",),
            lambda: probe_accuracy_of(
                flat_codes(train_codes), train_labels, flat_codes(codes), labels
            ),
        )
    if labels is not None:
        score_classes(scores, pair, rows, prepare, labels, batch_size, seed)
    hidden = [folds.point_name(name) for name in points.points]
    by_site = {name: kl for name, kl in measured.kl.items() if name not in hidden}
    bits = None
    if likelihood is not None and dims and not factors:
        bits = -likelihood.per_datum.sum().item() / (dims * log(2))
    return Evaluation(
        num_examples=len(rows),
        elbo=nan if likelihood is None else measured.elbo,
        reconstruction=measured.reconstruction,
        kl=sum(by_site.values()),
        kl_by_site=by_site,
        kl_by_unit={name: kl.tolist() for name, kl in by_unit.items()},
        num_units={name: code.shape[1] for name, code in codes.items()},
        active_units={name: int((variance(move) > ACTIVE).sum()) for name, move in moves.items()},
        log_likelihood=nan if likelihood is None else likelihood.value,
        log_likelihood_standard_error=nan if likelihood is None else likelihood.standard_error,
        num_samples=num_samples,
        bits_per_dim=bits,
        log_joint=measured.elbo if likelihood is None else None,
        point_estimates=points.points,
        factors=factors,
        global_kl=global_kl(pair, prepare(rows.first(batch_size)), seed),
        elbo_standard_error=nan if likelihood is None else _elbo_error(pair, few, likelihood),
        log_likelihood_total_error=nan if likelihood is None else likelihood.total_error,
        not_computed=scores.missing,
        **scores.found,
    )


def _elbo_error(pair: nn.Module, few: Batch, likelihood: LogLikelihood) -> float:
    """The standard error of a mean of `PARTICLES` draws, each with the variance of a log weight."""
    with using(pair, seed=0):
        if enumeration.to_enumerate(trace_guide(pair, few)):
            return nan
    return likelihood.elbo_standard_error * (likelihood.num_samples / PARTICLES) ** 0.5


def _labels_of(rows: Source, labels: Any, name: str) -> Tensor:
    labels = as_labels(labels)
    if len(labels) != len(rows):
        raise UsageError(
            f"got {len(labels)} labels but {len(rows)} rows of {name}; they must match"
        )
    return labels


def _warn_of_rows(
    rows: Source, prepare: Preparation, log_likelihood: Tensor, batch_size: int
) -> None:
    """Warn of rows whose log p(x) is not finite; name the first and the size of its values."""
    bad = (~torch.isfinite(log_likelihood)).nonzero().flatten().tolist()
    if not bad:
        return
    at = 0
    for batch in rows.batches(batch_size):
        if at <= bad[0] < at + len(batch[0]):
            greatest = float(prepare(batch)[0][bad[0] - at].abs().max())
            warnings.warn(
                f"log p(x) is not finite in {len(bad)} of {len(log_likelihood)} rows, so its mean "
                f"is not finite. The first is row {bad[0]}, with values up to {greatest:.3g}",
                stacklevel=3,
            )
        at += len(batch[0])
