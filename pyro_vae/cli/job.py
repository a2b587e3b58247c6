"""A training job: the pair that options describe, and the call of `fit` for it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.cli.config_file import ARRAYS, TABLE_DEFAULTS
from pyro_vae.cli.input import Input
from pyro_vae.cli.make_objective import make_beta, make_learning_rate_schedule, make_objective
from pyro_vae.cli.make_pair import context_shapes, make_pair
from pyro_vae.cli.make_parts import binarized, standardizes, with_likelihood, with_linear
from pyro_vae.cli.options import Model, Objective, reject_ignored
from pyro_vae.cli.row_names import training_rows
from pyro_vae.cli.run import context_of
from pyro_vae.errors import UsageError
from pyro_vae.training.settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from pyro_vae.data.split import Data
    from pyro_vae.training.history import History


_CHOSEN = {
    "discretized-logistic": "color images",
    "gaussian": "real values",
    "negative-binomial": "counts",
}
"""Why a likelihood is the default of some arrays."""


@dataclass(frozen=True)
class Job:
    """A pair, its data, and the options of its training."""

    pair: "nn.Module"
    data: "Data"
    objective: Objective
    source: Input
    settings: Settings
    standardized: bool
    """Whether the pair standardizes its data."""
    binarized: bool
    """Whether gray intensities become 0 or 1."""
    given: dict[str, Any]
    """The options, as config.json records them."""

    def fit(self, **more: Any) -> "History":
        """Fit the pair; ``more`` are further arguments of `pyro_vae.fit`."""
        from pyro_vae.training.fit import fit
        from pyro_vae.training.nonfinite import rows_named

        data, given = self.data, self.given
        name_rows = partial(training_rows, data, str(given["data"]))
        enumerated = _enumerated(self.pair, given, data)
        epochs = self.settings.epochs
        with rows_named(name_rows):
            return fit(
                self.pair,
                data.train.x,
                *context_of(given, data, data.train),
                validation=(data.validation.x, *context_of(given, data, data.validation)),
                objective=make_objective(self.objective, len(data.train.x), enumerated),
                beta=make_beta(self.objective),
                learning_rate_schedule=make_learning_rate_schedule(
                    self.objective, epochs, bool(given.get("linear"))
                ),
                binarize=self.source.binarize,
                **asdict(self.settings),
                **more,
            )


def make_job(
    name: str, data: "Data", model: Model, objective: Objective, source: Input, settings: Settings
) -> Job:
    """The job of these options for data that have been loaded under this name."""
    if data.schema is not None or data.cells is not None:
        model = _with_context(model, data)
    if source.batch is not None and "context" not in model.condition:
        raise UsageError(
            f"needs --condition context for a pair of your own, got --model {model.model}",
            argument="batch",
        )
    # The default for tables and arrays may be more than a small one has, or than it has groups.
    by_rows = data.schema is not None or Path(name).suffix in ARRAYS
    if by_rows and settings.batch_size == TABLE_DEFAULTS["batch_size"]:
        most = min(TABLE_DEFAULTS["batch_size"], len(data.train.x))
        settings = replace(settings, batch_size=most)
    model = with_likelihood(model, data)
    if source.binarize != Input.binarize and ":" not in model.model:
        reject_ignored(["binarize"], {"likelihood": model.likelihood})
    standardized = standardizes(model, data, source.standardize)
    model = with_linear(model, data, standardized, settings.mask_rate > 0)
    given = (
        {"data": name, "data_shape": data.shape, "num_classes": data.num_classes}
        | {"context_shapes": context_shapes(model, data)}
        | ({} if data.vocabulary is None else {"vocabulary": data.vocabulary})
        | ({} if data.classes is None else {"classes": data.classes})
        | ({} if data.train.lengths is None else {"ragged": True})
        | ({} if data.cells is None else {"cells": data.cells.recorded()})
        | _plain(model)
        | _plain(objective)
        | _plain(source)
        | _plain(settings)
    )
    pair = _seeded_pair(model, data, settings, standardized)
    binary = source.binarize != "none" and binarized(model, data)
    return Job(pair, data, objective, source, settings, standardized, binary, given)


def told(data: "Data", model: Model) -> Iterator[tuple[str, str]]:
    """Titles and words about choices that the user may want to change."""
    if data.summary:
        yield "images", data.summary
    if data.classes:
        labels = [f"{label} {name}" for label, name in enumerate(data.classes[:10])]
        more = len(data.classes) - len(labels)
        yield "labels", ", ".join([*labels, f"{more} more"] if more else labels)
    chosen = with_likelihood(model, data).likelihood
    if model.likelihood is None and chosen in _CHOSEN:
        yield "likelihood", f"{chosen}, for {_CHOSEN[chosen]} (--likelihood to change)"


def _with_context(model: Model, data: "Data") -> Model:
    """The configuration that passes the context columns of a table to the pair."""
    if data.train.context is None or "context" in model.condition or ":" in model.model:
        return model
    return replace(model, condition=(*model.condition, "context"))


def _seeded_pair(model: Model, data: "Data", settings: Settings, standardize: bool) -> "nn.Module":
    from pyro_vae.pairs.rng import seeded
    from pyro_vae.runs.memory import WithinMemory

    with seeded(settings.seed), WithinMemory("the configuration"):
        return make_pair(model, data, standardize, settings.mask_rate > 0)


def _enumerated(pair: "nn.Module", given: dict[str, Any], data: "Data") -> bool:
    """Whether a pair has discrete latents that must be summed out; False for a faulty pair."""
    from pyro_vae.data.preparation import plain_preparation
    from pyro_vae.pairs.enumeration import enumerates

    context = context_of(given, data, data.train)
    few = tuple(part[:2] for part in (data.train.x, *context))
    try:
        return enumerates(pair, plain_preparation(pair, few)(few))
    except Exception:  # `fit` checks the pair and explains what is wrong.
        return False


def _plain(settings: Any) -> dict[str, Any]:
    assert is_dataclass(settings)
    return {
        field.name: str(value) if isinstance(value, Path) else value
        for field in fields(settings)
        if (value := getattr(settings, field.name)) is not None
    }
