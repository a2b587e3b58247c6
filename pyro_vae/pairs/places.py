"""Which plate is the data plate of a pair, and which observed site observes x.

The data plate is the plate of the site that observes the data. It is found by that site, never by
a dimension or a name: other plates, of topics or groups, may use the same dimension. A pair is run
on two and on three rows. The plate of observed sites that grows with the rows is the data plate.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from pyro_vae.compat import full_size
from pyro_vae.errors import UsageError

NO_SIZE = -1
"""What Pyro writes for the size of ``pyro.plate("data")``."""


class Places(NamedTuple):
    """Where a pair keeps its data."""

    plates: frozenset[str]
    """The names of the data plate, as the model and the guide call it."""
    observes: dict[str, int]
    """The observed sites that observe a whole tensor of the batch, and which: 0 is x."""
    num_data: int | None = None
    """N, where the data plate takes its rows for a part of N data (``subsample_size=len(x)``)."""
    declares: tuple[tuple[list[int], str], ...] = ()
    """Row shapes and types of the batch whose first run made parameters, as an AutoGuide does."""

    @property
    def x(self) -> str | None:
        """The one site that observes x; None where several sites observe parts of it."""
        names = [name for name, i in self.observes.items() if i == 0]
        return names[0] if len(names) == 1 else None


_FOUND: "WeakKeyDictionary[nn.Module, Places]" = WeakKeyDictionary()

_IN_USE: ContextVar[nn.Module | None] = ContextVar("pair in use", default=None)


@contextmanager
def in_use(pair: nn.Module) -> Iterator[None]:
    """Read sites as those of this pair."""
    token = _IN_USE.set(pair)
    try:
        yield
    finally:
        _IN_USE.reset(token)


def known(pair: nn.Module | None = None) -> Places | None:
    """What was found of a pair, or of the pair in use."""
    pair = pair if pair is not None else _IN_USE.get()
    return None if pair is None else _FOUND.get(pair)


def keep(pair: nn.Module, places: Places) -> None:
    """Remember what was found of a pair."""
    _FOUND[pair] = places


def is_local(site: Any, plates: frozenset[str] | None = None) -> bool:
    """Whether a site is in the data plate.

    Arguments:
        plates: the names of the data plate; those of the pair in use by default. Where neither is
            known, each plate at dimension -1 counts as the data plate.
    """
    if plates is None and (found := known()) is not None:
        plates = found.plates
    return any(
        frame.vectorized and frame.dim == -1 and (plates is None or frame.name in plates)
        for frame in site["cond_indep_stack"]
    )


def locate(
    observed: Mapping[str, Any], more: Mapping[str, Any] | None, batch: Sequence[Tensor]
) -> Places | None:
    """The data plate and the site of x, from the observed sites of one run, or of two.

    Arguments:
        observed: the observed sites of a model that was run on this batch.
        more: the same of a run on another number of rows, where there is one.
        batch: the first is x.

    Raises `UsageError` where the data plate is at another dimension than -1.
    """
    plates, local, num_data = set(), {}, None
    for name, site in observed.items():
        sizes = _sizes(site)
        others = {} if more is None or name not in more else _sizes(more[name])
        grows = [
            frame
            for frame, size in sizes.items()
            if (size != others.get(frame) if others else frame[1] == -1)
        ]
        for plate, dim in grows:
            _require_rows(plate, sizes[plate, dim], len(batch[0]))
            if dim != -1:
                raise UsageError(
                    f"the data plate '{plate}' is at dim={dim} at site '{name}': it must be at "
                    'dim=-1, pyro.plate("data", len(x), dim=-1), with other plates to its left'
                )
            plates.add(plate)
            local[name] = site
            size, full = sizes[plate, dim]
            if full not in (None, size) and full == others.get((plate, dim), (0, full))[1]:
                num_data = full
    if not plates:
        return None
    return Places(frozenset(plates), _observed_parts(local, batch), num_data)


def _require_rows(plate: str, size: tuple[int, int | None], n: int) -> None:
    """Raise `UsageError` for a data plate that takes a part of the rows it is given."""
    if size[1] == n and size[0] < n:
        raise UsageError(
            f"the data plate '{plate}' draws {size[0]} of the {n} rows it is given: the library "
            f'draws minibatches itself, so write pyro.plate("{plate}", len(x), dim=-1), or '
            f'pyro.plate("{plate}", N, subsample_size=len(x)) where N is the number of all data'
        )


def _sizes(site: Any) -> dict[tuple[str, int], tuple[int, int | None]]:
    """The size, and the size before any subsampling, of each plate around a site.

    A plate without a size has that of the site's distribution.
    """
    shape = site["fn"].batch_shape
    return {
        (frame.name, frame.dim): (frame.size, full_size(frame))
        if frame.size != NO_SIZE or len(shape) < -frame.dim
        else (shape[frame.dim], None)
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    }


def _observed_parts(sites: Mapping[str, Any], batch: Sequence[Tensor]) -> dict[str, int]:
    """Which tensor of the batch each site observes: the tensor itself, or else one that equals it.

    An only site observes x, however the model transforms it.
    """
    found = {}
    for name, site in sites.items():
        value = site["value"]
        same = [i for i, tensor in enumerate(batch) if value is tensor]
        same = same or [i for i, tensor in enumerate(batch) if _equal(value, tensor)]
        if same:
            found[name] = same[0]
    return found or (dict.fromkeys(sites, 0) if len(sites) == 1 else {})


def _equal(value: Tensor, tensor: Tensor) -> bool:
    if value.numel() != tensor.numel():
        return False
    return bool((value.flatten() == tensor.flatten()).all())
