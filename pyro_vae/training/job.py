"""The job of a run: its options in words. A resumed run must have the job of its checkpoint."""

import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO
from torch import nn

from pyro_vae.data.sources import Arrays, Source
from pyro_vae.data.stored import Stored
from pyro_vae.errors import UsageError
from pyro_vae.runs import checksums, description
from pyro_vae.runs import tensors as run_tensors
from pyro_vae.training.rows import TrainingData
from pyro_vae.training.schedules import Schedule, present_names
from pyro_vae.training.state import TrainState

MAY_CHANGE = {
    *("epochs", "patience", "checkpoint_seconds", "tensorboard", "engine"),
    *("on_nonfinite", "skip_limit"),
}
"""The settings that a resumed run may change."""


def job_in_words(
    pair: nn.Module,
    data: TrainingData,
    beta: float | Schedule,
    learning_rate_schedule: Schedule | None,
    optimizer: Callable[..., torch.optim.Optimizer],
    binarize: str,
) -> dict[str, Any]:
    """Return the job of a run, as config.json and the checkpoint keep it."""
    return {
        "settings": asdict(data.settings),
        "objective": in_words(data.objective),
        "beta": in_words(beta),
        "learning_rate_schedule": in_words(learning_rate_schedule),
        "optimizer": in_words(optimizer),
        "binarize": binarize,
        "source": type(data.rows).__name__,
        "data": _checksum(data.rows),
        "validation": None if data.held is None else _checksum(data.held[0]),
        "pair": json.dumps(description.recipe(pair), sort_keys=True),
    }


def in_words(part: Any) -> str | None:
    """Return a part in words that are the same in every run, or None if it has no such words.

    >>> in_words(0.5), in_words(lambda epoch: 0.5)
    ('0.5', None)
    """
    if isinstance(part, ELBO):
        fields = {k: v for k, v in vars(part).items() if isinstance(v, (bool, int, float, str))}
        return f"{type(part).__name__}({fields})"
    if isinstance(part, type):
        return part.__name__
    return repr(part) if isinstance(part, (int, float)) or is_dataclass(part) else None


def require_same(state: TrainState, pair: nn.Module, job: dict[str, Any], path: Path) -> None:
    """Raise `UsageError` if a checkpoint belongs to another pair or another job."""
    run_tensors.require_fit(pair, state.parameters, path)
    _require_same_settings(state.job["settings"], job["settings"], path)
    for name, now in job.items():
        if name != "settings":
            _require_same_part(name, state.job.get(name), now, path)
    if state.best is not None:
        run_tensors.require_fit(pair, state.best, path)


def _require_same_settings(was: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for name, value in was.items():
        if name not in now:
            raise UsageError(f"{path} has an unknown setting '{name[:50]}', so it is not read")
        if name not in MAY_CHANGE and now[name] != value:
            raise UsageError(
                f"{path} was made with `{name}` = {value}, got {now[name]}; a resumed run keeps "
                "its settings"
            )


def _require_same_part(name: str, was: Any, now: Any, path: Path) -> None:
    if None in (was, now) or now in (was, _in_present_names(name, was)):
        return
    said = "" if len(str(was) + str(now)) > 200 else f": {was} then, {now} now"
    raise UsageError(f"{path} was made with another {name}{said}; a resumed run keeps its job")


def _in_present_names(name: str, was: str) -> str:
    """Return a part of the job of a checkpoint with the present names of parts and schedules."""
    if name == "pair":
        return description.renamed(was)
    return present_names(was) if name in ("beta", "learning_rate_schedule") else was


def _checksum(rows: Source) -> str | None:
    if isinstance(rows, Stored):
        return checksums.checksum(rows.sample())
    return checksums.checksum(rows.tensors) if isinstance(rows, Arrays) else None
