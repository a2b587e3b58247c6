"""Studies of the guide: log p(x), gaps, calibration, annealing, NUTS."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from pyro_vae.diagnostics import figures as diagnostic_figures
from pyro_vae.diagnostics.calibration import Calibration, calibration
from pyro_vae.diagnostics.gaps import Gaps, gaps
from pyro_vae.diagnostics.study import GAP, GRADIENT, Bench, Finding, Rung, Study, sizes
from pyro_vae.inference.annealing import Annealing, Sandwich, anneal, sandwich
from pyro_vae.inference.given_globals import at_one_draw
from pyro_vae.inference.importance import LogLikelihood, log_likelihood
from pyro_vae.inference.nuts import Posterior, nuts

LEAPFROG = 60
"""Approximate number of gradients in a transition of NUTS."""

UNRELIABLE = 0.05
"""If more than this fraction of the data has a Pareto k over 0.7, the mean is unreliable."""

CONSTANT = 0.01
"""If the gap of a datum is below this many nats, its weights count as constant."""

COVERAGE = 0.02
"""Allowed error of the coverage of 95 % intervals, because approximate guides are not exact."""

AGREE = 0.1
"""Two estimates of log p(x) that differ by more nats per example disagree."""

TOGETHER = 0.3
"""Two estimates agree only if difference plus two errors is at most this many nats per example."""

MORE = "annealing with more temperatures or more time"

RICHER = "a richer posterior family (pyro_vae.refit_guide shows the gain)"


def given(bench: Bench) -> str:
    """Return what the numbers of local latents are conditional on, in words."""
    names = ", ".join(f"'{name}'" for name in bench.shared[:3])
    more = " ..." if bench.shared[3:] else ""
    return f" (given one draw of {names}{more})" if names else ""


def reliability_study(bench: Bench) -> Study:
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
            words = f"log p(x) of {infinite} data: weights are infinite, because the guide gives "
            words += "no density to its own draws"
            findings.append(Finding("doubt", words))
        share = (found.pareto_k > 0.7).double().mean().item()
        over = f"Pareto k is over 0.7 for {100 * share:.0f} % of the data"
        if infinite:
            return findings
        if share <= UNRELIABLE:
            value = f"{found.value:.3f} ± {found.standard_error:.3f} nats per example"
            findings.append(Finding("trust", f"log p(x) = {value} by importance weights ({over})"))
        else:
            words = f"log p(x) by importance weights: it is too low by an unknown amount ({over})"
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
            "reliability": lambda found: diagnostic_figures.reliability(
                found, bench.some(len(found.per_datum))[0], rows=bench.rows
            )
        },
    )


def gaps_study(bench: Bench) -> Study:
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
            getattr(found, name).value for name in ("inference", "amortization", "approximation")
        )
        # If weights hardly vary, the shape of their tail is noise and has no effect.
        matters = found.inference.per_datum.abs() > CONSTANT
        unsure = ((found.pareto_k > 0.7) & matters).double().mean().item() > UNRELIABLE
        if whole < GAP and not unsure:
            words = (
                f"the ELBO{given(bench)} is within {abs(whole):.2f} nats per example of log p(x)"
            )
            return [Finding("trust", words)]
        below = f"it is {'at least ' if unsure else ''}{whole:.1f} nats per example too low"
        where = f"{encoder:.1f} from the encoder, {family:.1f} from the family"
        words = f"the ELBO{given(bench)} as log p(x): {below} ({where})"
        findings = [Finding("doubt", words)]
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
        {"gaps": diagnostic_figures.gap_bars},
    )


def calibration_study(bench: Bench) -> Study:
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
        held, unchecked = found.coverage[:, -1], []
        if bool(bench.batch[0].isnan().any()):
            gap = "the guide on rows with missing entries, since calibration simulates whole rows"
            unchecked = [Finding("unchecked", gap)]
        words = "the guide's uncertainty on the model's own data: 95 % intervals contain "
        if found.calibrated:
            words += f"{100 * held.min().item():.0f} to {100 * held.max().item():.0f} %"
            words += " of the true values"
            return [Finding("trust", words), *unchecked]
        off = {name: held[found.names.index(name)].item() for name in found.failures}
        worst = max(off, key=lambda name: abs(off[name] - 0.95))
        most = Counter(found.failures.values()).most_common(1)[0][0]
        words += f"{100 * off[worst]:.0f} % of the true values of {worst}; {len(off)} of "
        words += f"{len(found.names)} quantities fail, most often because {most}"
        if abs(off[worst] - 0.95) <= COVERAGE:
            return [Finding("trust", words), *unchecked]
        return [Finding("doubt", words), Finding("next", RICHER), *unchecked]

    wanted = ((100, 19), (250, 29), (500, 49), (1000, 99), (2000, 99))
    rungs = [Rung(bench.cost(2, n * draws), partial(run, n, draws)) for n, draws in wanted]
    return Study(
        "calibration", 2, rungs, judge, {"calibration": diagnostic_figures.calibration_bands}
    )


def annealing_study(bench: Bench) -> Study:
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
        if abs(by) > max(AGREE, 3 * error):  # of two lower bounds the higher is better
            if by > 0:
                words = f"log p(x) by importance weights: annealing gives a higher bound (by {off})"
                return [Finding("doubt", words)]
            words = f"annealing at {found.num_temperatures} temperatures: importance weights give "
            words += f"a higher bound (by {off})"
            return [Finding("doubt", words), Finding("next", MORE)]
        if abs(by) + 2 * error > TOGETHER:
            words = "the comparison of annealing and importance weights: the error of their "
            words += f"difference is too large ({off})"
            return [Finding("doubt", words), Finding("next", MORE)]
        words = f"annealing and importance weights agree on log p(x) ({off})"
        return [Finding("trust", words)]

    return Study("annealing", 3, _annealed(bench, run), judge)


def sandwich_study(bench: Bench) -> Study:
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
        words = f"log p(x) of the model's own data: the bounds of annealing are {wide} apart"
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


def nuts_study(bench: Bench) -> Study:
    def run(rows: int, draws: int, chains: int) -> Posterior:
        pair, _ = at_one_draw(bench.pair, bench.batch, bench.seed)
        found = nuts(
            pair,
            *bench.some(rows),
            num_draws=draws,
            warmup=draws,
            num_chains=chains,
            engine=bench.engine,
            progress=False,
            **bench.settings,
        )
        return cast(Posterior, found)

    def judge(found: Posterior, _: Mapping[str, Any]) -> list[Finding]:
        numbers, n = found.as_dict(), len(found.agrees)
        if numbers["agree"] < n:
            words = (
                "NUTS as a reference: chains agree without divergences for "
                f"{numbers['agree']} of {n} data"
            )
            return [Finding("doubt", words), Finding("next", "pyro_vae.nuts with more draws")]
        apart = found.disagreement.nansum(1).mean().item()
        shift, scale = numbers["mean_shift"] or 0.0, numbers["mean_scale_ratio"] or 0.0
        words = (
            f"the guide{given(bench)}, compared with NUTS on {n} data: its means are off by "
            f"{shift:.2f} standard deviations, and its scale is {scale:.2f} times the posterior's"
        )
        return [Finding("trust" if apart < GAP else "doubt", words)]

    wanted = sizes(bench, (1, 100, 2), (2, 200, 4), (4, 300, 4), (8, 500, 4))
    rungs = [
        Rung(bench.cost(LEAPFROG * n * c * 2 * d, GRADIENT), partial(run, n, d, c))
        for n, d, c in wanted
    ]
    figure = partial(diagnostic_figures.posteriors, rows=bench.rows)
    return Study("nuts", 3, rungs, judge, {"nuts": figure})
