"""Numbers of a step that are not finite: find their site and rows, then stop or leave them out."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.order import Place
from pyro_vae.data.ranges import CURE, extreme
from pyro_vae.data.sources import Arrays
from pyro_vae.data.streams import Stream
from pyro_vae.errors import warn
from pyro_vae.pairs import rng
from pyro_vae.pairs.pair import Batch
from pyro_vae.runs.files import NONFINITE, atomic
from pyro_vae.training.check import bad_parameter, nonfinite_rows
from pyro_vae.training.run import TrainingRun, write_model
from pyro_vae.training.state import TrainState
from pyro_vae.training.stopping import NonFiniteError

SHOWN = 8
"""How many row numbers a message names."""


class NamedRows(NamedTuple):
    """Rows of the training data as the user knows them."""

    ids: Sequence[Any]
    one: str
    """The words before one of them."""
    many: str
    """The words before several of them."""
    of: str
    """The words after them."""


def _by_number(numbers: Sequence[int]) -> NamedRows:
    return NamedRows(numbers, "row", "rows", "of the training data")


_names: ContextVar[Callable[[Sequence[int]], NamedRows]] = ContextVar("names", default=_by_number)


@contextmanager
def rows_named(names: Callable[[Sequence[int]], NamedRows]) -> Iterator[None]:
    """Let messages name rows by this function of their numbers in the training data."""
    token = _names.set(names)
    try:
        yield
    finally:
        _names.reset(token)


class Taken(NamedTuple):
    """A step that was taken."""

    step: int
    """Its number in the epoch, from 1."""
    start: int
    """How many examples the epoch had before it."""
    batch: Batch | None
    """Its minibatch. None on a GPU, where rows in memory are found by their numbers."""


@dataclass(frozen=True)
class _Cause:
    """What is known about a step whose numbers are not finite."""

    words: str
    """The value, its site and its rows in words."""
    remedy: str
    numbers: tuple[int, ...] | None
    """The numbers of the rows of the minibatch in the data; None for a stream."""
    bad: tuple[int, ...]
    """Positions of the rows in the minibatch whose own density is not finite."""
    batch: Batch | None

    @property
    def rows(self) -> tuple[int, ...] | None:
        """The numbers of the rows at fault, or of the whole minibatch; None for a stream."""
        if self.numbers is None or not self.bad:
            return self.numbers
        return tuple(self.numbers[i] for i in self.bad)


def meet(
    run: TrainingRun,
    state: TrainState,
    what: str,
    taken: Taken,
    numbers: dict[tuple[str, str], float],
    error: Exception | None = None,
) -> None:
    """Stop training at a step whose loss or gradient is not finite, or leave its minibatch out.

    Arguments:
        what: "loss" or "gradient".
        numbers: the numbers of the step.
        error: the error that the step raised, if any.

    Raises `NonFiniteError` unless the settings say "skip" and the limit is not reached.
    """
    cause = _cause(run, state, what, numbers, taken)
    for parameter in run.pair.parameters():
        parameter.grad = None  # eager gradients would be added to those of the next step
    skipped = state.sums["skipped"]
    left_out = int(skipped.get("steps", 0))
    limit = min(run.settings.skip_limit, run.data.steps - 1)
    if run.settings.on_nonfinite == "stop":
        _stop(run, state, taken.step, cause, error)
    if left_out >= limit:
        told = f"more than {limit} minibatches of this epoch are not finite; in the last, "
        _stop(run, state, taken.step, cause, error, told)
    size = len(cause.batch[0]) if cause.batch is not None else run.batch_size
    skipped["steps"] = left_out + 1
    skipped["examples"] = skipped.get("examples", 0) + size
    if left_out == 0:
        kept = _save(run, cause)
        where = f"epoch {len(state.epochs) + 1}, step {taken.step}"
        warn(f"left out the minibatch of {where}: {cause.words}{kept}")


def stop_at_parameter(run: TrainingRun, state: TrainState, name: str) -> NoReturn:
    """Raise `NonFiniteError` for a parameter that is not finite at the end of an epoch."""
    words = f"the value of parameter '{name}' is not finite"
    _stop(run, state, state.batches, _Cause(words, _remedy(run, None), None, (), None), None)


def _stop(
    run: TrainingRun,
    state: TrainState,
    step: int,
    cause: _Cause,
    error: Exception | None,
    told: str = "",
) -> NoReturn:
    """Restore the last good parameters, and raise `NonFiniteError` with cause and remedy."""
    if bad_parameter(run.pair) is not None:
        run.pair.load_state_dict(state.best or state.parameters, strict=False)
    kept = _save(run, cause)
    if run.folder is not None:
        # The checkpoint stays unchanged, since optimizer and generators have moved on.
        write_model(run, state)
        kept += f"; the last good model is in {run.folder}"
    where = f"epoch {len(state.epochs) + 1}, step {step}"
    raise NonFiniteError(
        f"training stopped in {where}: {told}{cause.words}{kept}; {cause.remedy}", cause.rows
    ) from error


def _cause(
    run: TrainingRun,
    state: TrainState,
    what: str,
    numbers: dict[tuple[str, str], float],
    taken: Taken,
) -> _Cause:
    """Find the site, the parameter and the rows that are not finite."""
    rows = _numbers(run, state, taken)
    batch = minibatch(run, state, taken)
    with rng.kept():  # the draws of later steps do not depend on when the numbers were read
        prepared = None if batch is None else run.data.prepare(batch)
        site, bad = (None, []) if prepared is None else nonfinite_rows(run.pair, prepared)
    site = _bad_sum(numbers) or site
    words = f"the {what} is not finite"
    if site:
        words += f" at site '{site}'"
    if (name := bad_parameter(run.pair)) is not None:
        words += f"; parameter '{name}' is not finite"
    elif what == "gradient" and (name := _bad_gradient(run)):
        words += f" for parameter '{name}'"
    if batch is not None:
        words += f"; {_rows_in_words(taken, rows, bad, len(batch[0]))}"
    return _Cause(words, _remedy(run, prepared), rows, tuple(bad), batch)


def _bad_sum(numbers: dict[tuple[str, str], float]) -> str | None:
    """Return the first site whose part of the ELBO is not finite."""
    for wanted in ("kl", "reconstruction"):
        for (kind, name), value in numbers.items():
            if kind == wanted and not math.isfinite(value):
                return name
    return None


def _bad_gradient(run: TrainingRun) -> str | None:
    for name, parameter in run.pair.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return name
    return None


def _numbers(run: TrainingRun, state: TrainState, taken: Taken) -> tuple[int, ...] | None:
    """Return the numbers of the rows of a step in the data, from the order of the epoch."""
    rows = run.data.rows
    if isinstance(rows, Stream):
        return None
    place = Place(run.settings.seed, len(state.epochs), taken.step - 1, run.team)
    return tuple(rows.numbers(run.batch_size, place).tolist())


def minibatch(run: TrainingRun, state: TrainState, taken: Taken) -> Batch | None:
    """Return the minibatch of a step; rows in memory are found again by their numbers."""
    if taken.batch is not None or not isinstance(run.data.rows, Arrays):
        return taken.batch
    numbers = list(_numbers(run, state, taken) or ())
    return tuple(tensor[numbers] for tensor in run.data.rows.tensors)


def _rows_in_words(
    taken: Taken, numbers: Sequence[int] | None, bad: Sequence[int], size: int
) -> str:
    """Name the rows of a minibatch that are not finite, or all of its rows."""
    places = list(range(taken.start, taken.start + size)) if numbers is None else numbers
    at = [places[i] for i in bad] if 0 < len(bad) < size else sorted(places)
    of = "of the epoch, in the order of the loader"
    named = NamedRows(at, "row", "rows", of) if numbers is None else _names.get()(at)
    shown = ", ".join(map(str, named.ids[:SHOWN]))
    more = f" and {len(at) - SHOWN} more" if len(at) > SHOWN else ""
    return f"{named.many if len(at) > 1 else named.one} {shown}{more} {named.of}"


def _save(run: TrainingRun, cause: _Cause) -> str:
    """Save the rows of the minibatch in the run folder, and say where."""
    if run.folder is None or cause.batch is None:
        return ""
    x, *context = [_array(tensor) for tensor in cause.batch]
    arrays: dict[str, Any] = {"x": x} | {
        f"context_{i}": value for i, value in enumerate(context, 1)
    }
    arrays["bad"] = np.isin(np.arange(len(x)), cause.bad)
    if cause.numbers is not None:
        arrays["row"] = np.array(cause.numbers)
        arrays["id"] = np.array([str(one) for one in _names.get()(cause.numbers).ids])
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with atomic(run.folder / NONFINITE) as file:
        file.write(buffer.getvalue())
    return f"; the minibatch is in {run.folder / NONFINITE}"


def _array(tensor: Tensor) -> np.ndarray:
    kept = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return kept.detach().cpu().numpy()


def _remedy(run: TrainingRun, prepared: Batch | None) -> str:
    outlier = None if prepared is None else extreme(prepared[0])
    if outlier is not None:
        return f"{outlier}: leave out such rows, or {CURE}"
    return run.fault or "a smaller `learning_rate` or `clip_norm` may help"
