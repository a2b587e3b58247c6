"""The trace of a pair's model, and its global latents."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor, nn

from pyro_vae.compat import was_observed
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.data_plate_search import find_places
from pyro_vae.pairs.pair import Pair
from pyro_vae.pairs.scope import keep_shapes, using
from pyro_vae.pairs.sites import is_deterministic, latents
from pyro_vae.pairs.traces import trace


def trace_model(pair: nn.Module, batch: Sequence[Tensor], guide: Trace) -> Trace:
    """The trace of the model on a batch, replayed against a trace of the guide."""
    find_places(pair, batch)
    found = trace(poutine.replay(cast(Pair, pair).model, trace=guide), batch)
    keep_shapes(pair, batch)
    return found


def unconditioned(pair: nn.Module) -> Callable[..., Any]:
    """The model of a pair, changed so that it draws the data instead of observing them."""
    return cast(Callable[..., Any], _Uncondition()(cast(Pair, pair).model))


class _Uncondition(UnconditionMessenger):
    """Pyro's ``uncondition``, except that ``pyro.deterministic`` sites keep their own value."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg):
            super()._pyro_sample(msg)


def global_latents(pair: nn.Module, batch: Sequence[Tensor]) -> list[str]:
    """The global latents of a pair: the latent sites outside all data plates.

    They are found by a run of the model on two rows of a batch.
    """
    few = [tensor[:2] for tensor in batch]
    find_places(pair, few)
    with using(pair, seed=0):
        drawn = trace(unconditioned(pair), few)
        sites = {name: site for name, site in latents(drawn).items() if not is_local(site)}
    return [name for name, site in sites.items() if not was_observed(site)]
