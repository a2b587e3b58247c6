"""How good a fitted pair is: the ELBO and its parts, log p(x), active units, a probe."""

import warnings
from dataclasses import asdict, dataclass, field
from math import isnan, log, nan
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.compat import scale_and_mask
from pyro_vae.data.preparation import Preparation, held_rows
from pyro_vae.data.sources import Rows, Source, parts
from pyro_vae.diagnostics.labels import Scores, flat_codes, probe_accuracy_of, told_classes
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import estimate, unnormalized
from pyro_vae.pairs import enumeration, fold_plan, folding, folds, masks, summing
from pyro_vae.pairs.arrays import as_labels
from pyro_vae.pairs.formatting import with_error
from pyro_vae.pairs.moments import is_category, mean
from pyro_vae.pairs.places import is_local
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents, observed, same_order, sample_sites, site_kl
from pyro_vae.pairs.threads import alone
from pyro_vae.parts.sequences import elements
from pyro_vae.runs import files as run_files
from pyro_vae.training.elbo import elbo
from pyro_vae.training.validation import bound

ACTIVE = 0.01
"""A unit is active where its posterior mean varies over the data by more (Burda et al., 2016).

Of a latent whose prior depends on others or on the context, what varies is taken from the mean of
that prior: else each unit of a level would pass for active that only follows the one above."""

PARTICLES = 10
"""Draws for each datum from which `evaluate` estimates the ELBO."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured on held-out data; bounds and KL in nats per example."""

    num_examples: int
    elbo: float
    reconstruction: float
    kl: float
    kl_by_site: dict[str, float]
    kl_by_unit: dict[str, list[float]]
    """Mean KL of each unit of a latent site, where the site splits into units."""
    num_units: dict[str, int]
    """Units of each latent site that is not discrete."""
    active_units: dict[str, int]
    """Units whose posterior mean, from the prior's, has a variance over 0.01 across the data, for
    each latent site."""
    log_likelihood: float
    log_likelihood_standard_error: float
    """Monte Carlo standard error of ``log_likelihood``, not that of the choice of test data."""
    num_samples: int
    bits_per_dim: float | None
    """-log_likelihood / (dimensions * log 2), where the data are discrete; what is masked is no
    dimension, nor is padding. 2 to its power is the perplexity of each token, where the data are
    tokens."""
    probe_accuracy: float | None
    """Accuracy on the held-out data of a linear classifier of the codes, where there are labels."""
    accuracy: float | None = None
    """Share of the labels that are the most probable value of a discrete latent, where the model
    observes labels given it, and so gives its values their names."""
    calibration_error: float | None = None
    """Expected calibration error of that value's probability: mean distance between probability and
    accuracy over 15 bins, weighed by their data (Guo et al., 2017)."""
    clustering_accuracy: float | None = None
    """Accuracy of a discrete latent's most probable value, with each label matched to one value as
    is best, where the values have no names."""
    mutual_information: float | None = None
    """Mutual information of that value and the label, over the mean of their entropies."""
    not_computed: dict[str, str] = field(default_factory=dict)
    """Why a score is missing that was asked for, by the score's name."""
    log_joint: float | None = None
    """Where the guide of a latent in the data plate is a Delta, a point estimate: log p(x, z) at
    the point, which is not a bound on log p(x). ``elbo`` and ``log_likelihood`` are NaN then, and
    ``kl`` is that of the other latents."""
    point_estimates: tuple[str, ...] = ()
    """Latents whose guide is a Delta. Where all are outside the data plate, bounds are those on
    log p(x | w) at the points w."""
    factors: tuple[str, ...] = ()
    """The model's ``pyro.factor`` sites. They count in ``reconstruction``, and with them p(x) is
    not normalized: ``log_likelihood`` is the logarithm of an integral, and no likelihood."""

    @property
    def nll(self) -> float:
        """The negative log-likelihood."""
        return -self.log_likelihood

    def as_dict(self) -> dict[str, Any]:
        """The fields, as metrics.json holds them: what is not a number is None, what is infinite
        "Infinity" or "-Infinity"."""
        fields = asdict(self).items()
        return run_files.json_ready(
            {k: None if isinstance(v, float) and isnan(v) else v for k, v in fields}
        )

    def _estimate(self) -> str:
        found = with_error(self.log_likelihood, self.log_likelihood_standard_error)
        if self.num_samples == 1:
            return f"{found}, 1 sample, which tells nothing of its error"
        return f"{found}, {self.num_samples} samples"

    def __str__(self) -> str:
        active = ", ".join(
            f"{count} of {self.num_units[site]}"
            + (f" ({site})" if len(self.active_units) > 1 else "")
            for site, count in self.active_units.items()
        )
        points = ", ".join(self.point_estimates)
        bounds = [
            ("ELBO", f"{self.elbo:.3f} nats per example"),
            ("log p(x) ≥", self._estimate()),
            *unnormalized(self.factors),
        ]
        if self.log_joint is not None:
            at = f"at a point estimate of {points}, not a bound"
            words = f"{self.log_joint:.3f} nats per example, {at}"
            bounds = [("log joint", words), ("log p(x)", "not estimated: the guide has no density")]
        elif points:
            bounds.append(("given", f"a point estimate of {points}"))
        lines = [
            ("examples", f"{self.num_examples}"),
            *bounds,
            ("reconstruction", f"{self.reconstruction:.3f}"),
            ("KL", f"{self.kl:.3f}"),
            ("active units", active or "none"),
        ]
        if self.bits_per_dim is not None:
            lines.append(("bits per dimension", f"{self.bits_per_dim:.4f}"))
        if self.probe_accuracy is not None:
            lines.append(("linear probe", f"{100 * self.probe_accuracy:.1f} % right"))
        if self.accuracy is not None:
            lines.append(("classes", f"{100 * self.accuracy:.1f} % right"))
            lines.append(("calibration error", f"{100 * (self.calibration_error or 0):.1f} %"))
        if self.clustering_accuracy is not None:
            lines.append(("clusters", f"{100 * self.clustering_accuracy:.1f} % right, matched"))
        if self.mutual_information is not None:
            lines.append(("mutual information", f"{self.mutual_information:.3f}, normalised"))
        for name, why in self.not_computed.items():
            lines.append((_TITLES[name], f"not computed: {why}"))
        return "\n".join(f"{name:<20}{value}" for name, value in lines)


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
        x, context: held-out data, as `pyro_vae.fit` takes them; grey intensities under a Bernoulli
            are drawn once, with a fixed seed.
        labels: classes of x, whole numbers from 0, for the linear probe, and to hold the values of
            a discrete latent against; -1 where a label is missing: such rows count in no score of
            labels.
        train, train_labels: training data, as x or a tuple of x and context, and their labels: the
            probe is fitted on these alone.
        num_samples: importance samples for log p(x), for each datum.
        engine: how log p(x) is computed, as in `pyro_vae.log_likelihood`.
        seed: of all draws. Parameters, generators and the parameter store stay as they were.

    A score that these labels do not allow is None, and ``not_computed`` says why. A warning names
    the rows of x whose log p(x) is not finite.

    >>> import torch, pyro_vae as pv
    >>> result = pv.evaluate(pv.VAE.mlp((4,), latent_dim=2), torch.ones(8, 4), num_samples=10)
    >>> result.num_examples, result.elbo <= result.log_likelihood + 1
    (8, True)
    """
    if num_samples < 1:
        raise UsageError(f"must be at least 1, got {num_samples}", argument="num_samples")
    rows, prepare = held_rows(pair, x, context, binarize)
    given = None if train is None else parts(train)
    known = None if given is None else held_rows(pair, given[0], given[1:], binarize)
    if labels is not None:
        labels = _labels_of(rows, labels, "x")
    if train_labels is not None and known is not None:
        train_labels = _labels_of(known[0], train_labels, "train")
    objective = elbo(pair, prepare(rows.first(2)), PARTICLES)
    measured = bound(pair, rows, prepare, objective, batch_size, seed)
    few = prepare(rows.first(2))
    points, factors = fold_plan.plan(pair, few), folding.factors_of(pair, few)
    likelihood = None
    if not points.local_points:
        likelihood = estimate(pair, rows, prepare, num_samples, seed, engine, progress)
        _warn_of_rows(rows, prepare, likelihood.per_datum, batch_size)
    units, codes, moves, dims = _units(pair, rows, prepare, batch_size, seed)
    scores = Scores()
    if labels is not None and known is not None and train_labels is not None and codes:
        train_codes = _units(pair, *known, batch_size, seed)[1]
        scores.take(
            ("probe_accuracy",),
            lambda: probe_accuracy_of(
                flat_codes(train_codes), train_labels, flat_codes(codes), labels
            ),
        )
    if labels is not None:
        told_classes(scores, pair, rows, prepare, labels, batch_size, seed)
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
        kl_by_unit={name: kl.tolist() for name, kl in units.items()},
        num_units={name: code.shape[1] for name, code in codes.items()},
        active_units={name: int((_variance(move) > ACTIVE).sum()) for name, move in moves.items()},
        log_likelihood=nan if likelihood is None else likelihood.value,
        log_likelihood_standard_error=nan if likelihood is None else likelihood.standard_error,
        num_samples=num_samples,
        bits_per_dim=bits,
        log_joint=measured.elbo if likelihood is None else None,
        point_estimates=points.points,
        factors=factors,
        not_computed=scores.missing,
        **scores.found,
    )


def _labels_of(rows: Source, labels: Any, name: str) -> Tensor:
    labels = as_labels(labels)
    if len(labels) != len(rows):
        raise UsageError(f"{len(labels)} labels came for {len(rows)} rows of {name}")
    return labels


def _warn_of_rows(
    rows: Source, prepare: Preparation, log_likelihood: Tensor, batch_size: int
) -> None:
    """Name the first row whose log p(x) is not finite, and the size of what it holds."""
    bad = (~torch.isfinite(log_likelihood)).nonzero().flatten().tolist()
    if not bad:
        return
    at = 0
    for batch in rows.batches(batch_size):
        if at <= bad[0] < at + len(batch[0]):
            greatest = float(prepare(batch)[0][bad[0] - at].abs().max())
            warnings.warn(
                f"log p(x) is not finite in {len(bad)} of {len(log_likelihood)} rows, the first "
                f"row {bad[0]}, which holds values of up to {greatest:.3g}: what is averaged over "
                "all rows is not finite either",
                stacklevel=3,
            )
        at += len(batch[0])


def _units(
    pair: nn.Module, rows: Source, prepare: Preparation, batch_size: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], float]:
    """KL by unit, codes by site, the same from the prior's means, and how many numbers the data
    hold that are discrete and not masked."""
    kl: dict[str, Tensor] = {}
    codes: dict[str, list[Tensor]] = {}
    moves: dict[str, list[Tensor]] = {}
    count, dims = 0, 0.0
    nesting = enumeration.nesting(pair, prepare(rows.first(2)))
    with using(pair, seed):
        for batch in rows.batches(batch_size):
            prepared = prepare(batch)
            model, guide = enumeration.traces(pair, prepared, nesting)
            terms = summing.terms(model, guide)
            n, closed = len(prepared[0]), same_order(model, guide)
            for name, site in latents(guide).items():
                if is_category(site["fn"]) or not is_local(site):
                    continue
                each = _kl_of_units(terms, sample_sites(model).get(name), site, closed)
                if each is not None:
                    kl[name] = kl.get(name, 0) + each.reshape(n, -1).sum(0).cpu()
                right, loc = len(site["fn"].event_shape), mean(site["fn"])
                centre = _closed_mean(sample_sites(model).get(name))
                live = masks.scored(site)
                code, move = torch.where(live, loc, 0.0), torch.where(live, loc - centre, torch.nan)
                for found, value in ((codes, code), (moves, move)):
                    value = terms.units(value, right)
                    found.setdefault(name, []).append(value.reshape(n, -1).cpu())
            data = list(observed(model).values())
            discrete = all(site["fn"].support.is_discrete for site in data)
            for seen in data if discrete else []:
                each = elements(seen["fn"], seen["value"])
                dims += scale_and_mask(each, mask=seen["mask"]).sum().item()
            count += n
    return (
        {name: total / count for name, total in kl.items()},
        {name: torch.cat(parts) for name, parts in codes.items()},
        {name: torch.cat(parts) for name, parts in moves.items()},
        dims,
    )


def _variance(move: Tensor) -> Tensor:
    """The variance of each unit over the data for which it counts; NaN where it never does."""
    return (move - move.nanmean(0)).square().nanmean(0)


def _closed_mean(prior: Any) -> Tensor | float:
    """The mean of a prior that is in closed form, else 0."""
    try:
        loc = 0.0 if prior is None else prior["fn"].mean
    except NotImplementedError:
        return 0.0
    return 0.0 if isinstance(loc, Tensor) and bool(loc.isnan().any()) else loc


def _kl_of_units(terms: summing.Terms, prior: Any, site: Any, closed: bool) -> Tensor | None:
    """The KL (batch, *units) of a latent site, None where it does not split into units."""
    if prior is None or folds.is_delta(site["fn"]) or folds.shares(site):
        return None
    shape = site["fn"].event_shape
    # Where weights depend on the draw, so must what they weigh.
    each = site_kl(prior, site, closed and not terms.dims)
    if each.shape[max(1, each.dim() - len(shape)) :] != shape:
        return None
    each = terms.units(each, len(shape))
    return each if each.dim() == 1 + len(shape) else None
