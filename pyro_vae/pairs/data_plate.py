"""Which plate is the data plate of a pair, and which observed site observes x.

The data plate is the plate of the site that observes the data. It is identified by this site, and
never by its dimension or name, because other plates (of topics or groups) may use the same
dimension. The pair runs on two and on three rows. The data plate is the plate around an observed
site that grows with the number of rows.
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
"""The size that Pyro records for ``pyro.plate("data")``, a plate without a size."""


class Places(NamedTuple):
    """The data plate of a pair, and which site observes which tensor of the batch."""

    plates: frozenset[str]
    """The names of the data plate in the model and in the guide."""
    observes: dict[str, int]
    """The index of the observed tensor for each site that observes a whole tensor; 0 is x."""
    num_data: int | None = None
    """N if the data plate treats its rows as a part of N data (``subsample_size=len(x)``)."""
    guided: bool = True
    """Whether the guide ran. It fails, for example, on x of another type than it takes."""

    @property
    def x(self) -> str | None:
        """The site that observes x; None if several sites observe parts of it."""
        names = [name for name, i in self.observes.items() if i == 0]
        return names[0] if len(names) == 1 else None


_FOUND: "WeakKeyDictionary[nn.Module, Places]" = WeakKeyDictionary()

_IN_USE: ContextVar[nn.Module | None] = ContextVar("pair in use", default=None)


@contextmanager
def in_use(pair: nn.Module) -> Iterator[None]:
    """Make this pair the pair in use, so that its sites are read with its own data plate."""
    token = _IN_USE.set(pair)
    try:
        yield
    finally:
        _IN_USE.reset(token)


def known(pair: nn.Module | None = None) -> Places | None:
    """The places found for a pair, or for the pair in use."""
    pair = pair if pair is not None else _IN_USE.get()
    return None if pair is None else _FOUND.get(pair)


def keep(pair: nn.Module, places: Places) -> None:
    """Remember the places found for a pair."""
    _FOUND[pair] = places


def is_local(site: Any, plates: frozenset[str] | None = None) -> bool:
    """Whether a site is local, that is, in the data plate.

    Arguments:
        plates: the names of the data plate. The default is the data plate of the pair in use. If
            neither is known, each plate at dimension -1 counts as the data plate.
    """
    return any(in_data_plate(frame, plates) for frame in site["cond_indep_stack"])


def in_data_plate(frame: Any, plates: frozenset[str] | None = None) -> bool:
    """Whether a frame is that of the data plate; ``plates`` as in `is_local`."""
    if plates is None and (found := known()) is not None:
        plates = found.plates
    return frame.vectorized and frame.dim == -1 and (plates is None or frame.name in plates)


def locate(
    observed: Mapping[str, Any], more: Mapping[str, Any] | None, batch: Sequence[Tensor]
) -> Places | None:
    """Find the data plate and the site of x from the observed sites of one or two runs.

    Arguments:
        observed: the observed sites of a run of the model on this batch.
        more: the observed sites of a run on another number of rows, or None.
        batch: the tensors of the batch; the first is x.

    Raises `UsageError` if the data plate is not at dimension -1.
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
                    f"the data plate '{plate}' has dim={dim} at site '{name}' but must have "
                    "dim=-1: decorate model and guide with @pyro_vae.data_plate_at"
                    f"({dim}), or exchange the plates"
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
    """Raise `UsageError` if a data plate uses only some of the rows that it is given."""
    if size[1] == n and size[0] < n:
        raise UsageError(
            f"the data plate '{plate}' draws {size[0]} of the {n} rows of its batch, but fit draws "
            f'minibatches itself: use pyro.plate("{plate}", len(x), dim=-1), or '
            f'pyro.plate("{plate}", N, subsample_size=len(x)), where N is the number of all data'
        )


def _sizes(site: Any) -> dict[tuple[str, int], tuple[int, int | None]]:
    """The size, and the size before subsampling, of each plate around a site.

    A plate without a size gets the size of the site's distribution.
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
    """Which tensor of the batch each site observes: the same object, or else an equal tensor.

    A site that only computes a value from x, such as ``x > 0``, may equal x in these rows. So a
    tensor that a site observes as the same object is not compared with other sites. If there is
    only one site, it observes x, even if the model transforms x.
    """
    found: dict[str, int] = {}
    for name, site in sites.items():
        for i, tensor in enumerate(batch):
            if site["value"] is tensor:
                found.setdefault(name, i)
    free = [i for i in range(len(batch)) if i not in found.values()]
    for name in [name for name in sites if name not in found]:
        for i in free:
            if _equal(sites[name]["value"], batch[i]):
                found.setdefault(name, i)
    return found or (dict.fromkeys(sites, 0) if len(sites) == 1 else {})


def _equal(value: Tensor, tensor: Tensor) -> bool:
    if value.numel() != tensor.numel():
        return False
    one, other = value.flatten(), tensor.flatten()
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
