"""Studies of the model: its latents, its predictions, its outlier scores."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pyro_vae.diagnostics import figures as diagnostic_figures
from pyro_vae.diagnostics.copies import without_copies
from pyro_vae.diagnostics.evaluation import PARTICLES, Evaluation, evaluate
from pyro_vae.diagnostics.information import KLParts, kl_parts
from pyro_vae.diagnostics.model_check import ModelCheck, model_check
from pyro_vae.diagnostics.outliers import OutlierScores, outlier_scores
from pyro_vae.diagnostics.predictive import PredictiveCheck, predictive_check
from pyro_vae.diagnostics.signs import DEVIATIONS, Sign
from pyro_vae.diagnostics.study import GAP, GRADIENT, Bench, Finding, Rung, Study, sizes
from pyro_vae.diagnostics.uncertainty import Uncertainty, uncertainty
from pyro_vae.errors import UsageError
from pyro_vae.inference.importance import log_likelihood
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.plots.canvas import is_picture
from pyro_vae.training import collapse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TELLS = 0.9
"""A score with at least this AUROC detects outliers."""

SIGMAS = 3
"""The KL of the codes and the prior must exceed its limit by this many standard errors."""


def latents_study(bench: Bench) -> Study:
    def run(rows: int) -> Evaluation:
        return evaluate(bench.pair, *bench.some(rows), num_samples=1, **bench.settings)

    def judge(found: Evaluation) -> list[Finding | Sign]:
        findings: list[Finding | Sign] = []
        few = bench.some(500)
        own, are_kl = collapse.units(bench.pair, few), collapse.are_kl(bench.pair, few)
        if found.point_estimates:
            points = ", ".join(f"'{name}'" for name in found.point_estimates)
            what = "log p(x) or a bound on it" if found.log_joint is not None else "uncertainty"
            words = f"{what}: the guide of {points} is a Delta, a point estimate"
            findings.append(Finding("doubt", words, "points"))
            findings.append(Finding("next", "a guide with a density", "points"))
        for site, kl in found.kl_by_site.items():
            units = found.num_units.get(site, 1)
            if collapse.is_negative(kl, found.num_examples * PARTICLES):
                if are_kl:
                    words = f"'{site}': its KL is {kl:.2g} nats, and {collapse.DISAGREE}"
                    findings.append(Finding("doubt", words, f"use of '{site}'"))
            elif kl < min(collapse.UNIT * own.get(site, units), collapse.SITE):
                words = f"'{site}' has collapsed (its KL is {kl:.2g} nats)"
                findings.append(Sign("decoder", "latents", words))
            elif site in found.active_units:
                used = found.active_units[site]
                start = f"the model uses '{site}'" if used else f"'{site}' does not vary with x"
                words = f"{start} ({used} of {units} units active, KL {kl:.1f} nats)"
                kind = "trust" if used else "doubt"
                findings.append(Finding(kind, words, f"use of '{site}'"))
        return findings

    rungs = [
        Rung(bench.cost(12, n), partial(run, n))
        for (n,) in sizes(bench, (100,), (1000,), (10_000,))
    ]
    return Study("latents", 1, rungs, judge)


def information_study(bench: Bench) -> Study:
    def run(rows: int) -> "PartsBySite":
        return PartsBySite(kl_parts(bench.pair, *bench.some(rows), **bench.settings))

    def judge(found: "PartsBySite") -> list[Finding | Sign]:
        signs: list[Finding | Sign] = []
        for site, parts in found.items():
            apart = parts.aggregate_kl.value - SIGMAS * parts.aggregate_kl.standard_error
            if apart > GAP:
                words = f"codes of data are at least {apart:.1f} nats from the prior of '{site}'"
                signs.append(Sign("prior", "information", words, apart))
        return signs

    rungs = [
        Rung(bench.cost(2, n + n * n / 100), partial(run, n))
        for (n,) in sizes(bench, (100,), (500,), (2000,))
    ]
    return Study("information", 1, rungs, judge)


class PartsBySite(dict[str, KLParts]):
    """The results of `kl_parts`, by site."""

    def as_dict(self) -> dict[str, Any]:
        """Return the results by site for metrics.json."""
        return {site: parts.as_dict() for site, parts in self.items()}

    _repr_html_ = shown_html

    def __str__(self) -> str:
        return "\n".join(f"{site}:\n{parts}" for site, parts in self.items())


def predictive_study(bench: Bench) -> Study:
    def run(rows: int, replicates: int) -> PredictiveCheck:
        return predictive_check(
            bench.pair,
            *bench.some(rows),
            num_replicates=replicates,
            progress=False,
            **bench.settings,
        )

    def judge(found: PredictiveCheck) -> list[Finding | Sign]:
        off, left = found.whole_deviations, len(found.unreliable)
        if left > len(found.observed) / 2:
            words = f"predictions: the latents of {left} of {len(found.observed)} data cannot be "
            return [Finding("unchecked", words + "resampled from the posterior", "predictions")]
        far = {name: by for name, by in off.items() if abs(by) > DEVIATIONS}
        if far and (copies := _copies(bench, len(found.observed))):
            words = f"predictions: {copies} of {len(found.observed)} data are copies of others"
            return [Finding("unchecked", words, "predictions")]
        if not far:
            words = f"the data agree with the model's replicates in {', '.join(off)}"
            return [Finding("trust", words, "predictions")]
        words = "the model's replicates differ from the data in "
        words += ", ".join(f"{name} (by {by:.1f} sd)" for name, by in far.items())
        return [Sign("decoder", "predictive", words)]

    def worst(found: PredictiveCheck) -> "Figure":
        batch = bench.some(len(found.observed))
        return diagnostic_figures.predictive_worst(bench.pair, found, *batch, rows=bench.rows)

    figures: dict[str, Any] = {"predictive": diagnostic_figures.predictive_statistics}
    if is_picture(bench.batch[0]):
        figures["predictive-worst"] = worst
    wanted = sizes(bench, (100, 20), (250, 30), (500, 50), (2000, 100))
    rungs = [Rung(bench.cost(2, n * r), partial(run, n, r)) for n, r in wanted]
    return Study("predictive", 1, rungs, judge, figures)


def _copies(bench: Bench, rows: int) -> int:
    """Return how many of the first rows are copies of others, which replicates would not be."""
    batch = bench.some(rows)
    try:
        with using(bench.pair, bench.seed):
            return rows - len(without_copies(bench.pair, batch)[0])
    except UsageError:  # the model draws no data
        return 0


def outliers_study(bench: Bench) -> Study | None:
    if bench.other is None:
        return None
    other = bench.other

    def run(rows: int, steps: int, samples: int) -> OutlierScores:
        return outlier_scores(
            bench.pair,
            *bench.some(rows),
            other=tuple(part[:rows] for part in other),
            steps=steps,
            num_samples=samples,
            engine=bench.engine,
            progress=False,
            **bench.settings,
        )

    def judge(found: OutlierScores) -> list[Finding | Sign]:
        assert found.auroc is not None
        return [
            Finding(
                "trust" if area >= TELLS else "doubt",
                f"{name} as a score of out-of-distribution data: AUROC {area:.2f}",
                f"score {name}",
            )
            for name, area in found.auroc.items()
        ]

    rungs = [
        Rung(
            2 * (bench.cost(steps, GRADIENT * 8 * n) + bench.cost(4, n * k)),
            partial(run, n, steps, k),
        )
        for n, steps, k in sizes(bench, (50, 50, 100), (200, 150, 200), (1000, 300, 500))
    ]
    return Study("outliers", 3, rungs, judge, {"outliers": diagnostic_figures.outlier_histograms})


def uncertainty_study(bench: Bench) -> Study | None:
    if not bench.shared:
        return None

    def run(rows: int, weights: int) -> Uncertainty:
        return uncertainty(
            bench.pair, *bench.some(rows), num_weights=weights, progress=False, **bench.settings
        )

    def judge(found: Uncertainty) -> list[Finding | Sign]:
        # The estimate of a variance near 0 may be negative.
        share = max(0.0, (found.epistemic.mean() / found.total.mean()).item())
        percent = f"{100 * share:.0f} %" if share >= 0.01 else "less than 1 %"
        words = (
            f"{percent} of the variance of predictions is due to the global latents, which more "
        )
        words += "data would reduce"
        return [Finding("trust", words, "uncertainty")]

    rungs = [
        Rung(bench.cost(w, 10 * n), partial(run, n, w))
        for n, w in sizes(bench, (20, 5), (200, 30), (1000, 30))
    ]
    return Study("uncertainty", 1, rungs, judge)


def model_check_study(bench: Bench) -> Study:
    def run(rows: int, samples: int) -> ModelCheck:
        return model_check(
            bench.pair, *bench.some(rows), num_samples=samples, progress=False, **bench.settings
        )

    rungs = [
        Rung(bench.draws(4, 2 * n, k), partial(run, n, k))
        for n, k in sizes(bench, (200, 50), (400, 50), (500, 100), (1000, 200), (2000, 300))
    ]
    return Study("model_check", 2, rungs)


class TrainGap(NamedTuple):
    """The ELBO of training data minus that of held-out data."""

    value: float
    """The difference, in nats per example."""
    standard_error: float
    """Its standard error over rows."""
    num_examples: int
    """Rows of each kind."""

    def as_dict(self) -> dict[str, Any]:
        """Return the difference for metrics.json."""
        return self._asdict()

    def _repr_html_(self) -> str:
        return shown_html(self)

    def __str__(self) -> str:
        return (
            f"ELBO of training data minus that of held-out data: {self.value:.3f} ± "
            f"{self.standard_error:.3f} nats per example ({self.num_examples} rows of each)"
        )


def train_gap_study(bench: Bench) -> Study | None:
    if bench.train is None or bench.shared:
        return None
    train = bench.train

    def run(rows: int) -> TrainGap:
        sides: Sequence[Any] = [tuple(part[:rows] for part in train), bench.some(rows)]
        bounds = [
            log_likelihood(bench.pair, *side, num_samples=5, **bench.settings).elbo_per_datum
            for side in sides
        ]
        error = sum(float(bound.var() / len(bound)) for bound in bounds) ** 0.5
        value = (bounds[0].mean() - bounds[1].mean()).item()
        return TrainGap(value, error, min(map(len, bounds)))

    rungs = [Rung(bench.cost(4, 5 * n), partial(run, n)) for (n,) in sizes(bench, (200,), (2000,))]
    return Study("train_gap", 1, rungs)
