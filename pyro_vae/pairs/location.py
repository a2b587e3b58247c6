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
from pyro_vae.pairs import places
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import at_data, observed, with_guides
from pyro_vae.pairs.traces import trace


class _Run(NamedTuple):
    """One run of a pair on some rows."""

    batch: Sequence[Tensor]
    model: Trace
    guide: Trace | None
    """None if the guide fails, or if the model fails when it is replayed against the guide."""
    shapes: dict[str, torch.Size]
    """Shapes of the parameters that ``pyro.param`` declared."""


def find_places(pair: nn.Module, batch: Sequence[Tensor]) -> None:
    """Find the data plate of a pair and what its sites observe, by runs on two and three rows.

    If the pair fails, both remain unknown; the next run reports the error. Raises `UsageError` if
    the guide has a parameter with a row for each datum.
    """
    if places.known(pair) is not None:
        return
    sizes = (2, 3 if len(batch[0]) > 2 else 1)
    runs = [_run(pair, [tensor[:rows] for tensor in batch]) for rows in sizes]
    first, other = runs if runs[0] is not None else reversed(runs)
    first = first or _run(pair, batch)
    if first is None:
        return
    if other is not None:
        _require_amortized(first, other)
    located = places.locate(
        observed(first.model), None if other is None else observed(other.model), first.batch
    )
    if located is not None:
        guide = first.model if first.guide is None else first.guide
        places.keep(pair, located._replace(plates=with_guides(located.plates, first.model, guide)))


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
            return _Run(batch, together, drawn, {name: p.shape for name, p in held.items()})
        with suppress(Exception):
            return _Run(batch, trace(model, batch), None, {})
    return None


def _require_amortized(first: _Run, other: _Run) -> None:
    """Raise `UsageError` if the guide has a parameter with a row for each datum.

    Two signs show such a parameter: it grows with the number of rows, or the guide's plate keeps
    the number of rows of its first run.
    """
    whole, cut = (
        {f.name: f.size == f.full_size for s in observed(run.model).values() for f in at_data(s)}
        for run in (first, other)
    )
    kept = [f"the plate '{name}' keeps" for name in cut if whole.get(name) and not cut[name]]
    grown = [n for n, shape in other.shapes.items() if first.shapes.get(n, shape) != shape]
    kept += [f"parameter '{name}' has" for name in grown]
    if kept and first.guide is not None:
        rows = len(first.batch[0])
        raise UsageError(
            f"the guide has a parameter with a row for each datum ({kept[0]} {rows} rows but x "
            f"has {len(other.batch[0])}): use an encoder of x in the guide, or pass row numbers, "
            "torch.arange(len(x)), as context and use them to index a parameter of fixed size"
        )
