"""The studies of `diagnose`, in order."""

from collections.abc import Callable

from pyro_vae.diagnostics.further_studies import (
    loo_pit_study,
    power_scaling_study,
    tarp_study,
)
from pyro_vae.diagnostics.global_studies import global_nuts_study, global_weights_study
from pyro_vae.diagnostics.guide_studies import (
    annealing_study,
    calibration_study,
    class_gap_study,
    gaps_study,
    local_calibration_study,
    nuts_study,
    reliability_study,
    sandwich_study,
)
from pyro_vae.diagnostics.model_studies import (
    information_study,
    latents_study,
    model_check_study,
    outliers_study,
    predictive_study,
    train_gap_study,
    uncertainty_study,
)
from pyro_vae.diagnostics.study import Bench, Study

STUDIES: list[Callable[[Bench], Study | None]] = [
    latents_study,
    reliability_study,
    class_gap_study,
    global_weights_study,
    global_nuts_study,
    calibration_study,
    local_calibration_study,
    model_check_study,
    gaps_study,
    information_study,
    train_gap_study,
    predictive_study,
    uncertainty_study,
    outliers_study,
    annealing_study,
    sandwich_study,
    nuts_study,
    tarp_study,
    power_scaling_study,
    loo_pit_study,
]
"""All studies in the order in which they run: the most important first, the slowest last."""
