"""A pair whose global and group latents are held at given values, so that only local ones remain.

Tools for the latents of one datum (`gaps`, `anneal`, `nuts` of a datum) serve such a pair. Their
results are conditional on these values.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.compat import buffers_of, site_is_subsample
from pyro_vae.errors import UsageError
from pyro_vae.pairs import data_plate
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.pair import Batch, Pair
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents, log_prob
from pyro_vae.pairs.traces import Given


class GivenGlobals(nn.Module):
    r"""A pair with its global and group latents w held at given values: p(x, z | w), q(z | x, w).

    Arguments:
        pair: any pair with global latents, whose data plate is known (`find_places`).
        values: a value for each global latent, by site.

    Model and guide of this pair have only the local latents. Both share the parameters of the pair.
    """

    def __init__(self, pair: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.pair, self.names = pair, tuple(values)
        if hasattr(pair, "template"):
            self.template = pair.template
        self.hold(values)

    def hold(self, values: Mapping[str, Tensor]) -> None:
        """Hold the latents at other values."""
        for name, value in values.items():  # as buffers, they are inputs of a traced graph
            buffers_of(self)[_key(name)] = value.detach()

    def model(self, *batch: Tensor) -> Any:
        with self._held():
            return cast(Pair, self.pair).model(*batch)

    def guide(self, *batch: Tensor) -> Any:
        with self._held():
            return cast(Pair, self.pair).guide(*batch)

    @contextmanager
    def _held(self) -> Iterator[None]:
        own = buffers_of(self)
        values = {name: cast(Tensor, own[_key(name)]) for name in self.names}
        with poutine.block(hide_fn=_hidden(self.pair)), Given(values):
            yield


def _key(name: str) -> str:
    return name.replace(".", "/")  # a buffer has no dots in its name


def _hidden(pair: nn.Module) -> Callable[[Any], bool]:
    """Return whether a site is a latent outside the data plate, or an auxiliary site of one."""
    found = data_plate.known(pair)
    plates = None if found is None else found.plates

    def hidden(site: Any) -> bool:
        latent = site["type"] == "sample" and not site["is_observed"]
        return latent and not site_is_subsample(site) and not data_plate.is_local(site, plates)

    return hidden


def draw_globals(pair: nn.Module, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """Return a draw of the guide for each of these latents. Call it within `using`."""
    return global_values(trace_guide(pair, batch), names) if names else {}


def global_values(guide: Trace, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the values of these latents of the model in a trace of the guide."""
    found = latents(guide)
    for name in names:
        if name not in found:
            raise UsageError(
                f"all data share latent site '{name}' of the model, but the guide does not have "
                "it: add it to the guide"
            )
    return {name: found[name]["value"] for name in names}


def at_one_draw(pair: nn.Module, batch: Batch, seed: int) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the pair with its global and group latents held at one draw of the guide.

    Also returns the names of these latents. A pair without any is returned as it is.
    """
    names = tuple(global_latents(pair, batch))
    if not names:
        return pair, names
    with using(pair, seed):
        return GivenGlobals(pair, draw_globals(pair, batch, names)), names


def pools(pair: nn.Module, batch: Batch, names: Sequence[str] | None = None) -> bool:
    """Whether the guide's distribution of global latents depends on the rows (amortization).

    The guide runs on the first half of the batch and on the whole batch, or on one row and on two
    copies of it. So a guide that counts rows is found even if all rows are equal. Call this
    function within `using`.
    """
    names = global_latents(pair, batch) if names is None else names
    if not names:
        return False
    n = len(batch[0])
    other = batch if n > 1 else tuple(torch.cat([part, part]) for part in batch)
    drawn = trace_guide(pair, tuple(part[: max(1, n // 2)] for part in batch))
    first, values = latents(drawn), global_values(drawn, names)
    free = global_values(trace_guide(pair, other), names)
    if any(free[name].shape != values[name].shape for name in names):
        return True  # more rows have more groups
    with Given(values):
        second = latents(trace_guide(pair, other))
    for name in names:
        ours, theirs = log_prob(first[name]), log_prob(second[name])
        if ours.shape != theirs.shape or not bool(ours.isclose(theirs, 1e-4, 1e-4).all()):
            return True
    return False


def pooled_latents(pair: nn.Module, batch: Batch) -> tuple[str, ...]:
    """The global latents that the guide computes from the rows that it is given, see `pools`.

    None for a guide that knows its density only at its own draws.
    """
    names = tuple(global_latents(pair, batch))
    with suppress(UsageError):
        return names if pools(pair, batch, names) else ()
    return ()


POOLED_ROWS = 64
"""Rows on which `pools` runs the guide; fewer could all be equal, as rows of zeros."""


def spread_rows(batch: Batch, number: int = POOLED_ROWS) -> Batch:
    """At most this many rows of a batch, at equal distances."""
    n = len(batch[0])
    rows = torch.linspace(0, n - 1, min(n, number), device=batch[0].device).long()
    return tuple(part[rows] for part in batch)
