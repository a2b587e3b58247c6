"""The trace of a pair's guide, with its auxiliary sites folded into its latents."""

from collections.abc import Sequence
from typing import Any

from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_vae.pairs.data_plate_search import find_places


def trace_guide(pair: nn.Module, batch: Sequence[Tensor], *handlers: Any) -> Trace:
    """The trace of the guide on a batch, inside these handlers, innermost first.

    A latent that depends on an auxiliary site is one latent of the trace, with its own density
    (`pyro_vae.pairs.folding`).
    """
    from pyro_vae.pairs.folding import trace_guide as folded_guide  # avoids a circular import

    find_places(pair, batch)
    return folded_guide(pair, batch, *handlers)
