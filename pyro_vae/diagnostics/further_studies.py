"""Studies whose tables and figures are shown without a finding: TARP, sensitivity, LOO-PIT."""

from functools import partial

from pyro_vae.diagnostics.loo_figures import loo_pit_bars
from pyro_vae.diagnostics.loo_pit import LooPit, loo_pit
from pyro_vae.diagnostics.power_scaling import PowerScaling, power_scaling
from pyro_vae.diagnostics.study import Bench, Rung, Study, sizes
from pyro_vae.diagnostics.tarp import Tarp, tarp
from pyro_vae.inference.moment_matching import ROUNDS

WEIGHT = 0.25
"""Their share of the time: what the verdict rests on comes first."""


def tarp_study(bench: Bench) -> Study:
    def run(simulations: int, draws: int) -> Tarp:
        return tarp(
            bench.pair,
            *bench.batch[1:],
            missing=bench.missing,
            num_simulations=simulations,
            num_draws=draws,
            seed=bench.seed,
        )

    wanted = ((200, 19), (1000, 49), (2000, 99))
    rungs = [Rung(bench.draws(2, n, draws), partial(run, n, draws)) for n, draws in wanted]
    return Study("tarp", WEIGHT, rungs)


def power_scaling_study(bench: Bench) -> Study:
    def run(rows: int, samples: int) -> PowerScaling:
        return power_scaling(
            bench.pair, *bench.some(rows), num_samples=samples, progress=False, **bench.settings
        )

    wanted = sizes(bench, (50, 100), (200, 200), (1000, 500))
    # The draws of every row are moved and stretched, in up to ROUNDS rounds, before they count.
    passes = 4 + 2 * ROUNDS
    rungs = [Rung(bench.draws(passes, n, k), partial(run, n, k)) for n, k in wanted]
    return Study("power_scaling", WEIGHT, rungs)


def loo_pit_study(bench: Bench) -> Study:
    def run(rows: int, samples: int) -> LooPit:
        return loo_pit(
            bench.pair, *bench.some(rows), num_samples=samples, progress=False, **bench.settings
        )

    wanted = sizes(bench, (50, 100), (200, 200), (1000, 500))
    rungs = [Rung(bench.draws(4, n, k), partial(run, n, k)) for n, k in wanted]
    return Study("loo_pit", WEIGHT, rungs, figures={"loo-pit": loo_pit_bars})
