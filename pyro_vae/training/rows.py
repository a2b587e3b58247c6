"""Training and validation data, checked together with the pair."""

import warnings
from collections.abc import Sequence
from typing import Any, cast

from pyro.infer import ELBO
from torch import nn

from pyro_vae.data.preparation import (
    Preparation,
    held_out,
    preparation,
    record_divisor,
    require_masks,
)
from pyro_vae.data.sources import Arrays, Source, source
from pyro_vae.errors import UsageError
from pyro_vae.pairs.pair import placement
from pyro_vae.training import collapse
from pyro_vae.training.check import require
from pyro_vae.training.elbo import elbo
from pyro_vae.training.settings import Settings


def training_rows(
    pair: nn.Module, rows: Source, objective: ELBO | None, binarize: str, settings: Settings
) -> tuple[Source, Preparation, ELBO, dict[str, float], bool]:
    """The training data, checked together with the pair, how they are prepared, the objective, and
    for the alarm how many units each latent site has, and whether the term of each is a KL."""
    if len(rows) < 2:
        raise UsageError(f"{len(rows)} row of data came, 2 or more are expected")
    if isinstance(rows, Arrays) and len(rows) < cast(int, settings.batch_size):
        raise UsageError(
            f"must be at most {len(rows)}, the number of rows of the data, got "
            f"{settings.batch_size}",
            argument="batch_size",
        )
    plain = Preparation(*placement(pair))
    first = plain(rows.first(16))
    require(pair, first, objective)
    require_masks(pair, rows, plain)
    prepare = preparation(pair, rows, binarize)
    record_divisor(pair, rows, prepare)
    if prepare.binarize and binarize == "fixed":
        rows, prepare = held_out(rows, prepare)
    if binarize == "none" and preparation(pair, rows).binarize:
        warnings.warn(
            "grey intensities are scored under a likelihood on {0, 1}: the numbers reported are "
            "not log-likelihoods",
            stacklevel=4,
        )
    rows = rows.to(prepare.device) if isinstance(rows, Arrays) else rows
    units = collapse.units(pair, plain(rows.first(500)))
    return rows, prepare, objective or elbo(pair, first), units, collapse.are_kl(pair, first)


def validation_rows(
    pair: nn.Module,
    given: Sequence[Any],
    rows: Source,
    binarize: str,
) -> tuple[Source, Preparation]:
    """The validation data, checked as training data are, and how they are prepared."""
    try:
        held = source(given[0], given[1:], pair)
        if isinstance(held, Arrays) and isinstance(rows, Arrays):
            wanted, came = len(rows.tensors) - 1, len(held.tensors) - 1
            if came != wanted:
                raise UsageError(
                    f"as many context tensors as for training, {wanted}, are expected, {came} came"
                )
        prepare = preparation(pair, held, binarize)
        require_masks(pair, held, prepare)
        return held_out(held, prepare)
    except UsageError as error:
        raise UsageError(f"validation: {error}") from error
