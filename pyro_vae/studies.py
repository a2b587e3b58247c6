"""What `diagnose` runs: diagnostics at sizes that grow, and what is to be said of results."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import log
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from pyro_vae import collapse, diagnostic_plots
from pyro_vae.annealing import Annealing, Sandwich, anneal, sandwich
from pyro_vae.bayesian import Uncertainty, uncertainty
from pyro_vae.evaluation import PARTICLES, Evaluation, evaluate
from pyro_vae.guide_calibration import Calibration, calibration
from pyro_vae.importance import LogLikelihood, log_likelihood
from pyro_vae.inference_gaps import Gaps, gaps
from pyro_vae.latent import KLParts, kl_parts
from pyro_vae.mcmc import Posterior, nuts
from pyro_vae.pairs import Batch
from pyro_vae.plots import is_picture
from pyro_vae.predictive import OutlierScores, PredictiveCheck, outlier_scores, predictive_check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRADIENT = 3
"""How many rows of a pass one with its gradient takes as long as; a graph spares its overhead."""

LEAPFROG = 60
"""Gradients that a transition of NUTS takes, about."""

UNRELIABLE = 0.05
"""The share of data with a Pareto k over 0.7 from which on their mean is not to be believed."""

GAP = 1.0
"""Nats per example from which on a gap is worth an effort."""

CONSTANT = 0.01
"""Nats of a datum's gap under which its weights are as good as constant."""

EXTREME = 0.025
"""p-values of predictive checks within so much of 0 or 1 are told."""

TELLS = 0.9
"""AUROC from which on a score tells outliers."""

COVERAGE = 0.02
"""How far the coverage of 95 % intervals may be off: no approximate guide is exact."""

EPISTEMIC = 0.1
"""The share of the weights in the variance of a prediction from which on more data would help."""

AGREE = 0.1
"""Nats per example from which on two estimates of log p(x) differ."""

TOGETHER = 0.3
"""Nats per example that these may be apart, with two standard errors, and still be one."""

MORE = "annealing at more temperatures, or with more time"
RICHER = "a richer posterior family (pyro_vae.refit_guide shows what it gives)"


class Finding(NamedTuple):
    """A part of a sentence of the summary."""

    kind: str
    """What can be trusted ("trust"), what cannot ("doubt"), or what to try ("next")."""
    words: str


class Rung(NamedTuple):
    """One size of a study."""

    cost: float
    """Seconds that its passes through the pair would take one by one, about."""
    run: Callable[[], Any]


class Study(NamedTuple):
    """A diagnostic, at sizes that grow."""

    name: str
    weight: float
    """Its part of the time, in proportion to those of the studies after it."""
    rungs: Sequence[Rung]
    judge: Callable[[Any, Mapping[str, Any]], list[Finding]]
    """What is to be said of its result, and of those before it."""
    figures: Mapping[str, Callable[[Any], "Figure"]] = MappingProxyType({})
    """Figures of its result, by name."""


class Bench(NamedTuple):
    """What is diagnosed."""

    pair: nn.Module
    batch: Batch
    """Prepared rows, in an order without meaning: the first are as good as any."""
    rows: Tensor
    """The number of each among the rows that came."""
    seed: int
    engine: str
    overhead: float
    """Seconds of a pass of model and guide on one row."""
    rate: float
    """Seconds for each further row."""
    other: Batch | None = None
    """Prepared rows of which it is known that they do not belong."""

    def cost(self, passes: float, rows: float) -> float:
        """Seconds of so many passes of so many rows, or draws for rows."""
        return passes * (self.overhead + self.rate * rows)

    def some(self, number: int) -> Batch:
        """So many rows."""
        return tuple(tensor[:number] for tensor in self.batch)

    @property
    def settings(self) -> dict[str, Any]:
        """What every diagnostic is told: data are binarised already, and nobody looks."""
        return {"binarize": "none", "seed": self.seed}


def sizes(bench: Bench, *wanted: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Sizes whose first number, of rows, is no more than there are; none comes twice."""
    n = len(bench.batch[0])
    return list(dict.fromkeys((min(n, rows), *rest) for rows, *rest in wanted))


def _latents(bench: Bench) -> Study:
    def run(rows: int) -> Evaluation:
        return evaluate(bench.pair, *bench.some(rows), num_samples=1, **bench.settings)

    def judge(found: Evaluation, _: Mapping[str, Any]) -> list[Finding]:
        findings = []
        few = bench.some(500)
        own, are_kl = collapse.units(bench.pair, few), collapse.are_kl(bench.pair, few)
        if found.point_estimates:
            points = ", ".join(f"'{name}'" for name in found.point_estimates)
            what = "log p(x) or a bound on it" if found.log_joint is not None else "its uncertainty"
            words = f"{what}: the guide of {points} is a Delta, a point estimate"
            findings += [Finding("doubt", words), Finding("next", "a guide with a spread")]
        for site, kl in found.kl_by_site.items():
            units = found.num_units.get(site, 1)
            if collapse.is_negative(kl, found.num_examples * PARTICLES):
                if are_kl:
                    words = f"'{site}' has a KL of {kl:.2g} nats, and {collapse.DISAGREE}"
                    findings.append(Finding("doubt", words))
            elif kl < min(collapse.UNIT * own.get(site, units), collapse.SITE):
                findings += [
                    Finding("doubt", f"'{site}' has collapsed: its KL is {kl:.2g} nats"),
                    Finding("next", "KL warm-up, free bits or a weaker decoder against collapse"),
                ]
            elif site in found.active_units:
                used = found.active_units[site]
                start = f"'{site}' is used" if used else f"'{site}' tells nothing of the data"
                words = f"{start}: {used} of {units} units active, KL {kl:.1f} nats"
                findings.append(Finding("trust" if used else "doubt", words))
        return findings

    rungs = [
        Rung(bench.cost(12, n), partial(run, n))
        for (n,) in sizes(bench, (100,), (1000,), (10_000,))
    ]
    return Study("latents", 1, rungs, judge)


def _information(bench: Bench) -> Study:
    def run(rows: int) -> "Parts":
        return Parts(kl_parts(bench.pair, *bench.some(rows), **bench.settings))

    def judge(found: "Parts", _: Mapping[str, Any]) -> list[Finding]:
        findings = []
        for site, parts in found.items():
            saturated = parts.mutual_information.value > log(parts.num_examples) - 1
            apart = parts.aggregate_kl.value
            if not saturated and apart > GAP:
                words = f"samples: codes of data are {apart:.1f} nats from the prior of '{site}'"
                findings += [Finding("doubt", words), Finding("next", "a richer prior")]
        return findings

    rungs = [
        Rung(bench.cost(2, n + n * n / 100), partial(run, n))
        for (n,) in sizes(bench, (100,), (500,), (2000,))
    ]
    return Study("information", 1, rungs, judge)


class Parts(dict[str, KLParts]):
    """What `kl_parts` found, by site."""

    def as_dict(self) -> dict[str, Any]:
        """By site, as metrics.json holds it."""
        return {site: parts.as_dict() for site, parts in self.items()}

    def __str__(self) -> str:
        return "\n".join(f"{site}:\n{parts}" for site, parts in self.items())


def _reliability(bench: Bench) -> Study:
    def run(rows: int, samples: int) -> LogLikelihood:
        return log_likelihood(
            bench.pair,
            *bench.some(rows),
            num_samples=samples,
            engine=bench.engine,
            **bench.settings,
        )

    def judge(found: LogLikelihood, _: Mapping[str, Any]) -> list[Finding]:
        findings = []
        infinite = int((found.infinite_weights > 0).sum())
        if infinite:
            words = f"{infinite} data have infinite weights: the guide draws what it cannot score"
            findings.append(Finding("doubt", words))
        share = (found.pareto_k > 0.7).double().mean().item()
        over = f"Pareto k is over 0.7 for {100 * share:.0f} % of the data"
        if infinite:
            return findings
        if share <= UNRELIABLE:
            value = f"{found.value:.3f} ± {found.standard_error:.3f} nats per example"
            findings.append(Finding("trust", f"log p(x) = {value} by importance weights ({over})"))
        else:
            words = (
                f"log p(x) by importance weights, which is too low by an unknown amount ({over})"
            )
            findings += [
                Finding("doubt", words),
                Finding("next", "pyro_vae.anneal for log p(x)"),
            ]
        return findings

    wanted = (
        (50, 100),
        (100, 250),
        (250, 250),
        (500, 500),
        (2000, 500),
        (2000, 2000),
        (10_000, 5000),
    )
    return Study(
        "log_likelihood",
        2,
        [Rung(bench.cost(2, n * k), partial(run, n, k)) for n, k in sizes(bench, *wanted)],
        judge,
        {
            "reliability": lambda found: diagnostic_plots.reliability(
                found, bench.some(len(found.per_datum))[0], rows=bench.rows
            )
        },
    )


def _gaps(bench: Bench) -> Study:
    def run(rows: int, steps: int, samples: int) -> Gaps:
        return gaps(
            bench.pair,
            *bench.some(rows),
            steps=steps,
            num_samples=samples,
            engine=bench.engine,
            progress=False,
            **bench.settings,
        )

    def judge(found: Gaps, _: Mapping[str, Any]) -> list[Finding]:
        whole, encoder, family = (
            getattr(found, name).value for name in ("inference", "amortisation", "approximation")
        )
        # Where weights hardly vary, the shape of their tail is that of noise, and no matter.
        matters = found.inference.per_datum.abs() > CONSTANT
        unsure = ((found.pareto_k > 0.7) & matters).double().mean().item() > UNRELIABLE
        if whole < GAP and not unsure:
            words = f"the ELBO is within {whole:.2f} nats per example of log p(x)"
            return [Finding("trust", words)]
        below = f"it is {'at least ' if unsure else ''}{whole:.1f} nats per example below it"
        where = f"{encoder:.1f} from the encoder, {family:.1f} from the family"
        findings = [Finding("doubt", f"the ELBO as log p(x): {below} ({where})")]
        if encoder > max(family, GAP / 2):
            findings.append(Finding("next", "a larger encoder or longer training"))
        if family > max(encoder, GAP / 2):
            findings.append(Finding("next", RICHER))
        return findings

    wanted = (
        (20, 50, 100),
        (40, 100, 200),
        (60, 200, 300),
        (100, 300, 500),
        (300, 300, 500),
        (1000, 300, 500),
    )
    return Study(
        "gaps",
        4,
        [
            Rung(
                bench.cost(steps, GRADIENT * 8 * n) + bench.cost(4, n * k),
                partial(run, n, steps, k),
            )
            for n, steps, k in sizes(bench, *wanted)
        ],
        judge,
        {"gaps": diagnostic_plots.gap_bars},
    )


def _calibration(bench: Bench) -> Study:
    def run(simulations: int, draws: int) -> Calibration:
        return calibration(
            bench.pair,
            bench.batch[1:],
            num_simulations=simulations,
            num_draws=draws,
            seed=bench.seed,
            progress=False,
        )

    def judge(found: Calibration, _: Mapping[str, Any]) -> list[Finding]:
        held = found.coverage[:, -1]
        words = "the guide's uncertainty on the model's own data: 95 % intervals hold "
        if found.calibrated:
            words += f"{100 * held.min().item():.0f} to {100 * held.max().item():.0f} %"
            return [Finding("trust", words)]
        off = {name: held[found.names.index(name)].item() for name in found.failures}
        worst = max(off, key=lambda name: abs(off[name] - 0.95))
        most = Counter(found.failures.values()).most_common(1)[0][0]
        words += f"{100 * off[worst]:.0f} % for {worst}; {len(off)} of {len(found.names)} "
        words += f"quantities are off, most often because {most}"
        if abs(off[worst] - 0.95) <= COVERAGE:
            return [Finding("trust", words)]
        return [Finding("doubt", words), Finding("next", RICHER)]

    wanted = ((100, 19), (250, 29), (500, 49), (1000, 99), (2000, 99))
    rungs = [Rung(bench.cost(2, n * draws), partial(run, n, draws)) for n, draws in wanted]
    return Study(
        "calibration", 2, rungs, judge, {"calibration": diagnostic_plots.calibration_bands}
    )


def _annealing(bench: Bench) -> Study:
    def run(rows: int, temperatures: int, chains: int) -> Annealing:
        return anneal(
            bench.pair,
            *bench.some(rows),
            num_temperatures=temperatures,
            num_chains=chains,
            engine=bench.engine,
            progress=False,
            **bench.settings,
        )

    def judge(found: Annealing, results: Mapping[str, Any]) -> list[Finding]:
        weighed = results.get("log_likelihood")
        if weighed is None or len(weighed.per_datum) < len(found.per_datum):
            return []
        n = len(found.per_datum)
        by = (found.per_datum - weighed.per_datum[:n]).mean().item()
        error = (found.standard_error**2 + weighed.standard_errors[:n].square().sum() / n**2) ** 0.5
        off = f"{abs(by):.2f} ± {error:.2f} nats, on {n} data"
        if abs(by) > max(AGREE, 3 * error):  # of two lower bounds the greater is the better
            if by > 0:
                words = f"log p(x) by importance weights is too low, by annealing ({off})"
                return [Finding("doubt", words)]
            words = f"annealing at {found.num_temperatures} temperatures is too low ({off})"
            return [Finding("doubt", words), Finding("next", MORE)]
        if abs(by) + 2 * error > TOGETHER:
            words = f"whether annealing and importance weights agree on log p(x) ({off})"
            return [Finding("doubt", words), Finding("next", MORE)]
        words = f"annealing and importance weights agree on log p(x) ({off})"
        return [Finding("trust", words)]

    return Study("annealing", 3, _annealed(bench, run), judge)


def _sandwich(bench: Bench) -> Study:
    def run(rows: int, temperatures: int, chains: int) -> Sandwich:
        return sandwich(
            bench.pair,
            rows,
            bench.some(rows)[1:],
            num_temperatures=temperatures,
            num_chains=chains,
            seed=bench.seed,
            engine=bench.engine,
            progress=False,
        )

    def judge(found: Sandwich, _: Mapping[str, Any]) -> list[Finding]:
        wide = f"{found.gap:.2f} ± {found.gap_standard_error:.2f} nats"
        words = f"log p(x) of the model's own data: annealing's bounds are {wide} apart"
        if found.gap + 2 * found.gap_standard_error < GAP:
            return [Finding("trust", words)]
        return [Finding("doubt", words), Finding("next", MORE)]

    return Study("sandwich", 3, _annealed(bench, run, sides=2), judge)


def _annealed(bench: Bench, run: Callable[..., Any], sides: int = 1) -> list[Rung]:
    wanted = ((10, 20, 4), (20, 50, 8), (20, 100, 8), (50, 200, 8), (50, 500, 16), (100, 1000, 16))
    return [
        Rung(bench.cost(sides * 5 * (t + 70), GRADIENT * n * c), partial(run, n, t, c))
        for n, t, c in sizes(bench, *wanted)
    ]


def _nuts(bench: Bench) -> Study:
    def run(rows: int, draws: int, chains: int) -> Posterior:
        return nuts(
            bench.pair,
            *bench.some(rows),
            num_draws=draws,
            warmup=draws,
            num_chains=chains,
            engine=bench.engine,
            progress=False,
            **bench.settings,
        )

    def judge(found: Posterior, _: Mapping[str, Any]) -> list[Finding]:
        numbers, n = found.as_dict(), len(found.agrees)
        if numbers["agree"] < n:
            words = (
                f"NUTS as a reference: chains agree without divergences for {numbers['agree']} of "
                f"{n} data"
            )
            return [Finding("doubt", words), Finding("next", "pyro_vae.nuts with more draws")]
        apart = found.disagreement.nansum(1).mean().item()
        shift, scale = numbers["mean_shift"] or 0.0, numbers["mean_scale_ratio"] or 0.0
        words = (
            f"the guide beside NUTS on {n} data: means are off by {shift:.2f} standard deviations, "
            f"its scale is {scale:.2f} times the posterior's"
        )
        return [Finding("trust" if apart < GAP else "doubt", words)]

    wanted = sizes(bench, (1, 100, 2), (2, 200, 4), (4, 300, 4), (8, 500, 4))
    rungs = [
        Rung(bench.cost(LEAPFROG * n * c * 2 * d, GRADIENT), partial(run, n, d, c))
        for n, d, c in wanted
    ]
    figure = partial(diagnostic_plots.posteriors, rows=bench.rows)
    return Study("nuts", 3, rungs, judge, {"nuts": figure})


def _predictive(bench: Bench) -> Study:
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
            words = f"the model makes such data, by their {', '.join(p)}"
            return [Finding("trust", words)]
        words = "the model's own data, which differ from these in their " + ", ".join(
            f"{name} (p {p[name]:.3f})" for name in off
        )
        return [Finding("doubt", words), Finding("next", "a larger decoder or another likelihood")]

    def worst(found: PredictiveCheck) -> "Figure":
        batch = bench.some(len(found.observed))
        return diagnostic_plots.predictive_worst(bench.pair, found, *batch, rows=bench.rows)

    figures: dict[str, Any] = {"predictive": diagnostic_plots.predictive_statistics}
    if is_picture(bench.batch[0]):
        figures["predictive-worst"] = worst
    wanted = sizes(bench, (100, 20), (250, 30), (500, 50), (2000, 100))
    rungs = [Rung(bench.cost(2, n * r), partial(run, n, r)) for n, r in wanted]
    return Study("predictive", 1, rungs, judge, figures)


def _outliers(bench: Bench) -> Study | None:
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
                f"{name} as a sign that a datum does not belong: AUROC {area:.2f}",
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
    return Study("outliers", 3, rungs, judge, {"outliers": diagnostic_plots.outlier_histograms})


def _uncertainty(bench: Bench) -> Study:
    def run(rows: int, weights: int) -> Uncertainty:
        return uncertainty(
            bench.pair, *bench.some(rows), num_weights=weights, progress=False, **bench.settings
        )

    def judge(found: Uncertainty, _: Mapping[str, Any]) -> list[Finding]:
        share = (found.epistemic.mean() / found.total.mean()).item()
        words = f"predictions: {100 * share:.0f} % of their variance is that of the shared latents"
        if share < EPISTEMIC:
            return [Finding("trust", words)]
        return [Finding("doubt", words), Finding("next", "more data of the same kind")]

    rungs = [
        Rung(bench.cost(w, 10 * n), partial(run, n, w))
        for n, w in sizes(bench, (20, 5), (200, 30), (1000, 30))
    ]
    return Study("uncertainty", 1, rungs, judge)


STUDIES: list[Callable[[Bench], Study | None]] = [
    _latents,
    _information,
    _predictive,
    _uncertainty,
    _calibration,
    _reliability,
    _outliers,
    _gaps,
    _annealing,
    _sandwich,
    _nuts,
]
"""In the order in which they are run: the cheap ones first."""
