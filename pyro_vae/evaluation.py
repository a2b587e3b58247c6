"""How good a fitted pair is: the ELBO and its parts, log p(x), active units, a probe."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan, log, nan
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_vae import enumeration, folding
from pyro_vae.data import Preparation, Rows, Source, held_rows
from pyro_vae.errors import UsageError
from pyro_vae.importance import estimate, unnormalized, with_error
from pyro_vae.inference import DRAWS
from pyro_vae.objectives import KLWeight, Parts, elbo, recorded
from pyro_vae.pairs import (
    Pair,
    data_site,
    is_category,
    is_local,
    latents,
    mean,
    same_order,
    sample_sites,
    site_kl,
    using,
)
from pyro_vae.sequences import elements

ACTIVE = 0.01
"""A unit is active where its posterior mean varies over the data by more (Burda et al., 2016).

Of a latent whose prior depends on others or on the context, what varies is taken from the mean of
that prior: else each unit of a level would pass for active that only follows the one above."""

PARTICLES = 10
"""Draws for each datum from which `evaluate` estimates the ELBO."""


class Bound(NamedTuple):
    """An objective's bound and the ELBO with its parts, in nats per example."""

    bound: float
    """The objective with the KL at full weight: the ELBO itself for ``Trace_ELBO``."""
    elbo: float
    reconstruction: float
    kl: dict[str, float]
    """KL of each latent site."""


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
    """-log_likelihood / (dimensions * log 2), where the data are discrete; padding is no
    dimension. 2 to its power is the perplexity of each token, where the data are tokens."""
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
        """The fields, as metrics.json holds them: what is not a number is None."""
        return {
            k: None if isinstance(v, float) and isnan(v) else v for k, v in asdict(self).items()
        }

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
            lines.append(("mutual information", f"{self.mutual_information:.3f}, normalised"))
        return "\n".join(f"{name:<20}{value}" for name, value in lines)


def evaluate(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    labels: Tensor | None = None,
    train: Sequence[Any] | None = None,
    train_labels: Tensor | None = None,
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
        labels: integer classes of x, for the linear probe, and to hold the values of a discrete
            latent against.
        train, train_labels: training data, as a tuple of x and context, and their labels: the
            probe is fitted on these alone.
        num_samples: importance samples for log p(x), for each datum.
        engine: how log p(x) is computed, as in `pyro_vae.log_likelihood`.
        seed: of all draws. Parameters, generators and the parameter store stay as they were.

    >>> import torch, pyro_vae as pv
    >>> result = pv.evaluate(pv.VAE.mlp((4,), latent_dim=2), torch.ones(8, 4), num_samples=10)
    >>> result.num_examples, result.elbo <= result.log_likelihood + 1
    (8, True)
    """
    if num_samples < 1:
        raise UsageError(f"num_samples must be 1 or more, {num_samples} came")
    rows, prepare = held_rows(pair, x, context, binarize)
    known = held_rows(pair, train[0], train[1:], binarize) if train is not None else None
    for name, given, source_of in (
        ("x", labels, rows),
        ("train", train_labels, known and known[0]),
    ):
        if given is not None and source_of is not None and len(given) != len(source_of):
            raise UsageError(f"{len(given)} labels came for {len(source_of)} rows of {name}")
    objective = elbo(pair, prepare(rows.first(2)), PARTICLES)
    parts = bound(pair, rows, prepare, objective, batch_size, seed)
    points = folding.plan(pair, prepare(rows.first(2)))
    factors = folding.factors_of(pair, prepare(rows.first(2)))
    likelihood = None
    if not points.local_points:
        likelihood = estimate(pair, rows, prepare, num_samples, seed, engine, progress)
    units, codes, moves, discrete, dims = _units(pair, rows, prepare, batch_size, seed)
    accuracy = None
    if labels is not None and known is not None and train_labels is not None:
        train_codes = _units(pair, *known, batch_size, seed)[1]
        if codes:
            accuracy = _probe(_flat(train_codes), train_labels, _flat(codes), labels)
    classes = {} if labels is None else _classes(pair, rows, prepare, labels, batch_size, seed)
    hidden = [folding.point_name(name) for name in points.points]
    by_site = {name: kl for name, kl in parts.kl.items() if name not in hidden}
    bits = None
    if likelihood is not None and discrete and not factors:
        bits = -likelihood.per_datum.sum().item() / (dims * log(2))
    return Evaluation(
        num_examples=len(rows),
        elbo=nan if likelihood is None else parts.elbo,
        reconstruction=parts.reconstruction,
        kl=sum(by_site.values()),
        kl_by_site=by_site,
        kl_by_unit={name: kl.tolist() for name, kl in units.items()},
        num_units={name: code.shape[1] for name, code in codes.items()},
        active_units={
            name: int((move.var(0, correction=0) > ACTIVE).sum()) for name, move in moves.items()
        },
        log_likelihood=nan if likelihood is None else likelihood.value,
        log_likelihood_standard_error=nan if likelihood is None else likelihood.standard_error,
        num_samples=num_samples,
        bits_per_dim=bits,
        probe_accuracy=accuracy,
        log_joint=parts.elbo if likelihood is None else None,
        point_estimates=points.points,
        factors=factors,
        **classes,
    )


def bound(
    pair: nn.Module,
    rows: Source,
    prepare: Preparation,
    objective: ELBO,
    batch_size: int = 500,
    seed: int = 0,
) -> Bound:
    """An objective with the KL at full weight, and the ELBO, over prepared rows; no learning.

    Without the KL of latents outside the data plate: their posterior is given, as for any new datum
    :math:`E_{q(w)}[\\mathrm{ELBO}(x|w)] \\le \\log E_{q(w)}[p(x|w)]`.
    """
    total, count, parts = 0.0, 0, Parts(global_share=0.0, pair=pair)
    measured, given = recorded(objective, parts), KLWeight(global_weight=0.0)
    model, guide = given(cast(Pair, pair).model), given(cast(Pair, pair).guide)
    with using(pair, seed):
        for batch in rows.batches(batch_size):
            prepared = prepare(batch)
            total += cast(Any, measured).loss(model, guide, *prepared)
            count += len(prepared[0])
    reconstruction, kl = parts.per_example(count)
    return Bound(-total / count, reconstruction - sum(kl.values()), reconstruction, kl)


def _units(
    pair: nn.Module, rows: Source, prepare: Preparation, batch_size: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], bool, float]:
    """KL by unit, codes by site, the same from the prior's means, whether the data are discrete,
    and how many numbers they hold."""
    kl: dict[str, Tensor] = {}
    codes: dict[str, list[Tensor]] = {}
    moves: dict[str, list[Tensor]] = {}
    count, discrete, dims = 0, False, 0.0
    nesting = enumeration.nesting(pair, prepare(rows.first(2)))
    with using(pair, seed):
        for batch in rows.batches(batch_size):
            prepared = prepare(batch)
            model, guide = enumeration.traces(pair, prepared, nesting)
            terms = enumeration.terms(model, guide)
            n, closed = len(prepared[0]), same_order(model, guide)
            for name, site in latents(guide).items():
                if is_category(site["fn"]) or not is_local(site):
                    continue
                each = _kl_of_units(terms, sample_sites(model).get(name), site, closed)
                if each is not None:
                    kl[name] = kl.get(name, 0) + each.reshape(n, -1).sum(0).cpu()
                right, loc = len(site["fn"].event_shape), mean(site["fn"])
                centre = _closed_mean(sample_sites(model).get(name))
                for found, value in ((codes, loc), (moves, loc - centre)):
                    value = terms.units(value, right)
                    found.setdefault(name, []).append(value.reshape(n, -1).cpu())
            data = data_site(model)
            discrete = data["fn"].support.is_discrete
            dims += elements(data["fn"], data["value"]).sum().item()
            count += n
    return (
        {name: total / count for name, total in kl.items()},
        {name: torch.cat(parts) for name, parts in codes.items()},
        {name: torch.cat(parts) for name, parts in moves.items()},
        discrete,
        dims,
    )


def _closed_mean(prior: Any) -> Tensor | float:
    """The mean of a prior that is in closed form, else 0."""
    try:
        loc = 0.0 if prior is None else prior["fn"].mean
    except NotImplementedError:
        return 0.0
    return 0.0 if isinstance(loc, Tensor) and bool(loc.isnan().any()) else loc


def _kl_of_units(terms: enumeration.Terms, prior: Any, site: Any, closed: bool) -> Tensor | None:
    """The KL (batch, *units) of a latent site, None where it does not split into units."""
    if prior is None or folding.is_delta(site["fn"]) or folding.shares(site):
        return None
    shape = site["fn"].event_shape
    # Where weights depend on the draw, so must what they weigh.
    each = site_kl(prior, site, closed and not terms.dims)
    if each.shape[max(1, each.dim() - len(shape)) :] != shape:
        return None
    each = terms.units(each, len(shape))
    return each if each.dim() == 1 + len(shape) else None


def _classes(
    pair: nn.Module, rows: Source, prepare: Preparation, labels: Tensor, batch_size: int, seed: int
) -> dict[str, float]:
    """How well the most probable values of the pair's first discrete latent tell the labels."""
    first = prepare(rows.first(2))
    names = enumeration.discrete(pair, first)
    if not names:
        return {}
    with using(pair, seed):
        named = enumeration.is_named(pair, first, names[0])
    with using(pair, seed):  # the draws are those of `predict`
        parts = [
            enumeration.probabilities(pair, prepare(batch), names[0], DRAWS)
            for batch in rows.batches(batch_size)
        ]
    sure, found = torch.cat(parts).cpu().max(1)
    true = torch.as_tensor(labels).cpu()
    if named:
        right = (found == true).double()
        return {
            "accuracy": right.mean().item(),
            "calibration_error": calibration_error(sure, right),
        }
    return {
        "clustering_accuracy": clustering_accuracy(found, true),
        "mutual_information": _mutual_information(found, true),
    }


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    r"""The expected calibration error, how far probabilities are from accuracies.

    :math:`\sum_b \tfrac{n_b}{n} |\mathrm{accuracy}_b - \mathrm{confidence}_b|`

    Arguments:
        confidence: the probability (n,) of each answer.
        right: whether it was right, 0 or 1, of the same shape.
        bins: of equal width.

    Naeini et al., 2015; Guo et al., 2017 (https://arxiv.org/abs/1706.04599).

    >>> calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([1.0, 0.0]))
    0.25
    """
    which = (confidence.double() * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, which, right.double() - confidence.double())
    return gaps.abs().sum().item() / len(right)


def clustering_accuracy(clusters: Tensor, labels: Tensor) -> float:
    """The accuracy of clusters (n,) as labels (n,), under the best matching of one to one.

    >>> clustering_accuracy(torch.tensor([1, 1, 0, 2]), torch.tensor([0, 0, 1, 1]))
    0.75
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(labels.numpy(), clusters.numpy())
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / len(labels))


def _mutual_information(clusters: Tensor, labels: Tensor) -> float:
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(labels.numpy(), clusters.numpy()))


def _flat(codes: dict[str, Tensor]) -> Tensor:
    return torch.cat([code.float() for code in codes.values()], 1)


def _probe(codes: Tensor, labels: Tensor, test_codes: Tensor, test_labels: Tensor) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(codes.numpy(), np.asarray(labels))
    return float(probe.score(test_codes.numpy(), np.asarray(test_labels)))
