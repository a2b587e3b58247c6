"""Options become an objective, a weight on the KL, and a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyro_vae.cli.options import Objective

if TYPE_CHECKING:
    from pyro.infer import ELBO

    from pyro_vae.training.schedules import Schedule


def make_objective(config: Objective, num_data: int, enumerated: bool = False) -> ELBO | None:
    """The Pyro ELBO of a configuration, or None for the objective of the pair's recipe.

    Arguments:
        config: the options.
        num_data: the number of training data.
        enumerated: whether the pair has discrete latents that must be summed out.
    """
    from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

    from pyro_vae.training import bounds, elbo, importance_bounds

    if config.objective == "importance-weighted":
        gradient = importance_bounds.Gradient(config.gradient)
        return importance_bounds.ImportanceWeightedELBO(config.num_samples, gradient=gradient)
    if config.objective == "free-bits":
        return bounds.FreeBitsELBO(config.free_bits)
    if config.objective == "total-correlation":
        return bounds.TotalCorrelationELBO(
            num_data, config.total_correlation, config.mutual_information, config.dimension_kl
        )
    if config.objective is None and config.num_samples == 1 and config.gradient == "total":
        return None
    usual = elbo.EnumeratedELBO if enumerated else Trace_ELBO
    kind: Any = TraceMeanField_ELBO if config.objective == "analytic" else usual
    if config.gradient == "sticking-the-landing":
        kind = importance_bounds.StickingTheLandingELBO
    return kind(
        num_particles=config.num_samples,
        vectorize_particles=config.num_samples > 1,
        max_plate_nesting=1,
    )


def make_beta(config: Objective) -> float | Schedule | None:
    """The weight on the KL as a number or a schedule, or None for that of the pair's recipe."""
    from pyro_vae.training.schedules import CyclicalSchedule, LinearSchedule

    if config.warm_up == "linear":
        return LinearSchedule(config.warm_up_epochs, end=config.beta)
    if config.warm_up == "cyclical":
        return CyclicalSchedule(config.warm_up_epochs, end=config.beta)
    return None if config.warm_up is None and config.beta == 1 else config.beta


RISE = 40.0
"""Epochs over which the learning rate rises if the pair starts at the solution of a simpler model.
The first epochs then stay close to it, and validation can choose them."""


def make_learning_rate_schedule(
    config: Objective, epochs: int, started: bool = False
) -> Schedule | None:
    """The factor on the learning rate at each epoch, or None if it is constant.

    Arguments:
        config: the options.
        epochs: the number of epochs.
        started: whether the pair starts at the solution of a simpler model.
    """
    from pyro_vae.training.schedules import CosineSchedule, LinearSchedule

    if config.learning_rate_schedule == "constant":
        return LinearSchedule(RISE) if started else None
    if config.learning_rate_schedule == "linear":
        return LinearSchedule(epochs, start=1.0, end=0.0)
    return CosineSchedule(epochs)
