"""Studies of the guide: log p(x), gaps, calibration, annealing, NUTS."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from pyro_vae.diagnostics import figures as diagnostic_figures
from pyro_vae.diagnostics.calibration import Calibration, calibration
from pyro_vae.diagnostics.class_gap import ClassGap, class_gap, class_sites
from pyro_vae.diagnostics.gaps import Gaps, gaps
from pyro_vae.diagnostics.local_calibration import LocalCalibration, local_calibration
from pyro_vae.diagnostics.study import GAP, GRADIENT, Bench, Finding, Rung, Study, sizes
from pyro_vae.errors import UsageError
from pyro_vae.inference.annealing import Annealing, Sandwich, anneal, sandwich
from pyro_vae.inference.importance import LogLikelihood, log_likelihood
from pyro_vae.inference.nuts import Posterior, nuts
from pyro_vae.inference.refinement import require_refinable
from pyro_vae.pairs.given_globals import at_one_draw

LEAPFROG = 60
"""Approximate number of gradients in a transition of NUTS."""

MORE = "annealing with more temperatures or more time"


def reliability_study(bench: Bench) -> Study:
    def run(rows: int, samples: int) -> LogLikelihood:
        return log_likelihood(
            bench.pair,
            *bench.some(rows),
            num_samples=samples,
            engine=bench.engine,
            **bench.settings,
        )

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
        [Rung(bench.draws(2, n, k), partial(run, n, k)) for n, k in sizes(bench, *wanted)],
        figures={
            "reliability": lambda found: diagnostic_figures.reliability(
                found, bench.some(len(found.per_datum))[0], rows=bench.rows
            )
        },
    )


def class_gap_study(bench: Bench) -> Study | None:
    if bench.shared or not class_sites(bench.pair, bench.batch):
        return None

    def run(rows: int) -> ClassGap:
        return class_gap(bench.pair, *bench.some(rows), **bench.settings)

    rungs = [
        Rung(bench.cost(40, n), partial(run, n)) for (n,) in sizes(bench, (100,), (500,), (2000,))
    ]
    return Study("class_gap", 1, rungs)


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

    wanted = (
        (20, 50, 100),
        (40, 100, 200),
        (60, 200, 300),
        (100, 300, 500),
        (300, 300, 500),
        (1000, 300, 500),
    )
    rungs = [
        Rung(bench.cost(steps, GRADIENT * 8 * n) + bench.draws(4, n, k), partial(run, n, steps, k))
        for n, steps, k in sizes(bench, *wanted)
    ]
    try:
        require_refinable(bench.pair, bench.some(2))
    except UsageError:  # the refusal needs no time, and the verdict needs to know of it
        rungs[0] = rungs[0]._replace(cost=0.0)
    return Study("gaps", 4, rungs, figures={"gaps": diagnostic_figures.gap_bars})


def calibration_study(bench: Bench) -> Study:
    def run(simulations: int, draws: int) -> Calibration:
        return calibration(
            bench.pair,
            *bench.batch[1:],
            missing=bench.missing,
            num_simulations=simulations,
            num_draws=draws,
            seed=bench.seed,
            progress=False,
        )

    wanted = ((100, 19), (250, 29), (500, 49), (1000, 99), (2000, 99))
    rungs = [Rung(bench.draws(2, n, draws), partial(run, n, draws)) for n, draws in wanted]
    figures = {"calibration": diagnostic_figures.calibration_bands}
    return Study("calibration", 2, rungs, figures=figures)


def local_calibration_study(bench: Bench) -> Study:
    def run(rows: int, samples: int) -> LocalCalibration:
        return local_calibration(
            bench.pair, *bench.some(rows), num_samples=samples, progress=False, **bench.settings
        )

    wanted = sizes(bench, (100, 50), (300, 100), (1000, 200), (2000, 500))
    rungs = [Rung(bench.draws(4, n, k), partial(run, n, k)) for n, k in wanted]
    return Study("local_calibration", 2, rungs)


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

    return Study("annealing", 3, _annealed(bench, run))


def sandwich_study(bench: Bench) -> Study:
    def run(rows: int, temperatures: int, chains: int) -> Sandwich:
        return sandwich(
            bench.pair,
            *bench.some(rows)[1:],
            num_examples=rows,
            num_temperatures=temperatures,
            num_chains=chains,
            seed=bench.seed,
            engine=bench.engine,
            progress=False,
        )

    def judge(found: Sandwich) -> list[Finding]:
        wide = f"{found.gap:.2f} ± {found.gap_standard_error:.2f} nats"
        words = f"log p(x) of the model's own data: the bounds of annealing are {wide} apart"
        if found.gap + 2 * found.gap_standard_error < GAP:
            return [Finding("trust", words, "bounds")]
        return [Finding("doubt", words, "bounds"), Finding("next", MORE, "bounds")]

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

    wanted = sizes(bench, (1, 100, 2), (2, 200, 4), (4, 300, 4), (8, 500, 4))
    rungs = [
        Rung(bench.cost(LEAPFROG * n * c * 2 * d, GRADIENT), partial(run, n, d, c))
        for n, d, c in wanted
    ]
    figure = partial(diagnostic_figures.posteriors, rows=bench.rows)
    return Study("nuts", 3, rungs, figures={"nuts": figure})
