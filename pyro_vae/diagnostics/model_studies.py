"""Studies of the model: its latents, its predictions, its outlier scores."""

from collections.abc import Mapping
from functools import partial
from math import log
from typing import TYPE_CHECKING, Any

from pyro_vae.diagnostics import figures as diagnostic_figures
from pyro_vae.diagnostics.evaluation import PARTICLES, Evaluation, evaluate
from pyro_vae.diagnostics.information import KLParts, kl_parts
from pyro_vae.diagnostics.outliers import OutlierScores, outlier_scores
from pyro_vae.diagnostics.predictive import PredictiveCheck, predictive_check
from pyro_vae.diagnostics.study import GAP, GRADIENT, Bench, Finding, Rung, Study, sizes
from pyro_vae.diagnostics.uncertainty import Uncertainty, uncertainty
from pyro_vae.plots.canvas import is_picture
from pyro_vae.training import collapse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXTREME = 0.025
"""A p-value of a predictive check is extreme within this distance of 0 or 1."""

TELLS = 0.9
"""A score with at least this AUROC detects outliers."""

EPISTEMIC = 0.1
"""If weights cause at least this fraction of the predictive variance, more data would help."""


def latents_study(bench: Bench) -> Study:
    def run(rows: int) -> Evaluation:
        return evaluate(bench.pair, *bench.some(rows), num_samples=1, **bench.settings)

    def judge(found: Evaluation, _: Mapping[str, Any]) -> list[Finding]:
        findings = []
        few = bench.some(500)
        own, are_kl = collapse.units(bench.pair, few), collapse.are_kl(bench.pair, few)
        if found.point_estimates:
            points = ", ".join(f"'{name}'" for name in found.point_estimates)
            what = "log p(x) or a bound on it" if found.log_joint is not None else "uncertainty"
            words = f"{what}: the guide of {points} is a Delta, a point estimate"
            findings += [Finding("doubt", words), Finding("next", "a guide with a density")]
        for site, kl in found.kl_by_site.items():
            units = found.num_units.get(site, 1)
            if collapse.is_negative(kl, found.num_examples * PARTICLES):
                if are_kl:
                    words = f"'{site}': its KL is {kl:.2g} nats, and {collapse.DISAGREE}"
                    findings.append(Finding("doubt", words))
            elif kl < min(collapse.UNIT * own.get(site, units), collapse.SITE):
                findings += [
                    Finding("doubt", f"'{site}' has collapsed (its KL is {kl:.2g} nats)"),
                    Finding("next", "KL warm-up, free bits or a weaker decoder against collapse"),
                ]
            elif site in found.active_units:
                used = found.active_units[site]
                start = f"the model uses '{site}'" if used else f"'{site}' does not vary with x"
                words = f"{start} ({used} of {units} units active, KL {kl:.1f} nats)"
                findings.append(Finding("trust" if used else "doubt", words))
        return findings

    rungs = [
        Rung(bench.cost(12, n), partial(run, n))
        for (n,) in sizes(bench, (100,), (1000,), (10_000,))
    ]
    return Study("latents", 1, rungs, judge)


def information_study(bench: Bench) -> Study:
    def run(rows: int) -> "PartsBySite":
        return PartsBySite(kl_parts(bench.pair, *bench.some(rows), **bench.settings))

    def judge(found: "PartsBySite", _: Mapping[str, Any]) -> list[Finding]:
        findings = []
        for site, parts in found.items():
            saturated = parts.mutual_information.value > log(parts.num_examples) - 1
            apart = parts.aggregate_kl.value
            if not saturated and apart > GAP:
                words = f"samples: the codes of data are {apart:.1f} nats from the prior of "
                words += f"'{site}'"
                findings += [Finding("doubt", words), Finding("next", "a richer prior")]
        return findings

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

    def judge(found: PredictiveCheck, _: Mapping[str, Any]) -> list[Finding]:
        p = found.whole_p_values
        off = [name for name in p if not EXTREME < p[name] < 1 - EXTREME]
        if not off:
            words = f"the data agree with the model's replicates in {', '.join(p)}"
            return [Finding("trust", words)]
        words = "the model's replicates: they differ from the data in " + ", ".join(
            f"{name} (p {p[name]:.3f})" for name in off
        )
        return [Finding("doubt", words), Finding("next", "a larger decoder or another likelihood")]

    def worst(found: PredictiveCheck) -> "Figure":
        batch = bench.some(len(found.observed))
        return diagnostic_figures.predictive_worst(bench.pair, found, *batch, rows=bench.rows)

    figures: dict[str, Any] = {"predictive": diagnostic_figures.predictive_statistics}
    if is_picture(bench.batch[0]):
        figures["predictive-worst"] = worst
    wanted = sizes(bench, (100, 20), (250, 30), (500, 50), (2000, 100))
    rungs = [Rung(bench.cost(2, n * r), partial(run, n, r)) for n, r in wanted]
    return Study("predictive", 1, rungs, judge, figures)


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

    def judge(found: OutlierScores, _: Mapping[str, Any]) -> list[Finding]:
        assert found.auroc is not None
        return [
            Finding(
                "trust" if area >= TELLS else "doubt",
                f"{name} as a score of out-of-distribution data: AUROC {area:.2f}",
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


def uncertainty_study(bench: Bench) -> Study:
    def run(rows: int, weights: int) -> Uncertainty:
        return uncertainty(
            bench.pair, *bench.some(rows), num_weights=weights, progress=False, **bench.settings
        )

    def judge(found: Uncertainty, _: Mapping[str, Any]) -> list[Finding]:
        # The estimate of a variance near 0 may be negative.
        share = max(0.0, (found.epistemic.mean() / found.total.mean()).item())
        percent = f"{100 * share:.0f} %" if share >= 0.01 else "less than 1 %"
        words = f"predictions: {percent} of their variance is due to the global latents"
        if share < EPISTEMIC:
            return [Finding("trust", words)]
        return [Finding("doubt", words), Finding("next", "more data of the same kind")]

    rungs = [
        Rung(bench.cost(w, 10 * n), partial(run, n, w))
        for n, w in sizes(bench, (20, 5), (200, 30), (1000, 30))
    ]
    return Study("uncertainty", 1, rungs, judge)
