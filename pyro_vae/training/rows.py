"""Training and validation data, checked together with the pair."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import pyro
import torch
from pyro.infer import ELBO
from torch import nn

from pyro_vae.data.preparation import (
    Preparation,
    held_out,
    masking,
    plain_preparation,
    preparation,
    record_divisor,
    require_masks,
)
from pyro_vae.data.sources import Arrays, Rows, Source, parts, source
from pyro_vae.data.streams import Stream
from pyro_vae.errors import UsageError
from pyro_vae.pairs.pair import placement
from pyro_vae.pairs.rng import seeded
from pyro_vae.training import collapse
from pyro_vae.training.check import declare, require
from pyro_vae.training.elbo import elbo
from pyro_vae.training.precision import chosen_precision
from pyro_vae.training.settings import Settings


@dataclass(frozen=True)
class TrainingData:
    """The data of a run, and everything that `fit` finds out from them."""

    settings: Settings
    """The settings, with a batch size that fits the data."""
    rows: Source
    prepare: Preparation
    held: tuple[Source, Preparation] | None
    """The validation data and their preparation."""
    objective: ELBO
    units: dict[str, float]
    """How many units each latent site has, see `collapse.units`."""
    are_kl: bool
    """Whether the term of each latent site is a KL, see `collapse.are_kl`."""

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return max(1, self.rows.steps(cast(int, self.settings.batch_size)))


def place(
    pair: nn.Module, device: torch.device, given: tuple[Rows, tuple[Any, ...]], seed: int
) -> None:
    """Move a pair to a device, together with the ``pyro.param``s that its programs declare.

    The first value of a ``pyro.param`` is usually on the CPU, so the programs run there first.

    Arguments:
        given: x, and a tuple of the context.
    """
    if device.type != "cpu" and placement(pair)[0].type == "cpu":
        with seeded(seed), suppress(Exception):  # the check on the device says what is wrong
            raw = source(*given, pair).first(2)
            declare(pair, plain_preparation(pair, raw)(raw))
    pair.to(device)


def training_data(
    pair: nn.Module,
    given: tuple[Rows, tuple[Any, ...]],
    validation: Any,
    objective: ELBO | None,
    binarize: str,
    settings: Settings,
) -> TrainingData:
    """Check training and validation data together with the pair, and prepare them.

    Arguments:
        given: x, and a tuple of the context.
        validation: x, or a tuple of x and context; None without validation data.
        objective: None for the ELBO that fits the pair.
    """
    with seeded(settings.seed):  # a loader draws when it starts
        rows = source(*given, pair)
        settings = settings.for_rows(len(rows))
        if settings.precision == "auto":
            precision = chosen_precision(pair, rows.batch_size(cast(int, settings.batch_size)))
            settings = replace(settings, precision=precision)
        _require_enough(rows, settings)
        raw = rows.first(16)
        plain = plain_preparation(pair, raw)
        first = plain(raw)
        require(pair, first, objective)
        require_masks(pair, rows, plain)
        rows, prepare = _prepared(pair, rows, binarize)
        prepare = masking(pair, prepare, rows.first(16), settings.mask_rate)
        # Training itself names the rows whose numbers are not finite.
        with pyro.validation_enabled(False):
            at_once = min(500, 4 * cast(int, settings.batch_size))
            units = collapse.units(pair, plain(rows.first(at_once)))
            objective, are_kl = objective or elbo(pair, first), collapse.are_kl(pair, first)
        held = None
        if validation is not None:
            held = _validation_rows(pair, parts(validation), rows, binarize)
    return TrainingData(settings, rows, prepare, held, objective, units, are_kl)


def _require_enough(rows: Source, settings: Settings) -> None:
    if len(rows) < 2:
        raise UsageError(f"training needs at least 2 rows of data, got {len(rows)}")
    if not isinstance(rows, Stream) and len(rows) < cast(int, settings.batch_size):
        raise UsageError(
            f"must be at most {len(rows)}, the number of rows of the data, got "
            f"{settings.batch_size}",
            argument="batch_size",
        )


def _prepared(pair: nn.Module, rows: Source, binarize: str) -> tuple[Source, Preparation]:
    prepare = preparation(pair, rows, binarize)
    record_divisor(pair, rows, prepare)
    if prepare.binarize and binarize == "fixed":
        if not isinstance(rows, Arrays):
            raise UsageError(
                "can be fixed only for arrays in memory: use dynamic, or binarize the data",
                argument="binarize",
            )
        rows, prepare = held_out(rows, prepare)
    if binarize == "none" and preparation(pair, rows).binarize:
        warnings.warn(
            "gray intensities are scored under a likelihood on {0, 1}; the reported numbers are "
            "not log-likelihoods",
            stacklevel=5,
        )
    return rows.near(prepare.device) if isinstance(rows, Arrays) else rows, prepare


def _validation_rows(
    pair: nn.Module, given: Sequence[Any], rows: Source, binarize: str
) -> tuple[Source, Preparation]:
    try:
        held = source(given[0], given[1:], pair)
        if isinstance(held, Arrays) and isinstance(rows, Arrays):
            wanted, got = len(rows.tensors) - 1, len(held.tensors) - 1
            if got != wanted:
                raise UsageError(
                    f"expected {wanted} context tensors, as for the training data, got {got}"
                )
        prepare = preparation(pair, held, binarize)
        require_masks(pair, held, prepare)
        held, prepare = held_out(held, prepare)
        return held.near(prepare.device) if isinstance(held, Arrays) else held, prepare
    except UsageError as error:
        raise UsageError(f"validation: {error}") from error
