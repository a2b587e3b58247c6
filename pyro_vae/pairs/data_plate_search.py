"""Search for the data plate of a pair, by runs on two and on three rows."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, cast

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.pairs import data_plate
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import at_data, latents, observed, with_guides
from pyro_vae.pairs.traces import trace


class _Run(NamedTuple):
    """One run of a pair on some rows."""

    batch: Sequence[Tensor]
    model: Trace
    guide: Trace | None
    """None if the guide fails, or if the model fails when it is replayed against the guide."""
    shapes: dict[str, torch.Size]
    """Shapes of the parameters that ``pyro.param`` declared."""
    drawn: Trace | None = None
    """The trace of the guide, even if the model fails when it is replayed against it."""

    def kept_rows(self, plates: frozenset[str]) -> list[tuple[str, int]]:
        """Which of these plates have another number of rows in the guide, and that number."""
        drawn = {} if self.drawn is None else latents(self.drawn)
        frames = [frame for site in drawn.values() for frame in at_data(site)]
        other = (len(self.batch[0]), data_plate.NO_SIZE)
        return [(f.name, f.size) for f in frames if f.name in plates and f.size not in other]


def find_places(pair: nn.Module, batch: Sequence[Tensor]) -> None:
    """Find the data plate of a pair and what its sites observe, by runs on two and three rows.

    If the pair fails, both remain unknown; the next run reports the error. If only the guide fails,
    the next call searches again. Raises `UsageError` if the guide has a parameter with a row for
    each datum.
    """
    if (found := data_plate.known(pair)) is not None and found.guided:
        return
    # The rows of a short batch are repeated.
    runs = [_run(pair, [tensor[torch.arange(n) % len(tensor)] for tensor in batch]) for n in (2, 3)]
    first, other = runs if runs[0] is not None else reversed(runs)
    first = first or _run(pair, batch)
    if first is None:
        return
    located = data_plate.locate(
        observed(first.model), None if other is None else observed(other.model), first.batch
    )
    if other is not None:
        _require_amortized(first, other, frozenset() if located is None else located.plates)
    if located is not None:
        guide = first.model if first.guide is None else first.guide
        plates, guided = with_guides(located.plates, first.model, guide), first.guide is not None
        data_plate.keep(pair, located._replace(plates=plates, guided=guided))


def runs(pair: nn.Module, batch: Sequence[Tensor]) -> bool:
    """Whether model and guide run together on a batch."""
    found = _run(pair, batch)
    return found is not None and found.guide is not None


def _run(pair: nn.Module, batch: Sequence[Tensor]) -> _Run | None:
    """A run of model and guide; only of the model if they fail together; None if that fails."""
    model, guide = cast(Pair, pair).model, cast(Pair, pair).guide
    with using(pair, seed=0), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = None
        # A user's own code may raise anything.
        with suppress(Exception):
            drawn = trace(guide, batch)
            together = trace(poutine.replay(model, trace=drawn), batch)
            held = pyro.get_param_store().get_state()["params"]
            shapes = {name: p.shape for name, p in held.items()}
            return _Run(batch, together, drawn, shapes, drawn)
        with suppress(Exception):
            return _Run(batch, trace(model, batch), None, {}, drawn)
    return None


def _require_amortized(first: _Run, other: _Run, plates: frozenset[str]) -> None:
    """Raise `UsageError` if the guide has a parameter with a row for each datum.

    Two signs show such a parameter: it grows with the number of rows, or the guide's plate keeps
    the number of rows of its first run.
    """
    kept = [
        (f"the plate '{name}' keeps {size}", len(run.batch[0]))
        for run in (first, other)
        for name, size in run.kept_rows(plates)
    ]
    kept += [
        (f"parameter '{name}' has {len(first.batch[0])}", len(other.batch[0]))
        for name, shape in other.shapes.items()
        if first.shapes.get(name, shape) != shape
    ]
    if kept:
        what, rows = kept[0]
        raise UsageError(
            f"the guide has a parameter with a row for each datum ({what} rows but x has {rows}): "
            "use an encoder of x in the guide, or pass row numbers, torch.arange(len(x)), as "
            "context and use them to index a parameter of fixed size"
        )
